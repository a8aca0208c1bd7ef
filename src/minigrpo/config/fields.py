"""List the recipe's knobs from its fields, so that help, files and error messages never disagree.

Also find the knob that somebody meant: by the names other trainers use, by its last part alone, by spelling.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from minigrpo.config.schema import Recipe

ALIASES: dict[str, str] = {
    "alpha": "lora.alpha",
    "adapter_rank": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lora_target_modules": "lora.targets",
    "use_rslora": "lora.rslora",
    "base_model": "model.path",
    "model_id": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "gradient_checkpointing": "model.checkpointing",
    "dataset": "task.name",
    "dataset_name": "task.name",
    "max_train_samples": "task.size",
    "num_prompts": "task.size",
    "reward_weights": "task.weights",
    "batch_size": "rollout.prompts",
    "per_device_train_batch_size": "rollout.prompts",
    "prompts_per_step": "rollout.prompts",
    "g": "rollout.completions",
    "group_size": "rollout.completions",
    "num_completions": "rollout.completions",
    "num_generations": "rollout.completions",
    "n": "rollout.completions",
    "max_completion_length": "rollout.max_tokens",
    "max_length": "rollout.max_tokens",
    "max_new_tokens": "rollout.max_tokens",
    "max_response_length": "rollout.max_tokens",
    "algorithm": "objective.name",
    "loss": "objective.name",
    "loss_type": "objective.name",
    "beta": "objective.kl",
    "kl_beta": "objective.kl",
    "kl_coef": "objective.kl",
    "num_iterations": "train.inner_epochs",
    "ppo_epochs": "train.inner_epochs",
    "delta": "objective.clip_dual",
    "scale_rewards": "objective.compare",
    "use_bias_correction_kl": "objective.kl_unbiased",
    "off_policy_mask_threshold": "objective.off_policy",
    "entropy_coef": "objective.entropy",
    "top_entropy_quantile": "objective.top_entropy",
    "mask_truncated_completions": "objective.mask_truncated",
    "cast_lm_head_to_fp32": "model.head_float32",
    "chat_template_kwargs": "model.template",
    "eval_steps": "eval.every",
    "sft_steps": "warmup.steps",
    "clip": "objective.clip_low",
    "clip_eps": "objective.clip_low",
    "clip_range": "objective.clip_low",
    "epsilon": "objective.clip_low",
    "epsilon_low": "objective.clip_low",
    "epsilon_high": "objective.clip_high",
    "importance_sampling": "objective.importance",
    "use_importance_sampling": "objective.importance",
    "vllm_importance_sampling_correction": "objective.importance",
    "learning_rate": "train.lr",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "max_steps": "train.steps",
    "iterations": "train.steps",
    "num_steps": "train.steps",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "max_grad_norm": "train.grad_norm",
    "gradient_clipping": "train.grad_norm",
    "full_finetuning": "train.full",
    "full_parameter": "train.full",
    "gradient_accumulation_steps": "train.tokens_per_pass",
    "micro_batch": "train.tokens_per_pass",
    "micro_batch_size": "train.tokens_per_pass",
    "num_threads": "train.threads",
    "checkpoint_every": "save.every",
    "save_steps": "save.every",
    "save_total_limit": "save.keep",
    "eval_limit": "eval.limit",
    "max_eval_samples": "eval.limit",
    "random_seed": "seed",
    "report_to": "track.to",
    "wandb_project": "track.project",
}
"""Names that other trainers give to our knobs: used for suggestions only, never accepted in silence."""

_LIMIT_SYMBOLS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


_NUMBER_TABLE, _VALUE_TABLE = "names with numbers, {name: number}", "names with values, {name: value}"
_ROW_KINDS = {_NUMBER_TABLE: "a number", _VALUE_TABLE: "true, false, a finite number or text"}
"""Kind of a table -> what one of its rows may hold."""


@dataclass(frozen=True, slots=True)
class Field:
    """One knob. `name` is dotted, as in lora.rank; `choices` is empty where any value of the kind is allowed."""

    name: str
    kind: str
    default: Any
    unit: str
    range: str
    about: str
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def expects(self) -> str:
        """Say what a value must be: 'a whole number, 1 to 4096'."""
        words = f"one of {', '.join(self.choices)}" if self.choices else self.kind
        words = f"{words}, {self.range}" if self.range else words
        return f"{words}; or null" if self.optional else words

    @property
    def is_table(self) -> bool:
        """Return whether the value is a table of names and values, whose rows may be set alone: task.weights.NAME."""
        return isinstance(self.default, dict)

    @property
    def row_expects(self) -> str:
        """Say what the value of one row of a table must be."""
        return _ROW_KINDS[self.kind]

    @property
    def shown_default(self) -> str:
        """Return the default as a recipe file would write it."""
        return format_value(self.default)

    @property
    def summary(self) -> str:
        """Say what the knob does, with its unit and default: all that `expects` does not say."""
        unit = f"unit: {self.unit}; " if self.unit else ""
        return f"{self.name}: {self.about} ({unit}default {self.shown_default})"

    @property
    def manual(self) -> str:
        """Describe the knob in one line: what it does, its unit, range and default."""
        facts = [f"unit: {self.unit}"] if self.unit else []
        facts += [self.expects, f"default {self.shown_default}"]
        return f"{self.name}: {self.about} ({'; '.join(facts)})"


def format_value(value: Any) -> str:
    """Format a value as a recipe file would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return '""' if value == "" else str(value)


