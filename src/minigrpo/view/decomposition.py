"""Split the change of the mean reward between two windows of steps into parts that sum to it exactly.

A and B are the completions of an earlier and a later window, r a reward, and the change D = mean_B(r) - mean_A(r).
Completions that could not be scored are left out. Each split writes D as a sum; none of them is an approximation.

**By a trait** (cut off or not; malformed, wrong or right). s_k is the share of completions with trait k, r_k their mean
reward, a bar the mean of both windows:

    D = sum_k (s_k^B - s_k^A) rbar_k  +  sum_k sbar_k (r_k^B - r_k^A)

The first sum is what happened more often, the second what the same earned. E. M. Kitagawa, "Components of a difference
between two rates", JASA 50 (1955). Where a trait does not occur in one window, its reward there is taken to be that of
the other, so that all of its change is in the first sum. With f the well-formed share and a the right share among
those, s_right = f a, s_wrong = f (1 - a), s_malformed = 1 - f, and the first sum splits once more, into form and
rightness.

**By prompts.** S are those drawn in both windows, E those only in B (entering), X those only in A (leaving):

    D = (r_S^B - r_S^A)  +  s_E (r_E - r_S^B)  +  s_X (r_S^A - r_X)

M. Melitz and S. Polanec, "Dynamic Olley-Pakes productivity decomposition with entry and exit", RAND J. Economics 46
(2015). The first term is split by Kitagawa's formula into what was done with the same prompts and how often each of
them was drawn. Prompts may be pooled under a label (a kind of problem), where few of them come twice.

**By reward function.** Where r = sum_k w_k p_k, D = sum_k w_k (mean_B(p_k) - mean_A(p_k)). The log holds the parts, not
their weights: these are the least-squares solution over both windows, exact where the reward is such a sum. Whatever is
left, of a reward that is no such sum, is a term of its own. A part that did not apply counts as 0.

**Intervals** are 95 %: 1.96 standard errors of the delete-one jackknife over prompts, since the completions of one
prompt resemble one another (B. Efron and C. Stein, "The jackknife estimate of variance", Annals of Statistics 9, 1981).
The weights of the parts are held fixed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, sqrt

from minigrpo.utils.rates import Z_95

Sums = tuple[float, ...]
"""Sums over completions that belong together: they add up over prompts."""

COLLINEAR = 1e-9
"""Share of a reward function's own square below which what the others leave of it is rounding."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a split needs to know of one completion. `label`: of its prompt's pool; None pools nothing."""

    prompt: str
    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    cut: bool = False
    formed: bool = True
    right: bool = False
    label: str | None = None

    @property
    def pool(self) -> str:
        return self.prompt if self.label is None else self.label


@dataclass(frozen=True, slots=True)
class Term:
    """One part of the change. `half`: half the width of its interval, None where one prompt is all there is.

    `facts`: the figures behind it, by name.
    """

    name: str
    value: float
    half: float | None
    facts: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Split:
    """One way to write the change as a sum of terms. `notes`: names to be told of, by what they are."""

    name: str
    terms: tuple[Term, ...]
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """The change of the mean reward from one window to another, and the ways to split it."""

    before: float
    after: float
    total: Term
    splits: tuple[Split, ...]


def decompose(before: Sequence[Answer], after: Sequence[Answer]) -> Change | None:
    """Split the change of the mean reward; None where a window has no completion that could be scored."""
    windows = [[answer for answer in window if not isnan(answer.reward)] for window in (before, after)]
    if not all(windows):
        return None
    means = [sum(answer.reward for answer in window) / len(window) for window in windows]
    [total] = _by_sums(windows, lambda answer: (1.0, answer.reward), lambda a, b: [_change(a, b)])
    splits = (_by_function(windows), _by_prompt(windows), _by_length(windows), _by_outcome(windows))
    return Change(means[0], means[1], Term("total", *total), splits)


def _change(a: Sums, b: Sums) -> float:
    return _mean(b[1], b[0]) - _mean(a[1], a[0])


def _mean(total: float, count: float) -> float:
    return total / count if count else 0.0


# ---- the jackknife

Valued = tuple[float, float | None]
"""A term's value and half the width of its interval."""
Windows = Sequence[Sequence[Answer]]


