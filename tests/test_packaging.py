"""What is shipped: the wheel by itself, the names, and the order of imports."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import nps_compress

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# A module imports only from those above it.
ORDER = [
    "errors",
    "_jit",
    "_threads",
    "_progress",
    "atomic",
    "dtypes",
    "draws",
    "rounding",
    "rank_one",
    "entropy_coding",
    "mask_coding",
    "ulp_coding",
    "codecs",
    "sign_codec",
    "grid_codec",
    "kernels",
    "format.layout",
    "format.records",
    "format.writer",
    "format.index",
    "format.reader",
    "checkpoint",
    "task_vector",
    "distortion",
    "values",
    "prune",
    "signs",
    "groups",
    "recipe",
    "genotype",
    "candidates",
    "report",
    "search",
    "torch_words",
    "calibration",
    "images",
    "batches",
    "adapters",
    "models",
    "measured",
    "racing",
    "divergence",
    "callables",
    "fitness",
    "importance",
    "resident",
    "reconstruct",
    "retain",
    "live",
    "evaluator",
    "searching",
    "encoding",
    "packing",
    "unpacking",
    "lazy",
    "pretrained",
    "quantizer",
    "resident_model",
    "mixed_model",
    "bank",
    "packed",
    "bundle",
    "merging.contract",
    "merging.elect",
    "merging.average",
    "merging.task_arithmetic",
    "merging.ties",
    "merging.dare",
    "merging.della",
    "merging.consensus",
    "merging.emr",
    "merging.nps",
    "merging.neuromerging",
    "merging.evolver",
    "merging.methods",
    "merging.pruning",
    "merging.merger",
    "merging.exams",
    "merging.tuning",
    "merging.output",
    "merging.driver",
    "transfer_plot",
    "transferring",
    "sparse_safetensors",
    "inspection",
    "cards",
    "serve.api_key",
    "vllm.arguments",
    "vllm.stream",
    "vllm.turns",
    "vllm.launch",
    "vllm.loader",
    "vllm.switching",
    "vllm.transfer",
    "vllm.routing",
    "bench.figures",
    "bench.shapes",
    "bench.peers",
    "bench.synthetic",
    "bench.measuring",
    "bench.projection",
    "bench.svg",
    "bench.page",
    "bench.results",
    "bench.run",
    "commands.shared",
    "commands.merging",
    "serve.scheduler",
    "serve.failures",
    "serve.schemas",
    "serve.texts",
    "serve.sampling",
    "serve.decoding",
    "serve.processors",
    "serve.jobs",
    "serve.metrics",
    "serve.engine",
    "serve.catalogue",
    "serve.access",
    "serve.answers",
    "serve.shapes",
    "serve.page",
    "serve.app",
    "serve.server",
    "commands.serving",
    "cli",
]
# Who may import what is heavy, optional or easily misused.
ONLY_IN = {
    "cma": {"search"},
    "zstandard": {"codecs"},
    "triton": {"kernels"},
    "click": {"cli", "commands.shared", "commands.merging", "commands.serving"},
    "fastapi": {"serve.app", "serve.server"},
    "starlette": {"serve.access", "serve.answers", "serve.app"},
    "pydantic": {"serve.schemas"},
    "uvicorn": {"serve.server"},
    "prometheus_client": {"serve.metrics"},
    "tqdm": {"_progress"},
    "numba": {"_jit"},
    "transformers": {"adapters", "models", "pretrained", "quantizer", "serve.decoding"},
    "PIL": {"images"},
    "huggingface_hub": {"checkpoint"},
    "safetensors": {"checkpoint"},
    "torch": {
        *("kernels", "torch_words", "batches", "adapters", "models", "divergence", "fitness"),
        *("importance", "resident", "reconstruct", "live", "evaluator", "lazy", "merging.exams"),
        *("quantizer", "resident_model", "mixed_model", "bank"),
        *("serve.sampling", "serve.decoding", "serve.engine"),
        *("vllm.launch", "vllm.loader", "vllm.stream", "vllm.switching"),
    },
    "vllm": {"vllm.loader", "vllm.switching", "vllm.transfer", "vllm.routing"},
}


def modules() -> dict[str, list[Path]]:
    package = ROOT / "nps_compress"
    found: dict[str, list[Path]] = {"kernels": sorted((ROOT / "kernels" / "src").glob("*.py"))}
    for path in package.rglob("*.py"):
        if path.name != "__init__.py":
            name = ".".join(path.relative_to(package).with_suffix("").parts)
            found[name] = [path]
    return found


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_its_place():
    assert set(modules()) == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_only_go_down(module):
    for path in modules()[module]:
        for name in imports(path):
            inside = name.removeprefix("nps_compress.")
            if inside == name:
                top = name.split(".")[0]
                assert module in ONLY_IN.get(top, {module}), f"{module} imports {top}"
                continue
            for other in ORDER:
                if inside == other or inside.startswith(other + "."):
                    assert ORDER.index(other) < ORDER.index(module), f"{module} imports {other}"


def test_public_names_are_locked():
    assert nps_compress.__all__ == [
        "BankMetrics",
        "BaseMismatchError",
        "BenchmarkError",
        "Bundle",
        "BundledTask",
        "CalibrationError",
        "CheckpointError",
        "ExportReport",
        "FitnessError",
        "FormatError",
        "InvalidArgumentError",
        "MergeReport",
        "MergeSettings",
        "NPSConfig",
        "NotMixableError",
        "NpsError",
        "OutOfMemoryError",
        "OutputExistsError",
        "OutputTooLargeError",
        "PackReport",
        "PickleRefusedError",
        "Quality",
        "Recipe",
        "RecipeError",
        "RetainError",
        "SearchInterruptedError",
        "SearchOptions",
        "Task",
        "TaskBank",
        "TaskBankError",
        "TaskInfo",
        "TransferReport",
        "TuningOptions",
        "UnpackReport",
        "VerifyReport",
        "WriteError",
        "add_to_bundle",
        "export_sparse",
        "extract_from_bundle",
        "from_pretrained",
        "import_sparse",
        "inspect",
        "inspect_bundle",
        "merge",
        "model_card",
        "open",
        "pack",
        "rebuild",
        "remove_from_bundle",
        "search_recipe",
        "transfer",
        "unpack",
        "verify",
    ]
    for name in nps_compress.__all__:
        first, again = getattr(nps_compress, name), getattr(nps_compress, name)
        assert first.__doc__, name
        assert first is again, name  # no module has the name of what it offers
    with pytest.raises(AttributeError):
        nps_compress.no_such_name  # noqa: B018


def test_all_errors_share_a_root():
    from nps_compress import errors

    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, errors.NpsError)
            assert value.__name__ in (errors.__doc__ or "")


def test_version_is_stated_once_each():
    assert PROJECT["project"]["version"] == nps_compress.__version__
    assert f"## [{nps_compress.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_is_listed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "nps_compress").rglob("__init__.py")
    }
    assert listed == found | {"nps_compress.kernels"}


def test_kernels_never_resolves_into_this_repository():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(ROOT))
    assert not any(Path(entry or ".").resolve() == ROOT for entry in sys.path)


def test_importing_changes_and_loads_nothing():
    code = (
        "import sys, numpy as np; before = np.random.get_state()[1].copy(); import nps_compress;"
        "assert not {'torch', 'numba', 'transformers', 'cma'} & set(sys.modules);"
        "assert (before == np.random.get_state()[1]).all()"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_wheel_runs_in_an_empty_environment(tiny, tmp_path):
    source = tmp_path / "source"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    install = [str(binaries / "python"), "-m", "pip", "install", "--quiet"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([*install, *constraints, "torch"], check=True, capture_output=True)
    subprocess.run([*install, *constraints, str(wheel)], check=True, capture_output=True)

    def run(*arguments: object) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        command = [str(argument) for argument in arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    cli = binaries / "nps-compress"
    base, tuned = tiny
    run(cli, "pack", base, tuned, "-o", "t.nps")
    assert "ok" in run(cli, "verify", base, "t.nps")
    run(cli, "unpack", base, "t.nps", "-o", "out")
    code = "import nps_compress.kernels.rebuild as r, nps_compress.kernels as k; print(k.__file__)"
    place = Path(run(binaries / "python", "-c", code).strip())
    assert place.is_relative_to(tmp_path / "env")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        assert b"License-Expression: Apache-2.0" in archive.read(metadata)
    assert "nps_compress/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"nps_compress"}
