"""Attention segment by segment equals attention over padded rows: values and gradients, in float64."""

import random

import pytest
import torch

from minigrpo.algorithms.packing import PackedLayout
from minigrpo.models.attention import cpu, shared_prompt

UNEVEN = tuple(tuple(random.Random(7 * g + s).randint(1, 40) for s in range(5)) for g in range(3))
LAYOUTS = {
    "uneven": PackedLayout((5, 9, 1), UNEVEN),
    "all equally long": PackedLayout((7, 7), ((3, 3), (3, 3))),
    "one token after one token": PackedLayout((1,), ((1,),)),
    "one group of many lengths": PackedLayout((6,), ((64, 1, 33, 8, 9, 2, 40, 63),)),
    "a prompt of one token, which nobody shares": PackedLayout((4, 0), ((2, 3), (2, 2))),
    "no prompt at all": PackedLayout((0,), ((3, 12, 20),)),
}


def attended(
    layout: PackedLayout,
    kv_heads: int,
    window: int | None = None,
    dtype=torch.float64,
    backend=shared_prompt.TORCH_BACKEND,
) -> list[torch.Tensor]:
    """Return the output of 4 heads, and the gradients of queries, keys and values; inputs fit bfloat16."""
    stream = torch.Generator().manual_seed(0)
    tokens = layout.shared_tokens + sum(layout.own_B)
    given = [
        torch.randn(1, heads, tokens, 8, generator=stream).bfloat16().to(dtype).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]
    out, _ = shared_prompt.shared_prompt_attention(
        None, *given, None, layout=layout, backend=backend, sliding_window=window
    )
    grad_out = torch.randn(out.shape, generator=stream).bfloat16().to(dtype)
    return [out, *torch.autograd.grad(out, given, grad_out)]


def agree(ours: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for one, other in zip(ours, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.fixture(params=["kept", "made again"])
def probabilities(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "made again":
        monkeypatch.setattr(cpu, "MAX_KEPT_PROBS_BYTES", 0)


@pytest.mark.usefixtures("probabilities")
@pytest.mark.parametrize("window", [None, 6, 1, 10**6])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_segments_give_the_output_of_padded_rows(layout: PackedLayout, kv_heads: int, window: int | None) -> None:
    fused = shared_prompt.AttentionBackend(segments_on=frozenset())
    agree(attended(layout, kv_heads, window), attended(layout, kv_heads, window, backend=fused))


@pytest.mark.usefixtures("probabilities")
@pytest.mark.parametrize("cached", [1, 200, 2_000])
def test_how_many_scores_are_worked_on_at_a_time_does_not_matter(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attended(LAYOUTS["uneven"], 2, 30)
    monkeypatch.setattr(cpu, "SCORES_IN_CACHE", cached)
    agree(attended(LAYOUTS["uneven"], 2, 30), whole)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_two_runs_have_the_same_bits(layout: PackedLayout) -> None:
    for one, other in zip(*(attended(layout, 2, dtype=torch.float32) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("probabilities")
def test_sixteen_bit_is_off_by_its_own_rounding() -> None:
    exact = attended(LAYOUTS["uneven"], 2)
    for near, truth in zip(attended(LAYOUTS["uneven"], 2, dtype=torch.bfloat16), exact, strict=True):
        assert 0 < float((near.double() - truth).norm() / truth.norm()) < 0.01


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_chunks_cover_every_score_once(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (bucket,) = cpu.attention_plan(LAYOUTS["no prompt at all"], None, torch.float32, torch.device("cpu")).buckets[:1]
    heads = cpu.AttentionHeads(kv_heads, 2, 8, 1.0)
    for cached in (1, 100, 3_000, 10**9):
        monkeypatch.setattr(cpu, "SCORES_IN_CACHE", cached)
        covered = [place for at in bucket.chunks(heads) for place in range(at.start, at.stop)]
        assert covered == list(range(bucket.rows * kv_heads))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_token_has_one_query_slot_and_one_key_slot_and_little_is_padding(layout: PackedLayout) -> None:
    plan = cpu.attention_plan(layout, None, torch.float32, torch.device("cpu"))
    tokens = layout.shared_tokens + sum(layout.own_B)
    for slots_T, token_S in ((plan.query_slot_T, plan.query_S), (plan.key_slot_T, plan.key_S)):
        torch.testing.assert_close(token_S[slots_T], torch.arange(tokens))
    assert int(plan.real_S1.sum()) == tokens
    for bucket in plan.buckets:
        if bucket.longest > 8:
            real = int(plan.real_S1[bucket.queries].sum())
            assert 7 * real > 5 * bucket.rows * bucket.longest
