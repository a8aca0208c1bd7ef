"""A rollout that runs out of memory goes on with fewer rows side by side, and the tokens are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from minigrpo.errors import RecipeError
from minigrpo.models.policy import Policy
from minigrpo.rollouts.engines.cuda_graph import SlotEngine
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.rollouts.engines.transformers import TransformersEngine
from minigrpo.rollouts.oom import generate_with_retries
from minigrpo.types import Completion, Sampling
from tests.helpers.models import make_policy, rendered

STOPS, SAMPLING, SIBLINGS = (3, 17, 50, 60), Sampling(0.9, 12, 7), 3
PROMPTS = rendered((5, 40, 23, 9, 31))
ENGINES = {"native": NativeEngine, "slots": SlotEngine, "transformers": TransformersEngine}


class Small:
    """An allocator with room for `most` rows, which fails in the middle of a batch that has more; `once`: only at
    first, as one does whose free memory lies in pieces."""

    def __init__(self, most: int, *, once: bool = False, kind: type[Exception] = torch.OutOfMemoryError) -> None:
        self.most, self.once, self.kind = most, once, kind
        self.failures = 0
        self.widths: list[int] = []

    def allocate(self, rows: int) -> None:
        self.widths.append(rows)
        if rows > self.most and not (self.once and self.failures):
            self.failures += 1
            raise self.kind("CUDA out of memory. Tried to allocate 2.00 GiB.\nMany more lines.")

    def watched(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        def decode_some(input_n: Any, *more: Any, **options: Any) -> Any:
            self.allocate(len(input_n))
            return decode(input_n, *more, **options)

        return decode_some


def opened(name: str, policy: Policy, rows: int = 256, small: Small | None = None) -> Any:
    engine = ENGINES[name](policy, stop_ids=STOPS, rows=rows)
    if small and name == "transformers":
        batch = engine._generate_batch
        engine._generate_batch = lambda prompts, n, *more: (small.allocate(len(prompts) * n), batch(prompts, n, *more))[
            1
        ]
    elif small:
        engine.decoder.decode = small.watched(engine.decoder.decode)
    return engine


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("name", ENGINES)
def test_with_fewer_rows_every_completion_has_the_tokens_that_it_would_have_had(
    name: str, kind: type[Exception]
) -> None:
    policy, small = make_policy("qwen2"), Small(4, kind=kind)
    wanted = opened(name, policy).generate(PROMPTS, SIBLINGS, SAMPLING)
    engine = opened(name, policy, small=small)
    ready: dict[int, list[tuple[Completion, ...]]] = {}
    counts: list[tuple[int, int]] = []
    found = generate_with_retries(
        engine,
        PROMPTS,
        SIBLINGS,
        SAMPLING,
        lambda index, own: ready.setdefault(index, []).append(own),
        progress=lambda tokens, ended: counts.append((tokens, ended)),
    )
    assert [[one.token_ids for one in own] for own in found] == [[one.token_ids for one in own] for own in wanted]
    assert {index: own for index, (own,) in ready.items()} == dict(enumerate(found))  # each handed over once
    assert counts[-1][1] == len(PROMPTS) * SIBLINGS
    assert counts[-1][0] == max(tokens for tokens, _ in counts)
    assert engine.rows == 3
    assert small.failures == (3 if kind is torch.OutOfMemoryError else 2)  # 15 rows (twice on a GPU), then 7


@pytest.mark.parametrize("name", ENGINES)
def test_memory_in_pieces_costs_one_more_try_and_no_row(name: str) -> None:
    policy, small = make_policy("qwen2"), Small(4, once=True)
    wanted = opened(name, policy).generate(PROMPTS, SIBLINGS, SAMPLING)
    engine = opened(name, policy, small=small)
    assert generate_with_retries(engine, PROMPTS, SIBLINGS, SAMPLING) == wanted
    assert (small.failures, engine.rows) == (1, 256)


def test_what_had_ended_before_is_kept() -> None:
    """Batches of two prompts: the first ends, the second fails once; the first is not sampled again."""
    policy, small = make_policy("qwen2"), Small(1 << 30)
    engine = opened("native", policy, rows=6, small=small)
    wanted = opened("native", policy, rows=6).generate(PROMPTS, SIBLINGS, SAMPLING)
    seen: list[int] = []

    def ready(index: int, own: tuple[Completion, ...]) -> None:
        seen.append(index)
        small.most, small.once = (0, True) if len(seen) == 2 else (small.most, small.once)

    assert generate_with_retries(engine, PROMPTS, SIBLINGS, SAMPLING, ready) == wanted
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert small.failures == 1


@pytest.mark.parametrize("name", ENGINES)
def test_a_single_prompt_that_does_not_fit_is_refused_with_a_cure(name: str) -> None:
    engine = opened(name, make_policy("qwen2"), small=Small(2))
    with pytest.raises(RecipeError, match=r"3 completions of one prompt .*2\.00 GiB.*--rollout\.max_tokens"):
        generate_with_retries(engine, PROMPTS, SIBLINGS, SAMPLING)


def test_other_faults_pass_through() -> None:
    small = Small(2, kind=RuntimeError)
    engine = opened("native", make_policy("qwen2"), small=small)
    small.allocate = lambda rows: (_ for _ in ()).throw(RuntimeError("a shape is wrong"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shape"):
        generate_with_retries(engine, PROMPTS, SIBLINGS, SAMPLING)
