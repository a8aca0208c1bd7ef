"""Build a Recipe from files and overrides, or raise one RecipeError that lists every mistake with its file and line.

All mistakes of a file and of the command line are found in one pass, so that nobody has to mend them one by one.
"""

from __future__ import annotations

import difflib
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from minigrpo.config.fields import Field, field_table, fields_by_name, nearest, sections
from minigrpo.config.parse import NULLS, Entry, as_text, read_entries, read_table
from minigrpo.config.schema import Recipe, TaskConfig, contradictions
from minigrpo.errors import RecipeError
from minigrpo.versions import begun_by_another

__all__ = ["Field", "dump_recipe", "field_table", "load_recipe", "recipe_names", "recipe_path", "task_files"]

FOLDER = Path(__file__).parents[1] / "recipes"
SUFFIXES = (".yaml", ".yml", ".toml")
WIDTH = 110
PATHS = ("model.path", "task.name", "task.data", "task.rates", "warmup.data")
"""Knobs that may name a file or a folder; task.name as FILE.py:NAME or judge:FILE, task.data as FOLDER:CONFIG."""
REWARD_KINDS = ("judge:", "classifier:")
"""Beginnings of a task.name that goes on with a path."""
BLANK = ("task.system",)  # here an empty text differs from null, on the command line, too

Overrides = Mapping[str, Any] | Iterable[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class RecipeFault:
    """One mistake: where it is, what is wrong, and what the knob does."""

    where: str
    what: str
    manual: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"\n    {self.manual}" if self.manual else "")


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def recipe_path(name_or_path: str) -> Path:
    """Return the file that a recipe's name, path or run folder stands for."""
    if name_or_path in recipe_names():
        return FOLDER / f"{name_or_path}.yaml"
    # os.path, unlike Path, answers False for what may not be looked at or is no possible name.
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isdir(path):
        if os.path.isfile(path / "recipe.yaml"):
            return path / "recipe.yaml"
        raise RecipeError(f"{path} is a folder without a recipe.yaml. A recipe is a .yaml or .toml file.")
    if os.path.exists(path) or path.suffix in SUFFIXES or len(path.parts) > 1:
        return path
    close = nearest_of(name_or_path, recipe_names())
    hint = f"Did you mean {close}?" if close else f"There are: {', '.join(recipe_names()) or 'none'}."
    raise RecipeError(f"There is no recipe {name_or_path!r}. {hint} A file of your own is given by its path: my.yaml")


def load_recipe(name_or_path: str | None = None, overrides: Overrides = ()) -> Recipe:
    """Load the recipe of a name, file or run folder (None: all defaults), with overrides such as ("lora.rank", "16").

    Raise RecipeError with all mistakes.
    """
    path = recipe_path(name_or_path) if name_or_path is not None else None
    entries = read_entries(path) if path else []
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    changes = [_from_override(name, value) for name, value in pairs]
    recipe, faults = _build([*entries, *changes])
    faults += _duplicates(entries)
    if recipe is None or faults:
        order = {entry.where: index for index, entry in enumerate([*entries, *changes])}
        report = _report(sorted(faults, key=lambda fault: order.get(fault.where, len(order))))
        in_file = any(entry.where in fault.where for entry in entries for fault in faults)
        raise RecipeError((begun_by_another(path) if path and in_file else "") + report)
    return _with_absolute_paths(recipe)


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Make what exists here absolute, so that a run means the same file from every folder, and for ever.

    A name that is no file or folder here is left as it is: an id of the Hub, the embedded model, a task of the package.
    """
    for name in PATHS:
        section, _, leaf = name.partition(".")
        value = getattr(getattr(recipe, section), leaf)
        if value and (absolute := _absolute_path(str(value), leaf)) != value:
            part = getattr(recipe, section).model_copy(update={leaf: absolute})
            recipe = recipe.model_copy(update={section: part})
    return recipe


def _absolute_path(value: str, leaf: str) -> str:
    if leaf == "path" and value.partition(":")[0] == "seedling":
        return value
    kind = next((kind for kind in REWARD_KINDS if leaf == "name" and value.startswith(kind)), "")
    rest = value.removeprefix(kind)
    named = (leaf == "name" and not kind) or (leaf == "data" and not os.path.exists(os.path.expanduser(rest)))
    file, colon, name = rest.rpartition(":") if named else (rest, "", "")
    path = os.path.expanduser(file)
    exists = bool(file) and os.path.exists(path) and (bool(name) or not colon)
    return f"{kind}{os.path.abspath(path)}{colon}{name}" if exists else value


def task_files(task: TaskConfig) -> list[Path]:
    """Return the files and folders of this machine that a task's knobs name: its code, its data, its rates."""
    kind, _, name = task.name.partition(":")
    own = name if f"{kind}:" in REWARD_KINDS else task.name.rpartition(":")[0]
    found = [Path(each).expanduser() for each in (own, task.data, task.rates) if each]
    return [path for path in found if path.exists()]


def dump_recipe(recipe: Recipe, *, ascii_only: bool = False) -> str:
    """Write the recipe as YAML that `load_recipe` reads back: every knob, with a comment that says what it does.

    `ascii_only`: with escapes for other characters.
    """
    lines = []
    for knob in field_table():
        section, _, leaf = knob.name.rpartition(".")
        value = getattr(getattr(recipe, section), leaf) if section else getattr(recipe, leaf)
        if section and f"{section}:" not in lines:
            lines += ["", f"{section}:"]
        indent = "  " if section else ""
        text = f"{indent}{leaf}: {_scalar(value, ascii_only)}"
        if len(beside := f"{text:<32}  # {knob.about}") > WIDTH and knob.name != "about":
            lines += textwrap.wrap(knob.about, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            beside = text
        lines.append(text if knob.name == "about" else beside)
    return "\n".join(lines) + "\n"


def nearest_of(word: str, names: Iterable[str]) -> str | None:
    """Return the name that is spelled most like `word`, or None."""
    return next(iter(difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)), None)


