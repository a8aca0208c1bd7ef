"""python -m benchmarks.gpu_table: what recipes would take on cards that people have, by plan and by estimate.

    python -m benchmarks.gpu_table            # writes the tables of docs/gpu.md; four minutes of one core
    python -m benchmarks.gpu_table --check    # exit code 1 where the page is not what the code says

Memory is the project's own plan of the run (`minigrpo plan`), for a card of that size. Time is an estimate, made of

    products   those of `shapes`, each at a share of the card's peak, or its bytes at a share of the bandwidth
    launches   kernels besides the products, in number as the rehearsal counts them
    unpacking  of 4-bit weights in training: read, written in 16 bit, read again, whenever a layer is used; a token of
               few rows reads them as they are

from a short run (every completion ends at half of the limit, no group is tried again) to a long one (all reach the
limit, and as many prompts are tried again as the recipe allows). Left out: grading, the downloads, preflight, the
evaluations before and after, checkpoints.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.cards import CARDS, Card
from benchmarks.limit import Rates
from benchmarks.models import SHAPES, config_of
from benchmarks.shapes import Lengths, Shape, Work, phases
from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.rollouts.engines.registry import engine_name
from minigrpo.training.memory.machine import gpu_of_size
from minigrpo.training.memory.meta import meta_policy
from minigrpo.training.memory.planner import Plan, make_plan
from minigrpo.utils.markdown import markdown_table

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- Made by python -m benchmarks.gpu_table -->", "<!-- End of what is made -->"

MATRIX_SHARE = 0.3
"""Of the peak 16-bit rate. Published for a large model: 0.46 (PaLM, arXiv 2204.02311); small products reach less."""
BANDWIDTH_SHARE = 0.7
"""Of the peak bandwidth, decoding. Published: 0.72 for a 7B in 16 bit (gpt-fast); here, on a CPU, 0.57 to 0.73."""
KERNEL_SECONDS = 3e-6
"""Of a small kernel inside a graph. Published: 3.4e-6 ("Getting Started with CUDA Graphs", NVIDIA)."""
LAUNCH_SECONDS = 10e-6
"""Of the host, for a kernel that Python launches by itself: assumed."""
GRAPH_LAUNCHES, NATIVE_LAUNCHES, TOKEN_LAUNCHES = 56, 64, 72
"""Of a layer and token in `slots` and in `native`, and of a token besides."""
PASS_LAUNCHES, RECOMPUTED_LAUNCHES, HEAD_LAUNCHES = 235, 336, 80
"""Of a layer in a training pass, the same with activations recomputed, and of a pass besides."""
RECOMPUTED = 1.5
"""Work of a pass that does its forward half twice, over one that does not."""
PACKED_BYTES = 0.516
"""Of a weight in 4 bit (training/memory/meta.py)."""


@dataclass(frozen=True, slots=True)
class Case:
    """A recipe and its model. `prompt`: tokens, their mean and the longest; `counted`: how these are known."""

    recipe: str
    model: str
    prompt: tuple[int, int]
    counted: str


CASES = (
    Case("gsm8k-fast", "half", (213, 323), "with Qwen2.5's tokenizer"),
    Case("gsm8k-best", "half", (212, 364), "with Qwen2.5's tokenizer"),
    Case("sudoku-ministral", "3b", (1280, 1280), "what 4,096 tokens leave beside the answer"),
)
VISION = {
    "model_type": "pixtral",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "head_dim": 64,
    "patch_size": 14,
    "image_size": 1540,
}
"""Of Ministral 3, whose vision part is loaded and left alone: 0.4 B parameters by its card."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A recipe on a card. `changed`: the knob without which it does not fit; `hours`: short and long run."""

    card: str
    dtype: str
    engine: str
    changed: str
    plan: Plan
    hours: tuple[float, float]


@cache
def model_config(name: str) -> Any:
    text = config_of(SHAPES[name])
    if name != "3b":
        return text
    from transformers import AutoConfig

    return AutoConfig.for_model("mistral3", text_config=text.to_dict(), vision_config=VISION, tie_word_embeddings=True)


