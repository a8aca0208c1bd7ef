"""Fine-tuning on written answers: the loss, its gradient however it is split into passes, and which weights learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from minigrpo.models import logprobs, sft
from minigrpo.models.logprobs import OutputHead
from minigrpo.models.sft import (
    PassLimit,
    SftExample,
    SftSchedule,
    accumulate_sft,
    mean_sft_loss,
    sft_loss,
    split_passes,
    train_sft,
)
from tests.helpers.models import gradients, make_policy
from tests.helpers.tiny import build_model

EOS = 3
EXAMPLES = [
    SftExample((5, 6, 7), (8, 9, EOS)),
    SftExample((10,), (11, 12, 13, 14, 15, EOS)),
    SftExample((20,) * 30, (21, EOS)),
]
SMALL = PassLimit(tokens=20, logits=20)


@pytest.fixture
def model() -> Any:
    return build_model()


def test_the_loss_is_that_of_the_answers_alone_whatever_the_padding(model: Any) -> None:
    total = 0.0
    for lesson in EXAMPLES:
        ids = (*lesson.prompt_ids, *lesson.answer_ids)
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logprobs[place - 1, ids[place]].item() for place in range(len(lesson.prompt_ids), len(ids)))
    assert sft_loss(model, EXAMPLES).item() == pytest.approx(total / 11, abs=1e-5)
    assert mean_sft_loss(model, EXAMPLES, SMALL) == pytest.approx(total / 11, abs=1e-5)


def test_the_gradient_does_not_depend_on_the_passes() -> None:
    policy = make_policy(double=True)
    with policy.plain_attention():
        whole = accumulate_sft(policy.model, EXAMPLES)
        expected = gradients(policy)
        assert accumulate_sft(policy.model, EXAMPLES, SMALL) == pytest.approx(whole, abs=1e-12)
    for one, other in zip(expected, gradients(policy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert any(gradient.abs().max() > 1e-6 for gradient in expected)


def test_a_frozen_head_gives_the_gradient_of_the_whole_logits_a_few_answer_tokens_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = make_policy(double=True)
    with policy.plain_attention():
        piecewise = accumulate_sft(policy.model, EXAMPLES)
        found = gradients(policy)
        monkeypatch.setattr(OutputHead, "is_frozen", property(lambda head: False))
        assert accumulate_sft(policy.model, EXAMPLES) == pytest.approx(piecewise, rel=1e-12)
    for one, other in zip(found, gradients(policy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_frozen_head_never_holds_the_logits_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list[int]()
    raw_logits = OutputHead.raw_logits

    def counted(head: OutputHead, hidden_nD: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden_nD))
        return raw_logits(head, hidden_nD)

    policy = make_policy(double=True)
    monkeypatch.setattr(OutputHead, "raw_logits", counted)
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 4 * policy.model.config.vocab_size)
    with policy.plain_attention():
        accumulate_sft(policy.model, EXAMPLES)
    assert sum(rows) == sum(len(lesson.answer_ids) for lesson in EXAMPLES)
    assert max(rows) == 4


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_runs_out_leaves_the_same_weights(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of more than 40 tokens fail once half of the gradient is there; every later step begins smaller."""
    schedule = SftSchedule(steps=3, rows=3, lr=1e-2)
    trained, sizes = [], list[int]()
    whole = sft._summed_loss

    def short(model: Any, examples: Any) -> torch.Tensor:
        loss = whole(model, examples)
        sizes.append(len(examples) * max(map(len, examples)))
        if sizes[-1] > 40:
            loss.backward()
            raise kind("CUDA out of memory.")
        return loss

    for summed in (whole, short):
        monkeypatch.setattr(sft, "_summed_loss", summed)
        policy = make_policy(double=True)
        with policy.plain_attention():
            train_sft(policy.model, EXAMPLES, schedule)
        trained.append([weight.detach().clone() for weight in policy.trainable])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    assert sum(size > 40 for size in sizes) == (2 if kind is torch.OutOfMemoryError else 1)


def test_a_pass_holds_no_more_than_there_is_room_for() -> None:
    examples = [SftExample((1,) * n, (2,) * m) for n, m in ((3, 4), (9, 1), (1, 12), (2, 2), (40, 5), (6, 6))]
    parts = list(split_passes(examples, PassLimit(tokens=24, logits=100)))
    assert sorted(map(id, examples)) == sorted(id(lesson) for part in parts for lesson in part)
    assert all(len(part) == 1 or len(part) * max(map(len, part)) <= 24 for part in parts)
    assert len(parts) < len(examples)
    assert list(split_passes(examples, PassLimit(10**6, 10**6))) == [examples]


def test_logits_bound_a_pass_as_well() -> None:
    examples = [SftExample((1,) * 5, (2,) * 5)] * 4
    assert [len(part) for part in split_passes(examples, PassLimit(tokens=1000, logits=12))] == [2, 2]


def test_a_warm_start_teaches_what_it_shows(model: Any) -> None:
    examples = [SftExample((i, i + 1), (i + 2, EOS)) for i in range(30, 38)]
    before = sft_loss(model, examples).item()
    after = train_sft(model, examples, SftSchedule(steps=60, rows=8, lr=3e-3, target_loss=0.05))
    assert after < 0.1 * before
    assert not model.training


def test_only_what_is_trainable_learns() -> None:
    policy = make_policy(lora=0.0)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    with policy.plain_attention():
        train_sft(policy.model, EXAMPLES, SftSchedule(steps=2, rows=2, lr=1e-2))
    changed = {name for name, tensor in policy.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_warm_start_ends_early_once_it_is_enough(model: Any) -> None:
    steps: list[int] = []
    examples = [SftExample((30,), (31,))] * 4
    train_sft(
        model, examples, SftSchedule(50, 4, 1e-3, target_loss=100.0), report=lambda done, loss: steps.append(done)
    )
    assert steps == [1]


def test_the_learning_rate_rises_and_falls() -> None:
    schedule = SftSchedule(steps=100, rows=1, lr=1.0, warmup=10)
    rates = [schedule.lr_at(step) for step in range(100)]
    assert rates.index(max(rates)) in (8, 9, 10)
    assert rates[0] < 0.2
    assert rates[-1] < 0.05


def test_in_float16_the_loss_is_scaled_so_that_small_gradients_survive_and_overflow_is_repeated() -> None:
    """Against float32: the same examples, a two-layer model in both number types."""
    import copy

    from minigrpo.models.loss_scale import LossScale
    from minigrpo.models.sft import accumulate_scaled

    exact = build_model("qwen2")
    half = copy.deepcopy(exact).half()
    examples = [SftExample((5, 6, 7), tuple(range(8, 40))) for _ in range(64)]
    accumulate_sft(exact, examples)
    loss, scale, _ = accumulate_scaled(half, examples, None, LossScale(2.0**24, 0, True))
    assert scale.scale < 2.0**24
    assert math.isfinite(loss)
    for fine, coarse in zip(exact.parameters(), half.parameters(), strict=True):
        if fine.grad is not None:
            assert coarse.grad is not None
            assert float((fine.grad - coarse.grad.float()).norm() / fine.grad.norm().clamp(min=1e-6)) < 0.05
    assert torch.float16 in {p.dtype for p in half.parameters()}
