"""The Recipe: every knob with its default, unit, range and description.

Options, `--help`, recipe files and error messages all follow from the fields below.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ObjectiveName = Literal["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo"]
EngineName = Literal["auto", "native", "slots", "transformers", "vllm"]
TaskName = Literal["wordproblems", "gsm8k", "sudoku"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["constant", "linear", "cosine"]
Comparison = Literal["auto", "group", "batch", "none", "gdpo"]
Importance = Literal["auto", "off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

LICENCE_ID = r"[a-z0-9]+([.-][a-z0-9]+)*"
"""Form of the Hub's names of licences: https://huggingface.co/docs/hub/repositories-licenses"""
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")

OBJECTIVE_NAMES: tuple[str, ...] = get_args(ObjectiveName)
ENGINE_NAMES: tuple[str, ...] = get_args(EngineName)
TASK_NAMES: tuple[str, ...] = get_args(TaskName)

MOST_ANSWERS = 65_536
"""Answers, and prompts, that are sampled and graded as one batch: all of them are in memory at the same time, hundreds
of times as many as any published training has."""
MOST_PROMPTS = 10_000_000
"""Prompts of a task, which are held in memory: some ten GB."""
MOST_TOKENS = 2**24
"""Tokens of one text: more than any model can read."""
MOST_STEPS = 10_000_000
"""Steps of a run: four months at one a second."""


def field(default: Any, about: str, unit: str = "", **limits: Any) -> Any:
    """Define a field of the recipe; help and error messages show `unit` and `limits` (ge, gt, le, lt)."""
    return Field(default, description=about, json_schema_extra={"unit": unit}, **limits)


