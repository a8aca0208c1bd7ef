"""Attention in two parts equals attention over all at once: values and gradients, in float64."""

import random

import pytest
import torch

from minigrpo import attention, causal, split
from minigrpo.packing import Layout

UNEVEN = tuple(tuple(random.Random(7 * g + s).randint(1, 40) for s in range(5)) for g in range(3))
LAYOUTS = {
    "uneven": Layout((5, 9, 1), UNEVEN),
    "all equally long": Layout((7, 7), ((3, 3), (3, 3))),
    "one token after one token": Layout((1,), ((1,),)),
    "one group of many lengths": Layout((6,), ((64, 1, 33, 8, 9, 2, 40, 63),)),
}


def attended(layout: Layout, kv_heads: int, window: int | None = None) -> list[torch.Tensor]:
    """The output of 4 heads, and the gradients of queries, keys and values."""
    stream = torch.Generator().manual_seed(0)
    tokens = layout.shared_tokens + sum(layout.own_B)
    given = [
        torch.randn(1, heads, tokens, 8, dtype=torch.float64, generator=stream).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]
    out, _ = attention.shared_prompt_attention(None, *given, None, layout=layout, sliding_window=window)
    slope = torch.randn(out.shape, dtype=out.dtype, generator=stream)
    return [out, *torch.autograd.grad(out, given, slope)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_two_parts_are_the_whole(layout: Layout, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts = attended(layout, kv_heads)
    monkeypatch.setattr(attention, "SPLITS_ON", frozenset())
    for part, whole in zip(in_parts, attended(layout, kv_heads), strict=True):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("layout", "window"), [(Layout((4, 0), ((2, 3), (2, 2))), None), (LAYOUTS["uneven"], 6)])
def test_a_missing_prompt_and_a_short_window_take_the_other_way(
    layout: Layout, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("not for this layout")

    monkeypatch.setattr(split, "split_attention", refuse)
    assert bool(attended(layout, 2, window)[0].isfinite().all())


def test_a_window_wider_than_everything_is_none() -> None:
    for wide, none in zip(attended(LAYOUTS["uneven"], 2, 10**6), attended(LAYOUTS["uneven"], 2), strict=True):
        assert torch.equal(wide, none)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_completion_stands_in_one_bucket_and_wastes_less_than_half(layout: Layout) -> None:
    _, buckets = split.spots(layout.own_MG, torch.device("cpu"))
    assert sum(spot.rows for spot in buckets.spots) == len(layout.own_B)
    tokens_N = torch.arange(sum(layout.own_B) + 1)[None, None, :, None]
    laid = [spot.laid(tokens_N) for spot in buckets.spots]
    torch.testing.assert_close(buckets.back(laid), tokens_N[:, :, :-1])
    for spot, tokens in zip(buckets.spots, laid, strict=True):
        if spot.longest > 8:
            assert 2 * int((tokens < sum(layout.own_B)).sum()) > spot.rows * spot.longest


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_both_kernels_say_the_same(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    held = attended(layout, 2)
    monkeypatch.setattr(causal, "FEW", 0)
    for few, fused in zip(held, attended(layout, 2), strict=True):
        torch.testing.assert_close(few, fused, rtol=0, atol=1e-13)


def test_both_kernels_say_the_same_in_sixteen_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = torch.Generator().manual_seed(0)
    laid = torch.randn(5, 3, 4, 20, 16, generator=stream).bfloat16()
    exact = causal.attend(laid[1:4].double(), 0.25)
    gaps = []
    for few in (causal.FEW, 0):
        monkeypatch.setattr(causal, "FEW", few)
        out, total = causal.attend(laid[1:4], 0.25)
        back = causal.attend_back(torch.cat([laid[:1], out[None], laid[1:4]]), total, 0.25)
        gaps.append([float((out - exact[0]).abs().max()), float((total - exact[1]).abs().max())])
        results = [*gaps[-1], back]
    assert max(gaps[0][0], gaps[1][0]) < 0.02
    assert max(gaps[0][1], gaps[1][1]) < 0.02
    monkeypatch.undo()
    out, total = causal.attend(laid[1:4], 0.25)
    ours = causal.attend_back(torch.cat([laid[:1], out[None], laid[1:4]]), total, 0.25)
    torch.testing.assert_close(ours, results[2], rtol=0.05, atol=0.05)
