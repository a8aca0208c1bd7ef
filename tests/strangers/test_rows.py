"""Rows that strangers bring: each file is read to the last letter, or refused with its name and line."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.helpers.command_line import REFUSED, Ended, called, started
from tests.strangers import LIMIT_S, cases

pytestmark = [pytest.mark.long, pytest.mark.timeout(LIMIT_S)]

WITNESS = """
import json
import pathlib

SEEN = pathlib.Path(__file__).with_name("seen.jsonl")

def score(completion, prompt, **columns):
    with SEEN.open("a", encoding="utf-8") as out:
        out.write(json.dumps([prompt, columns], sort_keys=True) + "\\n")
    return min(len(completion), 10) / 10
"""
"""A reward function that writes down what it is handed."""

Row = dict[str, Any]

# What a file may hold.

letters = st.characters(exclude_categories=["Cs"])
words = st.text(letters, min_size=1, max_size=20).filter(str.strip)
names = st.from_regex(r"[a-z]{3,8}", fullmatch=True).filter(
    lambda name: name not in ("prompt", "messages", "completion")
)
numbers = st.integers() | st.integers(-(10**4000), 10**4000) | st.floats(allow_nan=False, allow_infinity=False)
plain_values = st.none() | st.booleans() | numbers | st.text(letters, max_size=9) | st.just("half a \ud800 character")
values = plain_values | st.lists(plain_values, max_size=3) | st.dictionaries(words, plain_values, max_size=2)
calls = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": words})}),
    min_size=1,
    max_size=2,
)
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": words}), min_size=1, max_size=3)
silent = st.fixed_dictionaries(
    {}, optional={"tool_calls": st.just([]) | st.none(), "name": st.none(), "weight": st.floats(0, 1) | st.booleans()}
)
questions = st.builds(
    lambda role, content, rest: {"role": role, "content": content, **rest},
    st.sampled_from(["user", "system", "developer"]),
    words | parts,
    silent,
)
replies = st.fixed_dictionaries({"role": st.just("assistant"), "content": words | st.just("")}) | st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none(), "tool_calls": calls}
)
conversations = st.builds(
    lambda head, middle, tail: [*head, *middle, *tail],
    st.lists(questions, max_size=2),
    st.lists(replies, max_size=1),
    st.lists(questions, min_size=1, max_size=2),
)
prefills = st.builds(
    lambda asked, begun: [asked, {"role": "assistant", "content": begun}],
    questions,
    st.sampled_from(["", "<think>", "The answer is", "```python\n"]),
)


def meant(row: Row) -> str:
    """A row as a reward function is handed it."""
    return json.dumps([meant_prompt(row["prompt"]), {k: v for k, v in row.items() if k != "prompt"}], sort_keys=True)


def meant_prompt(prompt: Any) -> Any:
    """A prompt as a model is asked: parts are joined, and keys that say nothing are left out."""
    return prompt if isinstance(prompt, str) else [_message(one) for one in prompt]


def _message(message: Row) -> Row:
    told = {key: value for key, value in message.items() if value not in (None, [])}
    content = message.get("content") or ""
    return {**told, "content": content if isinstance(content, str) else "".join(part["text"] for part in content)}


@st.composite
def tables(draw: st.DrawFn, prompts: st.SearchStrategy[Any], cells: st.SearchStrategy[Any] = values) -> list[Row]:
    """Two rows or more that differ in their prompts, all with the same columns."""
    columns = draw(st.lists(names, unique=True, max_size=3))
    asked = draw(st.lists(prompts, min_size=2, max_size=9, unique_by=lambda prompt: json.dumps(meant_prompt(prompt))))
    return [{"prompt": prompt, **{name: draw(cells) for name in columns}} for prompt in asked]


whole_tables = tables(words) | tables(conversations) | tables(prefills) | tables(conversations | prefills)

# How a file may say it.


@dataclass(frozen=True)
class Written:
    """A file, the rows that it means, and the line on which each row ends."""

    name: str
    raw: bytes
    rows: Sequence[Row]
    lines: Sequence[str]


@st.composite
def as_jsonl(draw: st.DrawFn, rows: Sequence[Row]) -> Written:
    """Lines of JSON, with or without a byte order mark, escapes, empty lines, and a line's end at the end."""
    escaped, end = draw(st.booleans()), draw(st.sampled_from(["\n", "\r\n"]))
    text, lines = draw(st.sampled_from(["", "\ufeff"])), []
    for row in rows:
        text += draw(st.sampled_from(["", end, f"  {end}"])) if text.strip("\ufeff") else ""
        # Half a character has no bytes of its own in UTF-8: it can only be escaped.
        line = json.dumps(row)
        plain = json.dumps(row, ensure_ascii=False)
        text += (line if escaped or any("\ud800" <= c <= "\udfff" for c in plain) else plain) + end
        lines.append(f":{text.count(chr(10))}")
    text = text.rstrip("\r\n") if draw(st.booleans()) else text
    return Written("rows.jsonl", text.encode(), rows, lines)


