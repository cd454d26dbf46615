"""A task bank: whatever is asked of it, the model is exactly one task, or exactly the base."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from conftest import ROOT, bits, write_checkpoint
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import nps_compress
from nps_compress import TaskBank, resident, torch_words
from nps_compress.checkpoint import open_checkpoint
from nps_compress.errors import (
    BaseMismatchError,
    CheckpointError,
    FormatError,
    InvalidArgumentError,
    TaskBankError,
)
from nps_compress.recipe import Recipe
from nps_compress.resident_model import ResidentModel

RECIPES = {
    "signs": Recipe(prune="signs", density=0.3),
    "magnitude": Recipe(prune="magnitude", density=0.1),
    "sampled": Recipe(prune="sampled", density=0.1),
    "whole": None,
    "few signs": Recipe(prune="signs", density=0.05),
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class Net(torch.nn.Module):
    """Weights of one dtype, a tied one, a buffer of integers."""

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


@contextlib.contextmanager
def unless_full() -> Iterator[None]:
    """Pass over a budget that is too small for what is asked."""
    try:
        yield
    except TaskBankError as error:
        if "does not fit" not in str(error):
            raise


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
        @initialize(
            budget=st.sampled_from([None, 12_000, 20_000]),
            rebuilt=st.sampled_from([0, 0, 40_000, None]),
        )
        def start(self, budget, rebuilt):
            self.bank = world.bank(host_bytes=budget, rebuilt_bytes=rebuilt)
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
            with unless_full():
                self.bank.activate(name)
                self.active = name

        @rule(name=st.sampled_from(list(RECIPES)), keep=st.booleans())
        def use(self, name, keep):
            if name not in self.bank:
                return
            with unless_full(), self.bank.use(name, keep=keep):
                assert state(self.bank.model) == world.states[name]
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
                if self.active:
                    assert self.bank.tasks()[self.active].tier in {"host", "rebuilt"}
                assert state(self.bank.model) == world.states[self.active]
                held = self.bank.metrics().nbytes["host"]
                budget = self.bank._near.budget
                assert budget is None or held <= budget
                rebuilt = self.bank._rebuilt
                assert rebuilt.budget is None or rebuilt.nbytes <= rebuilt.budget

        def teardown(self):
            if hasattr(self, "bank"):
                self.bank.deactivate()
                assert state(self.bank.model) == world.states[None]

    Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
    Machine.TestCase("runTest").runTest()


@pytest.fixture
def bank(world) -> TaskBank:
    bank = world.bank()
    for path in world.paths.values():
        bank.add(path)
    return bank


@pytest.mark.parametrize("former", [None, "signs", "whole"])
@pytest.mark.parametrize("target", [None, "magnitude", "whole", "signs"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_switch_that_fails_leaves_the_former_task(
    bank, world, monkeypatch, former, target, error
):
    if former == target:
        return
    bank.activate(former)
    exchange, calls = resident._exchange, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise error("now")
        exchange(*arguments)

    monkeypatch.setattr(resident, "_exchange", failing)
    with pytest.raises(TaskBankError if error is MemoryError else error):
        bank.activate(target)
    assert bank.active == former
    assert state(bank.model) == world.states[former]
    assert bank.metrics().failures == 1
    monkeypatch.undo()
    for name in (target, former, None, target):
        bank.activate(name)
        assert state(bank.model) == world.states[name]


def test_a_recovery_that_fails_is_tried_again(bank, world, monkeypatch):
    bank.activate("signs")
    monkeypatch.setattr(resident, "_exchange", lambda *_: 1 / 0)
    original = bank._resident.restore_base
    monkeypatch.setattr(bank._resident, "restore_base", lambda: original() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bank.activate("whole")
    monkeypatch.undo()
    bank.activate("whole")
    assert state(bank.model) == world.states["whole"]
    bank.deactivate()
    assert state(bank.model) == world.states[None]


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["deleted", "damaged", "replaced", "cut", "a folder"])
def test_a_file_that_changed_is_refused_and_the_former_task_stays(world, tmp_path, what):
    paths = {name: tmp_path / path.name for name, path in world.paths.items()}
    for name, path in paths.items():
        path.write_bytes(world.paths[name].read_bytes())
    bank = world.bank(host_bytes=12_000)
    bank.add(paths["signs"], pin=True)
    bank.add(paths["magnitude"])
    assert bank.add(paths["whole"]).tier == "disk"
    bank.unpin("signs")
    bank.activate("magnitude")
    path = paths["whole"]
    if what == "damaged":
        damaged(path)
    elif what == "replaced":
        path.write_bytes(paths["sampled"].read_bytes())
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
        if what == "a folder":
            path.mkdir()
    wanted = InvalidArgumentError if what in ("deleted", "a folder") else FormatError
    for attempt in (
        bank.activate,
        bank.prefetch,
        bank.pin,
        lambda name: bank.use(name).__enter__(),
    ):
        with pytest.raises(wanted):
            attempt("whole")
        assert bank.active == "magnitude"
        assert not bank.tasks()["whole"].pinned
        assert state(bank.model) == world.states["magnitude"]
    bank.activate("signs")
    assert state(bank.model) == world.states["signs"]


@pytest.mark.parametrize("kind", ["signs", "whole"])
def test_what_is_wrong_is_not_added(world, worlds, tmp_path, kind):
    bank = world.bank()
    path = tmp_path / "bad.nps"
    path.write_bytes(world.paths[kind].read_bytes())
    damaged(path)
    with pytest.raises(FormatError):
        bank.add(path)
    with pytest.raises(InvalidArgumentError, match="readable file"):
        bank.add(tmp_path / "none.nps")
    other = Net(world.dtype, 0)
    with torch.no_grad():
        other.inner.weight[0, 0] += 1
    base = saved(other, tmp_path / "other")
    task = pack(base, saved(Net(world.dtype, 7), tmp_path / "tuned"), tmp_path / "t.nps", kind)
    for verify in (True, False):
        with pytest.raises(BaseMismatchError, match=r"'inner.weight' has other values"):
            bank.add(task, verify=verify)
    with pytest.raises(BaseMismatchError):
        bank.add(worlds["f32"].paths[kind])
    with pytest.raises(InvalidArgumentError, match="task name"):
        bank.add(world.paths[kind], "")
    assert len(bank) == 0
    assert state(bank.model) == world.states[None]


def test_a_model_that_is_not_the_base_is_refused(world):
    with pytest.raises(CheckpointError, match="is F32, the base's tensor BF16"):
        TaskBank(Net(torch.float32, 0), world.base)
    with pytest.raises(CheckpointError, match=r"is not what model.safetensors holds"):
        TaskBank(Net(world.dtype, 1), world.base)
    for budget in ({"device_bytes": 1}, {"host_bytes": -1}):
        with pytest.raises(InvalidArgumentError):
            world.bank(**budget)


def test_a_model_that_was_moved_is_not_switched(bank, world):
    bank.activate("signs")
    bank.model.float()
    for name in ("whole", None):
        with pytest.raises(TaskBankError, match="moved or replaced"):
            bank.activate(name)
    assert bank.active == "signs"


def test_tensors_that_do_not_fit_the_model_are_refused(world, tmp_path):
    base = Net(world.dtype, 0).state_dict()
    del base["out.weight"]
    more = write_checkpoint(tmp_path / "more", {**base, "extra": torch.ones(3, 3)})
    less = {name: tensor for name, tensor in base.items() if name != "inner.bias"}
    fewer = write_checkpoint(tmp_path / "fewer", less)
    for tuned, message in (
        (more, "tensor 'extra' has no place"),
        (fewer, "has no tensor 'inner.bias'"),
    ):
        bank = world.bank()
        task = pack(world.base, tuned, tmp_path / f"{tuned.name}.nps", "whole")
        with pytest.raises(CheckpointError, match=message):
            bank.add(task)


def test_tied_weights_that_differ_in_the_task_are_refused(tmp_path):
    base, tuned = (Net(torch.float32, seed).state_dict() for seed in (0, 1))
    folder = write_checkpoint(tmp_path / "base", {k: v.clone() for k, v in base.items()})
    bank = TaskBank(Net(torch.float32, 0), folder)
    both = write_checkpoint(tmp_path / "both", {k: v.clone() for k, v in tuned.items()})
    bank.add(pack(folder, both, tmp_path / "both.nps", "whole"))
    bank.activate("both")
    assert state(bank.model) == state(Net(torch.float32, 1))
    tuned["out.weight"] = tuned["out.weight"] + 1
    other = write_checkpoint(tmp_path / "other", tuned)
    with pytest.raises(CheckpointError, match=r"is tied to 'embed.weight' in the model"):
        bank.add(pack(folder, other, tmp_path / "other.nps", "whole"))
    assert bank.active == "both"


def test_the_least_recently_used_leave_and_pinned_ones_stay(world):
    bank = world.bank(host_bytes=13_000)
    small = ("magnitude", "sampled")
    for name in small:
        bank.add(world.paths[name])
    bank.add(world.paths["signs"], pin=True)
    tiers = {name: info.tier for name, info in bank.tasks().items()}
    assert tiers == {"magnitude": "host", "sampled": "host", "signs": "host"}
    with pytest.raises(TaskBankError, match="does not fit into the 13,000 bytes"):
        bank.add(world.paths["whole"], pin=True)
    assert "whole" not in bank
    assert bank.add(world.paths["whole"]).tier == "disk"
    with pytest.raises(TaskBankError, match="pinned or active"):
        bank.activate("whole")
    bank.unpin("signs")
    bank.activate("magnitude")
    bank.activate("sampled")
    bank.activate("whole")
    tiers = {name: info.tier for name, info in bank.tasks().items()}
    assert tiers == {"magnitude": "disk", "sampled": "host", "signs": "disk", "whole": "host"}
    metrics = bank.metrics()
    assert (metrics.switches, metrics.hits, metrics.misses) == (3, 2, 2)
    assert metrics.evictions == 2
    assert metrics.nbytes["host"] == sum(bank.tasks()[name].nbytes for name in ("sampled", "whole"))
    assert metrics.nbytes["disk"] == sum(world.paths[name].stat().st_size for name in bank.tasks())
    assert len(metrics.switch_seconds) == 3


def test_what_is_kept_rebuilt_is_switched_to_without_a_word_moved(world, monkeypatch):
    whole = sum(len(data) for _, data in world.states["signs"].values())
    bank = world.bank(rebuilt_bytes=2 * whole)
    for path in world.paths.values():
        bank.add(path)
    names = ("signs", "magnitude", "sampled")
    for name in names:
        bank.activate(name)
    assert [bank.tasks()[name].tier for name in names] == ["rebuilt", "rebuilt", "host"]
    held = bank.metrics().nbytes["rebuilt"]
    assert 0 < held <= 2 * whole
    bank.deactivate()
    pointers = {key: tensor.data_ptr() for key, tensor in bank.model.state_dict().items()}
    with monkeypatch.context() as patch:
        for function in ("exchange", "switch"):
            patch.setattr(resident, function, None)
        for name in ("magnitude", "signs", None, "signs"):
            bank.activate(name)
            assert state(bank.model) == world.states[name]
        assert bank.model.out.weight is bank.model.embed.weight
    for name in ("sampled", "magnitude", "whole", "signs", None):
        bank.activate(name)
        assert state(bank.model) == world.states[name]
    now = {key: tensor.data_ptr() for key, tensor in bank.model.state_dict().items()}
    assert now == pointers
    assert bank.metrics().nbytes["rebuilt"] == held
    bank.remove("signs")
    bank.remove("magnitude")
    assert bank.metrics().nbytes["rebuilt"] == 0


def test_no_memory_to_keep_a_task_rebuilt_is_no_fault(world, monkeypatch):
    bank = world.bank(rebuilt_bytes=None)
    bank.add(world.paths["signs"])

    def full(self, task):
        raise MemoryError

    monkeypatch.setattr(ResidentModel, "rebuilt", full)
    bank.activate("signs")
    assert state(bank.model) == world.states["signs"]
    assert bank.tasks()["signs"].tier == "host"


def test_a_task_in_use_is_not_removed_and_blocks_nest(bank, world):
    bank.activate("whole")
    with bank.use("signs"):
        with pytest.raises(TaskBankError, match="in use"):
            bank.remove("signs")
        with bank.use(None):
            assert state(bank.model) == world.states[None]
        assert state(bank.model) == world.states["signs"]
        bank.remove("whole")  # what was active before
    assert bank.active is None
    assert state(bank.model) == world.states[None]
    with pytest.raises(ZeroDivisionError), bank.use("signs"):
        1 / 0  # noqa: B018
    assert bank.active is None


@pytest.mark.parametrize("budget", [None, 12_000])
def test_threads_see_only_what_they_asked_for(world, budget):
    bank = world.bank(host_bytes=budget)
    names = ["signs", "few signs", "magnitude"]
    for name in names:
        bank.add(world.paths[name])
    wrong: list[object] = []
    errors: list[BaseException] = []

    def run(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(25):
                name = names[rng.integers(3)] if rng.random() < 0.9 else None
                with unless_full():
                    with bank.use(name, keep=bool(rng.integers(2))) as model:
                        if state(model) != world.states[name]:
                            wrong.append(name)
                    if name:
                        bank.prefetch(name)
                bank.metrics()
        except BaseException as error:
            errors.append(error)

    def come_and_go() -> None:
        try:
            for _ in range(10):
                bank.add(world.paths["whole"])
                bank.remove("whole")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    threads.append(threading.Thread(target=come_and_go))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not wrong
    bank.deactivate()
    assert state(bank.model) == world.states[None]


KINDS = ("sequence", "token", "encoder", "causal", "seq2seq", "image", "clip")


@pytest.mark.parametrize("rebuilt_bytes", [0, None])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_kind(tmp_path, kind, rebuilt_bytes):
    folders = [tiny_models.build(kind, tmp_path / str(seed), seed) for seed in range(3)]
    base = folders[0]
    tasks = {}
    for number, recipe in ((1, "signs"), (2, "magnitude")):
        tasks[recipe] = pack(base, folders[number], tmp_path / f"{recipe}.nps", recipe)
    bank = TaskBank.from_pretrained(base, tasks, rebuilt_bytes=rebuilt_bytes)
    wanted = {None: state(type(bank.model).from_pretrained(base))}
    for name, path in tasks.items():
        wanted[name] = state(nps_compress.from_pretrained(base, path))
    for name in ("signs", "magnitude", None, "magnitude", "signs", None):
        bank.activate(name)
        assert state(bank.model) == wanted[name]


def test_an_encoder_serves_tasks_with_heads_of_their_own(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(0)
    base = tmp_path / "base"
    body = BertModel(BertConfig(**tiny_models.BERT))
    body.save_pretrained(base)
    tasks, inputs = {}, torch.arange(8)[None]
    for labels in (2, 3, 5):
        model = BertForSequenceClassification(BertConfig(**tiny_models.BERT, num_labels=labels))
        model.bert.load_state_dict(body.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / str(labels))
        path = tmp_path / f"{labels}.nps"
        tasks[str(labels)] = pack(base, tmp_path / str(labels), path, "signs")
    bank = TaskBank.from_pretrained(base, list(tasks.values()))
    before = {name: tensor.clone() for name, tensor in bank.model.state_dict().items()}
    for name in ("3", "5", "2", "5"):
        wanted = nps_compress.from_pretrained(base, tasks[name])
        with bank.use(name) as model, torch.inference_mode():
            assert bits(model(inputs).logits) == bits(wanted(inputs).logits)
            assert model.classifier.weight.shape[0] == int(name)
        config = bank.tasks()[name].config
        assert len(config.get("id2label", "ab")) == int(name)
    assert all(bits(before[name]) == bits(t) for name, t in bank.model.state_dict().items())
    folder = tiny_models.build("token", tmp_path / "token")
    other = pack(base, folder, tmp_path / "token.nps", "signs")
    with pytest.raises(CheckpointError, match="architecture is BertForTokenClassification"):
        bank.add(other)


def test_a_task_that_computes_otherwise_is_refused(tmp_path):
    import json

    base = tiny_models.build("causal", tmp_path / "base")
    tuned = tiny_models.build("causal", tmp_path / "tuned", 1)
    config = json.loads((tuned / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (tuned / "config.json").write_text(json.dumps(config))
    task = pack(base, tuned, tmp_path / "t.nps", "signs")
    bank = TaskBank.from_pretrained(base)
    with pytest.raises(CheckpointError, match=r"rms_norm_eps is 0.5"):
        bank.add(task)


def test_tied_embeddings_of_transformers_stay_tied(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**tiny_models.BERT, tie_word_embeddings=True))
        model.save_pretrained(folder := tmp_path / str(seed))
        folders.append(folder)
    task = pack(*folders, tmp_path / "t.nps", "magnitude")
    bank = TaskBank.from_pretrained(folders[0], {"t": task})
    wanted = state(nps_compress.from_pretrained(folders[0], task))
    bank.activate("t")
    assert state(bank.model) == wanted
    assert bank.model.lm_head.weight is bank.model.model.embed_tokens.weight
    bank.deactivate()
    assert state(bank.model) == state(LlamaForCausalLM.from_pretrained(folders[0]))


VECTORS = ROOT / "format_spec" / "vectors"


class Loose(torch.nn.Module):
    """Tensors of any names and dtypes."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = dict(zip(tensors, map(str, range(len(tensors))), strict=True))
        for name, tensor in tensors.items():
            self.register_buffer(self._names[name], tensor)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, at) for name, at in self._names.items()}


