"""Notice a rank that was lost, and end this one with a sentence in place of waiting for it.

Every second each rank leaves a beat in the store that all of them share: a count, and what it is doing. A thread of
each watches the rank after it, in a ring, so that the store's work grows with the ranks, not with their square. A rank
whose process is gone, or whose count stands still for `silence` seconds, is lost; whoever finds that leaves a verdict,
which all read. A rank that ends with an error of its own leaves one, too, so that the others need not guess. That a
rank was lost is said at once, before anything follows from it: the launcher ends the others as soon as one has ended.

A process that stood still itself, and with it its clock, accuses nobody: it listens for another `silence` first.

Where a cable is pulled, the store's connection is not closed: whoever asks it waits for minutes. So a second thread
watches the first, and after `silence` seconds in which it has heard nothing ends the process in its place; what started
the process is looked after, too (`stuck_launcher`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from minigrpo.distributed.stuck_launcher import leave_guard
from minigrpo.errors import MinigrpoError, RankLostError, more_at
from minigrpo.utils.signals import is_alive

BEAT_S = 1.0
"""Seconds between beats."""
SILENCE_S = 30.0
"""Seconds without a beat after which a rank is lost. A machine that swaps holds a thread up for seconds, not for these;
MINIGRPO_SILENCE in the environment replaces them."""
GRACE_S = 5.0
"""Seconds in which the training itself may end, and say why, before the watch ends the process."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself. `done`: it has ended as it should."""

    count: int
    host: str
    pid: int
    phase: str
    done: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why the job ends: the rank, and the sentence. `code`: the exit code for all ranks."""

    rank: int
    sentence: str
    code: int
    lost: bool


class Watch:
    """Leaves this rank's beats and watches the next rank's, in a thread. `phase` is what this rank does now."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        *,
        silence: float = SILENCE_S,
        end: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.silence, self._end_process, self._clock = silence, end, clock
        self._me = Beat(0, socket.gethostname(), os.getpid(), "starting")
        self.verdict: Verdict | None = None
        self._told: Verdict | None = None
        self._telling = threading.Lock()
        self._found = threading.Event()
        self._closed = threading.Event()
        self._next = (rank + 1) % size
        self._heard: tuple[int, float] = (-1, clock())
        self._last = self._store_answered = clock()
        self._looked = self._guarded = clock()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._run, "watch of the ranks"), (self._guard, "guard of the watch"))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def at(self, phase: str) -> None:
        self._me = replace(self._me, phase=phase)

    def close(self, fault: BaseException | None) -> None:
        """Tell the others that this rank has ended, and why. They end, too, where it was not as it should."""
        self._closed.set()
        if fault is None:
            with suppress(RuntimeError):
                self._leave(replace(self._me, done=True))
        elif self.verdict is None:
            what = str(fault) if isinstance(fault, MinigrpoError) else f"{type(fault).__name__}: {fault}"
            sentence = (
                f"Rank {self.rank} (process {self._me.pid} on {self._me.host}) ended while {self._me.phase}: {what}"
            )
            self._judge(Verdict(self.rank, sentence, exit_code(fault), lost=False))
        elif self.verdict.rank < 0:
            leave_guard()
        if fault is not None:  # a wire that is broken may not let the process end
            timer = threading.Timer(2 * GRACE_S, self._end_process, [exit_code(fault)])
            timer.daemon = True
            timer.start()

    def speaks(self, fault: BaseException) -> bool:
        """Tell whether this rank tells the user of an error: one does, and the others would repeat it."""
        if self._told is not None and str(fault) == self._told.sentence:
            return False
        if self.verdict is None or self.verdict.rank == self.rank:
            return self.rank == 0
        return self._is_speaker(self.verdict)

    def explain(self, why: str) -> NoReturn:
        """Raise what broke a connection: the verdict, for which it waits, or that nobody came in time."""
        self._found.wait(self.silence + 3 * BEAT_S)
        if self.verdict is None:
            raise RankLostError(f"The ranks lost touch while {self._me.phase}, and none is missing: {why}")
        fault = RankLostError(self.verdict.sentence)
        fault.exit_code = self.verdict.code
        raise fault

    def _run(self) -> None:
        while not self._closed.wait(BEAT_S):
            self.look()
            if self.verdict is not None:
                self._end(self.verdict)

    def _guard(self) -> None:
        while not self._closed.wait(BEAT_S):
            found = self.check_store()
            if found is not None:
                self._end(found)

    def check_store(self) -> Verdict | None:
        """Judge a store that has let `look` wait for `silence` seconds: what the second thread does every second.

        Return the verdict that it comes to; None as long as there is none, or there was one before.
        """
        now = self._clock()
        if now - self._guarded > max(self.silence / 2, 2 * BEAT_S):  # this process stood still, not the store
            self._looked = now
        self._guarded = now
        if self.verdict is not None or now - self._looked <= self.silence:
            return None
        self._conclude(self._store_lost(f"no word for {now - self._looked:.0f} s"))
        return self.verdict

    def _store_lost(self, why: str) -> Verdict:
        sentence = f"What started the ranks does not answer any more ({why}); rank {self.rank} on {self._me.host}"
        return Verdict(-1, f"{sentence} was {self._me.phase}. {GO_ON}", LOST, lost=True)

    def look(self) -> None:
        """Leave a beat, read what there is to read, and judge: what the thread does every second."""
        now = self._clock()
        if now - self._last > max(self.silence / 2, 2 * BEAT_S):  # this process stood still, or its machine did
            self._heard, self._store_answered = (self._heard[0], now), now
        self._last = now
        try:
            self._beat(now)
            self._store_answered = now
        except RuntimeError as fault:  # the store's process is gone, or stands still
            if now - self._store_answered > min(self.silence, 3 * BEAT_S):
                why = f"{type(fault).__name__}: {str(fault).partition(chr(10))[0][:120]}"
                self._conclude(self._store_lost(why))
        self._looked = self._clock()

    def _beat(self, now: float) -> None:
        self._leave(replace(self._me, count=self._me.count + 1))
        if self.store.check(["verdict"]):
            self._conclude(Verdict(**json.loads(self.store.get("verdict"))))
        elif self.store.check([f"beat/{self._next}"]):
            self._listen(Beat(**json.loads(self.store.get(f"beat/{self._next}"))), now)

    def _leave(self, beat: Beat) -> None:
        self._me = replace(self._me, count=beat.count)
        self.store.set(f"beat/{self.rank}", json.dumps(asdict(beat)))

    def _listen(self, beat: Beat, now: float) -> None:
        if beat.done:
            return
        here = beat.host == self._me.host
        if beat.count != self._heard[0]:
            self._heard = (beat.count, now)
        gone = here and not is_alive(beat.pid)
        if not gone and now - self._heard[1] <= self.silence:
            return
        what = "is gone" if gone else f"has not been heard of for {now - self._heard[1]:.0f} s"
        sentence = f"Rank {self._next} (process {beat.pid} on {beat.host}) {what}; it was {beat.phase}. {GO_ON}"
        self._judge(Verdict(self._next, sentence, LOST, lost=True))
        if here and not gone:
            # It stands still, so no gentler signal would reach it; and until it ends its launcher waits for it.
            with suppress(ProcessLookupError, PermissionError):
                os.kill(beat.pid, signal.SIGKILL)

    def _judge(self, verdict: Verdict) -> None:
        """Leave a verdict for all ranks, unless there is one, and take up the one that counts."""
        with suppress(RuntimeError):
            self.store.compare_set("verdict", "", json.dumps(asdict(verdict)))
            verdict = Verdict(**json.loads(self.store.get("verdict")))
        self._conclude(verdict)

    def _conclude(self, verdict: Verdict) -> None:
        self.verdict = self.verdict or verdict
        if self.verdict.lost:
            self._tell(self.verdict)
        self._found.set()

    def _tell(self, verdict: Verdict) -> None:
        """Tell the user of a verdict, once, where this is the rank that does."""
        with self._telling:
            if self._told is not None or not self._is_speaker(verdict):
                return
            self._told = verdict
            print(f"error: {verdict.sentence}\n{more_at(RankLostError.entry)}", file=sys.stderr, flush=True)

    def _end(self, verdict: Verdict) -> None:
        """End the process, unless the training ends by itself first: it may be in the midst of the same error."""
        if self._closed.wait(GRACE_S):
            return
        self._tell(verdict)
        if verdict.rank < 0:
            leave_guard()
        self._end_process(verdict.code)

    def _is_speaker(self, verdict: Verdict) -> bool:
        if verdict.rank < 0 or not verdict.lost:
            return self.rank == 0 or verdict.rank < 0
        return self.rank == min({*range(self.size)} - {verdict.rank})


LOST = RankLostError.exit_code
GO_ON = "The same command with --resume goes on from the newest checkpoint."


def exit_code(fault: BaseException) -> int:
    """Return the code with which a process ends that is ended by this."""
    if isinstance(fault, SystemExit):
        return fault.code if isinstance(fault.code, int) else 1
    if isinstance(fault, KeyboardInterrupt):
        return 130
    return fault.exit_code if isinstance(fault, MinigrpoError) else 1