def as_typed(text: Any) -> Any:
    """Convert "true", "false" and numbers given as text to their values; leave anything else as it is."""
    if not isinstance(text, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(Config):
    path: str = field(
        "seedling",
        "what to train: a folder, a Hub id, or the embedded model: seedling, or seedling:ARCHITECTURE with llama, "
        "qwen2, qwen3 or ministral3; seedling:coder writes programs",
    )
    revision: str | None = field(None, "commit or branch, where path is a Hub id")
    dtype: DtypeName = field(
        "auto",
        "number type of the frozen weights; auto: bfloat16 where the device truly has it and the model is large, else "
        "float16 on a GPU and float32 on a CPU or an Apple GPU; with train.full float32 everywhere",
    )
    device: str = field("auto", "cuda, cuda:1, mps (Apple's GPU), cpu ...; auto: the first CUDA GPU, else the CPU")
    quantize: Literal["none", "nf4"] = field(
        "none", "nf4: the frozen weights in 4 bit with double quantisation (QLoRA): a quarter of the memory, slower"
    )
    checkpointing: Literal["auto", "on", "off"] = field(
        "auto",
        "recompute activations in the backward pass: less memory, a third more time; auto: where the plan needs it",
    )
    head_float32: bool = field(False, "logits in float32 from end to end, where weights are 16 bit; the sampler's too")
    template: dict[str, bool | int | float | str] = field(
        {}, "options of the chat template by name, as in model.template.enable_thinking: false"
    )

    @field_validator("template", mode="before")
    @classmethod
    def typed(cls, value: Any) -> Any:
        """Convert the text of files and options: a template tests `if enable_thinking`, where "false" would be true."""
        return {name: as_typed(text) for name, text in value.items()} if isinstance(value, dict) else value


class AdapterConfig(Config):
    rank: int = field(64, "rank of the adapter", ge=1, le=4096)
    alpha: float = field(128.0, "the adapter's output is scaled by alpha / rank", gt=0)
    dropout: float = field(0.0, "share of the adapter's inputs dropped, in the gradient pass only", ge=0, lt=1)
    targets: str = field("all-linear", "all-linear, or names of linear layers, each of which must fit: q_proj,v_proj")
    rslora: bool = field(False, "rank-stabilised: scale by alpha / sqrt(rank)")


class TaskConfig(Config):
    name: str = field(
        "wordproblems",
        "a task of `minigrpo tasks`, FILE.py:NAME for your own, rg:NAME of reasoning-gym, or judge:FILE or "
        "classifier:FOLDER, a model that judges task.data",
    )
    data: str | None = field(
        None,
        "rows for a reward function, or questions for gsm8k: a JSON lines, CSV or Parquet file, a folder with train "
        "and test files, or a Hub data set; wordproblems: generates some for gsm8k",
    )
    system: str | None = field(
        None,
        'system message of every prompt, in place of the task\'s own; null: as the task has it; "": an empty one, so '
        "that the chat template puts in no words of its own",
    )
    example: bool = field(False, "one worked example in the prompt, in training, preflight and evaluation alike")
    rates: str | None = field(
        None, "an evaluation's JSON over the training prompts: those outside [hardest, easiest] are left out"
    )
    hardest: float = field(0.0, "least share of right answers in task.rates", ge=0, le=1)
    easiest: float = field(1.0, "largest share of right answers in task.rates", ge=0, le=1)
    size: int = field(
        512, "training prompts; they come round again when a run needs more", "prompts", ge=1, le=MOST_PROMPTS
    )
    weights: dict[str, float] = field({}, "weight of each reward function by name, over the task's own weights")
    workers: int = field(1, "groups graded side by side, while others are still being sampled", "groups", ge=1, le=256)
    seconds: float = field(
        60.0, "longest time until the next grade of a group; what is not graded by then is left out", "seconds", gt=0
    )
    games: int = field(
        3, "sudoku: puzzles that each strategy plays; a win is to solve them all", "puzzles", ge=1, le=100
    )
    fewest: int = field(35, "sudoku: empty cells of a puzzle, at least", "cells", ge=1, le=55)
    most: int = field(40, "sudoku: empty cells of a puzzle, at most", "cells", ge=1, le=55)


class RolloutConfig(Config):
    prompts: int = field(8, "prompts a step", "prompts", ge=1, le=MOST_ANSWERS)
    completions: int = field(8, "completions of each prompt: the group", "completions", ge=2, le=MOST_ANSWERS)
    temperature: float = field(1.0, "sampling temperature in training; scoring uses the same", gt=0, le=10)
    max_tokens: int = field(256, "longest completion", "tokens", ge=1, le=MOST_TOKENS)
    engine: EngineName = field(
        "auto",
        "who samples; auto: native, or on a GPU slots, where the architecture is known to them; slots: the same at "
        "fixed shapes, recorded as CUDA graphs on a GPU",
    )
    server: str | None = field(
        None,
        "engine vllm: a server that runs already, http://HOST:8000, or several, separated by commas; null: in this "
        "process",
    )
    share: float = field(0.4, "engine vllm in this process: its share of the GPU's memory", gt=0, lt=1)
    rows: int = field(256, "completions decoded side by side", "rows", ge=1, le=MOST_ANSWERS)
    ahead: int = field(
        0,
        "1: the next step's groups are sampled while this step is updated, so by the policy before the update; with "
        "rollout.engine native on a CPU, or servers",
        "steps",
        ge=0,
        le=1,
    )
    stream: int = field(
        0, "other answers to the same prompts: names another random stream of sampling alone", ge=0, lt=2**31
    )

    @property
    def servers(self) -> tuple[str, ...]:
        """Return the URLs that `server` names."""
        return tuple(url.strip().rstrip("/") for url in (self.server or "").split(",") if url.strip())


class GroupsConfig(Config):
    """Which groups a step learns from: a group whose siblings all tie has no gradient."""

    min_spread: float = field(1e-6, "rewards of a group that differ by no more than this are a tie", ge=0)
    resample: float = field(
        0.0, "prompts tried in place of those whose siblings tie: at most this many times rollout.prompts a step", ge=0
    )
    replay: int = field(
        0, "groups of the last steps may stand in for those that still tie; 0: none do", "steps", ge=0, le=100
    )
    rest: float | None = field(
        None, "a prompt solved by at least this share of its completions rests; null: none rests", gt=0, le=1
    )
    rest_epochs: int = field(3, "epochs for which it rests before it is tried again", "epochs", ge=1)
    focus: float = field(
        0.0,
        "how much likelier a half-solved prompt is drawn than one always or never solved; 0: all alike",
        ge=0,
        le=10,
    )
    factor: dict[str, float] = field(
        {},
        "advantages of a group are multiplied by this, by the id of its prompt, or PROMPT@STEP for one step alone: 0 "
        "leaves the group out, -1 turns it",
    )


class ObjectiveConfig(Config):
    name: ObjectiveName = field("grpo", "how rewards become a loss")
    compare: Comparison = field(
        "auto",
        "what an advantage is measured in: deviations of its group, of the batch, none at all, or each reward function "
        "in deviations of its own (gdpo); auto: the objective's own",
    )
    clip_low: float | None = field(
        None, "ratios below 1 - clip_low stop counting; empty: the objective's own", gt=0, lt=1
    )
    clip_high: float | None = field(None, "ratios above 1 + clip_high stop counting; empty: the objective's own", gt=0)
    clip_dual: float | None = field(
        None, "largest ratio that counts against a bad answer (dual clip); above 1 + clip_high; null: any", gt=1
    )
    kl: float = field(0.0, "weight of the KL penalty to the reference: the model that training began with", ge=0)
    kl_unbiased: bool = field(False, "multiply the KL by the ratio: unbiased when samples are off-policy")
    importance: Importance = field(
        "auto",
        "correct for a sampler that is not quite the policy, per token or sequence, by truncating weights or masking "
        "what lies outside; auto: token_truncate where weights are 16 bit, the engine is vllm, or groups are replayed "
        "or sampled ahead",
    )
    importance_cap: float = field(2.0, "largest importance weight", ge=1)
    importance_floor: float = field(0.0, "smallest importance weight", ge=0, le=1)
    off_policy: float | None = field(
        None, "bad answers that the policy has left by more than this, in nats a token, are dropped; null: none", gt=0
    )
    entropy: float = field(0.0, "weight of the entropy bonus; with entropy_target its largest weight", ge=0)
    entropy_target: float | None = field(
        None,
        "the bonus adapts: it grows while entropy is below this, and is off above; null: it is fixed",
        "nats",
        ge=0,
    )
    top_entropy: float = field(
        1.0, "share of the tokens, those of highest entropy, that the policy learns from", gt=0, le=1
    )
    overlong: int = field(
        0, "the last so many tokens before the limit cost up to 1 of the reward; 0: they cost nothing", "tokens", ge=0
    )
    mask_truncated: bool = field(False, "completions that were cut off teach nothing")


class TrainConfig(Config):
    steps: int = field(100, "rollouts, each followed by its updates", "steps", ge=1, le=MOST_STEPS)
    until: int = field(
        0,
        "the run ends after this step, and its learning rate is still that of train.steps; 0: train.steps",
        "steps",
        ge=0,
        le=MOST_STEPS,
    )
    inner_epochs: int = field(1, "updates from each rollout", "updates", ge=1, le=64)
    lr: float = field(1e-5, "peak learning rate", gt=0, le=1)
    schedule: Schedule = field("constant", "learning rate after warm-up")
    warmup: float = field(0.0, "share of the steps in which the learning rate rises from 0", ge=0, le=1)
    weight_decay: float = field(0.0, "decoupled weight decay of AdamW", ge=0)
    optimizer: Literal["adamw", "adamw8bit"] = field(
        "adamw", "adamw8bit: AdamW whose two moments are kept in 8 bit (bitsandbytes): a quarter of their memory"
    )
    grad_norm: float = field(1.0, "a gradient of a larger norm is scaled down to this norm", gt=0)
    full: bool = field(False, "train every parameter instead of a LoRA adapter")
    shard: Literal["auto", "on", "off"] = field(
        "auto",
        "shard weights, gradients and moments of train.full over the ranks (FSDP2); auto: where several train, with "
        "rollout.engine native and train.optimizer adamw",
    )
    tokens_per_pass: int = field(0, "tokens in one forward pass; 0: measured at the start", "tokens", ge=0)
    memory: float | None = field(None, "memory that the run may use on its device; null: what is free", "GB", gt=0)
    reference: Literal["auto", "device", "cpu"] = field(
        "auto", "where train.full keeps its frozen copy for the KL term; auto: on the device where the plan has room"
    )
    threads: int = field(0, "CPU threads; 0: all cores", "threads", ge=0, le=4096)

    @property
    def last_step(self) -> int:
        """Return the number of steps that the run does."""
        return self.until or self.steps


class SaveConfig(Config):
    every: int = field(25, "steps between checkpoints", "steps", ge=1)
    keep: int = field(3, "newest checkpoints kept, besides the best", "checkpoints", ge=1)
    take: Literal["last", "best"] = field("last", "which checkpoint becomes the result; best needs eval.every")


class EvalConfig(Config):
    limit: int = field(500, "unseen prompts in the evaluation", "prompts", ge=1, le=MOST_PROMPTS)
    every: int = field(0, "steps between evaluations during training; 0: none", "steps", ge=0)
    held_out: int = field(
        64, "training prompts kept aside for them, where eval.every is set", "prompts", ge=1, le=MOST_PROMPTS
    )


class WatchConfig(Config):
    """What a run does when its numbers go wrong."""

    every: int = field(20, "an alarm that goes on is repeated after so many steps", "steps", ge=1)
    explosion: float = field(
        20.0, "loss, gradient norm or KL beyond this many times their running median are an explosion; 0: never", ge=0
    )
    patience: int = field(3, "steps in a row with an explosion before the run stops", "steps", ge=1)


class WarmupConfig(Config):
    """A supervised start, for a model that never shows the asked-for form."""

    steps: int = field(0, "supervised steps before GRPO; 0: none", "steps", ge=0, le=MOST_STEPS)
    data: str | None = field(
        None, "JSON lines with written answers: {prompt, completion}; null: the task's own right answers"
    )
    rows: int = field(16, "written answers a step", "answers", ge=1, le=MOST_ANSWERS)
    lr: float = field(1e-4, "peak learning rate", gt=0, le=1)


class SandboxConfig(Config):
    """For tasks whose answers are programs. What it protects stands in docs/sandbox.md."""

    unsafe: bool = field(False, "run programs although this machine lacks a necessary lock: they may do what you can")
    cpu_seconds: float = field(1.0, "CPU time of one program, over all its calls", "seconds", gt=0, le=3600)
    memory_mb: int = field(64, "memory of one program, besides the interpreter's own", "MB", ge=8, le=65536)
    workers: int = field(0, "programs run side by side; 0: one for each core, up to eight", "processes", ge=0, le=256)


class ExportConfig(Config):
    """What `run` makes of the merged model for llama.cpp."""

    formats: str = field("Q8_0", 'GGUF files, with commas between: F16, Q8_0, Q4_K_M ...; "": none')


class TrackConfig(Config):
    """Trackers that get the figures and completions besides the run's own logs. What they are sent: docs/track.md."""

    to: str = field("", 'with commas between: tensorboard, trackio, wandb, mlflow; "": none')
    project: str = field("minigrpo", "name under which trackers file their runs")
    offline: bool = field(False, "keep what they write on this machine")


def tracker_names(config: TrackConfig) -> tuple[str, ...]:
    """Return the trackers that `track.to` names, each once."""
    return tuple(dict.fromkeys(filter(None, (name.strip() for name in config.to.split(",")))))


class PublishConfig(Config):
    """Whether `run` ends on the Hugging Face Hub."""

    repo: str | None = field(None, "USER/NAME to publish to; null: nothing leaves this machine")
    public: bool = field(False, "let everybody see it")
    license: str | None = field(
        None, "its licence by the Hub's ID: apache-2.0, mit ...; null: the base's, where it says"
    )


class Recipe(Config):
    """A whole run. `minigrpo recipes` lists the ones that come with the package."""

    about: str = field("", "one sentence: what this recipe is for")
    seed: int = field(0, "names every random stream of the run", ge=0, lt=2**31)
    model: ModelConfig = ModelConfig()
    lora: AdapterConfig = AdapterConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    groups: GroupsConfig = GroupsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    save: SaveConfig = SaveConfig()
    eval: EvalConfig = EvalConfig()
    watch: WatchConfig = WatchConfig()
    warmup: WarmupConfig = WarmupConfig()
    sandbox: SandboxConfig = SandboxConfig()
    export: ExportConfig = ExportConfig()
    publish: PublishConfig = PublishConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def agree(self) -> Recipe:
        """Raise ValueError where knobs that are each valid contradict one another."""
        for wrong, sentence in contradictions(self):
            if wrong:
                raise ValueError(sentence)
        return self


def contradictions(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    """Yield (whether the contradiction holds, a sentence that names its knobs, by which their lines are found)."""
    train, lora, objective = recipe.train, recipe.lora, recipe.objective
    yield (
        train.full and recipe.model.quantize != "none",
        "model.quantize packs frozen weights, and train.full trains them: leave one of them at its default",
    )
    yield train.until > train.steps, "train.until is more than train.steps: the learning rate has no value after them"
    yield recipe.task.fewest > recipe.task.most, "task.fewest is more than task.most: no puzzle has so many empty cells"
    unknown = [name for name in tracker_names(recipe.track) if name not in TRACKERS]
    yield bool(unknown), f"track.to names no tracker {', '.join(unknown)}: there are {', '.join(TRACKERS)}"
    yield not recipe.track.project.strip(), "track.project is empty: trackers file their runs under a name"
    yield (
        train.shard == "on" and not train.full,
        "train.shard spreads what is trained, which is little of an adapter: leave it at auto without train.full",
    )
    yield (
        train.shard == "on" and train.optimizer == "adamw8bit",
        "train.optimizer adamw8bit packs whole moments, and train.shard leaves a rank slices: leave one at its default",
    )
    yield train.full and lora.dropout > 0, "lora.dropout needs an adapter: leave it at 0 with train.full"
    yield (
        train.inner_epochs > 1 and lora.dropout > 0,
        "lora.dropout draws a new mask for each of train.inner_epochs, so their ratios would compare masks: "
        "leave one of them at its default",
    )
    yield (
        recipe.publish.license is not None and not re.fullmatch(LICENCE_ID, recipe.publish.license),
        "publish.license is no ID of the Hub's: small letters and digits, such as apache-2.0 or mit",
    )
    yield (
        objective.name in ("cispo", "sapo") and objective.clip_dual is not None,
        "objective.clip_dual has no meaning for this objective.name: it bounds the ratio in its own way",
    )
    yield (
        objective.entropy_target is not None and objective.entropy == 0,
        "objective.entropy_target needs objective.entropy: the largest weight that the bonus may reach",
    )
    yield (
        objective.overlong >= recipe.rollout.max_tokens,
        "objective.overlong leaves no room: it must be less than rollout.max_tokens",
    )
    yield (
        objective.importance_floor > 0 and objective.importance == "off",
        "objective.importance_floor has no meaning with objective.importance off",
    )
    yield (
        recipe.save.take == "best" and not recipe.eval.every,
        "save.take best needs eval.every, whose evaluations find the best checkpoint",
    )
    yield (
        recipe.warmup.steps > 0 and train.full,
        "warmup.steps trains an adapter, so it cannot be combined with train.full",
    )
    yield from _rollout_contradictions(recipe)


def _address(url: str) -> tuple[str, str, str]:
    """Return what is left of a URL where it is written otherwise: http://Gpu-A:80/ is http://gpu-a."""
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), parts.netloc.lower()
    return scheme, host.removesuffix({"http": ":80", "https": ":443"}.get(scheme, "")), parts.path


def _rollout_contradictions(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    """Yield the contradictions of who samples, and of samples of an older policy."""
    train, objective = recipe.train, recipe.objective
    vllm = recipe.rollout.engine == "vllm"
    yield vllm and train.full, "rollout.engine vllm takes over an adapter: it cannot be combined with train.full"
    yield (
        vllm and recipe.model.quantize != "none",
        "rollout.engine vllm would sample from the base in 16 bit and train it in 4: leave model.quantize at none",
    )
    yield recipe.rollout.server is not None and not vllm, "rollout.server is asked by rollout.engine vllm only"
    servers = recipe.rollout.servers
    yield recipe.rollout.server is not None and not servers, "rollout.server names no server: null is for this process"
    yield len(set(map(_address, servers))) < len(servers), "rollout.server names a server twice"
    yield (
        recipe.groups.replay > 0 and objective.importance == "off",
        "groups.replay brings samples of an older policy: objective.importance must not be off",
    )
    yield (
        recipe.rollout.ahead > 0 and objective.importance == "off",
        "rollout.ahead brings samples of an older policy: objective.importance must not be off",
    )
    yield (
        recipe.rollout.ahead > 0 and train.full,
        "rollout.ahead samples while weights change, so it needs an adapter: leave one of it and train.full",
    )
