"""Model-written programs: the honest ones run, the others get nowhere, and nothing is left of either."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minigrpo.sandbox import Limits, Referee, Sandbox, Wrong, shared_sandbox
from tests.helpers.marks import interpreter_for_all
from tests.sandbox.attacks import every
from tests.sandbox.attacks.judge import judge
from tests.sandbox.attacks.lies import FORGE

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.needs("linux")  # the sandbox runs nowhere else


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(cpu_s=2.0), workers=2) as opened:
        yield opened


def ask(*calls: tuple[Any, ...]) -> Referee[list[Any]]:
    values = []
    for arguments in calls:
        values.append((yield arguments))
    return values


def test_no_attack_gets_anywhere(tmp_path: Path) -> None:
    assert len(every()) >= 120
    assert len({attack.name for attack in every()}) == len(every())
    assert judge(tmp_path) == []


def test_the_attacks_that_forge_messages_find_what_they_need(sandbox: Sandbox) -> None:
    """Without the nonce of their call, or the harness's globals, they would fail by themselves and prove nothing."""
    finds = f"{FORGE}\ndef f(): return len(nonce()), 'answer_call' in sys._getframe(1).f_globals"
    assert sandbox.run(finds, "f", ask(())).result == [(8, True)]


@pytest.mark.needs("root")  # an ordinary user ran the test above as such already
@pytest.mark.needs("shared_python")
def test_no_attack_gets_anywhere_where_the_user_is_an_ordinary_one(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.chdir('/'); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "import runpy; sys.argv[1:] = [sys.argv[2]]\n"
        "runpy.run_module('tests.sandbox.attacks.judge', run_name='__main__')"
    )
    folder = Path("/tmp") / f"minigrpo-test-{os.getpid()}"
    folder.mkdir()
    try:
        os.chown(folder, 65534, 65534)
        python = interpreter_for_all()
        assert python
        command = [python, "-c", code, "-", str(folder)]
        env = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"attacks": len(every()), "faults": [], "user": 65534}
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)


