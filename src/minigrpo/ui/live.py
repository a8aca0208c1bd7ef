"""Show a running training in a terminal: a panel that redraws itself, or plain lines where nobody watches."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from minigrpo.types import Group
from minigrpo.ui.group_lines import group_lines
from minigrpo.ui.heartbeat import Heartbeat
from minigrpo.ui.plain_text import printable

WINDOW = 20  # steps from which the remaining time is estimated: completions grow shorter or longer as a run goes on
BLOCKS = " ▁▂▃▄▅▆▇█"
PLOT_HEIGHT = 6
SAMPLE_LINES = 8
EXTRAS = {"kl": "kl {:.4f}", "entropy": "entropy {:.2f}", "tokens_per_second": "{:,.0f} tokens/s"}

LOGGED = {
    "accuracy": "solved {:.0%}",
    "format": "formed {:.0%}",
    "informative_groups": "informative {:.0%}",
    "completions/mean_length": "length {:.0f}",
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a run after a step. `stamps`: when the latest steps ended, oldest first. `group`: a line of
    groups.jsonl, of this step or of one a little earlier."""

    step: int = 0
    rewards: tuple[float, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    sample: str | None = None
    group: Mapping[str, Any] | None = None
    since: float = 0.0
    stamps: tuple[float, ...] = ()

    def after(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group], sample: str | None) -> Snapshot:
        """Return the snapshot after one more step."""
        earned = [reward for group in groups for reward in group.rewards]
        reward = metrics.get("reward", sum(earned) / len(earned) if earned else float("nan"))
        return replace(
            self,
            step=step,
            rewards=(*self.rewards, float(reward)),
            metrics=metrics,
            groups=tuple(groups),
            sample=printable(sample) if sample else None,
            stamps=(*(self.stamps or (self.since,)), time.monotonic())[-WINDOW - 1 :],
        )

    def time_left(self, total_steps: int) -> str:
        """Return the remaining time, estimated from the latest steps; "" before the first one has ended."""
        if len(self.stamps) < 2 or self.step >= total_steps:
            return ""
        pace = (self.stamps[-1] - self.stamps[0]) / (len(self.stamps) - 1)
        return f"{duration(pace * (total_steps - self.step))} left"

    def facts(self) -> list[str]:
        """Return the step in a few words. Shares are of completions, `informative` is of groups.

        Without its groups, as another process sees it, what the figures say.
        """
        facts = [f"reward {self.rewards[-1]:.3f}"] if self.rewards else []
        if not self.groups:
            facts += [words.format(self.metrics[name]) for name, words in LOGGED.items() if name in self.metrics]
            cut = self.metrics.get("completions/clipped_ratio", 0.0)
            facts += [f"cut off {cut:.0%}"] if cut else []
        grades = [grade for group in self.groups for grade in group.grades]
        if grades:
            facts.append(f"solved {sum(grade.solved for grade in grades) / len(grades):.0%}")
            facts.append(f"formed {sum(grade.formed for grade in grades) / len(grades):.0%}")
            tied = self.metrics.get("frac_reward_zero_std", sum(g.spread == 0 for g in self.groups) / len(self.groups))
            facts.append(f"informative {round((1 - tied) * len(self.groups))}/{len(self.groups)}")
            lengths = [len(completion.token_ids) for group in self.groups for completion in group.completions]
            facts.append(f"length {sum(lengths) / len(lengths):.0f}")
            ends = [completion.finish for group in self.groups for completion in group.completions]
            facts += [f"cut off {ends.count('length') / len(ends):.0%}"] if "length" in ends else []
        return facts + [EXTRAS[name].format(self.metrics[name]) for name in EXTRAS if name in self.metrics]


class ProgressView(Protocol):
    def open(self, snapshot: Snapshot) -> None: ...
    def show(self, snapshot: Snapshot) -> None: ...
    def set_activity(self, words: str) -> None: ...
    def close(self) -> None: ...


