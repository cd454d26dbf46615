"""Store fine-tunes of a shared base model as a few percent of their size.

>>> import nps_compress
>>> report = nps_compress.pack("base/", "finetuned/", "task.nps")  # doctest: +SKIP
>>> nps_compress.unpack("base/", "task.nps", "rebuilt/")  # doctest: +SKIP

Names are loaded when first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nps_compress.bank import BankMetrics, TaskBank, TaskInfo
    from nps_compress.bundle import Bundle, BundledTask
    from nps_compress.bundle import add as add_to_bundle
    from nps_compress.bundle import extract as extract_from_bundle
    from nps_compress.bundle import inspect as inspect_bundle
    from nps_compress.bundle import remove as remove_from_bundle
    from nps_compress.cards import model_card
    from nps_compress.errors import (
        BaseMismatchError,
        BenchmarkError,
        CalibrationError,
        CheckpointError,
        FitnessError,
        FormatError,
        InvalidArgumentError,
        NotMixableError,
        NpsError,
        OutOfMemoryError,
        OutputExistsError,
        OutputTooLargeError,
        PickleRefusedError,
        RecipeError,
        RetainError,
        SearchInterruptedError,
        TaskBankError,
        WriteError,
    )
    from nps_compress.inspection import inspect
    from nps_compress.merging.contract import Settings as MergeSettings
    from nps_compress.merging.driver import MergeReport, merge
    from nps_compress.merging.tuning import TuningOptions
    from nps_compress.packing import PackReport, pack
    from nps_compress.pretrained import from_pretrained
    from nps_compress.quantizer import NPSConfig
    from nps_compress.recipe import Recipe
    from nps_compress.reconstruct import Task, rebuild
    from nps_compress.report import Quality
    from nps_compress.searching import SearchOptions, search_recipe
    from nps_compress.sparse_safetensors import ExportReport, export_sparse, import_sparse
    from nps_compress.transferring import TransferReport, transfer
    from nps_compress.unpacking import UnpackReport, VerifyReport, unpack, verify
    from nps_compress.unpacking import open_task as open

__version__ = "0.1.0"

_HOME = {
    "BankMetrics": "bank",
    "BaseMismatchError": "errors",
    "BenchmarkError": "errors",
    "Bundle": "bundle",
    "BundledTask": "bundle",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "ExportReport": "sparse_safetensors",
    "FitnessError": "errors",
    "FormatError": "errors",
    "InvalidArgumentError": "errors",
    "MergeReport": "merging.driver",
    "MergeSettings": "merging.contract:Settings",
    "NPSConfig": "quantizer",
    "NotMixableError": "errors",
    "NpsError": "errors",
    "OutOfMemoryError": "errors",
    "OutputExistsError": "errors",
    "OutputTooLargeError": "errors",
    "PackReport": "packing",
    "PickleRefusedError": "errors",
    "Quality": "report",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "RetainError": "errors",
    "SearchInterruptedError": "errors",
    "SearchOptions": "searching",
    "Task": "reconstruct",
    "TaskBank": "bank",
    "TaskBankError": "errors",
    "TaskInfo": "bank",
    "TransferReport": "transferring",
    "TuningOptions": "merging.tuning",
    "UnpackReport": "unpacking",
    "VerifyReport": "unpacking",
    "WriteError": "errors",
    "add_to_bundle": "bundle:add",
    "export_sparse": "sparse_safetensors",
    "extract_from_bundle": "bundle:extract",
    "from_pretrained": "pretrained",
    "import_sparse": "sparse_safetensors",
    "inspect": "inspection",
    "inspect_bundle": "bundle:inspect",
    "merge": "merging.driver",
    "model_card": "cards",
    "open": "unpacking:open_task",
    "pack": "packing",
    "rebuild": "reconstruct",
    "remove_from_bundle": "bundle:remove",
    "search_recipe": "searching",
    "transfer": "transferring",
    "unpack": "unpacking",
    "verify": "unpacking",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
