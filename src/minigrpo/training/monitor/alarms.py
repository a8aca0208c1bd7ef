"""Alarms about a run, in sentences: what the metrics show, the likely cause, and the setting to change.

Judged from the logged figures alone, so a resumed run, which reads them back, says nothing twice. An alarm is a value
in ALARMS: over how many steps it looks, when it holds, what it says. A figure that was not logged, or was not finite,
raises none.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from minigrpo.config.schema import Recipe
from minigrpo.errors import more_at

WINDOW, LONG = 5, 50
"""Steps of a short window, and steps over which something was better before."""
SPREAD = re.compile(r"rewards/.*/std")

Row = Mapping[str, float]


def is_known(value: Any) -> bool:
    """Return whether a value is a finite number.

    JSON holds null for what was not, and a figure may be missing altogether.
    """
    return isinstance(value, int | float) and math.isfinite(value)


def mean_of(rows: Iterable[Row], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return statistics.fmean(values) if values else math.nan


@dataclass(frozen=True, slots=True)
class History:
    """The steps that an alarm may look at: the newest `steps`, the first of the run, and the last LONG."""

    recipe: Recipe
    rows: tuple[Row, ...]
    first: tuple[Row, ...]
    long: tuple[Row, ...]
    gap_limit: float

    def all(self, name: str, holds: Callable[[float], bool]) -> bool:
        """Return whether `holds` is true of the metric in every step of the window."""
        return all(name in row and holds(row[name]) for row in self.rows)

    def mean(self, name: str) -> float:
        """Return the mean over the window's steps that have the metric, or NaN, which fails every comparison."""
        return mean_of(self.rows, name)

    def began(self, name: str) -> float:
        """Return the mean of the metric over the first steps of the run."""
        return mean_of(self.first, name)

    def best(self, name: str) -> float:
        """Return the largest mean over a short window of the last LONG steps."""
        spans = [self.long[start : start + WINDOW] for start in range(max(1, len(self.long) - WINDOW + 1))]
        return max((value for span in spans if not math.isnan(value := mean_of(span, name))), default=math.nan)

    def peak(self, name: str) -> float:
        """Return the largest value of a single step of the last LONG."""
        return max((row[name] for row in self.long if name in row), default=math.nan)

    def rise(self, name: str) -> tuple[float, float]:
        """Return (mean of the window's later half minus its earlier half, the standard error of that difference)."""
        half = len(self.rows) // 2
        parts = [[row[name] for row in rows if name in row] for rows in (self.rows[:half], self.rows[half:])]
        if min(len(part) for part in parts) < 2:
            return math.nan, math.nan
        error = math.sqrt(sum(statistics.variance(part) / len(part) for part in parts))
        return statistics.fmean(parts[1]) - statistics.fmean(parts[0]), error

    @property
    def steps(self) -> int:
        return len(self.rows)

    @property
    def answers(self) -> int:
        """Completions of the window."""
        return self.steps * self.recipe.rollout.prompts * self.recipe.rollout.completions

    @property
    def reward(self) -> str:
        return f"{self.rows[-1].get('reward', math.nan):.3g}"

    @property
    def silent(self) -> bool:
        """Whether no group of the window had two different rewards."""
        return self.all("informative_groups", lambda share: share <= 1e-9)

    @property
    def same(self) -> bool:
        """Whether all completions earned the same, as far as the figures tell: within groups, groups, and steps."""
        rewards = [row.get("reward", math.nan) for row in self.rows]
        spreads = [value for row in self.rows for name, value in row.items() if SPREAD.fullmatch(name)]
        mixed = 0 < self.mean("accuracy") < 1 or max(spreads, default=0.0) > 1e-9
        return self.silent and not mixed and max(rewards) - min(rewards) < 1e-9

    @property
    def gains(self) -> bool:
        """Whether more is solved or earned than at the beginning of the run: then it may well be done differently."""
        spread = self.began("reward_std")
        return (
            self.mean("accuracy") > self.began("accuracy") + 0.05
            or self.mean("reward") > self.began("reward") + 0.25 * spread
        )


CUT, LENGTH = "completions/clipped_ratio", "completions/mean_length"


