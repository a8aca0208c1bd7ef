"""The trainer: it learns, it resumes bit for bit, it stops when it must."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.config.schema import (
    AdapterConfig,
    ModelConfig,
    ObjectiveConfig,
    Recipe,
    RolloutConfig,
    SaveConfig,
    TrainConfig,
)
from minigrpo.errors import DivergenceError, RecipeError
from minigrpo.models.policy import Policy, open_policy
from minigrpo.rollouts.engines.registry import open_engine
from minigrpo.runs.logger import RunLogger, read_events
from minigrpo.runs.rundir import RunDir
from minigrpo.training import checkpoint
from minigrpo.training.grpo import grpo, learning_rate, open_optimizer
from minigrpo.types import Completion, Engine, Grade, Prompt, Task
from tests.helpers.marks import rest_is_long
from tests.helpers.models import make_policy, set_lora
from tests.helpers.tiny import build_tokenizer

TASK = """
from minigrpo import Grade, Prompt, Task

def prompts(split):
    start = 0 if split == "train" else 100
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},)) for i in range(start, start + 20)]

def grade(prompt, text):
    return Grade(sum(letter.islower() for letter in text) / 8)

letters = Task("letters", prompts, grade)
"""


def letters() -> Task:
    """Reward: the share of small letters. Even random weights can learn it."""

    def prompts(split: str) -> list[Prompt]:
        return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},)) for i in range(20)]

    def grade(prompt: Prompt, text: str) -> Grade:
        return Grade(sum(letter.islower() for letter in text) / 8)

    return Task("letters", prompts, grade)


def recipe_for(folder: Path, **train: Any) -> Recipe:
    return Recipe(
        model=ModelConfig(path=str(folder)),
        lora=AdapterConfig(rank=8, alpha=16),
        rollout=RolloutConfig(prompts=3, completions=4, max_tokens=8),
        train=TrainConfig(**{"steps": 6, "lr": 1e-2, "tokens_per_pass": 90, **train}),
        save=SaveConfig(every=2, keep=2),
    )


def train(recipe: Recipe, run: RunDir, task: Task | None = None, policy: Policy | None = None) -> Policy:
    policy = policy or open_policy(recipe)
    run.path.mkdir(exist_ok=True)
    grpo(recipe, task or letters(), policy, open_engine(policy, recipe), RunLogger(run, recipe.train.steps))
    return policy


def metrics(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_reward_rises(objective: str, full: bool, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_for(tiny_folder(), steps=15, lr=3e-3 if full else 2e-2, full=full)
    recipe = recipe.model_copy(update={"objective": ObjectiveConfig(name=objective, kl=0.01)})
    run = RunDir(tmp_path / "run")
    train(recipe, run)
    rewards = [line["reward"] for line in metrics(run)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_an_architecture_off_the_shared_path_is_trained_padded_and_that_is_said_once(
    tiny_folder: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    train(recipe_for(tiny_folder("lfm2"), steps=2), run)
    assert capfd.readouterr().err.count("one padded row per completion") == 1
    assert metrics(run)[1]["engine_gap"] < 1e-4


@pytest.mark.parametrize("is_exact", [True, False])
def test_the_loss_corrects_for_an_engine_that_says_it_is_not_exact(
    is_exact: bool, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    class Overconfident:
        """Reports log-probabilities that are 1 nat too high."""

        def __init__(self, engine: Engine) -> None:
            self.engine, self.is_exact = engine, is_exact

        def generate(self, *given: Any, **options: Any) -> list[tuple[Completion, ...]]:
            answers = self.engine.generate(*given, **options)
            return [tuple(replace(c, logprobs=tuple(lp + 1 for lp in c.logprobs)) for c in each) for each in answers]

        def update(self, policy: Any) -> None:
            self.engine.update(policy)

    recipe, norms = recipe_for(tiny_folder(), steps=1, inner_epochs=1), []
    for name in ("plain", "overconfident"):
        policy, run = open_policy(recipe), RunDir(tmp_path / name)
        engine = open_engine(policy, recipe)
        run.path.mkdir()
        grpo(recipe, letters(), policy, engine if name == "plain" else Overconfident(engine), RunLogger(run, 1))
        norms.append(metrics(run)[0]["grad_norm"])
    assert norms[1] / norms[0] == pytest.approx(1.0 if is_exact else math.exp(-1), rel=1e-3)


def test_a_step_records_everything_that_it_saw(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    train(recipe_for(tiny_folder(), steps=2), run)
    first, second = metrics(run)
    assert second["step"] == 2
    assert first["engine_gap"] < 1e-4
    assert 0 < first["informative_groups"] <= 1
    assert first["entropy"] > 0
    rows = [json.loads(line) for line in run.groups.read_text().splitlines()]
    assert len(rows) == 6
    mean = sum(c["reward"] for row in rows[:3] for c in row["completions"]) / 12
    assert first["reward"] == pytest.approx(mean)
    assert all(abs(sum(c["advantage"] for c in row["completions"])) < 1e-6 for row in rows)


def test_old_checkpoints_are_pruned_and_the_last_step_is_always_saved(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    train(recipe_for(tiny_folder(), steps=5), run)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["000004", "000005"]


def launch(run: Path, recipe: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "minigrpo.cli.main", "train", str(recipe), "--run", str(run), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def lines_in(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while lines_in(run / "metrics.jsonl") < step and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.01)


@pytest.fixture
def recipe_file(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """Packing, two threads, dropout, a slow reward (so that signals arrive in the middle of things)."""
    (tmp_path / "mine.py").write_text(
        TASK + "\nimport time\ndef slow(p, t):\n    time.sleep(0.004)\n    return grade(p, t)\n"
        "\nletters = Task('letters', prompts, slow)\n"
    )
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"model: {{path: {tiny_folder()}}}\n"
        "lora: {rank: 8, alpha: 16, dropout: 0.1}\n"
        f"task: {{name: '{tmp_path / 'mine.py'}:letters'}}\n"
        "rollout: {prompts: 3, completions: 4, max_tokens: 12}\n"
        "train: {steps: 6, lr: 1e-2, threads: 2, tokens_per_pass: 90}\n"
        "save: {every: 2}\n"
    )
    return file


def finished(process: subprocess.Popen[bytes]) -> str:
    out = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 0, out
    return out


def untimed(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    timed = ("second", "memory")
    return [{k: v for k, v in row.items() if not any(word in k for word in timed)} for row in rows]


def noted(run: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in read_events(RunDir(run))]


def test_a_run_killed_at_step_three_and_resumed_ends_like_one_that_was_not(recipe_file: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished(launch(whole, recipe_file))
    process = launch(cut, recipe_file)
    wait_for_step(process, cut, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (cut / "adapter").exists()
    resumed = finished(launch(cut, recipe_file, "--resume"))
    again = r"Resumed after step 2 of 6\. What came after it, up to step [34], is done again\."
    assert re.search(again, resumed), resumed
    weights = "adapter/adapter_model.safetensors"
    assert (whole / weights).read_bytes() == (cut / weights).read_bytes()
    assert (whole / "groups.jsonl").read_bytes() == (cut / "groups.jsonl").read_bytes()
    assert untimed(whole / "metrics.jsonl") == untimed(cut / "metrics.jsonl")
    assert noted(whole) == [("began", 0), ("ended", 6)]
    assert noted(cut) == [("began", 0), ("resumed", 2), ("ended", 6)]  # nothing of the kill: there was no time


@pytest.mark.parametrize("number", rest_is_long([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_polite_signal_finishes_the_step_saves_and_can_be_resumed(
    number: signal.Signals, recipe_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = launch(run, recipe_file)
    wait_for_step(process, run, 1)
    process.send_signal(number)
    out = process.communicate(timeout=120)[0].decode()
    steps = lines_in(run / "metrics.jsonl")
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert [p.name for p in sorted((run / "checkpoints").iterdir())][-1] == f"{steps:06d}"
    assert f"Resumed after step {steps} of 6.\n" in finished(launch(run, recipe_file, "--resume"))
    assert noted(run) == [("began", 0), ("stopped", steps), ("resumed", steps), ("ended", 6)]


def test_a_checkpoint_brings_back_weights_and_optimizer_bit_for_bit(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, run = recipe_for(tiny_folder(), steps=2), RunDir(tmp_path / "run")
    policy = train(recipe, run)
    found, complaints = checkpoint.find_latest(run)
    assert found is not None
    assert not complaints
    other = open_policy(recipe)
    optimizer = open_optimizer(recipe.train, other)
    checkpoint.load(found, other, optimizer)
    for one, two in zip(policy.trainable, other.trainable, strict=True):
        assert torch.equal(one, two)
    assert all(float(state["step"]) == 2 for state in optimizer.state.values())


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "state.json", "made.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    file: str, how: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    train(recipe_for(tiny_folder(), steps=4), run)
    victim = run.checkpoint(4) / file
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content if how == "flipped" else content[: len(content) // 2])
    if how == "gone":
        victim.unlink()
    found, complaints = checkpoint.find_latest(run)
    assert found is not None
    assert found.step == 2
    # A flipped bit in made.json is a wrong sum, which accuses the file that it belongs to: the folder is named anyhow.
    assert len(complaints) == 1
    assert str(victim.parent) in complaints[0]


def test_gradients_that_are_not_finite_are_skipped_and_end_the_run_when_they_go_on(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, run = recipe_for(tiny_folder(), steps=20), RunDir(tmp_path / "run")
    policy = open_policy(recipe)
    before = [weight.detach().clone() for weight in policy.trainable]
    policy.trainable[0].register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(DivergenceError, match="5 steps in a row"):
        train(recipe, run, policy=policy)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable, strict=True))
    assert [line["skipped"] for line in metrics(run)] == [1.0] * 5


def test_a_batch_in_which_every_group_ties_moves_nothing(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    constant = Task("constant", letters().prompts, lambda prompt, text: Grade(1.0))
    recipe, run = recipe_for(tiny_folder(), steps=2), RunDir(tmp_path / "run")
    policy = open_policy(recipe)
    before = [weight.detach().clone() for weight in policy.trainable]
    train(recipe, run, task=constant, policy=policy)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable, strict=True))
    assert metrics(run)[0]["frac_reward_zero_std"] == 1


def test_the_learning_rate_rises_then_holds_or_falls_to_zero() -> None:
    def rates(schedule: str) -> list[float]:
        recipe = Recipe(train=TrainConfig(steps=10, lr=1.0, warmup=0.2, schedule=schedule))
        return [learning_rate(recipe.train, step) for step in range(10)]

    assert rates("constant") == [0.5, 1.0, *[1.0] * 8]
    assert rates("linear")[:4] == pytest.approx([0.5, 1.0, 1.0, 7 / 8])
    assert rates("cosine")[2] == 1.0
    assert rates("cosine")[6] == pytest.approx(0.5)


def test_the_adapter_is_an_ordinary_peft_adapter(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = recipe_for(tiny_folder())
    policy = open_policy(recipe)
    set_lora(policy, 0.05)
    policy.save(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder())
    ids = torch.tensor([build_tokenizer()("say 4")["input_ids"]])
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    with policy.sampling_mode(), torch.no_grad():
        assert float((policy.model(ids).logits - theirs.detach()).abs().max()) < 1e-5


@pytest.mark.parametrize(("targets", "told"), [("foo", "q_proj"), ("lm_head", "output head")])
def test_targets_that_cannot_be_adapted_are_refused_with_those_that_can(
    targets: str, told: str, tiny_folder: Callable[..., Path]
) -> None:
    recipe = recipe_for(tiny_folder()).model_copy(update={"lora": AdapterConfig(targets=targets)})
    with pytest.raises(RecipeError, match=told):
        open_policy(recipe)


def test_memory_decides_the_plan_and_a_stated_budget_overrules_it() -> None:
    from minigrpo.training.memory import machine

    policy = make_policy()
    per_token = machine.bytes_per_token(policy)
    # Two layers of width 32 keep at least their inputs, norms, projections and MLP halves, in float32.
    assert 2 * 32 * 4 * 5 < per_token < 200_000
    budget = machine.tokens_per_pass(policy, Recipe())
    assert machine.MIN_TOKENS <= budget <= machine.MAX_TOKENS
    assert budget & (budget - 1) == 0
    assert machine.tokens_per_pass(policy, Recipe(train=TrainConfig(tokens_per_pass=777))) == 777