def loose(vector: Path) -> TaskBank:
    """A bank whose model has what a vector needs of its base, and its new tensors as others."""
    base = open_checkpoint(vector.with_suffix(".base.safetensors"))
    tensors = {}
    with nps_compress.open(vector) as task:
        for entry in task.reader.tensors:
            source = task.base_tensor_name(entry.name)
            words = base.read(source) if source else np.zeros(17, entry.dtype.word)
            shape = entry.shape if source else (17,)
            tensors[entry.name] = torch_words.from_numpy(words, entry.dtype, shape)
    return TaskBank(Loose(tensors), base.path)


WITH_BASE = sorted((VECTORS / "valid").glob("*.base.safetensors"))


@pytest.mark.parametrize("base", WITH_BASE, ids=lambda path: path.name.split(".")[0])
def test_every_codec_of_the_standard(base, tmp_path):
    vector = base.parent / base.name.replace(".base.safetensors", ".nps")
    bank = loose(vector)
    before = state(bank.model)
    bank.add(vector, "task")
    nps_compress.unpack(base, vector, tmp_path / "out")
    unpacked = open_checkpoint(tmp_path / "out")
    wanted = {
        name: (t.shape, unpacked.read(name).tobytes()) for name, t in unpacked.tensors.items()
    }
    for _ in range(2):
        bank.activate("task")
        assert state(bank.model) == wanted
        bank.deactivate()
        assert state(bank.model) == before


@pytest.mark.parametrize("codec", ["short-delta", "distances", "grid", "levels", "signs"])
def test_a_tensor_with_another_digest_than_promised_is_not_added(codec):
    vector = VECTORS / "reject" / f"D-DIGEST-{codec}.nps"
    bank = loose(vector)
    with pytest.raises(FormatError, match="D-DIGEST"):
        bank.add(vector)
    assert len(bank) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiers_of_a_card(worlds, dtype):
    world = worlds[dtype]
    bank = TaskBank(Net(world.dtype, 0).cuda(), world.base, device_bytes=12_000, host_bytes=20_000)
    for path in world.paths.values():
        bank.add(path)
    for name in (*RECIPES, None, "whole", "signs", "whole", "magnitude", None):
        bank.activate(name)
        found = {key: tensor.cpu() for key, tensor in bank.model.state_dict().items()}
        assert {k: (tuple(t.shape), bits(t)) for k, t in found.items()} == world.states[name]
    assert bank.metrics().nbytes["device"] <= 12_000
