"""Recipes that strangers write: a knob is what the file says, or the file is refused with the line of the mistake."""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from minigrpo.config.fields import Field, field_table
from tests.config.test_recipe_fuzz import YAML, Broken
from tests.helpers.command_line import DONE, REFUSED, Ended, called, started
from tests.strangers import LIMIT_S, cases

pytestmark = [pytest.mark.long, pytest.mark.timeout(LIMIT_S)]

KNOBS = [knob for knob in field_table() if not knob.is_table]
PATHS = ("model.path", "task.name", "task.data", "task.rates", "warmup.data")
"""Knobs whose value becomes absolute where it names a file that is here."""

# Values that a knob takes, and how a file may spell them.

letters = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\ufffe\uffff\u2028\u2029\x85")
words = st.text(letters, min_size=1, max_size=20).filter(lambda text: text.strip() and text != "~")


def values(knob: Field) -> st.SearchStrategy[Any]:
    """Draw a value within the knob's range."""
    if knob.choices:
        return st.sampled_from(knob.choices)
    low, high = limits(knob)
    kinds: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
        "a whole number": lambda: st.integers(int(low), int(min(high, 2**62))),
        "a number": lambda: st.floats(low, high, allow_nan=False, allow_infinity=False).filter(knob_takes(knob)),
        "true or false": st.booleans,
        "text": lambda: words.filter(lambda text: text.lower() != "null"),
    }
    found = kinds[knob.kind]()
    return found | st.none() if knob.optional else found


def limits(knob: Field) -> tuple[float, float]:
    found = [float(number) for number in re.findall(r"-?[\d.]+(?:e[+-]?\d+)?", knob.range)]
    upper = "to" in knob.range or "<" in knob.range
    least = found[0] if found and (">" in knob.range or "to" in knob.range) else -1e9
    return least, found[-1] if upper else 1e9


def knob_takes(knob: Field) -> Callable[[float], bool]:
    """Tell whether a number is within limits that are no part of the range themselves."""
    low, high = limits(knob)
    return lambda value: ("> " not in knob.range or value > low) and ("< " not in knob.range or value < high)


@st.composite
def spelled(draw: st.DrawFn, value: Any) -> str:
    """Write a value as YAML, in one of its ways."""
    if value is None:
        return draw(st.sampled_from(["null", "~", "", "Null", "NULL"]))
    if isinstance(value, bool):
        return draw(st.sampled_from(["true", "True", "yes", "on"] if value else ["false", "FALSE", "no", "off"]))
    if isinstance(value, str):
        return draw(st.sampled_from([json.dumps(value), json.dumps(value, ensure_ascii=False), single_quoted(value)]))
    plain = repr(value)
    return draw(st.sampled_from([plain, f'"{plain}"', f"'{plain}'", f"!!str {plain}"]))


