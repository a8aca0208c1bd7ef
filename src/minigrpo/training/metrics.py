"""Metrics of one step, under TRL's names (reward, frac_reward_zero_std, completions/...)."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from minigrpo.algorithms.objective import TIE_TOLERANCE
from minigrpo.algorithms.packing import Batch, MicroBatch
from minigrpo.training.group_source import StepGroups
from minigrpo.types import Group
from minigrpo.utils.memory import peak_bytes, reset_peak


class Clock:
    """Measures each phase of a step by name: seconds, and peak memory in bytes."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._last = time.perf_counter()
        self._laps: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._measures_memory = reset_peak(device)

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self._laps[name] = now - self._last
        if self._measures_memory:
            self._peaks[name] = peak_bytes(self.device)
            reset_peak(self.device)
        self._last = now

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return the measurements. `tokens_per_second`: completion tokens over the whole step. `memory_gb/...`.

        10^9 bytes.
        """
        total = sum(self._laps.values())
        tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
        return {
            "tokens_per_second": tokens / total if total else 0.0,
            "seconds": total,
            **{f"seconds/{name}": seconds for name, seconds in self._laps.items()},
            **{f"memory_gb/{name}": peak / 1e9 for name, peak in self._peaks.items() if name in ("rollout", "update")},
        }


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return metrics of completions and their rewards. `reward_std`: mean over groups of the deviation among siblings.

    Rewards are those of the completions that could be scored; a part counts only where its function applied.
    """
    completions = [completion for group in groups for completion in group.completions]
    grades = [grade for group in groups for grade in group.grades]
    lengths = [len(completion.token_ids) for completion in completions]
    tied = [group.spread <= TIE_TOLERANCE for group in groups]
    known = [[grade.reward for grade in group.grades if grade.scored] for group in groups]
    unscored = statistics.fmean(not grade.scored for grade in grades)
    parts = _values_by_name([grade.parts for grade in grades])
    return {
        # First, so that the names below win.
        **{name: statistics.fmean(values) for name, values in _values_by_name([g.metrics for g in grades]).items()},
        "reward": _mean([reward for rewards in known for reward in rewards]),
        "reward_std": _mean([statistics.stdev(rewards) for rewards in known if len(rewards) > 1]),
        "frac_reward_zero_std": statistics.fmean(tied),
        "informative_groups": 1 - statistics.fmean(tied),
        "accuracy": statistics.fmean(grade.solved for grade in grades),
        "format": statistics.fmean(grade.formed for grade in grades),
        **({"unscored": unscored} if unscored else {}),
        **{f"rewards/{name}/mean": statistics.fmean(values) for name, values in parts.items()},
        **{f"rewards/{name}/std": statistics.pstdev(values) for name, values in parts.items()},
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": statistics.fmean(c.finish == "length" for c in completions),
        "num_tokens": sum(lengths),
    }


def _values_by_name(figures: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    values_by_name: dict[str, list[float]] = {}
    for each in figures:
        for name, value in each.items():
            values_by_name.setdefault(name, []).append(value)
    return values_by_name


def _mean(values: Sequence[float]) -> float:
    """Return the mean, or NaN of no values: it is written as null."""
    return statistics.fmean(values) if values else math.nan


def batch_metrics(batch: Batch, figures: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of the loss; sums over tokens become means. `engine_gap`: mean |engine - policy| in nats."""
    tokens = figures.get("scored_tokens", 0.0)
    means = (
        {}
        if not tokens
        else {
            "engine_gap": figures["gap_sum"] / tokens,
            "entropy": figures["entropy_sum"] / tokens,
        }
    )
    scored = {
        name.removeprefix("scored_tokens/"): n for name, n in figures.items() if name.startswith("scored_tokens/")
    }
    gaps = {f"servers/{name}/engine_gap": figures[f"gap_sum/{name}"] / n for name, n in scored.items()}
    plain = {name: value for name, value in figures.items() if not is_sampler_figure(name)}
    return {**plain, **means, **gaps, "advantages/abs_mean": float(batch.advantages_PG.abs().mean())}


def server_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return how many of the step's groups each server sampled; {} where there is one sampler."""
    counts = Counter(group.completions[0].sampler for group in groups)
    return {f"servers/{name}/groups": float(count) for name, count in sorted(counts.items()) if name}


def step_metrics(sampled: StepGroups, batch: Batch, figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of a step. Progress is judged by the groups that were not chosen for what they earned."""
    metrics = group_metrics(sampled.fair) | dict(sampled.figures) | batch_metrics(batch, figures)
    metrics |= server_metrics(sampled.sampled)
    older = sampled.figures.get("replayed_groups") or sampled.figures.get("sampled_ahead")
    if older and "engine_gap" in metrics:
        # An older policy sampled some of these tokens: the gap says nothing of the engine.
        metrics["off_policy_gap"] = metrics.pop("engine_gap")
        return {name: value for name, value in metrics.items() if not name.endswith("/engine_gap")}
    return metrics


def held_out_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return accuracy, reward and format of greedy answers to held-out prompts."""
    figures = group_metrics(groups)
    return {f"eval/{name}": figures[name] for name in ("accuracy", "reward", "format")}


SAMPLER_FIGURES = ("gap_sum", "entropy_sum", "scored_tokens")


def is_sampler_figure(name: str) -> bool:
    """Tell whether a figure of the loss is a sum of `sampler_gap`, over all tokens or one server's."""
    return name.partition("/")[0] in SAMPLER_FIGURES


def sampler_gap(scores: Any, micro_batch: MicroBatch) -> dict[str, Tensor]:
    """Sum |engine - policy| log-probabilities of sampled tokens, and the policy's entropy, in nats.

    Where there are several servers, also for each: gap_sum/NAME, scored_tokens/NAME.
    """
    if micro_batch.is_empty:
        return {}
    gap_N = (scores.logprobs_N.detach() - micro_batch.engine_N.to(scores.logprobs_N)).abs()
    count = gap_N.new_full((), float(len(gap_N)))
    sums = {"gap_sum": gap_N.sum(), "entropy_sum": scores.entropy_N.detach().sum(), "scored_tokens": count}
    if any(group.sampler for group in micro_batch.groups):
        parts = gap_N.split([sum(group.lengths) for group in micro_batch.groups])
        for group, gap_n in zip(micro_batch.groups, parts, strict=True):
            for name, value in ("gap_sum", gap_n.sum()), ("scored_tokens", gap_n.new_full((), float(len(gap_n)))):
                key = f"{name}/{group.sampler}"
                sums[key] = sums[key] + value if key in sums else value
    return sums


def epoch_means(epochs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the figures of a step's inner epochs. `skipped`: 1 where any epoch was.

    Engine and policy are compared where both had the same weights: before the first update.
    """
    means = {name: sum(epoch[name] for epoch in epochs) / len(epochs) for name in epochs[0]}
    before = {name: value for name, value in epochs[0].items() if is_sampler_figure(name)}
    return means | before | {"skipped": float(any(epoch["skipped"] for epoch in epochs))}