HONEST = {
    "def f(x): return x": 7,
    "def f(x):\n    return [(x, 2.5, 'é', None, True), {'a': [1, -1, 300], (1, 2): []}]": [
        (7, 2.5, "é", None, True),
        {"a": [1, -1, 300], (1, 2): []},
    ],
    "import math, itertools, collections, functools, heapq, random, re\ndef f(x): return math.gcd(x, 21)": 7,
    "from typing import List, Optional\ndef f(x: int) -> List[int]:\n    return [x]": [7],
    "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\n    y: int = 2\ndef f(x): return P(x).y": 2,
    "def f(x):\n    def g():\n        yield from range(3)\n    print('seen by nobody')\n    return list(g())": [
        0,
        1,
        2,
    ],
    "def f(x):\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        return str(e)": "division by zero",
    "class A:\n    def __call__(self, x): return 2 ** 1000 + x\nf = A()": 2**1000 + 7,
    "f = lambda x: (lambda n: [s := 0, *(s := s + i for i in range(n))])(3)": [0, 0, 1, 3],
    "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\ndef f(x): return fib(15)": 610,
    "def f(x):\n    return sorted('banana', key=lambda c: -ord(c)) == list('nnbaaa')": True,
    "def f(x):\n    exec('y = 5')\n    return eval('x + 1', {'x': x})": 8,
    "def f(x):\n    open = len\n    match x:\n        case 7: return open('abc')": 3,
    "import random\ndef f(x):\n    return len({random.random() for _ in range(9)})": 9,
    # What Python imports by itself, in one version or another.
    "def f(größe):\n    число = größe\n    return 数 if (数 := число) else 0": 7,
    "def f(x): return '\\N{BULLET}'": "•",
    "def f(x): return (10**100000 // 3**50000) % 97 + 7**60000 % 97": (10**100000 // 3**50000) % 97 + 7**60000 % 97,
    "import random\ndef f(x): return random.Random('seed').random() < 1": True,
    "import datetime\ndef f(x): return datetime.datetime.strptime('2020-05-07', '%Y-%m-%d').day": 7,
    "def f(x): return 'é€'.encode('cp1252') == b'\\xe9\\x80' and len('é'.encode('utf-16'))": 4,
}


@pytest.mark.parametrize("source", HONEST)
def test_honest_programs_run(sandbox: Sandbox, source: str) -> None:
    outcome = sandbox.run(source, "f", ask((7,)))
    assert (outcome.verdict, outcome.result, outcome.calls) == ("ok", [HONEST[source]], 1), outcome
    assert outcome.cpu_s > 0


def test_nothing_is_carried_from_call_to_call_by_globals_or_defaults(sandbox: Sandbox) -> None:
    source = "n = []\ndef f(x, seen=[]):\n    global n\n    seen.append(x); n.append(x)\n    return len(seen) + len(n)"
    assert sandbox.run(source, "f", ask((1,), (2,), (3,))).result == [2, 2, 2]


@pytest.mark.parametrize(
    "left",
    ["random.random()", "random.seed(x)", "random.shuffle([1, 2, 3])", "sys.setrecursionlimit(500 + x)"],
)
def test_what_a_call_leaves_in_random_and_in_the_recursion_limit_ends_with_it(sandbox: Sandbox, left: str) -> None:
    found = "found = random.random(), sys.getrecursionlimit()"
    source = f"import random, sys\ndef f(x):\n    {found}\n    {left}\n    return found"
    first, *others = sandbox.run(source, "f", ask((1,), (2,), (3,))).result
    assert others == [first, first]


def test_a_program_answers_the_same_in_every_process(sandbox: Sandbox) -> None:
    source = "import random\ndef f():\n    return [random.random(), list({'a', 'b', 'c', 'd', 'e'}), hash('x')]"
    with Sandbox(workers=1) as other:
        assert sandbox.run(source, "f", ask(())).result == other.run(source, "f", ask(())).result


def test_the_program_sees_copies_and_the_judge_stays_outside(sandbox: Sandbox) -> None:
    board = [[0, 1], [2, 3]]

    def referee() -> Referee[str]:
        value = yield (board,)
        if value != "done":
            raise Wrong(f"got {value}")
        return "judged outside"

    spoil = "def f(board):\n    board[0][0] = 9\n    board.clear()\n    return '{}'"
    assert sandbox.run(spoil.format("done"), "f", referee()).result == "judged outside"
    lost = sandbox.run(spoil.format("no"), "f", referee())
    assert (lost.verdict, lost.detail, lost.result) == ("wrong", "got no", None)
    assert board == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("source", "verdict", "detail"),
    [
        ("def f(x): raise ValueError('why\\nnot')", "error", "ValueError: why not"),
        ("def f(x:", "error", "SyntaxError"),
        ("def f(x): return '\ud800'", "error", "SyntaxError"),
        ("def f(x):\n\treturn 1\n        return 2", "error", "SyntaxError"),
        ("def g(x): return 1", "error", "NameError: no function f is defined"),
        ("def f(x): return object()", "error", "returns object is not plain data"),
        ("def f(x): return 'x' * 10**9", "memory", "no memory left"),
        ("def f(x): return open('/etc/passwd')", "blocked", "PermissionError"),
        ("import os\ndef f(x): os.fork()", "blocked", "a forbidden system call"),
        ("import socket\ndef f(x): return 1", "error", "ModuleNotFoundError"),
        ("import os\ndef f(x): os._exit(3)", "error", "it ended its own process (exit code 3)"),
    ],
)
def test_verdicts_say_why(sandbox: Sandbox, source: str, verdict: str, detail: str) -> None:
    outcome = sandbox.run(source, "f", ask((7,)))
    assert outcome.verdict == verdict, outcome
    assert outcome.detail.startswith(detail)
    assert outcome.result is None


def test_check_defines_and_calls_nothing(sandbox: Sandbox) -> None:
    assert sandbox.check("def f(): 1 / 0", "f").verdict == "ok"
    assert sandbox.check("1 / 0\ndef f(): pass", "f").detail.startswith("ZeroDivisionError")
    assert sandbox.check("f = 1", "f").verdict == "error"


def test_limits_of_time_and_calls_hold() -> None:
    with Sandbox(Limits(cpu_s=0.2, calls=3), workers=1) as sandbox:
        spun = sandbox.run("def f(x):\n    while True: pass", "f", ask((1,)))
        assert (spun.verdict, spun.detail) == ("timeout", "more than 0.2 s of CPU time")
        assert sandbox.run("def f(x): return x", "f", ask(*[(1,)] * 3)).verdict == "ok"
        assert sandbox.run("def f(x): return x", "f", ask(*[(1,)] * 4)).verdict == "timeout"


def test_who_waits_for_nothing_is_found_before_the_wall(sandbox: Sandbox) -> None:
    outcome = sandbox.run("import os\ndef f(x): os.read(3, 1)", "f", ask((1,)))
    assert (outcome.verdict, outcome.detail) == ("timeout", "it waits for something that never comes")