def single_quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@st.composite
def sound_recipes(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A file of some knobs, and their values by name."""
    chosen = draw(st.lists(st.sampled_from(KNOBS), min_size=1, max_size=6, unique_by=lambda knob: knob.name))
    meant = {knob.name: draw(values(knob)) for knob in chosen}
    lines: dict[str, list[str]] = {}
    for name, value in meant.items():
        section, _, leaf = name.rpartition(".")
        lines.setdefault(section, []).append(f"{leaf}: {draw(spelled(value))}")
    flow = draw(st.booleans())
    text = draw(st.sampled_from(["", "\ufeff", "# a recipe\n", "---\n", "%YAML 1.1\n---\n"]))
    for section, own in lines.items():
        if not section:
            text += "\n".join(own) + "\n"
        elif flow and all(line.partition(": ")[2] for line in own):
            text += f"{section}: {{{', '.join(own)}}}\n"
        else:
            text += f"{section}:\n" + "".join(f"  {line}  # why\n" for line in own)
    return text, meant


def told_of(folder: Path, raw: bytes, *, name: str = "my.yaml", run: Callable[..., Ended] = called) -> Ended:
    (folder / name).write_bytes(raw)
    return run("recipes", folder / name, "--json")


@cases(150)
@given(sound_recipes())
def test_each_knob_is_what_the_file_says(case: tuple[str, dict[str, Any]]) -> None:
    text, meant = case
    with tempfile.TemporaryDirectory() as folder:
        ended = told_of(Path(folder), text.encode())
    event(f"ended with {ended.code}")
    if ended.code == REFUSED:  # sound knobs may contradict one another
        assert "my.yaml:" in ended.refused
        assert "but must be" not in ended.refused
        return
    found = json.loads(ended.out)
    for name, value in meant.items():
        section, _, leaf = name.rpartition(".")
        read = (found[section] if section else found)[leaf]
        assert read == value, name
        assert isinstance(read, bool) == isinstance(value, bool), name


@cases(150)
@given(st.sampled_from(YAML), st.integers(0, 10**9))
def test_a_mistake_is_refused_with_its_line(kind: Callable[[random.Random], Broken], seed: int) -> None:
    lines, wrong = kind(random.Random(seed))
    with tempfile.TemporaryDirectory() as folder:
        told = told_of(Path(folder), "\n".join(lines).encode()).refused
    assert f"my.yaml:{wrong}:" in told, lines[wrong - 1]
    assert len(told) < 3000


# Text that is YAML or nearly so, put together from its signs.

signs = st.sampled_from(
    [
        "\t",
        "\n",
        "\n  ",
        "\n- ",
        ": ",
        ":",
        "? ",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "&a ",
        "*a",
        "<<: *a",
        "!!python/object:os.system ",
        "!!binary ",
        "!!timestamp 2020-13-99",
        "!!int ",
        "!x ",
        "|\n  ",
        ">\n  ",
        "---\n",
        "...\n",
        "%TAG ! x\n",
        "#",
        "'",
        '"',
        "\\",
        "@",
        "`",
        "null",
        "true",
        ".nan",
        "1e999",
        "9" * 5000,
        "0x1g",
        "x" * 100_000,
        "[" * 2000,
        "\u2028",
        "\0",
        "\ud800",
        '"\\ud800"',
        "seed",
        "lora",
        "rank",
        "task",
        "weights",
        "template",
        "system",
        "about",
    ]
)
scraps = st.lists(signs, min_size=1, max_size=12).map("".join)
lines = st.lists(
    st.sampled_from(
        ["seed: 1", "lora:", "  rank: 4", "task:", "  weights: {a: 1}", "  system: x", "about: x", "model:"]
    )
    | scraps,
    min_size=1,
    max_size=6,
).map("\n".join)


@cases(200)
@given(lines | scraps, st.sampled_from(["my.yaml", "my.yml", "my.toml"]))
def test_whatever_a_file_holds_it_is_read_or_refused_with_its_name(text: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ended = told_of(Path(folder), text.encode("utf-8", "surrogatepass"), name=name)
        event(f"ended with {ended.code}")
        if ended.code == DONE:  # what is printed is what a run writes down, and reads when it is resumed
            (Path(folder) / "again.yaml").write_text(called("recipes", Path(folder) / name).out, encoding="utf-8")
            assert json.loads(called("recipes", Path(folder) / "again.yaml", "--json").out) == json.loads(ended.out)
            return
    assert f"{name}" in ended.refused
    assert len(ended.refused) < 5000


@cases(100)
@given(st.binary(max_size=60))
def test_bytes_are_refused_with_the_files_name(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert "my.yaml" in told_of(Path(folder), raw).refused


@cases(100)
@given(st.sampled_from([knob.name for knob in KNOBS]), words | scraps | st.just("--"))
def test_a_knob_of_the_command_line_is_taken_or_refused_with_its_name(name: str, text: str) -> None:
    assume("\0" not in text)  # no argument of a process can hold it
    ended = called("check-task", f"--{name}={text}", "--task.name", "wordproblems", "--limit", "2", "--json")
    assert ended.code == DONE or f"--{name}" in ended.refused or "task." in ended.refused


@cases(8)
@given(sound_recipes(), st.sampled_from(YAML), st.integers(0, 10**9))
def test_a_process_of_its_own_says_the_same(
    case: tuple[str, dict[str, Any]], kind: Callable[[random.Random], Broken], seed: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def run(*args: str | Path) -> Ended:
            return started(*args, cwd=folder)

        sound = told_of(folder, case[0].encode(), run=run)
        assert sound.code == DONE or "my.yaml:" in sound.refused
        broken, wrong = kind(random.Random(seed))
        assert f"my.yaml:{wrong}:" in told_of(folder, "\n".join(broken).encode(), run=run).refused
