"""The pretended GPU refuses what a GPU refuses, and its graphs know no more than addresses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rehearsal.conftest import Play

pytestmark = pytest.mark.needs("pretended_gpu")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("mix with the CPU", "MixedDevicesError"),
        ("mix two cards", "MixedDevicesError"),
        ("a third card", "invalid device ordinal"),
        ("wait in a capture", "the host cannot wait for the GPU while a graph is captured"),
        ("copy in a capture", "a graph would read that main memory again at each replay"),
        ("another card in a capture", "is on cuda:1, and the graph is captured on cuda:0"),
        ("float64 on a Mac", "Apple's GPUs have none"),
    ],
)
def test_what_a_gpu_refuses_is_refused(act: str, words: str, play: Play) -> None:
    with pytest.raises(AssertionError, match=words):
        play("pretence", "T4", act=act)


def test_a_capture_computes_nothing_and_a_replay_does(play: Play) -> None:
    found = play("pretence", "T4", act="replay")
    assert found["before"] == [1, 1, 1]
    assert all(number != number for number in found["unwritten"])  # NaN
    assert found["x"] == [2, 2, 2]
    assert found["y"] == [2, 2, 2]


def test_a_graph_that_reads_memory_which_was_given_back_is_found(play: Play, tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError, match="has been given back since it was captured"):
        play("freed_weights", "T4", folder=str(tiny_folder()))
