"""Mixed batches: each row's answer is that of its own task, and the base stays the base."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from conftest import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nps_compress
from nps_compress import TaskBank
from nps_compress.errors import FormatError, InvalidArgumentError, NotMixableError, TaskBankError
from nps_compress.recipe import Recipe

RECIPES = {
    "signs": Recipe(prune="signs", density=0.2),
    "magnitude": Recipe(prune="magnitude", density=0.1),
    "whole": None,  # lossless
}
WORDS = tiny_models.BERT["vocab_size"]
MODELS = ("llama", "tied llama", "classifier", "bf16 llama")
BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of an answer's length


def made(name: str) -> Any:
    import transformers as hf

    if name == "classifier":
        return hf.BertForSequenceClassification(hf.BertConfig(**tiny_models.BERT, num_labels=3))
    if name == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=WORDS, eos_token_id=1, **sizes))
    tied = {"num_key_value_heads": 1, "tie_word_embeddings": name == "tied llama"}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**tiny_models.BERT, **tied))
    return model.bfloat16() if name == "bf16 llama" else model


@dataclass
class World:
    """A base, tasks of every recipe, and the models that they are unpacked."""

    base: Path
    tasks: dict[str, Path]
    models: dict[str | None, Any]

    def bank(self, **options: Any) -> TaskBank:
        return TaskBank.from_pretrained(self.base, self.tasks, **options)

    def answer(self, name: str | None, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.models[name](input_ids=ids, attention_mask=mask).logits.float()


def build(folder: Path, name: str, recipes: tuple[str, ...] = tuple(RECIPES)) -> World:
    torch.manual_seed(0)
    base = made(name)
    with torch.no_grad():  # fresh weights are so small that all inputs look the same
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter *= 4
    base.save_pretrained(folder / "base")
    world = World(folder / "base", {}, {None: base.eval()})
    for kind in recipes:
        tuned = made(name)
        tuned.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in tuned.parameters():
                scale = 0.5 * float(parameter.float().std()) if parameter.ndim > 1 else 0.3
                parameter += (scale * torch.randn(parameter.shape)).to(parameter.dtype)
        tuned.save_pretrained(folder / kind)
        path, recipe = folder / f"{kind}.nps", RECIPES[kind]
        options = {"lossless": True} if recipe is None else {"recipe": recipe}
        nps_compress.pack(folder / "base", folder / kind, path, **options)
        nps_compress.unpack(folder / "base", path, folder / f"{kind}-out")
        world.tasks[kind] = path
        world.models[kind] = type(base).from_pretrained(folder / f"{kind}-out").eval()
    return world


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, World]:
    folder = tmp_path_factory.mktemp("mixed")
    return {name: build(folder / name, name) for name in MODELS}


@pytest.fixture(scope="module")
def banks(worlds) -> dict[str, TaskBank]:
    return {name: world.bank() for name, world in worlds.items()}


@pytest.fixture(scope="module")
def world(worlds) -> World:
    return worlds["llama"]


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def inputs(rows: int, positions: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, the first of some rows padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (rows, positions), generator=generator)
    padding = torch.randint(0, positions, (rows, 1), generator=generator)
    return ids, (torch.arange(positions) >= padding).long()


COUNTS = st.tuples(*[st.integers(0, 3)] * 4).filter(any)


@pytest.mark.parametrize("name", MODELS)
def test_rows_get_the_answers_of_their_own_tasks(worlds, banks, name):
    world, bank = worlds[name], banks[name]
    before = state(bank.model)

    @settings(max_examples=12, deadline=None)
    @given(COUNTS, st.permutations(list(RECIPES)), st.integers(1, 9), st.integers(0, 99))
    def check(counts, order, positions, seed):
        rows = [task for task, n in zip([None, *order], counts, strict=True) for _ in range(n)]
        ids, mask = inputs(len(rows), positions, seed)
        with bank.mix(order) as mixed, mixed.rows(rows) as model:
            found = model(input_ids=ids, attention_mask=mask).logits.float()
        for task in set(rows):
            own = torch.tensor([row == task for row in rows])
            wanted = world.answer(task, ids[own], mask[own])
            last = -1 if wanted.ndim == 3 else slice(None)  # what padding says is nobody's
            assert off(found[own][:, last], wanted[:, last]) < BOUND[model.dtype]
        assert state(bank.model) == before
        assert hooks(bank.model) == 0

    check()
    ids, mask = inputs(4, 6)
    answers = [world.answer(task, ids, mask) for task in (None, *RECIPES)]
    for i, one in enumerate(answers):  # so that one task's answer is not another's
        assert all(off(one, other) > 0.2 for other in answers[:i])


def test_whatever_is_asked_in_between_the_base_stays_the_base(world):
    bank = world.bank()
    before, ids = state(bank.model), inputs(3, 5)
    for name in ("signs", "whole", "magnitude"):
        bank.activate(name)
        active = state(bank.model)
        with bank.mix(["signs"]) as mixed:
            assert state(bank.model) == before
            with pytest.raises(IndexError), mixed.rows(["signs"] * 3) as model:
                model(ids[0] + WORDS, ids[1])
            with torch.inference_mode():  # outside of rows()
                assert off(model(*ids).logits, world.answer(None, *ids)) == 0
        assert (bank.active, state(bank.model)) == (name, active)
        with pytest.raises(ZeroDivisionError), bank.mix(["signs"]):
            1 / 0  # noqa: B018
        assert (bank.active, state(bank.model)) == (name, active)
        assert hooks(bank.model) == 0
    with bank.mix(keep=True):
        pass
    assert (bank.active, state(bank.model)) == (None, before)


def test_a_mix_refuses_what_would_change_its_weights(world):
    bank = world.bank()
    with bank.mix(["signs"]) as mixed:
        for change in (
            lambda: bank.activate("whole"),
            lambda: bank.use("whole").__enter__(),
            lambda: bank.mix(["whole"]).__enter__(),
        ):
            with pytest.raises(TaskBankError, match="tasks are mixed"):
                change()
        with pytest.raises(TaskBankError, match="'signs' is in use"):
            bank.remove("signs")
        bank.remove("whole")
        with pytest.raises(InvalidArgumentError, match="one of the bank's"):
            mixed.join("whole")
        for rows in (["signs", None], ["signs", "magnitude"], [None, "signs", None]):
            with pytest.raises(InvalidArgumentError), mixed.rows(rows):
                pass
        mixed.join("magnitude")
        for rows in (["signs", "magnitude", "signs"], ["magnitude", None]):
            with pytest.raises(InvalidArgumentError, match="a task's together"), mixed.rows(rows):
                pass
    seen = []
    with bank.mix(["signs"]):
        other = threading.Thread(target=lambda: (bank.activate("signs"), seen.append(1)))
        other.start()
        other.join(0.2)
        assert not seen  # it waits for the weights
    other.join()
    assert bank.active == "signs"


def test_tasks_that_are_kept_rebuilt_are_mixed_by_their_changes(world):
    bank = world.bank(rebuilt_bytes=None)
    for name in ("magnitude", "signs"):
        bank.activate(name)
        assert bank.tasks()[name].tier == "rebuilt"
    ids, mask = inputs(3, 5)
    with bank.mix(["magnitude", "signs"]) as mixed, mixed.rows([None, "magnitude", "signs"]):
        found = bank.model(input_ids=ids, attention_mask=mask).logits
    for row, name in enumerate((None, "magnitude", "signs")):
        assert off(found[row], world.answer(name, ids, mask)[row]) < BOUND[torch.float32]
    assert bank.active == "signs"
    assert state(bank.model) == state(world.models["signs"])
    with bank.mix(["whole"]):
        pass
    assert bank.tasks()["whole"].tier == "host"  # it was tried, and no more


def test_tasks_of_a_mix_stay_in_memory(world):
    sizes = {name: info.nbytes for name, info in world.bank().tasks().items()}
    small = sizes["signs"] + sizes["magnitude"]
    assert sizes["whole"] < small
    bank = world.bank(host_bytes=small)
    with bank.mix(["signs", "magnitude"]) as mixed:
        with pytest.raises(TaskBankError, match="does not fit") as caught:
            mixed.join("whole")
        assert not isinstance(caught.value, NotMixableError)
        assert mixed.names == ["signs", "magnitude"]
        mixed.leave("signs")
        mixed.leave("magnitude")
        mixed.join("whole")
        assert bank.metrics().nbytes["host"] <= small


def test_a_file_that_is_damaged_does_not_get_in(world, tmp_path):
    path = tmp_path / "signs.nps"
    data = bytearray(world.tasks["signs"].read_bytes())
    path.write_bytes(data)
    bank = TaskBank.from_pretrained(world.base, {**world.tasks, "signs": path}, host_bytes=0)
    bank._near.budget = None
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ids, mask = inputs(2, 5)
    with bank.mix(["magnitude"]) as mixed:
        with pytest.raises(FormatError):
            mixed.join("signs")
        with mixed.rows([None, "magnitude"]) as model:
            found = model(ids, mask).logits
    assert off(found[1, -1], world.answer("magnitude", ids, mask)[1, -1]) < 1e-4


def test_what_can_not_be_mixed(worlds, tmp_path):
    """Layers of other kinds, heads of another size."""
    bank = build(tmp_path / "gpt2", "gpt2", ("signs",)).bank()
    before = state(bank.model)
    for _ in range(2):
        with pytest.raises(NotMixableError, match="'signs' can't be mixed"), bank.mix(["signs"]):
            pass
    with bank.use("signs"):
        assert state(bank.model) != before
    assert state(bank.model) == before
    world = worlds["classifier"]
    import transformers as hf

    other = hf.BertForSequenceClassification(hf.BertConfig(**tiny_models.BERT, num_labels=5))
    other.save_pretrained(tmp_path / "other")
    nps_compress.pack(world.base, tmp_path / "other", tmp_path / "o.nps", recipe=RECIPES["signs"])
    bank = TaskBank.from_pretrained(world.base, {**world.tasks, "other": tmp_path / "o.nps"})
    with bank.mix(["signs"]) as mixed:
        with pytest.raises(NotMixableError, match=r"'classifier.bias' has a shape of its own"):
            mixed.join("other")
        mixed.join("magnitude")


class Odd(nn.Module):
    """A model whose batch is not in the first dimension, or whose weights are used otherwise."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Embedding(WORDS, 8)
        self.inner = nn.Linear(8, 8)
        self.positions = nn.Embedding(32, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        x = self.table(input_ids)
        if self.kind == "positions first":
            return (self.inner(x.transpose(0, 1)).transpose(0, 1),)
        if self.kind == "positions alone":
            return (x + self.positions(torch.arange(x.shape[1])),)
        if self.kind == "not called":
            return (nn.functional.linear(x, self.inner.weight, self.inner.bias),)
        if self.kind == "rows reversed":
            return (self.inner(x.flip(0)).flip(0),)
        return (self.inner(x + self.positions(torch.arange(x.shape[1])[None])),)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("usual", None),
        ("positions first", r"Linear got \[5, 3, 8\] in a batch of 3 rows"),
        ("positions alone", r"Embedding got \[5\] in a batch of 3 rows"),
        ("not called", "an answer in a mixed batch is"),
        ("rows reversed", "an answer in a mixed batch is"),
    ],
)
def test_an_architecture_that_mixes_up_rows_is_found_out(tmp_path, kind, why):
    from safetensors.torch import save_file

    for seed, name in ((0, "base"), (1, "tuned")):
        torch.manual_seed(seed)
        model = Odd(kind)
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors", {"format": "pt"})
    nps_compress.pack(tmp_path / "base", tmp_path / "tuned", tmp_path / "t.nps", lossless=True)
    torch.manual_seed(0)
    bank = TaskBank(Odd(kind), tmp_path / "base")
    before = state(bank.model)
    bank.add(tmp_path / "t.nps", "t")
    if why is None:
        ids, mask = inputs(4, 6)
        with bank.mix(["t"]) as mixed, mixed.rows([None, None, "t", "t"]) as odd:
            found = odd(ids, mask)[0]
        with torch.no_grad():
            assert off(found[:2], bank.model(ids, mask)[0][:2]) == 0
            assert off(found[2:], model(ids, mask)[0][2:]) < 1e-5
    else:
        for match in (why, "as was found before"):
            with pytest.raises(NotMixableError, match=match), bank.mix(["t"]):
                pass
    assert (bank.active, state(bank.model), hooks(bank.model)) == (None, before, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_rows_on_a_card(worlds, name):
    world = worlds[name]
    bank = world.bank(device="cuda")
    before = {key: bits(tensor.cpu()) for key, tensor in bank.model.state_dict().items()}
    rows = [None, "signs", "signs", "magnitude", "whole"]
    ids, mask = inputs(len(rows), 7)
    with bank.mix(list(RECIPES)) as mixed, mixed.rows(rows) as model:
        found = model(input_ids=ids.cuda(), attention_mask=mask.cuda()).logits.float().cpu()
    for i, task in enumerate(rows):
        wanted = world.answer(task, ids[i : i + 1], mask[i : i + 1])[0]
        last = -1 if wanted.ndim == 2 else slice(None)
        assert off(found[i][last], wanted[last]) < 10 * BOUND[model.dtype]
    assert {key: bits(t.cpu()) for key, t in bank.model.state_dict().items()} == before