def _by_sums(
    windows: Windows, weigh: Callable[[Answer], Sums], terms: Callable[[Sums, Sums], Sequence[float]]
) -> list[Valued]:
    """Compute terms that are functions of the sums of `weigh` over each window, with their intervals."""
    clusters = _clusters(windows, weigh)
    totals = [_added(pair[window] for pair in clusters.values()) for window in (0, 1)]
    others = (
        terms(*(_less(total, own) for total, own in zip(totals, pair, strict=True))) for pair in clusters.values()
    )
    return _with_halves(terms(*totals), others)


def _clusters(windows: Windows, weigh: Callable[[Answer], Sums]) -> dict[str, list[Sums]]:
    """Return the sums of each prompt, (in the first window, in the second)."""
    width = len(weigh(windows[0][0]))
    clusters: dict[str, list[Sums]] = defaultdict(lambda: [(0.0,) * width, (0.0,) * width])
    for number, window in enumerate(windows):
        for answer in window:
            pair = clusters[answer.prompt]
            pair[number] = _added((pair[number], weigh(answer)))
    return dict(clusters)


def _added(sums: Iterable[Sums]) -> Sums:
    return tuple(map(sum, zip(*sums, strict=True)))


def _less(total: Sums, own: Sums) -> Sums:
    # Counts are whole numbers, exact in floats: nothing but rounding is left of a sum over nothing.
    return tuple(a - b for a, b in zip(total, own, strict=True))


def _with_halves(values: Sequence[float], others: Iterable[Sequence[float]]) -> list[Valued]:
    """Join the terms with the half widths that follow from the same terms without each prompt in turn."""
    columns = list(zip(*others, strict=True))
    return [(value, _half_width(column)) for value, column in zip(values, columns, strict=True)]


def _half_width(column: Sequence[float]) -> float | None:
    count = len(column)
    if count < 2:
        return None
    mean = sum(column) / count
    return Z_95 * sqrt((count - 1) / count * sum((value - mean) ** 2 for value in column))


# ---- by a trait


def _by_length(windows: Windows) -> Split:
    """Split by whether the limit cut a completion off: sums are (count, reward) of those that ended, of those cut."""

    def weigh(answer: Answer) -> Sums:
        here = (1.0, answer.reward)
        return (0.0, 0.0, *here) if answer.cut else (*here, 0.0, 0.0)

    def terms(a: Sums, b: Sums) -> list[float]:
        often, earned = kitagawa(_traits(a), _traits(b))
        return [sum(often), *earned]

    valued = _by_sums(windows, weigh, terms)
    (ended_a, cut_a), (ended_b, cut_b) = (_traits(_total(window, weigh)) for window in windows)
    facts = ({"before": cut_a[0], "after": cut_b[0]}, _rewards(ended_a, ended_b), _rewards(cut_a, cut_b))
    return Split("length", _named(("cut off more or less often", "ended by themselves", "cut off"), valued, facts))


def _by_outcome(windows: Windows) -> Split:
    """Split by outcome: sums are (count, reward) of malformed, wrong and right completions."""

    def weigh(answer: Answer) -> Sums:
        sums = [0.0] * 6
        at = 4 if answer.right else 2 if answer.formed else 0
        sums[at : at + 2] = 1.0, answer.reward
        return tuple(sums)

    def terms(a: Sums, b: Sums) -> list[float]:
        return [*_form_and_rightness(_traits(a), _traits(b)), *kitagawa(_traits(a), _traits(b))[1]]

    valued = _by_sums(windows, weigh, terms)
    traits = [_traits(_total(window, weigh)) for window in windows]
    formed = [1 - each[0][0] for each in traits]
    right = [_mean(each[2][0], share) for each, share in zip(traits, formed, strict=True)]
    shares: list[dict[str, float | None]] = [{"before": before, "after": after} for before, after in (formed, right)]
    facts = [*shares, *(_rewards(a, b) for a, b in zip(traits[0], traits[1], strict=True))]
    names = ("well-formed more or less often", "right more or less often, if well-formed")
    return Split("outcome", _named((*names, "malformed", "well-formed and wrong", "right"), valued, facts))


