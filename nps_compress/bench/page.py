"""A report as one HTML page that needs nothing else: no script, no font, no address."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nps_compress.bench.figures import Table, counted, human
from nps_compress.bench.measuring import STEPS, Measured
from nps_compress.bench.projection import DENSE, OURS, Method, Plan
from nps_compress.bench.svg import Bar, Line, bars, lines

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #66717d; --rule: #d5dae0;
  --paper: #fff; --ours: #0b7a5c; --dense: #8a929b; --lora: #2f63b8; --peer: #b9791b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b0; --rule: #3a444e;
  --paper: #14191f; --ours: #35c79d; --dense: #8a929b; --lora: #78a4ee; --peer: #e0ab55; } }
body { margin: 2rem auto; padding: 0 1rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; font-size: 13.5px; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
th small { font-weight: normal; color: var(--soft); }
th:first-child, td:first-child { text-align: left; }
tr { border-bottom: 1px solid var(--rule); }
p.note, li { color: var(--soft); } p.ok { color: var(--ours); }
figure { margin: 1.2rem 0 2rem; } figcaption { margin-bottom: .6rem; }
svg { width: 100%; max-width: 62rem; height: auto; font-size: 12.5px; }
svg text { fill: var(--ink); }
polyline { fill: none; stroke-width: 1.4; }
.grid { stroke: var(--rule); } .lead { stroke: var(--soft); stroke-width: .6; }
rect.ours { fill: var(--ours); } rect.dense { fill: var(--dense); } rect.lora { fill: var(--lora); }
rect.peer { fill: none; stroke: var(--peer); stroke-dasharray: 4 2; }
rect.download { fill: var(--soft); opacity: .45; }
polyline.ours { stroke: var(--ours); stroke-width: 2.6; } polyline.dense { stroke: var(--dense); }
polyline.lora { stroke: var(--lora); }
polyline.peer { stroke: var(--peer); stroke-dasharray: 4 3; opacity: .75; }
"""


def page(
    title: str,
    verified: str,
    tables: Sequence[Table],
    plots: Sequence[tuple[str, str]],
    notes: Sequence[str],
) -> str:
    """The page. ``plots``: captions, and the SVG that each stands over."""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="ok">{escape(verified)}</p>',
        *(_table(table) for table in tables),
        "<h2>Plots</h2>",
        *(
            f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"
            for caption, svg in plots
        ),
        "<h2>What was assumed</h2>",
        "<ul>",
        *(f"<li>{escape(note)}</li>" for note in notes),
        "</ul>",
    ]
    # The policy forbids what the page does without anyway: to load anything, or to run a script.
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def draw(task: Measured, ways: Sequence[Method], plan: Plan) -> list[tuple[str, str]]:
    """The plots of one measured task and of every way to keep the fleet, with their captions."""
    own = [way for way in ways if not way.reported]
    dense_bytes = next(way.task_bytes for way in ways if way.name == DENSE)
    times = [
        Bar(step, [(task.seconds[step], "ours" if _is_ours(step) else "dense")], text)
        for step in STEPS
        if step in task.seconds
        for text in [f"{human(task.seconds[step], 'seconds')} measured"]
    ]
    disk = [
        Bar(way.name, [(way.disk(plan.tasks), _style(way))], f"{text} projected")
        for way in ways
        for text in [human(way.disk(plan.tasks), "bytes")]
    ]
    starts = [
        Bar(f"{way.name}{where}", parts, f"{human(sum(s for s, _ in parts), 'seconds')} projected")
        for way in own
        for where, start in ((", from disk", way.start), (", base in memory", way.warm_start))
        if start is not None and (way.base_bytes or where == ", from disk")
        for parts in [[(way.transfer(plan), "download"), (start, _style(way))]]
    ]
    residents = _counts(max(plan.resident, 2))
    memory = [
        Line(f"{way.name}{what}", [(n, size(way, n)) for n in residents], _style(way))
        for way in own
        for what, size in (
            (", one in use", lambda way, n: way.at_hand(n)),
            (", all in use", lambda way, n: way.at_once(n, dense_bytes)),
        )
        if way.private_bytes or what == ", all in use"
    ]
    growth = [
        Line(way.name, [(n, way.disk(n)) for n in _counts(max(plan.tasks, 2))], _style(way))
        for way in ways
    ]
    tasks = counted(plan.tasks, "task")
    dashed = "dashed: from ratios that were reported or measured elsewhere"
    return [
        (
            f"Times of {task.name}, measured on this machine; grey: plain weights",
            bars("Times on this machine, measured", times),
        ),
        (
            f"Disk for {tasks}, projected; {dashed}",
            bars(f"Disk for {tasks}, projected", disk),
        ),
        (
            f"Disk by the number of tasks, projected; {dashed}",
            lines("Disk by tasks, projected", "tasks", growth, _bytes),
        ),
        (
            f"Start of one task, projected: download at {plan.bandwidth:g} Gbit/s (pale), then "
            "into memory, from what was measured",
            bars("Start of one task, projected", starts),
        ),
        (
            "Memory by the tasks on one machine, projected",
            lines("Memory by tasks, projected", "tasks in memory", memory, _bytes),
        ),
    ]


def _table(table: Table) -> str:
    names, kinds, *rows = table.rows()
    heads = "".join(
        f"<th>{escape(name)}<br><small>{escape(kind)}</small></th>"
        for name, kind in zip(names, kinds, strict=True)
    )
    lines_ = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return (
        f'<h2>{escape(table.title)}</h2><div class="wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines_)}</tbody></table></div>"
        + "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    )


def _counts(most: int) -> list[float]:
    """From 1 to ``most``, evenly spaced on a logarithmic axis."""
    return [float(most ** (step / 48)) for step in range(49)]


def _bytes(value: float) -> str:
    return human(value, "bytes")


def _is_ours(step: str) -> bool:
    return step not in ("copy", "plain load")


def _style(way: Method) -> str:
    if way.reported:
        return "peer"
    return {OURS: "ours", DENSE: "dense"}.get(way.name, "lora")