def as_json(rows: Sequence[Row]) -> st.SearchStrategy[Written]:
    place = [f", row {number}" for number in range(1, len(rows) + 1)]
    return st.sampled_from([None, 2]).map(
        lambda indent: Written("rows.json", json.dumps(rows, indent=indent).encode(), rows, place)
    )


def as_csv(rows: Sequence[Row]) -> Written:
    """A table of text. Values that are no text are written as Python prints them."""
    stream = io.StringIO(newline="")
    table = csv.DictWriter(stream, list(rows[0]))
    table.writeheader()
    lines = []
    for row in rows:
        table.writerow(row)
        lines.append(f":{len(list(io.StringIO(stream.getvalue(), newline=None)))}")
    meant = [{name: str(value) for name, value in row.items()} for row in rows]
    return Written("rows.csv", stream.getvalue().encode(), meant, lines)


def as_parquet(rows: Sequence[Row]) -> Written:
    stream = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    place = [f", row {number}" for number in range(1, len(rows) + 1)]
    return Written("rows.parquet", stream.getvalue().to_pybytes(), rows, place)


texts = st.text(letters, max_size=9)
cells_of_one_type = st.sampled_from([texts, st.integers(-(2**63), 2**63 - 1), st.booleans() | st.none()])
tables_of_text = tables(words.filter(lambda text: "\0" not in text), texts.filter(lambda text: "\0" not in text))
files = (
    whole_tables.flatmap(as_jsonl)
    | whole_tables.flatmap(as_json)
    | tables_of_text.map(as_csv)
    | cells_of_one_type.flatmap(lambda cells: tables(words, cells)).map(as_parquet)
)


def tried(folder: Path, raw: bytes, name: str, *, run: Callable[..., Ended] = called) -> Ended:
    """Have check-task read a file, with the witness as its reward function."""
    (folder / "mine.py").write_text(WITNESS)
    (folder / name).write_bytes(raw)
    task = ("--task.name", f"{folder}/mine.py:score", "--task.data", folder / name)
    return run("check-task", *task, "--limit", "1000", "--json")


