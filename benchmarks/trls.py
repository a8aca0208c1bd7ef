"""TRL's side: GRPOTrainer.train in several variants, stopped after each step by a callback that waits for its turn.

At its best means: no gradient checkpointing, the whole batch in one pass (on a GPU in as few as fit), sdpa, the faster
dtype, no logging, no saving, no evaluation. One thing cannot be switched off: without a GPU its output head scores
prompt positions too. Its defaults are what it does where only the problem itself is set: model, prompts, group size,
objective, adapter, lengths, learning rate.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.machine import now
from benchmarks.needed_memory import passes_that_fit
from benchmarks.ours import recipe_of
from benchmarks.sides import CallTimer, Setup, StepGate
from benchmarks.workloads import Workload, task_of
from minigrpo.algorithms.objective import open_objective
from minigrpo.models.peft_compat import prepare_peft
from minigrpo.training.prompt_sampler import PromptSampler
from minigrpo.types import Prompt

# "autocast": bfloat16 in the matrix products over weights of the other type.
DTYPES = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16+autocast": (torch.bfloat16, True),
    "float32+autocast": (torch.float32, True),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to configure TRL. `tuned`: the best settings known; `autocast`: bfloat16 products over other weights."""

    about: str
    tuned: bool = True
    autocast: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)

    def missing(self, workload: Workload) -> str | None:
        """Return why it cannot be run here, or None."""
        if not self.more.get("use_vllm"):
            return None
        if importlib.util.find_spec("vllm") is None:
            return "vLLM is not installed"
        return None if workload.stops == "natural" else "vLLM cannot be told where to stop: --stops natural"


VARIANTS: Mapping[str, Variant] = {
    "best": Variant("transformers generation, best settings"),
    "defaults": Variant("transformers generation, TRL's defaults", tuned=False),
    # It casts the model itself where bf16 is asked for, in place; a cache sized by hand, or it takes all memory.
    "continuous": Variant(
        "transformers' continuous batching, best settings otherwise",
        autocast=False,
        more={"use_transformers_continuous_batching": True},
    ),
    "vllm": Variant(
        "vLLM colocated, best settings otherwise",
        more={"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3},
    ),
}

SHOWN = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations"),
    *("num_generations", "max_completion_length", "temperature", "loss_type", "beta", "epsilon", "epsilon_high"),
    *("gradient_checkpointing",),
    *("bf16", "fp16", "optim", "max_grad_norm", "learning_rate", "disable_dropout", "use_vllm"),
    *(
        "use_transformers_continuous_batching",
        "transformers_continuous_batching_config",
        "cache_implementation",
        "torch_compile",
        "logging_strategy",
    ),
    *("save_strategy", "eval_strategy", "report_to", "log_completions"),
)


def run(setup: Setup, gate: StepGate) -> None:
    """Run TRL's steps until there are no more turns."""
    if VARIANTS[setup.variant].tuned:
        setup = replace(setup, passes=passes_that_fit(setup))
    trainer = open_trainer(setup, load(setup))
    clock = PhaseClock(trainer, setup.device)
    if setup.workload.stops != "natural":
        force_stops(trainer, setup.workload)
    trainer.add_callback(gate_callback(gate, clock))
    gate.ready(settings(trainer))
    trainer.train()


def load(setup: Setup) -> Any:
    """Load the model, or return its folder for the defaults: TRL then loads it its own way."""
    from transformers import AutoModelForCausalLM

    if not VARIANTS[setup.variant].tuned:
        return str(setup.folder)
    dtype, _ = DTYPES[setup.dtype]
    return AutoModelForCausalLM.from_pretrained(setup.folder, dtype=dtype, attn_implementation="sdpa")


