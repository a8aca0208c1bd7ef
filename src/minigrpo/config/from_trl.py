"""Turn the settings of a GRPO training with TRL (or with Unsloth, which uses TRL's trainer) into a recipe.

What has no counterpart here, and what differs, is told in sentences: a recipe that silently trained otherwise would be
worse than none. Defaults are those of GRPOConfig and TrainingArguments as of TRL 1.16 and transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Importance, Recipe
from minigrpo.config.trl_script import Named, TrlSettings, read_trl
from minigrpo.errors import RecipeError

TRL_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 1e-6,
    "num_generations": 8,
    "max_completion_length": 512,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_iterations": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "epsilon": 0.2,
    "use_bias_correction_kl": True,
    "max_steps": -1,
    "seed": 42,
}
SAME_MEANING: Mapping[str, str] = {
    "learning_rate": "train.lr",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.grad_norm",
    "num_generations": "rollout.completions",
    "temperature": "rollout.temperature",
    "max_completion_length": "rollout.max_tokens",
    "beta": "objective.kl",
    "use_bias_correction_kl": "objective.kl_unbiased",
    "epsilon": "objective.clip_low",
    "delta": "objective.clip_dual",
    "mask_truncated_completions": "objective.mask_truncated",
    "top_entropy_quantile": "objective.top_entropy",
    "off_policy_mask_threshold": "objective.off_policy",
    "cast_lm_head_to_fp32": "model.head_float32",
    "chat_template_kwargs": "model.template",
    "seed": "seed",
    "save_steps": "save.every",
    "save_total_limit": "save.keep",
    "hub_model_id": "publish.repo",
}
"""Fields whose values are taken as they are."""
LORA_FIELDS: Mapping[str, str] = {
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
}
LORA_DEFAULTS: Mapping[str, Any] = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
ELSEWHERE: Mapping[str, str] = {
    "top_p": "samples are drawn from the policy itself",
    "top_k": "samples are drawn from the policy itself",
    "min_p": "samples are drawn from the policy itself",
    "repetition_penalty": "samples are drawn from the policy itself",
    "generation_kwargs": "samples are drawn from the policy itself",
    "max_prompt_length": "prompts are never cut; preflight names those that are too long",
    "sync_ref_model": "the reference stays the model that training began with",
    "deepspeed": "there is one device",
    "fsdp": "there is one device",
    "modules_to_save": "an adapter has low-rank parts only",
    "use_dora": "training is with plain LoRA",
    "bias": "biases are not trained",
    "tools": "a completion is one answer",
    "environment_factory": "a completion is one answer",
    "neftune_noise_alpha": "no noise is added to embeddings",
    "dataset_train_split": "rows come from the split that is called train",
}
"""Why a field has no counterpart."""
NOT_IN_4_BIT = ("load_in_8bit", "load_in_16bit", "full_finetuning")
"""Options of Unsloth's models that go before load_in_4bit, which is on by default there."""
SPREAD = ("**",)
"""What an argument is called that holds any number of fields."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "top_p": (1, None),
    "top_k": (0, -1, None),
    "min_p": (0, None),
    "repetition_penalty": (1, None),
    "sync_ref_model": (False,),
    "bias": ("none",),
    "dataset_train_split": ("train",),
    "use_dora": (False,),
}
"""Values of those fields that change nothing."""
HARMLESS = (
    *("output_dir", "report_to", "run_name", "remove_unused_columns", "push_to_hub", "do_eval", "bf16", "fp16", "tf32"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "use_liger_kernel", "torch_compile", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "ddp_find_unused_parameters", "disable_dropout", "shuffle_dataset"),
    *("num_completions_to_print", "wandb_log_unique_prompts", "hub_strategy", "hub_private_repo", "save_strategy"),
    *("use_transformers_continuous_batching", "transformers_continuous_batching_config", "cache_implementation"),
    *("use_peft", "overwrite_output_dir", "save_only_model", "model_init_kwargs", "trust_remote_code", "use_vllm"),
    *("attn_implementation", "lora_task_type", "task_type"),
)
"""Fields that say how TRL works or what it reports, not what is trained, and those that are read elsewhere."""
HARMLESS_PREFIXES = ("logging_", "log_", "dataloader_", "vllm_", "eval_", "per_device_eval", "unsloth_", "ds3_", "run_")
READ_BY_RULE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size", "steps_per_generation"),
    *("num_iterations", "max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "optim"),
    *("loss_type", "importance_sampling_level", "epsilon_high", "scale_rewards", "multi_objective_aggregation"),
    *("reward_weights", "reward_funcs", "entropy_coef", "use_adaptive_entropy", "entropy_target", "entropy_coef_max"),
    *("model_name_or_path", "dataset_name", "dataset_config", "lora_target_modules", "load_in_4bit", "dtype"),
    *("torch_dtype", "model_revision"),
)
COUNTS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size", "steps_per_generation"),
    *("num_generations", "num_iterations"),
)
NUMBERS = (*COUNTS, "max_steps", "warmup_ratio", "warmup_steps", "epsilon", "epsilon_high", "entropy_coef")
"""Fields that are computed with. Those of COUNTS are whole and at least 1."""


@dataclass(frozen=True, slots=True)
class FromTrl:
    """The recipe, and sentences: what has no counterpart, what differs, and what is left to do."""

    recipe: Recipe
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Draft:
    """Knobs and notes, while they are gathered."""

    settings: TrlSettings
    knobs: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def group(self, name: str) -> Mapping[str, Any]:
        return self.settings.groups.get(name, {})

    def config(self, name: str) -> Any:
        """Return the field's value, or TRL's default where it is not set, or set to None."""
        value = self.group("config").get(name)
        return TRL_DEFAULTS.get(name) if value is None else value


def recipe_from_trl(path: Path) -> FromTrl:
    """Read a script or a configuration. Raise RecipeError where it is neither, or sets what no recipe can hold."""
    settings = read_trl(path)
    _check_numbers(path, settings)
    draft = _Draft(settings, notes=list(_what_was_not_read(settings)))
    for rule in (_take_same, _take_batch, _take_objective, _take_entropy, _take_model, _take_adapter, _take_engine):
        rule(draft)
    for rule in (_take_schedule, _take_data, _take_rewards, _name_the_rest):
        rule(draft)
    draft.knobs["about"] = f"made from {path.name}"
    try:
        return FromTrl(load_recipe(None, draft.knobs), tuple(dict.fromkeys(draft.notes)))
    except RecipeError as fault:
        raise RecipeError(f"{path} sets what no recipe can hold. {fault}") from None


def _what_was_not_read(settings: TrlSettings) -> Iterator[str]:
    """Yield a sentence for each setting whose value is not known, and which a recipe would hold."""
    matter = {
        "config": {*SAME_MEANING, *READ_BY_RULE, *SPREAD},
        "lora": {*LORA_FIELDS, "target_modules", *SPREAD},
        "model": {"model_name", "revision", "dtype", "torch_dtype", "load_in_4bit", *SPREAD},
        "trainer": {"reward_funcs", *SPREAD, *(() if "model" in settings.groups else ("model",))},
        "data": {"path", "name", "data_files", *SPREAD},
        "quantize": {"load_in_4bit", *SPREAD},
    }
    for unread in settings.unread:
        if unread.option in ELSEWHERE:
            yield f"{unread.option} has no counterpart: {ELSEWHERE[unread.option]}."
        elif unread.option in matter[unread.group]:
            yield f"{unread.told}: set it by hand."


def _check_numbers(path: Path, settings: TrlSettings) -> None:
    """Raise RecipeError where a field that is computed with is no number, or no count."""
    for name in NUMBERS:
        value = settings.groups.get("config", {}).get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        is_count = isinstance(value, int) and value >= 1
        if value is not None and not (is_number and (is_count or name not in COUNTS)):
            kind = "a whole number of at least 1" if name in COUNTS else "a number"
            raise RecipeError(f"{path}: {name} is {str(value)[:60]}, but must be {kind}.")


def _take_same(draft: _Draft) -> None:
    for name, knob in SAME_MEANING.items():
        value = draft.config(name)
        if name in ("save_steps", "save_total_limit") and not (isinstance(value, int) and value >= 1):
            continue
        if value is not None:
            draft.knobs[knob] = value


def _take_batch(draft: _Draft) -> None:
    """Find the prompts of a step and the updates from them.

    TRL samples per_device_train_batch_size * steps_per_generation completions at once, and updates once for each
    gradient_accumulation_steps of these, num_iterations times over.
    """
    size, accumulate = draft.config("per_device_train_batch_size"), draft.config("gradient_accumulation_steps")
    parts = draft.config("steps_per_generation") or accumulate
    completions = draft.config("generation_batch_size") or size * parts
    siblings, epochs = draft.config("num_generations"), draft.config("num_iterations")
    prompts = completions / siblings
    draft.knobs["rollout.prompts"] = max(1, round(prompts))
    if prompts != round(prompts) or prompts < 1:
        draft.notes.append(
            f"{completions} completions are no whole number of groups of {siblings}: rollout.prompts is "
            f"{draft.knobs['rollout.prompts']}."
        )
    draft.knobs["train.inner_epochs"] = epochs
    updates = max(1, round(completions / (size * accumulate)))
    if updates > 1:
        draft.notes.append(
            f"TRL cuts the {completions} completions of a rollout into {updates} updates; here each of "
            "train.inner_epochs is one update from all of them."
        )
    steps = draft.config("max_steps")
    if steps and steps > 0:
        draft.knobs["train.steps"] = max(1, round(steps / (updates * epochs)))
    else:
        draft.notes.append(
            "The length of the training follows from epochs over the data there: set train.steps to prompts of the "
            f"data * epochs / {draft.knobs['rollout.prompts']}."
        )
    draft.notes.append("One device is assumed: with N of them, TRL's rollouts are N times as large (rollout.prompts).")


def _take_objective(draft: _Draft) -> None:
    name, sequence = draft.config("loss_type"), draft.config("importance_sampling_level") == "sequence"
    high = draft.config("epsilon_high")
    high = draft.config("epsilon") if high is None else high
    if sequence and name in ("grpo", "bnpo", "dapo", "dr_grpo"):
        if name != "grpo":
            draft.notes.append(f"A ratio for each sequence goes with loss_type grpo's weights here, not {name}'s.")
        name = "gspo"
    if name not in ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo"):
        draft.notes.append(f"loss_type {name} has no counterpart: objective.name is dapo.")
        name = "dapo"
    draft.knobs["objective.name"] = name
    if name == "cispo":  # TRL's cap is epsilon_high itself, ours 1 + clip_high
        draft.knobs.pop("objective.clip_low", None)
        if high > 1:
            draft.knobs["objective.clip_high"] = high - 1
        else:
            draft.notes.append(f"TRL would cap every ratio at {high:g}, below 1: objective.clip_high is CISPO's own.")
    else:
        draft.knobs["objective.clip_high"] = high
    if name in ("cispo", "sapo"):
        draft.knobs.pop("objective.clip_dual", None)
    scale = draft.config("scale_rewards")
    compare = {True: "group", False: "none"}.get(scale, scale) if isinstance(scale, bool) else scale
    per_function = draft.config("multi_objective_aggregation") == "normalize_then_sum"
    draft.knobs["objective.compare"] = "gdpo" if per_function else compare


def _take_entropy(draft: _Draft) -> None:
    weight = draft.config("entropy_coef") or 0.0
    if draft.config("use_adaptive_entropy"):
        draft.knobs["objective.entropy_target"] = draft.config("entropy_target") or 0.2
        weight = draft.config("entropy_coef_max") or 1.0
    draft.knobs["objective.entropy"] = weight


def _take_engine(draft: _Draft) -> None:
    if not draft.config("use_vllm"):
        return
    if draft.knobs.get("train.full") or draft.knobs.get("model.quantize"):
        draft.notes.append("vLLM samples with an adapter on a base in 16 bit only: rollout.engine is left at auto.")
        return
    draft.knobs["rollout.engine"] = "vllm"
    if draft.config("vllm_mode") == "server":
        host = draft.config("vllm_server_host") or "127.0.0.1"
        port = draft.config("vllm_server_port") or 8000
        host = "127.0.0.1" if host == "0.0.0.0" else host
        draft.knobs["rollout.server"] = draft.config("vllm_server_base_url") or f"http://{host}:{port}"
        draft.notes.append("The server is vLLM's own (`vllm serve`), not `trl vllm-serve`: see docs/vllm.md.")
    elif share := draft.config("vllm_gpu_memory_utilization"):
        draft.knobs["rollout.share"] = share
    if draft.config("vllm_importance_sampling_correction") is False:
        draft.knobs["objective.importance"] = "off"
        return
    mode = draft.config("vllm_importance_sampling_mode") or "sequence_mask"
    cap = draft.config("vllm_importance_sampling_clip_max") or draft.config("vllm_importance_sampling_cap") or 3.0
    if mode in get_args(Importance):
        draft.knobs |= {"objective.importance": mode, "objective.importance_cap": cap}
        draft.knobs["objective.importance_floor"] = draft.config("vllm_importance_sampling_clip_min") or 0.0


def _take_model(draft: _Draft) -> None:
    trainer, model, config = draft.group("trainer"), draft.group("model"), draft.group("config")
    named = (model.get("model_name"), trainer.get("model"), config.get("model_name_or_path"))
    path = next((one for one in named if isinstance(one, str)), None)
    if path:
        draft.knobs["model.path"] = path
    else:
        draft.notes.append("The model could not be read: set model.path.")
    if revision := model.get("revision") or config.get("model_revision"):
        draft.knobs["model.revision"] = revision
    own = config.get("model_init_kwargs")
    options = {**config, **model, **(own if isinstance(own, dict) else {})}
    dtype = options.get("dtype") or options.get("torch_dtype")
    dtype = "float16" if dtype is None and config.get("fp16") else dtype
    if dtype in ("bfloat16", "float16", "float32"):
        draft.knobs["model.dtype"] = dtype
    packing = {**options, **draft.group("quantize")}
    if packing.get("load_in_4bit") and not any(packing.get(name) for name in NOT_IN_4_BIT):
        draft.knobs["model.quantize"] = "nf4"
    if packing.get("load_in_8bit"):
        draft.notes.append("8-bit weights have no counterpart: model.quantize nf4 packs them in 4 bit.")
    if path and "bnb-4bit" in path:
        draft.notes.append(f"{path} is packed already: give model.path the model that it was made from.")


def _take_adapter(draft: _Draft) -> None:
    config, lora = draft.group("config"), draft.group("lora")
    from_file = bool(config.get("use_peft")) or "lora_r" in config
    if "lora" not in draft.settings.groups and not from_file:
        draft.knobs["train.full"] = True
        draft.notes.append("There is no LoraConfig, so every parameter is trained: that takes float32 weights here.")
        return
    given = {**LORA_DEFAULTS, **({"r": 16, "lora_alpha": 32, "lora_dropout": 0.05} if from_file else {})}
    given |= {**lora, **({name: value for name, value in config.items() if name in LORA_FIELDS} if from_file else {})}
    given.update({"r": given["lora_r"]} if "lora_r" in given else {})
    draft.knobs |= {knob: given[name] for name, knob in LORA_FIELDS.items() if name in given and name != "lora_r"}
    targets = lora.get("target_modules") or config.get("lora_target_modules")
    if targets is None:
        targets = ["q_proj", "v_proj"]
        draft.notes.append("PEFT chooses the layers by architecture: q_proj and v_proj for most (lora.targets).")
    draft.knobs["lora.targets"] = ",".join(map(str, targets)) if isinstance(targets, list) else str(targets)


def _take_schedule(draft: _Draft) -> None:
    name = str(draft.config("lr_scheduler_type"))
    known = {"constant_with_warmup": "constant"}.get(name, name)
    if known not in ("constant", "linear", "cosine"):
        draft.notes.append(f"lr_scheduler_type {name} has no counterpart: train.schedule is cosine.")
        known = "cosine"
    draft.knobs["train.schedule"] = known
    warmup = draft.config("warmup_ratio") or draft.config("warmup_steps") or 0
    if warmup >= 1:  # transformers: steps; below 1 a share
        steps = draft.config("max_steps") or 0
        if steps <= 0:
            draft.notes.append(f"{warmup} steps of warm-up: set train.warmup to their share of the training.")
        warmup = min(1.0, warmup / steps) if steps > 0 else 0
    draft.knobs["train.warmup"] = warmup
    optimizer = str(draft.config("optim") or "adamw_torch")
    if "adamw" not in optimizer:
        draft.notes.append(f"optim {optimizer} has no counterpart: train.optimizer is adamw.")
    draft.knobs["train.optimizer"] = "adamw8bit" if "adamw" in optimizer and "8bit" in optimizer else "adamw"


def _take_data(draft: _Draft) -> None:
    data, config = draft.group("data"), draft.group("config")
    name = data.get("path") or config.get("dataset_name")
    part = data.get("name") or config.get("dataset_config")
    if name in ("json", "csv", "parquet"):
        files = data.get("data_files")
        files = files.get("train") if isinstance(files, dict) else files
        name, part = files[0] if isinstance(files, list) and len(files) == 1 else files, None
    if isinstance(name, str):
        draft.knobs["task.data"] = f"{name}:{part}" if isinstance(part, str) else name
        draft.notes.append(
            "Rows are read as they are: a prompt in `prompt` or `messages`, other columns for the rewards. What the "
            "script makes of them (map, filter) belongs into a `rows` of your file."
        )
    else:
        draft.notes.append("The rows could not be read: put `rows` beside your rewards, or set task.data.")


def _take_rewards(draft: _Draft) -> None:
    given = draft.group("trainer").get("reward_funcs", draft.group("config").get("reward_funcs"))
    if isinstance(given, Named):
        functions, name = given.functions or (given.name,), given.name
    else:
        items = given if isinstance(given, list) else [given] if given else []
        functions = tuple(item.name if isinstance(item, Named) else str(item) for item in items)
        name = functions[0] if len(functions) == 1 else "rewards"
    if len(functions) == 0:
        draft.notes.append("The reward functions could not be read: set task.name to FILE.py:NAME.")
        return
    script = draft.settings.script
    told = ", ".join(functions)
    usable = script is not None and not draft.settings.runs_when_imported and (name != "rewards" or len(functions) == 1)
    draft.knobs["task.name"] = f"{script if usable else 'rewards.py'}:{name}"
    if not usable:
        made = f", and `rewards = [{told}]` below them" if name == "rewards" else ""
        draft.notes.append(
            f"Copy {told}, with all that is used there, into rewards.py{made}: a task file is imported, and must not "
            "train."
        )
    weights = draft.config("reward_weights")
    if isinstance(weights, list) and len(weights) == len(functions):
        draft.knobs["task.weights"] = dict(zip(functions, weights, strict=True))


def _name_the_rest(draft: _Draft) -> None:
    """Name every field that has no counterpart and is not at a value that changes nothing."""
    known = {*SAME_MEANING, *READ_BY_RULE, *HARMLESS, *LORA_FIELDS}
    for group in ("config", "lora", "trainer"):
        for name, value in draft.group(group).items():
            if name in known or name.startswith(HARMLESS_PREFIXES) or value in NEUTRAL.get(name, ()):
                continue
            if name in ELSEWHERE:
                draft.notes.append(f"{name} has no counterpart: {ELSEWHERE[name]}.")
            elif group == "config":
                draft.notes.append(f"{name} has no counterpart.")
