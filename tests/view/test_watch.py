"""Whoever watches a run from another terminal sees its steps and alarms, and how it came to rest."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from minigrpo.errors import ArtifactError
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.view.library import OpenRun
from minigrpo.view.watch import EXIT_CODES, Outcome, status_of, watch_run
from tests.helpers.logged_runs import append, figures, log_step, logged_run


def hold(folder: Path, pid: int, command: str = "minigrpo train my.yaml") -> None:
    """Leave the text of a lock that the process of this number holds."""
    facts = {"host": socket.gethostname(), "pid": pid, "since": "2026-01-01", "command": command}
    (folder / ".lock").write_text(json.dumps(facts))


def note(folder: Path, event: str, step: int, text: str = "") -> None:
    append(folder / "events.jsonl", [{"time": "2026-01-01T00:00:00", "event": event, "step": step, "text": text}])


def screen(terminal: bool = False) -> Console:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    return Console(file=stream, force_terminal=terminal, width=90, _environ={"TERM": "xterm"})


def seen(console: Console) -> str:
    stream = console.file
    assert isinstance(stream, io.TextIOWrapper)
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode()


@pytest.fixture
def gone() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def follow(folder: Path, console: Console, line_every: float = 0.3, wait: bool = False) -> Callable[[], Outcome]:
    """Watch in a thread; the function that comes back waits for the end and returns the outcome."""
    found: list[Outcome] = []

    def work() -> None:
        found.append(watch_run(RunDir(folder), console, look=0.01, line_every=line_every, wait=wait))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def outcome() -> Outcome:
        thread.join(timeout=20)
        assert found, seen(console)
        return found[0]

    return outcome


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_is_followed_to_its_end(tmp_path: Path) -> None:
    run = logged_run(tmp_path / "first", steps=2)
    hold(run, os.getpid())
    note(run, "began", 0)
    console = screen()
    outcome = follow(run, console)
    until(lambda: "step 2/40" in seen(console))
    log_step(run, 3)
    until(lambda: "step 3/40" in seen(console))
    note(run, "ended", 3)
    (run / ".lock").unlink()
    assert outcome() == "ended"
    told = seen(console)
    assert "reward 0.450" in told
    assert "informative 100%" in told
    assert "length 3" in told
    assert "1m14s left" in told  # 37 steps of 2 seconds
    assert told.endswith("first ended after step 3 of 40\n")


def test_lines_come_no_oftener_than_they_may(tmp_path: Path) -> None:
    run = logged_run(tmp_path / "first", steps=1)
    hold(run, os.getpid())
    note(run, "began", 0)
    console = screen()
    outcome = follow(run, console, line_every=1000)
    until(lambda: "step 1/40" in seen(console))
    for step in range(2, 8):
        log_step(run, step)
        time.sleep(0.03)
    assert seen(console).count("\n") == 1
    note(run, "stopped", 7)
    (run / ".lock").unlink()
    assert outcome() == "waits"
    lines = seen(console).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("step 7/40")
    assert re.search("waits after step 7 of 40: .* --resume", lines[2])


@pytest.mark.parametrize(
    ("events", "locked", "outcome"),
    [
        (["began"], True, "killed"),
        (["began"], False, "killed"),
        (["began", "resumed", "ended"], True, "killed"),  # in a stage after training
        (["began", "failed"], False, "failed"),
        (["began", "stopped"], False, "waits"),
        (["began", "ended"], False, "ended"),
        ([], False, "waits"),
    ],
)
def test_how_a_run_came_to_rest_is_told(
    tmp_path: Path, gone: int, events: list[str], locked: bool, outcome: Outcome
) -> None:
    run = logged_run(tmp_path / "first", steps=3)
    for event in events:
        note(run, event, 3, "the disk is full" if event == "failed" else "")
    if locked:
        hold(run, gone)
    console = screen()
    assert watch_run(RunDir(run), console) == outcome
    assert outcome in seen(console)
    if outcome == "failed":
        assert "the disk is full" in seen(console)


def test_a_run_of_before_events_that_did_its_last_step_has_ended(tmp_path: Path) -> None:
    run = logged_run(tmp_path / "first", steps=5, knobs="train: {steps: 5}\n")
    assert status_of(OpenRun("first", run)).outcome == "ended"


@pytest.mark.parametrize(
    ("command", "events", "done", "phase"),
    [
        ("minigrpo run my.yaml", [], [], "before the first step: opening the model, preflight"),
        ("minigrpo run my.yaml", [], ["preflight"], "before the first step: after preflight"),
        ("minigrpo run my.yaml", ["began"], [], "training"),
        ("minigrpo run my.yaml", ["began", "ended"], ["train"], "evaluate"),
        ("minigrpo run my.yaml", ["began", "ended"], ["train", "evaluate", "check"], "merge"),
        ("minigrpo export runs/my", ["began", "ended"], ["train"], "export"),
    ],
)
def test_what_a_process_is_at_is_told(
    tmp_path: Path, command: str, events: list[str], done: list[str], phase: str
) -> None:
    run = logged_run(tmp_path / "first", steps=1)
    hold(run, os.getpid(), command)
    for event in events:
        note(run, event, 1)
    (run / "seconds.json").write_text(json.dumps(dict.fromkeys(done, 1.0)))
    assert status_of(OpenRun("first", run)).phase == phase


def test_alarms_are_told_once(tmp_path: Path) -> None:
    run = logged_run(tmp_path / "first", steps=1)
    hold(run, os.getpid())
    note(run, "began", 0)
    console = screen()
    outcome = follow(run, console, line_every=0.01)
    until(lambda: "step 1/40" in seen(console))
    append(run / "metrics.jsonl", [{**figures(step, 0.5), "completions/clipped_ratio": 0.9} for step in range(2, 12)])
    until(lambda: "max_tokens" in seen(console))
    note(run, "ended", 11)
    (run / ".lock").unlink()
    outcome()
    assert len(re.findall(r"step \d+: .*max_tokens", seen(console))) == 1


def test_with_wait_a_run_is_watched_before_it_begins(tmp_path: Path) -> None:
    console = screen()
    outcome = follow(tmp_path / "later", console, wait=True)
    until(lambda: "waits before its first step" in seen(console))
    run = logged_run(tmp_path / "later", steps=1)
    note(run, "began", 0)
    note(run, "ended", 1)
    assert outcome() == "ended"


def test_a_panel_shows_curve_and_group(tmp_path: Path) -> None:
    run = logged_run(tmp_path / "first", steps=4)
    note(run, "began", 0)
    note(run, "ended", 4)
    console = screen(terminal=True)
    assert watch_run(RunDir(run), console) == "ended"
    told = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", seen(console))
    assert "step 4/40" in told
    assert "1.20 (correct 1 format 1)" in told
    assert "█" in told


def test_the_panel_of_a_training_shows_a_group_with_the_reasons_of_its_rewards(tmp_path: Path) -> None:
    from tests.runs.test_run_logger import a_group

    console = screen(terminal=True)
    with RunLogger(RunDir(tmp_path), 9, console=console) as logger:
        logger.record(1, {"reward": 0.5}, [a_group()], [[1.0, -1.0]])
    told = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", seen(console))
    assert "step 1, sum-1: 3 + 4?" in told
    assert "1.00 (correct 1) +1.00  <answer>7</answer>" in told
    assert "0.00 (correct 0) -1.00 cut off  ..." in told


def test_nothing_of_a_run_is_written(tmp_path: Path) -> None:
    run = logged_run(tmp_path / "first", steps=3)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    watch_run(RunDir(run), screen())
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no run"):
        watch_run(RunDir(tmp_path), screen())


@pytest.mark.long
def test_the_command_follows_a_training_and_sees_it_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minigrpo"]
    train = [*command, "train", "quickstart", "--run", "my", "--save.every", "5"]
    training = subprocess.Popen(train, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    watching = subprocess.Popen(
        [*command, "watch", "my", "--wait"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "my/metrics.jsonl"
    until_minutes = time.monotonic() + 200
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 6:
        assert time.monotonic() < until_minutes
        time.sleep(0.1)
    training.kill()
    training.wait()
    told, _ = watching.communicate(timeout=30)
    assert watching.returncode == EXIT_CODES["killed"]
    assert re.search(r"my was killed after step \d+ of 100: its process is gone", told)
