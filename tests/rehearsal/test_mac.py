"""Apple's GPU, pretended: it has no float64, and samples what the CPU does.

Not here: training. autograd in a torch for Linux knows no stream of "mps", and breaks off a backward pass there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rehearsal.conftest import Play
from tests.rehearsal.test_engines import ids

pytestmark = pytest.mark.needs("pretended_gpu")

Folder = Callable[..., Path]


@pytest.mark.parametrize("engine", ["auto", "slots", "transformers"])
def test_each_engine_says_on_a_mac_what_it_says_on_the_cpu(engine: str, play: Play, tiny_folder: Folder) -> None:
    taken = "native" if engine == "auto" else engine
    found = play("engines", "T4", folder=str(tiny_folder()), engine=engine, dtype="auto", device="mps")
    assert (found["device"][:3], found["dtype"], found["engine"]) == ("mps", "float32", taken)
    assert found["launches"] > 100
    assert not found["graphs"]
    assert ids(found["gpu"]) == ids(found["cpu"])
    assert ids(found["gpu"][:1]) != ids(found["gpu"][1:])


def test_bfloat16_says_the_same_where_it_is_asked_for(play: Play, tiny_folder: Folder) -> None:
    found = play("engines", "T4", folder=str(tiny_folder()), engine="auto", dtype="bfloat16", device="mps")
    assert (found["device"][:3], found["dtype"], found["engine"]) == ("mps", "bfloat16", "native")
    assert ids(found["gpu"]) == ids(found["cpu"])
    assert ids(found["gpu"][:1]) != ids(found["gpu"][1:])
