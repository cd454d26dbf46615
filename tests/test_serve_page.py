"""The page at / in a real browser."""

from __future__ import annotations

import os
from pathlib import Path

import chromium
import pytest
import servers

pytestmark = pytest.mark.skipif(chromium.BROWSER is None, reason="needs Chromium")


@pytest.fixture
def page(tmp_path):
    found = chromium.Page(tmp_path)
    try:
        yield found
    finally:
        found.close()


def ask(page, model, prompt):
    page.evaluate(
        f"""at("model").value = {model!r}; at("model").dispatchEvent(new Event("change"));
        at("prompt").value = {prompt!r}; at("ask").requestSubmit()"""
    )
    page.wait_for('!at("send").disabled && at("note").textContent !== "Waiting…"')
    return page.evaluate('at("answer").textContent'), page.evaluate('at("note").textContent')


def keep_screenshot(page, name):
    folder = os.environ.get("NPS_COMPRESS_SCREENSHOTS")
    if folder:
        (Path(folder) / f"{name}.png").write_bytes(page.screenshot())


def test_people_see_the_tasks_and_ask_them(causal_world, page, tmp_path):
    key = "page-key"
    (tmp_path / "key").write_text(key)
    with servers.running(causal_world.settings(api_key_file=tmp_path / "key")) as server:
        page.open(server.url)
        page.wait_for('typeof at === "function" && !at("key-box").hidden')
        assert "key" in page.evaluate('at("summary").textContent')
        assert page.evaluate('at("tasks").children.length') == 0
        page.faults.clear()  # the browser itself notes an answer of 401
        page.evaluate(f'at("key").value = {key!r}; at("use-key").click()')
        page.wait_for('at("tasks").children.length === 4')
        rows = page.evaluate('[...at("tasks").children].map(row => row.cells[0].textContent)')
        assert rows == ["base", "law", "med", "code"]
        assert page.evaluate('at("key-box").hidden')
        for name in ("med", "base"):
            text, note = ask(page, name, "the red cat runs")
            assert text == causal_world.greedy(name, "the red cat runs", 64)[0]
            assert note.startswith("4 tokens read, ")
        page.wait_for('at("switches").textContent.startsWith("2 switches; the last took ")')
        keep_screenshot(page, "light")
        page.emulate(prefers_color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 25, 29)"
        keep_screenshot(page, "dark")
        unnamed = """[...document.querySelectorAll("input, select, textarea")]
            .filter(field => !field.labels.length || !field.labels[0].textContent.trim()).length"""
        assert page.evaluate(unnamed) == 0
        assert page.evaluate("document.documentElement.lang") == "en"
        assert not page.faults
        page.evaluate('at("most").removeAttribute("max"); at("most").value = 999')
        _, note = ask(page, "law", "cat")
        assert "more than the limit of 160" in note


def test_a_name_is_text_and_nothing_runs(causal_world, page):
    """Names come from outside; what looks like a tag is shown as it is."""
    name = "<img src=x onerror=alert(1)>"
    tasks = {name: causal_world.tasks["law"]}
    world = servers.World(causal_world.folder, causal_world.base, tasks, {})
    with servers.running(world.settings()) as server:
        page.open(server.url)
        page.wait_for('typeof at === "function" && at("tasks").children.length === 2')
        assert page.evaluate('at("tasks").children[1].cells[0].textContent') == name
        assert page.evaluate('document.querySelectorAll("img").length') == 0
        assert not page.faults