Trait = tuple[float, float | None]
"""The share of a window's completions that have a trait, and their mean reward; None where there are none."""


def _traits(sums: Sums) -> list[Trait]:
    pairs = list(zip(sums[::2], sums[1::2], strict=True))
    count = sum(pair[0] for pair in pairs)
    return [(_mean(number, count), reward / number if number else None) for number, reward in pairs]


def kitagawa(a: Sequence[Trait], b: Sequence[Trait]) -> tuple[list[float], list[float]]:
    """Return, for each trait, what its share's change and what its reward's change contribute."""
    pairs = list(zip(a, b, strict=True))
    often = [(share_b - share_a) * _middle(r_a, r_b) for (share_a, r_a), (share_b, r_b) in pairs]
    earned = [
        (share_a + share_b) / 2 * (0.0 if r_a is None or r_b is None else r_b - r_a)
        for (share_a, r_a), (share_b, r_b) in pairs
    ]
    return often, earned


def _middle(a: float | None, b: float | None) -> float:
    """Return the mean of two rewards; where one is unknown, the other stands for both."""
    known = [value for value in (a, b) if value is not None]
    return sum(known) / len(known) if known else 0.0


def _form_and_rightness(a: Sequence[Trait], b: Sequence[Trait]) -> list[float]:
    """Split what the shares' changes contribute into the change of form and that of rightness among the well-formed."""
    malformed, wrong, right = (_middle(own_a[1], own_b[1]) for own_a, own_b in zip(a, b, strict=True))
    formed = [1 - each[0][0] for each in (a, b)]
    # Without anything well-formed the rightness is unknown: the other window's stands for both.
    rightness = [each[2][0] / share if share else None for each, share in zip((a, b), formed, strict=True)]
    known = [value if value is not None else _middle(*rightness) for value in rightness]
    mean_right, mean_formed = sum(known) / 2, sum(formed) / 2
    return [
        (formed[1] - formed[0]) * (mean_right * right + (1 - mean_right) * wrong - malformed),
        mean_formed * (known[1] - known[0]) * (right - wrong),
    ]


def _total(window: Sequence[Answer], weigh: Callable[[Answer], Sums]) -> Sums:
    return _added(weigh(answer) for answer in window)


def _rewards(a: Trait, b: Trait) -> dict[str, float | None]:
    return {"before": a[1], "after": b[1], "share before": a[0], "share after": b[0]}


def _named(
    names: Sequence[str], valued: Sequence[Valued], facts: Sequence[Mapping[str, float | None]]
) -> tuple[Term, ...]:
    return tuple(Term(name, *pair, fact) for name, pair, fact in zip(names, valued, facts, strict=True))


# ---- by prompts


def _by_prompt(windows: Windows) -> Split:
    """Split by which prompts were drawn, and what was done with those of both windows."""
    pools: dict[str, list[Sums]] = {}
    home: dict[str, str] = {}
    clusters = _clusters(windows, lambda answer: (1.0, answer.reward))
    for window in windows:
        home |= {answer.prompt: answer.pool for answer in window}
    for prompt, pair in clusters.items():
        held = pools.setdefault(home[prompt], [(0.0, 0.0), (0.0, 0.0)])
        pools[home[prompt]] = [_added(each) for each in zip(held, pair, strict=True)]
    shares = {name: _pool_sums(pool) for name, pool in pools.items()}
    total = _added(shares.values())

    def without(prompt: str) -> Sums:
        """Return the total without one prompt, of which nothing but its own pool has to be computed again."""
        pool = [_less(held, own) for held, own in zip(pools[home[prompt]], clusters[prompt], strict=True)]
        return _added((_less(total, shares[home[prompt]]), _pool_sums(pool)))

    valued = _with_halves(_prompt_terms(total), (_prompt_terms(without(prompt)) for prompt in clusters))
    names = (
        "the same prompts, done differently",
        "the same prompts, drawn more or less often",
        "prompts of the later window only",
        "prompts of the earlier window only",
        "no prompt in common",
    )
    both = sum(all(count for count, _ in pool) for pool in pools.values())
    counts = [sum(1 for pool in pools.values() if pool[number][0]) for number in (0, 1)]
    fact: dict[str, float | None] = {"in both": both, "before": counts[0], "after": counts[1]}
    told = slice(0, 4) if both else slice(4, 5)  # the others are 0
    return Split("prompts", _named(names[told], valued[told], [fact] * len(names[told])))