def test_what_the_referee_raises_is_raised_here_and_the_sandbox_goes_on(sandbox: Sandbox) -> None:
    def faulty() -> Referee[None]:
        yield (1,)
        raise ZeroDivisionError("the referee's own")

    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match="the referee's own"):
            sandbox.run("def f(x): return x", "f", faulty())
    assert sandbox.run("def f(x): return x", "f", ask((1,))).verdict == "ok"


@pytest.mark.parametrize("victim", ["child", "zygote"])
def test_a_process_killed_from_outside_is_no_verdict_on_the_program(victim: str) -> None:
    killed: list[int] = []

    with Sandbox(workers=1) as sandbox:

        def referee() -> Referee[list[Any]]:
            values = [(yield (1,))]
            if not killed:
                worker = next(iter(sandbox._busy))
                killed.extend([worker.pid, worker.process.pid])
                os.kill(worker.pid if victim == "child" else worker.process.pid, signal.SIGKILL)
            return [*values, (yield (2,))]

        outcome = sandbox.run("def f(x): return 10 * x", "f", referee())
        assert (outcome.verdict, outcome.result) == ("ok", [10, 20])
        assert gone(killed[0])


def test_a_worker_that_is_killed_again_and_again_is_told_as_infrastructure() -> None:
    with Sandbox(workers=1) as sandbox:
        done = threading.Event()

        def kill() -> None:
            while not done.wait(0.01):
                for worker in list(sandbox._busy):
                    with contextlib.suppress(OSError):
                        for child in below(worker.process.pid):
                            os.kill(child, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        outcome = sandbox.run("def f(x):\n    while True: pass", "f", ask((1,)))
        done.set()
        killer.join()
        assert outcome.verdict == "infrastructure"
        assert "SIGKILL" in outcome.detail
        assert sandbox.run("def f(x): return x", "f", ask((1,))).verdict == "ok"


def test_a_machine_without_processes_to_spare_is_told() -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))\n"
        "from minigrpo.sandbox import Sandbox; from minigrpo.errors import SandboxError\n"
        "try: Sandbox(workers=1).check('', 'f')\n"
        "except SandboxError as fault: print(fault)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "cannot start" in done.stdout, done.stderr


def gone(*pids: int, seconds: float = 10.0) -> bool:
    """Whether they all end within this time; a zombie has ended."""
    until = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def below(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [process for child in children for process in (int(child), *below(int(child)))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_process_that_used_the_sandbox(number: signal.Signals) -> None:
    code = (
        "from minigrpo.sandbox import *\n"
        "def ask():\n    yield ()\n    print('called', flush=True)\n    yield ()\n"
        'source = \'import sys\\nn = sys.__dict__.setdefault("n", [])\\ndef f():\\n    n.append(1)\\n'
        "    while len(n) > 1: pass'\n"
        "Sandbox(Limits(cpu_s=300), workers=1).run(source, 'f', ask())"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"called\n"
    left = below(process.pid)
    assert len(left) >= 2
    process.send_signal(number)
    assert process.wait(30) != 0
    process.stdout.close()
    assert gone(*left)


def test_the_pool_serves_many_threads_and_leaves_nothing() -> None:
    before = len(os.listdir("/proc/self/fd")), len(below(os.getpid()))
    with Sandbox(workers=2) as sandbox:
        found: list[Any] = []

        def work(number: int) -> None:
            for step in range(20):
                found.append(sandbox.run(f"def f(x): return x * {number}", "f", ask((step,))).result == [step * number])

        for _ in range(2):  # a closed sandbox starts again
            threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            sandbox.close()
    assert found == [True] * 200
    assert (len(os.listdir("/proc/self/fd")), len(below(os.getpid()))) == before


def test_a_fork_of_the_process_has_a_sandbox_of_its_own() -> None:
    shared = shared_sandbox(Limits(cpu_s=3.0))
    assert shared is shared_sandbox(Limits(cpu_s=3.0))
    assert shared.run("def f(x): return x", "f", ask((1,))).verdict == "ok"
    child = os.fork()
    if child == 0:
        try:
            outcome = shared.run("def f(x): return x", "f", ask((1,)))
            shared.close()
            os._exit(0 if outcome.verdict == "ok" else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert shared.run("def f(x): return x", "f", ask((1,))).verdict == "ok"
    shared.close()
