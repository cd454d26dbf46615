"""Published baselines of task-vector compression, each with its cost in bits.

A method sees the base and the fine-tune as float32 copies of bfloat16 weights and the names of the
tensors to compress. It gives back the rebuilt tensors, rounded to nearest even to bfloat16, and
all the bits that somebody who has the base needs to rebuild them. The cost is a formula where the
method's own publication writes no file; names and shapes are the base's and cost nothing. Where a
choice is open, the one that is cheaper for the baseline is taken:

positions
    :func:`position_bits`, the entropy of the real mask: but for the counts, at most that of a
    random mask of the density, which Golomb codes exceed. A survivor whose change is zero is not
    stored.
values, 16 bits
    the rebuilt weight itself, so that nothing is lost beyond its rounding and no factor is stored.
values, 4 bits
    :func:`quantise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nps_compress.prune import tensor_seed

Tensors = Mapping[str, torch.Tensor]
Pieces = Callable[[], Iterator[torch.Tensor]]
ValueBits = Literal[16, 4]
SEED_BITS = 64


@dataclass(frozen=True)
class Result:
    """weights: the tensors that were named, float32 at bfloat16's values; bits: their cost."""

    weights: dict[str, torch.Tensor]
    bits: float

    @property
    def bits_per_param(self) -> float:
        return self.bits / sum(weight.numel() for weight in self.weights.values())


def magnitude(
    base: Tensors,
    tuned: Tensors,
    names: Sequence[str],
    density: float,
    rescale: float = 1.0,
    value_bits: ValueBits = 16,
) -> Result:
    """Keep the largest magnitudes of the whole task vector (the trim of TIES, arXiv 2306.01708).

    Every survivor is multiplied by ``rescale``. Bits: positions + values.
    """
    return fixed_nps(base, tuned, names, density, (rescale,), value_bits)


def fixed_nps(
    base: Tensors,
    tuned: Tensors,
    names: Sequence[str],
    density: float,
    coefficients: Sequence[float],
    value_bits: ValueBits = 16,
) -> Result:
    """Neural Parameter Search without the search (arXiv 2505.18713, eqs. 2, 4 and 5).

    coefficients: one factor per subspace; the subspaces are of equal count by magnitude over all
    tensors, smallest first. What is largest after the reweighting is kept, at its reweighted
    value. Equal coefficients make this magnitude pruning times one factor: the control that the
    paper lacks. Bits: positions + values, which hold the coefficients.
    """
    factors = torch.tensor(coefficients, dtype=torch.float32)
    shares = [1 - m / len(factors) for m in range(1, len(factors))]

    def deltas() -> Iterator[torch.Tensor]:
        return (_delta(base, tuned, name) for name in names)

    starts = [start for start, _, _ in _at_shares(deltas, shares)] if shares else []
    edges = torch.tensor(starts, dtype=torch.int32)

    def reweighted() -> Iterator[torch.Tensor]:
        for delta in deltas():
            if len(factors) == 1:
                yield delta * factors[0]
            else:
                yield delta * factors[torch.bucketize(_patterns(delta), edges, right=True)]

    weights, bits = {}, 0.0
    for name, change, mask in zip(names, reweighted(), largest(reweighted, density), strict=True):
        weights[name], cost = _write(base[name], change, mask, value_bits)
        bits += position_bits(mask) + cost
    return Result(weights, bits)


def dare(
    base: Tensors,
    tuned: Tensors,
    names: Sequence[str],
    density: float,
    seed: int,
    value_bits: ValueBits = 16,
) -> Result:
    """Keep each element with probability ``density``, divided by it (arXiv 2311.03099).

    The positions follow from the seed, so zero changes among the survivors are paid for. Bits:
    one seed of 64 bits + values.
    """
    weights, bits = {}, float(SEED_BITS)
    for name in names:
        delta = _delta(base, tuned, name)
        mask = _uniform(delta.shape, seed, name) < density
        weights[name], cost = _write(base[name], delta / density, mask, value_bits)
        bits += cost
    return Result(weights, bits)


def della(
    base: Tensors,
    tuned: Tensors,
    names: Sequence[str],
    density: float,
    seed: int,
    window: float | None = None,
    value_bits: ValueBits = 16,
) -> Result:
    """Keep larger magnitudes more probably, each divided by its probability (MagPrune).

    DELLA-Merging, arXiv 2406.11617; see :func:`keep_probabilities`. ``window`` is the paper's
    epsilon, the width of the range of probabilities (libraries also call half of it epsilon);
    by default the density (at most what 1 leaves), from half to one and a half times the density.
    The ranks are unknown to who rebuilds: bits are positions + values, no seed.
    """
    width = min(density, 1 - density) if window is None else window
    weights, bits = {}, 0.0
    for name in names:
        delta = _delta(base, tuned, name)
        keep = keep_probabilities(delta, density, width)
        mask = (_uniform(delta.shape, seed, name) < keep) & (delta != 0)
        weights[name], cost = _write(base[name], delta / keep, mask, value_bits)
        bits += position_bits(mask) + cost
    return Result(weights, bits)


