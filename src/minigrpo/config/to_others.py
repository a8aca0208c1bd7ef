"""Turn a recipe into what TRL, verl or prime-rl take, as far as it goes: the way out for a run that outgrows this.

Whatever the recipe sets and the other cannot, or does otherwise, stands in comments at the top of what is printed.
Names are those of TRL 1.16, of verl as of January 2026 and of prime-rl as of August 2026.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pprint import pformat
from typing import Any

from minigrpo.config.fields import field_table
from minigrpo.config.from_trl import SAME_MEANING
from minigrpo.config.schema import Recipe
from minigrpo.errors import RecipeError

CLIPS: Mapping[str, tuple[float, float]] = {
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "bnpo": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "cispo": (0.2, 4.0),
    "sapo": (0.2, 0.2),
}
"""Each objective's own clip_low and clip_high (algorithms/objective.py)."""
OURS = (
    *("about", "model.device", "model.checkpointing", "rollout.rows", "rollout.stream", "train.until", "train.threads"),
    *("train.tokens_per_pass", "train.memory", "train.reference", "save.take", "eval.limit", "eval.held_out"),
)
"""Knobs of this machine, or of how results are measured: they are no part of what is learned."""
OUR_SECTIONS = ("task", "watch", "sandbox", "export", "publish", "track")
"""Sections that the task's own code reads there, too, and those of stages that come after training."""
NO_BOUND = 1e6
"""A bound of the ratio that no ratio reaches, for trainers that always have one."""


@dataclass(slots=True)
class _Draft:
    """Settings for the other trainer by name, the knobs that they come from, and notes, while they are gathered."""

    recipe: Recipe
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def take(self, *knobs: str, **settings: Any) -> None:
        """Set what is not None, and count the knobs as carried over."""
        self.taken |= set(knobs)
        self.settings |= {name: value for name, value in settings.items() if value is not None}

    def put(self, settings: Mapping[str, Any], *knobs: str) -> None:
        """Do the same for names with dots."""
        self.take(*knobs)
        self.settings |= {name: value for name, value in settings.items() if value is not None}

    def all_notes(self) -> list[str]:
        return [*self.notes, *_left(self.recipe, self.taken)]


def recipe_for(kind: str, recipe: Recipe, name: str) -> str:
    """Return what the trainer of that kind takes. `name`: by which the recipe is found again, to open its task.

    Raise RecipeError for a kind that is not known.
    """
    if kind not in TRAINERS:
        raise RecipeError(f"--to {kind!r} is no trainer that a recipe can be written for: {', '.join(TRAINERS)}")
    return TRAINERS[kind](_Draft(recipe, name))


def knob_value(recipe: Recipe, name: str) -> Any:
    """Return the value of a knob by its dotted name."""
    section, _, leaf = name.rpartition(".")
    return getattr(getattr(recipe, section), leaf) if section else getattr(recipe, leaf)


def clip_bounds(recipe: Recipe) -> tuple[float, float]:
    """Return clip_low and clip_high, with the objective's own where the recipe leaves them."""
    low, high = CLIPS[recipe.objective.name]
    own = recipe.objective
    return low if own.clip_low is None else own.clip_low, high if own.clip_high is None else own.clip_high


def _left(recipe: Recipe, taken: set[str]) -> Iterator[str]:
    """Yield a sentence for each knob that is set and was not carried over."""
    for knob in field_table():
        value = knob_value(recipe, knob.name)
        section = knob.name.partition(".")[0]
        ours = knob.name in OURS or section in OUR_SECTIONS or (section == "lora" and recipe.train.full)
        if knob.name not in taken and not ours and value != knob.default:
            yield f"{knob.name} {value} has no counterpart: {knob.about}."


def _rising(recipe: Recipe) -> int:
    return math.ceil(recipe.train.warmup * recipe.train.steps)


def _comparison(recipe: Recipe) -> str:
    compare = recipe.objective.compare
    return compare if compare != "auto" else "none" if recipe.objective.name == "dr_grpo" else "group"


# TRL ------------------------------------------------------------------------------------------------------------------


def _to_trl(draft: _Draft) -> str:
    recipe = draft.recipe
    # The clip bounds are set below, because an objective has its own; --hub_model_id would publish at once.
    for name, knob in SAME_MEANING.items():
        if knob not in ("objective.clip_low", "publish.repo"):
            value = knob_value(recipe, knob)
            draft.put({name: value if value != {} else None}, knob)
    _trl_batch(draft)
    _trl_objective(draft)
    _trl_engine(draft)
    draft.take(output_dir="trl-run", report_to="none", logging_steps=1)
    draft.take("model.path", "model.revision", "model.dtype", "model.quantize", "train.full")
    draft.notes.append("Order of prompts and random numbers are TRL's own: the same recipe, not the same run.")
    return _trl_script(draft, "" if recipe.train.full else _trl_adapter(draft))


