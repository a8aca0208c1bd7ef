"""What the page "Why" shows of two windows of steps: the change split, the prompts that moved, the counter-examples."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from math import isnan
from statistics import fmean
from typing import Any

from minigrpo.view.decomposition import Answer, Change, decompose
from minigrpo.view.group_index import CUT, FORMED, RIGHT, Facts, GroupIndex
from minigrpo.view.metrics_log import finite

BY_PROMPT = "prompt"
MOST_POOLS = 30
"""Different texts beyond which a field of the target names answers, not kinds."""
MOST_GROUPS = 4000
"""Groups of a window that are looked at: of more, so many are drawn at random, always the same. Some 30 MB."""
SHOWN = 12
"""Rows of each list of examples."""
LONGER = 1.2
"""Growth of the mean length that counts as longer."""

SPLITS = {
    "functions": ("By reward function", "What each reward function gave, times its weight in the sum."),
    "prompts": ("By prompts", "What was done with the prompts that both windows have, and which prompts were drawn."),
    "length": ("Cut off or not", "How often the limit cut an answer off, and what both kinds earned."),
    "outcome": (
        "Form and rightness",
        "How often answers were well-formed, how often these were right, and what each kind earned.",
    ),
}
"""Title of each split of decomposition.py, and what it tells."""

Window = tuple[int, int]
"""First and last step, both included."""
Rows = list[tuple[int, Facts]]
"""Lines of groups.jsonl with their facts."""


def explain(index: GroupIndex, before: Window, after: Window, by: str | None = None) -> dict[str, Any]:
    """Compare two windows. `by`: pool prompts by this field of their target, or BY_PROMPT; None chooses.

    The result has no `change` where a window holds no completion that could be scored.
    """
    lines = [index.lines_of_steps(*window) for window in (before, after)]
    windows = [list(index.all_facts(_drawn(each))) for each in lines]
    fields = _pooling_fields(chain(*windows))
    chosen = by if by in (BY_PROMPT, *fields) else _default_pooling(windows, fields)
    change = decompose(*([*_answers(rows, chosen)] for rows in windows))
    moved = _moved(windows, chosen)
    return {
        "windows": [_about(*each) for each in zip(windows, (before, after), map(len, lines), strict=True)],
        "by": chosen,
        "fields": [BY_PROMPT, *fields],
        "change": change and _titled(change),
        "up": [asdict(pool) for pool in moved[:SHOWN] if pool.moved > 0],
        "down": [asdict(pool) for pool in reversed(moved[-SHOWN:]) if pool.moved < 0],
        "reward up, right down": [asdict(pool) for pool in moved if pool.moved > 0 and pool.right[1] < pool.right[0]][
            :SHOWN
        ],
        "longer without reward": [asdict(pool) for pool in moved if _is_longer_for_nothing(pool)][:SHOWN],
        "wrong but well paid": _wrong_but_paid(windows[1]),
        "near-duplicates": _duplicates(windows[1]),
    }


def _titled(change: Change) -> dict[str, Any]:
    told = asdict(change)
    for split in told["splits"]:
        split["title"], split["about"] = SPLITS[split["name"]]
    return told


def _answers(rows: Rows, by: str) -> Iterable[Answer]:
    for _, facts in rows:
        for at in range(len(facts)):
            yield Answer(
                prompt=facts.prompt,
                reward=facts.rewards[at],
                parts={name: values[at] for name, values in facts.parts.items()},
                cut=bool(facts.flags[at] & CUT),
                formed=bool(facts.flags[at] & (FORMED | RIGHT)),
                right=bool(facts.flags[at] & RIGHT),
                label=None if by == BY_PROMPT else facts.labels.get(by, ""),
            )


def _pooling_fields(rows: Iterable[tuple[int, Facts]]) -> list[str]:
    """Return the fields of targets that have few enough texts to name kinds of prompts."""
    texts: dict[str, set[str]] = defaultdict(set)
    for _, facts in rows:
        for name, text in facts.labels.items():
            texts[name].add(text)
    return sorted(name for name, seen in texts.items() if 1 < len(seen) <= MOST_POOLS)


def _default_pooling(windows: Sequence[Rows], fields: Sequence[str]) -> str:
    """Compare prompts where some came in both windows, else kinds of prompts where the task names them."""
    first, second = ({facts.prompt for _, facts in rows} for rows in windows)
    return BY_PROMPT if first & second or not fields else fields[0]


def _drawn(lines: Sequence[int]) -> Sequence[int]:
    """Return the lines, or of too many a random sample: where a group stands in its step may say what it is like."""
    return lines if len(lines) <= MOST_GROUPS else sorted(random.Random(0).sample(lines, MOST_GROUPS))


def _about(rows: Rows, window: Window, logged: int) -> dict[str, Any]:
    flags = [flag for _, facts in rows for flag in facts.flags]
    return {
        "first": window[0],
        "last": window[1],
        "groups": len(rows),
        "of": logged,
        "completions": len(flags),
        "unscored": sum(isnan(reward) for _, facts in rows for reward in facts.rewards),
        "tokens": fmean(count for _, facts in rows for count in facts.tokens) if flags else None,
        "right": fmean(bool(flag & RIGHT) for flag in flags) if flags else None,
        "formed": fmean(bool(flag & FORMED) for flag in flags) if flags else None,
        "cut": fmean(bool(flag & CUT) for flag in flags) if flags else None,
    }


@dataclass(frozen=True, slots=True)
class Pool:
    """A prompt, or prompts of one kind, in both windows: pairs are (before, after). `line`: its newest group."""

    name: str
    line: int
    step: int
    completions: tuple[int, int]
    reward: tuple[float, float]
    right: tuple[float, float]
    tokens: tuple[float, float]
    moved: float


def _moved(windows: Sequence[Rows], by: str) -> list[Pool]:
    """Return what both windows have in common, from what rose most to what fell most."""
    pools = [_by_pool(rows, by) for rows in windows]
    common = (_pool(name, *(each[name] for each in pools)) for name in pools[0].keys() & pools[1].keys())
    known = [pool for pool in common if pool is not None]
    return sorted(known, key=lambda pool: (-pool.moved, pool.name))


def _by_pool(rows: Rows, by: str) -> dict[str, Rows]:
    pools: dict[str, Rows] = defaultdict(list)
    for line, facts in rows:
        pools[facts.prompt if by == BY_PROMPT else facts.labels.get(by, "")].append((line, facts))
    return pools


def _pool(name: str, before: Rows, after: Rows) -> Pool | None:
    both = (before, after)
    rewards = [[reward for _, facts in rows for reward in facts.rewards if not isnan(reward)] for rows in both]
    if not all(rewards):
        return None
    means = fmean(rewards[0]), fmean(rewards[1])
    flags = [[flag for _, facts in rows for flag in facts.flags] for rows in both]
    right = [fmean(bool(flag & RIGHT) for flag in each) for each in flags]
    tokens = [fmean(count for _, facts in rows for count in facts.tokens) for rows in both]
    line, facts = after[-1]
    return Pool(
        name=name,
        line=line,
        step=facts.step,
        completions=(len(flags[0]), len(flags[1])),
        reward=means,
        right=(right[0], right[1]),
        tokens=(tokens[0], tokens[1]),
        moved=means[1] - means[0],
    )


def _is_longer_for_nothing(pool: Pool) -> bool:
    return pool.tokens[1] >= LONGER * pool.tokens[0] and pool.moved <= 0


def _wrong_but_paid(rows: Rows) -> list[dict[str, Any]]:
    """Return wrong answers that earned at least what right ones earn on average, the best paid first."""
    rights = [facts.rewards[at] for _, facts in rows for at in range(len(facts)) if facts.flags[at] & RIGHT]
    usual = fmean(known) if (known := [reward for reward in rights if not isnan(reward)]) else None
    if usual is None:
        return []
    paid: list[dict[str, Any]] = [
        {"line": line, "step": facts.step, "prompt": facts.prompt, "sibling": at, "reward": facts.rewards[at]}
        for line, facts in rows
        for at in range(len(facts))
        if not facts.flags[at] & RIGHT and facts.rewards[at] >= usual
    ]
    return sorted(paid, key=lambda row: -float(row["reward"]))[:SHOWN]


def _duplicates(rows: Rows) -> list[dict[str, Any]]:
    """Return the groups with the most siblings that say the same, but for case and punctuation; at least half do.

    Where all are right, they may well be the same. Among equals, those that earn least come first.
    """
    found: list[dict[str, Any]] = []
    for line, facts in rows:
        most = max(Counter(facts.words).values(), default=0)
        if most > 1 and 2 * most >= len(facts) and not all(flag & RIGHT for flag in facts.flags):
            reward = finite(fmean(facts.rewards))
            found.append(
                {
                    "line": line,
                    "step": facts.step,
                    "prompt": facts.prompt,
                    "same": most,
                    "of": len(facts),
                    "reward": reward,
                }
            )
    return sorted(found, key=lambda row: (-row["same"] / row["of"], row["reward"] or 0.0))[:SHOWN]
