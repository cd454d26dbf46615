"""``nps-compress serve``: the command line of the server."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, NoReturn

import click

from nps_compress.commands.shared import given

# What vLLM has options of its own for, or no need of.
_OWN_ENGINE_ONLY = {
    *("folders", "device", "device_memory", "host_memory", "rebuilt_memory", "mixed"),
    *("max_batch", "max_running", "max_waiting", "max_body", "max_requests", "timeout", "grace"),
}
LOOPBACK = "127.0.0.1"


@click.command()
@click.argument("base")
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_OPTION...]")
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="The embedded server, or vLLM's own where it is installed.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME=FILE",
    help="A task and its .nps file, or FILE alone, which names it. Any number of them.",
)
@click.option("--host", default=LOOPBACK, show_default=True, help="Where to listen.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free."
)
@click.option("--name", help="What BASE is called in `model`.  [default: its folder's name]")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="A file with the key that clients must send; or NPS_COMPRESS_API_KEY in the environment.  "
    "[default: no key]",
)
@click.option(
    "--allow-load",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Let clients load .nps files of this folder, and unload tasks. Any number of them.  "
    "[default: they can't]",
)
@click.option(
    "--device", help="Where the model is, as torch names it.  [default: cuda if there, else cpu]"
)
@click.option(
    "--device-memory", type=float, help="Most GB (10^9 bytes) of tasks on the GPU.  [default: all]"
)
@click.option(
    "--host-memory", type=float, help="Most GB of tasks in main memory.  [default: all of them]"
)
@click.option(
    "--rebuilt-memory",
    type=float,
    default=0.0,
    show_default=True,
    help="Most GB of tasks kept as whole weights, where the model is: switches between them cost "
    "next to nothing.",
)
@click.option(
    "--cycle-time",
    type=float,
    default=0.5,
    show_default=True,
    help="Seconds that a task keeps the model while others wait.",
)
@click.option(
    "--mixed",
    is_flag=True,
    help="Answer requests of several tasks in one batch, by adding each task's changes to the "
    "outputs. Answers agree with the task's own up to rounding.  [default: tasks take turns]",
)
@click.option(
    "--max-batch", type=int, default=16, show_default=True, help="Most rows of a task at once."
)
@click.option(
    "--max-running",
    type=int,
    default=64,
    show_default=True,
    help="Most rows begun and not finished, of all tasks together.",
)
@click.option(
    "--max-waiting",
    type=int,
    default=256,
    show_default=True,
    help="Most inputs of a task that wait; more are refused (429).",
)
@click.option(
    "--max-tokens",
    type=int,
    default=4096,
    show_default=True,
    help="Most tokens of a prompt and its answer together.",
)
@click.option(
    "--max-body", type=float, default=1.0, show_default=True, help="Most MB (10^6 bytes) a request."
)
@click.option(
    "--max-requests", type=int, default=1024, show_default=True, help="Most requests at once."
)
@click.option(
    "--timeout",
    type=float,
    default=300.0,
    show_default=True,
    help="Seconds after which a request is given up.",
)
@click.option(
    "--grace",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds to finish what runs after SIGTERM or Ctrl-C.",
)
@click.pass_context
def serve(
    ctx: click.Context,
    base: str,
    tasks: tuple[str, ...],
    engine: str,
    vllm_options: tuple[str, ...],
    **options: Any,
) -> None:
    """Serve BASE and its tasks over HTTP, in the shape of OpenAI's API, from one model in memory.

    The `model` of a request names the task, or the base. Requests of a task are answered together;
    tasks take turns. A page for people is at `/`, figures for Prometheus at `/metrics`. Only this
    machine can reach it unless --host says otherwise.

    With --engine vllm this becomes vLLM's server, its options after `--`. One task is served alone,
    as its full checkpoint would be; several by the request's `model` (experimental); without any
    the base, whose weights vLLM's /update_weights switches.

    \b
    Example:
      nps-compress serve base/ --task law=law.nps --task med=med.nps
      curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"model": "law", "prompt": "The court"}'
      nps-compress serve base/ --task law=law.nps --engine vllm -- --max-model-len 4096
    """
    if engine == "vllm":
        _become_vllm(ctx, base, _named(tasks), vllm_options, options)
    if vllm_options:
        raise click.UsageError(f"got unexpected extra arguments ({' '.join(vllm_options)})")
    try:
        from nps_compress.serve.server import Settings, run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "nps_compress":
            raise
        raise click.ClickException(
            f"{error.name} is not installed: pip install 'nps-compress[serve]'"
        ) from None
    run(Settings(base=base, tasks=_named(tasks), **options), tell=click.echo)


def _become_vllm(
    ctx: click.Context,
    base: str,
    tasks: dict[str, Path],
    vllm_options: tuple[str, ...],
    options: dict[str, Any],
) -> NoReturn:
    if refused := given(ctx, _OWN_ENGINE_ONLY):
        raise click.UsageError(f"{refused[0]} is of --engine transformers; vLLM's go after `--`")
    if importlib.util.find_spec("vllm") is None:
        raise click.ClickException("vllm is not installed in this environment: pip install vllm")
    from nps_compress.serve.api_key import read_api_key
    from nps_compress.vllm.launch import prepare

    if given(ctx, {"max_tokens"}):
        vllm_options = (f"--max-model-len={options['max_tokens']}", *vllm_options)
    prepare(
        base,
        tasks,
        host=options["host"],
        port=options["port"],
        name=options["name"],
        api_key=read_api_key(options["api_key_file"], os.environ),
        cycle=options["cycle_time"] if given(ctx, {"cycle_time"}) else None,
        options=vllm_options,
    ).run(tell=click.echo)


def _named(tasks: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for task in tasks:
        name, is_named, path = task.partition("=")
        if not is_named:
            name, path = Path(task).name.removesuffix(".nps"), task
        if not name or not path:
            raise click.BadParameter(f"expected NAME=FILE, received {task!r}", param_hint="--task")
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice", param_hint="--task")
        found[name] = Path(path)
    return found
