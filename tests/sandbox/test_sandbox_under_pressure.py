"""What a sandbox does when the machine, or the program, runs short: of memory, and of processes in the middle."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minigrpo.sandbox import Limits, Referee, Sandbox
from tests.sandbox.test_sandbox import interpreter_for_all

pytestmark = pytest.mark.needs("linux")  # the sandbox runs nowhere else
PLAIN = "def f(x): return x"


def ask(*calls: Any) -> Referee[list[Any]]:
    values = []
    for argument in calls:
        values.append((yield (argument,)))
    return values


HOARDS = """
import builtins
def f(x):
    if not hasattr(builtins, "kept"):
        builtins.kept = kept = []
        size = 10 ** 6
        while size > 100:
            try:
                while True: kept.append(bytearray(size))
            except MemoryError:
                size //= 2
        del kept[:5]
    return 1
"""


def test_who_leaves_no_memory_for_the_next_call_is_out_of_memory_and_no_error() -> None:
    """There is none to read the question with, long before the program is called."""
    with Sandbox(Limits(cpu_s=2.0, memory_mb=32), workers=1) as sandbox:
        outcome = sandbox.run(HOARDS, "f", ask("a", "b" * 3 * 10**6))
        assert (outcome.verdict, outcome.detail, outcome.calls) == ("memory", "no memory left", 1)
        assert sandbox.run(PLAIN, "f", ask(1)).verdict == "ok"


def test_an_exit_code_alone_is_an_error() -> None:
    with Sandbox(Limits(cpu_s=2.0), workers=1) as sandbox:
        ended = sandbox.run("import os\ndef f(x): os._exit(70)", "f", ask(1))
        assert (ended.verdict, ended.detail) == ("error", "it ended its own process (exit code 70)")


HOLDS = """
import os, sys
from minigrpo.sandbox import Limits, Sandbox
held = os.open("/dev/null", os.O_RDONLY)
for number in eval(sys.argv[1]) - {held}: os.dup2(held, number)
def ask(): return (yield (7,))
with Sandbox(Limits(cpu_s=2.0), workers=2) as sandbox:
    for _ in range(3): print(sandbox.run("def f(x): return x", "f", ask()).result)
    with sandbox.worker() as worker: print(worker.report["locks"]["landlock"])
"""
HELD = [
    *("{*range(3, 97)}", "{*range(3, 98)}", "{*range(3, 99)}", "{*range(3, 100)}", "{*range(3, 300)}"),
    *("{*range(3, 300)} - {99, 100}", "{*range(3, 300)} - {7, 100}", "{*range(3, 300)} - {98, 99, 100}"),
]


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("closed", ["", "<&- 2>&-"])
def test_it_starts_whatever_descriptors_the_trainer_holds(held: str, closed: str) -> None:
    """The control socket gets any number: also 100, which Landlock's rules have, and also that of a closed stdin."""
    arguments = ["sh", "-c", f'exec "$0" -c "$1" "$2" {closed}', sys.executable, HOLDS, held]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    with Sandbox(workers=1) as sandbox, sandbox.worker() as worker:
        landlock = worker.report["locks"]["landlock"]
    assert done.stdout == f"7\n7\n7\n{landlock}\n", done.stderr


GIVES_AWAY = [
    "import os\ndef f(x):\n    while True: os.sched_yield()",
    "import os\ndef f(x):\n    for _ in range(10 ** 9): os.sched_yield()\n    return x",
    "import os, time\ndef f(x):\n    end = time.monotonic() + 0.25\n"
    "    while time.monotonic() < end: os.sched_yield()\n    return x",
]


@pytest.mark.parametrize("source", GIVES_AWAY)
def test_giving_the_processor_away_is_charged_like_any_other_work(source: str) -> None:
    """Beside a process that takes it at once the timer's ticks hardly ever meet the program: it had twice its limit."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with Sandbox(Limits(cpu_s=0.4), workers=1) as sandbox:
            outcome = sandbox.run(source, "f", ask(*range(40)))
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, cores)
    assert outcome.verdict == "timeout"
    assert 0.3 <= outcome.cpu_s < 0.6


@pytest.mark.parametrize("left", [0.05, 0.2, 0.4])
def test_runs_may_share_one_limit(left: float) -> None:
    with Sandbox(Limits(cpu_s=2.0), workers=1) as sandbox:
        outcome = sandbox.run("def f(x):\n    while True: pass", "f", ask(1), cpu_s=left)
        assert outcome.verdict == "timeout"
        assert outcome.cpu_s < left + 0.2
        assert sandbox.run(PLAIN, "f", ask(1), cpu_s=left).verdict == "ok"


FORKS = """
import os, resource, socket, time
from minigrpo.sandbox.inside import zygote
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
_, most = resource.getrlimit(resource.RLIMIT_NPROC)
pauses = []
def pause(seconds):
    pauses.append(seconds)
    if len(pauses) == 3:
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
time.sleep = pause
resource.setrlimit(resource.RLIMIT_NPROC, (0, most))
child = zygote.Zygote(socket.socketpair()[0]).fork_with_retries()
print(len(pauses), child is not None)
resource.setrlimit(resource.RLIMIT_NPROC, (0, most))
zygote.FORK_TRIES = 2
later = zygote.Zygote(socket.socketpair()[0])
print(later.fork_with_retries(), later.refusal)
"""


def test_a_fork_that_fails_is_tried_again_until_there_is_a_process_to_be_had() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "3 True",
        "None no process can be forked: Resource temporarily unavailable",
    ], done.stderr


MIDDLE = """
import os, resource, sys
if os.getuid() == 0:
    os.setgroups([]); os.setgid(61234); os.setuid(61234)
from minigrpo.errors import SandboxError
from minigrpo.sandbox import Limits, Sandbox
def run():
    def ask(): return (yield (1,))
    try:
        outcome = sandbox.run("def f(x): return x", "f", ask())
    except SandboxError as fault:
        return str(fault)
    return outcome.verdict
with Sandbox(Limits(cpu_s=2.0), workers=1) as sandbox:
    print(run())
    with sandbox.worker() as worker: zygote = worker.process.pid
    soft, hard = resource.prlimit(zygote, resource.RLIMIT_NPROC)
    resource.prlimit(zygote, resource.RLIMIT_NPROC, (0, hard))
    print(run(), "the child that was forked ahead")
    print(run()); print(run())
    resource.prlimit(zygote, resource.RLIMIT_NPROC, (soft, hard))
    print(run())
    with sandbox.worker() as worker: print(worker.process.pid == zygote)
"""


def test_a_machine_that_runs_out_of_processes_in_the_middle_is_told_and_is_no_verdict() -> None:
    """As a user of its own, for root is not held to the limit."""
    root = Path(__file__).parents[2]
    env = {"PYTHONPATH": f"{root / 'src'}:{root}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [interpreter_for_all(), "-c", MIDDLE]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, ahead, *without, after, same = done.stdout.splitlines()
    assert (first, ahead) == ("ok", "ok the child that was forked ahead")
    for told in without:
        assert re.search("no process can be forked: Resource temporarily unavailable.*ulimit -u", told)
    assert (len(without), after, same) == (2, "ok", "True")
