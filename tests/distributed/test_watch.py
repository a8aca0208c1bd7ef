"""A lost rank is noticed and named: by its process, by its silence, by what it said at its end."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from minigrpo.distributed.place import Place
from minigrpo.distributed.ranks import ALONE
from minigrpo.distributed.watch import Beat, Watch
from minigrpo.errors import RankLostError, TaskError


class Store(dict[str, str]):
    """What torch's store does, in memory."""

    def set(self, name: str, text: str) -> None:
        self[name] = text

    def check(self, names: list[str]) -> bool:
        return all(name in self for name in names)

    def compare_set(self, name: str, expected: str, text: str) -> str:
        if self.get(name, "") == expected:
            self[name] = text
        return self[name]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@contextlib.contextmanager
def process() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        yield child
        child.kill()


def watch_of(store: Store, clock: Clock, **options: Any) -> Watch:
    return Watch(store, 0, 2, silence=30.0, clock=clock, **options)


def beat(pid: int, count: int = 1, host: str | None = None) -> str:
    return json.dumps(asdict(Beat(count, host or socket.gethostname(), pid, "in the rollout of step 7")))


def after(watch: Watch, clock: Clock, seconds: int) -> Watch:
    for _ in range(seconds):
        clock.now += 1
        watch.look()
    return watch


def test_a_rank_that_stands_still_is_named_with_its_machine_and_what_it_did_before_it_is_ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: as soon as it has ended, its launcher ends the rank that would tell, too."""
    store, clock, said, kill = Store(), Clock(), [], os.kill

    def read_and_kill(pid: int, number: int) -> None:
        said.append(capsys.readouterr().err)
        kill(pid, number)

    monkeypatch.setattr("minigrpo.distributed.watch.os.kill", read_and_kill)
    monkeypatch.setattr("minigrpo.distributed.watch.is_alive", lambda pid: True)
    with process() as child:
        store["beat/1"] = beat(child.pid)
        watch = after(watch_of(store, clock), clock, 31)
        assert watch.verdict is None
        with pytest.raises(RankLostError) as told:
            after(watch, clock, 2).explain("")
        assert child.wait(10) == -9
    for words in ("Rank 1", socket.gethostname(), "in the rollout of step 7", "--resume", "for 31 s"):
        assert words in str(told.value)
    assert json.loads(store["verdict"])["rank"] == 1
    assert len(said) == 1
    assert said[0].startswith(f"error: {told.value}\nMore: ")
    assert not watch.speaks(told.value)  # it is told
    assert watch.speaks(TaskError("The grader raised."))
    after(watch, clock, 9)
    assert not capsys.readouterr().err


def test_a_process_that_is_gone_is_noticed_at_once_and_one_elsewhere_when_it_is_silent() -> None:
    store, clock = Store(), Clock()
    with process() as child:
        pass
    store["beat/1"] = beat(child.pid)
    assert after(watch_of(store, clock), clock, 1).verdict.lost  # type: ignore[union-attr]
    elsewhere = Store({"beat/1": beat(child.pid, host="another")})
    watch = after(watch_of(elsewhere, clock), clock, 29)
    assert watch.verdict is None
    assert after(watch, clock, 5).verdict is not None


def test_beats_keep_a_rank_alive_and_who_stood_still_itself_accuses_nobody() -> None:
    store, clock = Store(), Clock()
    with process() as child:
        watch = watch_of(store, clock)
        for count in range(100):
            store["beat/1"] = beat(child.pid, count)
            after(watch, clock, 1)
        clock.now += 3600  # a laptop was closed
        assert after(watch, clock, 20).verdict is None
        assert after(watch, clock, 20).verdict is not None


def test_what_one_rank_ends_with_is_what_the_others_end_with() -> None:
    store, clock = Store(), Clock()
    first, second = (Watch(store, rank, 2, clock=clock, end=print) for rank in range(2))
    second.at("in the update of step 3")
    fault = TaskError("The grader raised.")
    second.close(fault)
    assert not second.speaks(fault)  # the leading rank tells
    with pytest.raises(RankLostError) as told:
        after(first, clock, 1).explain("")
    assert told.value.exit_code == 2
    assert "Rank 1" in str(told.value)
    assert "in the update of step 3" in str(told.value)
    assert str(fault) in str(told.value)
    assert first.speaks(told.value)


def test_a_rank_that_has_ended_well_is_not_missed() -> None:
    store, clock = Store(), Clock()
    Watch(store, 1, 2, clock=clock).close(None)
    assert after(watch_of(store, clock), clock, 100).verdict is None


def test_a_store_that_is_gone_ends_the_rank_with_a_sentence() -> None:
    class Gone(Store):
        def set(self, name: str, text: str) -> None:
            raise RuntimeError("Connection reset by peer")

    clock = Clock()
    watch = watch_of(Gone(), clock)
    assert after(watch, clock, 3).verdict is None
    assert "What started the ranks does not answer" in after(watch, clock, 2).verdict.sentence  # type: ignore[union-attr]


def test_a_store_that_lets_everybody_wait_is_found_by_a_second_thread() -> None:
    """A cable that is pulled closes no connection: the call in `look` does not return."""
    clock, ended = Clock(), []
    watch = watch_of(Store(), clock, end=ended.append)
    watch.at("in the update of step 3")
    after(watch, clock, 1)
    for _ in range(30):
        clock.now += 1
        watch.check_store()
    assert watch.verdict is None
    clock.now += 1
    watch.check_store()
    assert watch.verdict is not None
    for words in ("does not answer any more (no word for 31 s)", "rank 0 on", "in the update of step 3", "--resume"):
        assert words in watch.verdict.sentence
    still = watch_of(Store(), clock)
    clock.now += 100  # the process itself was stopped
    still.check_store()
    assert still.verdict is None


def test_a_process_alone_has_no_place_among_ranks_and_sends_nothing() -> None:
    several = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}
    place = Place.of(several)
    assert place is not None
    assert (place.rank, place.size, place.attempt) == (1, 2, 0)
    assert Place.of({**several, "WORLD_SIZE": "1"}) is None
    assert Place.of(dict(os.environ)) is None
    data = object()
    assert ALONE.gather("figures", data) == [data]
    assert ALONE.take_sent() == {}
