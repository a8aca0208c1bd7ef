"""Rows for reward functions: read from a file, a folder, the Hub or Python, and turned into prompts.

    {"prompt": "What is 2 + 2?", "answer": "4", "level": 1}
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}], "answer": "4"}

A prompt may be named `messages`, and a content may be in parts of text, as in TRL's data. All columns but the prompt
are the target, which only reward functions see. Where there is no test split, a hash of the prompt decides, so that a
question is never in both splits: about one in ten is in the test split, and at least one. Whatever is wrong with a row
raises TaskError with its place.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from minigrpo.errors import TaskError
from minigrpo.tasks.common.rewards import shorten_repr
from minigrpo.types import Message, Prompt, Split
from minigrpo.utils.paths import user_path

_FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
_TEST_ONE_IN = 10
_MOST_FILES = 50_000
"""Files below a folder of rows: more than a data set of text has. Each would be looked at, for hours where it is
"/" by mistake."""


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One row that was checked. `where` is its place, for error messages."""

    prompt: str | tuple[Message, ...]
    columns: Mapping[str, Any]
    where: str


SplitRows = dict[Split, list[DatasetRow]]
RowParser = Callable[[Sequence[tuple[str, Any]], str], list[DatasetRow]]
"""Parses (place, value) pairs into rows; the text names the source of all of them, for error messages."""


def read_data(source: str, check: RowParser | None = None) -> SplitRows:
    """Read the rows of a file, of a folder, or of a Hub data set. Raise TaskError for faulty ones.

    A folder holds train.* (and test.*), or a data set as it is laid out on the Hub or by `save_to_disk`;
    `FOLDER:CONFIG` names one of its configurations. `check` parses rows that have other columns than a prompt.
    """
    check = check or parse_rows
    path = user_path(source)
    if path.is_dir():
        return _read_folder(path, check)
    folder, colon, config = source.rpartition(":")
    if colon and config and user_path(folder).is_dir():
        return _read_laid_out(user_path(folder), config, check)
    if path.is_file():
        return split_rows(_read_file(path, check), source)
    if path.suffix.lower() in _FILE_TYPES or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise TaskError(f"task.data {source!r} is missing; is the path right from {Path.cwd()}?")
    return read_hub_dataset(source, check)


def _read_folder(folder: Path, check: RowParser) -> SplitRows:
    plain = any((folder / f"train{kind}").is_file() for kind in _FILE_TYPES)
    if not plain or _declares_configs(folder / "README.md"):
        return _read_laid_out(folder, None, check)
    files: dict[Split, list[Path]] = {"train": [], "test": []}
    for split, found in files.items():
        found += [folder / f"{split}{kind}" for kind in _FILE_TYPES if (folder / f"{split}{kind}").is_file()]
        if len(found) > 1:
            raise TaskError(f"{folder} has {found[0].name} and {found[1].name}. Leave one of them.")
    train = _read_file(files["train"][0], check)
    if not files["test"]:
        return split_rows(train, str(folder))
    return {"train": train, "test": _read_file(files["test"][0], check)}


def _declares_configs(readme: Path) -> bool:
    """Tell whether the data set's card says which files its configurations have: a `configs:` among its metadata."""
    import yaml

    if not readme.is_file():
        return False
    opening, _, rest = readme.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        metadata = yaml.safe_load(rest.partition("\n---")[0]) if not opening.strip("\ufeff") else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date of a 13th month, say
        return False
    return isinstance(metadata, dict) and bool(metadata.get("configs"))


_SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")
"""What `save_to_disk` writes: of several splits, of one."""


