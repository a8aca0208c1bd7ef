"""The page in a real browser: live, exact, harmless, and closed to everybody else."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from minigrpo.view.inspections import Inspections
from minigrpo.view.library import Library
from minigrpo.view.server import ViewServer
from tests.helpers.logged_runs import HOSTILE, KNOBS, hostile_run, log_step, logged_run

pytestmark = pytest.mark.needs("chromium")

PAGES = ("runs", "run/first", "why/first", "groups/first?step=10&text=say", "prompts/first?id=a1", "stages/first")
SECOND = 1000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root, as in a container, may not use the browser's own sandbox; the pages are ours.
        opened = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    logged_run(folder / "first")
    logged_run(folder / "second", steps=6, knobs=KNOBS + "seed: 1\n")
    hostile_run(folder / "third")
    return folder


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[ViewServer]:
    with ViewServer(Library(runs)).running() as server:
        yield server


@contextmanager
def opened(browser: Any, server: ViewServer, place: str = "", **options: Any) -> Iterator[Any]:
    """Open a page of the view; nothing may go wrong in it, and nothing be asked of any other host."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda fault: wrong.append(str(fault)))
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(server.url)
    page.wait_for_selector("h1")
    if place:
        page.goto(f"http://127.0.0.1:{server.port}/#/{place}")
        page.wait_for_selector("h1")
    try:
        yield page
        assert not wrong
        # What the page makes itself (data:, blob:) has no host.
        assert hosts - {""} == {f"127.0.0.1:{server.port}"}
    finally:
        context.close()


def until(page: Any, holds: str) -> None:
    """Wait until an expression holds in the page. Playwright's own way needs eval, which the page forbids."""
    end = time.monotonic() + 5
    while not page.evaluate(holds):
        assert time.monotonic() < end, holds
        page.wait_for_timeout(20)


def test_a_new_step_appears_by_itself_within_two_seconds(browser: Any, server: ViewServer, runs: Path) -> None:
    logged_run(runs / "live", steps=3)
    server.library._looked = -9.0
    with opened(browser, server, "run/live") as page:
        page.wait_for_selector("#chart-reward canvas")
        page.wait_for_selector("[data-step='3']")
        page.wait_for_timeout(300)  # until it waits for news
        log_step(runs / "live", 4)
        page.wait_for_selector("[data-step='4']", timeout=2 * SECOND)
        until(page, "document.querySelector('#chart-reward .at').textContent.includes('step 4')")
        with (runs / "live/metrics.jsonl").open("a") as stream:  # a step of which half is written yet
            stream.write('{"step": 5, "rew')
            stream.flush()
            page.wait_for_timeout(1200)
            assert page.query_selector("[data-step='5']") is None
            stream.write('ard": 0.5}\n')
            stream.flush()
            page.wait_for_selector("[data-step='5']", timeout=2 * SECOND)


def test_the_parts_that_the_page_shows_sum_to_the_change_of_the_windows_that_are_chosen(
    browser: Any, server: ViewServer
) -> None:
    with opened(browser, server, "why/first") as page:
        page.wait_for_selector("#total")
        page.fill("input[aria-label='A, before: last step']", "8")
        page.press("input[aria-label='A, before: last step']", "Enter")
        page.get_by_label("B, after: first step").fill("12")
        page.get_by_label("B, after: first step").blur()
        until(page, "location.hash.includes('a=1-8') && location.hash.includes('b=12-20')")
        until(page, "document.body.innerText.includes('64 and 72 completions')")
        total = float(page.get_attribute("#total", "data-value"))
        assert total > 0.3
        splits = page.query_selector_all("[data-split]")
        assert len(splits) == 4
        for split in splits:
            parts = [float(term.get_attribute("data-value")) for term in split.query_selector_all(".term")]
            assert sum(parts) == pytest.approx(total, abs=1e-9)
            assert float(split.query_selector("tfoot [data-value]").get_attribute("data-value")) == pytest.approx(total)
        page.select_option("select:near(:text('what counts as the same'))", "kind")
        page.wait_for_selector("text=2 in both windows")
        page.reload()  # every state is a link
        page.wait_for_selector("text=2 in both windows")


REDRAW = "dispatchEvent(new HashChangeEvent('hashchange')); new Promise(done => setTimeout(done, 100))"


@pytest.mark.parametrize(
    ("place", "label", "typed", "wanted"),
    [
        ("why/first", "B, after: first step", "12", "b=12-20"),
        ("groups/first?step=10", "step", "7", "step=7"),
        ("groups/first?step=10", "find", "say 3", "text=say\\+3"),
        ("runs", "figures like", "reward", "match=reward"),
    ],
)
def test_what_is_being_typed_outlives_a_page_that_is_drawn_anew(
    browser: Any, server: ViewServer, place: str, label: str, typed: str, wanted: str
) -> None:
    with opened(browser, server, place) as page:
        field = page.get_by_label(label, exact=True).first
        field.wait_for()
        field.focus()
        page.keyboard.press("Control+a")
        for key in typed:
            page.keyboard.press(key)
            page.evaluate(REDRAW)
        assert field.input_value() == typed
        field.blur()
        until(page, f"/{wanted}/.test(location.hash)")