def _trl_batch(draft: _Draft) -> None:
    """One update from all of a rollout: TRL samples batch * accumulation completions, and steps once for them."""
    rollout, train = draft.recipe.rollout, draft.recipe.train
    draft.take(
        "rollout.prompts",
        per_device_train_batch_size=rollout.completions,
        gradient_accumulation_steps=rollout.prompts,
    )
    draft.take(
        *("train.steps", "train.inner_epochs", "train.schedule", "train.warmup", "train.optimizer"),
        num_iterations=train.inner_epochs,
        max_steps=train.steps * train.inner_epochs,
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        warmup_steps=_rising(draft.recipe) * train.inner_epochs,
        optim={"adamw": "adamw_torch", "adamw8bit": "adamw_8bit"}[train.optimizer],
    )


def _trl_objective(draft: _Draft) -> None:
    own = draft.recipe.objective
    (low, high), compare = clip_bounds(draft.recipe), _comparison(draft.recipe)
    sequence = own.name == "gspo"
    draft.take(
        *("objective.name", "objective.clip_low", "objective.clip_high", "objective.compare"),
        loss_type="grpo" if sequence else own.name,
        importance_sampling_level="sequence" if sequence else "token",
        epsilon=low,
        epsilon_high=1 + high if own.name == "cispo" else high,
        scale_rewards="group" if compare == "gdpo" else compare,
        multi_objective_aggregation="normalize_then_sum" if compare == "gdpo" else None,
    )
    if compare == "gdpo":
        draft.notes.append("gdpo needs each reward function by itself there; the script hands over the sum of them.")
    adaptive = own.entropy_target is not None
    draft.take(
        *("objective.entropy", "objective.entropy_target"),
        use_adaptive_entropy=True if adaptive else None,
        entropy_target=own.entropy_target,
        entropy_coef_max=own.entropy if adaptive else None,
        entropy_coef=None if adaptive else own.entropy or None,
    )


def _trl_engine(draft: _Draft) -> None:
    rollout, own = draft.recipe.rollout, draft.recipe.objective
    draft.take("rollout.engine", "rollout.share", "rollout.server")
    importance = ("objective.importance", "objective.importance_cap", "objective.importance_floor")
    if rollout.engine != "vllm":
        draft.notes.append("TRL samples with transformers unless use_vllm is set, and then corrects as vllm_* says.")
        return
    mode = {"auto": "token_truncate", "off": None}.get(own.importance, own.importance)
    draft.take(
        *importance,
        use_vllm=True,
        vllm_mode="server" if rollout.server else "colocate",
        vllm_server_base_url=rollout.server,
        vllm_gpu_memory_utilization=None if rollout.server else rollout.share,
        vllm_importance_sampling_correction=None if mode else False,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=own.importance_cap if mode else None,
        vllm_importance_sampling_clip_min=own.importance_floor or None if mode else None,
    )
    if rollout.server:
        draft.notes.append("TRL's server is `trl vllm-serve`, not vLLM's own.")


def _trl_adapter(draft: _Draft) -> str:
    lora = draft.recipe.lora
    draft.take("lora.rank", "lora.alpha", "lora.dropout", "lora.rslora", "lora.targets")
    targets: Any = lora.targets if lora.targets == "all-linear" else _names(lora.targets)
    given = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora}
    return f"{_arguments({**given, 'target_modules': targets, 'task_type': 'CAUSAL_LM'})}"


def _trl_model(recipe: Recipe) -> str:
    options: dict[str, Any] = {"revision": recipe.model.revision} if recipe.model.revision else {}
    options |= {} if recipe.model.dtype == "auto" else {"dtype": recipe.model.dtype}
    packed = "load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True"
    quantize = f", quantization_config=BitsAndBytesConfig({packed})" if recipe.model.quantize == "nf4" else ""
    rest = f", {_arguments(options)}" if options else ""
    return f"AutoModelForCausalLM.from_pretrained({recipe.model.path!r}{rest}{quantize})"