def _read_laid_out(folder: Path, config: str | None, check: RowParser) -> SplitRows:
    """Read a folder as `datasets` does: data/train-*.parquet, main/, README.md's configs, `save_to_disk`."""
    import datasets

    where = f"{folder}:{config}" if config else str(folder)
    files = (file for _, _, files in os.walk(folder) for file in files)
    if len(list(islice(files, _MOST_FILES + 1))) > _MOST_FILES:
        raise TaskError(f"{folder} holds more than {_MOST_FILES} files. Name the file or folder that has the rows.")
    try:
        if any((folder / name).is_file() for name in _SAVED_BY_DATASETS):
            found = datasets.load_from_disk(str(folder / (config or "")))
        else:
            found = datasets.load_dataset(str(folder.absolute()), config)
    except (datasets.data_files.EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError):
        raise TaskError(
            f"{folder} has no train file. Put train.jsonl into it (or {', '.join(_FILE_TYPES[1:])}), or a data set as "
            "the Hub lays it out."
        ) from None
    except Exception as fault:  # pyarrow, pandas and the builders raise some twenty classes of errors
        reason = _say_reason(fault)
        hint = f" Name one: --task.data {shlex.quote(f'{folder}:CONFIG')}" if "Config name is missing" in reason else ""
        raise TaskError(f"{where} could not be read as a data set: {reason}{hint}") from fault
    return _take_splits(found if isinstance(found, dict) else {"train": found}, where, check)


def _say_reason(fault: BaseException) -> str:
    """Return class and words of an error; those of a builder stand in its cause."""
    cause = fault.__cause__ if fault.__cause__ is not None else fault
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"


