"""One process at a time works in a run's folder; one that was killed is in nobody's way."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minigrpo.cli import main
from minigrpo.errors import ArtifactError
from minigrpo.runs import lock
from minigrpo.runs.lock import hold, holder
from minigrpo.runs.rundir import RunDir

HOLD = """
import sys, time
from minigrpo.runs.lock import hold
from minigrpo.runs.rundir import RunDir
with hold(RunDir(sys.argv[1]), print):
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


def taken(run: RunDir) -> list[str]:
    """Hold the run, and let it go: what was remarked."""
    remarks: list[str] = []
    with hold(run, remarks.append):
        assert holder(run) is not None
    return remarks


def test_the_second_process_is_refused_and_told_of_the_first(other: Other, tmp_path: Path) -> None:
    told = rf"is in use: process {other.process.pid} on {socket.gethostname()}, since 20.*--run"
    with pytest.raises(ArtifactError, match=told):
        taken(RunDir(tmp_path / "run"))
    other.end()
    assert taken(RunDir(tmp_path / "run")) == []


def test_on_the_command_line_the_second_ends_with_exit_code_two(
    other: Other, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["train", "quickstart", "--run", str(tmp_path / "run")])
    assert ended.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"process {other.process.pid}" in told
    assert "Traceback" not in told


def test_a_holder_that_was_killed_is_in_nobodys_way(other: Other, tmp_path: Path) -> None:
    other.kill()
    assert (tmp_path / "run" / ".lock").exists()
    assert taken(RunDir(tmp_path / "run")) == []
    assert not (tmp_path / "run").exists() or os.listdir(tmp_path / "run") == []


def test_a_child_of_a_killed_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    ready, told = os.pipe()
    parent = os.fork()
    if parent == 0:
        with hold(run, print):
            if os.fork() == 0:
                os.close(ready)
                os.write(told, str(os.getpid()).encode())
            signal.pause()
    os.close(told)
    child = int(os.read(ready, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        assert taken(run) == []
    finally:
        os.kill(child, signal.SIGKILL)


def test_one_process_does_not_take_its_own_run_twice(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with hold(run, print), pytest.raises(ArtifactError, match="is in use"), hold(run, print):
        pass


def test_of_many_that_come_at_once_one_gets_the_run(tmp_path: Path) -> None:
    code = HOLD.replace("sys.stdin.read()", "time.sleep(1)")
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    crowd = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    assert sorted(bool(process.wait(60)) for process in crowd).count(False) >= 1
    told = [process.communicate()[1].decode() for process in crowd if process.returncode]
    assert all("is in use" in text for text in told)


def test_a_folder_in_which_nothing_was_put_goes_again(tmp_path: Path) -> None:
    taken(RunDir(tmp_path / "runs" / "new"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_used_stays_without_its_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with hold(run, print):
        run.metrics.write_text("")
    assert [path.name for path in run.path.iterdir()] == ["metrics.jsonl"]


def test_a_path_with_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"is a file.*--run"):
        taken(RunDir(tmp_path / "file"))
    with pytest.raises(ArtifactError, match=r"Not a directory.*--run"):
        taken(RunDir(tmp_path / "file" / "run"))
    with pytest.raises(ArtifactError, match=r"File name too long.*--run"):
        taken(RunDir(tmp_path / ("x" * 300)))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which even root can make no file")
@pytest.mark.parametrize("path", ["/proc/self", "/proc/self/run"])
def test_a_folder_that_may_not_be_written_to_is_refused(path: str) -> None:
    with pytest.raises(ArtifactError, match=r"--run"):
        taken(RunDir(Path(path)))


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer of a file system that keeps no locks: few test machines have one."""

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", refuse)


@pytest.mark.usefixtures("without_locks")
def test_where_no_locks_are_kept_that_is_said_and_the_dead_are_passed_over(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    dead = Other(run.path)
    dead.kill()
    remarks = taken(run)
    assert len(remarks) == 1
    assert "keeps no locks" in remarks[0]


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("host", [None, "elsewhere"])
def test_where_no_locks_are_kept_the_living_and_other_hosts_are_in_the_way(
    other: Other, tmp_path: Path, host: Any
) -> None:
    run = RunDir(tmp_path / "run")
    if host:
        run.lock.write_text(run.lock.read_text().replace(socket.gethostname(), host))
    with pytest.raises(ArtifactError, match=r"is in use.*remove .*\.lock"):
        taken(run)
