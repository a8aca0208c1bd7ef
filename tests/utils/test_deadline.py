"""A call that may never end: its value or its error, or that it took too long, and then it stops."""

import threading
import time

import pytest

from minigrpo.utils.deadline import within


def test_a_call_gives_its_value_or_its_error():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
    with pytest.raises(SystemExit):
        within(5, exit)


def test_a_call_that_does_not_end_is_given_up_and_stopped():
    rounds = []

    def endless():
        while True:
            rounds.append(1)
            time.sleep(0.001)

    with pytest.raises(TimeoutError, match=r"not done within 0\.05 s"):
        within(0.05, endless)
    for thread in threading.enumerate():
        if thread.name == "call with a deadline":
            thread.join(5)
            assert not thread.is_alive()
    assert rounds
