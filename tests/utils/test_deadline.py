"""A call that may never end: its value or its error, or that it took too long, and then it stops."""

import os
import signal
import sys
import threading
import time

import pytest

from minigrpo.utils import deadline
from minigrpo.utils.deadline import within


def endless():
    while True:
        time.sleep(0.001)


def test_a_call_gives_its_value_or_its_error():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
    with pytest.raises(SystemExit):
        within(5, exit)


def test_a_call_needs_no_thread_of_its_own():
    assert within(5, threading.get_ident) == threading.get_ident()


def test_a_call_that_does_not_end_is_stopped():
    with pytest.raises(TimeoutError, match=r"not done within 0\.05 s"):
        within(0.05, endless)


def test_a_call_that_hides_the_first_stop_is_stopped_by_the_next():
    def stubborn():
        try:
            endless()
        except SystemExit:
            endless()

    with pytest.raises(TimeoutError):
        within(0.05, stubborn)


@pytest.mark.parametrize(("outer", "inner", "ended"), [(30, 0.05, ["inner"]), (0.05, 30, ["outer"])])
def test_of_calls_inside_one_another_the_late_one_is_stopped(outer, inner, ended):
    found = []

    def asks():
        try:
            within(inner, endless)
        except TimeoutError:
            found.append("inner")

    try:
        within(outer, asks)
    except TimeoutError:
        found.append("outer")
    assert found == ended


def test_a_call_in_another_thread_is_stopped_and_the_first_thread_goes_on():
    found = []

    def work():
        try:
            within(0.05, endless)
        except TimeoutError:
            found.append("stopped")

    thread = threading.Thread(target=work)
    thread.start()
    assert within(30, lambda: thread.join() or 3) == 3
    assert found == ["stopped"]


@pytest.fixture
def restless(monkeypatch):
    """A watchdog that looks so often that its exceptions come before, in and after the last lines of a call."""
    monkeypatch.setattr(deadline, "TICK_S", 1e-6)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_nothing_is_raised_after_a_call_that_ends_at_its_deadline(restless):
    found = set()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        try:
            found.add(within(0, lambda: "ended"))
        except TimeoutError:
            found.add("late")
    assert found == {"ended", "late"}
    time.sleep(0.01)


@pytest.mark.needs("linux")
def test_a_child_process_has_a_watchdog_of_its_own():
    within(5, lambda: None)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            within(0.05, endless)
        except TimeoutError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
