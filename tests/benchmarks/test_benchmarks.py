"""The harness that compares with TRL: it forces the stop lengths that it promises, and both sides do the same work."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import harness, proof, sweeps, trls
from benchmarks.harness import same_work, spins_of_trl
from benchmarks.machine import busy_neighbours, busy_seconds
from benchmarks.ours import recipe_of
from benchmarks.report import OURS, TRL, Result, show
from benchmarks.report import Side as Measured
from benchmarks.sides import BenchmarkError, Setup, Side, Step
from benchmarks.workloads import WORKLOADS, spread, stop_lengths, task_of
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.types import Prompt
from minigrpo.utils.spinning import SPIN_COUNT


def test_stop_lengths_are_the_published_draw() -> None:
    """Log-normal, median 0.3 of the limit, sigma 0.6, cut at the limit, fixed seed."""
    many = stop_lengths(20_000, 1000)
    assert statistics.median(many) == pytest.approx(300, rel=0.02)
    below = statistics.quantiles(many, n=1000)[158]  # one sigma below the median: 15.9 %
    assert below == pytest.approx(300 * 2.71828**-0.6, rel=0.03)
    assert max(many) == 1000
    assert sum(length == 1000 for length in many) / len(many) == pytest.approx(0.0224, abs=0.004)
    assert stop_lengths(16, 64) == stop_lengths(16, 64)
    assert stop_lengths(6, 64) == (17, 20, 29, 18, 45, 8)


def test_a_fixed_length_holds_as_many_tokens_as_the_draw() -> None:
    drawn, fixed = stop_lengths(64, 64), stop_lengths(64, 64, "fixed")
    assert len(set(fixed)) == 1
    assert sum(fixed) == pytest.approx(sum(drawn), abs=len(fixed) / 2)


def test_no_group_can_tie() -> None:
    prompt = Prompt("p", ({"role": "user", "content": "say"},))
    rewards = {spread(prompt, text).reward for text in ("a", "b", "", "a ")}
    assert len(rewards) == 4
    assert all(0 <= reward < 1 for reward in rewards)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("bench")
    workload = WORKLOADS["mini"]
    workload.kind.make(folder / "mini")
    return Setup(workload, folder / "mini", folder / "runs", threads=1, dtype="float32", steps=2)


def test_minigrpo_stops_exactly_where_it_is_told(setup: Setup) -> None:
    from benchmarks.ours import open_engine
    from minigrpo.models.policy import open_policy
    from minigrpo.rollouts.groups import rollout
    from minigrpo.types import Sampling

    recipe = recipe_of(setup)
    policy = open_policy(recipe)
    engine = open_engine(setup, policy, recipe.rollout.rows)
    assert isinstance(engine, NativeEngine)
    task = task_of(setup.workload, setup.folder)
    asked = {"n": setup.workload.completions, "sampling": Sampling(max_tokens=setup.workload.limit)}
    groups = rollout(engine, task, task.prompts("train"), tokenizer=policy.tokenizer, **asked)
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    assert tuple(lengths) == setup.workload.lengths_B
    assert {len(group.prompt_ids) for group in groups} == {150}


@pytest.mark.extra("bench")
def test_trl_stops_exactly_where_it_is_told() -> None:
    """The processor bars the stop token until a row is due, and then leaves it nothing else."""
    from benchmarks.trls import stop_processor

    process = stop_processor((2, 1, 3), eos=4)
    for token, due in ((1, [1]), (2, [0]), (3, [2])):
        scores_BV = process(torch.zeros(3, token), torch.randn(3, 6))
        probs_BV = scores_BV.softmax(-1)
        assert [row for row in range(3) if probs_BV[row, 4] == 1] == due
        assert [row for row in range(3) if probs_BV[row, 4] == 0] == [row for row in range(3) if row not in due]


@pytest.mark.extra("bench")
@pytest.mark.long
@pytest.mark.parametrize("variant", ["defaults", "continuous"])
def test_every_way_to_set_trl_does_the_same_work(setup: Setup, variant: str) -> None:
    """The long claim: each loads, generates the forced lengths, and takes its step."""
    chosen = replace(setup, variant=variant, dtype=trls.weights_of(variant, "float32"))
    with Side(variant, trls.run, chosen) as side:
        step = side.step()
    assert step.completion_lengths == setup.workload.lengths_B
    asked = side.facts["gradient_checkpointing"], side.facts["use_transformers_continuous_batching"]
    assert asked == {"defaults": ("True", "False"), "continuous": ("False", "True")}[variant]


def test_how_a_user_wants_threads_to_wait_holds_for_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", SPIN_COUNT)
    assert (spins_of_trl(0), spins_of_trl(1)) == (300_000, 1_000)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert (spins_of_trl(0), spins_of_trl(1)) == (None, None)


def test_a_way_that_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert trls.VARIANTS["vllm"].missing(WORKLOADS["tiny"]) == "vLLM is not installed"
    assert all(trls.VARIANTS[name].missing(WORKLOADS["tiny"]) is None for name in ("best", "defaults", "continuous"))


def test_without_autocast_the_weights_have_the_type_of_the_products() -> None:
    assert trls.weights_of("best", "float32+autocast") == "float32+autocast"
    assert trls.weights_of("continuous", "float32+autocast") == "float32"
    assert trls.weights_of("continuous", "bfloat16+autocast") == "bfloat16"


def test_different_work_is_refused() -> None:
    def step(*lengths: int) -> Step:
        return Step(1.0, 1.0, {}, (3,) * len(lengths), lengths, 0)

    same_work((2, 4), step(2, 4), step(2, 4))
    with pytest.raises(BenchmarkError, match="differ in length"):
        same_work((2, 4), step(2, 4), step(2, 3))
    with pytest.raises(BenchmarkError, match="differ in length"):
        same_work((2, 5), step(2, 4), step(2, 4))


def test_where_nothing_is_forced_only_prompts_must_be_the_same() -> None:
    def step(prompt: int, *lengths: int) -> Step:
        return Step(1.0, 1.0, {}, (prompt,) * len(lengths), lengths, 0)

    assert replace(WORKLOADS["tiny"], stops="natural").lengths_B == ()
    same_work((), step(3, 2, 4), step(3, 5, 1))
    with pytest.raises(BenchmarkError, match="Prompts differ"):
        same_work((), step(3, 2, 4), step(4, 2, 4))


@pytest.mark.parametrize(("others", "neighbours", "is_quoted"), [(0.4, 0, True), (0.6, 0, False), (5.0, 1, True)])
def test_a_ratio_is_not_quoted_where_other_programs_had_more_than_a_twentieth_of_the_cores(
    others: float, neighbours: int, is_quoted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    phases = dict.fromkeys(("rollout", "reward", "scoring", "update", "other"), 1.0)
    steps = (Step(5.0, 9.0, phases, (3,), (4,), 2**30, others=others),) * 2
    sides = {name: Measured({"lr": "1"}, steps) for name in (OURS, TRL)}
    result = Result(WORKLOADS["mini"], sides, None, neighbours=neighbours)
    console = Console(file=io.StringIO(), width=130)
    show(result, console)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert ("times as many completion tokens" in said) == is_quoted
    assert f"took {others / 10:.0%} of the cores' time" in said


@pytest.mark.needs("procfs")
def test_what_other_programs_take_is_seen() -> None:
    before, began = busy_seconds(), time.monotonic()
    with busy_neighbours(1):
        while busy_seconds() - before < 0.3 and time.monotonic() - began < 20:
            time.sleep(0.05)
    assert busy_seconds() - before >= 0.3


@pytest.mark.long
@pytest.mark.extra("bench")
def test_the_whole_comparison_runs_and_both_sides_do_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "figures.json"
    arguments = ["--workload", "mini", "--repeats", "2", "--threads", "1", "--json", str(file)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    (result,) = json.loads(file.read_text())["results"]
    assert file.with_suffix(".png").stat().st_size > 1000
    assert result["proof"]["gap"] < 1e-4
    assert len(result["ratios"]) == 2
    for side in result["sides"].values():
        assert [step["completion_lengths"] for step in side["steps"]] == [result["lengths"]] * 2
        assert all(abs(sum(step["phases"].values()) - step["seconds"]) < 1e-6 for step in side["steps"])
        assert all(step["peak"] > 0 for step in side["steps"])
        assert list(side["steps"][0]["phases"]) == ["rollout", "reward", "scoring", "update", "other"]
    parts = result["sides"]["minigrpo"]["steps"][0]["parts"]
    assert list(parts) == list(result["limits"]) == ["prefill", "decode", "training", "update"]
    assert all(result["reached"]["minigrpo"][part] > 0 for part in parts)
    assert result["reached"]["TRL"]["decode"] is None  # it cannot be looked into
    assert result["reached"]["TRL"]["step"] > 0
    assert "times as many completion tokens" in printed
    assert "gradient_checkpointing = False" in printed


def test_without_trl_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else real(name, *rest))
    assert command.main(["--workload", "mini"]) == 2
    assert "pip install 'minigrpo[bench]'" in capsys.readouterr().out


@pytest.mark.extra("bench")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "3b"], "too many weights for a CPU"),
        (["--workload", "half", "--stops", "natural"], "which end no completion"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.extra("bench")
def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--workload", "3b", "--device", "cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().out


@pytest.mark.extra("bench")
def test_a_run_that_is_stopped_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written after every repetition: interrupted in the second, it holds the first."""
    file = tmp_path / "figures.json"
    turns: list[int] = []
    real = harness.take_turns

    def twice(*given: Any) -> None:
        turns.append(1)
        if len(turns) > 2:
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(harness, "take_turns", twice)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--workload", "mini", "--repeats", "5", "--trl", "--no-proof", "--threads", "1", "--json", str(file)]
    assert command.main(arguments) == 130
    (result,) = json.loads(file.read_text())["results"]
    assert len(result["sides"]["minigrpo"]["steps"]) == 1


