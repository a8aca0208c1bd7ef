"""Steps done again are the log's to the last bit, or the first difference is named: what, where, and by how much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigrpo import replay, replay_steps
from minigrpo.cli import main
from minigrpo.errors import ArtifactError
from minigrpo.pipeline.replay import reach
from minigrpo.pipeline.step_differences import open_logged
from minigrpo.runs.manifest import read_sealed, write_sealed
from minigrpo.runs.rundir import RunDir, digest
from tests.helpers.proved import flip, own_copy, proved_home, replace_once

__all__ = ["own_copy", "proved_home"]


WEIGHTS = "adapter_model.safetensors"


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("step", "start", "saved"), [(1, 0, (0,)), (3, 0, (0, 2)), (5, 4, ()), (6, 4, (6,))])
def test_a_step_done_again_is_the_logs_to_the_last_bit(step: int, start: int, saved: tuple, run: RunDir) -> None:
    before = digest(run.path)
    done = replay(run, step, quiet=True)
    assert done.ok
    assert (done.stretch.start, done.exact, done.saved) == (start, tuple(range(start + 1, step + 1)), saved)
    assert not done.machine
    assert digest(run.path) == before


def test_the_reach_of_each_checkpoint_is_told_with_its_cost(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    found = reach(run)
    assert [(each.start, each.until) for each in found] == [(0, 4), (4, 6)]
    assert all(each.seconds for each in found)
    with pytest.raises(SystemExit) as ended:
        main.main(["replay", "run"])
    assert ended.value.code == 0
    assert "steps 1 to 4" in capsys.readouterr().out


def test_many_drawn_steps_are_done_again_with_one_model(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["replay", "run", "--steps", "3", "--seed", "5", "--json"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert (told["ok"], told["seed"], told["drawn"]) == (True, 5, [3, 5, 6])
    assert told["exact"] == [1, 2, 3, 5, 6]  # those on the way are compared, too; 4 is not on it
    assert [(part["stretch"]["start"], part["saved"]) for part in told["parts"]] == [(0, [0, 2]), (4, [6])]
    assert printed.err.count("\nmodel ") == 1
    assert "replay: doing 5 steps again, which took" in printed.err


def test_each_drawn_step_that_is_not_exact_is_named(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run.groups.read_text().splitlines(keepends=True)
    for place, line in enumerate(lines):
        row = json.loads(line)
        if row["step"] in (2, 5):
            row["completions"][0]["advantage"] += 1
            lines[place] = json.dumps(row) + "\n"
    run.groups.write_text("".join(lines))
    done = replay_steps(run, 99, seed=1, quiet=True)
    assert (done.drawn, done.exact, done.inexact) == ((1, 2, 3, 4, 5, 6), (1, 3, 4, 6), (2, 5))
    assert [(each.kind, each.step) for each in done.differences] == [("log", 1), ("advantage", 2), ("advantage", 5)]
    with pytest.raises(SystemExit) as ended:
        main.main(["replay", "run", "--steps", "99"])
    assert ended.value.code == 1
    assert "steps 2, 5" in " ".join(capsys.readouterr().out.split())


def test_a_log_whose_lines_moved_is_read_from_the_right_step(run: RunDir) -> None:
    for path in (run.metrics, run.groups):  # lines of equal length, of which one of step 1 is taken out
        path.write_text("".join(f'{{"step": {step}, "n": {n}}}\n' for step in (1, 2, 3) for n in (1, 2)))
    line = len('{"step": 1, "n": 1}\n')
    positions = {path.name: {"bytes": 4 * line} for path in (run.metrics, run.groups)}
    run.groups.write_text("".join(run.groups.read_text().splitlines(keepends=True)[1:]))
    with open_logged(run, 2, positions) as logged:
        assert [row["n"] for row in logged.take(3).groups] == [1, 2]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "2", "--step", "3"], "give one of them"),
        (["--group", "2", "--steps", "2"], "--step N"),
        (["--seed", "1"], "--steps N"),
    ],
)
def test_options_that_do_not_go_together_are_a_sentence(
    words: list[str], told: str, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["replay", "run", *words])
    assert ended.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_reward_file_edited_by_one_character_is_named_by_prompt_and_sibling(run: RunDir) -> None:
    replace_once(Path("mine.py"), "% 2 == 0", "% 2 == 1")
    done = replay(run, 5, quiet=True)
    first = done.differences[0]
    row = next(row for row in rows(run.groups) if row["step"] == 5)
    assert (first.kind, first.step, first.prompt, first.sibling) == ("reward", 5, row["prompt"], 1)
    assert first.logged == row["completions"][0]["reward"] == pytest.approx(1 - first.replayed)
    assert "Edited since the run began: mine.py" in first.what


def test_a_reward_that_is_not_deterministic_is_told_from_one_that_was_edited(run: RunDir) -> None:
    replace_once(Path("mine.py"), "    share = ", "    import random\n    share = random.random() * ")
    first = replay(run, 5, quiet=True).differences[0]
    assert first.kind == "reward"
    assert "not deterministic: asked 4 times" in first.what


def test_a_reward_changed_in_the_log_is_told_from_one_that_was_edited(run: RunDir) -> None:
    victim = [row for row in rows(run.groups) if row["step"] == 5][1]
    reward = victim["completions"][2]["reward"]
    lines = run.groups.read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if json.loads(line) == victim)
    victim["completions"][2]["reward"] = reward + 1
    lines[place] = json.dumps(victim) + "\n"
    run.groups.write_text("".join(lines))
    done = replay(run, 6, quiet=True)
    first, *_, last = done.differences
    assert (first.kind, first.prompt, first.sibling, first.logged) == ("reward", victim["prompt"], 3, reward + 1)
    assert "own files are as they were" in first.what
    assert done.exact == (6,)
    assert (last.kind, "groups.jsonl was changed in the lines of steps 5 to 6" in last.what) == ("log", True)


@pytest.mark.parametrize(
    "file", ["optimizer.pt", *(pytest.param(name, marks=pytest.mark.long) for name in (WEIGHTS, "trainer.json"))]
)
def test_a_bit_flipped_in_a_checkpoint_is_named_and_an_earlier_start_is_taken(file: str, run: RunDir) -> None:
    flip(run.checkpoint(4) / file)
    done = replay(run, 5, quiet=True)
    assert done.stretch.start == 0
    assert done.exact == (1, 2, 3, 4, 5)
    assert {(each.kind, each.step) for each in done.differences} == {("checkpoint", 4)}
    assert f"000004/{file} is damaged" in done.differences[0].what


def test_weights_that_a_step_does_not_end_with_are_named_with_their_distance(run: RunDir) -> None:
    folder = run.checkpoint(6)
    flip(folder / WEIGHTS, -2)
    kinds = {each.kind: each.what for each in replay(run, 6, quiet=True).differences}
    assert kinds.keys() == {"checkpoint"}
    assert "000006/adapter_model.safetensors is damaged" in kinds["checkpoint"]
    run.chain.unlink()  # then the seal of the folder is all that is known of it
    made = read_sealed(folder / "made.json")
    sums = made["sha256"] | {WEIGHTS: digest(folder / WEIGHTS)}
    write_sealed(folder / "made.json", {**made, "sha256": sums})
    found = replay(run, 6, quiet=True).differences
    assert [each.kind for each in found] == ["weights"]
    assert "1 of" in found[0].what


def test_another_number_of_threads_is_named(run: RunDir) -> None:
    done = replay(run, 5, threads=2, quiet=True)
    assert done.machine == ("threads was 1, is 2",)


def test_a_log_of_before_token_ids_were_hashed_is_compared_as_texts(run: RunDir) -> None:
    older = [{name: value for name, value in row.items() if name != "ids"} for row in rows(run.groups)]
    run.groups.write_text("".join(json.dumps(row) + "\n" for row in older))
    run.chain.unlink()
    for step in (4, 6):  # whose positions are of longer lines
        folder = run.checkpoint(step)
        folder.rename(folder.with_name(f"{step:06d}.aside"))
    done = replay(run, 2, quiet=True)
    assert (done.ok, done.without_ids, done.exact) == (True, True, (1, 2))


@pytest.mark.parametrize(
    "name", ["ids", *(pytest.param(name, marks=pytest.mark.long) for name in ("tokens", "advantage"))]
)
def test_every_value_of_a_group_counts(name: str, run: RunDir) -> None:
    lines = run.groups.read_text().splitlines(keepends=True)
    row = json.loads(lines[-1])
    holder = row if name == "ids" else row["completions"][1]
    holder[name] = "0" * 64 if name == "ids" else holder[name] + 1
    run.groups.write_text("".join([*lines[:-1], json.dumps(row) + "\n"]))
    first = replay(run, 6, quiet=True).differences[0]
    assert first.kind == {"tokens": "draw", "ids": "draw", "advantage": "advantage"}[name]
    assert (first.step, first.prompt) == (6, row["prompt"])


def test_a_figure_changed_in_the_log_is_named_with_its_distance_and_the_clocks_are_not_compared(run: RunDir) -> None:
    lines = run.metrics.read_text().splitlines(keepends=True)
    row = json.loads(lines[4])
    changed = {**row, "seconds": 99.0, "memory_gb/update": 1e3, "grad_norm": 2 * row["grad_norm"]}
    run.metrics.write_text("".join([*lines[:4], json.dumps(changed) + "\n", *lines[5:]]))
    first = replay(run, 5, quiet=True).differences[0]
    assert (first.kind, first.logged) == ("metric", changed["grad_norm"])
    assert "grad_norm" in first.what
    assert "by 5.0e-01 of it" in first.what
    assert "seconds" not in first.what


def test_a_group_is_shown_as_logged_and_now(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["replay", "run", "--step", "5", "--group", "2", "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    assert told["group"]["logged"] == told["group"]["replayed"]
    assert told["group"]["replayed"]["step"] == 5


@pytest.mark.parametrize(("step", "group"), [(7, None), (5, 3)])
def test_a_step_or_group_that_is_not_there_is_a_sentence(step: int, group: int | None, run: RunDir) -> None:
    with pytest.raises(ArtifactError, match="there is no"):
        replay(run, step, group=group, quiet=True)
