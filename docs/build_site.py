"""Build these pages as a site, build/docs/site: open index.html from the folder, or put it on any web server.

    pip install 'minigrpo[docs]'
    python docs/build_site.py            # or: make site

The pages are laid out for the generator, zensical, in build/docs/pages. What they link to outside docs/ (source files,
examples, notebooks, CONTRIBUTING.md) comes along, so the site is whole without a network and without the repository.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ASSETS = DOCS / "site"
SETTINGS = DOCS / "zensical.toml"
OUT = ROOT / "build" / "docs"
OF_THE_PROJECT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
"""Pages of the repository's top that stand in the navigation, too."""
LANGUAGES = {".py": "python", ".yaml": "yaml"}
"""Files that become a page which shows them, by the language of its code block."""
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s]+)\)")
"""A link to a file: its words, and where it leads."""
WHOLE_CODE, SENTENCE = 36, 40
"""Letters up to which code stays on one line, that of a phone; and from which a cell of a table holds a sentence."""
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"
"""The head of a page that search leaves out: source text would bury the pages that explain it."""


def laid_out() -> dict[str, bytes]:
    """Return the files of the site by their place: every page of docs/ and, in turn, all that pages link to.

    Raises FileNotFoundError where a link leads to no file.
    """
    waiting = [*DOCS.glob("*.md"), *ASSETS.iterdir(), *(ROOT / name for name in OF_THE_PROJECT)]
    names = {page: name for name, page in navigation()}
    files: dict[str, bytes] = {}
    while waiting:
        path = waiting.pop()
        if place_of(path) in files:
            continue
        if not path.exists():
            raise FileNotFoundError(f"A page links to {path.relative_to(ROOT)}, which is not there.")
        text = page_of(path)
        files[place_of(path)] = path.read_bytes() if text is None else with_places(text, path, names).encode()
        waiting += [] if text is None else [file for _, file in links_of(text, path)]
    return files


def navigation() -> list[tuple[str, str]]:
    """Return the names and the pages of the navigation, in its order."""
    return list(_entries(tomllib.loads(SETTINGS.read_text(encoding="utf-8"))["project"]["nav"]))


def _entries(items: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for name, page in (pair for item in items for pair in item.items()):
        yield from _entries(page) if isinstance(page, list) else [(name, page)]


def place_of(path: Path) -> str:
    """Return where the site has a file: pages of docs/ and of the repository's top flat, all else below source/."""
    name = path.relative_to(ROOT).as_posix()
    if path.parent in (DOCS, ASSETS, ROOT) and not path.is_dir():
        return path.name
    if path.is_dir():
        return f"source/{name}/index.md"
    return f"source/{name}.md" if path.suffix in LANGUAGES else f"source/{name}"


def page_of(path: Path) -> str | None:
    """Return a file as Markdown, and a folder as a list of what is in it; None where it is copied as it is."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        rows = [f"- [{each.name}]({each.name})" for each in sorted(path.iterdir()) if each.suffix in LANGUAGES]
        return f"{NOT_SEARCHED}# {name}\n\n" + "\n".join(rows) + "\n"
    if path.suffix in LANGUAGES:
        code = path.read_text(encoding="utf-8").rstrip()
        return f"{NOT_SEARCHED}# {name}\n\n`````{LANGUAGES[path.suffix]}\n{code}\n`````\n"
    return path.read_text(encoding="utf-8") if path.suffix == ".md" else None


def links_of(text: str, path: Path) -> Iterator[tuple[re.Match[str], Path]]:
    """Yield the links of a page that lead to files, with the file; none where the page shows a file of code."""
    folder = path if path.is_dir() else path.parent
    for link in LINK.finditer(text if path.suffix not in LANGUAGES else ""):
        yield link, Path(os.path.normpath(folder / link[2].partition("#")[0]))


def with_places(text: str, path: Path, names: dict[str, str]) -> str:
    """Return a page whose links lead to the files' places in the site.

    A link whose words are only the page's file name gets the page's name in the navigation, by `names`.
    """
    here = PurePosixPath(place_of(path)).parent
    for link, file in reversed(list(links_of(text, path))):
        place = place_of(file)
        words = names.get(place, link[1]) if link[1] in (place, f"docs/{place}") else link[1]
        _, mark, anchor = link[2].partition("#")
        text = f"{text[: link.start()]}[{words}]({os.path.relpath(place, here)}{mark}{anchor}){text[link.end() :]}"
    return text


def with_widths(html: str) -> str:
    """Mark what site.css treats by its length: code that has to break, and columns of a table that hold sentences."""
    html = re.sub(rf"<code>([^<]{{{WHOLE_CODE + 1},}})</code>", r'<code class="long">\1</code>', html)
    return re.sub(r"<table>.*?</table>", lambda table: _with_wide_columns(table[0]), html, flags=re.DOTALL)


def _with_wide_columns(table: str) -> str:
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in table.split("</tr>")]
    longest = [
        max(len(re.sub("<[^>]+>", "", cell)) for cell in column) for column in zip(*filter(None, rows), strict=True)
    ]
    columns = iter(longest)
    return re.sub("<th(?=[ >])", lambda _: '<th class="wide"' if next(columns) > SENTENCE else "<th", table)


def build(out: Path = OUT) -> int:
    """Write the pages and build the site strictly: a warning of the generator is an error. Return its exit code."""
    shutil.rmtree(out, ignore_errors=True)
    for place, content in laid_out().items():
        file = out / "pages" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    shutil.copy(SETTINGS, out)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(out / SETTINGS.name)]
    code = subprocess.run(command, check=False).returncode
    if not code:
        for page in (out / "site").rglob("*.html"):
            page.write_text(with_widths(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(out / "site" / "index.html")
    return code


if __name__ == "__main__":
    sys.exit(build())