def bitdelta(
    base: Tensors,
    tuned: Tensors,
    names: Sequence[str],
    per: Literal["matrix", "row"] = "matrix",
    exact: Collection[str] = (),
) -> Result:
    """The sign of every change times the mean magnitude (BitDelta, arXiv 2402.10193, section 3.1).

    That scale has the least squared error for the given signs; the paper's distillation of it is
    left out. ``row`` has a scale per row of the matrix. A change of zero counts as positive.
    Tensors of fewer than two dimensions and those in ``exact`` (in the paper: embeddings and
    head) are the fine-tune's. Bits: 1 per element + 16 (bfloat16) per scale; exact tensors 16.
    """
    weights, bits = {}, 0.0
    for name in names:
        delta = _delta(base, tuned, name)
        if _stays_exact(name, delta, exact):
            weights[name] = _round(tuned[name])
            bits += 16 * delta.numel()
            continue
        rows = _rows(delta)
        scale = _round(rows.abs().mean(1 if per == "row" else (0, 1), keepdim=True))
        change = torch.where(rows < 0, -scale, scale).reshape(delta.shape)
        weights[name] = _round(base[name] + change)
        bits += delta.numel() + 16 * scale.numel()
    return Result(weights, bits)


def low_rank(
    base: Tensors,
    tuned: Tensors,
    names: Sequence[str],
    bits_per_param: float,
    share: Literal["equal", "error"] = "equal",
    exact: Collection[str] = (),
) -> Result:
    """The truncated singular value decomposition of each matrix's change, factors in bfloat16.

    Ranks are handed out one by one while the total stays within ``bits_per_param`` times all
    elements: ``equal`` to the matrix with the fewest bits per element, ``error`` to where the
    squared error falls most per bit. Tensors of fewer than two dimensions and those in ``exact``
    are the fine-tune's; further dimensions are flattened into columns. Bits: 16 * rank * (rows +
    columns) + 16 for the rank, per matrix; exact tensors 16 per element.

    The singular vectors of the shorter side are eigenvectors of its Gram matrix in float64, all of
    them, without sampling. Singular values below a millionth of the largest get no rank.
    """
    weights, bits = {}, 0.0
    spectra: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    steps: list[tuple[float, int, str]] = []  # (priority, bits, matrix), lowest first
    total = bits_per_param * sum(base[name].numel() for name in names)
    for name in names:
        delta = _delta(base, tuned, name)
        if _stays_exact(name, delta, exact):
            weights[name] = _round(tuned[name])
            bits += 16 * delta.numel()
            continue
        tall = _tall(delta).double()
        energies, vectors = torch.linalg.eigh(tall.T @ tall)
        noise = 1e-12 * float(energies[-1])
        cost, affordable = 16 * sum(tall.shape), int(total // (16 * sum(tall.shape)))
        energies, vectors = energies.flip(0)[:affordable], vectors.flip(1)[:, :affordable]
        for rank, energy in enumerate(energies.tolist(), 1):
            if energy <= noise:
                break
            even = rank * cost / delta.numel()
            steps.append((even if share == "equal" else -energy / cost, cost, name))
        spectra[name] = energies, vectors.float()
        bits += 16
    if bits > total:
        raise ValueError(f"the exact tensors and ranks alone take {bits:.0f} of {total:.0f} bits")
    ranks = dict.fromkeys(spectra, 0)
    for _, cost, name in sorted(steps):  # of one matrix all cost the same: what fits is a prefix
        if bits + cost <= total:
            ranks[name] += 1
            bits += cost
    for name, rank in ranks.items():
        delta = _delta(base, tuned, name)
        tall, right = _tall(delta), spectra[name][1][:, :rank]
        change = _round(tall @ right) @ _round(right).T
        rows = _rows(delta)
        change = change if change.shape == rows.shape else change.T
        weights[name] = _round(base[name] + change.reshape(delta.shape))
    return Result({name: weights[name] for name in names}, bits)


def compeft(
    base: Tensors,
    tuned: Tensors,
    names: Sequence[str],
    density: float,
    alpha: float | None = None,
) -> Result:
    """The signs of the largest magnitudes times one scalar (ComPEFT, arXiv 2311.13171).

    The scalar is ``alpha`` times the standard deviation of the whole task vector, as published,
    where alpha is chosen on validation data; by default it is the survivors' mean magnitude, of
    least squared error. Bits: positions + 1 per survivor + 16 (bfloat16) for the scalar.
    """

    def deltas() -> Iterator[torch.Tensor]:
        return (_delta(base, tuned, name) for name in names)

    masks = list(largest(deltas, density))
    kept = sum(int(mask.sum()) for mask in masks)
    if alpha is None:
        pairs = zip(deltas(), masks, strict=True)
        scalar = sum(float(d[m].abs().sum(dtype=torch.float64)) for d, m in pairs) / max(kept, 1)
    else:
        numel = sum(mask.numel() for mask in masks)
        mean = sum(float(d.sum(dtype=torch.float64)) for d in deltas()) / numel
        squares = sum(float((d.double() - mean).square().sum()) for d in deltas())
        scalar = alpha * math.sqrt(squares / numel)
    step = _round(torch.tensor(scalar, dtype=torch.float32))
    weights = {
        name: _round(base[name] + delta.sign() * step * mask)
        for name, delta, mask in zip(names, deltas(), masks, strict=True)
    }
    return Result(weights, sum(map(position_bits, masks)) + kept + 16)


def keep_probabilities(delta: torch.Tensor, density: float, window: float) -> torch.Tensor:
    """MagPrune's probabilities of keeping: linear in the rank of the magnitude within each row.

    From density - window / 2 for the smallest to density + window / 2 for the largest of a row of
    the matrix (a node's incoming weights); a tensor of fewer dimensions is one row. Their mean is
    the density in every row. delta: any shape -> the same shape, float32.
    """
    if not 0 <= window <= 2 * (1 - density) or window >= 2 * density:
        raise ValueError(f"probabilities {density} +- {window / 2} leave (0, 1]")
    order = _rows(delta).abs().argsort(dim=1, stable=True)
    last = order.shape[1] - 1
    slope = window * (torch.arange(last + 1) - last / 2) / max(last, 1)
    keep = torch.empty(order.shape).scatter_(1, order, (density + slope).expand(order.shape))
    return keep.reshape(delta.shape)


def largest(pieces: Pieces, density: float) -> Iterator[torch.Tensor]:
    """Masks of the round(density * n) largest magnitudes over all pieces, exactly so many.

    Of those equal to the last magnitude that fits, an evenly spaced part is taken. Zeros are
    never: where there are too few others, fewer are kept. ``pieces`` yields float32 tensors anew
    each time; it is called three times.
    """
    ((threshold, wanted, ties),) = _at_shares(pieces, [density])
    seen = 0
    for piece in pieces():
        patterns = _patterns(piece)
        mask = patterns > threshold
        if threshold > 0:
            at = (patterns == threshold).reshape(-1).nonzero().reshape(-1)
            order = torch.arange(seen, seen + at.numel())
            taken = (order + 1) * wanted // max(ties, 1) > order * wanted // max(ties, 1)
            mask.view(-1)[at[taken]] = True
            seen += at.numel()
        yield mask


def random_position_bits(numel: int, density: float) -> float:
    """Entropy of the positions of a random mask: numel * H(density)."""
    return numel * float(_binary_entropy(torch.tensor(density, dtype=torch.float64)))


def position_bits(mask: torch.Tensor) -> float:
    """Bits of a tensor's real positions, at their empirical entropy.

    n * H(k / n) + log2(n + 1) for the count k of n, or the sum of that over the matrix's rows,
    whichever is less, + 1 bit to say which. An enumerative code attains it.
    """
    rows = _rows(mask)
    return 1 + min(_counted_bits(rows.reshape(1, -1)), _counted_bits(rows))


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Values as a sign and one of 8 magnitudes, and the bits they take. values: [n] float32.

    The magnitudes are the least-squares ones (Lloyd, 1982, from equal counts), rounded to
    bfloat16; a zero counts as positive. Bits: 8 * 16 + the codes, 4 * n or at their empirical
    entropy with 16 counts, whichever is less, + 1 to say which.
    """
    n = values.numel()
    if n == 0:
        return values, 0.0
    magnitudes = values.abs().sort().values.double()
    sums = torch.cat([magnitudes.new_zeros(1), magnitudes.cumsum(0)])
    edges, levels = torch.arange(9) * n // 8, magnitudes.new_zeros(8)
    for _ in range(200):
        counts = edges.diff()
        means = sums[edges].diff() / counts.clamp(min=1)
        levels = torch.where(counts > 0, means, levels).sort().values
        moved = torch.searchsorted(magnitudes, (levels[1:] + levels[:-1]) / 2)
        moved = torch.cat([edges[:1], moved, edges[-1:]])
        if torch.equal(moved, edges):
            break
        edges = moved
    book = _round(levels.float())
    codes = torch.bucketize(values.abs(), (book[1:] + book[:-1]) / 2)
    negative = values < 0
    counts = torch.bincount(codes + 8 * negative, minlength=16)
    entropy = n * float(torch.special.entr(counts / n).sum()) / math.log(2)
    bits = 8 * 16 + 1 + min(4 * n, entropy + 16 * math.log2(n + 1))
    return torch.where(negative, -book[codes], book[codes]), bits


def _write(
    base: torch.Tensor, change: torch.Tensor, mask: torch.Tensor, value_bits: ValueBits
) -> tuple[torch.Tensor, float]:
    """The rebuilt tensor, base + change where the mask is set, and the bits of its values."""
    kept, bits = change[mask], 16.0 * int(mask.sum())
    if value_bits == 4:
        kept, bits = quantise(kept)
    weight = base.clone()
    weight[mask] += kept
    return _round(weight), bits


def _delta(base: Tensors, tuned: Tensors, name: str) -> torch.Tensor:
    """One tensor of the task vector, contiguous float32."""
    if base[name].shape != tuned[name].shape:
        raise ValueError(f"{name}: the base is {base[name].shape}, not {tuned[name].shape}")
    delta = (tuned[name] - base[name]).float().contiguous()
    if not math.isfinite(float(delta.sum())):
        raise ValueError(f"{name}: a difference is not finite")
    return delta


def _round(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to nearest even to bfloat16, in float32."""
    return tensor.to(torch.bfloat16).float()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """As a matrix: the first dimension by all others; one row below two dimensions."""
    return tensor.reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1)


