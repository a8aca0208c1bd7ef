"""A recipe file as a list of entries: name, value as text, and the line it stands on. YAML and TOML.

Values stay text until the recipe's own types read them: YAML 1.1 would turn `on` into a boolean, `5e-5` into a string
and `010` into 8, and a knob that is a name may look like a number.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minigrpo.errors import RecipeError
from minigrpo.knobs import in_words, knobs_by_name, sections

LARGEST = 1 << 20  # a recipe is a page; a weights file given by mistake should not be read to its end
NULLS = ("", "~", "null")
ENDLESS = "is nested without end. A recipe is sections of knobs, two levels deep."


@dataclass(frozen=True, slots=True)
class Entry:
    """One knob as somebody wrote it: its dotted name, the value as text (or None, list, dict), and where it stands."""

    name: str
    value: Any
    where: str


def read_entries(path: Path) -> list[Entry]:
    """Every knob that a file sets, in its order. Raises RecipeError where it cannot be read as a recipe at all."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(LARGEST + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path} is missing. `minigrpo recipes NAME > {path}` writes one to start from.") from None
    except OSError as fault:
        raise RecipeError(f"{path} cannot be read: {fault.strerror or fault}.") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if len(raw) > LARGEST or "\0" in text:
        raise RecipeError(f"{path} is not a text file. A recipe is a .yaml or .toml file: see `minigrpo recipes`.")
    entries = _toml_entries(path, text) if path.suffix == ".toml" else _yaml_entries(path, text)
    if not entries:
        raise RecipeError(f"{path} sets no knob. For all defaults, leave the recipe out; see `minigrpo recipes`.")
    return entries


def read_table(text: str) -> Any:
    """The value of an override whose knob is a table: `{correct: 1}`. What is not YAML stays text, to be refused."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return plain(node) if node else {}
    except (yaml.YAMLError, RecursionError):
        return text


def _yaml_entries(path: Path, text: str) -> list[Entry]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(
                f"{path} holds no knobs. A recipe is lines like `seed: 0`, or a section `lora:` with them."
            )
        return list(_from_mapping(root, "", str(path)))
    except yaml.MarkedYAMLError as fault:
        line = f":{fault.problem_mark.line + 1}" if fault.problem_mark else ""
        what = ", ".join(filter(None, (fault.context, fault.problem)))
        raise RecipeError(f"{path}{line}: this is not YAML: {what}.") from None
    except yaml.YAMLError as fault:
        raise RecipeError(f"{path}: this is not YAML: {' '.join(str(fault).split())}") from None
    except RecursionError:
        raise RecipeError(f"{path} {ENDLESS}") from None


def _from_mapping(node: yaml.MappingNode, prefix: str, file: str) -> Iterator[Entry]:
    for key, value in node.value:
        # A key that is itself a list or a mapping cannot name a knob; its text shows what stands there.
        name = prefix + (str(key.value) if isinstance(key, yaml.ScalarNode) else f"({key.id})")
        deeper = isinstance(value, yaml.MappingNode) and name not in knobs_by_name() and prefix.count(".") < 2
        if deeper and value.value:
            yield from _from_mapping(value, f"{name}.", file)
        elif name not in sections() or not _is_empty(value):
            yield Entry(name, plain(value), f"{file}:{key.start_mark.line + 1}")


def _is_empty(node: yaml.Node) -> bool:
    """A section whose knobs are all commented out."""
    return node.value == [] or (node.value in NULLS and getattr(node, "style", None) is None)


def plain(node: yaml.Node, depth: int = 0) -> Any:
    """Nodes as text, lists and dicts; anything deeper than a recipe can be stays out of the way as "..."."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value.lower() in NULLS else str(node.value)
    if depth == 2:
        return "..."
    if isinstance(node, yaml.MappingNode):
        return {str(plain(key, 2)): plain(value, depth + 1) for key, value in node.value}
    return [plain(value, depth + 1) for value in node.value]


def _toml_entries(path: Path, text: str) -> list[Entry]:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        found = re.search(r"at line (\d+)", str(fault))
        line = f":{found[1]}" if found else ""
        raise RecipeError(f"{path}{line}: this is not TOML: {fault}.") from None
    except RecursionError:
        raise RecipeError(f"{path} {ENDLESS}") from None
    lines = _toml_lines(text)
    return [Entry(name, value, f"{path}:{lines[name]}" if name in lines else str(path)) for name, value in _flat(data)]


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in knobs_by_name() and prefix.count(".") < 2:
            yield from _flat(value, f"{name}.")
        else:
            yield name, as_text(value)


def _toml_lines(text: str) -> dict[str, int]:
    """Line of each key, found by its looks: tomllib keeps none."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*([\w.\- ]+?)\s*\]", line):
            section = f"{header[1]}."
        elif key := re.match(r"\s*([\w.\-]+)\s*=", line):
            lines.setdefault(section + key[1], number)
    return lines


def as_text(value: Any) -> Any:
    """A typed value as a recipe file would hold it, so that True is no number here either."""
    if isinstance(value, Mapping):
        return {str(key): as_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_text(item) for item in value]
    return None if value is None else in_words(value) if isinstance(value, bool) else str(value)
