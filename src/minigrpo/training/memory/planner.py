"""Plan a run's memory: each line of it, its peak, and whether that fits.

The peak is in rollouts or in updates, whichever is higher; what is held all the time counts in both.
What is chosen here: tokens per pass, whether activations are recomputed, how many rows are sampled side by side.

Not covered: what other programs take meanwhile, and completions of very uneven length, whose padding inside attention
may exceed that of equally long ones. Where memory runs out all the same, training/oom.py retries in smaller passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch

from minigrpo.algorithms.packing import MicroBatch
from minigrpo.config.schema import Recipe, RolloutConfig
from minigrpo.models.attention.cpu import CACHED_PLANS
from minigrpo.models.attention.shared_prompt import CACHED_MASKS
from minigrpo.models.policy import decoder_of
from minigrpo.models.quantize import moment_bytes
from minigrpo.rollouts.engines.registry import engine_name, shards
from minigrpo.training.memory.counts import counts_of
from minigrpo.training.memory.meta import PassCost, quantised_share, uniform_micro_batch
from minigrpo.training.memory.rollout_cost import RolloutCost, RolloutShape
from minigrpo.utils.process import onednn_products

When = Literal["always", "rollout", "update"]

BUDGET_SHARE = 0.9
"""The share of the budget that a plan may fill: an allocator cannot use every gap between two blocks, and other
programs need memory, too."""

MAX_TOKENS, MIN_TOKENS = 32768, 256
"""Tokens per pass. Beyond MAX_TOKENS a longer row makes matrix products no faster, and only takes memory."""

ENOUGH_PASS_TOKENS = 1024
"""Tokens per pass below which it is better to recompute activations than to make passes shorter still."""

CPU_PASS_WORK = 5e11
"""Tokens times parameters of one pass beyond which a CPU is not quicker, and only takes more memory: measured."""

MATMUL_SCRATCH_BYTES = 16 << 20
"""Bytes that matrix products borrow on a CPU to reorder their inputs: measured, 4 to 13 MB."""

HEAP_FRAGMENTATION = 0.25
"""Idle memory between blocks in a CPU's heap, as a share of what a pass takes: measured, 0.2 to 0.4."""

COMPILED_PRODUCT_BYTES = 330_000
"""Bytes of one product that oneDNN has compiled for its shape on a CPU: measured. utils/process.py bounds how many."""

CUDA_CONTEXT_BYTES = 600 << 20
"""What CUDA and its libraries hold on a GPU before the first tensor, cuBLAS's work space included."""


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One line of the plan: `when` it counts, and `about`, a short description."""

    name: str
    bytes: int
    when: When
    about: str


@dataclass(frozen=True, slots=True)
class Device:
    """The device of a run. `free`: bytes available; `limit`: the most that the run may take in all.

    `resident`: bytes this process already holds in main memory; `opened`: names of the plan lines already loaded;
    `ranks`: that train the run, over which its model may be sharded.
    """

    device: str
    dtype: torch.dtype
    free: int
    limit: int | None = None
    resident: int = 0
    opened: tuple[str, ...] = ()
    ranks: int = 1


OPEN_POLICY = ("weights", "adapter", "reference", "warm start")
BLOCKS, TRAINING_BLOCKS = "engine blocks", "training blocks"
OPEN_ENGINE = ("engine copies", BLOCKS)


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes and tokens. `fits`: the highest moment stays below BUDGET_SHARE of the budget."""

    device: str
    dtype: str
    budget: int
    prompt: int
    completion: int
    tokens_per_pass: int
    pass_tokens: int
    recompute: bool
    rows: int
    lines: tuple[PlanLine, ...]
    advice: tuple[str, ...] = ()

    def at(self, when: When) -> int:
        return sum(line.bytes for line in self.lines if line.when in ("always", when))

    @property
    def peak(self) -> int:
        return max(self.at("rollout"), self.at("update"))

    @property
    def blocks(self) -> bool:
        """Tell whether the engine copies frozen weights into blocks."""
        return bool(self.line(BLOCKS))

    @property
    def training_blocks(self) -> bool:
        """Tell whether training passes do, too."""
        return bool(self.line(TRAINING_BLOCKS))

    def line(self, name: str) -> int:
        """Return the bytes of a line; 0 where the plan has no such line."""
        return next((line.bytes for line in self.lines if line.name == name), 0)

    @property
    def update_rises(self) -> int:
        """Bytes that an update takes on top of what is always held."""
        return sum(line.bytes for line in self.lines if line.when == "update")

    @property
    def room(self) -> int:
        """Bytes that the plan may fill."""
        return int(BUDGET_SHARE * self.budget)

    @property
    def fits(self) -> bool:
        return self.peak <= self.room

    def to_dict(self) -> dict[str, Any]:
        own = {"fits": self.fits, "peak": self.peak, "rollout": self.at("rollout"), "update": self.at("update")}
        return asdict(self) | own