def _tall(delta: torch.Tensor) -> torch.Tensor:
    """As a matrix with at least as many rows as columns."""
    rows = _rows(delta)
    return rows if rows.shape[0] >= rows.shape[1] else rows.T


def _stays_exact(name: str, delta: torch.Tensor, exact: Collection[str]) -> bool:
    return delta.dim() < 2 or name in exact


def _uniform(shape: torch.Size, seed: int, name: str) -> torch.Tensor:
    """Draws from [0, 1) that follow from the seed and the tensor's name."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(tensor_seed(seed, name)))


def _patterns(piece: torch.Tensor) -> torch.Tensor:
    """The magnitudes' bit patterns, int32 in the order of the magnitudes; contiguous."""
    return piece.abs().contiguous().view(torch.int32)


def _at_shares(pieces: Pieces, shares: Sequence[float]) -> list[tuple[int, int, int]]:
    """The pattern of the round(share * n)-th largest magnitude, for each share.

    Also how many equal to it are still among those, and how many equal to it there are. The upper
    half of the patterns is counted first, then the lower half of those that share the upper one.
    """
    upper = torch.zeros(1 << 15, dtype=torch.long)
    lower = torch.zeros(len(shares), 1 << 16, dtype=torch.long)
    for piece in pieces():
        upper += torch.bincount(_patterns(piece).reshape(-1) >> 16, minlength=1 << 15)
    numel = int(upper.sum())
    highs = [_crossing(upper, round(share * numel)) for share in shares]
    for piece in pieces():
        patterns = _patterns(piece).reshape(-1)
        above = patterns >> 16
        for counts, (high, _) in zip(lower, highs, strict=True):
            counts += torch.bincount(patterns[above == high] & 0xFFFF, minlength=1 << 16)
    found = []
    for counts, (high, left) in zip(lower, highs, strict=True):
        low, left = _crossing(counts, left)
        found.append((high << 16 | low, left, int(counts[low])))
    return found


def _crossing(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """Where a count from the top reaches ``wanted``, and how many are still wanted there."""
    at_least = counts.flip(0).cumsum(0).flip(0)
    index = int((at_least >= wanted).sum()) - 1
    return index, wanted - int(at_least[index] - counts[index])


def _counted_bits(rows: torch.Tensor) -> float:
    """n * H(k / n) + log2(n + 1), summed over rows of n elements with k set. rows: [r, n] bool."""
    n = rows.shape[1]
    densities = rows.sum(1).double() / max(n, 1)
    return float((n * _binary_entropy(densities)).sum()) + rows.shape[0] * math.log2(n + 1)


def _binary_entropy(probability: torch.Tensor) -> torch.Tensor:
    """H in bits. probability: any shape, float64 -> the same."""
    entropy = torch.special.entr(probability) + torch.special.entr(1 - probability)
    return entropy / math.log(2)
