"""Apple's GPU, pretended: it has no float64, and samples and trains in float32 as the CPU does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rehearsal.conftest import Play
from tests.rehearsal.test_engines import ids
from tests.rehearsal.test_training import CLOSE

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


def test_a_mac_trains_as_the_cpu_does_and_resumes(play: Play, tiny_folder: Folder) -> None:
    found = play("train", "T4", recipe="gsm8k-fast", folder=str(tiny_folder()), changes={"model.device": "mps"})
    assert (found["device"][:3], found["dtype"], found["engine"]) == ("mps", "float32", "native")
    first, on_cpu = found["whole"]["figures"][0], found["cpu"]["figures"][0]
    assert found["whole"]["texts"][: len(found["cpu"]["texts"])] == found["cpu"]["texts"]
    for name, (relative, absolute) in CLOSE.items():
        assert first[name] == pytest.approx(on_cpu[name], rel=relative, abs=absolute), name
    assert found["resumed"] == found["whole"]
