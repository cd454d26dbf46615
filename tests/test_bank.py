"""A task bank: whatever is asked of it, the model is exactly one task, or exactly the base."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from conftest import bits, write_checkpoint
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import nps_compress
from nps_compress import TaskBank, resident
from nps_compress.errors import (
    BaseMismatchError,
    CheckpointError,
    FormatError,
    InvalidArgumentError,
    TaskBankError,
)
from nps_compress.recipe import Recipe

RECIPES = {
    "signs": Recipe(prune="signs", density=0.3),
    "magnitude": Recipe(prune="magnitude", density=0.1),
    "sampled": Recipe(prune="sampled", density=0.1),
    "whole": None,
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class Net(torch.nn.Module):
    """Weights of one dtype, a tied one, a buffer of integers, one that is not contiguous."""

    def __init__(self, dtype: torch.dtype, seed: int, classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter((0.02 * torch.randn(*shape, generator=generator)).to(dtype))

        self.embed = torch.nn.Embedding(50, 24, _weight=normal(50, 24).data)
        self.inner = torch.nn.Linear(24, 130, dtype=dtype)
        self.inner.weight, self.inner.bias = normal(130, 24), normal(130)
        self.out = torch.nn.Linear(24, 50, bias=False, dtype=dtype)
        self.out.weight = self.embed.weight
        self.head = torch.nn.Linear(24, classes, dtype=dtype)
        self.head.weight, self.head.bias = normal(classes, 24), normal(classes)
        self.register_buffer("steps", torch.tensor(seed))


def state(model: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {name: (tuple(t.shape), bits(t)) for name, t in model.state_dict().items()}


def saved(model: torch.nn.Module, folder: Path) -> Path:
    tensors = {name: t.clone() for name, t in model.state_dict().items() if name != "out.weight"}
    return write_checkpoint(folder, tensors)


def pack(base: Path, tuned: Path, out: Path, kind: str) -> Path:
    recipe = RECIPES[kind]
    options = {"lossless": True} if recipe is None else {"recipe": recipe}
    nps_compress.pack(base, tuned, out, **options)
    return out


def unpacked(base: Path, task: Path, folder: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """What the model's state must be while a task is active."""
    from safetensors.torch import load_file

    nps_compress.unpack(base, task, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["out.weight"] = tensors["embed.weight"]
    return {name: (tuple(t.shape), bits(t)) for name, t in tensors.items()}


class World:
    """A base, tasks of every kind, and what the model must be with each."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        base = Net(dtype, 0)
        self.base = saved(base, folder / "base")
        self.states: dict[str | None, dict] = {None: state(base)}
        self.paths: dict[str, Path] = {}
        for number, kind in enumerate(RECIPES, 1):
            tuned = Net(dtype, number, classes=3 + number // 3 * number)
            if kind != "whole":
                with torch.no_grad():
                    for mine, other in zip(base.parameters(), tuned.parameters(), strict=True):
                        if mine.shape == other.shape:
                            other.copy_(mine.float() + 0.1 * other.float())
            path = folder / f"{kind}.nps"
            pack(self.base, saved(tuned, folder / kind), path, kind)
            self.paths[kind] = path
            self.states[kind] = unpacked(self.base, path, folder / f"{kind}-out")

    def bank(self, **options) -> TaskBank:
        return TaskBank(Net(self.dtype, 0), self.base, **options)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, World]:
    folder = tmp_path_factory.mktemp("worlds")
    return {name: World(folder / name, dtype) for name, dtype in DTYPES.items()}


@pytest.fixture
def world(worlds) -> World:
    return worlds["bf16"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_sequence_gives_exactly_what_was_asked_for(worlds, dtype):
    world = worlds[dtype]

    class Machine(RuleBasedStateMachine):
        @initialize(budget=st.sampled_from([None, 12_000, 30_000]))
        def start(self, budget):
            self.bank = world.bank(host_bytes=budget)
            self.active = None

        @rule(name=st.sampled_from(list(RECIPES)), verify=st.booleans())
        def add(self, name, verify):
            if name in self.bank:
                with pytest.raises(InvalidArgumentError, match="not taken"):
                    self.bank.add(world.paths[name])
            else:
                assert self.bank.add(world.paths[name], verify=verify).name == name

        @rule(name=st.sampled_from([*RECIPES, None]))
        def activate(self, name):
            if name is not None and name not in self.bank:
                with pytest.raises(InvalidArgumentError, match="task name"):
                    self.bank.activate(name)
                return
            try:
                self.bank.activate(name)
                self.active = name
            except TaskBankError as error:
                assert "does not fit" in str(error)

        @rule(name=st.sampled_from(list(RECIPES)), keep=st.booleans())
        def use(self, name, keep):
            if name not in self.bank:
                return
            try:
                with self.bank.use(name, keep=keep):
                    assert state(self.bank.model) == world.states[name]
            except TaskBankError as error:
                assert "does not fit" in str(error)
                self.active = self.bank.active
                return
            self.active = name if keep else self.active

        @precondition(lambda self: len(self.bank))
        @rule(data=st.data())
        def remove(self, data):
            name = data.draw(st.sampled_from(list(self.bank.tasks())))
            self.bank.remove(name)
            self.active = None if self.active == name else self.active

        @invariant()
        def the_model_is_what_was_asked_for(self):
            if hasattr(self, "bank"):
                assert self.bank.active == self.active
                assert state(self.bank.model) == world.states[self.active]
                held = self.bank.metrics().nbytes["host"]
                budget = self.bank._near.budget
                assert budget is None or held <= budget

        def teardown(self):
            if hasattr(self, "bank"):
                self.bank.deactivate()
                assert state(self.bank.model) == world.states[None]

    Machine.TestCase.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
    Machine.TestCase("runTest").runTest()
