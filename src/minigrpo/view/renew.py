"""Renew what the page has from elsewhere: libraries from the npm registry, and sentences from docs/metrics.md.

    python -m minigrpo.view.renew             # in a checkout, with npm; then run the tests, and look at the page
    python -m minigrpo.view.renew --sentences # the sentences alone: no network

page/vendor/vendored.json records each library's version, its address, the registry's hash of the package, and the
SHA-256 of each file; a test holds the files equal to it. page/metrics.json is docs/metrics.md as a page reads it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from minigrpo.runs.rundir import digest

PAGE = Path(__file__).parent / "page"
VENDOR = PAGE / "vendor"
RECORD = VENDOR / "vendored.json"
DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


@dataclass(frozen=True, slots=True)
class Vendored:
    """An npm package, and which of its files the page takes, by the names that they get."""

    package: str
    license: str
    files: dict[str, str]
    note: str = ""


LIBRARIES = (
    Vendored(
        "uplot",
        "MIT",
        {
            "uPlot.iife.min.js": "dist/uPlot.iife.min.js",
            "uPlot.min.css": "dist/uPlot.min.css",
            "uPlot.LICENSE.txt": "LICENSE",
        },
    ),
    Vendored(
        "htm",
        "Apache-2.0",
        {"htm-preact-standalone.js": "preact/standalone.module.js", "htm.LICENSE.txt": "LICENSE"},
        "htm's standalone build contains a preact 10",
    ),
    Vendored("preact", "MIT", {"preact.LICENSE.txt": "LICENSE"}, "its licence alone: its code is in htm's build"),
)


def renew_libraries() -> None:
    """Fetch the newest release of each library with npm, and record what was taken."""
    VENDOR.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        record = [_fetch(library, Path(scratch)) for library in LIBRARIES]
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _fetch(library: Vendored, scratch: Path) -> dict[str, object]:
    command = ["npm", "pack", "--json", library.package]
    packed = json.loads(subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True).stdout)[0]
    with tarfile.open(scratch / packed["filename"]) as package:
        for name, inside in library.files.items():
            member = package.extractfile(f"package/{inside}")
            assert member is not None, f"{library.package} has no {inside}"
            (VENDOR / name).write_bytes(member.read())
    return {
        "package": library.package,
        "version": packed["version"],
        "license": library.license,
        "from": f"https://registry.npmjs.org/{library.package}/-/{packed['filename']}",
        "integrity": packed["integrity"],
        "note": library.note,
        "files": {name: {"path": inside, "sha256": digest(VENDOR / name)} for name, inside in library.files.items()},
    }


def sentences(page: str) -> dict[str, dict[str, str]]:
    """Read the table of docs/metrics.md: for each figure's name, what it `means`, and `when` to look at it."""
    found: dict[str, dict[str, str]] = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").replace(" | ", " |").split("|")] if line[:2] == "| " else []
        cells += [""] * (3 - len(cells))
        means, when = (cell.replace("`", "") for cell in cells[1:3])
        for name in _names(cells[0]):
            found[name] = {"means": means, "when": when}
    return found


def _names(cell: str) -> list[str]:
    """Return the names in the first cell of a row: those after the first may leave out what they share with it."""
    names: list[str] = []
    for word in re.findall(r"`([^`]+)`", cell):
        before = names[-1].rpartition("/")[0] if names else ""
        shares = word.startswith("/") or (before and "/" not in word)
        names.append(f"{before}/{word.lstrip('/')}" if shares else word)
    return names


def renew_sentences() -> None:
    text = json.dumps(sentences(DOCS.read_text(encoding="utf-8")), indent=2, ensure_ascii=False)
    (PAGE / "metrics.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--sentences" not in sys.argv[1:]:
        renew_libraries()
    renew_sentences()