def test_dragging_over_the_chart_moves_a_window(browser: Any, server: ViewServer) -> None:
    with opened(browser, server, "why/first") as page:
        page.wait_for_selector("#total")
        box = page.locator("#chart-windows .u-over").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 50, steps=4)
        page.mouse.up()
        until(page, "/b=1[0-3]-1[2-5]/.test(location.hash)")


def test_groups_are_opened_filtered_and_followed_to_their_prompt(browser: Any, server: ViewServer) -> None:
    rights = [round(4 * step / 20) for step in range(1, 21)]  # of both groups of each step
    wrong, third = 2 * sum(4 - right for right in rights), 2 * sum(right <= 3 for right in rights)
    with opened(browser, server, "groups/first?step=10") as page:
        page.click(".list .item:nth-child(2)")
        page.wait_for_selector("article h2:text-is('z1')")
        assert page.locator(".sibling").count() == 4
        assert page.locator(".sibling mark").first.inner_text() == "1"  # "say 1" differs from "say 0" in that word
        page.click("button:text-is('wrong')")
        page.wait_for_selector(f"[aria-label=Found] >> text='{wrong} answers in 40 of 40 groups'")
        page.get_by_label("find").fill("SAY 3 OR")
        page.wait_for_selector(f"[aria-label=Found] >> text='{third} answers in 40 of 40 groups'")
        page.click("[aria-label=Found] li:nth-child(3) a")
        page.wait_for_selector(".sibling.here mark:text-is('say 3 or')")
        page.click("text=This prompt through time")
        page.wait_for_selector("text=Drawn 7 times")
        assert page.locator("details.time").count() == 7
        page.click("details.time:nth-of-type(3) summary")
        page.select_option("header select", "second")
        page.wait_for_selector("text=Choose a prompt")
        assert "prompts/second" in page.url


def test_the_tokens_of_a_group_are_measured_and_coloured(browser: Any, server: ViewServer) -> None:
    token = {"id": 1, "logprob": -0.5, "entropy": 0.7, "entropy_after": 0.6}
    moved = [{**token, "text": text, "logprob_after": -0.5 + by} for text, by in ((HOSTILE[0], 0.4), ("no", -0.1))]
    found = {"exact": True, "siblings": [{"tokens": moved} for _ in range(4)]}
    server.inspections = Inspections(lambda *asked: [sys.executable, "-c", f"print({json.dumps(found)!r})"])
    with opened(browser, server, "groups/first?step=10") as page:
        page.click("#measure")
        page.wait_for_selector(".tokens .likelier.s4")
        assert page.query_selector_all(".tokens .unlikelier.s1")
        assert page.inner_text(".tokens .likelier") == HOSTILE[0]
        page.get_by_label("tokens coloured by").select_option("entropy")
        page.wait_for_selector(".tokens .unlikelier.s4")
        assert "by=entropy" in page.url


