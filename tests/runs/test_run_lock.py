"""One process at a time works in a run's folder; one that was killed is in nobody's way."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from minigrpo.cli import main
from minigrpo.errors import ArtifactError
from minigrpo.runs import lock
from minigrpo.runs.lock import holder, run_lock
from minigrpo.runs.rundir import RunDir

HOLD = """
import sys, time
from minigrpo.runs.lock import run_lock
from minigrpo.runs.rundir import RunDir
with run_lock(RunDir(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


class Other:
    """Another process that holds a run's folder until it is told to end."""

    def __init__(self, run: Path) -> None:
        command = [sys.executable, "-c", HOLD, str(run)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def end(self) -> None:
        self.process.communicate("")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Other]:
    one = Other(tmp_path / "run")
    yield one
    if one.process.poll() is None:
        one.kill()


def take(run: RunDir) -> None:
    """Hold the run, and let it go."""
    with run_lock(run):
        assert holder(run) is not None


def test_the_second_process_is_refused_and_told_of_the_first(other: Other, tmp_path: Path) -> None:
    told = rf"is in use: process {other.process.pid} on {socket.gethostname()}, since 20.*--run"
    with pytest.raises(ArtifactError, match=told):
        take(RunDir(tmp_path / "run"))
    other.end()
    take(RunDir(tmp_path / "run"))


RECIPE = "model:\n  path: no/such\n"
NO_MODEL = ("--model.path", "no/such", "--run", "RUN")  # whatever gets past the lock is soon refused
WRITING: dict[str, tuple[str, ...]] = {
    "adopt": ("adopt", "no/such", "--task.name", "wordproblems", "--run", "RUN"),
    "preflight": ("preflight", "quickstart", *NO_MODEL),
    "warmup": ("warmup", "quickstart", "--warmup.steps", "1", *NO_MODEL),
    "train": ("train", "quickstart", *NO_MODEL),
    "train --resume": ("train", "RUN", "--resume"),
    "run": ("run", "quickstart", *NO_MODEL),
    "quickstart": ("quickstart", *NO_MODEL),
    "check": ("check", "RUN"),
    "check adapter": ("check", "RUN/adapter"),
    "merge": ("merge", "RUN"),
    "merge adapter": ("merge", "RUN/adapter"),
    "merge model": ("merge", "RUN/model"),
    "export": ("export", "RUN"),
    "export merged": ("export", "RUN/merged"),
    "verify": ("verify", "RUN"),
    "verify adapter": ("verify", "RUN/adapter"),
    "audit": ("audit", "RUN"),
    "publish": ("publish", "RUN", "--repo", "me/mine"),
    "publish --dry-run": ("publish", "RUN", "--repo", "me/mine", "--dry-run"),
}
"""Every command that makes or replaces something in a run, or sends what must not change meanwhile."""
BESIDE: dict[str, tuple[str, ...]] = {
    "evaluate": ("evaluate", "RUN"),  # adds a file of its own
    "replay": ("replay", "RUN", "--step", "1"),
    "fork": ("fork", "RUN", "--at", "1", "--set", "train.lr=1e-5", "--steps", "1"),
    "serve": ("serve", "RUN", "--once"),
    "report": ("report", "RUN"),
    "inspect": ("inspect", "RUN", "--step", "1", "--group", "1"),
    "merge warmup": ("merge", "RUN/warmup"),  # to look at it while the run trains
    "check checkpoint": ("check", "RUN/checkpoints/000001"),
}
WITHOUT_RUN = {"plan", "check-task", "doctor", "sandbox", "tasks", "recipes", "launch", "view", "watch"}
"""Or of a folder of runs (view), or following one for as long as it is held (watch)."""


def refusal(arguments: tuple[str, ...], run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Start a command that is to be refused: what it says."""
    with pytest.raises(SystemExit) as ended:
        main.main([argument.replace("RUN", str(run)) for argument in arguments])
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert "Traceback" not in said.err
    return " ".join(said.err.split())


@pytest.mark.parametrize("command", WRITING)
def test_a_command_that_writes_into_a_run_is_refused_while_another_holds_it(
    other: Other, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    run = RunDir(tmp_path / "run")
    run.recipe.write_text(RECIPE, encoding="utf-8")
    before = {file: file.read_bytes() for file in run.path.rglob("*")}
    said = refusal(WRITING[command], run.path, capsys)
    assert f"error: {run.path} is in use: process {other.process.pid} on {socket.gethostname()}, since 20" in said
    told = "Wait for it or stop it; or begin another run: --run runs/NAME More: docs/troubleshooting.md#a-run-is-in-use"
    assert said.endswith(told)
    assert {file: file.read_bytes() for file in run.path.rglob("*")} == before


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("command", BESIDE)
def test_a_command_that_replaces_nothing_in_a_run_works_beside_its_holder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """It is refused all the same, for what it misses in an empty run."""
    run = RunDir(tmp_path / "run")
    run.recipe.write_text(RECIPE, encoding="utf-8")
    said = refusal(BESIDE[command], run.path, capsys)
    assert "is in use" not in said
    assert re.search(
        "has trained nothing|has done no step|has no checkpoint|no finished step|is missing|is not there", said
    )


def test_of_every_command_it_is_known_whether_it_takes_the_lock() -> None:
    commands = typer.main.get_command(main.app).commands  # type: ignore[attr-defined]
    assert commands.keys() == {name.split()[0] for name in (*WRITING, *BESIDE, *WITHOUT_RUN)}


def test_a_command_that_holds_a_run_removes_what_killed_processes_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.recipe.write_text(RECIPE, encoding="utf-8")
    for command in ("check", "merge", "export", "verify", "publish"):
        draft = run.path / ".merged.abc.draft"
        draft.mkdir()
        refusal(WRITING[command], run.path, capsys)
        assert [path.name for path in run.path.iterdir()] == ["recipe.yaml"]


def test_a_holder_that_was_killed_is_in_nobodys_way(other: Other, tmp_path: Path) -> None:
    other.kill()
    assert (tmp_path / "run" / ".lock").exists()
    take(RunDir(tmp_path / "run"))
    assert not (tmp_path / "run").exists() or os.listdir(tmp_path / "run") == []


def test_a_child_of_a_killed_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    ready, told = os.pipe()
    parent = os.fork()
    if parent == 0:
        with run_lock(run):
            if os.fork() == 0:
                os.close(ready)
                os.write(told, str(os.getpid()).encode())
            signal.pause()
    os.close(told)
    child = int(os.read(ready, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        take(run)
    finally:
        os.kill(child, signal.SIGKILL)


def test_one_process_does_not_take_its_own_run_twice(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run_lock(run), pytest.raises(ArtifactError, match="is in use"), run_lock(run):
        pass


def test_of_many_that_come_at_once_one_gets_the_run(tmp_path: Path) -> None:
    code = HOLD.replace("sys.stdin.read()", "time.sleep(1)")
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    crowd = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    assert sorted(bool(process.wait(60)) for process in crowd).count(False) >= 1
    told = [process.communicate()[1].decode() for process in crowd if process.returncode]
    assert all("is in use" in text for text in told)


def test_a_folder_in_which_nothing_was_put_goes_again(tmp_path: Path) -> None:
    take(RunDir(tmp_path / "runs" / "new"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_used_stays_without_its_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run_lock(run):
        run.metrics.write_text("")
    assert [path.name for path in run.path.iterdir()] == ["metrics.jsonl"]


def test_a_path_with_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"is a file.*--run"):
        take(RunDir(tmp_path / "file"))
    with pytest.raises(ArtifactError, match=r"Not a directory.*--run"):
        take(RunDir(tmp_path / "file" / "run"))
    with pytest.raises(ArtifactError, match=r"File name too long.*--run"):
        take(RunDir(tmp_path / ("x" * 300)))


@pytest.mark.needs("procfs")
@pytest.mark.parametrize("path", ["/proc/self", "/proc/self/run"])
def test_a_folder_that_may_not_be_written_to_is_refused(path: str) -> None:
    with pytest.raises(ArtifactError, match=r"--run"):
        take(RunDir(Path(path)))


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer of a file system that keeps no locks: few test machines have one."""

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", refuse)


@pytest.mark.usefixtures("without_locks")
def test_where_no_locks_are_kept_that_is_said_and_the_dead_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    dead = Other(run.path)
    dead.kill()
    take(run)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"The file system of {run.path} keeps no locks: begin no second process on this run from another machine.\n"
    )


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("host", [None, "elsewhere"])
def test_where_no_locks_are_kept_the_living_and_other_hosts_are_in_the_way(
    other: Other, tmp_path: Path, host: Any
) -> None:
    run = RunDir(tmp_path / "run")
    if host:
        run.lock.write_text(run.lock.read_text().replace(socket.gethostname(), host))
    with pytest.raises(ArtifactError, match=r"is in use.*remove .*\.lock"):
        take(run)
