"""What stands between a run and its loss: the way back to its newest checkpoint, its log, its alarms, its saves.

Whatever is judged here is judged from the logged figures alone, so a resumed run, which reads them back, judges as the
uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from minigrpo.algorithms.entropy import EntropyBonus
from minigrpo.algorithms.packing import Batch
from minigrpo.config.schema import Recipe
from minigrpo.errors import DivergenceError
from minigrpo.models.policy import Policy
from minigrpo.runs.logger import RunLogger, read_metrics
from minigrpo.training import checkpoint
from minigrpo.training.group_source import GroupSource, StepGroups
from minigrpo.training.memory.machine import free_memory, tokens_per_pass
from minigrpo.training.monitor.alarms import Alarms
from minigrpo.training.monitor.divergence import DivergenceMonitor, message
from minigrpo.training.oom import left_by_a_kill, noted
from minigrpo.utils.process import compute_repeatably

PATIENCE = 5
"""Steps in a row whose gradient is not finite before the run stops."""


class Supervisor:
    """Belongs to one run of the training loop; `bonus` is the entropy bonus as it stands after the last step."""

    def __init__(
        self, recipe: Recipe, track: RunLogger, policy: Policy, optimizer: torch.optim.Optimizer, source: GroupSource
    ) -> None:
        self.recipe, self.track, self.run = recipe, track, track.run
        self.policy, self.optimizer, self.source = policy, optimizer, source
        self.bonus = EntropyBonus.of(recipe.objective)
        self.alarms = Alarms(recipe, sixteen_bit=policy.dtype != torch.float32)
        self.watch = DivergenceMonitor(recipe.watch)
        self.failures = 0
        self.budget = 0
        self.best: tuple[float, float, int] | None = None

    def restore(self, prompt: int, rows: int) -> int:
        """The first step to do; sets `budget`. Makes arithmetic repeatable; takes up the newest whole checkpoint.

        `prompt`: tokens of the longest prompt, for the plan. `rows`: that the engine decodes side by side.
        """
        if self.policy.device.type == "cpu":
            compute_repeatably()
        self._settle_machine(prompt, rows)
        found, complaints = checkpoint.latest(self.run)
        for complaint in complaints:
            self.track.say(complaint)
        self.track.rewind(found.positions if found else {})
        if not self.policy.shares_prompts:
            kind = self.policy.model.config.model_type
            self.track.say(f"{kind} may mix tokens outside attention: trained on one padded row per completion.")
        if found is None:
            # Whatever would keep a later checkpoint from being written is found now, not after an hour.
            self._save(0)
            return 0
        if complaints:
            checkpoint.discard_after(self.run, found.step, "damaged")
        checkpoint.load(found, self.policy, self.optimizer)
        self.source.restore(found.state["source"])
        self.policy.loss_scale = self.policy.loss_scale.restored(found.state.get("loss_scale", {}))
        for metrics in read_metrics(self.run, strict=True):
            self._learn(int(metrics["step"]), metrics)
        self.track.say(f"Resumed after step {found.step} of {self.recipe.train.steps}.")
        return found.step

    def shrink(self, budget: int) -> None:
        """Memory ran out: from here on, and after a resume, passes are of at most so many tokens."""
        if budget < self.budget:
            self.track.say(f"Memory ran out in a pass of {self.budget} tokens: going on with {budget}. Same gradient.")
            self._set_budget(budget)

    def updating(self, rises: int, step: int) -> AbstractContextManager[None]:
        """Around an update that takes `rises` bytes: what a kill for memory leaves behind, while that is likely."""
        free = free_memory(self.policy.device)
        return noted(self.run, rises, free, {"step": step, "tokens_per_pass": self.budget})

    def record(self, step: int, metrics: Mapping[str, float], gathered: StepGroups, batch: Batch) -> None:
        """Log step number `step`, and say what is alarming about it."""
        unused = [[0.0] * len(group.grades) for group in gathered.others]
        advantages = [*batch.advantages_PG.tolist(), *unused]
        self.track.record(step, metrics, [*batch.groups, *gathered.others], advantages)
        for sentence in self._learn(step, metrics):
            self.track.say(sentence)

    def settle(self, step: int, *, last: bool) -> None:
        """Save when it is time; stop, with a DivergenceError, when to go on no longer makes sense."""
        due = step % self.recipe.save.every == 0 or self.best_step == step
        # What looks like an explosion is not kept: the newest checkpoint stays one to go back to.
        if last or (due and not self.watch.suspicious):
            self._save(step)
        self._stop_if_broken(step)

    def finish(self) -> None:
        """The policy as it is to be delivered: as it ended, or as it was when it did best on held-out prompts."""
        if self.recipe.save.take == "best" and self.best_step is not None:
            checkpoint.load(checkpoint.at(self.run, self.best_step), self.policy, self.optimizer)
            self.track.say(f"Taken: the weights of step {self.best_step}, which did best on held-out prompts.")

    @property
    def best_step(self) -> int | None:
        return self.best[2] if self.best else None

    def _learn(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Take the figures of a step to heart: the same from a log as from a step just done."""
        self.bonus = self.bonus.after(metrics.get("entropy"))
        self.failures = self.failures + 1 if metrics.get("skipped") else 0
        self.explosion = self.watch.after(step, metrics)
        # What looks like an explosion is not saved, so it cannot be the best that is kept either.
        if metrics.get("eval/accuracy") is not None and not self.watch.suspicious:
            judged = (metrics["eval/accuracy"], metrics.get("eval/reward") or 0.0, step)
            self.best = max(self.best, judged) if self.best else judged
        return self.alarms.after(step, metrics)

    def _save(self, step: int) -> None:
        state = {"source": self.source.state(), "loss_scale": self.policy.loss_scale.state()}
        checkpoint.save(self.run, step, self.policy, self.optimizer, self.track.positions(), state=state)
        spare = frozenset() if self.best_step is None else frozenset({self.best_step})
        checkpoint.prune(self.run, self.recipe.save.keep, spare)

    def _stop_if_broken(self, step: int) -> None:
        if self.failures >= PATIENCE:
            raise DivergenceError(
                f"The gradient was not finite in {self.failures} steps in a row; the weights are those before them. "
                f"Their prompts and answers stand in {self.run.groups}. A lower --train.lr is the usual cure."
            )
        if self.explosion is not None:
            good = checkpoint.before(self.run, self.explosion.onset)
            checkpoint.discard_after(self.run, good or 0)
            raise DivergenceError(message(self.explosion, good, self.recipe, self.run.path))

    def _settle_machine(self, prompt: int, rows: int) -> None:
        """Tokens per pass, threads: those that the run began with; says where the machine is another."""
        then = checkpoint.read_machine(self.run)
        threads = then.threads if then else self.recipe.train.threads
        if threads:
            torch.set_num_threads(threads)
        planned = tokens_per_pass(self.policy, self.recipe, prompt)
        self.budget = then.tokens_per_pass if then else planned
        now = checkpoint.this_machine(self.budget, rows, self.policy.device, self.policy.dtype)
        if then is None:
            checkpoint.write_machine(self.run, now)
        elif different := now.differences(then):
            self.track.say(f"Not the machine that began this run ({'; '.join(different)}): the last bits will differ.")
        note = left_by_a_kill(self.run)
        if note is not None and self.budget > 1:
            self.track.say(
                f"This run was killed in an update while memory was tight ({note.get('free', 0) / 1e9:.1f} GB free): "
                f"going on with passes of {self.budget // 2} tokens instead of {self.budget}. Same gradient."
            )
            self._set_budget(self.budget // 2)

    def _set_budget(self, budget: int) -> None:
        self.budget = budget
        then = checkpoint.read_machine(self.run)
        assert then is not None, "the machine is written before the first step"
        checkpoint.write_machine(self.run, replace(then, tokens_per_pass=budget))
