"""Whoever waits sees what is done and how far it is: a line soon, and then at least every ten seconds."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from minigrpo.models.policy import Policy
from minigrpo.rollouts.engines.cuda_graph import SlotEngine
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.rollouts.engines.transformers import TransformersEngine
from minigrpo.types import Engine, Sampling
from minigrpo.ui import heartbeat
from minigrpo.ui.heartbeat import Heartbeat
from minigrpo.ui.live import PlainLog, Snapshot, time_left
from minigrpo.ui.progress import _StageLines, stage
from tests.helpers.models import make_policy, rendered

ENGINES: dict[str, Callable[[Policy], Engine]] = {
    "native": lambda policy: NativeEngine(policy, stop_ids=[3, 17, 50, 60], rows=8),
    "slots": lambda policy: SlotEngine(policy, stop_ids=[3, 17, 50, 60], rows=8),
    "transformers": lambda policy: TransformersEngine(policy, stop_ids=[3, 17, 50, 60], rows=8),
}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Heartbeat.__init__, "__kwdefaults__", {"first": 0.05, "every": 0.1})


def test_a_silent_stage_is_heard_soon_and_again_and_not_after_its_end() -> None:
    console = Console(file=io.StringIO(), width=200)
    with stage("merge", 3, console) as report:
        time.sleep(0.4)
        report(1, note="layer 1")
        time.sleep(0.4)
    ended = console.file.getvalue()  # type: ignore[attr-defined]
    lines = ended.splitlines()
    assert lines[0] == "merge: 0s so far"
    assert sum(line.startswith("merge: 1/3  layer 1,") for line in lines) >= 2
    assert lines[-1].startswith("merge: done in")
    time.sleep(0.3)
    assert console.file.getvalue() == ended  # type: ignore[attr-defined]


def test_work_that_reports_often_is_not_interrupted_by_other_lines() -> None:
    beats: list[float] = []
    with Heartbeat(lambda: beats.append(time.monotonic()), first=0.2, every=0.2) as heart:
        for _ in range(30):
            time.sleep(0.02)
            heart.touch()
    assert beats == []


def test_a_training_step_that_lasts_says_what_it_does() -> None:
    console = Console(file=io.StringIO(), width=200)
    view = PlainLog(console, 60)
    view.open(Snapshot(step=2))
    view.set_activity("sampling: 3 of 16 completions ended, 412 tokens, 18 a second")
    time.sleep(0.2)
    view.close()
    first = console.file.getvalue().splitlines()[0]  # type: ignore[attr-defined]
    assert first == "step 3/60: sampling: 3 of 16 completions ended, 412 tokens, 18 a second, 0s so far"
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_the_first_piece_of_many_foretells_nothing() -> None:
    assert [time_left(done, 1450, 7.0) for done in (0, 1, 14, 1450)] == [""] * 4
    assert time_left(15, 1450, 9.0) == "14m21s left"
    assert time_left(1, 5, 9.0) == "36s left"
    assert time_left(3, 0, 9.0) == ""


def test_a_long_stage_tells_no_time_from_its_first_piece_alone() -> None:
    console = Console(file=io.StringIO(), width=200)
    with stage("model", 1450, console) as report:
        report(0, note="a tokenizer")
        time.sleep(0.12)
        for done in (1, 100):
            report(done)
            time.sleep(0.2)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "model: 1/1450," in told  # a heartbeat, with what has passed
    assert "1/1450, 0s left" not in told
    assert not re.search(r" 1/1450, \S+ left", told)
    assert re.search(r"100/1450, \S+ left", told)


def test_what_was_done_before_the_first_piece_does_not_count_for_the_time_left() -> None:
    console = Console(file=io.StringIO(), width=200)
    lines = _StageLines("warmup", 30, console, every=0.0)
    with lines.heartbeat:
        lines.began = lines.counted_from = lines.last = time.monotonic() - 600  # ten minutes of measuring
        lines.report(0, note="supervised steps begin")
        lines.report(1, note="loss 1.11")
    assert "1/30, 0s left  loss 1.11" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_waits_are_those_that_are_promised() -> None:
    assert heartbeat.FIRST_S <= 5
    assert heartbeat.EVERY_S <= 10


@pytest.mark.parametrize("opener", ENGINES.values(), ids=ENGINES)
def test_an_engine_tells_how_far_it_is(opener: Callable[[Policy], Engine]) -> None:
    told: list[tuple[int, int]] = []
    answers = opener(make_policy()).generate(
        rendered(), 4, Sampling(0.9, 50, 7), progress=lambda tokens, ended: told.append((tokens, ended))
    )
    completions = [completion for own in answers for completion in own]
    assert told == sorted(told), "neither figure ever falls"
    assert told[-1][1] == len(completions)
    assert told[-1][0] >= sum(len(completion.token_ids) for completion in completions)
    assert len(told) > 3
