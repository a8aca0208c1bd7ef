"""The index finds any group of a file that grows, is cut back, or is damaged, and holds none of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigrpo.view.group_index import CUT, FORMED, RIGHT, GroupIndex
from minigrpo.view.search import Wanted, search_completions
from tests.helpers.logged_runs import HOSTILE, append, completion, group, hostile_run, log_step, logged_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return logged_run(tmp_path / "run", steps=6)


def opened(folder: Path) -> GroupIndex:
    return GroupIndex(folder / "groups.jsonl").refresh()


def test_groups_are_found_by_step_and_by_prompt(folder: Path) -> None:
    index = opened(folder)
    assert len(index) == 12
    assert index.steps == [1, 2, 3, 4, 5, 6]
    assert [index.group(line)["prompt"] for line in index.lines_of_step(2)] == ["a2", "z2"]  # type: ignore[index]
    assert [index.step_of(line) for line in index.lines_of_prompt("a1")] == [1, 4]
    assert index.lines_of_steps(2, 3) == [2, 3, 4, 5]
    assert index.lines_of_step(7) == ()
    assert index.lines_of_prompt("nobody") == ()


def test_only_whole_lines_are_taken_and_the_rest_when_it_is_there(folder: Path) -> None:
    index = opened(folder)
    line = json.dumps(group(7, "a1", [completion("new", 1.2)]))
    with (folder / "groups.jsonl").open("a") as stream:
        stream.write(line[:30])
        stream.flush()
        assert len(index.refresh()) == 12
        stream.write(line[30:] + "\n")
    assert len(index.refresh()) == 13
    assert index.facts(12).rewards.tolist() == [1.2]  # type: ignore[union-attr]
    assert index.generation == opened(folder).generation


@pytest.mark.parametrize("grown", [False, True])
def test_a_file_that_a_resumed_run_cut_back_is_read_anew(folder: Path, grown: bool) -> None:
    index = opened(folder)
    path = folder / "groups.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    for step in range(3, 10 if grown else 4):
        append(path, [group(step, "other", [completion("elsewhere" * 9, 0.3)])])
    assert path.stat().st_size > 0
    index.refresh()
    assert [index.group(line)["prompt"] for line in index.lines_of_step(3)] == ["other"]  # type: ignore[index]
    assert index.generation == 2
    path.write_bytes(b"")
    assert len(index.refresh()) == 0


def test_facts_hold_what_the_log_says_of_each_completion(tmp_path: Path) -> None:
    rows = [
        completion("right", 1.2),
        completion("cut", 0.0, finish="length", formed=False),
        completion("unknown", None, parts={"correct": None}),
    ]
    append(tmp_path / "groups.jsonl", [group(3, "a", rows)])
    facts = opened(tmp_path).facts(0)
    assert facts is not None
    assert facts.flags == bytes([FORMED | RIGHT, CUT, FORMED])
    assert facts.rewards[2] != facts.rewards[2]
    assert facts.parts["format"].tolist()[:2] == [1.0, 1.0]
    assert facts.labels == {"kind": "sum"}


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    index = opened(hostile_run(tmp_path / "run"))
    assert [line for line, _ in index.all_facts(range(len(index)))] == [0]
    assert index.group(1) is None
    assert index.group(99) is None
    texts = [each["text"] for each in index.group(0)["completions"]]  # type: ignore[index]
    assert tuple(texts) == HOSTILE


def test_near_duplicates_have_the_same_number(tmp_path: Path) -> None:
    rows = [completion(text, 0.0) for text in ("It is 4.", "it is  4", "It is 5.", "你好", "你们")]
    append(tmp_path / "groups.jsonl", [group(1, "a", rows)])
    words = opened(tmp_path).facts(0).words  # type: ignore[union-attr]
    assert words[0] == words[1]
    assert len(set(words)) == 4


def found(index: GroupIndex, text: str, *kinds: str) -> list[tuple[int, int]]:
    hits, following = search_completions(index, Wanted(text, frozenset(kinds)), 0, seconds=10, most=100)
    assert following is None
    return [(hit["step"], hit["sibling"]) for hit in hits]


def test_a_search_finds_words_in_any_case_and_what_became_of_them(tmp_path: Path) -> None:
    rows = [
        completion('He said "Ünder 4"', 1.2),
        completion("under 4\n5", 0.2),
        completion("cheater", -20.0, notes={"cheats": "an import"}, finish="length"),
    ]
    append(tmp_path / "groups.jsonl", [group(1, "a", rows), group(2, "b", [completion("tied", 1.2)] * 2)])
    index = opened(tmp_path)
    assert found(index, "ÜNDER") == [(1, 0)]
    assert found(index, "UNDER") == [(1, 1)]
    assert found(index, '"ünder 4"') == [(1, 0)]
    assert found(index, "4\n5") == [(1, 1)]
    assert found(index, "", "cheats", "cut") == [(1, 2)]
    assert found(index, "", "tied", "right") == [(2, 0), (2, 1)]
    assert found(index, "", "wrong") == [(1, 1), (1, 2)]


def test_a_long_search_says_where_it_goes_on(tmp_path: Path) -> None:
    index = opened(logged_run(tmp_path / "run", steps=5))
    seen, line = [], 0
    while line is not None:
        hits, line = search_completions(index, Wanted("", frozenset()), line, seconds=0, most=100)  # type: ignore[assignment]
        seen += hits
    assert len(seen) == 40


def test_the_log_of_a_real_training_is_indexed(tmp_path: Path) -> None:
    """What the logger writes begins as the index expects: no line is parsed to be found."""
    from minigrpo.runs.logger import RunLogger
    from minigrpo.runs.rundir import RunDir
    from minigrpo.types import Completion, Grade, Group, Prompt
    from minigrpo.view.group_index import HEAD

    prompt = Prompt('q"1', ({"role": "user", "content": "?"},), target="x")
    sampled = Group(prompt, (1,), (Completion("a", (1,), (0.0,), "stop"),), (Grade(1.0, {"one": 1.0}),))
    with RunLogger(RunDir(tmp_path), 1) as logger:
        logger.record(1, {"reward": 1.0}, [sampled], [[0.0]])
    assert HEAD.match((tmp_path / "groups.jsonl").read_bytes())
    assert opened(tmp_path).prompts == ['q"1']


def test_steps_are_found_while_they_are_logged(folder: Path) -> None:
    index = opened(folder)
    log_step(folder, 7)
    assert index.refresh().steps[-1] == 7
