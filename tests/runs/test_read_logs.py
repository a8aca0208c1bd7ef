"""The logs of a run, read back: whole, cut short, damaged, or not there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from minigrpo.errors import ArtifactError
from minigrpo.runs import logger
from minigrpo.runs.logger import read_groups, read_metrics
from minigrpo.runs.rundir import RunDir


def a_run(folder: Path, *, metrics: bytes | None = None, groups: bytes | None = None) -> RunDir:
    run = RunDir(folder)
    for path, content in ((run.metrics, metrics), (run.groups, groups)):
        if content is not None:
            path.write_bytes(content)
    return run


def a_group(step: int, text: str = "yes") -> dict[str, Any]:
    return {"step": step, "prompt": "p", "completions": [{"text": text}]}


def written(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def steps(rows: Iterable[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows]


@pytest.mark.parametrize("content", [None, b"", b"\n\n"])
def test_a_log_that_is_missing_or_empty_holds_nothing(tmp_path: Path, content: bytes | None) -> None:
    run = a_run(tmp_path, metrics=content, groups=content)
    for strict in (False, True):
        assert not list(read_metrics(run, strict=strict))
        assert not list(read_groups(run, strict=strict))
        assert not list(read_groups(run, newest_first=True, strict=strict))


DAMAGED = {
    "cut short": b'{"step": 3, "completions": [{"te',
    "half a character": b'{"step": 3, "completions": ["\xe2\x82',
    "no object": b"[1]",
    "no step": b'{"reward": 1}',
    "brackets without end": b"[" * 200_000,
    "zeros": b"\0" * 100,
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("last", [True, False])
def test_a_damaged_line_is_passed_over_or_named(tmp_path: Path, damaged: bytes, last: bool) -> None:
    whole = written([a_group(1), a_group(2)])
    content = whole + damaged if last else whole + damaged + b"\n" + written([a_group(4)])
    run = a_run(tmp_path, metrics=content, groups=content)
    there = [1, 2] if last else [1, 2, 4]
    assert steps(read_metrics(run)) == steps(read_groups(run)) == there
    assert steps(read_groups(run, newest_first=True)) == there[::-1]
    for read in (read_metrics(run, strict=True), read_groups(run, strict=True)):
        with pytest.raises(ArtifactError, match=r"\.jsonl is damaged in the line that begins with .*--run runs/NAME"):
            list(read)


def test_what_is_read_strictly_is_what_was_logged_to_the_last_digit(tmp_path: Path) -> None:
    rows = [{"step": step, "reward": 0.1 + step / 3, "kl": None} for step in range(1, 200)]
    assert list(read_metrics(a_run(tmp_path, metrics=written(rows)), strict=True)) == rows


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 16])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_backwards_is_forwards_turned_round_wherever_the_blocks_meet(tmp_path: Path, block: int, end: bytes) -> None:
    whole = [b"one", b"", "zwölf €".encode(), b"x" * 200, b"last"]
    run = a_run(tmp_path, groups=b"\n".join(whole) + end)
    found = list(logger.lines_backwards(run.groups, block))
    assert [line for line in found if line] == [line for line in reversed(whole) if line]


def test_a_very_long_line_is_read_from_the_end_as_it_stands(tmp_path: Path) -> None:
    long = "é" * 3_000_000
    run = a_run(tmp_path, groups=written([a_group(1), a_group(2, long), a_group(3)]))
    found = list(read_groups(run, newest_first=True))
    assert steps(found) == [3, 2, 1]
    assert found[1]["completions"][0]["text"] == long


@pytest.mark.needs("linux")  # not every system keeps a hole without filling it
def test_the_newest_group_is_had_without_reading_the_file(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    with run.groups.open("wb") as stream:
        stream.truncate(1 << 40)  # a hole: to read all of it would take an hour
        stream.seek(0, 2)
        stream.write(b"\n" + written([a_group(7)]))
    assert next(read_groups(run, newest_first=True)) == a_group(7)