def _read_file(path: Path, check: RowParser) -> list[DatasetRow]:
    kind = path.suffix.lower()
    if kind not in _FILE_TYPES:
        raise TaskError(f"{path} is a {kind or 'nameless'} file. Rows come from {', '.join(_FILE_TYPES)}.")
    try:
        rows = {".jsonl": read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[kind](
            path
        )
    except OSError as fault:
        raise TaskError(f"{path} cannot be read: {fault.strerror or fault}.") from None
    return check(rows, str(path))


def read_json_lines(path: Path) -> list[tuple[str, Any]]:
    """Read JSON lines, each with its place; skip empty lines."""
    with path.open("rb") as stream:
        pieces = [(f"{path}:{number}", raw) for number, raw in enumerate(stream, 1)]
    return [
        (where, _parse_json(_decode_text(raw, where).rstrip("\r\n"), where)) for where, raw in pieces if raw.strip()
    ]


def _read_json(path: Path) -> list[tuple[str, Any]]:
    value = _parse_json(_decode_text(path.read_bytes(), str(path)), str(path))
    if not isinstance(value, list):
        raise TaskError(f"{path} holds a {type(value).__name__}, not a list of rows: [{{...}}, {{...}}].")
    return [(f"{path}, row {number}", row) for number, row in enumerate(value, 1)]


def _read_csv(path: Path) -> list[tuple[str, Any]]:
    """Read a CSV file whose first line names the columns. All values are text, numbers too."""
    raw = path.read_bytes()
    reader = csv.DictReader(io.StringIO(_decode_text(raw, str(path)), newline=""), strict=True)
    rows: list[tuple[str, Any]] = []
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise TaskError(f"{path}:1 names a column twice: {shorten_repr(', '.join(names))}.")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise TaskError(f"{where} has not the {len(names)} fields that the first line names.")
            rows.append((where, row))
    except csv.Error as fault:
        raise TaskError(f"{path}:{reader.line_num} is no CSV: {fault}.") from None
    return rows


def _read_parquet(path: Path) -> list[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except OSError:
        raise
    except Exception as fault:  # of pyarrow, and of Python's types: a year 20000, a time zone that is not known
        raise TaskError(f"{path} is no Parquet file that can be read: {_say_reason(fault)}") from None
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def read_hub_dataset(source: str, check: RowParser, revision: str | None = None) -> SplitRows:
    """Load `owner/name` or `owner/name:CONFIG`: its train split, and its test split if it has one.

    `revision`: a commit of the data set; the newest where it is None.
    """
    import datasets

    name, _, config = source.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, revision=revision)
    except Exception as fault:  # the Hub client, pyarrow and pandas raise some twenty classes of errors
        reason = " ".join(str(fault).split())[:300]
        raise TaskError(
            f"task.data {source!r} is no file, and could not be loaded as a Hub data set: "
            f"{type(fault).__name__}: {reason}"
        ) from fault
    return _take_splits(found, source, check)


def _take_splits(found: Mapping[str, Iterable[Any]], source: str, check: RowParser) -> SplitRows:
    if "train" not in found:
        raise TaskError(f"The data set {source} has no train split, but {', '.join(found)}. Save it as train.jsonl.")
    train = _parse_hub_split(found["train"], f"{source} train", check)
    if "test" not in found:
        return split_rows(train, source)
    return {"train": train, "test": _parse_hub_split(found["test"], f"{source} test", check)}


def _parse_hub_split(rows: Iterable[Any], where: str, check: RowParser) -> list[DatasetRow]:
    return check([(f"{where}, row {number}", row) for number, row in enumerate(rows, 1)], where)


def _decode_text(raw: bytes, where: str) -> str:
    """Decode UTF-8, with or without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = "" if ":" in where else f":{raw[: fault.start].count(10) + 1}"
        raise TaskError(f"{where}{line} is not UTF-8 text: {fault.reason} at byte {fault.start}.") from None


def _parse_json(line: str, where: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def take(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it names {shorten_repr(next(n for n in row if names.count(n) > 1))} twice")
        return row

    try:
        return json.loads(line, parse_constant=refuse, object_pairs_hook=take)
    except json.JSONDecodeError as fault:
        at = where if fault.lineno == 1 else f"{where}:{fault.lineno}"
        raise TaskError(f"{at} is no JSON: {fault.msg} at character {fault.colno}.") from None
    except ValueError as fault:  # a number of thousands of digits, NaN, or a name that stands twice
        raise TaskError(f"{where} cannot be read: {fault}.") from None
    except RecursionError:
        raise TaskError(f"{where} is nested without end. A row is an object of columns.") from None


def parse_rows(rows: Sequence[tuple[str, Any]], source: str) -> list[DatasetRow]:
    if not rows:
        raise TaskError(f"{source} holds no rows.")
    parsed = [_parse_row(row, where) for where, row in rows]
    plain = [isinstance(row.prompt, str) for row in parsed]
    if any(plain) and not all(plain):
        odd = parsed[plain.index(not plain[0])]
        raise TaskError(
            f"{source} mixes prompts that are text with prompts that are messages: {odd.where} is the first of "
            "another kind. Use one of the two."
        )
    return parsed


def _parse_row(row: Any, where: str) -> DatasetRow:
    if not isinstance(row, Mapping):
        raise TaskError(f"{where} is {shorten_repr(row)}, not a row: an object of columns with a prompt.")
    if odd := [name for name in row if not isinstance(name, str)]:
        raise TaskError(f"{where} has a column named {shorten_repr(odd[0])}. Names are text.")
    asked = "prompt" if "prompt" in row else "messages"
    if asked not in row:
        names = ", ".join(row) or "nothing"
        raise TaskError(f"{where} has no 'prompt', but {shorten_repr(names)}. Name the question's column prompt.")
    columns = {name: value for name, value in row.items() if name != asked}
    prompt = check_prompt(row[asked], where)
    if asked == "messages" and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise TaskError(
            f"{where}: its messages end with the assistant's, which would give the answer away. Leave that message "
            "out; or name the column prompt, and the model continues it."
        )
    return DatasetRow(prompt, columns, where)


def check_prompt(value: Any, where: str) -> str | tuple[Message, ...]:
    """Return a prompt as a model is asked: text, or messages. Raise TaskError, naming its place, for anything else."""
    if isinstance(value, str):
        return check_prompt_text(value, where)
    if not isinstance(value, list | tuple) or not value:
        raise TaskError(f"{where}: its prompt is {shorten_repr(value)}. Give text, or a list of messages.")
    return tuple(_check_message(one, where) for one in value)


def _check_message(message: Any, where: str) -> Message:
    """Return the message with its content as text, and without keys that say nothing.

    Files with many columns fill in None, and an empty list where no tool was called. Calls of tools and keys of others
    (`weight`, `timestamp`) stay as they are, for the chat template to write or to leave: whatever JSON can hold.
    """
    whole = {k: v for k, v in message.items() if v is not None and v != []} if isinstance(message, Mapping) else {}
    if "content" in whole:
        whole["content"] = _join_parts(whole["content"], where)
    elif "tool_calls" in whole or (isinstance(message, Mapping) and message.get("content") == []):
        whole["content"] = ""
    if not all(isinstance(whole.get(name), str) for name in ("role", "content")):
        raise TaskError(f'{where}: {shorten_repr(message)} is no message. Write {{"role": "user", "content": "..."}}.')
    if "tool_calls" in whole:
        _check_calls(whole["tool_calls"], where)
    for name, value in whole.items():
        if (written := _written(value)) is None or not isinstance(name, str):
            told = f"{shorten_repr(name)}: {shorten_repr(value)}"
            raise TaskError(f"{where}: a message has {told}, which JSON cannot hold. Leave it out.")
        _refuse_half_characters(name + written, where)
    if whole["role"] not in ("assistant", "tool"):  # these may say nothing: beside a call, or yet
        check_prompt_text(whole["content"], where)
    return whole


def _check_calls(calls: Any, where: str) -> None:
    """Raise TaskError where a message's calls of tools are none that a chat template could write."""
    if (
        _written(calls) is None
        or not isinstance(calls, list | tuple)
        or not all(isinstance(call, Mapping) for call in calls)
    ):
        raise TaskError(
            f"{where}: its tool_calls are {shorten_repr(calls)}. Give a list of calls that JSON can hold: "
            '[{"type": "function", "function": {"name": "...", "arguments": {}}}].'
        )


def _written(value: Any) -> str | None:
    """Return a value as JSON; None where JSON cannot hold it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None


def _join_parts(content: Any, where: str) -> Any:
    """Return the text of a content given in parts, [{"type": "text", "text": "..."}], as templates write it: without
    anything between them.

    What is no list is returned itself. Raise TaskError for a part that is no text.
    """
    if not isinstance(content, list | tuple):
        return content
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise TaskError(
                f"{where}: its content has a part that is {shorten_repr(kind or part)}. Prompts are text here: "
                '[{"type": "text", "text": "..."}].'
            )
    return "".join(part["text"] for part in content)


def check_prompt_text(value: str, where: str) -> str:
    """Return the text. Raise TaskError where a tokenizer could not read it: it is blank, or has a lone surrogate."""
    if not value.strip():
        raise TaskError(f"{where}: its prompt is empty.")
    _refuse_half_characters(value, where)
    return value


def has_half_character(text: str) -> bool:
    """Tell whether a text holds a lone surrogate: such text has no bytes, and no tokenizer takes it."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _refuse_half_characters(value: str, where: str) -> None:
    if has_half_character(value):
        raise TaskError(f"{where}: its prompt holds half a character (a lone surrogate), which is no text.")


def split_rows(rows: Sequence[DatasetRow], source: str) -> SplitRows:
    """Split rows into train and test by a hash of the prompt: rows with the same prompt stay together."""
    number_of = {key: int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) for key in map(_prompt_key, rows)}
    if len(number_of) < 2:
        raise TaskError(f"{source} asks one question alone. Training needs another one to be tested on.")
    test = {key for key, number in number_of.items() if number % _TEST_ONE_IN == 0}
    if not test:
        test = {min(number_of, key=number_of.__getitem__)}
    elif len(test) == len(number_of):
        test.remove(max(number_of, key=number_of.__getitem__))
    return {
        "train": [row for row in rows if _prompt_key(row) not in test],
        "test": [row for row in rows if _prompt_key(row) in test],
    }


def _prompt_key(row: DatasetRow) -> str:
    return json.dumps(row.prompt, sort_keys=True)


def rows_to_prompts(rows: Sequence[DatasetRow], split: Split, system: str | None) -> list[Prompt]:
    opening: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
    return [
        Prompt(f"{split}-{number}", opening + _row_messages(row), dict(row.columns))
        for number, row in enumerate(rows, 1)
    ]


def _row_messages(row: DatasetRow) -> tuple[Message, ...]:
    return ({"role": "user", "content": row.prompt},) if isinstance(row.prompt, str) else row.prompt