def _pool_sums(pool: Sequence[Sums]) -> Sums:
    """Return the ten sums that a pool adds to: where it is in both windows, counts and rewards of both and each count
    times the other window's mean reward; counts and rewards where it is in the later one alone, and in the earlier."""
    (n_a, r_a), (n_b, r_b) = pool
    if n_a and n_b:
        return (n_a, r_a, n_b, r_b, n_b * r_a / n_a, n_a * r_b / n_b, 0.0, 0.0, 0.0, 0.0)
    return (0.0,) * 6 + (n_b, r_b if n_b else 0.0, n_a, r_a if n_a else 0.0)


def _prompt_terms(sums: Sums) -> list[float]:
    n_a, r_a, n_b, r_b, r_a_at_b, r_b_at_a, n_e, r_e, n_x, r_x = sums
    if not n_a or not n_b:
        return [0.0, 0.0, 0.0, 0.0, _mean(r_e, n_e) - _mean(r_x, n_x)]
    mean_a, mean_b = r_a / n_a, r_b / n_b
    done = ((r_b_at_a - r_a) / n_a + (r_b - r_a_at_b) / n_b) / 2
    drawn = (mean_b - mean_a + r_a_at_b / n_b - r_b_at_a / n_a) / 2
    entered = n_e / (n_b + n_e) * (_mean(r_e, n_e) - mean_b)
    left = n_x / (n_a + n_x) * (mean_a - _mean(r_x, n_x))
    return [done, drawn, entered, left, 0.0]


# ---- by reward function


def _by_function(windows: Windows) -> Split:
    """Split by reward function, with what the functions do not explain as the last term."""
    names = sorted({name for window in windows for answer in window for name in answer.parts})
    weights = fitted_weights(names, [answer for window in windows for answer in window])
    tied = tuple(name for name in names if name not in weights)

    def weigh(answer: Answer) -> Sums:
        values = [weight * _part(answer, name) for name, weight in weights.items()]
        return (1.0, *values, answer.reward - sum(values))

    def terms(a: Sums, b: Sums) -> list[float]:
        return [_mean(after, b[0]) - _mean(before, a[0]) for before, after in zip(a[1:], b[1:], strict=True)]

    valued = _by_sums(windows, weigh, terms)
    means = [[_mean(sum(_part(each, name) for each in window), len(window)) for window in windows] for name in weights]
    facts = [
        {"before": pair[0], "after": pair[1], "weight": weight}
        for pair, weight in zip(means, weights.values(), strict=True)
    ]
    return Split("functions", _named((*weights, "the rest"), valued, [*facts, {}]), {"tied": tied} if tied else {})


def _part(answer: Answer, name: str) -> float:
    value = answer.parts.get(name, 0.0)
    return 0.0 if isnan(value) else value


def fitted_weights(names: Sequence[str], answers: Sequence[Answer]) -> dict[str, float]:
    """Return the weights with which the parts come closest to the rewards, by least squares.

    A part that is the same mixture of the others throughout has no weight of its own, and is left out.
    """
    rows = [([_part(answer, name) for name in names], answer.reward) for answer in answers]
    size = range(len(names))
    matrix = [
        [sum(row[i] * row[j] for row, _ in rows) for j in size] + [sum(row[i] * r for row, r in rows)] for i in size
    ]
    kept: list[int] = []
    whole = [matrix[i][i] for i in size]
    while left := [i for i in size if i not in kept and matrix[i][i] > COLLINEAR * whole[i]]:
        pivot = max(left, key=lambda i: matrix[i][i] / whole[i])
        kept.append(pivot)
        for i in size:
            if i != pivot:
                factor = matrix[i][pivot] / matrix[pivot][pivot]
                matrix[i] = [value - factor * above for value, above in zip(matrix[i], matrix[pivot], strict=True)]
    return {names[i]: matrix[i][-1] / matrix[i][i] for i in sorted(kept)}
