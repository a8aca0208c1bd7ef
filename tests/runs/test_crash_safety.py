"""Killed at any moment, asked to stop, or out of room: what a run had is still there, whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minigrpo.errors import ArtifactError
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir, complete_folder, read_json, tidy, write_json
from minigrpo.training import checkpoint
from minigrpo.utils.signals import finish_first
from tests.helpers.killing import ACTS, killing
from tests.helpers.saving import Small, newest, restored, save, saved

# What each act may leave as the newest checkpoint.
STEPS = {
    "a save": {2, 3},
    "a save over another": {2},
    "pruning": {2},
    "setting aside": {1, 2},
    "a rewritten file": {2},
}


@pytest.fixture(scope="module")
def kill() -> Iterator[Callable[[str, RunDir, int], bool]]:
    with killing() as kill:
        yield kill


@pytest.mark.parametrize("every", [41, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("act", STEPS)
def test_killed_at_any_moment_the_next_start_finds_the_old_or_the_new_whole(
    act: str, every: int, tmp_path: Path, kill: Callable[[str, RunDir, int], bool]
) -> None:
    start = saved(tmp_path / "start", 1, 2)
    moment, done = 1 - every, False
    while not done:
        moment += every
        run = RunDir(tmp_path / str(moment))
        shutil.copytree(start.path, run.path)
        done = kill(act, run, moment)
        tidy(run)
        check_whole(run, STEPS[act])
        ACTS[act](run)
        check_whole(run, STEPS[act])
        shutil.rmtree(run.path)
    assert moment > every


def check_whole(run: RunDir, steps: set[int]) -> None:
    assert restored(newest(run)) in steps
    assert checkpoint.read_machine(run) is not None
    assert not [path for path in run.path.rglob(".*") if path.name != ".lock"]


def test_killed_while_tidying_up_the_next_start_tidies_up(
    tmp_path: Path, kill: Callable[[str, RunDir, int], bool]
) -> None:
    start = saved(tmp_path / "start", 1)
    # As a kill between the two renames of a replacement leaves it, with a draft and half a deletion beside it.
    (start.checkpoints / ".000001.a.retired").mkdir()
    start.checkpoint(1).rename(start.checkpoints / ".000001.a.retired" / "000001")
    shutil.copytree(start.checkpoints / ".000001.a.retired" / "000001", start.checkpoints / ".000001.b.draft")
    shutil.copytree(start.checkpoints / ".000001.b.draft", start.checkpoints / ".000000.removed")
    (start.path / ".machine.json.999999999.draft").write_text("{")
    moment, done = 0, False
    while not done:
        moment += 3
        run = RunDir(tmp_path / str(moment))
        shutil.copytree(start.path, run.path)
        done = kill("tidying up", run, moment)
        tidy(run)
        check_whole(run, {1})


def test_the_draft_of_a_living_process_is_left_to_it(tmp_path: Path) -> None:
    run = saved(tmp_path, 1)
    draft = run.path / f".comparison.json.{os.getppid()}.draft"
    draft.write_text("{")
    tidy(run)
    assert draft.exists()


def test_a_replacement_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path, 1, 2)
    rename = Path.rename

    def once(path: Path, target: Path) -> Path:
        if path.suffix == ".draft":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(ArtifactError, match="No space left"):
        ACTS["a save over another"](run)
    check_whole(run, {2})


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes of each file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


ROOM = r"could not be written: File too large. The run is {}. .* has [\d,]+ MiB left: make room, then go on: .*--resume"


@pytest.mark.parametrize("size", [0, 40, 700, 2000])
def test_a_full_disk_in_a_save_is_a_sentence_and_the_checkpoint_before_stays(size: int, tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2)
    with no_file_beyond(size), pytest.raises(ArtifactError, match=ROOM.format("intact up to checkpoint 2")):
        save(run, Small(), 3)
    check_whole(run, {2})


def test_a_full_disk_in_the_log_is_a_sentence_and_the_half_line_is_cut_when_the_run_goes_on(tmp_path: Path) -> None:
    run = saved(tmp_path, 1)
    track = RunLogger(run, 9)
    track.record(1, {"reward": 0.5}, [], [])
    positions = track.positions()
    length = run.metrics.stat().st_size
    with no_file_beyond(length + 9), pytest.raises(ArtifactError, match=ROOM.format("intact up to checkpoint 1")):
        track.record(2, {"reward": 0.5}, [], [])
    assert run.metrics.stat().st_size == length + 9
    resumed = RunLogger(run, 9)
    resumed.rewind(positions)
    resumed.record(2, {"reward": 0.25}, [], [])
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    run = saved(tmp_path)
    write_json(run.preflight, {"go": True})
    with no_file_beyond(3), pytest.raises(ArtifactError, match=ROOM.format("intact, but has no checkpoint yet")):
        write_json(run.preflight, {"go": False})
    assert read_json(run.preflight) == {"go": True}
    check_folder = [path.name for path in run.path.iterdir()]
    assert sorted(check_folder) == ["machine.json", "preflight.json", "recipe.yaml"]


def test_a_full_disk_after_the_training_is_told_without_words_about_checkpoints(tmp_path: Path) -> None:
    run = saved(tmp_path)
    run.adapter.mkdir()
    with no_file_beyond(3), pytest.raises(ArtifactError, match=ROOM.format("intact")):
        write_json(run.check, {"ok": True})


@pytest.mark.parametrize(("number", "words"), [(errno.EROFS, "Read-only"), (errno.EACCES, "Permission denied")])
def test_a_disk_that_does_not_let_us_write_is_a_sentence(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as root, whom no permission stops: the refusal itself is made up."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(ArtifactError, match=rf"{words}.*may be written to.*--run"), complete_folder(tmp_path / "a"):
        pass


def test_a_fault_of_ours_in_a_draft_stays_a_fault_of_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), complete_folder(tmp_path / "a"):
        Path("nowhere.txt").read_text()
    assert not list(tmp_path.iterdir())


def save_until_asked(run: RunDir, told: int) -> None:
    """Save step after step, and tell of each once it is saved."""
    small = Small()
    with finish_first() as stopped:
        for step in range(1, 100_000):
            save(run, small, step)
            os.write(told, f"{step}\n".encode())
            if stopped():
                os._exit(130)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGINT]])
@pytest.mark.parametrize("wait", [0.0, 0.001, 0.002, 0.004, 0.008])
def test_signals_in_the_middle_of_saves_lose_nothing(numbers: list[int], wait: float, tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 0)
    listen, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_until_asked(run, told)
        finally:
            os._exit(1)
    os.close(told)
    with open(listen) as lines:
        while next(lines) != "3\n":
            pass
        for number in numbers:
            time.sleep(wait)
            os.kill(child, number)
        last = int(["3", *lines][-1])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tidy(run)
    # Asked once, the step is finished and saved; asked twice, it is broken off, and what was saved before stays.
    assert (code, restored(newest(run))) in (
        [(130, last)] if len(numbers) == 1 else [(1, last), (1, last + 1), (130, last)]
    )


def test_a_run_in_the_background_is_stopped_by_sigterm_alone() -> None:
    """A shell script starts it with SIGINT ignored: Ctrl-C is for what runs in the foreground."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with finish_first() as stopped:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stopped()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopped()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
