"""Recipes become trainings with TRL, verl and prime-rl: what is carried over, what is told, and what they accept."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minigrpo.config.fields import field_table
from minigrpo.config.from_trl import recipe_from_trl
from minigrpo.config.load import load_recipe, recipe_names
from minigrpo.config.schema import Recipe
from minigrpo.config.to_others import CLIPS, TRAINERS, knob_value, recipe_for
from tests.helpers.command_line import called

SET: dict[str, str] = {
    "seed": "3",
    "model.path": "M",
    "model.revision": "r",
    "model.dtype": "bfloat16",
    "model.quantize": "nf4",
    "model.head_float32": "true",
    "model.template.enable_thinking": "false",
    "lora.rank": "8",
    "lora.alpha": "8",
    "lora.dropout": "0.1",
    "lora.targets": "q_proj,v_proj",
    "lora.rslora": "true",
    "rollout.prompts": "3",
    "rollout.completions": "4",
    "rollout.temperature": "0.5",
    "rollout.max_tokens": "99",
    "rollout.engine": "vllm",
    "groups.resample": "1",
    "groups.replay": "2",
    "groups.rest": "0.9",
    "groups.focus": "1",
    "groups.factor.p": "0",
    "objective.name": "dapo",
    "objective.compare": "batch",
    "objective.clip_low": "0.1",
    "objective.clip_high": "0.3",
    "objective.clip_dual": "4",
    "objective.kl": "0.1",
    "objective.kl_unbiased": "true",
    "objective.importance": "sequence_mask",
    "objective.importance_cap": "5",
    "objective.importance_floor": "0.5",
    "objective.off_policy": "0.4",
    "objective.entropy": "0.01",
    "objective.top_entropy": "0.2",
    "objective.overlong": "9",
    "objective.mask_truncated": "true",
    "train.steps": "17",
    "train.inner_epochs": "2",
    "train.lr": "3e-5",
    "train.schedule": "cosine",
    "train.warmup": "0.2",
    "train.weight_decay": "0.1",
    "train.optimizer": "adamw8bit",
    "train.grad_norm": "0.5",
    "train.full": "true",
    "save.every": "5",
    "save.keep": "7",
    "eval.every": "9",
    "warmup.steps": "5",
}
VLLM = {"rollout.engine": "vllm", "objective.importance": "sequence_truncate", "objective.importance_cap": "4"}
ADAPTIVE = {"objective.entropy": "0.5", "objective.entropy_target": "0.3", "model.dtype": "float32"}


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("knob", [knob for knob in SET if knob != "rollout.engine"])
def test_a_knob_that_is_set_is_carried_over_or_told(kind: str, knob: str) -> None:
    plain, changed = load_recipe("quickstart"), load_recipe("quickstart", {knob: SET[knob]})
    assert recipe_for(kind, changed, "quickstart") != recipe_for(kind, plain, "quickstart")


def test_our_table_of_clip_bounds_is_that_of_the_objectives() -> None:
    from minigrpo.algorithms.objective import OBJECTIVES

    assert {name: (each.clip_low, each.clip_high) for name, each in OBJECTIVES.items()} == CLIPS


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("extra", [{}, VLLM, ADAPTIVE, {"objective.name": "gspo"}, {"objective.name": "cispo"}])
def test_what_is_written_for_trl_is_read_back_as_the_same_training(
    tmp_path: Path, recipe: str, extra: dict[str, str]
) -> None:
    if "rollout.engine" in extra:
        extra = extra | {"train.full": "false"}
    given = load_recipe(recipe, extra)
    (tmp_path / "train.py").write_text(recipe_for("trl", given, recipe), encoding="utf-8")
    back = recipe_from_trl(tmp_path / "train.py").recipe
    ours = {"model.device", "rollout.rows", "lora.dropout"} if given.train.full else set()
    sections = ("model.", "lora.", "rollout.", "objective.", "train.", "save.")
    told = recipe_for("trl", given, recipe)
    ours |= {"objective.clip_low"} if given.objective.name == "cispo" else set()
    for knob in {field.name for field in field_table()} & set(SET) - ours:
        if knob.startswith(sections) and f"- {knob} " not in told:
            then, now = _meant(given, knob), knob_value(back, knob)
            near = isinstance(then, float) and now == pytest.approx(then, abs=1 / given.train.steps, rel=0)
            assert now == then or (near and knob == "train.warmup"), knob


def _meant(given: Recipe, knob: str) -> Any:
    """The objective's own bounds are written out, and a warm-up is counted in whole steps, hence the tolerance."""
    value = knob_value(given, knob)
    if knob in ("objective.clip_low", "objective.clip_high") and value is None:
        return CLIPS[given.objective.name][knob == "objective.clip_high"]
    if knob == "objective.compare" and value == "auto":
        return "none" if given.objective.name == "dr_grpo" else "group"
    return value


