"""What a run writes down, and what a person sees of it."""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from minigrpo.errors import ArtifactError
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.types import Completion, Grade, Group, Prompt
from minigrpo.ui.live import PlainLog, Snapshot, duration, reward_curve, sparkline
from minigrpo.ui.plain_text import printable
from minigrpo.ui.progress import stage


def a_group(text: str = "<answer>7</answer>", solved: bool = True) -> Group:
    prompt = Prompt("sum-1", ({"role": "user", "content": "3 + 4?"},), target=7)
    completions = (Completion(text, (5, 6, 7), (), "stop"), Completion("...", (5,), (), "length"))
    grades = (
        Grade(float(solved), {"correct": float(solved)}, True, solved),
        Grade(0.0, {"correct": 0.0}, False, False),
    )
    return Group(prompt, (1, 2), completions, grades)


def watched(terminal: bool = False, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, _environ={"TERM": "xterm"})


def seen(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def a_track(folder: Path, total: int = 3, **options: Any) -> RunLogger:
    return RunLogger(RunDir(folder), total, console=options.pop("console", watched()), **options)


def record(track: RunLogger, *steps: int, **metrics: float) -> None:
    for step in steps:
        track.record(step, {"reward": step / 10, **metrics}, [a_group()], [[1.0, -1.0]])


def lengths(track: RunLogger) -> dict[str, int]:
    return {name: position["bytes"] for name, position in track.positions().items()}


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_and_every_completion_is_written_down(tmp_path: Path) -> None:
    track = a_track(tmp_path)
    with track:
        record(track, 1, 2, kl=0.5)
    assert lines(track.run.metrics)[1] == {"step": 2, "reward": 0.2, "kl": 0.5}
    row = lines(track.run.groups)[0]
    assert (row["step"], row["prompt"], row["target"]) == (1, "sum-1", 7)
    assert row["messages"] == [{"role": "user", "content": "3 + 4?"}]
    assert row["completions"][0] == {
        "text": "<answer>7</answer>",
        "tokens": 3,
        "finish": "stop",
        "reward": 1.0,
        "parts": {"correct": 1.0},
        "formed": True,
        "solved": True,
        "advantage": 1.0,
    }
    assert row["completions"][1]["finish"] == "length"


def test_a_step_is_in_the_files_before_the_run_ends(tmp_path: Path) -> None:
    track = a_track(tmp_path)
    with track:
        record(track, 1)
        assert len(lines(track.run.metrics)) == len(lines(track.run.groups)) == 1


def test_what_is_no_number_is_null_and_arrays_are_their_numbers(tmp_path: Path) -> None:
    track = a_track(tmp_path)
    odd: Any = {"a": math.nan, "b": -math.inf, "c": np.float32(0.5), "d": np.array(2), "e": np.float64("nan")}
    track.record(1, odd, [], [])
    assert lines(track.run.metrics) == [{"step": 1, "a": None, "b": None, "c": 0.5, "d": 2, "e": None}]


def test_any_text_of_a_model_stays_on_one_line_of_valid_json(tmp_path: Path) -> None:
    text = "a\nb\u2028c\x85d\x00\ud800é"
    track = a_track(tmp_path)
    track.record(1, {}, [a_group(text)], [[0.0, 0.0]])
    assert lines(track.run.groups)[0]["completions"][0]["text"] == text


def test_a_resumed_run_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    track = a_track(tmp_path)
    record(track, 1, 2)
    positions = track.positions()
    record(track, 3)
    track.run.groups.write_bytes(track.run.groups.read_bytes()[:-7])  # killed while writing

    resumed = a_track(tmp_path)
    resumed.rewind(positions)
    assert resumed.positions() == positions
    record(resumed, 3)
    assert [row["step"] for row in lines(track.run.metrics)] == [1, 2, 3]
    assert [row["step"] for row in lines(track.run.groups)] == [1, 2, 3]


def test_a_run_that_died_before_its_first_checkpoint_begins_with_empty_files(tmp_path: Path) -> None:
    track = a_track(tmp_path)
    record(track, 1)
    track.rewind({})
    assert lengths(track) == {"metrics.jsonl": 0, "groups.jsonl": 0}


def test_nothing_to_rewind_is_no_fault(tmp_path: Path) -> None:
    track = a_track(tmp_path / "new")
    track.rewind({})
    assert lengths(track) == {"metrics.jsonl": 0, "groups.jsonl": 0}


def test_a_flip_behind_what_a_checkpoint_stored_does_no_harm(tmp_path: Path) -> None:
    track = a_track(tmp_path)
    record(track, 1)
    positions = track.positions()
    record(track, 2)
    content = bytearray(track.run.metrics.read_bytes())
    content[-5] ^= 1
    track.run.metrics.write_bytes(content)
    resumed = a_track(tmp_path)
    resumed.rewind(positions)
    assert resumed.positions() == positions


def test_the_hash_of_a_log_that_grows_is_that_of_the_whole_log(tmp_path: Path) -> None:
    track = a_track(tmp_path)
    for step in range(1, 4):
        record(track, step)
        for name, position in track.positions().items():
            assert position["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("harm", ["missing", "shorter", "longer", "flipped"])
def test_files_that_do_not_fit_the_checkpoint_are_refused_and_left_alone(tmp_path: Path, harm: str) -> None:
    track = a_track(tmp_path)
    record(track, 1, 2)
    positions = track.positions()
    record(track, 3)
    if harm == "missing":
        track.run.groups.unlink()
    elif harm == "shorter":
        track.run.groups.write_bytes(b"{}\n")
    elif harm == "longer":
        track.run.groups.write_bytes(b" " + track.run.groups.read_bytes())
    else:
        content = bytearray(track.run.groups.read_bytes())
        content[positions["groups.jsonl"]["bytes"] // 2] ^= 1
        track.run.groups.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"groups\.jsonl"):
        track.rewind(positions)
    assert len(lines(track.run.metrics)) == 3


def test_in_a_log_the_first_and_the_last_step_are_told_and_few_between(tmp_path: Path) -> None:
    console = watched()
    track = a_track(tmp_path, total=50, console=console)
    with track:
        record(track, *range(1, 51), tokens_per_second=1234.5)
    told = seen(console).splitlines()
    assert len(told) == 2
    assert told[0].startswith("step  1/50  reward 0.100  solved 50%  formed 50%  informative 1/1  length 2")
    assert "1,234 tokens/s" in told[0]
    assert told[0].endswith("left")
    assert told[1].startswith("step 50/50")


def test_in_a_log_a_slow_run_tells_every_step(tmp_path: Path) -> None:
    console = watched()
    view = PlainLog(console, 4, every=0.0)
    snapshot = Snapshot()
    for step in range(1, 5):
        snapshot = snapshot.after(step, {"reward": 0.5}, [a_group()], None)
        view.show(snapshot)
    assert len(seen(console).splitlines()) == 4


@pytest.mark.parametrize("own", [True, False], ids=["the run's own process", "one that watches"])
def test_a_step_says_what_share_was_cut_off_where_any_was(own: bool) -> None:
    def facts(*ends: Any) -> list[str]:
        group = a_group()
        said = tuple(replace(one, finish=end) for one, end in zip(group.completions, ends, strict=True))
        share = ends.count("length") / len(ends)
        groups = [replace(group, completions=said)] if own else []
        return Snapshot().after(1, {"completions/clipped_ratio": share}, groups, None).facts()

    size = len(a_group().completions)
    assert f"cut off {1 / size:.0%}" in facts("length", *["stop"] * (size - 1))
    assert not any("cut off" in fact for fact in facts(*["stop"] * size))


def test_a_terminal_shows_the_curve_and_a_sample_without_its_control_characters(tmp_path: Path) -> None:
    console = watched(terminal=True)
    track = a_track(tmp_path, console=console, show_samples=True)
    with track:
        track.record(1, {"reward": 0.25}, [a_group("seven \x1b[2J[bold]7[/]")], [[0.0, 0.0]])
        track.record(2, {"reward": 0.75}, [a_group("seven \x1b[2J[bold]7[/]")], [[0.0, 0.0]])
    shown = seen(console)
    assert "step 2/3" in shown
    assert "█" in shown
    assert "reward 0.750" in shown
    assert "seven  [2J[bold]7[/]" in shown
    assert "\x1b[2J" not in shown


def test_the_curve_of_a_resumed_run_begins_where_the_run_began(tmp_path: Path) -> None:
    record(a_track(tmp_path), 1, 2)
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "rew')
    resumed = a_track(tmp_path)
    with resumed:
        assert resumed._snapshot.rewards == (0.1, 0.2)


def test_a_sparkline_goes_from_the_lowest_column_to_the_highest() -> None:
    assert sparkline([float(i) for i in range(8)], 50) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2) == "▁█"
    assert sparkline([1.0, 1.0], 50) == "▁▁"


def test_remarks_are_shown_as_they_are(tmp_path: Path) -> None:
    console = watched()
    a_track(tmp_path, console=console).say("Resumed [after] step 3.")
    assert seen(console) == "Resumed [after] step 3.\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stage_tells_its_name_and_its_end(terminal: bool) -> None:
    console = watched(terminal)
    with stage("warm start", 2, console) as report:
        report(1, 2, "loss 3.0")
        report(2)
    assert "warm start: done in 0s" in seen(console)


def test_a_stage_that_fails_is_not_said_to_be_done() -> None:
    console = watched()
    with pytest.raises(ZeroDivisionError), stage("warm start", 2, console):
        raise ZeroDivisionError
    assert "done" not in seen(console)


def test_the_remaining_time_follows_the_latest_steps() -> None:
    snapshot = Snapshot(step=5, stamps=(100.0, 102.0, 104.0))
    assert snapshot.time_left(35) == "1m00s left"
    assert snapshot.time_left(5) == ""


@pytest.mark.parametrize("count", [1, 2, 7, 40, 1000])
def test_the_plot_fits_its_width_and_reaches_its_height(count: int) -> None:
    drawn = reward_curve([i / count for i in range(count)], 40).plain.splitlines()
    assert max(map(len, drawn)) <= 40 + 8
    assert len(drawn) == 6
    assert count == 1 or "█" in drawn[0]


def test_a_plot_without_a_number_says_so() -> None:
    assert reward_curve([math.nan], 40).plain == "no reward yet"


def test_durations_and_texts_are_for_readers() -> None:
    assert [duration(s) for s in (8.4, 80, 7500)] == ["8s", "1m20s", "2h05m"]
    assert printable("a\x1bb\tc\nd") == "a b c\nd"
