"""The Recipe: every knob once, with its default, its unit, its range and what it does.

Flags, `--help`, recipe files and error messages all follow from the fields below. No torch here.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

ObjectiveName = Literal["grpo", "dr_grpo", "dapo"]
EngineName = Literal["auto", "native", "transformers"]
TaskName = Literal["wordproblems"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["constant", "linear", "cosine"]

OBJECTIVE_NAMES: tuple[str, ...] = get_args(ObjectiveName)
ENGINE_NAMES: tuple[str, ...] = get_args(EngineName)
TASK_NAMES: tuple[str, ...] = get_args(TaskName)


def knob(default: Any, about: str, unit: str = "", **limits: Any) -> Any:
    """A field of the recipe; `unit` and `limits` (ge, gt, le, lt) are shown in help and in refusals."""
    return Field(default, description=about, json_schema_extra={"unit": unit}, **limits)


class Knobs(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelKnobs(Knobs):
    path: str = knob(
        "seedling",
        "what to train: a folder, a Hub id, or the embedded model: seedling, or seedling:ARCHITECTURE with llama, "
        "qwen2, qwen3 or ministral3",
    )
    revision: str | None = knob(None, "commit or branch, where path is a Hub id")
    dtype: DtypeName = knob(
        "auto", "number type of the frozen weights; auto: bfloat16 where the device truly has it, and float32 on a CPU"
    )
    device: str = knob("auto", "cuda, cuda:1, cpu ...; auto: the first GPU, else the CPU")
    checkpointing: bool = knob(False, "recompute activations in the backward pass: less memory, a third more time")


class LoraKnobs(Knobs):
    rank: int = knob(64, "rank of the adapter", ge=1, le=4096)
    alpha: float = knob(128.0, "the adapter's output is scaled by alpha / rank", gt=0)
    dropout: float = knob(0.0, "share of the adapter's inputs dropped, in the gradient pass only", ge=0, lt=1)
    targets: str = knob("all-linear", "all-linear, or names of linear layers with commas: q_proj,v_proj")
    rslora: bool = knob(False, "rank-stabilised: scale by alpha / sqrt(rank)")


class TaskKnobs(Knobs):
    name: str = knob("wordproblems", "a task of `minigrpo tasks`, or FILE.py:NAME for your own")
    size: int = knob(512, "training prompts; they come round again when a run needs more", "prompts", ge=1)
    weights: dict[str, float] = knob({}, "weight of each reward function by name, over the task's own weights")


class RolloutKnobs(Knobs):
    prompts: int = knob(8, "prompts a step", "prompts", ge=1)
    completions: int = knob(8, "completions of each prompt: the group", "completions", ge=2)
    temperature: float = knob(1.0, "sampling temperature in training; scoring uses the same", gt=0, le=10)
    max_tokens: int = knob(256, "longest completion", "tokens", ge=1)
    engine: EngineName = knob("auto", "who samples; auto: native where the architecture is known to it")
    rows: int = knob(256, "completions decoded side by side", "rows", ge=1)


class ObjectiveKnobs(Knobs):
    name: ObjectiveName = knob("grpo", "how rewards become a loss")
    clip_low: float | None = knob(
        None, "ratios below 1 - clip_low stop counting; empty: the objective's own", gt=0, lt=1
    )
    clip_high: float | None = knob(None, "ratios above 1 + clip_high stop counting; empty: the objective's own", gt=0)
    kl: float = knob(0.0, "weight of the KL penalty to the reference: the model without its adapter", ge=0)
    importance: Literal["auto", "on", "off"] = knob(
        "auto", "correct for the sampler's own rounding (truncated importance sampling); auto: where weights are 16 bit"
    )
    importance_cap: float = knob(2.0, "largest importance weight", ge=1)


class TrainKnobs(Knobs):
    steps: int = knob(100, "optimizer steps", "steps", ge=1)
    lr: float = knob(1e-5, "peak learning rate", gt=0, le=1)
    schedule: Schedule = knob("constant", "learning rate after warm-up")
    warmup: float = knob(0.0, "share of the steps in which the learning rate rises from 0", ge=0, le=1)
    weight_decay: float = knob(0.0, "decoupled weight decay of AdamW", ge=0)
    grad_norm: float = knob(1.0, "the gradient is scaled down to this norm", gt=0)
    full: bool = knob(False, "train every parameter instead of a LoRA adapter")
    tokens_per_pass: int = knob(0, "tokens in one forward pass; 0: measured at the start", "tokens", ge=0)
    threads: int = knob(0, "CPU threads; 0: all cores", "threads", ge=0)


class SaveKnobs(Knobs):
    every: int = knob(25, "steps between checkpoints", "steps", ge=1)
    keep: int = knob(3, "newest checkpoints kept", "checkpoints", ge=1)


class EvalKnobs(Knobs):
    limit: int = knob(500, "unseen prompts in the evaluation", "prompts", ge=1)


class Recipe(Knobs):
    """A whole run. `minigrpo recipes` lists the ones that come with the package."""

    about: str = knob("", "one sentence: what this recipe is for")
    seed: int = knob(0, "names every random stream of the run", ge=0, lt=2**31)
    model: ModelKnobs = ModelKnobs()
    lora: LoraKnobs = LoraKnobs()
    task: TaskKnobs = TaskKnobs()
    rollout: RolloutKnobs = RolloutKnobs()
    objective: ObjectiveKnobs = ObjectiveKnobs()
    train: TrainKnobs = TrainKnobs()
    save: SaveKnobs = SaveKnobs()
    eval: EvalKnobs = EvalKnobs()

    @model_validator(mode="after")
    def agree(self) -> Recipe:
        """Knobs that are each fine alone but contradict one another."""
        if self.train.full and self.lora.dropout > 0:
            raise ValueError("lora.dropout needs an adapter: leave it at 0 with train.full")
        return self
