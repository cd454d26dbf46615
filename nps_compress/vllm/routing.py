"""Each request served by the task that its ``model`` names: experimental.

Tasks come and go as vLLM's LoRA adapters do, by its options and routes, but their weights take the
place of the base's: so a batch holds one task, and tasks take turns. The scheduler's interface is
not public in vLLM: this is written for, and tested with, version 0.32.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler

from nps_compress.errors import InvalidArgumentError
from nps_compress.vllm.arguments import DEFAULT_CYCLE
from nps_compress.vllm.switching import ModelSwitch, reported_once
from nps_compress.vllm.turns import Turns

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

if TYPE_CHECKING:
    from nps_compress.reconstruct import Task

BASE = 0  # as requests without an adapter are numbered


class RoutingWorker(PlatformWorker):
    """A worker whose LoRA adapters are tasks.

    Raises:
        InvalidArgumentError: an option of vLLM's is set that this can't serve with.
    """

    def load_model(self, **options: Any) -> None:
        """Load the base, without the layers that add adapters to it."""
        config = self.vllm_config
        parallel = config.parallel_config
        for name, value, wanted in (
            ("--max-loras", getattr(config.lora_config, "max_loras", None), 1),
            ("--pipeline-parallel-size", parallel.pipeline_parallel_size, 1),
            ("--data-parallel-size", parallel.data_parallel_size, 1),
            ("--speculative-config", config.speculative_config, None),
            ("--weight-transfer-config", config.weight_transfer_config, None),
        ):
            if value != wanted:
                raise InvalidArgumentError(name, value, f"{wanted} to route by task")
        runner = self.model_runner
        lora_config, runner.lora_config = runner.lora_config, None
        try:
            super().load_model(**options)
        finally:
            runner.lora_config = lora_config
        runner.lora_manager = TaskManager(ModelSwitch(runner.get_model(), config))


class TaskManager:
    """What vLLM's model runner asks of a LoRA manager, for tasks."""

    def __init__(self, switch: ModelSwitch) -> None:
        self._switch = switch
        self._tasks: dict[int, Task] = {}
        # vLLM finds cached keys and values by an adapter's name and path, whatever it holds.
        self._contents: dict[tuple[str, str], bytes] = {}
        self._dummies: set[int] = set()
        self._certain = True  # that the weights are those of the active task

    def add_adapter(self, request: Any) -> bool:
        """Open a task and rebuild all of it once, so that what is wrong with it shows now.

        Raises:
            NpsError: it is damaged, has another base, or is not what it was under this name.
        """
        with reported_once():
            return self._add(request)
        return False

    def _add(self, request: Any) -> bool:
        number = request.lora_int_id
        if number in self._tasks and not request.load_inplace:
            return False
        task = self._switch.open(request.lora_path, verify=True)
        assert task is not None  # as there is a path
        content = task.reader.content_digest
        if self._contents.setdefault((request.lora_name, request.lora_path), content) != content:
            task.close()
            expected = "what it was when it was first loaded under this name; use another name"
            raise InvalidArgumentError("task", request.lora_path, expected)
        self.remove_adapter(number)
        self._tasks[number] = task
        return True

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """Make the model what all of a batch asks for.

        Raises:
            RuntimeError: it asks for several tasks. What ModelSwitch.to raises.
        """
        numbers = {int(number) for number in mapping.index_mapping if number >= BASE}
        if len(numbers) > 1:
            raise RuntimeError(f"a batch holds one task, this one {len(numbers)}: {numbers}")
        if not numbers or numbers <= self._dummies:
            return
        (number,) = numbers
        if number == BASE:
            self._become(None)
            return
        (request,) = (each for each in requests if each.lora_int_id == number)
        self._add(request)
        self._become(self._tasks[number])

    def _become(self, task: Task | None) -> None:
        if task is not self._switch.active or not self._certain:
            self._switch.to(task)
            self._certain = True

    def remove_adapter(self, number: int) -> bool:
        """Forget a task; its weights stay until others are needed."""
        self._dummies.discard(number)
        return self._tasks.pop(number, None) is not None

    def remove_all_adapters(self) -> None:
        """Forget all tasks, as vLLM wants when it has loaded other weights."""
        self._certain = self._certain and not self._tasks
        self._dummies.clear()
        self._tasks.clear()

    def list_adapters(self) -> set[int]:
        """Numbers of the tasks that are open."""
        return set(self._tasks)

    def pin_adapter(self, number: int) -> bool:
        """Every task stays open anyway."""
        return number in self._tasks

    def supports_tower_connector_lora(self) -> bool:
        """Never: a task is of the whole model."""
        return False

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Nothing is kept for the runs before the first request."""
        yield

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """An adapter of a run before the first request, which may have any weights."""
        self._dummies.add(request.lora_int_id)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Tasks have no rank."""
        return default_rank


class CyclingScheduler(Scheduler):
    """Schedules one task at a time; a task's turn ends by preempting what still runs of it.

    Preempted requests go on in their next turn, mostly from the prefix cache.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.connector is not None:
            name, expected = "--kv-transfer-config", "None to route by task"
            raise InvalidArgumentError(name, self.vllm_config.kv_transfer_config, expected)
        self._turns = Turns(self.vllm_config.additional_config.get("nps_cycle", DEFAULT_CYCLE))

    def schedule(self, *arguments: Any, **options: Any) -> Any:
        """One step of one task."""
        if self._pause_state != PauseState.UNPAUSED:
            return super().schedule(*arguments, **options)
        queues = (self.waiting, self.kv_holding_waiting)
        every = [*self.running, *(request for queue in queues for request in queue)]
        every.sort(key=lambda request: request.arrival_time)
        settled = not any(request.is_prefill_chunk for request in self.running)
        working = list(dict.fromkeys(map(_task_of, every)))
        task, may_begin = self._turns.next(working, time.monotonic(), settled=settled)
        self._preempt_others(task)
        hidden = []
        for queue in queues:
            aside = [each for each in queue if not may_begin or _task_of(each) != task]
            queue.remove_requests(aside)
            hidden.append(aside)
        try:
            return super().schedule(*arguments, **options)
        finally:
            for queue, aside in zip(queues, hidden, strict=True):
                for request in aside:
                    queue.add_request(request)

    def _preempt_others(self, task: int | None) -> None:
        """Send back what runs of other tasks, the last first, so that the order stays."""
        others = [request for request in self.running if _task_of(request) != task]
        self.running[:] = [each for each in self.running if _task_of(each) == task]
        for request in reversed(others):
            self._preempt_request(request, time.monotonic())


def _task_of(request: Any) -> int:
    return BASE if request.lora_request is None else request.lora_request.lora_int_id