@cache
def field_table() -> tuple[Field, ...]:
    """Return every knob of a recipe, in the recipe's order."""
    return tuple(_walk_fields(Recipe, ""))


@cache
def fields_by_name() -> dict[str, Field]:
    return {knob.name: knob for knob in field_table()}


@cache
def sections() -> dict[str, str]:
    """Map each section's name to a list of its knobs, shown to those who set a section as if it were a knob."""
    names = [name for name, field in Recipe.model_fields.items() if _section_model(field)]
    return {name: ", ".join(k.name for k in field_table() if k.name.startswith(f"{name}.")) for name in names}


def _walk_fields(model: type[BaseModel], prefix: str) -> Iterator[Field]:
    for name, field in model.model_fields.items():
        section = _section_model(field)
        if section:
            yield from _walk_fields(section, f"{prefix}{name}.")
        else:
            yield _describe_field(f"{prefix}{name}", field)


def _section_model(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _describe_field(name: str, field: FieldInfo) -> Field:
    kind: Any = field.annotation
    optional = typing.get_origin(kind) in (types.UnionType, typing.Union)
    if optional:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    table = _NUMBER_TABLE if kind == dict[str, float] else _VALUE_TABLE
    extra = field.json_schema_extra
    return Field(
        name=name,
        kind="text" if choices else kinds.get(kind, table),
        default=field.default,
        unit=str(extra.get("unit", "")) if isinstance(extra, dict) else "",
        range=_describe_range(field),
        about=field.description or "",
        choices=choices,
        optional=optional,
    )


def _describe_range(field: FieldInfo) -> str:
    limits = {key: getattr(rule, key) for rule in field.metadata for key in _LIMIT_SYMBOLS if hasattr(rule, key)}
    if limits.keys() == {"ge", "le"}:
        return f"{limits['ge']} to {limits['le']}"
    return " and ".join(f"{_LIMIT_SYMBOLS[key]} {value}" for key, value in limits.items())


def nearest(name: str) -> str | None:
    """Return the knob that `name` most likely means, or None where nothing is near. The surest guess comes first."""
    given = name.lower().replace("-", "_")
    section, _, leaf = given.rpartition(".")
    here = {n.rpartition(".")[2]: n for n in fields_by_name() if n.rpartition(".")[0] == section}
    leaves = {n.rpartition(".")[2]: n for n in reversed(fields_by_name())}
    alias = next((ALIASES[a] for a in (given, given.replace(".", "_"), leaf) if a in ALIASES), None)
    if alias and alias.startswith(f"{section}."):
        return alias
    if section in sections():
        guesses = (leaves.get(leaf), _closest(leaf, here), alias)
    else:
        guesses = (alias, leaves.get(leaf), _closest(given, {n: n for n in fields_by_name()}))
    sure = next((guess for guess in guesses if guess), None)
    return sure or _closest(leaf, {**ALIASES, **leaves})


def _closest(word: str, table: Mapping[str, str]) -> str | None:
    found = difflib.get_close_matches(word, table, n=1, cutoff=0.7)
    return table[found[0]] if found else None
