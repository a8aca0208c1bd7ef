"""TRL's side: GRPOTrainer.train at its best, stopped after each step by a callback that waits for its turn.

At its best means: no gradient checkpointing, the whole batch in one pass, sdpa, the faster dtype, no logging, no
saving, no evaluation. One thing cannot be switched off: without a GPU its output head scores prompt positions too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.ours import recipe_of
from benchmarks.sides import Setup, Turn
from benchmarks.workloads import Workload, task_of
from minigrpo.objective import open_objective
from minigrpo.sampler import PromptSampler
from minigrpo.types import Prompt

# "autocast": bfloat16 in the matrix products over weights of the other type.
DTYPES = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16+autocast": (torch.bfloat16, True),
    "float32+autocast": (torch.float32, True),
}
SHOWN = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations"),
    *("num_generations", "max_completion_length", "temperature", "loss_type", "beta", "epsilon", "epsilon_high"),
    *("gradient_checkpointing",),
    *("bf16", "fp16", "optim", "max_grad_norm", "learning_rate", "disable_dropout", "use_vllm"),
    *("use_transformers_continuous_batching", "cache_implementation", "torch_compile", "logging_strategy"),
    *("save_strategy", "eval_strategy", "report_to", "log_completions"),
)


def run(setup: Setup, turn: Turn) -> None:
    """Steps until there are no more turns."""
    trainer = open_trainer(setup, load(setup))
    clock = PhaseClock(trainer)
    force_stops(trainer, setup.workload)
    trainer.add_callback(turn_callback(turn, clock))
    turn.ready(settings(trainer))
    trainer.train()


def load(setup: Setup) -> Any:
    from transformers import AutoModelForCausalLM

    dtype, _ = DTYPES[setup.dtype]
    return AutoModelForCausalLM.from_pretrained(setup.folder, dtype=dtype, attn_implementation="sdpa")


def open_trainer(setup: Setup, model: Any, **more: Any) -> Any:
    """`model` is bare and gets the adapter, or has one already."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    workload = setup.workload
    task = task_of(workload, setup.folder)
    prompts = ordered(task.prompts("train"), setup)
    recipe = recipe_of(setup)
    objective = open_objective(recipe, sixteen_bit=False)
    rank, alpha, dropout = recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    config = GRPOConfig(
        output_dir=str(setup.scratch / "trl"),
        max_steps=setup.steps + 1,  # one that is never taken: the gate stops before it
        per_device_train_batch_size=workload.prompts * workload.completions,
        num_generations=workload.completions,
        max_completion_length=workload.limit,
        steps_per_generation=1,
        num_iterations=1,
        temperature=recipe.rollout.temperature,
        loss_type="grpo",
        epsilon=objective.clip_low,
        epsilon_high=objective.clip_high,
        beta=recipe.objective.kl,
        learning_rate=recipe.train.lr,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        disable_dropout=dropout == 0,
        shuffle_dataset=False,
        bf16=DTYPES[setup.dtype][1],
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        generation_kwargs={"use_cache": True},
    )

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


def row(prompt: Prompt) -> dict[str, Any]:
    return {"prompt": [dict(message) for message in prompt.messages], "id": prompt.id}


def ordered(prompts: Sequence[Prompt], setup: Setup) -> list[Prompt]:
    """The prompts of all steps, in the order in which minigrpo takes them."""
    sampler = PromptSampler(prompts, seed=0)
    return [prompt for _ in range(setup.steps + 1) for prompt in sampler.take(setup.workload.prompts)]


def force_stops(trainer: Any, workload: Workload) -> None:
    """End each completion where the workload says, and not before."""
    from transformers import LogitsProcessorList

    plain = trainer.model.generate
    eos = trainer.eos_token_ids[0]

    def generate(**given: Any) -> Any:
        return plain(**given, logits_processor=LogitsProcessorList([stop_processor(workload.lengths_B, eos)]))

    trainer.model.generate = generate


def stop_processor(lengths_B: Sequence[int], eos: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One column written per token, and one row per completion that ends: nothing that a clock would see."""
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


class PhaseClock:
    """Seconds of the trainer's own phases, and the lengths of what it generated."""

    def __init__(self, trainer: Any) -> None:
        self.seconds = {"rollout": 0.0, "reward": 0.0}
        self.prompt_lengths: list[int] = []
        self.completion_lengths: list[int] = []
        trainer._generate = self._timed("rollout", trainer._generate, self._note)
        trainer._calculate_rewards = self._timed("reward", trainer._calculate_rewards, lambda answer: None)

    def _timed(self, phase: str, method: Callable[..., Any], after: Callable[[Any], None]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            answer = method(*given, **named)
            self.seconds[phase] = time.perf_counter() - began
            after(answer)
            return answer

        return call

    def _note(self, answer: Any) -> None:
        prompt_ids, completion_ids, *_ = answer
        self.prompt_lengths = [len(ids) for ids in prompt_ids]
        self.completion_lengths = [len(ids) for ids in completion_ids]


def turn_callback(turn: Turn, clock: PhaseClock) -> Any:
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn.begin()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            rest = time.perf_counter() - self.began - sum(clock.seconds.values())
            turn.end({**clock.seconds, "update": rest}, clock.prompt_lengths, clock.completion_lengths)

    return Gate()


def settings(trainer: Any) -> dict[str, str]:
    """Read from the trainer itself, not from what it was asked for."""
    model = trainer.model
    found = {
        "weights": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
        "use_cache": str(trainer.generation_kwargs["use_cache"]),
    }
    return found | {name: str(getattr(trainer.args, name)) for name in SHOWN}
