"""Detect diverged training. Judged from the logged figures alone, so a resumed run judges as the uninterrupted one.

Either of two signs is enough. A metric exceeds its usual value many times over: |loss|, the gradient's norm, KL or
entropy. Or the policy collapses: after having been better, groups no longer compare anything, and the answers have lost
their form, run into the limit, or changed their length threefold. The second is what a far too large learning rate
looks like: nothing is compared, so there is no gradient left that could be large.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigrpo.config.schema import WatchConfig
from minigrpo.errors import command_line
from minigrpo.runs.rundir import RunDir
from minigrpo.training.monitor.alarms import is_known

RECENT = 20
"""Healthy steps whose median is the usual value."""
FIRST_STEPS = 5
"""Steps from which a median can be taken; before that, the largest value so far stands in for it. The median of these
first steps stays a lower bound: a gradient that has become small because the task is solved may grow back."""
EARLY = 10
"""An explosion within this many steps means that the learning rate is far off."""


@dataclass(frozen=True, slots=True)
class WatchedFigure:
    """A figure that may leap. `floor`: what is usual anyway; `share` of watch.explosion is the factor allowed."""

    name: str
    words: str
    floor: float
    share: float = 1.0


FIGURES = (
    # Near 0 by construction, advantages being sums of about 1: a few tenths are not unusual with several updates.
    WatchedFigure("loss", "|loss|", floor=0.1),
    WatchedFigure("grad_norm", "the gradient's norm", floor=1e-6),
    # 0 in the first step, by definition; one nat a token is another model.
    WatchedFigure("kl", "the KL to the reference", floor=0.05),
    # Bounded by ln V, so a factor as large as the others' could never be reached.
    WatchedFigure("entropy", "the entropy", floor=0.4, share=0.25),
)
ANSWER_FIGURES = ("reward", "format", "completions/clipped_ratio", "completions/mean_length")


@dataclass(frozen=True, slots=True)
class Explosion:
    """`what` happened at `step`; `onset` is the step whose update did it, so checkpoints before it are good.

    `rate`: the learning rate of that update, where it is known.
    """

    step: int
    onset: int
    what: str
    rate: float | None = None


class DivergenceMonitor:
    """Fed with every step's metrics in order, from the first."""

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._healthy: dict[str, list[float]] = {}
        self._update: tuple[int, float | None] = (1, None)
        self._suspects: list[Explosion] = []

    @classmethod
    def replayed(cls, config: WatchConfig, rows: Iterable[Mapping[str, Any]]) -> DivergenceMonitor:
        """Return the monitor as it was after these lines of metrics.jsonl."""
        monitor = cls(config)
        for row in rows:
            monitor.after(int(row["step"]), row)
        return monitor

    @property
    def suspicious(self) -> bool:
        """Whether the newest step looks like an explosion: its weights should not become a checkpoint."""
        return bool(self._suspects)

    def after(self, step: int, metrics: Mapping[str, Any]) -> Explosion | None:
        """Return the explosion, once it has lasted watch.patience steps in a row.

        A skipped step changes nothing here.
        """
        now = {name: value for name, value in metrics.items() if is_known(value)}
        if not self._config.explosion or now.get("skipped"):
            return None
        what = self._leap(now) or self._collapse(now)
        if what is None:
            self._suspects = []
            self._remember(now)
        else:
            # Answers are sampled before the update of their step: what shows now was done by the update before.
            self._suspects.append(Explosion(step, self._update[0], what, self._update[1]))
        if now.get("grad_norm"):
            self._update = (step, now.get("learning_rate"))
        return self._suspects[0] if len(self._suspects) >= max(1, self._config.patience) else None

    def _leap(self, now: Mapping[str, float]) -> str | None:
        for figure in FIGURES:
            usual, value = self._usual(figure), abs(now.get(figure.name, 0.0))
            if usual is not None and value > self._config.explosion * figure.share * usual:
                return f"{figure.words} rose to {value:.3g}, {value / usual:.0f} times what is usual"
        return None

    def _usual(self, figure: WatchedFigure) -> float | None:
        values = self._healthy.get(figure.name, [])
        if not values:
            return None
        if len(values) < FIRST_STEPS:
            return max(figure.floor, *values)
        return max(figure.floor, statistics.median(values[:FIRST_STEPS]), statistics.median(values[-RECENT:]))

    def _collapse(self, now: Mapping[str, float]) -> str | None:
        then = {
            name: statistics.median(self._healthy[name][-RECENT:]) for name in ANSWER_FIGURES if name in self._healthy
        }
        if now.get("informative_groups", 1.0) > 0.1 or not then or not then.keys() <= now.keys():
            return None
        if "reward" not in then or now["reward"] >= then["reward"]:
            return None
        ruin = _describe_ruin(then, now)
        return ruin and f"the reward fell from {then['reward']:.3g} to {now['reward']:.3g}, and {ruin}"

    def _remember(self, now: Mapping[str, float]) -> None:
        # Where nothing is compared there is neither a gradient nor a proof of health.
        if now.get("informative_groups", 1.0) > 0:
            for name in (*(figure.name for figure in FIGURES), *ANSWER_FIGURES):
                if name in now:
                    self._healthy.setdefault(name, []).append(
                        abs(now[name]) if name not in ANSWER_FIGURES else now[name]
                    )


def _describe_ruin(then: Mapping[str, float], now: Mapping[str, float]) -> str | None:
    """Describe how the answers collapsed beyond a worse reward; None where they did not."""
    form, cut, length = ANSWER_FIGURES[1:]
    if then.get(form, 0.0) >= 0.2 and now[form] <= 0.1 * then[form]:
        return f"{now[form]:.0%} of the answers have the asked-for form, {then[form]:.0%} had"
    if cut in then and now[cut] >= then[cut] + 0.5:
        return f"{now[cut]:.0%} of the answers are cut off, {then[cut]:.0%} were"
    if length in then and not then[length] / 3 <= now[length] <= then[length] * 3:
        return f"answers have {now[length]:.0f} tokens, they had {then[length]:.0f}"
    return None


HIGHEST_RATE = 3e-3
"""The highest learning rate of the packaged recipes: of a tiny model's adapter. A test compares them."""


def propose_rate(lr: float, explosion: Explosion) -> float:
    """Propose a learning rate for a new run: one digit, a tenth of what exploded at once, a third of what did later.

    Warm-up counts: a run that exploded on its way up to the peak is measured by how far it had come. Never more than
    the highest rate of the packaged recipes.
    """
    rate = min(explosion.rate or lr, lr) / (10 if explosion.onset <= EARLY else 3)
    return float(f"{min(rate, HIGHEST_RATE):.0e}")


def message(explosion: Explosion, last_good_step: int | None, lr: float, run_path: Path) -> str:
    """Say what exploded and when, which weights are good, and the command for a run with a lower rate."""
    rate = f"{propose_rate(lr, explosion):g}"
    run = RunDir(run_path)
    kept = "No checkpoint is older than that."
    if last_good_step is not None:
        kept = f"The weights from before stand in {run.checkpoint(last_good_step)} (step {last_good_step})."
    again = command_line("minigrpo", "train", run.recipe, "--train.lr", rate, "--run", Path(f"{run_path}-lr{rate}"))
    return (
        f"Training exploded: at step {explosion.step} {explosion.what}, and so it went on. {kept} "
        f"Begin again with a lower learning rate, in another folder: {again}"
    )