class PlainLog:
    """Prints a line per step, at most every two seconds, to keep logs short; always the first and last step.

    While a step lasts, it prints from time to time what is being done.
    """

    def __init__(self, console: Console, total_steps: int, every: float = 2.0) -> None:
        self._console = console
        self._total = total_steps
        self._every = every
        self._last: float | None = None
        self._step, self._activity = 0, ""
        self._began = time.monotonic()
        self._heartbeat = Heartbeat(self._show_activity)

    def open(self, snapshot: Snapshot) -> None:
        self._step, self._began = snapshot.step, time.monotonic()
        self._heartbeat.__enter__()

    def set_activity(self, words: str) -> None:
        self._activity = words

    def _show_activity(self) -> None:
        words = ", ".join(filter(None, (self._activity, f"{duration(time.monotonic() - self._began)} so far")))
        self._say(f"step {self._step + 1}/{self._total}: {words}")

    def show(self, snapshot: Snapshot) -> None:
        now = time.monotonic()
        self._step, self._began = snapshot.step, now
        if self._last is not None and now - self._last < self._every and snapshot.step < self._total:
            return
        self._last = now
        head = f"step {snapshot.step:>{len(str(self._total))}}/{self._total}"
        words = "  ".join(filter(None, (head, *snapshot.facts(), snapshot.time_left(self._total))))
        self._say(words)
        for line in (snapshot.sample or "").splitlines():
            self._say(f"    | {line}")

    def close(self) -> None:
        self._heartbeat.__exit__(None, None, None)

    def _say(self, words: str) -> None:
        self._console.print(words, highlight=False, markup=False, soft_wrap=True)
        self._heartbeat.touch()


class LivePanel:
    """Shows a panel that redraws itself: progress, the reward curve, the latest step, one group."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total = total_steps
        self._snapshot = Snapshot()
        self._live: Live | None = None
        self._activity = ""

    def open(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2)
        self._live.start(refresh=True)

    def show(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def set_activity(self, words: str) -> None:
        self._activity = words

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> RenderableType:
        snapshot = self._snapshot
        width = min(self._console.width, 100)
        parts: list[RenderableType] = [reward_curve(snapshot.rewards, width - 14)] if snapshot.rewards else []
        # A fact stays whole where the line breaks: its own spaces are hidden from the wrapping.
        facts = textwrap.wrap("   ".join(fact.replace(" ", "\a") for fact in snapshot.facts()), width - 4)
        if facts:
            parts.append(Text("\n".join(facts).replace("\a", " "), style="bold"))
        parts.append(Text(self._activity or "sampling the first completions ...", style="dim"))
        if snapshot.sample:
            shown = snapshot.sample.splitlines()
            more = [f"... {len(shown) - SAMPLE_LINES} more lines"] if len(shown) > SAMPLE_LINES else []
            lines = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in shown[:SAMPLE_LINES] + more]
            parts += [Text(""), *lines]
        if snapshot.group:
            parts += [Text(""), *group_lines(snapshot.group, width - 4)]
        gone = duration(time.monotonic() - snapshot.since)
        head = " · ".join(
            filter(None, (f"train · step {snapshot.step}/{self._total}", gone, snapshot.time_left(self._total)))
        )
        return Panel(Stack(*parts), title=head, title_align="left", border_style="cyan", width=width)


def panel_fits(console: Console) -> bool:
    """Return whether the output is a terminal that can redraw a panel."""
    return (
        console.is_terminal
        and not console.is_dumb_terminal
        and console.width >= 40
        and "utf" in (console.encoding or "").lower()
    )


def reward_curve(values: Sequence[float], width: int) -> Text:
    """Draw the whole run as columns of blocks, each the mean of some steps, with the scale at the left."""
    finite = [value for value in values if value == value]
    if not finite:
        return Text("no reward yet")
    columns = column_means(finite, width)
    low, high = min(0.0, *columns), max(columns)
    high = high if high > low else low + 1
    eighths = [round((value - low) / (high - low) * PLOT_HEIGHT * 8) for value in columns]
    lines = []
    for row in reversed(range(PLOT_HEIGHT)):
        mark = {PLOT_HEIGHT - 1: f"{high:.2f}", 0: f"{low:.2f}"}.get(row, "")
        bars = "".join(BLOCKS[min(8, max(0, height - 8 * row))] for height in eighths)
        lines.append(Text.assemble((f"{mark:>7} ", "dim"), (bars, "green")))
    return Text("\n").join(lines)


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw one line of blocks, from the lowest column to the highest."""
    columns = column_means(values, width)
    low, high = min(columns), max(columns)
    scale = (len(BLOCKS) - 2) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[1 + round((value - low) * scale)] for value in columns)


def column_means(values: Sequence[float], width: int) -> list[float]:
    """Average the values in at most `width` columns, in order."""
    count = max(1, min(len(values), width))
    edges = [i * len(values) // count for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def time_left(done: int, total: int, seconds: float) -> str:
    """Return the remaining time of work of which `done` of `total` took so many seconds: "1m20s left".

    "" where nothing is left, and before a hundredth is done: the first piece often waits for what all pieces need, and
    what is told from it alone is hours where it is minutes.
    """
    return f"{duration(seconds / done * (total - done))} left" if total / 100 <= done < total and done else ""


def duration(seconds: float) -> str:
    """Format seconds: 8s, 1m20s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
