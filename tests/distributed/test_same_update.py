"""Several ranks change the weights as one does, and exchange no more than they must."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.algorithms.objective import OBJECTIVES, Objective
from minigrpo.algorithms.packing import Batch, pack
from minigrpo.config.schema import ObjectiveConfig
from minigrpo.distributed.ranks import ALONE, Ranks, deal
from minigrpo.models.policy import Policy
from minigrpo.training.grpo import UpdateSettings, update_policy
from tests.helpers.models import made_up_groups, make_policy
from tests.helpers.ranks import on_ranks

pytestmark = pytest.mark.needs("linux")

CASES: dict[str, dict[str, Any]] = {
    "kl": {"kl": 0.1},
    "a third of the tokens": {"top_entropy": 0.3, "entropy": 0.1},
    "normalised over the batch": {"compare": "gdpo", "name": "dapo", "mask_truncated": True},
}


def objective_of(knobs: dict[str, Any]) -> Objective:
    made = ObjectiveConfig(**knobs)
    return OBJECTIVES[made.name].with_config(made, inexact_sampler=False)


def updated(
    ranks: Ranks, policy: Policy, objective: Objective, batch: Batch, epochs: int
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Return the weights after two steps, so that the moments of the optimizer count, and the figures of the second."""
    optimizer = torch.optim.AdamW(policy.trainable, weight_decay=0.1)
    for step in range(2):
        settings = UpdateSettings(step, 120, lr=1e-3, max_grad_norm=1.0, inner_epochs=epochs)
        figures, _ = update_policy(policy, optimizer, objective, batch, settings, ranks=ranks)
    return [weight.detach().clone() for weight in policy.trainable], figures


def gap(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def test_one_two_and_four_ranks_update_alike_and_all_ranks_the_same(tmp_path: Path) -> None:
    policy, groups = make_policy(double=True), made_up_groups()
    batches = {name: pack(groups, objective_of(knobs), 60) for name, knobs in CASES.items()}

    def work(ranks: Ranks) -> dict[str, Any]:
        return {
            name: updated(ranks, copy.deepcopy(policy), objective_of(knobs), batches[name], epochs=2)
            for name, knobs in CASES.items()
        }

    alone = work(ALONE)
    before = [weight.detach() for weight in policy.trainable]
    for size in (2, 4):
        everybody = on_ranks(size, tmp_path / str(size), work)
        for name, (weights, figures) in alone.items():
            assert gap(before, weights) > 1e-4, name
            for others, other_figures in (results[name] for results in everybody):
                assert gap(weights, others) < 1e-9, (size, name)
                assert other_figures == pytest.approx(figures, rel=1e-9), (size, name)
            assert all(gap(everybody[0][name][0], results[name][0]) == 0 for results in everybody)


def test_float32_updates_agree_to_a_millionth_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    policy = make_policy()
    objective = objective_of({})
    batch = pack(made_up_groups(), objective, 60)

    def work(ranks: Ranks) -> list[torch.Tensor]:
        return updated(ranks, copy.deepcopy(policy), objective, batch, epochs=1)[0]

    first, again = (on_ranks(4, tmp_path / name, work) for name in ("first", "again"))
    assert gap(work(ALONE), first[0]) < 1e-6
    assert all(gap(left, right) == 0 for left, right in zip(first, again, strict=True))


def test_an_update_exchanges_its_gradients_and_a_line_of_figures(tmp_path: Path) -> None:
    policy = make_policy()
    objective = objective_of({})
    batch = pack(made_up_groups(), objective, 60)
    size = 4

    def work(ranks: Ranks) -> dict[str, int]:
        assert ranks.wire is not None
        ranks.wire = CountingWire(ranks.wire)
        updated(ranks, policy, objective, batch, epochs=1)
        return dict(ranks.sent) | {"counted": ranks.wire.sent}

    class CountingWire:
        """Counts for itself what leaves this rank: a tensor for each other rank, or its row of it."""

        def __init__(self, wire: Any) -> None:
            self.wire, self.sent = wire, 0

        def gather(self, part: torch.Tensor) -> list[torch.Tensor]:
            self.sent += (size - 1) * part.nbytes
            return self.wire.gather(part)  # type: ignore[no-any-return]

        def swap(self, slices_RL: torch.Tensor) -> torch.Tensor:
            self.sent += slices_RL.nbytes * (size - 1) // size
            return self.wire.swap(slices_RL)  # type: ignore[no-any-return]

        def guarded(self, exchange: Any) -> Any:
            return self.wire.guarded(exchange)

        def close(self) -> None:
            self.wire.close()

    numbers = sum(weight.numel() for weight in policy.trainable)
    for sent in on_ranks(size, tmp_path, work):
        padded = -(-numbers // size) * size
        assert sent["gradients"] == 2 * 2 * (size - 1) * padded * 4 // size  # two steps, there and back
        assert sent["counted"] == sent["gradients"] + sent["figures"]
        assert sent["figures"] < 2 * (size - 1) * 2000


def test_ranks_that_have_nothing_to_do_take_part_all_the_same(tmp_path: Path) -> None:
    policy, objective = make_policy(double=True), objective_of({})
    batch = pack(made_up_groups()[:1], objective, 60)
    assert batch.has_gradient

    def work(ranks: Ranks) -> list[torch.Tensor]:
        return updated(ranks, copy.deepcopy(policy), objective, batch, epochs=2)[0]

    for weights in on_ranks(2, tmp_path, work):
        assert gap(work(ALONE), weights) < 1e-9


def test_what_no_rank_has_a_gradient_for_keeps_none(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> list[bool]:
        pair = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        if ranks.rank == 1:
            pair[0].grad = torch.full((3,), 2.0)
        ranks.add_up(pair, {})
        assert pair[0].grad is not None
        assert pair[0].grad.tolist() == [2.0, 2.0, 2.0]
        return [weight.grad is None for weight in pair]

    assert on_ranks(2, tmp_path, work) == [[False, True]] * 2


def test_numbers_and_words_come_back_as_they_were_sent(tmp_path: Path) -> None:
    data = {"odd": [0.1, 1e-300, -0.0], "text": "é\u2028\ud800", "none": None}

    def work(ranks: Ranks) -> list[Any]:
        return ranks.gather("groups", [data] * ranks.rank)

    for found in on_ranks(3, tmp_path, work):
        assert json.dumps(found) == json.dumps([[], [data], [data, data]])


def test_work_is_dealt_so_that_ranks_end_together_and_nothing_is_lost() -> None:
    costs = [90, 10, 40, 40, 10, 10, 60, 20]
    hands = deal(costs, 3)
    assert sorted(place for hand in hands for place in hand) == list(range(len(costs)))
    assert max(sum(costs[place] for place in hand) for hand in hands) == 100  # 280 / 3 is 93.3
    assert deal([5, 5], 4) == [[0], [1], [], []]