@dataclass(frozen=True, slots=True)
class Alarm:
    """`holds` is asked once `steps` steps are there; `says` is one sentence, or two. `entry`: of the troubleshooting
    page, where that says more."""

    name: str
    steps: int
    holds: Callable[[History], bool]
    says: Callable[[History], str]
    entry: str | None = None

    def message(self, past: History) -> str:
        """Return the line that is printed: by its name docs/alarms.md lists it."""
        more = f" {more_at(self.entry)}" if self.entry else ""
        return f"alarm, {self.name}: {self.says(past)}{more}"


class Alarms:
    """Fed with every step's metrics in order, from the first.

    `sixteen_bit`: whether the policy's weights are, which is what rounds between engine and policy; None: what the
    recipe says, and where it says auto, as in 16 bit.
    """

    def __init__(self, recipe: Recipe, *, sixteen_bit: bool | None = None) -> None:
        self._recipe = recipe
        half = recipe.model.dtype != "float32" if sixteen_bit is None else sixteen_bit
        self._gap_limit = 0.05 if half else 1e-3
        self._first: list[Row] = []
        self._long: deque[Row] = deque(maxlen=LONG)
        self._said: dict[str, int] = {}

    @classmethod
    def replayed(cls, recipe: Recipe, rows: Iterable[Mapping[str, Any]], *, sixteen_bit: bool | None = None) -> Alarms:
        """Return the alarms as they were after these lines of metrics.jsonl."""
        alarms = cls(recipe, sixteen_bit=sixteen_bit)
        for row in rows:
            alarms.after(int(row["step"]), row)
        return alarms

    def after(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Return the messages after this step, each under the name by which docs/alarms.md lists it.

        An alarm that lasts is repeated every watch.every steps.
        """
        row = {name: float(value) for name, value in metrics.items() if is_known(value)}
        self._long.append(row)
        if len(self._first) < WINDOW:
            self._first.append(row)
        raised = [alarm for alarm in ALARMS if self._is_due(alarm, step) and alarm.holds(self._past(alarm.steps))]
        self._said |= {alarm.name: step for alarm in raised}
        return [alarm.message(self._past(alarm.steps)) for alarm in raised]

    def _is_due(self, alarm: Alarm, step: int) -> bool:
        said = self._said.get(alarm.name)
        return len(self._long) >= alarm.steps and (said is None or step - said >= self._recipe.watch.every)

    def _past(self, steps: int) -> History:
        long = tuple(self._long)
        return History(self._recipe, long[-steps:], tuple(self._first), long, self._gap_limit)


def unformed(past: History) -> bool:
    return past.same and past.mean("reward") <= 0 and past.all("format", lambda share: share == 0)


def hacked(past: History) -> bool:
    """Return whether reward rises while accuracy does not, and better form is not the reason.

    Return False where nothing ever counts as solved, as with a bare reward function: then accuracy tells nothing.
    """
    reward, reward_error = past.rise("reward")
    accuracy, _ = past.rise("accuracy")
    form, _ = past.rise("format")
    clear = reward > 3 * reward_error and reward > 0.25 * past.mean("reward_std")
    return clear and accuracy <= 0.01 and not form > 0.02 and 0 < past.mean("accuracy") < 0.9


def explored_out(past: History) -> bool:
    """Return whether entropy has collapsed, unless the task is solved or half of the groups still differ in reward."""
    gone = past.mean("entropy") < 0.1 * past.began("entropy")
    return gone and past.mean("accuracy") < 0.9 and past.mean("informative_groups") < 0.5


def resampled_in_vain(past: History) -> bool:
    tried = past.mean("resample/tried")
    return tried >= 0.5 * past.recipe.rollout.prompts and past.mean("resample/found") < 0.1 * tried


def _form_told(past: History) -> str:
    """Say how many had the form; nothing where all did: a task that asks for none counts every answer as formed."""
    formed = past.mean("format")
    return f", though {formed:.0%} had the asked-for form" if formed < 1 else ""


UNFORMED = Alarm(
    "unformed",
    WINDOW,
    lambda past: unformed(past) and past.peak("format") < 0.2,
    lambda past: (
        f"For {past.steps} steps no group had two different rewards: every one of the {past.answers} completions "
        f"earned {past.reward} and none had the asked-for form. The model does not know the form: show it with "
        "warmup.steps (see `minigrpo warmup --help`), or see with `minigrpo check-task` whether the prompt asks for it."
    ),
    entry="reward-stays-at-0",
)
BROKEN = Alarm(
    "broken",
    WINDOW,
    lambda past: unformed(past) and past.peak("format") >= 0.2,
    lambda past: (
        f"For {past.steps} steps every one of the {past.answers} completions earned {past.reward} and none had the "
        f"asked-for form, which {past.peak('format'):.0%} had had before: too large a step has broken the model. "
        "Begin again with a lower train.lr."
    ),
    entry="training-exploded",
)
TOO_HARD = Alarm(
    "too hard",
    WINDOW,
    lambda past: past.same and past.mean("reward") <= 0 and past.mean("format") > 0 and past.mean("accuracy") < 1,
    lambda past: (
        f"For {past.steps} steps no group had two different rewards: every one of the {past.answers} completions "
        f"earned {past.reward}{_form_told(past)}. Either the task is too hard for this model (easier prompts, more "
        "rollout.completions), or its grader never pays what the model writes: `minigrpo check-task` shows what it "
        "pays for, `minigrpo view` what the model writes."
    ),
    entry="reward-stays-at-0",
)
CONSTANT = Alarm(
    "constant reward",
    WINDOW,
    lambda past: past.same and past.mean("reward") > 0 and past.mean("accuracy") < 1,
    lambda past: (
        f"For {past.steps} steps every one of the {past.answers} completions earned the same {past.reward}, and "
        f"{past.mean('accuracy'):.0%} were solved. A grader that pays everything alike teaches nothing: "
        "see with `minigrpo check-task` whether it looks at the answer."
    ),
)
ALL_SOLVED = Alarm(
    "all solved",
    WINDOW,
    lambda past: past.silent and past.all("accuracy", lambda share: share == 1),
    lambda past: (
        f"For {past.steps} steps every one of the {past.answers} completions was solved, so nothing is left to learn "
        "from these prompts. The task is too easy by now: stop here, or take harder prompts (task.name, task.data)."
    ),
)
TIED = Alarm(
    "tied",
    WINDOW,
    lambda past: past.silent and not past.same and not past.all("accuracy", lambda share: share == 1),
    lambda past: (
        f"For {past.steps} steps the siblings of every group earned the same, though groups differ: each prompt is "
        "solved always or never. More rollout.completions or a higher rollout.temperature brings differences; "
        "groups.resample and groups.focus look for prompts that have them."
    ),
    entry="all-siblings-earn-the-same",
)
TRUNCATED = Alarm(
    "truncated",
    WINDOW,
    lambda past: past.all(CUT, lambda share: share >= 0.5),
    lambda past: (
        f"{past.mean(CUT):.0%} of the completions of the last {past.steps} steps were cut off at "
        f"{past.recipe.rollout.max_tokens} tokens, before they had ended. Raise rollout.max_tokens: see with `minigrpo "
        "preflight` how far. Or ask for shorter answers in the prompt."
    ),
    entry="answers-are-cut-off",
)
HACKED = Alarm(
    "reward hacking",
    20,
    hacked,
    lambda past: (
        f"Within {past.steps} steps the reward rose by {past.rise('reward')[0]:.2g} while accuracy changed by "
        f"{past.rise('accuracy')[0]:+.2g}: the reward may be earned without solving. Look at what is paid in "
        "groups.jsonl, and at the balance in task.weights."
    ),
    entry="reward-rises-and-accuracy-does-not",
)
FALLEN = Alarm(
    "reward fell",
    WINDOW,
    lambda past: past.best("reward") - past.mean("reward") > max(past.best("reward_std"), 1e-9) and not past.silent,
    lambda past: (
        f"The reward fell to {past.mean('reward'):.3g}; it had been {past.best('reward'):.3g} within the last "
        f"{len(past.long)} steps. The steps are likely too large: lower train.lr, or hold the model with objective.kl."
    ),
)
ENTROPY = Alarm(
    "entropy collapse",
    WINDOW,
    explored_out,
    lambda past: (
        f"Entropy is {past.mean('entropy'):.2g} nats, it began at {past.began('entropy'):.2g}, but only "
        f"{past.mean('accuracy'):.0%} of the completions are solved and {past.mean('informative_groups'):.0%} of the "
        "groups compare anything: exploration has ended too early. Turn up objective.entropy, objective.clip_high or "
        "rollout.temperature, or lower train.lr."
    ),
)
LONGER = Alarm(
    "length explosion",
    WINDOW,
    lambda past: past.mean(LENGTH) > 2 * past.began(LENGTH) and not past.gains,
    lambda past: (
        f"Completions have {past.mean(LENGTH):.0f} tokens, they began with {past.began(LENGTH):.0f}, and no more of "
        "them is solved. objective.overlong makes length cost something; objective.name dr_grpo or dapo takes away "
        "what long wrong answers gain."
    ),
)
SHORTER = Alarm(
    "length collapse",
    WINDOW,
    lambda past: past.mean(LENGTH) < past.began(LENGTH) / 3 and not past.gains,
    lambda past: (
        f"Completions have {past.mean(LENGTH):.0f} tokens, they began with {past.began(LENGTH):.0f}, and no more of "
        "them is solved. See in groups.jsonl what is left of the answers; lower train.lr, or task.weights of what "
        "pays for being short."
    ),
)
MISMATCH = Alarm(
    "engine mismatch",
    3,
    # An older policy sampled what is replayed, or was sampled ahead: there the gap is meant to be.
    lambda past: (
        past.all("engine_gap", lambda gap: gap > past.gap_limit)
        and not past.recipe.groups.replay
        and not past.recipe.rollout.ahead
    ),
    lambda past: (
        f"Engine and policy disagree by {past.mean('engine_gap'):.2g} nats a token on what was sampled; rounding "
        f"explains up to {past.gap_limit:g}. Try model.head_float32 or rollout.engine transformers, correct "
        "for it with objective.importance token_truncate, and report it as a bug if it stays."
    ),
)
UNLEARNED = Alarm(
    "form lost",
    WINDOW,
    lambda past: past.best("format") >= 0.8 and past.mean("format") < past.best("format") - 0.3,
    lambda past: (
        f"{past.mean('format'):.0%} of the completions have the asked-for form; {past.best('format'):.0%} had, within "
        f"the last {len(past.long)} steps. Lower train.lr, give the form more of task.weights, or hold the model with "
        "objective.kl; if completions are cut off, raise rollout.max_tokens."
    ),
)
TOO_EASY = Alarm(
    "too easy",
    10,
    lambda past: 0 < past.mean("informative_groups") < 0.1 and past.mean("accuracy") > 0.95,
    lambda past: (
        f"Over {past.steps} steps {past.mean('accuracy'):.0%} of the completions were solved and only "
        f"{past.mean('informative_groups'):.0%} of the groups compared anything. Take harder prompts, or let solved "
        "ones rest with groups.rest."
    ),
)
DRIFTED = Alarm(
    "KL",
    WINDOW,
    lambda past: past.mean("kl") > 2,
    lambda past: (
        f"The policy is {past.mean('kl'):.2g} nats a token away from the model it began as. Raise objective.kl or "
        "lower train.lr, unless so large a change is wanted."
    ),
)
SKIPPED = Alarm(
    "skipped",
    2,
    lambda past: past.rows[-1].get("skipped") == 1 and mean_of(past.long[-10:], "skipped") * len(past.long[-10:]) > 1.5,
    lambda past: (
        f"The gradient was not finite in {sum(row.get('skipped', 0) for row in past.long[-10:]):.0f} of the last "
        f"{len(past.long[-10:])} steps, which were skipped. Lower train.lr; in 16 bit, try model.dtype float32."
    ),
)
UNSCORED = Alarm(
    "unscored",
    WINDOW,
    lambda past: past.all("unscored", lambda share: share > 0) and past.mean("unscored") > 0.1,
    lambda past: (
        f"{past.mean('unscored'):.0%} of the completions of the last {past.steps} steps could not be scored and teach "
        "nothing: no reward function applied to them, or the grader took longer than task.seconds."
    ),
)
RESAMPLED = Alarm(
    "resampling in vain",
    10,
    resampled_in_vain,
    lambda past: (
        f"Over {past.steps} steps groups.resample tried {past.mean('resample/tried'):.0f} more prompts a step and "
        f"found {past.mean('resample/found'):.1f} whose siblings differ. Lower it, or look for better prompts with "
        "groups.focus, groups.rest or other data."
    ),
)
ALARMS = (
    *(UNFORMED, BROKEN, TOO_HARD, CONSTANT, ALL_SOLVED, TIED, TRUNCATED, HACKED, FALLEN, ENTROPY),
    *(LONGER, SHORTER, MISMATCH, UNLEARNED, TOO_EASY, DRIFTED, SKIPPED, UNSCORED, RESAMPLED),
)
"""In the order in which they are told."""