def estimate(case: Case, card_name: str) -> Estimate:
    """Plan and time a recipe on a card: as it is, or where that does not fit with its weights in 4 bit."""
    card = CARDS[card_name]
    for changed in ("", "--model.quantize nf4"):
        recipe = load_recipe(case.recipe, {"model.quantize": "nf4"} if changed else {})
        found = planned(case, card, recipe)
        if found.fits:
            break
    engine = engine_of(case, recipe)
    short, long = (seconds_of_run(case, card, recipe, found, engine, long=long) / 3600 for long in (False, True))
    return Estimate(card_name, found.dtype, engine, changed, found, (short, long))


def planned(case: Case, card: Card, recipe: Recipe) -> Plan:
    dtype = torch.bfloat16 if card.has_bfloat16 else torch.float16
    return make_plan(model_config(case.model), recipe, gpu_of_size(card.memory / 1e9, dtype), case.prompt[1])


def engine_of(case: Case, recipe: Recipe) -> str:
    policy = meta_policy(model_config(case.model), recipe, torch.bfloat16, device="cuda")
    return engine_name(recipe, policy.model, "cuda")


def seconds_of_run(case: Case, card: Card, recipe: Recipe, plan: Plan, engine: str, *, long: bool) -> float:
    """Return the seconds of all steps, and of the evaluations between them."""
    step = seconds_of_step(case, card, recipe, plan, engine, long=long)
    evaluations = recipe.train.steps // recipe.eval.every if recipe.eval.every else 0
    asked = Lengths.of([case.prompt[0]] * recipe.eval.held_out, [limit_of(recipe, long)] * recipe.eval.held_out, 1)
    return recipe.train.steps * step + evaluations * seconds_of_rollout(case, card, recipe, engine, asked)


def limit_of(recipe: Recipe, long: bool) -> int:
    return recipe.rollout.max_tokens // (1 if long else 2)


