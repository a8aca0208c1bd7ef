"""What all prompts of a batch begin with stands once in a row, and changes no value and no gradient."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from minigrpo.algorithms.objective import OBJECTIVES
from minigrpo.algorithms.packing import Batch, MicroBatch, PackedLayout, pack
from minigrpo.models.attention import cpu, shared_prompt
from minigrpo.models.policy import Policy
from minigrpo.training.grpo import accumulate_gradient
from minigrpo.types import Group
from tests.helpers.models import gradients, made_up_groups, make_policy
from tests.helpers.tiny import LLAMA_LIKE
from tests.models.test_policy import EVERYTHING, WINDOWS, padded, scores_and_gradients

BEGINNING = tuple(range(10, 40))
RESTS = {"different rests": (9, 2, 40), "one prompt is nothing more": (1, 5, 1), "equal rests": (4, 4, 4)}


def groups_with(rests: tuple[int, ...], beginning: tuple[int, ...] = BEGINNING) -> list[Group]:
    return [replace(group, prompt_ids=beginning + group.prompt_ids) for group in made_up_groups(rests)]


def batch_with(rests: tuple[int, ...], name: str = "grpo") -> Batch:
    return pack(groups_with(rests), OBJECTIVES[name], 60)


def whole(batch: Batch) -> MicroBatch:
    (part,) = batch.split(EVERYTHING)
    return part


def read_apart(policy: Policy, part: MicroBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Score a row in which each prompt stands whole, by torch's own kernel."""
    backend, policy.backend = policy.backend, shared_prompt.AttentionBackend(segments_on=frozenset())
    try:
        return scores_and_gradients(policy, part)
    finally:
        policy.backend = backend


def agree(one: tuple[torch.Tensor, list[torch.Tensor]], other: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    assert float((one[0] - other[0]).abs().max()) < 1e-11
    for left, right in zip(one[1], other[1], strict=True):
        assert float((left - right).abs().max()) <= 1e-10 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rests", RESTS.values(), ids=RESTS)
@pytest.mark.parametrize(("arch", "config"), [*[pytest.param(a, {}, id=a) for a in LLAMA_LIKE], *WINDOWS])
def test_it_changes_no_score_and_no_gradient(
    arch: str, config: dict[str, Any], rests: tuple[int, ...], dropout: float
) -> None:
    policy = make_policy(arch, double=True, dropout=dropout, **config)
    part = whole(batch_with(rests))
    tokens = len(part.input_row(part.layout(once=True).common)[0])
    assert tokens == part.tokens - 2 * len(BEGINNING)
    once = scores_and_gradients(policy, part)
    agree(once, read_apart(policy, part))
    with padded(policy):
        agree(once, scores_and_gradients(policy, part))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("window", [None, 12, 3])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_gives_each_copy_what_the_one_gives_to_all(
    kv_heads: int, window: int | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(cpu, "MAX_KEPT_PROBS_BYTES", 0)
    F, rests, own = 7, (3, 0, 5), ((4, 9), (1, 12), (6, 6))
    apart = PackedLayout(tuple(F + rest for rest in rests), own)
    once = replace(apart, common=F)
    starts = [F * m + sum(rests[:m]) for m in range(3)]
    source = [*range(F)]  # where each token of the short row stands in the long one
    source += [starts[m] + F + n for m in range(3) for n in range(rests[m])]
    source += range(apart.shared_tokens, apart.shared_tokens + sum(apart.own_B))
    copies = torch.tensor([start + n for start in starts for n in range(F)]).view(3, F)
    stream = torch.Generator().manual_seed(0)
    given = [torch.randn(len(source), heads, 8, generator=stream).double() for heads in (4, kv_heads, kv_heads)]
    grad = torch.randn(len(source), 4, 8, generator=stream).double()
    long = [x.new_zeros(apart.shared_tokens + sum(apart.own_B), *x.shape[1:]) for x in (*given, grad)]
    for wide, x in zip(long, (*given, grad), strict=True):
        wide[source] = x
        wide[copies] = x[:F]
    long[3][copies[1:]] = 0  # only one copy's output is looked at

    def run(tensors: list[torch.Tensor], layout: PackedLayout) -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in tensors[:3]]
        out = cpu.segment_attention(*inputs, layout=layout, scale=None, window=window)
        return [out, *torch.autograd.grad(out, inputs, tensors[3])]

    short_found, long_found = run([*given, grad], once), run(long, apart)
    torch.testing.assert_close(short_found[0], long_found[0][source], rtol=0, atol=1e-13)
    for one, every in zip(short_found[1:], long_found[1:], strict=True):
        summed = every[source].clone()
        summed[:F] = every[copies].sum(0)
        torch.testing.assert_close(one, summed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_gradient_does_not_depend_on_how_such_a_batch_is_cut(dropout: float) -> None:
    policy = make_policy(double=True, dropout=dropout)
    batch = batch_with((9, 2, 40))
    results = []
    for budget in (EVERYTHING, 200, 70, 1):
        accumulate_gradient(policy, OBJECTIVES["grpo"], list(batch.split(budget)), step=3)
        results.append(gradients(policy))
    assert float(sum(g.abs().max() for g in results[0])) > 1e-3
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            assert float((left - right).abs().max()) < 1e-12


def test_a_beginning_stands_once_where_it_saves_a_twentieth_and_several_prompts_are_in_the_row() -> None:
    batch = batch_with((9, 2, 40))
    assert batch.common == len(BEGINNING)
    assert [part.layout(once=True).common for part in batch.split(1)] == [0] * 9
    assert whole(batch).layout(once=False).common == 0
    short = pack(groups_with((9, 2, 40), BEGINNING[:3]), OBJECTIVES["grpo"], 60)
    assert sum(group.tokens for group in short.packed_groups()) / 20 > 2 * 3
    assert short.common == 0
    assert pack(groups_with((9, 2, 40))[:1], OBJECTIVES["grpo"], 60).common == 0


def test_only_prompts_with_a_gradient_count() -> None:
    groups = groups_with((9, 2, 40))
    tied = replace(groups[1], prompt_ids=(5, *groups[1].prompt_ids), grades=(groups[1].grades[0],) * 3)
    batch = pack([groups[0], tied, groups[2]], OBJECTIVES["grpo"], 60)
    assert batch.common == len(BEGINNING)
    other = pack([groups[0], replace(tied, grades=groups[1].grades), groups[2]], OBJECTIVES["grpo"], 60)
    assert other.common == 0


def test_prompts_of_any_lengths_keep_their_order() -> None:
    stream = random.Random(0)
    for _ in range(20):
        rests = tuple(stream.randint(1, 12) for _ in range(3))
        part = whole(batch_with(rests))
        common = part.layout(once=True).common
        ids, positions = part.input_row(common)
        assert ids[:common] == list(part.groups[0].prompt_ids[:common])
        assert positions[:common] == list(range(common))
        assert len(ids) == len(positions) == len(part.token_names(common))
        assert len(ids) == part.layout(once=True).shared_tokens + len(part.labels)


def test_a_pass_holds_as_many_tokens_as_if_no_beginning_were_shared() -> None:
    batch = batch_with((9, 2, 40))
    room = sum(group.tokens for group in batch.packed_groups())
    (part,) = batch.split(room)
    assert len(part.input_row(part.layout(once=True).common)[0]) == room - 2 * len(BEGINNING)
    assert len(list(batch.split(room - 1))) == 2  # attention copies the keys and values of whole prompts
