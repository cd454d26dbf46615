"""What a search varies: the factors of a recipe, as one vector of positive numbers.

``subspaces``         a coefficient for each subspace of the ranking (NPS, arXiv 2505.18713, eq. 2);
                      with one subspace, one rescale of everything that is kept
``subspace-density``  how much of each subspace survives, at unscaled values
``groups``            a coefficient for each group of tensors (see groups.py)
``group-density``     how much of each group survives, under the one density of all
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal, get_args

from nps_compress.errors import InvalidArgumentError
from nps_compress.groups import Group
from nps_compress.prune import COEFFICIENTS, Rule
from nps_compress.recipe import Recipe

Genes = Literal["subspaces", "subspace-density", "groups", "group-density"]
GENES: tuple[Genes, ...] = get_args(Genes)


def check_genes(names: Sequence[str], rules: Collection[Rule] = ()) -> tuple[Genes, ...]:
    """Genes by their names. Raises InvalidArgumentError for an unknown one, none at all, or one
    that these rules have no use for."""
    for name in names:
        if name not in GENES:
            raise InvalidArgumentError("genes", name, f"some of {', '.join(GENES)}")
    if not names:
        raise InvalidArgumentError("genes", "", f"some of {', '.join(GENES)}")
    if "subspace-density" in names and "sampled" in rules:
        what = "without 'subspace-density' where the rule is sampled"
        raise InvalidArgumentError("genes", ",".join(names), what)
    return tuple(gene for gene in GENES if gene in names)


class Genotype:
    """Turns vectors of positive factors into recipes; all 1 is the recipe it starts from."""

    def __init__(self, recipe: Recipe, genes: Sequence[Genes], groups: Sequence[Group]) -> None:
        self._recipe, self._genes, self._groups = recipe, genes, groups

    @property
    def names(self) -> list[str]:
        """What each number of a vector stands for."""
        subspaces = range(len(self._recipe.coefficients))
        names: dict[Genes, list[str]] = {
            "subspaces": [f"subspace {number}" for number in subspaces],
            "subspace-density": [f"density of subspace {number}" for number in subspaces],
            "groups": list(self._groups),
            "group-density": [f"density of {group}" for group in self._groups],
        }
        return [name for gene in self._genes for name in names[gene]]

    def express(self, factors: Sequence[float]) -> Recipe:
        """The recipe that a vector stands for, as far as recipes go. factors: [len(self.names)]."""
        recipe, rest = self._recipe, list(factors)

        def take(before: Sequence[float]) -> tuple[float, ...]:
            low, high = COEFFICIENTS
            return tuple(min(max(old * rest.pop(0), low), high) for old in before)

        for gene in self._genes:
            if gene == "subspaces":
                recipe = replace(recipe, coefficients=take(recipe.coefficients))
            elif gene == "subspace-density":
                before = recipe.subspace_densities or (1.0,) * len(recipe.coefficients)
                recipe = replace(recipe, subspace_densities=take(before))
            else:
                name = "group_coefficients" if gene == "groups" else "group_densities"
                known: dict[str, float] = getattr(recipe, name)
                after = take([known.get(group, 1.0) for group in self._groups])
                merged = known | dict(zip(self._groups, after, strict=True))
                recipe = replace(recipe, **{name: merged})  # type: ignore[arg-type]
        return recipe