def _trl_script(draft: _Draft, adapter: str) -> str:
    """`adapter`: the arguments of LoraConfig; "" where every parameter is trained."""
    given = "".join(f"    {name}={value!r},\n" for name, value in draft.settings.items())
    model = _trl_model(draft.recipe)
    classes = "AutoModelForCausalLM" + (", BitsAndBytesConfig" if "BitsAndBytes" in model else "")
    lora_import, lora = ("from peft import LoraConfig\n", f"lora = LoraConfig({adapter})\n") if adapter else ("", "")
    lora_argument = "        peft_config=lora,\n" if adapter else ""
    return f"""# A training with TRL, made from the recipe {draft.name} by minigrpo, which must be installed beside it.
{_comments(draft.all_notes())}
from datasets import Dataset
{lora_import}from transformers import {classes}
from trl import GRPOConfig, GRPOTrainer

from minigrpo.rollouts.for_others import SharedTask

shared = SharedTask({draft.name!r})


def reward(completions, prompt_id, split, **columns):
    return shared.reward(completions, prompt_id, split)


args = GRPOConfig(
{given})
{lora}
if __name__ == "__main__":
    trainer = GRPOTrainer(
        model={model},
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(shared.rows("train")),
{lora_argument}    )
    trainer.train()
"""


# verl -----------------------------------------------------------------------------------------------------------------

VERL_WEIGHTS: Mapping[str, str] = {
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "dapo": "token-mean",
    "bnpo": "token-mean",
    "gspo": "seq-mean-token-mean",
    "cispo": "token-mean",
    "sapo": "seq-mean-token-mean",
}
"""How verl sums the loss of tokens, by our objectives."""
PROMPT_TOKENS = 1024
"""Longest prompt for trainers that must be told one."""


def _to_verl(draft: _Draft) -> str:
    recipe, actor, rollout = draft.recipe, "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    train, own = recipe.train, recipe.objective
    draft.put({"data.train_files": "train.parquet", "data.val_files": "test.parquet"})
    draft.put({"data.train_batch_size": recipe.rollout.prompts, "data.seed": recipe.seed}, "rollout.prompts", "seed")
    draft.put({"data.max_response_length": recipe.rollout.max_tokens}, "rollout.max_tokens")
    draft.put({"data.max_prompt_length": PROMPT_TOKENS})
    draft.notes.append(f"verl must know the longest prompt: data.max_prompt_length {PROMPT_TOKENS} is a guess.")
    _verl_model(draft)
    schedule = "cosine" if train.schedule == "cosine" else "constant"
    if train.schedule == "linear":
        draft.notes.append("verl has no linear schedule: the learning rate stays constant after the warm-up.")
    draft.put({f"{actor}.optim.lr": train.lr, f"{actor}.optim.lr_scheduler_type": schedule}, "train.lr")
    draft.put({f"{actor}.optim.lr_warmup_steps": _rising(recipe) * train.inner_epochs}, "train.warmup")
    draft.put({f"{actor}.optim.weight_decay": train.weight_decay}, "train.weight_decay", "train.schedule")
    draft.put({f"{actor}.grad_clip": train.grad_norm, f"{actor}.ppo_epochs": train.inner_epochs}, "train.grad_norm")
    draft.put({f"{actor}.ppo_mini_batch_size": recipe.rollout.prompts, f"{actor}.use_dynamic_bsz": True})
    draft.take("train.inner_epochs")
    _verl_objective(draft, actor)
    draft.put({f"{actor}.entropy_coeff": own.entropy, f"{actor}.use_kl_loss": own.kl > 0}, "objective.entropy")
    draft.put({f"{actor}.kl_loss_coef": own.kl or None, f"{actor}.kl_loss_type": "low_var_kl"}, "objective.kl")
    draft.put({f"{rollout}.name": "vllm", f"{rollout}.n": recipe.rollout.completions}, "rollout.completions")
    draft.put({f"{rollout}.temperature": recipe.rollout.temperature}, "rollout.temperature", "rollout.engine")
    draft.put({f"{rollout}.gpu_memory_utilization": recipe.rollout.share}, "rollout.share")
    draft.put({f"{rollout}.tensor_model_parallel_size": 1, f"{rollout}.load_format": "safetensors"})
    _verl_importance(draft, rollout)
    draft.put({"trainer.total_training_steps": train.steps, "trainer.save_freq": recipe.save.every}, "train.steps")
    draft.put({"trainer.max_actor_ckpt_to_keep": recipe.save.keep}, "save.every", "save.keep")
    draft.put({"trainer.test_freq": recipe.eval.every or -1, "trainer.logger": ["console"]}, "eval.every")
    draft.put({"trainer.project_name": "minigrpo", "trainer.nnodes": 1, "trainer.n_gpus_per_node": 1})
    draft.notes.append("One GPU of one machine is set: raise trainer.n_gpus_per_node and trainer.nnodes.")
    return _verl_script(draft)