def _from_override(name: str, value: Any) -> Entry:
    where = f"--{name}"
    if not isinstance(value, str):
        return Entry(name, as_text(value), where)
    knob = fields_by_name().get(name)
    if knob and knob.is_table:
        return Entry(name, read_table(value), where)
    if name in BLANK and not value:
        return Entry(name, value, where)
    return Entry(name, None if knob and knob.optional and value in NULLS else value, where)


def _duplicates(entries: list[Entry]) -> Iterator[RecipeFault]:
    first: dict[str, str] = {}
    for entry in entries:
        if entry.name in first:
            yield RecipeFault(entry.where, f"{entry.name} is set a second time; the first is at {first[entry.name]}.")
        first.setdefault(entry.name, entry.where)


def _build(entries: list[Entry]) -> tuple[Recipe | None, list[RecipeFault]]:
    """Build the recipe; later entries win. Leave out unknown names, so that all other values are still checked."""
    faults = []
    data: dict[str, Any] = {}
    places: dict[str, str] = {}
    for entry in entries:
        knob = _knob_of(entry.name)
        if knob is None:
            faults.append(_unknown(entry))
            continue
        section, _, leaf = knob.name.rpartition(".")
        target = data.setdefault(section, {}) if section else data
        if knob.name == entry.name:
            target[leaf] = entry.value
        elif isinstance(own := target.setdefault(leaf, {}), dict):
            target[leaf] = {**own, entry.name[len(knob.name) + 1 :]: entry.value}
        places[entry.name] = entry.where
    try:
        return Recipe.model_validate(data), faults
    except ValidationError as fault:
        wrong = [_wrong(error, places) for error in fault.errors() if error["loc"]]
        # A table's row has one error for each type it might have had; they all read alike.
        return None, faults + (list(dict.fromkeys(wrong)) or _contradictory(data, places))


def _contradictory(data: Mapping[str, Any], places: Mapping[str, str]) -> list[RecipeFault]:
    """Return every contradiction between knobs that are each valid, with the places of the knobs that it names."""
    plain = Recipe.model_validate({name: value for name, value in data.items() if name not in sections()})
    own = {name: type(getattr(plain, name)).model_validate(data[name]) for name in sections() if name in data}
    sentences = [sentence for wrong, sentence in contradictions(plain.model_copy(update=own)) if wrong]
    return [RecipeFault(" and ".join(_named_in(sentence, places)) or "recipe", sentence) for sentence in sentences]


def _named_in(sentence: str, places: Mapping[str, str]) -> list[str]:
    """Return the places of the knobs that the sentence names, each once."""
    words = set(re.findall(r"[\w.]*\w", sentence))
    return list(dict.fromkeys(where for name, where in places.items() if name in words))


def _knob_of(name: str) -> Field | None:
    """Return the knob that an entry sets: the one of that name, or the table whose row it is (task.weights.NAME)."""
    parent = fields_by_name().get(".".join(name.split(".")[:2]))
    return fields_by_name().get(name) or (parent if parent and parent.is_table else None)


def _unknown(entry: Entry) -> RecipeFault:
    name = _short(entry.name)
    if name in sections():
        return RecipeFault(entry.where, f"{name} is a section and takes no value itself. It holds {sections()[name]}.")
    near = nearest(entry.name)
    if near is None:
        return RecipeFault(entry.where, f"there is no knob {name}. `minigrpo train --help` lists them all.")
    return RecipeFault(entry.where, f"there is no knob {name}. Did you mean {near}?", fields_by_name()[near].manual)


def _wrong(error: Any, places: Mapping[str, str]) -> RecipeFault:
    path = [str(part) for part in error["loc"]]
    knob = fields_by_name()[".".join(path[:2])]
    # After the name of a table's row, pydantic lists the types that it might have had.
    name = ".".join(path[:3])
    where = places.get(name) or places.get(knob.name, "recipe")
    given = "nothing" if error["input"] is None else _short(error["input"])
    if knob.name == "rollout.completions" and given == "1":
        what = f"{name} is 1. A group of one compares nothing: GRPO learns from the differences between siblings."
    else:
        what = f"{_short(name)} is {given}, but must be {knob.expects if name == knob.name else knob.row_expects}."
        near = nearest_of(given, knob.choices)
        what += f" Did you mean {near}?" if near else ""
    return RecipeFault(where, what, knob.summary)


def _short(value: Any) -> str:
    """Shorten a given value to one line for a terminal, without control characters."""
    if isinstance(value, list | Mapping):
        return "a list" if isinstance(value, list) else "a mapping"
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(value).split()))
    return (text if len(text) <= 60 else f"{text[:57]}...") or "empty"


def _report(faults: list[RecipeFault]) -> str:
    if len(faults) == 1:
        return str(faults[0])
    return f"{len(faults)} mistakes:\n" + "\n".join(str(fault) for fault in faults)


def _scalar(value: Any, ascii_only: bool) -> str:
    """Write a value as YAML on one line, with quotes exactly where a reader would need them."""
    # Line breaks and control characters fit on one line only as escapes, which need double quotes.
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    wide: dict[str, Any] = {"width": float("inf"), "allow_unicode": not ascii_only}
    text = yaml.safe_dump(value, default_style=style, default_flow_style=True, **wide)
    return text.removesuffix("\n").removesuffix("\n...")
