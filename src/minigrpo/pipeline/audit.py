"""Audit a run: hold it to its chain of hashes, and do randomly drawn steps and answers again.

Whoever rewrites every hash of a run is found only by doing things again, and then by chance: an audit raises the price
of fraud. It does not prove honesty: what is done again shows that these weights and answers follow from these, on this
code; not that nothing else was tried before, or that the data is what somebody calls it.
"""

from __future__ import annotations

import secrets
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, MinigrpoError, command_line
from minigrpo.pipeline.audit_answers import AnswerDraw, ask_again, check_scores, draw_answers, read_answers
from minigrpo.pipeline.audit_chain import Findings, check_chain, is_adopted, open_recipe
from minigrpo.pipeline.audit_models import check_models, merged_faults
from minigrpo.pipeline.context import located
from minigrpo.pipeline.evidence import Evidence, last_step, read_evidence, sound_starts
from minigrpo.pipeline.replay import Replayed, Stretch, cost_of, open_replay, replay_stretch, timed_stretch
from minigrpo.pipeline.stages import settings_of
from minigrpo.rollouts.groups import prompts_of
from minigrpo.runs.chain import audited_state
from minigrpo.runs.manifest import read_sealed, result_path, write_sealed
from minigrpo.runs.rundir import RunDir
from minigrpo.ui.progress import part_of, stage
from minigrpo.ui.screen import Screen
from minigrpo.versions import hash_code, this_version

if TYPE_CHECKING:
    from minigrpo.pipeline.context import OpenedRun

HARD = ("checkpoint", "log")
"""Kinds of differences that are of files alone: no other machine explains them."""
CAVEAT = "This raises the price of fraud; it does not prove honesty."


@dataclass(frozen=True, slots=True)
class Audited:
    """The result of an audit. `statement`: in a sentence or two; `faults`, `shown`, `unshown`: sentences. `stretches`:
    of steps that were done again; `answers`: asked again, by file. `seed`: of the draw. `machine`: that did it."""

    run: Path
    statement: str
    faults: tuple[str, ...]
    shown: tuple[str, ...]
    unshown: tuple[str, ...]
    stretches: tuple[Stretch, ...]
    answers: dict[str, tuple[str, ...]]
    seed: int
    machine: dict[str, Any]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"run": str(self.run), "ok": self.ok}


def audit(
    run: RunDir | Path,
    *,
    steps: int = 3,
    answers: int = 5,
    seed: int | None = None,
    base: str | None = None,
    models: Sequence[Path] = (),
    quiet: bool = False,
) -> Audited:
    """Check the chain; do `steps` steps again, with the stretch from the checkpoint before to what was saved next, and
    ask `answers` answers of evaluations again. Write audit.json into the run's folder.

    `seed` of the draw; None: a new one, which nobody knew before. `base`: where the base lies here, in place of what
    the recipe names. `models`: files and folders of models elsewhere, to be held to the run. Raises ArtifactError where
    there is no run.
    """
    run = run if isinstance(run, RunDir) else RunDir(run)
    began, seed = time.monotonic(), secrets.randbelow(2**32) if seed is None else seed
    recipe, found = open_recipe(run), Findings()
    here = located(recipe, run, base)
    evidence = read_evidence(run)
    with stage("audit: hashes", 0, Screen(stderr=True, quiet=quiet)):
        check_chain(run, recipe, evidence, found, here=here)
        merged = check_models(run, models, found)
        read = read_answers(run, found)
        check_scores(run, read, found)
    merged = [*([run.merged] if run.merged.is_dir() else []), *merged]
    again = _Again(run, recipe, evidence, found, Random(seed), quiet, here=here, base=base, merged=merged)
    if steps or answers:
        again.do(steps, answers, read)
    else:
        found.unshown.append("No step and no answer was done again: hashes alone do not show that they were computed.")
    result = Audited(
        run.path,
        _statement(found, again),
        tuple(found.faults),
        tuple(found.shown),
        tuple(found.unshown),
        tuple(each.stretch for each in again.replayed),
        {each.answered.name: (*each.drawn, *each.suspects) for each in again.draws},
        seed,
        again.machine,
        time.monotonic() - began,
    )
    write_sealed(run.audit, result.to_dict() | {"made": {"verb": "audit", "from": audited_state(run)}})
    return result


