"""Deal prompts to several servers: each gets its share at once, and the share of one that fails goes to the others.

A prompt is dealt whole, with all its siblings, and its answer is placed by its index; its draws are named by its seed.
So who answers matters only as far as servers round differently.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from minigrpo.rollouts.engines.vllm_server import Request, VllmSample, VllmServerError
from minigrpo.utils.http import Connections

MOST_AT_ONCE = 64
"""Prompts that one server is asked at a time; vLLM decodes their siblings together."""
PATIENCE_S = 5.0
"""A prompt that took less is never asked of a second server."""
SLOWER = 2.0
"""How many times as long as the other servers' longest answer a prompt may take before an idle one is asked, too."""
TICK_S = 0.05


class Dealt(Protocol):
    """A server that answers one prompt with all its siblings, or raises VllmServerError."""

    url: str

    def answer(self, request: Request, connections: Connections) -> list[VllmSample]: ...


@dataclass(eq=False, slots=True)
class Hand:
    """What one server has been asked in a deal: since when, by index; and the longest that an answer took."""

    server: Any
    asked: dict[int, float] = field(default_factory=dict)
    longest: float = 0.0
    connections: Connections = field(default_factory=Connections)


class Deal:
    """One call's prompts among servers that are ready.

    `lost(server, fault, is_slow)` is told of each server that is asked no more. Where that was the last one, `revive()`
    returns those that can be asked again, or raises MinigrpoError. `check(index, samples)` returns what is wrong with
    an answer, "" for nothing; a wrong one does not count, and its server is asked no more.
    """

    def __init__(
        self,
        servers: Sequence[Dealt],
        requests: Sequence[Request],
        lost: Callable[[Any, VllmServerError, bool], None],
        revive: Callable[[], Sequence[Dealt]],
        *,
        check: Callable[[int, list[VllmSample]], str] = lambda index, samples: "",
        patience: float = PATIENCE_S,
    ) -> None:
        self.requests, self.lost, self.revive, self.patience = requests, lost, revive, patience
        self.check = check
        self.hands = [Hand(server) for server in servers]
        self.resting: list[Hand] = []
        self.most = min(MOST_AT_ONCE, math.ceil(len(requests) / max(1, len(servers))))
        self.waiting = deque(range(len(requests)))
        self.left = set(self.waiting)
        self._outcomes: SimpleQueue[tuple[Hand, int, Any]] = SimpleQueue()

    def run(self, deliver: Callable[[int, list[VllmSample], Any], None]) -> None:
        """Call deliver(index, samples, server) once for each prompt. What is still asked elsewhere is broken off."""
        try:
            while self.left:
                self._deal()
                self._take(deliver)
        finally:
            for hand in (*self.hands, *self.resting):
                hand.connections.break_off()

    def _deal(self) -> None:
        while self.waiting and (free := [hand for hand in self.hands if len(hand.asked) < self.most]):
            index = self.waiting.popleft()
            if index in self.left:
                self._ask(min(free, key=lambda hand: len(hand.asked)), index)
        if not self.waiting and self._outcomes.empty():  # an answer that lies here is not late
            self._ask_idle()

    def _ask(self, hand: Hand, index: int) -> None:
        hand.asked[index] = time.monotonic()
        # A thread of its own, that nobody waits for: a server that hangs must not keep the process from ending.
        threading.Thread(target=self._answer, args=(hand, index), daemon=True).start()

    def _answer(self, hand: Hand, index: int) -> None:
        try:
            outcome: Any = hand.server.answer(self.requests[index], hand.connections)
        except Exception as fault:
            outcome = fault
        self._outcomes.put((hand, index, outcome))

    def _ask_idle(self) -> None:
        """Ask idle servers what another has had for too long; the first answer counts."""
        now = time.monotonic()
        for hand in self.hands:
            others = [other for other in self.hands if other is not hand]
            limit = max(self.patience, SLOWER * max((other.longest for other in others), default=0.0))
            idle = [other for other in others if not other.asked]
            late = [index for index, since in hand.asked.items() if now - since > limit and self._is_alone(index)]
            for other, index in zip(idle, late, strict=False):
                self._ask(other, index)

    def _is_alone(self, index: int) -> bool:
        return index in self.left and sum(index in hand.asked for hand in self.hands) == 1

    def _take(self, deliver: Callable[[int, list[VllmSample], Any], None]) -> None:
        """Wait a moment for an outcome: an answer, or a server's fault."""
        try:
            hand, index, outcome = self._outcomes.get(timeout=TICK_S)
        except Empty:
            return
        if hand not in self.hands:  # it was dropped meanwhile, and its prompts are asked of others
            return
        if isinstance(outcome, VllmServerError):
            self._drop(hand, outcome)
            return
        seconds = time.monotonic() - hand.asked.pop(index)
        if isinstance(outcome, Exception):
            raise outcome
        if index not in self.left:
            return
        if wrong := self.check(index, outcome):
            hand.asked[index] = time.monotonic()  # still open, so that it is dealt again
            self._drop(hand, VllmServerError(f"{hand.server.url} {wrong}."))
        else:
            self.left.discard(index)
            hand.longest = max(hand.longest, seconds)
            deliver(index, outcome, hand.server)
            self._drop_slower(index, seconds)

    def _drop_slower(self, index: int, seconds: float) -> None:
        """Ask a server no more that another one, asked later, has overtaken."""
        for hand in [hand for hand in self.hands if index in hand.asked]:
            waited = time.monotonic() - hand.asked[index]
            if waited <= seconds:  # it was asked second, and the first has answered after all
                continue
            fault = VllmServerError(
                f"{hand.server.url} is slow: it has had a prompt for {waited:.1f} s that another server has answered "
                f"in {seconds:.1f} s."
            )
            self._drop(hand, fault, is_slow=True)

    def _drop(self, hand: Hand, fault: VllmServerError, *, is_slow: bool = False) -> None:
        """Deal what the server was asked to the others; where there is none, to one that was only slow."""
        self.hands.remove(hand)
        hand.connections.break_off()
        open_elsewhere = {index for other in self.hands for index in other.asked}
        self.waiting.extendleft(index for index in hand.asked if index in self.left - open_elsewhere)
        if is_slow:
            self.resting.append(Hand(hand.server))
        elif not self.hands:
            self.hands, self.resting = self.resting, []
        self.lost(hand.server, fault, is_slow)
        if not self.hands:
            self.hands = [Hand(server) for server in self.revive()]
        self.most = max(self.most, min(MOST_AT_ONCE, math.ceil(len(self.left) / len(self.hands))))
