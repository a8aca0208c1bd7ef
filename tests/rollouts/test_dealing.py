"""Prompts among several servers: each is answered once, whoever dies or is slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from minigrpo.errors import MinigrpoError
from minigrpo.rollouts.engines.dealing import Deal
from minigrpo.rollouts.engines.vllm_server import Request, VllmSample, VllmServerError
from minigrpo.rollouts.serialize import group_data, group_of
from minigrpo.types import Completion, Grade, Group, Prompt, Sampling
from minigrpo.utils.http import Connections


class Fake:
    """Answers a prompt with its own id, after some seconds; `fails(count)`: on which of its requests it fails."""

    def __init__(self, url: str, seconds: float = 0.0, fails: Callable[[int], bool] = lambda count: False) -> None:
        self.url, self.seconds, self.fails = url, seconds, fails
        self.asked: list[int] = []

    def answer(self, request: Request, connections: Connections) -> list[VllmSample]:
        self.asked.append(request.ids[0])
        count = len(self.asked)
        time.sleep(self.seconds)
        if self.fails(count):
            raise VllmServerError(f"{self.url} is gone.")
        return [((request.ids[0],), (-1.0,), "stop")]


def dealt(prompts: int, *servers: Fake, patience: float = 0.2) -> tuple[dict[int, str], list[str]]:
    """Deal prompts, within 10 s. Return who answered each, and what was said of those that were lost."""
    requests = [Request((index,), 1, Sampling(), index, ()) for index in range(prompts)]
    answered: dict[int, str] = {}
    lost: list[str] = []
    faults: list[BaseException] = []

    def deliver(index: int, samples: list[VllmSample], server: Any) -> None:
        assert samples[0][0] == (index,)
        assert index not in answered
        answered[index] = server.url

    def nobody() -> list[Fake]:
        raise MinigrpoError("No server is left.")

    def run() -> None:
        try:
            deal = Deal(
                servers,
                requests,
                lambda server, fault, is_slow: lost.append(fault.reason),
                nobody,
                patience=patience,
            )
            deal.run(deliver)
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), f"only {sorted(answered)} of {prompts} prompts were answered"
    if faults:
        raise faults[0]
    return answered, lost


def test_each_server_gets_its_share() -> None:
    answered, lost = dealt(8, a := Fake("a", 0.05), b := Fake("b", 0.05), c := Fake("c", 0.05))
    assert sorted(answered) == list(range(8))
    assert not lost
    assert [len(server.asked) for server in (a, b, c)] == [3, 3, 2]


def test_the_prompts_of_a_server_that_dies_are_asked_of_the_others() -> None:
    dying = Fake("dying", 0.05, fails=lambda count: True)
    answered, lost = dealt(9, Fake("a", 0.1), dying, Fake("b", 0.1))
    assert sorted(answered) == list(range(9))
    assert set(answered.values()) == {"a", "b"}
    assert lost == ["dying is gone."]  # once, not once for each prompt that it had


def test_the_prompts_of_a_slow_server_are_asked_of_an_idle_one() -> None:
    start = time.monotonic()
    answered, (why,) = dealt(6, Fake("slow", 5.0), Fake("a", 0.02))
    assert set(answered.values()) == {"a"}
    assert sorted(answered) == list(range(6))
    assert time.monotonic() - start < 3
    assert why.startswith("slow is slow: it has had a prompt for ")


def test_a_slow_server_is_asked_again_where_it_is_the_only_one_left() -> None:
    answered, lost = dealt(6, Fake("slow", 0.8), Fake("a", 0.02, fails=lambda count: count > 4))
    assert sorted(answered) == list(range(6))
    assert set(answered.values()) == {"slow", "a"}
    assert len(lost) == 2


def test_a_long_answer_makes_nobody_slow_where_it_comes_first() -> None:
    answered, lost = dealt(2, Fake("long", 0.6), Fake("a", 0.3), patience=0.4)
    assert answered == {0: "long", 1: "a"}
    assert not lost


def test_without_a_server_the_call_ends() -> None:
    with pytest.raises(MinigrpoError, match="No server is left"):
        dealt(4, Fake("a", fails=lambda count: True), Fake("b", fails=lambda count: count > 1))


def test_a_stored_completion_keeps_its_server_and_one_without_stores_none() -> None:
    prompt = Prompt("q", ())
    for sampler in ("gpu-a:8000", ""):
        group = Group(prompt, (1,), (Completion("x", (2,), (-1.0,), "stop", sampler=sampler),), (Grade(1.0),))
        data = group_data(group)
        assert data["completions"][0].get("sampler", "") == sampler
        assert ("sampler" in data["completions"][0]) == bool(sampler)
        assert group_of(data, {"q": prompt}) == group