def test_a_sweep_varies_one_thing() -> None:
    start = sweeps.base("slim")
    assert start.lengths_B == (100,) * 32
    for axis in sweeps.AXES.values():
        for value in axis.values:
            point = axis.point(start, value)
            load = point.workload
            same = [getattr(load, name) == getattr(start, name) for name in ("completions", "prompt_tokens", "limit")]
            assert sum(same) >= 2
            assert set(load.lengths_B) == {load.limit}
    total = sweeps.AXES["total"].point(start, 2)
    assert total.x == 2 * (300 + 8 * 100)


def test_the_exponent_is_the_slope_of_logarithms() -> None:
    x = [1, 2, 4, 8]
    assert sweeps.slope(x, [3 * v for v in x]) == pytest.approx(1)
    assert sweeps.slope(x, [0.1 * v**2 for v in x]) == pytest.approx(2)
    assert sweeps.slope(x, [5, 5, 5, 5]) == pytest.approx(0)


@pytest.mark.long
@pytest.mark.extra("bench")
def test_a_sweep_runs_and_says_how_cost_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "figures.json"
    arguments = ["--sweep", "completion", "--model", "mini", "--values", "2", "6", "--repeats", "1"]
    assert command.main([*arguments, "--threads", "1", "--json", str(file)]) == 0
    (sweep,) = json.loads(file.read_text())["sweeps"]
    tokens = [steps[0]["completion_lengths"] for steps in sweep["steps"]]
    assert tokens == [[2] * 32, [6] * 32]
    printed = " ".join(capsys.readouterr().out.split())
    assert "3.0 times the completion length cost" in printed
    assert file.with_suffix(".png").exists()


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "python -m benchmarks --sweep group" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.extra("bench")
@pytest.mark.env("MINIGRPO_REAL_MODEL")
@pytest.mark.env("MINIGRPO_GSM8K")
def test_the_proof_holds_on_a_pretrained_model_and_noise_that_breaks_the_model_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = WORKLOADS["real"]
    real.kind.make(tmp_path / "real")
    setup = Setup(real, tmp_path / "real", tmp_path / "runs", threads=2, dtype="float32", steps=1)
    assert proof.prove(setup).holds
    monkeypatch.setattr(proof, "NOISE", 0.02)
    assert not proof.prove(setup).holds
