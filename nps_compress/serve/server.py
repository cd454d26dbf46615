"""A server from its settings: load, listen, and end in good order."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from nps_compress.adapters import device, quiet_transformers
from nps_compress.bank import TaskBank
from nps_compress.checkpoint import open_checkpoint
from nps_compress.errors import InvalidArgumentError
from nps_compress.serve.access import AccessLimits
from nps_compress.serve.api_key import OPEN, is_loopback, read_api_key
from nps_compress.serve.app import RequestLimits, create_app
from nps_compress.serve.catalogue import Catalogue
from nps_compress.serve.engine import Engine, EngineLimits
from nps_compress.serve.metrics import Metrics

_GB, _MB = 1e9, 1e6


@dataclass(frozen=True)
class Settings:
    """As the options of ``nps-compress serve``: sizes in GB, the body's in MB, times in seconds.

    Raises InvalidArgumentError: one is out of its range.
    """

    base: str
    tasks: Mapping[str, Path] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key_file: Path | None = None
    folders: Sequence[Path] = ()
    device: str | None = None
    device_memory: float | None = None
    host_memory: float | None = None
    rebuilt_memory: float = 0.0
    cycle_time: float = 0.5
    mixed: bool = False
    max_batch: int = 16
    max_running: int = 64
    max_waiting: int = 256
    max_tokens: int = 4096
    max_body: float = 1.0
    max_requests: int = 1024
    timeout: float = 300.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_running", "max_waiting", "max_requests"):
            self._refuse_unless(name, getattr(self, name) >= 1, "at least 1")
        self._refuse_unless("max_tokens", self.max_tokens >= 2, "at least 2")
        for name in ("max_body", "timeout"):
            self._refuse_unless(name, 0 < getattr(self, name) < 1e6, "more than 0, at most 10^6")
        for name in ("cycle_time", "grace"):
            self._refuse_unless(name, 0 <= getattr(self, name) < 1e6, "0 to 10^6 seconds")
        for name in ("device_memory", "host_memory", "rebuilt_memory"):
            value = getattr(self, name)
            self._refuse_unless(name, value is None or 0 <= value < 1e9, "0 to 10^9 GB")

    def _refuse_unless(self, name: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise InvalidArgumentError(f"--{name.replace('_', '-')}", getattr(self, name), expected)


def build(settings: Settings, api_key: str | None) -> FastAPI:
    """Load the base and all tasks, and the routes over them.

    Raises:
        NpsError: what TaskBank and Catalogue raise.
    """
    base = open_checkpoint(settings.base)
    name = settings.name or base.path.resolve().name
    if "/" not in settings.base and not Path(settings.base).exists():
        name = settings.name or settings.base
    if name in settings.tasks:
        raise InvalidArgumentError("--name", name, "none of the tasks' names")
    with quiet_transformers():
        bank = TaskBank.from_pretrained(
            settings.base,
            settings.tasks,
            device_bytes=_bytes(settings.device_memory),
            host_bytes=_bytes(settings.host_memory),
            rebuilt_bytes=_bytes(settings.rebuilt_memory),
            device=settings.device or device(),
        )
    catalogue = Catalogue(bank, base, name, settings.folders)
    metrics = Metrics()
    metrics.watch(bank.metrics)
    limits = EngineLimits(
        cycle_s=settings.cycle_time,
        max_waiting=settings.max_waiting,
        max_batch=settings.max_batch,
        max_running=settings.max_running,
        mixed=settings.mixed,
    )
    return create_app(
        Engine(bank, metrics, limits),
        catalogue,
        metrics,
        limits=RequestLimits(tokens=settings.max_tokens, seconds=settings.timeout),
        access=AccessLimits(
            body_bytes=int(settings.max_body * _MB), requests=settings.max_requests, api_key=api_key
        ),
        may_load=bool(settings.folders),
    )


def run(settings: Settings, tell: Callable[[str], Any]) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what runs, refuse what is new, and return.

    tell: gets the address, once it answers.

    Raises:
        InvalidArgumentError: there is no listening on this host and port. NpsError: as
        :func:`build`, and what the file of the API key raises.
    """
    key = read_api_key(settings.api_key_file, os.environ)
    with bound(settings.host, settings.port) as listener:
        app = build(settings, key)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        if not key and not is_loopback(host):
            tell(f"warning: {OPEN}")
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(settings.grace)),
        )
        count = len(settings.tasks)
        what = f"serving {settings.base} and {count} task{'s' * (count != 1)}"
        with _ending_quietly():
            _Server(config, lambda: tell(f"{what} on http://{shown}:{port}")).run([listener])


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address; nobody can connect until it listens."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
        return found
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InvalidArgumentError(
            "--host and --port", f"{host}:{port}", f"an address to listen on ({why})"
        ) from None


class _Server(uvicorn.Server):
    """Says when it answers."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], Any]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()


@contextlib.contextmanager
def _ending_quietly() -> Iterator[None]:
    """uvicorn raises the signal that ended it again; here it has done what it was for."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, lambda *_: None) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * _GB)
