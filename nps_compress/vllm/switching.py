"""One rank's weights, changed in place from one task to another."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode
from vllm.distributed import get_world_group
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from nps_compress.errors import InvalidArgumentError, NpsError
from nps_compress.vllm.loader import TaskLoader, starting_task
from nps_compress.vllm.stream import refuse_other_shape

if TYPE_CHECKING:
    from nps_compress.reconstruct import Task


class ModelSwitch:
    """A model that is its base or one task, on all ranks the same.

    Weights are read and rebuilt as when the model was loaded, so that sharding, packing and
    quantising are vLLM's own, and they keep their places in memory.

    Raises:
        InvalidArgumentError: vLLM has compiled weights into the model.
    """

    def __init__(self, model: Any, vllm_config: Any) -> None:
        if current_platform.is_cpu():
            if vllm_config.compilation_config.mode != CompilationMode.NONE:
                # What was traced holds the repacked weights of the first task for ever.
                expected = "set, to switch tasks on a CPU"
                raise InvalidArgumentError("--enforce-eager", False, expected)
            # Nothing else does before the first prompt, which is fatal where that one is short.
            torch.cpu._init_amx()
        self._model, self._config = model, vllm_config
        self.active = starting_task(vllm_config.load_config)

    def open(self, path: str | None, *, verify: bool = False) -> Task | None:
        """A task that can take the place of the base; None is the base itself. On all ranks.

        verify: rebuild every tensor, for nothing but to see that it can be done.

        Raises:
            NpsError, OSError: the task can't be used, or another rank can't use it.
        """
        from nps_compress.unpacking import open_task

        task, failure = None, None
        try:
            if path is not None:
                task = open_task(path)
                refuse_other_shape(task)
            if verify:
                deque(self._weights(task), maxlen=0)
        except Exception as error:  # whatever it is, no rank may go on alone
            failure = error
        try:
            _agree(task, failure)
        except Exception:
            if task is not None:
                task.close()
            raise
        return task

    def to(self, task: Task | None) -> None:
        """Become a task, or the base where it is None. On all ranks.

        A failure on any rank puts back what was active on all.

        Raises:
            NpsError, OSError: the task can't be used, or another rank can't use it.
        """
        former = self.active
        try:
            _agree(task, self._try(task))
        except Exception:
            try:
                _agree(former, self._try(former))
            except Exception as error:
                # Half of one task and half of another must not answer anything.
                raise SystemExit(f"no weights are whole, the engine ends: {error}") from error
            raise
        self.active = task

    def _try(self, task: Task | None) -> Exception | None:
        try:
            self._load(task)
        except Exception as error:  # whatever it is, all ranks must go back
            return error
        return None

    def _load(self, task: Task | None) -> None:
        initialize_layerwise_reload(self._model)
        try:
            self._model.load_weights(self._weights(task))
        finally:  # so that layers are whole, though their values may not be
            finalize_layerwise_reload(self._model, self._config.model_config)

    def _weights(self, task: Task | None) -> Iterator[tuple[str, torch.Tensor]]:
        loader = TaskLoader(self._config.load_config, task)
        return loader.get_all_weights(self._config.model_config, self._model)


@contextmanager
def reported_once() -> Iterator[None]:
    """Raise what all ranks raise on the last one only.

    vLLM takes the ranks' replies to a call in their order and leaves those behind a failure to be
    taken for the replies to the next call.
    """
    try:
        yield
    except Exception:
        group = get_world_group()
        if group.rank_in_group == group.world_size - 1:
            raise


def _agree(task: Task | None, failure: Exception | None) -> None:
    """Raise on all ranks where one has failed, or has another task."""
    group = get_world_group()
    content = None if task is None else task.reader.content_digest
    mine = None if failure is None else str(failure)
    found: list[tuple[bytes | None, str | None]] = [(None, None)] * group.world_size
    torch.distributed.all_gather_object(found, (content, mine), group=group.cpu_group)
    if failure is not None:
        raise failure
    for _, other in found:
        if other is not None:
            raise NpsError(f"another rank failed: {other}")
    if any(each != content for each, _ in found):
        raise NpsError("the ranks were given different tasks")