def open_trainer(setup: Setup, model: Any, **more: Any) -> Any:
    """Open a GRPOTrainer. `model` is bare and gets the adapter, or has one already."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    prepare_peft()  # TRL meets the same optional packages as we do
    task = task_of(setup.workload, setup.folder)
    prompts = ordered(task.prompts("train"), setup)
    adapter = recipe_of(setup).lora
    lora = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    config = GRPOConfig(**problem_options(setup), **trainer_options(setup))
    by_id = {prompt.id: prompt for prompt in prompts}

    def reward(completions: Sequence[Any], id: Sequence[str], **_: Any) -> list[float]:
        return [task.grade(by_id[n], turns[-1]["content"]).reward for n, turns in zip(id, completions, strict=True)]

    return GRPOTrainer(
        model,
        reward_funcs=[reward],
        args=config,
        train_dataset=Dataset.from_list([row(prompt) for prompt in prompts]),
        processing_class=AutoTokenizer.from_pretrained(setup.folder),
        peft_config=None if isinstance(model, PeftModel) else lora,
        **more,
    )


def problem_options(setup: Setup) -> dict[str, Any]:
    """Return the options of the problem, which are the same for all variants."""
    workload, recipe = setup.workload, recipe_of(setup)
    objective = open_objective(recipe, inexact_engine=False)
    return {
        "output_dir": str(setup.scratch / f"trl-{setup.variant}"),
        "max_steps": setup.steps + 1,  # one that is never taken: the gate stops before it
        "num_generations": workload.completions,
        "max_completion_length": workload.limit,
        "num_iterations": 1,
        "temperature": recipe.rollout.temperature,
        "loss_type": "grpo",
        "epsilon": objective.clip_low,
        "epsilon_high": objective.clip_high,
        "beta": recipe.objective.kl,
        "learning_rate": recipe.train.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "shuffle_dataset": False,
        "use_cpu": setup.device == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trainer_options(setup: Setup) -> dict[str, Any]:
    """Return the options of the variant. By default in passes of 8 completions. Passes add up to the same step."""
    workload, variant = setup.workload, VARIANTS[setup.variant]
    every = workload.prompts * workload.completions
    if not variant.tuned:
        return {"per_device_train_batch_size": min(8, every), "gradient_accumulation_steps": max(1, every // 8)}
    tuned = {
        "per_device_train_batch_size": every // setup.passes,
        "gradient_accumulation_steps": setup.passes,
        "gradient_checkpointing": False,
        "disable_dropout": recipe_of(setup).lora.dropout == 0,
        "bf16": DTYPES[setup.dtype][1] and variant.autocast,
        "logging_strategy": "no",
        "save_strategy": "no",
        "generation_kwargs": {"use_cache": True},
    }
    if variant.more.get("use_transformers_continuous_batching"):
        blocks = every * (2 + (workload.prompt_tokens + workload.limit) // 256)  # of 256 tokens
        tuned["transformers_continuous_batching_config"] = {"num_blocks": blocks, "max_batch_tokens": 4096}
    return {**tuned, **variant.more}


def row(prompt: Prompt) -> dict[str, Any]:
    return {"prompt": [dict(message) for message in prompt.messages], "id": prompt.id}


def ordered(prompts: Sequence[Prompt], setup: Setup) -> list[Prompt]:
    """Return the prompts of all steps, in the order in which minigrpo takes them."""
    sampler = PromptSampler(prompts, seed=0)
    return [prompt for _ in range(setup.steps + 1) for prompt in sampler.take(setup.workload.prompts)]


def force_stops(trainer: Any, workload: Workload) -> None:
    """End each completion where the workload says, and not before."""
    from transformers import LogitsProcessorList

    if trainer.use_transformers_continuous_batching:
        force_requests(trainer, workload.lengths_B)
        return
    plain = trainer.model.generate
    eos = trainer.eos_token_ids[0]

    def generate(**given: Any) -> Any:
        return plain(**given, logits_processor=LogitsProcessorList([stop_processor(workload.lengths_B, eos)]))

    trainer.model.generate = generate


def stop_processor(lengths_B: Sequence[int], eos: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a processor that forces stop lengths.

    It writes one column per token, and one row per completion that ends: too little to measure.
    """
    due = {n: [row for row, length in enumerate(lengths_B) if length == n] for n in set(lengths_B)}
    token = 0

    def process(ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        nonlocal token
        token += 1
        scores_BV[:, eos] = -torch.inf
        if rows := due.get(token):
            scores_BV[rows] = -torch.inf
            scores_BV[rows, eos] = 0.0
        return scores_BV

    return process


def force_requests(trainer: Any, lengths_B: Sequence[int]) -> None:
    """Force stop lengths under continuous batching.

    It takes a length for each request; no token is -1, so none ends early.
    """
    plain = trainer.model.generate_batch
    trainer.generation_config.eos_token_id = -1

    def add_requests(manager: Any, inputs: Sequence[list[int]], **_: Any) -> list[str]:
        return [
            manager.add_request(ids, request_id=f"row_{n}", max_new_tokens=length, eos_token_id=-1)
            for n, (ids, length) in enumerate(zip(inputs, lengths_B, strict=True))
        ]

    def generate_batch(*given: Any, **named: Any) -> Any:
        from transformers.generation.continuous_batching import ContinuousBatchingManager

        ContinuousBatchingManager.add_requests = add_requests
        return plain(*given, **named)

    trainer.model.generate_batch = generate_batch


class PhaseClock:
    """Times the trainer's own phases, and notes the lengths of what it generated."""

    def __init__(self, trainer: Any, device: str) -> None:
        self.timer = CallTimer(device)
        self.prompt_lengths: list[int] = []
        self.completion_lengths: list[int] = []
        for name, method, after in (
            ("rollout", "_generate", self._note),
            ("reward", "_calculate_rewards", None),
            ("scoring", "_get_per_token_logps_and_entropies", None),
        ):
            setattr(trainer, method, self.timer.timed(name, getattr(trainer, method), after))

    def _note(self, answer: Any) -> None:
        prompt_ids, completion_ids, *_ = answer
        self.prompt_lengths = [len(ids) for ids in prompt_ids]
        self.completion_lengths = [len(ids) for ids in completion_ids]


def gate_callback(gate: StepGate, clock: PhaseClock) -> Any:
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.begin()
            clock.timer.take()
            self.began = now(gate.device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds = clock.timer.take("rollout", "reward", "scoring")
            rest = now(gate.device) - self.began - sum(seconds.values())
            gate.end({**seconds, "update": rest}, clock.prompt_lengths, clock.completion_lengths)

    return Gate()


def settings(trainer: Any) -> dict[str, str]:
    """Return the settings, read from the trainer itself, not from what it was given."""
    model = trainer.model
    found = {
        "weights": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
    }
    return found | {name: str(getattr(trainer.args, name)) for name in SHOWN}


def weights_of(variant: str, dtype: str) -> str:
    """Return the dtype of a variant's weights: without autocast, the products' own type is the weights' type."""
    if VARIANTS[variant].autocast or "+" not in dtype:
        return dtype
    return "float32" if dtype.startswith("float32") else "bfloat16"
