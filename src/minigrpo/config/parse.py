"""Parse a recipe file, YAML or TOML, into entries: name, value as text, and line.

Values stay text until the recipe's own types read them: YAML 1.1 would turn `on` into a boolean, `5e-5` into a string
and `010` into 8, and a name may look like a number.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from minigrpo.config.fields import fields_by_name, format_value, sections
from minigrpo.errors import RecipeError, command_line

MAX_FILE_BYTES = 1 << 20  # a recipe is a page; a weights file given by mistake should not be read to its end
MAX_KNOBS = 1000  # in a file; YAML's aliases can make billions from a few lines
NULLS = ("", "~", "null")
ENDLESS = "is nested without end. A recipe is sections of knobs, two levels deep."


@dataclass(frozen=True, slots=True)
class Entry:
    """One knob as the user wrote it: its dotted name, its value as text (or None, list, dict), and its place."""

    name: str
    value: Any
    where: str


def read_entries(path: Path) -> list[Entry]:
    """Read every knob that a file sets, in order. Raise RecipeError where the file cannot be read as a recipe."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        begin = f"{command_line('minigrpo', 'recipes', 'quickstart')} > {command_line(path)}"
        raise RecipeError(f"{path} is missing. To write one to start from: {begin}") from None
    except OSError as fault:
        raise RecipeError(f"{path} cannot be read: {fault.strerror or fault}.") from None
    if len(raw) > MAX_FILE_BYTES or b"\0" in raw:
        raise RecipeError(f"{path} is not a text file. A recipe is a .yaml or .toml file: see `minigrpo recipes`.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = raw.count(b"\n", 0, fault.start) + 1
        raise RecipeError(
            f"{path}:{line}: byte 0x{raw[fault.start]:02x} is not UTF-8. Save the file as UTF-8."
        ) from None
    entries = _read(path, text, _toml_entries if path.suffix == ".toml" else _yaml_entries)
    if not entries:
        raise RecipeError(f"{path} sets no knob. For all defaults, leave the recipe out; see `minigrpo recipes`.")
    return entries


def _read(path: Path, text: str, parse: Callable[[Path, str], Iterator[Entry]]) -> list[Entry]:
    kind = "TOML" if path.suffix == ".toml" else "YAML"
    try:
        entries = list(islice(parse(path, text), MAX_KNOBS + 1))
    except RecursionError:
        raise RecipeError(f"{path} {ENDLESS}") from None
    except (ValueError, OverflowError) as fault:
        # Errors that escape both parsers: a number of thousands of digits, an escape beyond the last character.
        raise RecipeError(f"{path}: this is not {kind}: {' '.join(str(fault).split())}.") from None
    if len(entries) > MAX_KNOBS:
        raise RecipeError(f"{path} sets more than {MAX_KNOBS} knobs. A recipe is a page: see `minigrpo recipes`.")
    return entries


def read_table(text: str) -> Any:
    """Parse an override of a table: `{correct: 1}`. Text that is not YAML stays text and is refused later."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return plain_value(node) if node else {}
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError):
        return text


def _yaml_entries(path: Path, text: str) -> Iterator[Entry]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as fault:
        place = text.count("\n", 0, fault.position) + 1
        what = f"the character U+{int(fault.character):04X} is not allowed"
        raise RecipeError(f"{path}:{place}: this is not YAML: {what}.") from None
    except yaml.MarkedYAMLError as fault:
        # PyYAML places an error at the very end of the text one line too low.
        last = max(1, len(text.splitlines()))
        line = f":{min(fault.problem_mark.line + 1, last)}" if fault.problem_mark else ""
        what = ", ".join(filter(None, (fault.context, fault.problem)))
        raise RecipeError(f"{path}{line}: this is not YAML: {what}.") from None
    except yaml.YAMLError as fault:
        raise RecipeError(f"{path}: this is not YAML: {' '.join(str(fault).split())}") from None
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path} holds no knobs. A recipe is lines like `seed: 0`, or a section `lora:` with them.")
    yield from _from_mapping(root, "", str(path))


def _from_mapping(node: yaml.MappingNode, prefix: str, file: str) -> Iterator[Entry]:
    for key, value in node.value:
        name = prefix + _key(key)
        if isinstance(value, yaml.MappingNode) and value.value and _may_hold(name, prefix):
            yield from _from_mapping(value, f"{name}.", file)
        elif name not in sections() or not _is_empty(value):
            yield Entry(name, plain_value(value), f"{file}:{key.start_mark.line + 1}")


def _may_hold(name: str, prefix: str) -> bool:
    """Return whether a mapping is read key by key: that of a section, of a table, or of an unknown name to report."""
    knob = fields_by_name().get(name)
    return (knob is None or knob.is_table) and prefix.count(".") < 2


def _is_empty(node: yaml.Node) -> bool:
    """Return whether a section is empty, because its knobs are all commented out."""
    return node.value == [] or (node.value in NULLS and getattr(node, "style", None) is None)


def plain_value(node: yaml.Node, depth: int = 0) -> Any:
    """Convert a YAML node to text, or to one level of list or dict; deeper levels, which no knob has, stay empty."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value.lower() in NULLS else str(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    if depth:
        return {}
    return {_key(key): plain_value(value, depth + 1) for key, value in node.value}


def _key(node: yaml.Node) -> str:
    """Return a key's text; a key that is a list or a mapping names nothing, so return its kind in brackets."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    return "(mapping)" if isinstance(node, yaml.MappingNode) else "(sequence)"


def _toml_entries(path: Path, text: str) -> Iterator[Entry]:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        found = re.search(r"at line (\d+)", str(fault))
        line = found[1] if found else max(1, len(text.splitlines()))
        raise RecipeError(f"{path}:{line}: this is not TOML: {fault}.") from None
    lines = _toml_lines(text)
    for name, value in _flat(data):
        # The keys of an inline table are on the table's line.
        spelled = name if name in lines else name.rpartition(".")[0]
        yield Entry(name, value, f"{path}:{lines[spelled]}" if spelled in lines else str(path))


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and _may_hold(name, prefix):
            yield from _flat(value, f"{name}.")
        else:
            yield name, as_text(value)


_PART = r"""(?:[\w\-]+|"[^"]*"|'[^']*')"""
_KEY = rf"({_PART}(?:\s*\.\s*{_PART})*)"


def _toml_lines(text: str) -> dict[str, int]:
    """Find the line of each key and section with regular expressions: tomllib keeps no lines."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if header := re.match(rf"\s*\[+\s*{_KEY}\s*\]", line):
            name = _spelled(header[1])
            section = f"{name}."
            lines.setdefault(name, number)
        elif key := re.match(rf"\s*{_KEY}\s*=", line):
            lines.setdefault(section + _spelled(key[1]), number)
    return lines


def _spelled(key: str) -> str:
    """Convert `"lora" . rank` to lora.rank."""
    return ".".join(part.strip("\"'") for part in re.findall(_PART, key))


def as_text(value: Any) -> Any:
    """Convert a typed value to the text of a recipe file, so that True is not read as the number 1."""
    if isinstance(value, Mapping):
        return {str(key): as_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_text(item) for item in value]
    return None if value is None else format_value(value) if isinstance(value, bool) else str(value)
