"""One event loop for the whole process, in a thread of its own.

What async functions share (a semaphore, a lock, an HTTP client) belongs to one loop, and fails in any other.

    value = await_result(function(...))      # from any thread but the loop's own; from several at once
    stop_awaiting(thread, grace=1.0)         # what that thread awaits is cancelled; it may await nothing more

The loop begins with the first call. At the end of the process whatever still runs is cancelled, and may clean up.

Not covered: a function that blocks (time.sleep, requests) holds up all others. Once `stop_awaiting` has found the loop
blocked, later calls get another loop; what was bound to the first one fails there.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

CLOSING_S = 2.0
"""Seconds that functions have at the end of the process to clean up after they were cancelled."""

Outcome = tuple[Any, BaseException | None]
"""What was returned, or what was raised."""


class EventLoopThread:
    """An event loop in a daemon thread, which ends with `close` or with the process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._closed = False
        self._turned = threading.Event()
        self._due: float | None = None
        self.thread = threading.Thread(target=self._serve, name="async functions", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        _here.serves = True
        asyncio.set_event_loop(self.loop)
        while not self._closed:
            # A task that raises SystemExit or KeyboardInterrupt ends run_forever; whoever awaits the task gets it too.
            with suppress(BaseException):
                self.loop.run_forever()
        self.loop.close()

    def submit(self, awaitable: Awaitable[Any]) -> Future[Outcome]:
        return asyncio.run_coroutine_threadsafe(_outcome(awaitable), self.loop)

    def expect_turn(self, grace: float) -> None:
        """Give the loop `grace` seconds to come round: after them `is_blocked` tells whether it did."""
        if self._due is None or self._turned.is_set():
            self._turned.clear()
            self._due = time.monotonic() + grace
            self.loop.call_soon_threadsafe(self._turned.set)

    def is_blocked(self) -> bool:
        """Tell whether a function keeps the loop from coming round. Wait until an expected turn is due."""
        return self._due is not None and not self._turned.wait(max(0.0, self._due - time.monotonic()))

    def close(self, seconds: float) -> None:
        """Cancel what runs, let it clean up, and end the thread; leave it behind if that takes more than `seconds`."""
        with suppress(RuntimeError):  # the loop is closed already
            asyncio.run_coroutine_threadsafe(self._wind_up(), self.loop)
        self.thread.join(seconds)

    async def _wind_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.loop.shutdown_asyncgens()
        self._closed = True
        self.loop.stop()


async def _outcome(awaitable: Awaitable[Any]) -> Outcome:
    """Await, and return what was raised: raised from here, a SystemExit would end the loop."""
    try:
        return await awaitable, None
    except BaseException as fault:
        return None, fault


_lock = threading.Lock()
_here = threading.local()
"""`serves`: set in threads that run a loop."""
_shared: EventLoopThread | None = None
_awaited: dict[threading.Thread, Future[Outcome]] = {}
_stopped: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def await_result(awaitable: Awaitable[Any]) -> Any:
    """Return the result of an awaitable that the process's loop runs; raise what it raised.

    Ctrl-C in the waiting thread, and `stop_awaiting`, cancel it; the latter raises concurrent.futures.CancelledError.
    A call from a loop's own thread, which cannot wait for itself, runs in another loop.
    """
    if getattr(_here, "serves", False):
        own = EventLoopThread()
        try:
            return _wait_for(own.submit(awaitable))
        finally:
            own.close(CLOSING_S)
    thread = threading.current_thread()
    with _lock:
        awaited = _awaited[thread] = _open_shared().submit(awaitable)
        if thread in _stopped:
            awaited.cancel()
    try:
        return _wait_for(awaited)
    finally:
        with _lock:
            _awaited.pop(thread, None)


async def run_in_daemon_thread(call: Callable[[], Any]) -> Any:
    """Return what a function that blocks returns, from a thread of its own that keeps no process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, fault: BaseException | None) -> None:
        if done.done():  # cancelled meanwhile
            return
        done.set_result((value, fault))

    def work() -> None:
        try:
            outcome: Outcome = call(), None
        except BaseException as fault:
            outcome = None, fault
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name="call of an async function", daemon=True).start()
    value, fault = await done
    if fault is not None:
        raise fault
    return value


def _wait_for(awaited: Future[Outcome]) -> Any:
    try:
        value, fault = awaited.result()
    except BaseException:  # Ctrl-C while waiting: the function's own faults are returned
        awaited.cancel()
        raise
    if fault is not None:
        raise fault
    return value


def stop_awaiting(thread: threading.Thread, grace: float) -> None:
    """Cancel what a thread awaits, now and later: its work is given up.

    Where the loop does not come round within `grace` seconds, a function blocks it: later calls get another loop.
    """
    with _lock:
        _stopped.add(thread)
        awaited = _awaited.get(thread)
        if awaited is not None and awaited.cancel() and _shared is not None:
            _shared.expect_turn(grace)


def _open_shared() -> EventLoopThread:
    global _shared
    if _shared is None or not _shared.thread.is_alive() or _shared.is_blocked():
        _shared = EventLoopThread()
    return _shared


def close_event_loop() -> None:
    """Cancel and clean up whatever runs in the process's loop. A later call opens another one."""
    global _shared
    with _lock:
        ended, _shared = _shared, None
    if ended is not None:
        ended.close(CLOSING_S)


def _forget_after_fork() -> None:
    """A child process has a copy of all this, but not the thread."""
    global _shared, _lock
    _shared, _lock = None, threading.Lock()
    _awaited.clear()


atexit.register(close_event_loop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
