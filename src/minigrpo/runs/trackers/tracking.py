"""Send steps to trackers from a thread of its own, so that none of them can stop a training or slow it down.

A tracker that fails is said once, and dropped; so is one that falls behind by more steps than are worth holding. By
which name each tracker knows the run stands in RUN/tracking/runs.json, so that a resumed run is continued there; up to
which step it was sent, in sent.json, so that what a kill kept from a tracker is sent when the run goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from math import isfinite
from queue import Full, Queue
from typing import Any

from minigrpo.config.portable import portable_knobs
from minigrpo.config.schema import TrackConfig, tracker_names
from minigrpo.errors import ArtifactError, MinigrpoError, install_hint
from minigrpo.runs.rundir import RunDir, make_folder, read_json, write_json
from minigrpo.runs.trackers.adapters import ADAPTERS, Row, TrackedRun, Tracker

TABLE_EVERY = 10
"""Steps from one table of completions to the next."""
MOST_ROWS = 64
"""Completions of a table: those of the step's first groups."""
MOST_WAITING = 256
"""Steps that wait to be sent; of further ones nothing is sent."""
CLOSING = 30.0
"""Seconds for which the end of a training waits for its trackers."""

Item = tuple[int, Mapping[str, float], Sequence[Row]]


def require_trackers(config: TrackConfig) -> None:
    """Raise MinigrpoError where a tracker that the recipe names is not installed."""
    for name in tracker_names(config):  # each is its library's name, too
        if find_spec(name) is None:
            raise MinigrpoError(f"track.to names {name}, which is not installed: {install_hint(name)}")


class Tracking:
    """The trackers of one training."""

    def __init__(
        self,
        run: RunDir,
        config: TrackConfig,
        knobs: Mapping[str, Any],
        *,
        adapters: Mapping[str, Callable[[], Tracker]] = ADAPTERS,
        closing: float = CLOSING,
    ) -> None:
        self._run, self._config, self._closing = run, config, closing
        self._knobs = portable_knobs(knobs)
        self._waiting: dict[str, Callable[[], Tracker]] = {name: adapters[name] for name in tracker_names(config)}
        self._queue: Queue[Item | None] = Queue(MOST_WAITING)
        self._say: Callable[[str], None] = lambda text: None
        self._open: dict[str, Tracker] = {}
        self._sent: dict[str, int] = {}
        self._is_behind = False
        self._thread: threading.Thread | None = None

    def begin(
        self,
        done: int,
        say: Callable[[str], None],
        logged: Callable[[], Iterable[Mapping[str, Any]]] = tuple,
    ) -> None:
        """Open the trackers, in their thread. `done`: steps that are finished, whose figures are `logged`; `say`: tells
        whoever watches."""
        self._say = say
        if self._waiting:
            self._thread = threading.Thread(target=self._work, args=(done, logged), name="trackers", daemon=True)
            self._thread.start()

    def send(self, step: int, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Hand over a step; returns at once. `rows`: its lines of groups.jsonl."""
        if self._thread is None:
            return
        figures = _figures(metrics)
        table = list(_table(step, rows)) if step == 1 or step % TABLE_EVERY == 0 else []
        try:
            self._queue.put_nowait((step, figures, table))
        except Full:
            if not self._is_behind:
                self._is_behind = True
                self._say(f"Trackers are {MOST_WAITING} steps behind, so they miss steps from {step} on.")

    def end(self) -> None:
        """Wait a moment until all is sent."""
        if self._thread is None:
            return
        with suppress(Full):
            self._queue.put(None, timeout=self._closing)
        self._thread.join(timeout=self._closing)
        if self._thread.is_alive():
            self._say(f"Trackers were still sending {self._closing:g} seconds after the training's end: left behind.")
        self._thread = None

    def _work(self, done: int, logged: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        known = self._read("runs.json")
        self._sent = {name: min(done, step) for name, step in self._read("sent.json").items()}
        for name, adapter in self._waiting.items():
            with self._surviving(name):
                tracker = adapter()
                known[name] = tracker.open(self._about(self._sent.get(name, 0), known.get(name)))
                self._open[name] = tracker
                write_json(self._run.tracking / "runs.json", known)
        self._catch_up(done, logged)
        while (item := self._queue.get()) is not None:
            for name, tracker in list(self._open.items()):
                with self._surviving(name):
                    tracker.log(*item)
                    self._sent[name] = item[0]
            write_json(self._run.tracking / "sent.json", self._sent)
        for name, tracker in list(self._open.items()):
            with self._surviving(name):
                tracker.close()

    def _catch_up(self, done: int, logged: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Send the figures of finished steps that a tracker has not got: the run was killed before it was open, or
        while they waited. Their completions stand in the run's log alone."""
        for name, tracker in list(self._open.items()):
            sent = self._sent.get(name, 0)
            rows = (row for row in logged() if sent < row["step"] <= done) if sent < done else ()
            with self._surviving(name):
                for row in rows:
                    tracker.log(int(row["step"]), _figures(row), [])
                    self._sent[name] = int(row["step"])
        write_json(self._run.tracking / "sent.json", self._sent)

    def _about(self, sent: int, known: str | None) -> TrackedRun:
        make_folder(self._run.tracking)
        name = self._run.path.absolute().name
        project, offline = self._config.project, self._config.offline
        return TrackedRun(name, project, self._knobs, self._run.tracking, sent + 1, offline, known)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = read_json(self._run.tracking / name)
        except ArtifactError:
            return {}
        return found if isinstance(found, dict) else {}

    def _surviving(self, name: str) -> _Surviving:
        return _Surviving(self, name)

    def drop(self, name: str, fault: BaseException) -> None:
        """Go on without a tracker."""
        self._open.pop(name, None)
        words = " ".join(str(fault).split())[:200]
        self._say(f"The tracker {name} failed, and the run goes on without it: {type(fault).__name__}: {words}")


class _Surviving:
    """Drops a tracker for whatever it raises in the block."""

    def __init__(self, tracking: Tracking, name: str) -> None:
        self._tracking, self._name = tracking, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: object) -> bool:
        if fault is not None:
            self._tracking.drop(self._name, fault)
        return True


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if name != "step" and _is_finite(value)}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def _table(step: int, rows: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Yield the completions of the first groups, each in the order of COLUMNS."""
    count = 0
    for row in rows:
        asked = (row.get("messages") or [{}])[-1]
        prompt = str(asked.get("content", ""))
        for each in row["completions"]:
            if count == MOST_ROWS:
                return
            count += 1
            text = f"{each.get('opening', '')}{each['text']}".encode("utf-8", "replace").decode()
            right, tokens, finish = bool(each["solved"]), each["tokens"], each["finish"]
            yield step, prompt, text, _number(each["reward"]), _number(each["advantage"]), right, tokens, finish


def _number(value: Any) -> float | None:
    return float(value) if _is_finite(value) else None
