"""Engines say on a pretended GPU what they say on the CPU, token for token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rehearsal.conftest import Play

pytestmark = pytest.mark.needs("pretended_gpu")

Folder = Callable[..., Path]


@pytest.mark.parametrize("engine", ["native", "slots", "transformers"])
def test_each_engine_says_what_it_says_on_the_cpu(engine: str, play: Play, tiny_folder: Folder) -> None:
    found = play("engines", "T4", folder=str(tiny_folder()), engine=engine, dtype="float32")
    assert found["device"] == "cuda:0"
    assert found["launches"] > 100
    assert (found["replays"] > 50) == (engine == "slots")
    assert ids(found["gpu"]) == ids(found["cpu"])
    assert ids(found["gpu"][:1]) != ids(found["gpu"][1:])  # the second round has other weights


def ids(rounds: list[list[list[list[object]]]]) -> list[object]:
    return [[tokens, finish] for round_ in rounds for own in round_ for tokens, _, finish in own]