def machine_here(opened: OpenedRun | None = None) -> dict[str, Any]:
    """Describe who did it: processor, threads, versions, code."""
    import torch

    from minigrpo.training.checkpoint import this_machine

    device = opened.policy.device if opened else torch.device("cpu")
    told = asdict(this_machine(0, 0, device, torch.float32))
    kept = {name: told[name] for name in ("processor", "threads", "torch", "transformers", "peft")}
    return kept | {"minigrpo": this_version(), "code": hash_code()}


@dataclass(slots=True)
class _Again:
    """Does drawn steps and answers again. `here`: the recipe as it is opened on this machine; `merged`: folders of the
    merged model. `replayed` and `draws`: what was done; `same`: answers that came again."""

    run: RunDir
    recipe: Recipe
    evidence: Evidence
    found: Findings
    draw: Random
    quiet: bool
    here: Recipe
    base: str | None
    merged: Sequence[Path]
    replayed: list[Replayed] = field(default_factory=list)
    draws: list[AnswerDraw] = field(default_factory=list)
    same: int = 0
    machine: dict[str, Any] = field(default_factory=lambda: machine_here())

    def do(self, steps: int, answers: int, read: Sequence[Any]) -> None:
        """Do both, in one process with one model. What cannot be done at all is said, and is no fault of the run."""
        if is_adopted(self.run, self.recipe) or not last_step(self.run):
            steps = 0
        with ExitStack() as stack:
            try:
                stack.enter_context(settings_of(self.recipe, self.run))
                opened = open_replay(self.run, self.here)
            except MinigrpoError as fault:
                self.found.unshown.append(f"Nothing was done again, because the run could not be opened here: {fault}")
                return
            self.machine = machine_here(opened)
            self._check_data(opened)
            self._steps(opened, steps)
            ended = result_path(self.run, self.recipe.train).is_dir()
            if ended:
                self._merged()
            if ended and answers:
                self._answers(opened, answers, read)

    def _check_data(self, opened: OpenedRun) -> None:
        from minigrpo.training.origin import hash_prompts, hash_task_files

        if not self.evidence.begun:
            self.found.unshown.append("The run kept no hash of its data, so whether it is the same is not shown.")
            return
        then = self.evidence.begun[-1].facts
        files = hash_task_files(opened.recipe.task)
        edited = sorted(name for name in {*files, *then["task"]} if files.get(name) != then["task"].get(name))
        faults = [f"{name} is another than when the run began: it was edited, moved or removed." for name in edited]
        if hash_prompts(prompts_of(opened.task, "train")) != then["data"]:
            faults.append(f"The training prompts of task {opened.task.name} are others than when the run began.")
        self.found.check("The training prompts, and the task's own files, are those of the run.", iter(faults))

    def _steps(self, opened: OpenedRun, count: int) -> None:
        reachable = list(drawable(self.run, self.evidence)) if count else []
        ends = list(accumulate(each.steps for each in reachable))
        steps = range(ends[-1] if ends else 0)
        drawn = {bisect_right(ends, step) for step in self.draw.sample(steps, min(count, len(steps)))}
        chosen = [reachable[place] for place in sorted(drawn)]  # from the beginning first: that needs a new policy
        total = sum(each.steps for each in chosen)
        if not total:
            self.found.unshown.append("No step was done again.")
            return
        console = Screen(stderr=True, quiet=self.quiet)
        console.print(cost_of(chosen, "audit"), markup=False)
        with stage("audit: steps", total, console) as report:
            before = 0
            for each in chosen:
                part = part_of(report, before, total)
                self._replay(opened, each, part)
                before += each.steps
        reached, done = sum(each.steps for each in reachable), last_step(self.run)
        if reached < done:
            cost = command_line("minigrpo", "replay", self.run.path)
            self.found.unshown.append(
                f"{done - reached} of {done} steps could not be drawn: the checkpoints before them were removed. They "
                f"can be done from further back; what that costs: {cost}"
            )

    def _replay(self, opened: OpenedRun, stretch: Stretch, report: Any) -> None:
        steps = f"Steps {stretch.start + 1} to {stretch.until}"
        try:
            done = replay_stretch(opened, self.run, stretch, self.evidence, report=report)
        except ArtifactError as fault:
            self.found.faults.append(f"{steps} could not be done again: {fault}")
            return
        self.replayed.append(done)
        elsewhere = self.elsewhere
        told = [f"step {each.step}{_of(each)}, done again: {each.what}" for each in done.differences]
        hard = [text for each, text in zip(done.differences, told, strict=True) if each.kind in HARD or not elsewhere]
        soft = [text for text in told if text not in hard]
        self.found.faults += hard[:3]
        if soft:
            self.found.unshown.append(
                f"{steps} differ here, which says nothing for or against the run ({'; '.join(elsewhere)}): {soft[0]}"
            )
        if not told:
            start = f"checkpoint {stretch.start}" if stretch.start else "the beginning"
            ends = f", and the weights and optimizer saved after step {done.saved[-1]}" if done.saved else ""
            ids = "answers" if done.without_ids else "token ids"
            self.found.shown.append(
                f"{steps} were done again from {start}: prompts, {ids}, rewards, advantages and figures{ends} are the "
                "same, byte for byte."
            )

    @property
    def elsewhere(self) -> list[str]:
        """Return in what the code and machine here differ from those of the run."""
        codes = {link.facts["code"] for link in self.evidence.begun}
        found = ["the code that trained was another"] if codes - {hash_code()} else []
        then = self.evidence.begun[-1].facts["machine"] if self.evidence.begun else read_sealed(self.run.machine)
        names = ("processor", "threads", "torch", "transformers", "peft")
        pairs = [(name, then.get(name), self.machine[name]) for name in names]
        return [*found, *(f"{name} was {before}, is {now}" for name, before, now in pairs if before != now)]

    def _merged(self) -> None:
        """Add base and adapter again, and compare every weight of the merged model."""
        for folder in self.merged:
            name = "merged/" if folder == self.run.merged else str(folder)
            shown = f"Every weight of {name} is base plus adapter, computed again in another way."
            self.found.check(shown, merged_faults(self.run, folder, base=self.base))
        if self.run.gguf.is_dir() or self.run.compressed.is_dir():
            again = command_line("minigrpo", "verify", self.run.path)
            self.found.unshown.append(f"What rounding did to the exported files was not measured again: {again}")

    def _answers(self, opened: OpenedRun, count: int, read: Sequence[Any]) -> None:
        self.draws = draw_answers(self.run, self.recipe, opened, read, count=count, draw=self.draw)
        total = sum(len(each.drawn) + len(each.suspects) for each in self.draws)
        if not total:
            self.found.unshown.append("No answer of an evaluation was asked again: none is of this run's own model.")
            return
        before = len(self.found.faults)
        with stage("audit: answers", total, Screen(stderr=True, quiet=self.quiet)) as report:
            self.same = ask_again(self.run, opened, self.draws, self.found, elsewhere=self.elsewhere, report=report)
        if len(self.found.faults) == before:
            of = sum(len(each.answered.groups) for each in self.draws)
            self.found.shown.append(
                f"{total} of {of} prompts of {', '.join(each.answered.name for each in self.draws)} were asked again: "
                "the same answers, token counts and grades."
            )