def seconds_of_step(case: Case, card: Card, recipe: Recipe, plan: Plan, engine: str, *, long: bool) -> float:
    config = recipe.rollout
    rows = config.prompts * config.completions
    lengths = Lengths.of([case.prompt[0]] * rows, [limit_of(recipe, long)] * rows, config.completions)
    rollouts = 1 + (recipe.groups.resample if long else 0)
    side_by_side = max(1, -(-rows // plan.rows))
    rollout = seconds_of_rollout(case, card, recipe, engine, lengths) * rollouts * side_by_side
    return rollout + seconds_of_update(case, card, recipe, plan, lengths)


def seconds_of_rollout(case: Case, card: Card, recipe: Recipe, engine: str, lengths: Lengths) -> float:
    """Return the seconds of prompts read and tokens drawn, all rows side by side."""
    shape = Shape.of(model_config(case.model))
    work = phases(shape, lengths, recipe.lora.rank, wide=False)
    tokens = max(map(max, lengths.completions_PG))
    launches = shape.layers * (GRAPH_LAUNCHES if engine == "slots" else NATIVE_LAUNCHES) + TOKEN_LAUNCHES
    reading = seconds_of(card, unpacked(work["prefill"], shape, recipe, times=1))
    decoding = seconds_of(card, work["decode"], layers_of(shape) if recipe.model.quantize == "nf4" else ())
    if engine == "slots":
        return reading + decoding + tokens * launches * KERNEL_SECONDS
    return reading + max(decoding + tokens * launches * KERNEL_SECONDS, tokens * launches * LAUNCH_SECONDS)


def seconds_of_update(case: Case, card: Card, recipe: Recipe, plan: Plan, lengths: Lengths) -> float:
    """Return the seconds of all passes and of AdamW: the GPU's, or the host's where launching takes longer."""
    shape = Shape.of(model_config(case.model))
    work = phases(shape, lengths, recipe.lora.rank, wide=False)
    passes = -(-(lengths.shared + lengths.scored) // plan.pass_tokens)
    again = RECOMPUTED if plan.recompute else 1.0
    training = unpacked(work["training"], shape, recipe, times=passes * (3 if plan.recompute else 2))
    launches = passes * (shape.layers * (RECOMPUTED_LAUNCHES if plan.recompute else PASS_LAUNCHES) + HEAD_LAUNCHES)
    return max(again * seconds_of(card, training), launches * LAUNCH_SECONDS) + seconds_of(card, work["update"])


def unpacked(work: Work, shape: Shape, recipe: Recipe, times: int) -> Work:
    """Return the work with 4-bit layers read and written in 16 bit so many times; no more where they are in 16 bit."""
    if recipe.model.quantize == "none":
        return work
    weights = shape.entries - shape.vocab * shape.hidden
    return replace(work, moved=work.moved + int(times * weights * (PACKED_BYTES + 2)))


def layers_of(shape: Shape) -> set[tuple[int, int]]:
    """Return inputs and outputs of the products with a layer's own weights."""
    return {(reads, sum(outs)) for reads, outs in shape.readers}


def seconds_of(card: Card, work: Work, packed: Collection[tuple[int, int]] = ()) -> float:
    """Return the seconds of a phase. `packed`: inputs and outputs of the layers that are read in 4 bit."""
    rates = Rates(MATRIX_SHARE * card.matrix, MATRIX_SHARE * card.matrix, BANDWIDTH_SHARE * card.bandwidth)
    in_four_bit = {product: n for product, n in work.products.items() if (product.inner, product.outer) in packed}
    others = {product: n for product, n in work.products.items() if product not in in_four_bit}
    return rates.least(in_four_bit, Work(Counter()), PACKED_BYTES) + rates.least(others, work, 2)


def tables(cases: Sequence[Case] = CASES, cards: Sequence[str] = tuple(CARDS)) -> str:
    """Return the cards' figures, and a table for each recipe."""
    facts = [
        (
            *(name, ".".join(map(str, card.capability)), f"{card.memory / 1e9:.1f}", f"{card.bandwidth / 1e9:,.0f}"),
            *(f"{card.matrix / 1e12:g}", card.source),
        )
        for name, card in CARDS.items()
    ]
    text = markdown_table(("card", "capability", "GB", "GB/s", "TFLOP/s", "bandwidth and rate by"), facts)
    for case in cases:
        told = (
            f"`{case.recipe}`, prompts of {case.prompt[0]:,} tokens, the longest {case.prompt[1]:,} ({case.counted}):"
        )
        rows = [row_of(estimate(case, card)) for card in cards]
        text += f"\n\n{told}\n\n" + markdown_table(HEAD, rows)
    return text


HEAD = ("card", "number type", "engine", "GB, planned", "tokens a pass", "rows", "estimated time")


def row_of(found: Estimate) -> tuple[str, ...]:
    plan, changed = found.plan, f", `{found.changed}`" if found.changed else ""
    memory = f"{plan.peak / 1e9:.1f}" if plan.fits else f"does not fit: {plan.peak / 1e9:.1f}"
    tokens = f"{plan.pass_tokens:,}" + (", recomputed" if plan.recompute else "")
    return found.card, found.dtype + changed, found.engine, memory, tokens, str(plan.rows), span(found.hours)


def span(hours: tuple[float, float]) -> str:
    """Write "12 to 25 min", or hours where the longer run takes two; two digits say enough."""
    low, high = hours
    unit, times = ("h", 1.0) if high >= 2 else ("min", 60.0)
    return f"{rounded(low * times)} to {rounded(high * times)} {unit}"


def rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1g}" if value < 1 else f"{value:.1f}"


def with_tables(page: str, made: str) -> str:
    """Return a page with what stands between the two marks replaced."""
    pattern = re.compile(rf"(?<={re.escape(BEGIN)}\n\n).*?(?=\n\n{re.escape(END)})", re.DOTALL)
    assert len(pattern.findall(page)) == 1, "the page has one place for the tables"
    return pattern.sub(lambda _: made, page)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is another")
    args = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    made = with_tables(page, tables())
    if args.check:
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
