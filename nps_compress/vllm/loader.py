"""``--load-format nps``: the base's checkpoint and one task, rebuilt tensor by tensor.

What decodes tasks is imported with the first of them: on a CPU vLLM looks into every module that
is loaded before its model is, and fails at llvmlite's, which numba loads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from nps_compress.errors import InvalidArgumentError
from nps_compress.vllm.stream import rebuilt_stream

if TYPE_CHECKING:
    import torch

    from nps_compress.reconstruct import Task

FORMAT, TASK_OPTION = "nps", "task"


class TaskLoader(DefaultModelLoader):
    """Reads a base as vLLM would, and turns it into a task on the way; None: the base itself."""

    def __init__(self, load_config: Any, task: Task | None) -> None:
        config = copy.copy(load_config)
        if config.load_format == FORMAT:
            config.load_format = "auto"
        options = dict(config.model_loader_extra_config or {})
        options.pop(TASK_OPTION, None)
        config.model_loader_extra_config = options
        super().__init__(config)
        self.task = task

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The fine-tune's tensors by their names in its checkpoint.

        Raises:
            BaseMismatchError: the model is not the task's base. FormatError: the task is damaged.
        """
        base = super().get_all_weights(model_config, model)
        if self.task is None:
            yield from base
            return
        # What this rank does not need is not read, and a model may read other checkpoints too.
        whole = (
            self.local_expert_ids is None
            and self._encoder_only_lm_prefixes is None
            and getattr(model, "is_unused_checkpoint_weight", None) is None
        )
        others = bool(getattr(model, "secondary_weights", ()))
        yield from rebuilt_stream(base, self.task, model_config.model, whole=whole, others=others)


class NPSModelLoader(TaskLoader):
    """Loads ``--model-loader-extra-config '{"task": "law.nps"}'``."""

    def __init__(self, load_config: Any) -> None:
        task = starting_task(load_config)
        if task is None:
            raise InvalidArgumentError(TASK_OPTION, task, "the path of a .nps file")
        super().__init__(load_config, task)


def starting_task(load_config: Any) -> Task | None:
    """The task that an engine is started with. Raises FormatError, InvalidArgumentError."""
    if load_config.load_format != FORMAT:
        return None
    from nps_compress.unpacking import open_task

    path = (load_config.model_loader_extra_config or {}).get(TASK_OPTION)
    return open_task(path) if path else None
