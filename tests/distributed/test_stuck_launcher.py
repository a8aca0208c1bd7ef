"""A launcher that hangs where a host was cut off is ended; one that sees how its rank ended is left alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from minigrpo.distributed.stuck_launcher import end_if_stuck, is_unnoticed, leave_guard

pytestmark = pytest.mark.needs("linux")

LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(rank.pid, flush=True)
input()
rank.stdin.close()
if sys.argv[1] == "waits":
    rank.wait()
    print("knows", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["hangs", "waits"])
def launcher(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", LAUNCHER, request.param]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_launcher_that_does_not_see_its_rank_end_is_ended_and_another_is_left_alone(
    launcher: subprocess.Popen[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    assert not is_unnoticed(rank, launcher.pid)
    hangs = launcher.args[-1] == "hangs"  # type: ignore[index]
    launcher.stdin.write("end\n")
    launcher.stdin.flush()
    if not hangs:
        assert launcher.stdout.readline() == "knows\n"
    assert end_if_stuck(rank, launcher.pid, 1.5) is hangs
    assert (launcher.wait(10) == -9) if hangs else (launcher.poll() is None)
    assert ("was ended" in capfd.readouterr().err) is hangs


def test_a_rank_that_still_works_is_no_reason(launcher: subprocess.Popen[str]) -> None:
    assert launcher.stdout is not None
    assert not end_if_stuck(int(launcher.stdout.readline()), launcher.pid, 0.6)
    assert launcher.poll() is None


def test_nothing_is_left_behind_where_no_launcher_of_torch_started_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **options: started.append(words))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    leave_guard()
    assert not started
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    leave_guard()
    assert len(started) == 1
