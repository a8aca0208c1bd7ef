"""What surrounds the algorithm of a run: its rollouts, its log, its checkpoints, its alarms, its memory.

Whatever is judged here is judged from the logged figures alone, so a resumed run, which reads them back, judges as the
uninterrupted one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch

from minigrpo.algorithms.entropy import EntropyBonus
from minigrpo.algorithms.length_penalty import with_overlong_penalty
from minigrpo.algorithms.objective import Objective
from minigrpo.algorithms.packing import Batch, pack
from minigrpo.config.schema import Recipe
from minigrpo.distributed.ranks import ALONE, Ranks
from minigrpo.errors import ArtifactError, DivergenceError, SharedPassError, more_at
from minigrpo.models.chat_template import clock_warning, render
from minigrpo.models.context_window import check_prompts, longest_prompt
from minigrpo.models.policy import Policy
from minigrpo.rollouts.async_grader import Grader
from minigrpo.rollouts.engines.registry import release_caches
from minigrpo.rollouts.groups import prompts_of, rollout
from minigrpo.rollouts.serialize import group_data, group_of
from minigrpo.runs.chain import rewind_chain
from minigrpo.runs.logger import Event, RankLog, RunLogger, last_logged_step, read_metrics
from minigrpo.training import checkpoint
from minigrpo.training.ahead import RolloutAhead, refuse_ahead
from minigrpo.training.group_factor import check_factors
from minigrpo.training.group_source import GroupSource, StepGroups
from minigrpo.training.memory.machine import tokens_per_pass
from minigrpo.training.metrics import Clock, held_out_metrics, step_metrics
from minigrpo.training.monitor.alarms import Alarms
from minigrpo.training.monitor.divergence import DivergenceMonitor, message
from minigrpo.training.oom import crash_note, killed_for_memory, pop_crash_note, try_largest_pass
from minigrpo.training.origin import hash_prompts, record_origin
from minigrpo.training.prompt_sampler import PromptSampler, split_held_out
from minigrpo.types import Engine, Group, Prompt, Sampling, Task
from minigrpo.ui.live import time_left
from minigrpo.ui.progress import Report
from minigrpo.utils.memory import free_before_kill
from minigrpo.utils.process import compute_repeatably
from minigrpo.utils.rng import name_key
from minigrpo.utils.signals import finish_first

MOST_SKIPPED = 5
"""Steps in a row whose gradient is not finite before the run stops."""


class Supervisor:
    """One run of the training loop, as a context manager.

    `tokens_per_pass`: of the next update; it falls where memory runs out. `entropy_weight`: of the entropy bonus.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        policy: Policy,
        engine: Engine,
        *,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        logger: RunLogger | RankLog,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.task, self.policy, self.engine = recipe, task, policy, engine
        self.optimizer, self.objective = optimizer, objective
        self.logger, self.run, self.ranks = logger, logger.run, ranks
        prompts = prompts_of(task, "train")
        self._data = hash_prompts(prompts)
        training, self.held_out = split_held_out(prompts, recipe.eval, recipe.seed)
        check_factors(recipe.groups.factor, training)
        check_prompts([*training, *self.held_out], policy.tokenizer, recipe.rollout.max_tokens, policy.model)
        sampler = PromptSampler(training, recipe.seed, recipe.groups)
        self.source = GroupSource(sampler, recipe.rollout.prompts, recipe.groups)
        refuse_ahead(recipe, engine, ranks)
        self.ahead = RolloutAhead()
        self.bonus = EntropyBonus.of(recipe.objective)
        self._sampling_since = time.monotonic()
        self.alarms = Alarms(recipe, sixteen_bit=policy.is_sixteen_bit)
        self.monitor = DivergenceMonitor(recipe.watch)
        self.skipped_in_a_row = 0
        self.tokens_per_pass = 0
        self.best: tuple[float, float, int] | None = None
        self._start = self._done = 0
        self._prompt = ""
        self._update_bytes = 0
        self._stopped = False
        self._killed_in: tuple[int, ...] = ()
        self._clock = Clock(policy.device.type)
        self._open = ExitStack()

    def __enter__(self) -> Supervisor:
        """Take up the newest checkpoint, try the largest pass, give the engine the weights, open log and grader."""
        prompt_tokens = longest_prompt(self.source.sampler.prompts, self.policy.tokenizer)
        release_caches(self.engine)
        self._start = self._done = self.restore(prompt_tokens, getattr(self.engine, "rows", 0))
        with self._shorter_after_oom():
            self._update_bytes, tokens = try_largest_pass(
                self.policy,
                self.objective,
                self.recipe,
                run=self.run if self.ranks.leads else None,
                prompt_tokens=prompt_tokens,
                tokens_per_pass=self.tokens_per_pass,
                killed_in=self._killed_in,
                ranks=self.ranks,
            )
        self._keep_smaller_passes(min(self.ranks.gather("figures", tokens)))
        self.engine.update(self.policy)
        with ExitStack() as stack:
            stack.enter_context(self.logger)
            say = self.logger.say if self.ranks.leads else _say_nothing  # all see the same groups, and one tells
            self._grader = stack.enter_context(Grader.of(self.task, self.recipe.task, say))
            stack.callback(self.ahead.abandon)
            self._interrupted = stack.enter_context(finish_first())
            if self._start < self.recipe.train.steps:
                self.logger.note("resumed" if self._start else "began", self._start)
                stack.push(self._note_end)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self._open.__exit__(kind, fault, at)
        if fault is not None or self._stopped:
            return
        if self.policy.is_sharded:
            self._take_best()
            self.policy.unite(self.ranks)
        elif self.ranks.leads:
            self._take_best()
            self.engine.update(self.policy)

    def _note_end(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        event: Event = "failed" if fault else "stopped" if self._stopped else "ended"
        with suppress(ArtifactError):  # what ended the training matters more than that this could not be noted
            self.logger.note(event, self._done, str(fault or ""))

    def steps(self) -> Iterator[int]:
        """Yield the steps that are still to be done; no further one once somebody asked to stop."""
        for step in range(self._start, self.recipe.train.last_step):
            self._clock = Clock(self.policy.device.type)
            yield step
            if self._stopped:
                return

    @property
    def entropy_weight(self) -> float:
        return self.bonus.weight

    def sample_groups(self, step: int) -> StepGroups:
        """Roll out and grade the groups of a step; those that teach nothing are replaced where the recipe says so.

        With rollout.ahead those of the next step are begun, until `update_phase` ends: the engine has the weights of
        before the update.
        """
        self.ranks.at(f"in the rollout of step {step + 1}")
        sampled = self.ahead.take(step) or self._gather(step, self._report_sampling)
        # Beyond train.until, too: a checkpoint is the same wherever its run ends.
        if self.recipe.rollout.ahead and step + 1 < self.recipe.train.steps:
            self.ahead.start(step + 1, partial(self._gather, step + 1, self._report_ahead))
        self._clock.lap("rollout")
        return sampled

    def _gather(self, step: int, report: Report) -> StepGroups:
        config = self.recipe.rollout
        # Every step has a random stream of its own, so a resumed run needs none restored.
        other = [config.stream] if config.stream else []
        sampling = Sampling(config.temperature, config.max_tokens, name_key(self.recipe.seed, "rollout", step, *other))
        ask = partial(self._rollout, n=config.completions, sampling=sampling, report=report)
        return self.source.gather(step, ask, is_informative=self._is_informative)

    def _rollout(
        self, prompts: Sequence[Prompt], *, n: int, sampling: Sampling, report: Report | None = None
    ) -> list[Group]:
        rows = getattr(self.engine, "rows", 0)
        own = self.ranks.own(prompts, cost=lambda prompt: self._most_tokens(prompt, n, sampling.max_tokens))
        groups = rollout(
            self.engine,
            self.task,
            own,
            n=n,
            sampling=sampling,
            tokenizer=self.policy.tokenizer,
            grader=self._grader,
            report=report or self._report_sampling,
            complete=partial(self._of_all_ranks, prompts),
        )
        if (fewer := getattr(self.engine, "rows", 0)) < rows:
            self._keep_fewer_rows(fewer)
        return with_overlong_penalty(groups, self.recipe.objective.overlong, self.recipe.rollout.max_tokens)

    def _most_tokens(self, prompt: Prompt, n: int, longest: int) -> int:
        """Return the tokens that a group may come to, by which groups are dealt to ranks."""
        return len(render(self.policy.tokenizer, prompt).ids) + n * longest

    def _of_all_ranks(self, prompts: Sequence[Prompt], own: list[Group]) -> list[Group]:
        """Return the groups of all prompts, in their order: from here on every rank knows the whole batch."""
        if self.ranks.size == 1:
            return own
        known = {prompt.id: prompt for prompt in prompts}
        shares = self.ranks.gather("groups", [group_data(group) for group in own])
        groups = {row["prompt"]: group_of(row, known) for share in shares for row in share}
        return [groups[prompt.id] for prompt in prompts]

    def _report_sampling(self, done: int, total: int = 0, note: str = "") -> None:
        if not done:
            self._sampling_since = time.monotonic()
        left = time_left(done, total, time.monotonic() - self._sampling_since)
        said = ", ".join(filter(None, (f"{done} of {total} completions ended", note, left)))
        self.logger.set_activity(f"sampling: {said}")

    def _report_ahead(self, done: int, total: int = 0, note: str = "") -> None:
        self.ahead.check()

    def _is_informative(self, group: Group) -> bool:
        """Tell whether the group's siblings differ in what the objective compares."""
        return pack([group], self.objective, self.recipe.rollout.max_tokens).is_informative

    @contextmanager
    def update_phase(self, step: int) -> Iterator[None]:
        """Surround an update: time it, and leave a note of it in the run's folder where memory is tight."""
        self.logger.set_activity("updating the policy")
        self.ranks.at(f"in the update of step {step + 1}")
        what = {"step": step, "tokens_per_pass": self.tokens_per_pass, "earlier": list(self._killed_in)}
        noted = self.run if self.ranks.leads else None
        free = free_before_kill(self.policy.device)
        with crash_note(noted, self._update_bytes, free, what), self._shorter_after_oom():
            yield
        self._clock.lap("update")
        self.ahead.wait()  # the engine is given new weights next
        if self.recipe.rollout.ahead:
            self._clock.lap("wait")

    def finish_step(
        self, step: int, sampled: StepGroups, batch: Batch, figures: Mapping[str, float], *, tokens_per_pass: int
    ) -> None:
        """Log the step, evaluate and save when it is time. Raises DivergenceError where going on makes no sense."""
        self._clock.lap("sync")
        self.logger.set_activity("logging and saving")
        self._keep_smaller_passes(min(self.ranks.gather("figures", tokens_per_pass)))
        metrics = step_metrics(sampled, batch, figures)
        if self.recipe.eval.every and (step + 1) % self.recipe.eval.every == 0:
            self.ranks.at(f"in the evaluation after step {step + 1}")
            greedy = Sampling(0.0, self.recipe.rollout.max_tokens)
            metrics |= held_out_metrics(self._rollout(self.held_out, n=1, sampling=greedy))
            self._clock.lap("eval")
        metrics |= self._clock.metrics(sampled.sampled) | self.ranks.take_sent()
        self.ranks.at(f"saving after step {step + 1}")
        self._record(step + 1, metrics, sampled, batch)
        self._stopped = self.ranks.any(self._interrupted())
        self._done = step + 1
        self._settle(step + 1, last=self._stopped or step + 1 == self.recipe.train.last_step)

    def restore(self, prompt: int, rows: int) -> int:
        """Take up the newest whole checkpoint, if any; set `tokens_per_pass`; make arithmetic repeatable.

        Returns the first step to do.

        `prompt`: tokens of the longest prompt, for the plan. `rows`: that the engine decodes side by side.
        """
        if self.policy.device.type == "cpu":
            compute_repeatably()
        found = self._restore_folder(prompt, rows) if self.ranks.leads else None
        first, tokens = self.ranks.gather("figures", [found, self.tokens_per_pass])[0]
        if not self.ranks.leads:
            tokens_per_pass(self.policy, self.recipe, prompt)  # it may turn on recomputed activations
            self.tokens_per_pass = tokens
        if first is None:
            # Whatever would keep a later checkpoint from being written is found now, not after an hour.
            self._save(0)
            self.ranks.gather("figures", "saved")
        if not self.ranks.leads:
            self._take_up(checkpoint.find_step(self.run, first or 0))
        return first or 0

    def _restore_folder(self, prompt: int, rows: int) -> int | None:
        """Bring the run's folder to its newest whole checkpoint, and take that up; return its step, if there is one."""
        machine = self._settle_machine(prompt, rows)
        newest, complaints = checkpoint.find_latest(self.run)
        for complaint in complaints:
            self.logger.say(complaint)
        logged = last_logged_step(self.run)
        self.logger.rewind(newest.positions if newest else {})
        rewind_chain(self.run, newest.step if newest else None)
        record_origin(self.run, self.recipe, self._data, machine, after=newest.step if newest else 0)
        if not self.policy.shares_prompts:
            kind = self.policy.model.config.model_type
            self.logger.say(f"{kind} may mix tokens outside attention: trained on one padded row per completion.")
        self._compare_prompt(newest)
        if newest is None:
            return None
        if complaints:
            checkpoint.discard_after(self.run, newest.step, "damaged")
        self._take_up(newest)
        again = "" if logged <= newest.step else f" What came after it, up to step {logged}, is done again."
        self.logger.say(f"Resumed after step {newest.step} of {self.recipe.train.last_step}.{again}")
        return newest.step

    def _take_up(self, saved: checkpoint.Checkpoint) -> None:
        checkpoint.load(saved, self.policy, self.optimizer)
        self.source.restore(saved.state["source"])
        known = {prompt.id: prompt for prompt in self.source.sampler.prompts}
        self.ahead.restore(saved.state.get("ahead"), known)
        self.policy.loss_scale = self.policy.loss_scale.restored(saved.state.get("loss_scale", {}))
        for metrics in read_metrics(self.run, strict=True):
            self._learn(int(metrics["step"]), metrics)

    def _compare_prompt(self, newest: checkpoint.Checkpoint | None) -> None:
        """Say where a prompt is other tokens than when the run began, or, when it begins, that it will be."""
        prompt, tokenizer = self.source.sampler.prompts[0], self.policy.tokenizer
        clock, now = clock_warning(tokenizer, prompt.messages), _hash(render(tokenizer, prompt).ids)
        self._prompt = newest.state.get("prompt", now) if newest else now
        if newest is None and clock:
            self.logger.say(clock)
        if self._prompt != now:
            why = "its chat template writes the date into it" if clock else "template, tokenizer or task have changed"
            self.logger.say(
                f"Prompt {prompt.id} is other tokens than when this run began: {why}. The run goes on with the new "
                "ones, so it will not end as one that was never stopped."
            )

    @contextmanager
    def _shorter_after_oom(self) -> Iterator[None]:
        """Where memory runs out in a pass that all ranks share, halve the passes of the attempt that follows."""
        try:
            yield
        except SharedPassError:
            machine = checkpoint.read_machine(self.run)
            if machine is not None:
                checkpoint.write_machine(self.run, replace(machine, tokens_per_pass=max(1, self.tokens_per_pass // 2)))
            raise

    def _keep_smaller_passes(self, tokens: int) -> None:
        """Where memory ran out, cut passes to so many tokens from now on, and after a resume."""
        if tokens < self.tokens_per_pass:
            if self.ranks.leads:
                told = (
                    f"Memory ran out in a pass of {self.tokens_per_pass} tokens: going on with {tokens}. Same gradient."
                )
                self.logger.say(f"{told} {more_at('memory-ran-out')}")
            self._set_tokens_per_pass(tokens)

    def _keep_fewer_rows(self, rows: int) -> None:
        """Where memory ran out in a rollout, decode as few rows side by side after a resume, too."""
        told = f"Memory ran out in a rollout: going on with {rows} rows side by side. Same draws."
        self.logger.say(f"{told} {more_at('memory-ran-out')}")
        self._write_machine(rows=rows)

    def _record(self, step: int, metrics: Mapping[str, float], sampled: StepGroups, batch: Batch) -> None:
        """Log step number `step`, and print its alarms."""
        unused = [[0.0] * len(group.grades) for group in sampled.others]
        advantages = [*batch.advantages_PG.tolist(), *unused]
        self.logger.record(step, metrics, [*batch.groups, *sampled.others], advantages)
        for sentence in self._learn(step, metrics):
            if self.ranks.leads:
                self.logger.say(sentence)

    def _settle(self, step: int, *, last: bool) -> None:
        """Save when it is due. Raises DivergenceError where the run has broken."""
        due = step % self.recipe.save.every == 0 or self.best_step == step
        # What looks like an explosion is not kept: the newest checkpoint stays one to go back to.
        if last or (due and not self.monitor.suspicious):
            self.ranks.check_equal(self.policy.replicated, f"after step {step}")
            self._save(step)
        self._stop_if_broken(step)

    def _take_best(self) -> None:
        """Load the checkpoint that did best on held-out prompts, where the recipe asks for it."""
        if self.recipe.save.take == "best" and self.best_step is not None:
            if self.policy.is_sharded:
                self.ranks.gather("figures", "saved")  # all read what the leading rank may still be writing
            checkpoint.load(checkpoint.find_step(self.run, self.best_step), self.policy, self.optimizer)
            if self.ranks.leads:
                self.logger.say(f"Taken: the weights of step {self.best_step}, which did best on held-out prompts.")

    @property
    def best_step(self) -> int | None:
        return self.best[2] if self.best else None

    def _learn(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Update bonus, alarms and best step from the figures of a step, just done or read from the log."""
        self.bonus = self.bonus.after(metrics.get("entropy"))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics.get("skipped") else 0
        self.explosion = self.monitor.after(step, metrics)
        # What looks like an explosion is not saved, so it cannot be the best that is kept either.
        if metrics.get("eval/accuracy") is not None and not self.monitor.suspicious:
            judged = (metrics["eval/accuracy"], metrics.get("eval/reward") or 0.0, step)
            self.best = max(self.best, judged) if self.best else judged
        return self.alarms.after(step, metrics)

    def _save(self, step: int) -> None:
        """Save a checkpoint: the leading rank does, and where the model is sharded each rank adds its slices."""
        policy = {"loss_scale": self.policy.loss_scale.state(), "prompt": self._prompt}
        ahead = self.ahead.state()
        state = {"source": self.source.state(), **policy, **({"ahead": ahead} if ahead else {})}
        if not self.ranks.leads:
            checkpoint.add_shards(self.policy, self.optimizer, self.ranks)
            return
        checkpoint.save(
            self.run, step, self.policy, self.optimizer, self.logger.positions(), state=state, ranks=self.ranks
        )
        spare = frozenset() if self.best_step is None else frozenset({self.best_step})
        checkpoint.prune(self.run, self.recipe.save.keep, spare)

    def _stop_if_broken(self, step: int) -> None:
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise DivergenceError(
                f"The gradient was not finite in {self.skipped_in_a_row} steps in a row; the weights are those before "
                f"them. Their prompts and answers stand in {self.run.groups}. A lower --train.lr is the usual cure."
            )
        if self.explosion is not None:
            good = checkpoint.newest_before(self.run, self.explosion.onset)
            if self.ranks.leads:
                checkpoint.discard_after(self.run, good or 0)
            raise DivergenceError(message(self.explosion, good, self.recipe.train.lr, self.run.path))

    def _settle_machine(self, prompt: int, rows: int) -> checkpoint.Machine:
        """Set tokens per pass and threads to those that the run began with; say where the machine differs.

        Return the machine as it is now.
        """
        then = checkpoint.read_machine(self.run)
        threads = then.threads if then and then.ranks == self.ranks.size else self.recipe.train.threads
        if threads:
            torch.set_num_threads(threads)
        planned = tokens_per_pass(self.policy, self.recipe, prompt)
        self.tokens_per_pass = then.tokens_per_pass if then else planned
        place = self.policy.device, self.policy.dtype
        now = checkpoint.this_machine(self.tokens_per_pass, rows, *place, ranks=self.ranks.size)
        if then is None:
            checkpoint.write_machine(self.run, now)
        elif different := now.differences(then):
            self.logger.say(f"Not the machine that began this run ({'; '.join(different)}): the last bits will differ.")
        note = pop_crash_note(self.run)
        if note is not None:
            self._go_on_after_kill(note)
        return replace(now, tokens_per_pass=self.tokens_per_pass)

    def _go_on_after_kill(self, note: Mapping[str, Any]) -> None:
        """Halve the passes where a kill in an update was for memory."""
        self._killed_in = (*note.get("earlier", ()), note.get("step", -1))
        killed = f"This run was killed in an update while memory was tight ({note.get('free', 0) / 1e9:.1f} GB free)"
        reason = killed_for_memory(note)
        if not reason:
            self.logger.say(f"{killed}. Nothing says that memory was the reason, so passes stay as long as they were.")
        elif self.tokens_per_pass > 1:
            self.logger.say(
                f"{killed}, and {reason}: going on with passes of {self.tokens_per_pass // 2} tokens instead of "
                f"{self.tokens_per_pass}. Same gradient."
            )
            self._set_tokens_per_pass(self.tokens_per_pass // 2)

    def _set_tokens_per_pass(self, tokens: int) -> None:
        self.tokens_per_pass = tokens
        self._write_machine(tokens_per_pass=tokens)

    def _write_machine(self, **changes: int) -> None:
        if not self.ranks.leads:
            return
        then = checkpoint.read_machine(self.run)
        assert then is not None, "the machine is written before the first step"
        checkpoint.write_machine(self.run, replace(then, **changes))  # type: ignore[arg-type]


def _say_nothing(text: str) -> None:
    pass


def _hash(ids: Sequence[int]) -> str:
    return hashlib.sha256(str(list(ids)).encode()).hexdigest()