@cases(100)
@given(files)
def test_every_row_reaches_the_reward_function_as_it_was_written(file: Written) -> None:
    event(file.name)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found = json.loads(tried(folder, file.raw, file.name).out)
        seen = (folder / "seen.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(found["prompts"].values()) == len(file.rows)
    assert min(found["prompts"].values()) >= 1
    assert set(seen) == set(map(meant, file.rows))
    kinds = {kind["name"]: (kind["low"], kind["high"]) for kind in found["kinds"]}
    assert kinds["empty"] == (0, 0)
    assert kinds["long"] == (1, 1)


# What a file may not hold: the text of one row, and words of the sentence that refuses it.

no_prompts = st.sampled_from([3, 1e9, True, None, [], {}, "", " \n", "\ud800", [3], [[]], ["x"], [None]])
no_contents = st.sampled_from([3, True, {}, [3], [{}], [{"type": "image", "image": "x.png"}], [{"text": 3}], "\udfff"])
no_roles = st.sampled_from([3, None, [], {}, "us\ud800er"])
no_calls = st.sampled_from([3, True, "add", {}, {"name": "add"}, ["add"], [3], [{"name": "\ud800"}], [{"\ud800": 1}]])
no_messages = (
    st.builds(lambda content: {"role": "user", "content": content}, no_contents)
    | st.builds(lambda role: {"role": role, "content": "x"}, no_roles)
    | st.builds(lambda tool_calls: {"role": "assistant", "tool_calls": tool_calls}, no_calls.filter(bool))
    | st.sampled_from([{"role": "user"}, {"content": "x"}, {"role": "user", "content": "x", "name": "\ud800"}])
)
wrong_values = (
    st.builds(lambda prompt: {"prompt": prompt}, no_prompts)
    | st.builds(lambda message: {"prompt": [message]}, no_messages)
    | st.sampled_from([[], [1], 3, None, "text", True, {}, {"question": "x"}, {"prompts": "x"}])
    | st.just({"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}]})
)
no_json = st.sampled_from(
    [
        '{"prompt": ',
        "prompt: x",
        "{'prompt': 'x'}",
        '{"prompt": "x"} {"prompt": "y"}',
        '{"prompt": "x", "answer": NaN}',
        '{"prompt": "x", "answer": -Infinity}',
        '{"prompt": "x", "answer": ' + "9" * 5000 + "}",
        '{"prompt": ' + "[" * 100_000,
        '{"prompt": "x", "prompt": "y"}',
        '{"prompt": "a\tb"}',
        "\0",
    ]
)
wrong_lines = no_json | wrong_values.map(json.dumps)


@cases(100)
@given(tables(words), wrong_lines, st.data())
def test_a_wrong_row_of_a_file_of_lines_is_refused_with_its_line(
    rows: list[Row], wrong: str, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(rows)), "place")
    lines = [json.dumps(row) for row in rows]
    lines.insert(place, wrong)
    with tempfile.TemporaryDirectory() as folder:
        ended = tried(Path(folder), "\n".join(lines).encode(), "rows.jsonl")
    # Messages among texts are sound by themselves: then the first row of another kind is named.
    assert f"rows.jsonl:{place + 1}" in ended.refused or "is the first of another kind" in ended.refused
    assert len(ended.refused) < 1500


@cases(100)
@given(tables(words), wrong_values, st.data())
def test_a_wrong_row_of_a_list_is_refused_with_its_number(rows: list[Row], wrong: Any, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(rows)), "place")
    listed = [*rows[:place], wrong, *rows[place:]]
    with tempfile.TemporaryDirectory() as folder:
        ended = tried(Path(folder), json.dumps(listed).encode(), "rows.json")
    assert f"rows.json, row {place + 1}" in ended.refused or "is the first of another kind" in ended.refused


# Files that are not what their name says.

encodings = st.sampled_from(["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift-jis"])


@cases(100)
@given(files, st.data())
def test_bytes_that_were_harmed_are_read_or_refused_with_the_files_name(file: Written, data: st.DataObject) -> None:
    raw = bytearray(file.raw)
    harm = data.draw(st.sampled_from(["cut", "changed", "another encoding", "another name"]), "harm")
    name = file.name
    if harm == "cut":
        del raw[data.draw(st.integers(0, len(raw))) :]
    elif harm == "changed":
        for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
            raw[place] = data.draw(st.integers(0, 255))
    elif harm == "another encoding":
        raw = bytearray(raw.decode("utf-8", "replace").encode(data.draw(encodings), "replace"))
    else:
        name = "rows" + data.draw(st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".JSONL", ".txt", ""]))
    with tempfile.TemporaryDirectory() as folder:
        ended = tried(Path(folder), bytes(raw), name)
    event(f"{harm}: {ended.code}")
    assert ended.code != REFUSED or name in ended.refused


@cases(10)
@given(files, wrong_lines)
def test_a_process_of_its_own_says_the_same(file: Written, wrong: str) -> None:
    def run(*args: str | Path) -> Ended:
        return started(*args, cwd=folder)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found = json.loads(tried(folder, file.raw, file.name, run=run).out)
        assert sum(found["prompts"].values()) == len(file.rows)
        assert "wrong.jsonl:1" in tried(folder, f"{wrong}\n".encode(), "wrong.jsonl", run=run).refused