def drawable(run: RunDir, evidence: Evidence) -> list[Stretch]:
    """Return the stretches that cost no more than what lies between two saves: from the beginning and from each
    checkpoint that is left, up to what was saved next."""
    done = last_step(run)
    found = []
    for start in sound_starts(run, evidence, done):
        until = min((step for step in evidence.saved if start < step <= done), default=done)
        found.append(timed_stretch(run, start, until))
    return found


def _of(found: Any) -> str:
    where = f", prompt {found.prompt}" if found.prompt else ""
    return where + (f", sibling {found.sibling}" if found.sibling else "")


def _statement(found: Findings, again: _Again) -> str:
    here = again.machine
    threads = f"{here['threads']} thread" + ("s" if here["threads"] > 1 else "")
    where = f"on {here['processor']} with {threads}, torch {here['torch']}"
    if found.faults:
        return f"An audit found {len(found.faults)} faults, {where}. The first: {found.faults[0]}"
    chain = "from the recipe to what lies here" if again.evidence.links else "as far as it has seals (it has no chain)"
    parts = [f"The hashes of this run hold {chain}."]
    done = [each for each in again.replayed if each.ok]
    if done:
        steps = ", ".join(f"{each.stretch.start + 1} to {each.stretch.until}" for each in done)
        parts.append(f"Drawn at random and done again, byte for byte, {where}: steps {steps}.")
    if again.same:
        parts.append(f"{again.same} drawn answers of its evaluations, asked again, were the same.")
    if not done and not again.same:
        parts.append("Nothing was done again with success.")
    return " ".join([*parts, CAVEAT])
