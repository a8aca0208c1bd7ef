"""A repository's page (README.md): our text stands between two marks, and everything else is its owner's.

    ---
    license: mit          keys that publish does not write stay, and so does a licence that was written by hand
    ---
    a word of your own    text outside the marks stays
    <!-- minigrpo: ... -->
    # the model card
    <!-- /minigrpo -->

Nothing is thrown away that could be the owner's. Text without marks, and front matter that is no YAML, are kept below
our text, with a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from minigrpo.utils.markdown import fenced

BEGIN_MARK = "<!-- minigrpo: written by publish; text outside these marks stays -->"
END_MARK = "<!-- /minigrpo -->"
LICENCE_KEYS = ("license", "license_name", "license_link")
_BEGIN_LINE = re.compile(r"^<!-- minigrpo: [^\n]*-->[ \t\r]*$", re.MULTILINE)
_END_LINE = re.compile(r"^<!-- /minigrpo -->[ \t\r]*$", re.MULTILINE)
_HEADER = re.compile(r"\A\ufeff?---[ \t\r]*\n(.*?)^---[ \t\r]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Page:
    """A page in parts. `header`: the lines of its front matter. `block`: our text with its marks, "" where they are
    missing; all text is then in `after`."""

    header: str
    before: str
    block: str
    after: str

    @property
    def text(self) -> str:
        return f"---\n{self.header}---\n{self.before}{self.block}{self.after}"


def render_page(front_matter: Mapping[str, Any], body: str) -> str:
    """Render a page that is ours alone."""
    return Page(_dump(front_matter), "\n", f"{BEGIN_MARK}\n\n{body.strip()}\n\n{END_MARK}", "\n").text


def split_page(text: str) -> Page:
    """Split a page. Our text may quote the end mark (a recipe may hold anything), so the last one counts."""
    header = _HEADER.match(text)
    rest = text[header.end() :] if header else text
    begin = _BEGIN_LINE.search(rest)
    end = [each for each in _END_LINE.finditer(rest) if begin and each.start() > begin.start()][-1:]
    lines = header[1] if header else ""
    if begin and end:
        return Page(lines, rest[: begin.start()], rest[begin.start() : end[0].end()], rest[end[0].end() :])
    return Page(lines, "", "", _END_LINE.sub("", _BEGIN_LINE.sub("", rest)))


def parse_header(header: str) -> dict[str, Any] | None:
    """Return the front matter; None where it is damaged."""
    try:
        found = yaml.safe_load(header)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        return None
    return {} if found is None else found if isinstance(found, dict) else None


def merge_pages(
    ours: str, theirs: str, written: Mapping[str, Any], *, licence_is_set: bool = False
) -> tuple[str, tuple[str, ...]]:
    """Return our page with what its owner added to the published one, `theirs`, and notes on what was decided.

    `written`: the front matter that was published last, {} if unknown: what differs from it was changed by hand.
    `licence_is_set`: the user names the licence, so it replaces one that was written by hand.
    """
    new, old = split_page(ours), split_page(theirs)
    wanted, there = parse_header(new.header) or {}, parse_header(old.header)
    notes = list(_licence_notes(wanted, there or {}, written, licence_is_set))
    merged = merge_front_matter(wanted, there or {}, written, licence_is_set=licence_is_set)
    page = replace(new, header=_rewrite_header(old.header, merged))
    if old.block:
        page = replace(page, before=old.before, after=old.after)
    elif kept := old.after.strip():
        page = replace(page, after=f"\n\n{kept}\n")
        notes.append(
            "README.md there has no marks of minigrpo, so its text stays, below ours. Remove there what is old."
        )
    if there is None:
        page = replace(page, after=f"{page.after.rstrip()}\n\n{fenced(old.header, 'yaml')}\n")
        notes.append("README.md there had front matter that is no YAML: it was written anew, and stands at its end.")
    return page.text, tuple(notes)


def merge_front_matter(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], written: Mapping[str, Any], *, licence_is_set: bool
) -> dict[str, Any]:
    """Return our keys, and theirs that we do not write. A licence written by hand stays unless the user names another;
    so do tags, data sets and results that were added by hand."""
    kept = {name: value for name, value in theirs.items() if name not in written or value != written[name]}
    if _licence_by_hand(theirs, written) and not licence_is_set:
        ours = {name: value for name, value in ours.items() if name not in LICENCE_KEYS}
    elif "license" in ours:
        kept = {name: value for name, value in kept.items() if name not in LICENCE_KEYS}
    lists: dict[str, Any] = {
        name: [*value, *_added(value, theirs.get(name), written.get(name))]
        for name, value in ours.items()
        if name in ("tags", "datasets")
    }
    if "model-index" in ours:
        lists["model-index"] = _merge_results(ours["model-index"], theirs.get("model-index"))
    merged = {**kept, **ours, **lists}
    return {name: merged[name] for name in (*(each for each in theirs if each in merged), *merged)}


def _licence_by_hand(theirs: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    return "license" in theirs and any(theirs.get(name) != written.get(name) for name in LICENCE_KEYS)


def _licence_notes(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], written: Mapping[str, Any], licence_is_set: bool
) -> Iterator[str]:
    there, wanted = theirs.get("license"), ours.get("license")
    if not _licence_by_hand(theirs, written) or wanted in (None, there):
        return
    if licence_is_set:
        yield f"The licence on the page there was {there}; it is now {wanted}, as was asked."
    else:
        yield f"The licence on the page there, {there}, stays; the base's is {wanted}. To write one: --license ID"


def _added(ours: list[Any], theirs: Any, written: Any) -> list[Any]:
    """Return entries that were added to a list by hand."""
    known = [*ours, *(written if isinstance(written, list) else [])]
    return [each for each in (theirs if isinstance(theirs, list) else [theirs] if theirs else []) if each not in known]


def _merge_results(ours: list[dict[str, Any]], theirs: Any) -> list[dict[str, Any]]:
    """Return our model index with other models, and results on other data sets, that were added by hand."""
    others = [each for each in theirs if isinstance(each, dict)] if isinstance(theirs, list) else []
    merged = []
    for entry in ours:
        data = [result["dataset"] for result in entry["results"]]
        there = [each.get("results") for each in others if each.get("name") == entry["name"]]
        results = [each for listed in there if isinstance(listed, list) for each in listed if isinstance(each, dict)]
        added = [each for each in results if each.get("dataset") not in data]
        merged.append({**entry, "results": [*entry["results"], *added]})
    names = [entry["name"] for entry in ours]
    return [*merged, *(each for each in others if each.get("name") not in names)]


def _rewrite_header(header: str, wanted: Mapping[str, Any]) -> str:
    """Write front matter; the lines of a key that keeps its value stay as they are, with the comments above them."""
    if parse_header(header) == wanted:
        return header
    text, left = "", dict(wanted)
    for lines in _key_lines(header):
        said = parse_header(lines)
        if said is None or len(said) > 1:
            return _dump(wanted)
        if not said or said.items() <= left.items():
            text += lines
        else:
            text += "".join(re.findall(r"^#.*\n", lines, re.MULTILINE))
            text += _dump({name: left[name] for name in said if name in left})
        left = {name: value for name, value in left.items() if name not in said}
    text += _dump(left)
    return text if parse_header(text) == wanted else _dump(wanted)


def _key_lines(header: str) -> Iterator[str]:
    """Yield the lines of each top-level key, with the comments and empty lines above it."""
    lines, above = "", ""
    for line in header.splitlines(keepends=True):
        if not line.strip() or line.startswith("#"):
            above += line
        elif line[0] in " \t-":
            lines, above = lines + above + line, ""
        else:
            if lines:
                yield lines
            lines, above = above + line, ""
    yield from (part for part in (lines, above) if part)


def _dump(front_matter: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(front_matter), sort_keys=False, allow_unicode=True) if front_matter else ""