def make_plan(config: Any, recipe: Recipe, device: Device, prompt: int, *, rollout: bool = True) -> Plan:
    """Plan a run's memory.

    `config`: the model's own; `prompt`: tokens of the longest prompt; `rollout`: whether to plan for rollouts, too, or
    for updates alone, with what the engine keeps meanwhile.

    Raises UnplannableError, and RecipeError where lora.targets fits no layer.
    """
    return _Planner(config, recipe, device, max(1, prompt), rollout=rollout).plan()


def batch_tokens(config: RolloutConfig, prompt: int) -> int:
    """Return the tokens of a step whose completions all have the maximal length."""
    return config.prompts * (prompt - 1 + config.completions * config.max_tokens)


def largest_micro_batch(config: RolloutConfig, prompt: int, tokens_per_pass: int, vocabulary: int = 2) -> MicroBatch:
    """Return the longest possible micro-batch of a step: prompts and completions of maximal length."""
    own = prompt - 1 + config.completions * config.max_tokens
    if own <= tokens_per_pass:
        groups = min(config.prompts, tokens_per_pass // own)
        return uniform_micro_batch(prompt, config.completions, config.max_tokens, groups=groups, vocabulary=vocabulary)
    siblings = max(1, (tokens_per_pass - (prompt - 1)) // config.max_tokens)
    return uniform_micro_batch(prompt, min(siblings, config.completions), config.max_tokens, vocabulary=vocabulary)


class _Planner:
    """Tries choices until one fits. What they take is counted once for all plans of a run (counts.py).

    Weights in blocks come last, with what is left, the engine's first: neither rows nor tokens per pass are given for
    them. They are no need, so they leave as much of the room free as the plan leaves of the budget.
    """

    def __init__(self, config: Any, recipe: Recipe, device: Device, prompt: int, *, rollout: bool) -> None:
        self.recipe, self.device, self.prompt, self.rollout = recipe, device, prompt, rollout
        self.counts = counts_of(config, recipe, device.dtype, device.device)
        self.bare = self.counts.bare

    def plan(self) -> Plan:
        """Return the first plan that fits; where none does, the smallest, with advice."""
        mode = self.recipe.model.checkpointing
        plan = self._longest(recompute=mode == "on")
        enough = min(ENOUGH_PASS_TOKENS, batch_tokens(self.recipe.rollout, self.prompt))
        longest = self.recipe.train.tokens_per_pass or self._sizes()[-1]
        settled = plan.fits and (plan.tokens_per_pass == longest or plan.pass_tokens >= enough)
        if mode == "auto" and not settled:
            again = self._longest(recompute=True)
            if not plan.fits or (again.fits and again.pass_tokens > plan.pass_tokens):
                plan = again
        if not plan.fits:
            return replace(plan, advice=advice(plan, self.recipe))
        cost = self.sampling[1]
        for blocks in ((cost.blocks, cost.training_blocks), (cost.blocks, 0)):
            blocked = self._with(plan.recompute, plan.tokens_per_pass, blocks)
            if blocked.peak <= BUDGET_SHARE * blocked.room:
                return blocked
        return plan

    def _longest(self, recompute: bool) -> Plan:
        """Find the most tokens per pass that fit, by bisection over powers of two."""
        own = self.recipe.train.tokens_per_pass
        sizes = [own] if own else self._sizes()
        best, rest = sizes[0], sizes[:-1]
        if self._with(recompute, sizes[-1]).fits:
            return self._with(recompute, sizes[-1])
        while rest:
            middle = len(rest) // 2
            if self._with(recompute, rest[middle]).fits:
                best, rest = rest[middle], rest[middle + 1 :]
            else:
                rest = rest[:middle]
        return self._with(recompute, best)

    def _sizes(self) -> list[int]:
        """Return the tokens per pass to try: no more than a step has, and on a CPU no more than make it quicker."""
        most = 2 * batch_tokens(self.recipe.rollout, self.prompt) - 1
        if self.device.device == "cpu":
            parameters = sum(parameter.numel() for parameter in self.bare.model.parameters())
            most = min(most, max(ENOUGH_PASS_TOKENS, int(CPU_PASS_WORK / parameters)))
        return [size for size in _powers() if size <= most] or [MIN_TOKENS]

    def _with(self, recompute: bool, tokens_per_pass: int, blocks: tuple[int, int] = (0, 0)) -> Plan:
        micro_batch = largest_micro_batch(self.recipe.rollout, self.prompt, tokens_per_pass)
        cost = self.counts.training(micro_batch, recompute=recompute)
        rows, sampling = self.sampling
        rollout = self._rollout_lines(rows, sampling)
        if self.recipe.rollout.ahead:  # it lasts while the policy is updated
            rollout = tuple(replace(line, when="always") for line in rollout)
        held = self._held(self.sampling[1].copies, blocks) if any(blocks) else self.held
        lines = (*held, *self._update_lines(micro_batch, cost), *rollout)
        return Plan(
            device=self.device.device,
            dtype=str(self.device.dtype).removeprefix("torch."),
            budget=self._budget(held),
            prompt=self.prompt,
            completion=self.recipe.rollout.max_tokens,
            tokens_per_pass=tokens_per_pass,
            pass_tokens=micro_batch.tokens,
            recompute=recompute,
            rows=rows,
            lines=tuple(line for line in lines if line.bytes),
        )

    @cached_property
    def held(self) -> tuple[PlanLine, ...]:
        """Lines that count in rollouts and in updates."""
        return self._held(self.sampling[1].copies)

    def _held(self, copies: int, blocks: tuple[int, int] = (0, 0)) -> tuple[PlanLine, ...]:
        recipe, policy = self.recipe, self.bare
        trained = sum(parameter.nbytes for parameter in policy.trainable)
        every = sum(p.nbytes for p in policy.model.parameters()) + sum(b.nbytes for b in policy.model.buffers())
        adapter = 0 if recipe.train.full else trained
        saved = quantised_share(policy)[0] if recipe.model.quantize == "nf4" else 0
        parts = self.parts
        kl = recipe.objective.kl > 0
        copy = every if kl and recipe.train.full and recipe.train.reference != "cpu" else 0
        kind = "4 bit" if saved else str(self.device.dtype).removeprefix("torch.")
        loaded = (
            PlanLine("weights", (every - adapter - saved) // parts, "always", f"the model, {kind}{self._share}"),
            PlanLine("adapter", adapter, "always", f"LoRA of rank {recipe.lora.rank}, float32"),
            PlanLine("reference", copy // parts, "always", "a frozen copy for the KL term"),
            PlanLine("warm start", adapter if kl and recipe.warmup.steps else 0, "always", "reference adapter"),
            PlanLine(OPEN_ENGINE[0], copies, "always", "weights laid out for sampling"),
            PlanLine(BLOCKS, blocks[0], "always", "frozen weights, laid out for few rows, where there is room"),
        )
        more = PlanLine(TRAINING_BLOCKS, blocks[1], "always", "frozen weights, laid out for both directions")
        moved = moment_bytes(policy.trainable, recipe.train.optimizer)
        ends = PlanLine("gathered", self._gathered[0], "always", "embedding and head of the sharded model, whole")
        moments = PlanLine("optimizer", moved // parts, "always", f"AdamW's two moments{self._share}")
        return (self._program(loaded), *loaded, more, moments, ends)

    @cached_property
    def parts(self) -> int:
        """Into how many parts the model is sharded."""
        due = shards(self.recipe, self.bare.model, self.device.device, self.device.ranks)
        return self.device.ranks if due else 1

    @property
    def _share(self) -> str:
        return f", one part of {self.parts}" if self.parts > 1 else ""

    @cached_property
    def _gathered(self) -> tuple[int, int]:
        """Return the bytes of a sharded model that lie outside its layers, and those of its largest layer."""
        if self.parts == 1:
            return 0, 0
        layers = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_of(self.bare.model).layers]  # type: ignore[union-attr]
        return sum(p.nbytes for p in self.bare.model.parameters()) - sum(layers), max(layers)

    def _program(self, loaded: tuple[PlanLine, ...]) -> PlanLine:
        if self.device.device != "cpu":
            libraries = "CUDA and its libraries" if self.device.device == "cuda" else "the GPU's libraries"
            return PlanLine("program", CUDA_CONTEXT_BYTES, "always", libraries)
        own = max(0, self.device.resident - self._opened(loaded))
        compiled = COMPILED_PRODUCT_BYTES * onednn_products()
        return PlanLine("program", own + MATMUL_SCRATCH_BYTES + compiled, "always", "Python and its libraries")

    def _opened(self, lines: tuple[PlanLine, ...]) -> int:
        return sum(line.bytes for line in lines if line.name in self.device.opened)

    def _budget(self, lines: tuple[PlanLine, ...]) -> int:
        """Return the bytes the run may take: free ones and those it already holds."""
        own = self.device.resident if self.device.device == "cpu" else CUDA_CONTEXT_BYTES + self._opened(lines)
        return min(self.device.free + own, self.device.limit or self.device.free + own)

    def _update_lines(self, micro_batch: MicroBatch, cost: PassCost) -> tuple[PlanLine, ...]:
        gradients = sum(parameter.nbytes for parameter in self.bare.trainable)
        ends, layer = self._gathered
        # Masks of the last shapes are kept, of which the pass itself counts one.
        masks = len(micro_batch.lengths) * max(micro_batch.lengths) * (self.prompt - 1 + max(micro_batch.lengths))
        masks *= (CACHED_PLANS - 1) * self.device.dtype.itemsize if self.device.device == "cpu" else CACHED_MASKS - 1
        quantised = quantised_share(self.bare)[1] if self.recipe.model.quantize == "nf4" else 0
        holes = int(HEAP_FRAGMENTATION * cost.peak) if self.device.device == "cpu" else 0
        return (
            PlanLine("gradients", gradients // self.parts, "update", f"of what is trained{self._share}"),
            # Weights and gradients of a layer while it computes, those of the next one, and what is on the wire.
            PlanLine("gathered layer", 2 * ends + 4 * layer, "update", "whole weights and gradients of a layer"),
            PlanLine("activations", cost.kept, "update", f"kept for the backward pass: {micro_batch.tokens} tokens"),
            PlanLine("update, passing", cost.passing, "update", f"highest in the {cost.phase}"),
            PlanLine("holes", holes, "update", "in the heap, between what is held"),
            PlanLine("attention masks", masks if self.bare.shares_prompts else 0, "update", "of earlier passes"),
            PlanLine("unpacked layer", quantised, "update", "the largest 4-bit layer in 16 bit"),
        )

    def _rollout_lines(self, rows: int, cost: RolloutCost) -> tuple[PlanLine, ...]:
        """Return the lines of rollouts; without `rollout` only what an engine at fixed shapes keeps during updates."""
        tokens = self.recipe.rollout.max_tokens
        longest = f"{self.prompt} + {tokens} tokens"
        kept: When = "rollout"
        if self.engine == "slots":
            training, _, *between = self._rollout_shapes(rows)
            kept, rows = "always", sum(shape.rows for shape in (training, *between))
        lines = (
            PlanLine("cache", cost.cache, kept, f"keys and values: {rows} rows, {longest}"),
            PlanLine("graphs", cost.graphs, kept, "what CUDA graphs hand from kernel to kernel"),
            PlanLine("later caches", cost.later, "rollout", "and graphs, of the evaluations after training"),
            PlanLine("rollout, passing", cost.passing, "rollout", f"highest in {cost.phase}"),
        )
        return tuple(line for line in lines if self.rollout or line.when == "always")

    @cached_property
    def sampling(self) -> tuple[int, RolloutCost]:
        """(rows side by side, what they cost): as many as the recipe asks for, or by halves as many as fit."""
        rows = self.recipe.rollout.rows
        if not self.rollout and self.engine != "slots":
            return rows, RolloutCost(0, 0, 0, "")
        while True:
            cost = self._side_by_side(rows)
            held = self._held(cost.copies)
            room = BUDGET_SHARE * self._budget(held) - sum(line.bytes for line in held)
            if cost.peak <= room or rows <= self.recipe.rollout.completions:
                return min(rows, max(shape.rows for shape in self._rollout_shapes(rows))), cost
            rows = max(rows // 2, self.recipe.rollout.completions)

    @cached_property
    def engine(self) -> str:
        return engine_name(self.recipe, self.bare.model, self.device.device)

    def _side_by_side(self, rows: int) -> RolloutCost:
        """Return the cost of the run's rollouts: of the dearest, but the slot engine keeps the caches of two shapes.

        During updates these are training's and that of the evaluations in between, where there are any. After training
        the model is asked twice, greedily and sampling: first beside training's caches, then beside the other's.
        """
        training, evaluation, *between = costs = [self._sampled(shape) for shape in self._rollout_shapes(rows)]
        dearest = max(costs, key=lambda cost: cost.passing if self.engine == "slots" else cost.peak)
        if self.engine != "slots":
            return dearest
        kept = training.cache + sum(cost.cache for cost in between)
        graphs = max(cost.graphs for cost in (training, *between))
        later = max(training.cache, evaluation.cache) + evaluation.cache + max(graphs, evaluation.graphs)
        return replace(dearest, cache=kept, graphs=graphs, later=max(0, later - kept - graphs))

    def _rollout_shapes(self, rows: int) -> tuple[RolloutShape, ...]:
        """Return the shapes of training and of evaluations, after it and in between, with one completion a prompt."""
        config, asked = self.recipe.rollout, self.recipe.eval
        at_once = max(1, min(rows // config.completions, config.prompts))
        numbers = [asked.limit] + ([asked.held_out] if asked.every else [])
        lengths = (self.prompt, config.max_tokens)
        evaluations = (RolloutShape(min(rows, number), 1, *lengths) for number in numbers)
        return RolloutShape(at_once, config.completions, *lengths), *evaluations

    def _sampled(self, shape: RolloutShape) -> RolloutCost:
        if self.recipe.rollout.engine == "vllm":  # a server's memory is its own, and gone already
            share = 0.0 if self.recipe.rollout.server else self.recipe.rollout.share
            return RolloutCost(0, 0, int(share * self.device.free), "vLLM")
        return self.counts.rollout(self.engine, shape)


def _powers() -> list[int]:
    return [MIN_TOKENS << n for n in range((MAX_TOKENS // MIN_TOKENS).bit_length())]


def advice(plan: Plan, recipe: Recipe) -> tuple[str, ...]:
    """Return settings to change where nothing fits, the largest saving first."""
    size: Mapping[str, int] = Counter({line.name: line.bytes for line in plan.lines})  # 0 where there is no such line
    trained = size["optimizer"] + size["gradients"]
    rolls = plan.at("rollout") - plan.at("update")
    choices = [
        (recipe.train.full, trained, "train an adapter: --train.full false"),
        (recipe.train.full, size["reference"], "keep the reference in main memory: --train.reference cpu"),
        (
            not recipe.train.full and recipe.model.quantize == "none" and plan.device != "cpu",
            int(0.7 * size["weights"]),
            "hold the frozen weights in 4 bit: --model.quantize nf4",
        ),
        (not recipe.train.full and recipe.lora.rank > 8, trained // 2, f"--lora.rank {max(8, recipe.lora.rank // 2)}"),
        (recipe.model.checkpointing == "off", size["activations"] // 2, "--model.checkpointing auto"),
        (recipe.train.tokens_per_pass > MIN_TOKENS, size["activations"] // 2, "--train.tokens_per_pass 0"),
        (
            rolls < 0,
            (size["activations"] + size["update, passing"]) // 2,
            f"shorter completions: --rollout.max_tokens {max(1, recipe.rollout.max_tokens // 2)}",
        ),
        (
            rolls >= 0 and recipe.rollout.completions > 2,
            size["cache"] // 2,
            f"--rollout.completions {max(2, recipe.rollout.completions // 2)}",
        ),
        (rolls >= 0, size["cache"] // 2, f"--rollout.max_tokens {max(1, recipe.rollout.max_tokens // 2)}"),
        (True, size["weights"] // 2, "a smaller model: --model.path"),
    ]
    ordered = sorted((each for each in choices if each[0] and each[1]), key=lambda each: -each[1])
    return tuple(sentence for _, _, sentence in ordered)
