"""The site of the pages: every page stands in its navigation, every link leads on, and nothing comes from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path, PurePosixPath
from posixpath import normpath
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\"'\s>]+")


def load_builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "build_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILDER = load_builder()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return BUILDER.laid_out()


def test_every_page_stands_in_the_navigation_once() -> None:
    shown = sorted(page for _, page in BUILDER.navigation())
    pages = [page.name for page in (ROOT / "docs").glob("*.md")]
    assert shown == sorted([*pages, *BUILDER.OF_THE_PROJECT])


def test_every_link_of_the_site_leads_to_one_of_its_files(files: dict[str, bytes]) -> None:
    pages = {place: content.decode() for place, content in files.items() if place.endswith(".md")}
    assert "source/src/minigrpo/training/grpo.py.md" in pages
    for place, text in pages.items():
        prose = "" if re.search(r"^`````", text, re.MULTILINE) else text
        for _, target in BUILDER.LINK.findall(prose):
            led_to = normpath(str(PurePosixPath(place).parent / target.partition("#")[0]))
            assert led_to in files, f"{place}: {target}"


def test_a_link_that_leads_nowhere_ends_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BUILDER, "page_of", lambda path: "[x](nowhere.md)" if path.name == "index.md" else "")
    with pytest.raises(FileNotFoundError, match=r"A page links to docs/nowhere\.md"):
        BUILDER.laid_out()


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("docs/index.md", "[alarms.md](alarms.md#a)", "[Alarms](alarms.md#a)"),
        ("docs/index.md", "![a\nplot](quickstart.svg)", "![a\nplot](quickstart.svg)"),
        ("docs/index.md", "[own](../examples)", "[own](source/examples/index.md)"),
        ("CHANGELOG.md", "[docs/alarms.md](docs/alarms.md)", "[Alarms](alarms.md)"),
        ("docs/index.md", "[CONTRIBUTING.md](../CONTRIBUTING.md)", "[Contributing](CONTRIBUTING.md)"),
        ("docs/index.md", "[x](https://a.org) [y](#z)", "[x](https://a.org) [y](#z)"),
    ],
)
def test_links_lead_to_the_places_that_files_have_in_the_site(page: str, link: str, expected: str) -> None:
    names = {place: name for name, place in BUILDER.navigation()}
    assert BUILDER.with_places(f"a {link} b {link}", ROOT / page, names) == f"a {expected} b {expected}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs")
    assert BUILDER.build(out) == 0
    return out / "site"


@pytest.mark.extra("docs")
def test_the_site_is_built_without_a_warning_and_fetches_nothing(site: Path) -> None:
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= {page.stem for page in site.glob("*.html")}
    pages = {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert {name: FETCHED.findall(text) for name, text in pages.items() if FETCHED.search(text)} == {}


@pytest.mark.extra("docs")
def test_no_markdown_is_left_in_a_page(site: Path) -> None:
    """Tables, lists and blocks that the generator reads otherwise than we mean show as their marks."""
    for page in site.glob("*.html"):
        article = re.search(r"<article.*?</article>", page.read_text(encoding="utf-8"), re.DOTALL)
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", article[0] if article else "", flags=re.DOTALL)
        assert not re.findall(r"<(?:p|li|td)>(?:```|\| |- |\*\*|#+ ).*", text), page.name
        assert not re.findall(r"^(?:- |\d\. ).*", text, re.MULTILINE), f"{page.name}: an item within a paragraph"


@pytest.mark.extra("docs")
def test_no_words_of_a_cell_are_taken_for_attributes_of_it(site: Path) -> None:
    """`{name: value}` at the end of a cell is text here, and an attribute to an extension of Markdown."""
    knobs = (site / "knobs.html").read_text(encoding="utf-8")
    assert knobs.count("names with values, {name: value}") + knobs.count("names with numbers, {name: number}") == 3


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        (f"<code>{'a' * 36}</code>", f"<code>{'a' * 36}</code>"),
        (f"<p><code>{'a' * 37}</code>", f'<p><code class="long">{"a" * 37}</code>'),
        (f"<pre><code><span>{'a' * 99}</span></code>", f"<pre><code><span>{'a' * 99}</span></code>"),
    ],
)
def test_code_that_is_longer_than_a_phones_line_is_marked(html: str, expected: str) -> None:
    assert BUILDER.with_widths(html) == expected


def test_columns_that_hold_sentences_are_marked() -> None:
    row = "<tr><td>a</td><td><code>x</code> " + "word " * 8 + "</td></tr>"
    table = "<table><thead><tr><th>n</th><th align=left>what</th></tr></thead>" + row + "</table>"
    assert BUILDER.with_widths(f"{table}{row}") == table.replace("<th align", '<th class="wide" align') + row


@pytest.mark.long
@pytest.mark.extra("docs")
@pytest.mark.needs("chromium")
def test_a_page_that_is_opened_from_the_folder_is_searched_without_a_network(site: Path) -> None:
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.get_by_role("button", name="Search").first.click()
        page.wait_for_selector("input:visible:not([type=checkbox])")
        page.keyboard.type("preflight")
        page.wait_for_selector("a[href$='#minigrpo-preflight']")
        browser.close()
    assert [url for url in asked if url.startswith("http")] == []
