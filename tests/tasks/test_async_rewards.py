"""Async reward functions share one event loop: what they keep between calls works in every group, and is freed."""

import asyncio
import signal
import subprocess
import sys
import threading
import time

import pytest

from minigrpo.errors import TaskError
from minigrpo.rollouts.async_grader import Grader
from minigrpo.tasks.custom.reward_task import reward_task
from minigrpo.types import Completion
from minigrpo.utils.event_loop import await_result, close_event_loop

ROWS = [{"prompt": f"say {i}", "answer": str(i)} for i in range(40)]


def answers(texts):
    return tuple(Completion(text, (1,), (0.0,), "stop") for text in texts)


def graded(function, *, groups=12, workers=4, texts=("a", "b", "c"), seconds=30.0, say=None):
    """Grade so many groups beside one another, and return the rewards of each."""
    task = reward_task(function, rows=ROWS)
    prompts = task.prompts("train")[:groups]
    with Grader(task, workers=workers, seconds=seconds, say=say or (lambda words: None)) as grader:
        grades = grader.open_batch(prompts).collect([answers(texts)] * groups)
    return [[grade.reward for grade in group] for group in grades]


def bounded(kind):
    """A function that holds a lock or a semaphore of its module while it waits, as one that spares a server does."""
    guard, inside, most = kind(), [0], [0]

    async def judged(completions, **columns):
        async def one():
            async with guard:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                await asyncio.sleep(0.001)
                inside[0] -= 1
            return 1.0

        return await asyncio.gather(*(one() for _ in completions))

    return judged, most


@pytest.mark.parametrize(("kind", "most"), [(lambda: asyncio.Semaphore(2), 2), (asyncio.Lock, 1)])
def test_a_semaphore_or_lock_of_a_module_holds_over_all_groups(kind, most):
    judged, seen = bounded(kind)
    assert graded(judged) == [[1.0] * 3] * 12
    assert seen == [most]


def test_a_client_made_at_first_use_serves_every_group():
    """A connection belongs to the loop in which it was opened, as those of HTTP clients do."""
    made, kept = [], {}

    async def echo(reader, writer):
        while line := await reader.readline():
            writer.write(line.upper())

    async def asked(completion):
        if not kept:
            kept["lock"] = asyncio.Lock()
            kept["server"] = await asyncio.start_server(echo, "127.0.0.1", 0)
            kept["pipe"] = await asyncio.open_connection(*kept["server"].sockets[0].getsockname())
            made.append(1)
        async with kept["lock"]:
            kept["pipe"][1].write(f"{completion}\n".encode())
            return float((await kept["pipe"][0].readline()) == f"{completion.upper()}\n".encode())

    task = reward_task(asked, rows=ROWS)
    for _ in range(2):
        with Grader(task, workers=1) as grader:
            grades = grader.open_batch(task.prompts("train")[:5]).collect([answers("abc")] * 5)
        assert [[grade.reward for grade in group] for group in grades] == [[1.0] * 3] * 5
    assert [grade.reward for grade in task.grade_group(task.prompts("train")[0], answers("xy"))] == [1.0, 1.0]
    assert made == [1]
    close_event_loop()


def test_queues_and_background_tasks_live_on_between_groups():
    state = {}

    async def worker():
        while True:
            text, done = await state["queue"].get()
            done.set_result(float(len(text)))

    async def queued(completion):
        if not state:
            state["queue"] = asyncio.Queue()
            state["task"] = asyncio.create_task(worker())
        done = asyncio.get_running_loop().create_future()
        state["queue"].put_nowait((completion, done))
        return await done

    assert graded(queued, texts=("a", "bbb")) == [[1.0, 3.0]] * 12


def test_all_groups_run_in_one_thread_that_is_not_theirs():
    threads = set()

    async def where(completion):
        await asyncio.sleep(0)
        threads.add(threading.current_thread())
        return 1.0

    graded(where)
    graded(where)
    assert len(threads) == 1
    assert threading.main_thread() not in threads
    assert threads.pop().daemon


def late(prompt, texts=("say 1", "say 3")):
    return prompt in texts


def test_a_group_that_is_given_up_frees_the_lock_that_it_holds():
    lock = asyncio.Lock()

    async def stuck(completion, prompt):
        async with lock:
            if late(prompt):
                await asyncio.sleep(1000)
            return 1.0

    rewards = graded(stuck, groups=8, workers=1, seconds=0.4)
    lost = [any(reward != reward for reward in group) for group in rewards]
    assert lost == [
        late(prompt.messages[-1]["content"]) for prompt in reward_task(stuck, rows=ROWS).prompts("train")[:8]
    ]
    assert not lock.locked()


def test_a_function_that_blocks_the_loop_costs_its_own_group_alone():
    async def blocks(completion, prompt):
        if late(prompt):
            time.sleep(4)
        return 1.0

    began = time.monotonic()
    rewards = graded(blocks, groups=6, workers=1, seconds=0.8)
    assert sum(any(reward != reward for reward in group) for group in rewards) == 2
    assert time.monotonic() - began < 4
    close_event_loop()


def raising(fault):
    async def falls(completions, **columns):
        async def one():
            await asyncio.sleep(0)
            raise fault

        return await asyncio.gather(*(one() for _ in completions))

    return falls


@pytest.mark.parametrize("fault", [ValueError("odd"), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_whatever_an_async_function_raises_is_told_and_the_loop_lives_on(fault):
    with pytest.raises(
        TaskError, match=rf"falls raised {type(fault).__name__}.*test_async_rewards.py:\d+.*prompt train-"
    ):
        graded(raising(fault), groups=2)

    async def well(completion):
        await asyncio.sleep(0)
        return 1.0

    assert graded(well, groups=2) == [[1.0] * 3] * 2


def test_a_function_may_ask_another_task_from_within_the_loop():
    async def inner(completion):
        await asyncio.sleep(0)
        return 2.0

    task = reward_task(inner, rows=ROWS)

    async def outer(completion):
        return task.grade(task.prompts("train")[0], completion).reward

    assert graded(outer, groups=2, texts=("a",)) == [[2.0]] * 2


PROGRAM = """
import asyncio, sys
from minigrpo.utils.event_loop import await_result

async def client():
    try:
        await asyncio.sleep(1000)
    finally:
        await asyncio.sleep(0.01)
        print("client closed", flush=True)

async def first():
    kept.append(asyncio.create_task(client()))
    await asyncio.sleep(0)

kept = []
await_result(first())
"""


def test_the_loop_is_closed_in_order_when_the_process_ends():
    ended = subprocess.run([sys.executable, "-X", "dev", "-c", PROGRAM], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "client closed\n", "")


def test_a_function_that_never_yields_keeps_no_process_from_ending():
    program = PROGRAM.replace(
        "await_result(first())",
        "threading.Thread(target=await_result, args=(stuck(),), daemon=True).start()\ntime.sleep(0.3)",
    )
    program = program.replace("import asyncio, sys", "import asyncio, sys, threading, time")
    program = program.replace("kept = []", "async def stuck():\n    time.sleep(1000)\n")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 0


def test_ctrl_c_ends_what_the_main_thread_waits_for():
    ended = []

    async def endless():
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(1)

    threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        await_result(endless())
    assert time.monotonic() - began < 10
    await_result(asyncio.sleep(0.01))
    assert ended == [1]