def test_every_chart_gives_its_data_and_its_picture(browser: Any, server: ViewServer, tmp_path: Path) -> None:
    files: dict[str, Path] = {}
    with opened(browser, server, "run/first") as page:
        for kind in ("CSV", "SVG", "PNG"):
            with page.expect_download() as caught:
                page.click(f"#chart-reward button:text-is('{kind}')")
            files[kind] = tmp_path / caught.value.suggested_filename
            caught.value.save_as(files[kind])
        page.click("#chart-length summary")
        page.wait_for_selector("#chart-length tbody tr:nth-child(20)")
    rows = list(csv.DictReader(files["CSV"].read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert float(rows[-1]["mean of the step"]) == 1.2
    assert files["PNG"].read_bytes()[:4] == b"\x89PNG"
    picture = files["SVG"].read_text()
    assert picture.startswith("<svg")
    assert "Reward" in picture


def test_runs_stand_side_by_side_with_what_their_recipes_differ_in(browser: Any, server: ViewServer) -> None:
    with opened(browser, server) as page:
        page.wait_for_selector("#chart-reward canvas")
        page.wait_for_selector("section:has(#differ) code:text-is('seed')")
        page.get_by_label("figures like").fill("length$")
        page.wait_for_selector("h3:text-is('completions/max_length')")
        assert page.locator(".charts .chart").count() == 3
        page.get_by_label("figures like").fill("(")
        page.wait_for_selector("[role=alert]:has-text('No regular expression')")
        page.uncheck("[aria-label='draw second']")
        until(page, "!location.hash.includes('second')")


def test_hostile_answers_are_text(browser: Any, server: ViewServer) -> None:
    with opened(browser, server, "groups/third") as page:
        page.wait_for_selector(".sibling:nth-child(4)")
        texts = page.locator(".siblings").inner_text()
        assert "<script>document.title" in texts
        assert re.search(r"safe\s*U\+202E\s*gnissap\s*U\+202C", texts)
        assert re.search(r"\\x1b\s*\[2J\s*\\x00", texts)
        assert "U+D800" in texts
        assert "all 1,000,000 characters" in texts
        for place in ("prompts/third?id=%3Cscript%3Ex", "groups/third?text=%3Cscript", "groups/third?only=%3Cimg"):
            page.goto(f"http://127.0.0.1:{server.port}/#/{place}")
            page.wait_for_timeout(150)
        assert "harmed" not in page.title()
        assert page.locator("main script, main img").count() == 0


def test_keys_are_enough(browser: Any, server: ViewServer) -> None:
    with opened(browser, server, "run/first") as page:
        page.focus("#chart-reward .plot")
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("#chart-reward .at:text-is('step 2')")
        page.keyboard.press("4")
        page.wait_for_selector("h1:text-is('Groups')")
        page.wait_for_selector(".sibling")
        page.keyboard.press(",")
        until(page, "location.hash.includes('step=19')")
        page.wait_for_selector("article h2:text-is('a1')")
        page.keyboard.press("j")
        page.wait_for_selector("article h2:text-is('z1')")
        page.keyboard.press("?")
        assert page.get_by_role("dialog").is_visible()


def test_without_the_token_the_page_shows_nothing_but_how_to_get_it(browser: Any, server: ViewServer) -> None:
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/#/run/first")
    page.wait_for_selector("h1:text-is('This address is not enough')")
    assert "first" not in page.inner_text("body")
    page.close()


STRANGER = """<script type="module">
const told = [];
for (const [path, options] of [
  ["/api/runs", {}],
  ["/api/runs", { mode: "no-cors" }],
  ["/api/runs", { credentials: "include" }],
  ["/api/runs", { headers: { Authorization: "Bearer TOKEN" } }],
  ["/", {}],
]) {
  try {
    const answer = await fetch("http://HOST" + path, options);
    told.push(await answer.text());
  } catch { told.push(""); }
}
for (const kind of ["iframe", "script", "img"]) {
  const made = document.createElement(kind);
  made.src = "http://HOST/" + { iframe: "", script: "app.js", img: "icon.svg" }[kind];
  await new Promise((resolve) => {
    made.onload = () => { told.push(kind === "iframe" ? "" : kind); resolve(); };
    made.onerror = resolve;
    document.body.append(made);
  });
}
document.title = JSON.stringify(told);
</script><body>"""


def test_a_page_of_another_origin_cannot_read_it_even_with_the_token(
    browser: Any, server: ViewServer, tmp_path: Path
) -> None:
    text = STRANGER.replace("HOST", f"127.0.0.1:{server.port}").replace("TOKEN", server.token)
    (tmp_path / "index.html").write_text(text)
    handler = partial(QuietHandler, directory=str(tmp_path))
    stranger = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=stranger.serve_forever, daemon=True).start()
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)  # the browser of somebody who has the view open, too
    page.wait_for_selector("h1")
    page.goto(f"http://127.0.0.1:{stranger.server_address[1]}/")
    until(page, "document.title.startsWith('[')")
    assert page.title() == '["","","","","",""]'
    assert page.evaluate(
        "frames.length === 0 || (() => { try { return !frames[0].document } catch { return true } })()"
    )
    context.close()
    stranger.shutdown()
    stranger.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_every_page_fits_400_pixels(browser: Any, server: ViewServer) -> None:
    with opened(browser, server) as page:
        page.set_viewport_size({"width": 400, "height": 800})
        for place in PAGES:
            page.goto(f"http://127.0.0.1:{server.port}/#/{place}")
            page.wait_for_timeout(250)
            assert page.evaluate("document.documentElement.scrollWidth") <= 400, place


@pytest.mark.env("MINIGRPO_AXE")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("place", PAGES)
def test_axe_finds_nothing_that_shuts_people_out(browser: Any, server: ViewServer, place: str, scheme: str) -> None:
    import os

    source = Path(os.environ["MINIGRPO_AXE"]).read_text(encoding="utf-8")
    with opened(browser, server, place, color_scheme=scheme, bypass_csp=True) as page:
        page.wait_for_timeout(400)
        page.evaluate(source)
        found = page.evaluate("axe.run()")
    told = [f"{fault['id']}: {node['html'][:160]}" for fault in found["violations"] for node in fault["nodes"]]
    assert not told, "\n".join(told)