def _verl_model(draft: _Draft) -> None:
    model, lora = "actor_rollout_ref.model", draft.recipe.lora
    draft.put({f"{model}.path": draft.recipe.model.path}, "model.path", "train.full")
    if draft.recipe.train.full:
        return
    targets: Any = lora.targets if lora.targets == "all-linear" else _names(lora.targets)
    alpha: float = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha  # verl means a whole number
    draft.put({f"{model}.lora_rank": lora.rank, f"{model}.lora_alpha": alpha}, "lora.rank", "lora.alpha")
    draft.put({f"{model}.target_modules": targets}, "lora.targets")


def _verl_objective(draft: _Draft, actor: str) -> None:
    recipe, own = draft.recipe, draft.recipe.objective
    low, high = clip_bounds(recipe)
    low = 1.0 if own.name == "cispo" else low  # CISPO has no lower bound here
    draft.put({f"{actor}.clip_ratio": low, f"{actor}.clip_ratio_low": low, f"{actor}.clip_ratio_high": high})
    draft.put({f"{actor}.clip_ratio_c": own.clip_dual or NO_BOUND}, "objective.clip_dual", "objective.clip_low")
    draft.put({f"{actor}.loss_agg_mode": VERL_WEIGHTS[own.name]}, "objective.name", "objective.clip_high")
    loss = own.name if own.name in ("gspo", "cispo", "sapo") else "vanilla"
    draft.put({f"{actor}.policy_loss.loss_mode": loss})
    if own.name == "dr_grpo":
        draft.put({f"{actor}.loss_scale_factor": recipe.rollout.max_tokens})
    compare = _comparison(recipe)
    if compare in ("batch", "gdpo"):
        draft.notes.append(f"objective.compare {compare} has no counterpart: rewards are compared within groups.")
    draft.put({"algorithm.adv_estimator": "grpo", "algorithm.norm_adv_by_std_in_grpo": compare != "none"})
    draft.put({"algorithm.use_kl_in_reward": False}, "objective.compare")


def _verl_importance(draft: _Draft, rollout: str) -> None:
    own = draft.recipe.objective
    draft.take("objective.importance", "objective.importance_cap")
    if own.importance == "off":
        return
    level = "sequence" if own.importance.startswith("sequence") else "token"
    if own.importance.endswith("mask"):
        draft.notes.append(f"objective.importance {own.importance}: weights are truncated there, not masked.")
    draft.put({f"{rollout}.calculate_log_probs": True, "algorithm.rollout_correction.rollout_is": level})
    draft.put({"algorithm.rollout_correction.rollout_is_threshold": own.importance_cap})


def _verl_script(draft: _Draft) -> str:
    options = pformat(draft.settings, width=110, sort_dicts=False)
    return f"""# A training with verl, made from the recipe {draft.name} by minigrpo, which must be installed beside it.
# Run it: it writes the rows as Parquet and starts verl, which grades with `compute_score` of this file.
{_comments(draft.all_notes())}
import json
import subprocess
import sys
from functools import cache

from minigrpo.rollouts.for_others import SharedTask

OPTIONS = {options}


@cache
def shared():
    return SharedTask({draft.name!r})


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    return shared().score(solution_str, ground_truth, extra_info["split"])


if __name__ == "__main__":
    from datasets import Dataset

    for split in ("train", "test"):
        Dataset.from_list(shared().verl_rows(split)).to_parquet(f"{{split}}.parquet")
    grader = {{"custom_reward_function.path": __file__, "custom_reward_function.name": "compute_score"}}
    words = [f"{{name}}={{json.dumps(value)}}" for name, value in {{**OPTIONS, **grader}}.items()]
    sys.exit(subprocess.call([sys.executable, "-m", "verl.trainer.main_ppo", *words]))
"""


# prime-rl -------------------------------------------------------------------------------------------------------------


