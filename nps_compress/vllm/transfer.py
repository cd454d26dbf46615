"""The weight transfer engine ``nps``: make a running engine another task, or its base again.

Through vLLM's own routes or methods: start, update with ``{"task": "law.nps"}``, or ``null`` for
the base, and finish. Pausing before and resuming after that is the caller's, as with any backend.
An update that fails leaves the former weights; finishing, which fails too then, ends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from nps_compress.vllm.switching import ModelSwitch, reported_once


@dataclass
class NPSInit(WeightTransferInitInfo):
    """Nothing has to be agreed upon beforehand."""


@dataclass
class NPSUpdate(WeightTransferUpdateInfo):
    """The path of a task's file, where the engine's processes find it; None: the base."""

    task: str | None


class NPSWeightTransferEngine(WeightTransferEngine[NPSInit, NPSUpdate]):
    """Reads tasks from files; all ranks switch, or none does."""

    init_info_cls, update_info_cls = NPSInit, NPSUpdate
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        self._switch = ModelSwitch(model, vllm_config)

    def init_transfer_engine(self, init_info: NPSInit) -> None:
        """There is no connection to make."""

    def start_weight_update(self) -> None:
        """Nothing changes before the task is known."""

    def receive_weights(self, update_info: NPSUpdate) -> None:
        """Switch. Raises as :meth:`ModelSwitch.open` and :meth:`ModelSwitch.to`."""
        switch = self._switch
        with reported_once():
            former, task = switch.active, switch.open(update_info.task)
            try:
                switch.to(task)
            finally:
                unused = former if switch.active is task else task
                if unused is not None:
                    unused.close()

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """There is no connection to close."""
