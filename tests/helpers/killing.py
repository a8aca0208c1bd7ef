"""Acts on a run's folder that are killed at any moment, from a process that does nothing else.

    with killing() as kill:
        kill("pruning", run, 41)       whether it came to its end before its 41st moment

Each act is done in a fork. The process that forks is a new interpreter, whose only thread is its own: a fork of the
test session, with the threads, libraries and hooks of whatever ran before, was seen to spin without end once its calls
were traced.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigrpo.runs.rundir import RunDir, tidy
from minigrpo.training import checkpoint
from tests.helpers.saving import Small, begun, save

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "shutil.rmtree"}
KILLED = 9


def die_at(moment: int) -> None:
    """kill -9 of this process at the n-th line of our code, or the n-th change that any code makes to files."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == moment:
            os._exit(KILLED)

    def on_line(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            tick()
        return on_line

    def on_call(frame: Any, event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename.endswith(("/rundir.py", "/checkpoint.py")) else None

    sys.addaudithook(lambda event, _: tick() if event in FILE_EVENTS else None)
    sys.settrace(on_call)


def next_saved(run: RunDir) -> None:
    save(run, Small(), 3)


def saved_again(run: RunDir) -> None:
    """Step 2 a second time, as after a checkpoint that turned out damaged: the old folder is replaced."""
    save(run, Small(), 2)


def pruned(run: RunDir) -> None:
    checkpoint.prune(run, 1)


def set_aside(run: RunDir) -> None:
    checkpoint.discard_after(run, 1)


def rewritten(run: RunDir) -> None:
    machine = checkpoint.read_machine(run)
    assert machine is not None
    checkpoint.write_machine(run, machine)


ACTS: dict[str, Callable[[RunDir], None]] = {
    "a save": next_saved,
    "a save over another": saved_again,
    "pruning": pruned,
    "setting aside": set_aside,
    "a rewritten file": rewritten,
    "tidying up": tidy,
}


@contextmanager
def killing() -> Iterator[Callable[[str, RunDir, int], bool]]:
    """Start the process that forks; yield a function that says whether the act came to its end before that moment."""
    command = [sys.executable, "-m", "tests.helpers.killing"]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        asks, answers = process.stdin, process.stdout
        assert asks is not None
        assert answers is not None

        def kill(act: str, run: RunDir, moment: int) -> bool:
            print(json.dumps([act, str(run.path), moment]), file=asks, flush=True)
            code = json.loads(answers.readline())
            assert code in (0, KILLED)
            return code == 0

        try:
            yield kill
        finally:
            asks.close()


def answer() -> None:
    """Serve one line after the other: do the act in a fork, and say how the fork ended."""
    with tempfile.TemporaryDirectory() as folder:
        next_saved(begun(Path(folder)))  # what a first save imports, every fork would import again
    for line in sys.stdin:
        act, folder, moment = json.loads(line)
        child = os.fork()
        if child == 0:
            do(act, RunDir(Path(folder)), moment)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def do(act: str, run: RunDir, moment: int) -> None:
    """Be the fork: never returns."""
    code = 1
    try:
        die_at(moment)
        ACTS[act](run)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


if __name__ == "__main__":
    answer()
