"""A run in which memory ran out goes on smaller, says so once, and learns the same; a run that was killed, only if that
was why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.models.policy import open_policy
from minigrpo.rollouts.engines.registry import open_engine
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.training import checkpoint
from minigrpo.training.grpo import grpo
from minigrpo.training.oom import NOTE
from tests.training.test_grpo import letters, recipe_for


def train(folder: Path, run: RunDir, *, steps: int = 2, most_rows: int = 1 << 30) -> None:
    """Train with an engine whose memory holds so many rows."""
    recipe = recipe_for(folder, steps=steps)
    policy = open_policy(recipe)
    engine: Any = open_engine(policy, recipe, rows=12)
    decode = engine.decoder.decode

    def decode_some(input_n: Any, *more: Any) -> Any:
        if len(input_n) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(input_n, *more)

    engine.decoder.decode = decode_some
    run.path.mkdir(exist_ok=True)
    grpo(recipe, letters(), policy, engine, RunLogger(run, steps))


def sampled(run: RunDir) -> list[Any]:
    return [json.loads(line)["completions"] for line in run.groups.read_text().splitlines()]


def test_a_rollout_without_memory_costs_rows_and_no_token_and_a_resumed_run_begins_with_as_few(
    tiny_folder: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folder()
    ample, scarce = RunDir(tmp_path / "ample"), RunDir(tmp_path / "scarce")
    train(folder, ample)
    assert "Memory" not in capfd.readouterr().err
    train(folder, scarce, most_rows=4)
    assert capfd.readouterr().err.count("Memory ran out in a rollout: going on with 6 rows side by side.") == 1
    assert sampled(scarce) == sampled(ample)
    machine = checkpoint.read_machine(scarce)
    assert machine is not None
    assert machine.rows == 6


@pytest.mark.parametrize(
    ("note", "words", "tokens"),
    [
        ({"step": 1, "earlier": [], "kills": None}, "Nothing says that memory was the reason", 90),
        ({"step": 1, "earlier": [0, 1], "kills": None}, "second time in the same step: going on with passes of 45", 45),
    ],
)
def test_a_killed_run_halves_its_passes_only_where_memory_was_the_reason(
    note: dict[str, Any],
    words: str,
    tokens: int,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, run = tiny_folder(), RunDir(tmp_path / "run")
    train(folder, run, steps=1)
    (run.path / NOTE).write_text(json.dumps(note))  # as a kill in an update leaves it
    train(folder, run, steps=2)
    assert words in capfd.readouterr().err
    machine = checkpoint.read_machine(run)
    assert machine is not None
    assert machine.tokens_per_pass == tokens
    assert not (run.path / NOTE).exists()


def test_a_note_remembers_in_which_steps_the_run_was_killed_before(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kills in one step are told apart from two in different ones, whatever lies between them."""
    folder, run = tiny_folder(), RunDir(tmp_path / "run")
    train(folder, run, steps=1)
    (run.path / NOTE).write_text(json.dumps({"step": 7, "earlier": [3], "kills": None}))
    written: list[dict[str, Any]] = []
    monkeypatch.setattr("minigrpo.training.supervisor.free_before_kill", lambda device: 0)
    monkeypatch.setattr("minigrpo.training.oom.write_json", lambda file, data: written.append(data))
    train(folder, run, steps=2)
    assert [note["step"] for note in written] == [1]
    assert written[0]["earlier"] == [3, 7]