def loaded(text: str, folder: Path) -> ModuleType:
    """Import what was written, as a file."""
    file = folder / "written.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("written", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.extra("bench")
@pytest.mark.parametrize("extra", [{}, VLLM, ADAPTIVE, {"objective.compare": "gdpo", "train.optimizer": "adamw8bit"}])
def test_trl_itself_accepts_every_field_that_is_written_for_it(tmp_path: Path, extra: dict[str, str]) -> None:
    script = recipe_for("trl", load_recipe("quickstart", extra), "quickstart")
    # Its number type is for a GPU unless it is told otherwise.
    made = loaded(script.replace("GRPOConfig(\n", "GRPOConfig(\n    use_cpu=True,\n    bf16=False,\n"), tmp_path)
    given = load_recipe("quickstart", extra)
    assert made.args.generation_batch_size == given.rollout.prompts * given.rollout.completions
    assert (made.args.learning_rate, made.args.max_steps) == (given.train.lr, given.train.steps)
    assert made.lora.r == given.lora.rank
    rows = made.shared.rows("train")
    prompts = made.shared.task.prompts("train")
    right, wrong = made.shared.task.gold(prompts[0]), "no"
    columns = {"prompt_id": [rows[0]["prompt_id"]] * 2, "split": ["train"] * 2}
    both = [[{"role": "assistant", "content": text}] for text in (right, wrong)]
    paid = [made.shared.task.grade(prompts[0], text).reward for text in (right, wrong)]
    assert paid[0] > paid[1]
    assert made.reward(both, **columns) == made.reward([right, wrong], **columns) == paid


@pytest.mark.extra("bench")
def test_a_script_for_verl_writes_its_rows_and_starts_it_with_a_grader(tmp_path: Path) -> None:
    """What stands in for verl writes down what it was given; names were compared with verl's own file once, by hand."""
    inside = tmp_path / "verl" / "trainer"
    inside.mkdir(parents=True)
    (inside / "main_ppo.py").write_text("import sys\nprint('\\n'.join(sys.argv[1:]))\n")
    script = recipe_for("verl", load_recipe("quickstart", {"task.size": "8"}), "quickstart")
    module = loaded(script, tmp_path)
    done = subprocess.run(
        [sys.executable, "written.py"], cwd=tmp_path, text=True, capture_output=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    words = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert words["actor_rollout_ref.model.lora_rank"] == "32"
    assert words["actor_rollout_ref.actor.loss_agg_mode"] == '"seq-mean-token-mean"'
    assert words["custom_reward_function.path"].endswith('written.py"')
    from datasets import Dataset

    row = Dataset.from_parquet(str(tmp_path / "test.parquet"))[0]
    prompt = module.shared().task.prompts("test")[0]
    right = module.shared().task.gold(prompt)
    graded = (row["reward_model"]["ground_truth"], row["extra_info"])
    for text in (right, "no"):
        paid = module.shared().task.grade(prompt, text).reward
        assert module.compute_score(row["data_source"], text, *graded) == paid


def test_a_file_for_prime_rl_is_toml_with_the_batch_and_the_schedule() -> None:
    made = tomllib.loads(recipe_for("prime-rl", load_recipe("quickstart"), "quickstart"))
    assert made["orchestrator"]["batch_size"] == 16 * 8
    assert made["orchestrator"]["group_size"] == 8
    assert made["trainer"]["scheduler"] == {"type": "linear", "warmup_steps": 5, "decay_steps": 95}
    assert made["trainer"]["model"]["lora"]["rank"] == 32
    constant = tomllib.loads(recipe_for("prime-rl", load_recipe("gsm8k-fast"), "gsm8k-fast"))
    assert constant["trainer"]["scheduler"] == {"type": "constant"}


def test_what_is_written_is_python_whatever_the_recipe_says() -> None:
    recipe = load_recipe("quickstart", {"model.path": 'it\'s "odd"\\n', "train.full": "true"})
    for kind in ("trl", "verl"):
        ast.parse(recipe_for(kind, recipe, "it's.yaml"))


def test_the_command_writes_one_recipe_and_tells_what_it_cannot() -> None:
    assert "GRPOConfig(" in called("recipes", "quickstart", "--to", "trl").out
    assert "trl, verl, prime-rl" in called("recipes", "quickstart", "--to", "nemo").refused
    assert "minigrpo recipes RECIPE --to trl" in called("recipes", "--to", "trl").refused