def _to_prime_rl(draft: _Draft) -> str:
    recipe, rollout, train = draft.recipe, draft.recipe.rollout, draft.recipe.train
    draft.put({"max_steps": train.steps, "seq_len": rollout.max_tokens + PROMPT_TOKENS}, "train.steps")
    draft.put({"model.name": recipe.model.path}, "model.path", "rollout.engine")
    draft.put({"ckpt.interval": recipe.save.every, "ckpt.keep_last": recipe.save.keep}, "save.every", "save.keep")
    draft.put({"orchestrator.batch_size": rollout.prompts * rollout.completions}, "rollout.prompts")
    draft.put({"orchestrator.group_size": rollout.completions}, "rollout.completions")
    sampling = {"temperature": rollout.temperature, "max_completion_tokens": rollout.max_tokens}
    draft.put({f"orchestrator.train.sampling.{name}": value for name, value in sampling.items()})
    draft.put({"orchestrator.renderer.name": "default"}, "rollout.temperature", "rollout.max_tokens")
    optim = {"type": "adamw", "lr": train.lr, "weight_decay": train.weight_decay, "max_norm": train.grad_norm}
    draft.put({f"trainer.optim.{name}": value for name, value in optim.items()}, "train.lr", "train.weight_decay")
    draft.take("train.grad_norm", "train.schedule", "train.warmup", "train.full")
    draft.put({f"trainer.scheduler.{name}": value for name, value in _prime_schedule(recipe).items()})
    if not train.full:
        _prime_adapter(draft)
    else:
        draft.put({"inference.vllm.gpu_memory_utilization": rollout.share}, "rollout.share")
    _prime_objective(draft)
    return (
        f"# A training with prime-rl, made from the recipe {draft.name} by minigrpo: uv run rl @ THIS_FILE\n"
        f"{_comments(draft.all_notes())}\n" + _toml(draft.settings)
        + '\n[[orchestrator.train.source]]\nname = "task"\n\n'
        '[orchestrator.train.source.env.taskset]\nid = "FILL-IN"\n\n'
        '[orchestrator.train.source.env.agent.harness]\nid = "null"\n\n'
        '[orchestrator.train.source.env.agent.runtime]\ntype = "subprocess"\n'
    )  # fmt: skip


def _prime_schedule(recipe: Recipe) -> dict[str, Any]:
    rising, kind = _rising(recipe), recipe.train.schedule
    if kind == "cosine":
        return {"type": "cosine", "warmup_steps": rising}
    if kind == "constant" and not rising:
        return {"type": "constant"}
    return {
        "type": "linear",
        "warmup_steps": rising,
        "decay_steps": recipe.train.steps - rising if kind == "linear" else 0,
    }


def _prime_adapter(draft: _Draft) -> None:
    lora, share = draft.recipe.lora, draft.recipe.rollout.share
    own: dict[str, Any] = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout}
    own |= {} if lora.targets == "all-linear" else {"target_modules": _names(lora.targets)}
    draft.put({f"trainer.model.lora.{name}": value for name, value in own.items()}, "lora.rank", "lora.alpha")
    draft.put({"orchestrator.model.lora.name": "adapter"}, "lora.dropout", "lora.targets")
    draft.put({"inference.vllm.enable_lora": True, "inference.vllm.gpu_memory_utilization": share}, "rollout.share")


def _prime_objective(draft: _Draft) -> None:
    """Its loss is its own; only the choice of groups that teach nothing, and the baseline, are the same."""
    own = draft.recipe.objective
    draft.take("objective.name")
    draft.notes.append(
        f"prime-rl has a loss of its own (trainer.loss), not {own.name}: ratios to the sampler, masked where far off."
    )
    if _comparison(draft.recipe) != "none":
        draft.notes.append("Advantages there are rewards less their group's mean, not divided by its deviation.")
    draft.notes.append("Rollouts overlap with updates there: orchestrator.max_off_policy_steps says how far.")
    draft.notes.append(
        "Its task is a taskset of verifiers: write one whose reward calls SharedTask(RECIPE).score of "
        "minigrpo.rollouts.for_others, and name it in place of FILL-IN."
    )
    draft.notes.append(f"seq_len leaves {PROMPT_TOKENS} tokens for the prompt, which is a guess.")


def _names(targets: str) -> list[str]:
    return [name.strip() for name in targets.split(",") if name.strip()]


def _arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _comments(notes: list[str]) -> str:
    wrap = partial(textwrap.fill, width=120, initial_indent="# - ", subsequent_indent="#   ", break_long_words=False)
    return "".join(f"{wrap(note)}\n" for note in dict.fromkeys(notes))


def _toml(settings: Mapping[str, Any]) -> str:
    """Write dotted names as tables of TOML, those at the top first; JSON's numbers, texts and lists are TOML's, too."""
    tables: dict[str, list[str]] = {}
    for name, value in settings.items():
        table, _, leaf = name.rpartition(".")
        tables.setdefault(table, []).append(f"{leaf} = {json.dumps(value)}")
    parts = [
        "\n".join([*([f"[{name}]"] if name else []), *lines])
        for name, lines in sorted(tables.items(), key=lambda item: item[0] != "")
    ]
    return "\n\n".join(parts) + "\n"


TRAINERS: Mapping[str, Callable[[_Draft], str]] = {"trl": _to_trl, "verl": _to_verl, "prime-rl": _to_prime_rl}
