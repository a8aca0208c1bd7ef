"""Do steps of a run again, from the checkpoint before, and compare all that they log with what the run logged.

One step that is named, or many that are drawn at random, with one model: the steps of one checkpoint together.

Every draw is a function of its name (utils/rng.py), so on the same processor, versions and number of threads each
token, reward, advantage, figure and weight is the same to the last bit. Elsewhere the first difference is named.

The run is only read. What the steps write goes to a scratch folder, which is removed. Memory holds one step; besides
that the metrics up to the checkpoint are read, and both logs once for their hashes.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, DivergenceError
from minigrpo.pipeline import prepare
from minigrpo.pipeline.context import OpenedRun, located, open_all
from minigrpo.pipeline.evidence import (
    Evidence,
    changed_logs,
    checkpoint_fault,
    last_step,
    read_evidence,
    sound_starts,
    start_fault,
    weight_files,
)
from minigrpo.pipeline.replay_log import ReplayLog, why_graded_otherwise
from minigrpo.pipeline.stages import settings_of
from minigrpo.pipeline.step_differences import Difference, open_logged, row_of
from minigrpo.runs.chain import read_chain
from minigrpo.runs.logger import lines_backwards
from minigrpo.runs.manifest import refuse_other_recipe, result_path, settle_base
from minigrpo.runs.rundir import RunDir, digest
from minigrpo.ui.live import duration
from minigrpo.ui.progress import Report, part_of, stage
from minigrpo.ui.screen import Screen

if TYPE_CHECKING:
    from minigrpo.training.checkpoint import Checkpoint, Machine

TIMED_STEPS = 50
"""Steps at the end of the log by whose mean the cost of a replay is told."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps that are done together: those after `start`, the step of a checkpoint (0: the beginning), up to `until`.

    `seconds`: what they took in the run; None where it does not say.
    """

    start: int
    until: int
    seconds: float | None = None

    @property
    def steps(self) -> int:
        return self.until - self.start

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"steps": self.steps}


@dataclass(frozen=True, slots=True)
class Replayed:
    """Steps done again. `exact`: those of which every byte is the same; `differences`: at most one a step, in order,
    and those of files. `saved`: steps whose saved weights and optimizer were compared, by their hashes. `machine`: in
    what this machine differs from the run's. `weights`: hashes after the last step. `group`: the one asked for."""

    run: Path
    stretch: Stretch
    exact: tuple[int, ...]
    differences: tuple[Difference, ...]
    saved: tuple[int, ...]
    machine: tuple[str, ...]
    weights: Mapping[str, str]
    without_ids: bool = False
    group: Mapping[str, Any] | None = None

    @property
    def ok(self) -> bool:
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"run": str(self.run), "ok": self.ok}


@dataclass(frozen=True, slots=True)
class ReplayedSteps:
    """Many steps done again. `drawn`: those asked for; `parts`: what was done for them, in order, with every step that
    lies before a drawn one. `seed`: of the draw. `files`: what differs in checkpoints and logs, whatever was done."""

    run: Path
    seed: int
    drawn: tuple[int, ...]
    parts: tuple[Replayed, ...]
    files: tuple[Difference, ...]

    @property
    def exact(self) -> tuple[int, ...]:
        """Return the steps of which every byte is the same, drawn or on the way to a drawn one."""
        return tuple(step for part in self.parts for step in part.exact)

    @property
    def inexact(self) -> tuple[int, ...]:
        """Return the steps that were done again and are not exact."""
        done = (step for part in self.parts for step in range(part.stretch.start + 1, part.stretch.until + 1))
        return tuple(sorted({*done} - {*self.exact}))

    @property
    def differences(self) -> tuple[Difference, ...]:
        return (*self.files, *(each for part in self.parts for each in part.differences))

    @property
    def ok(self) -> bool:
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "ok": self.ok,
            "seed": self.seed,
            "drawn": list(self.drawn),
            "exact": list(self.exact),
            "inexact": list(self.inexact),
            "differences": [each.to_dict() for each in self.differences],
            "parts": [part.to_dict() for part in self.parts],
        }


def replay(
    run: RunDir | Path, step: int, *, group: int | None = None, threads: int | None = None, quiet: bool = False
) -> Replayed:
    """Do the steps from the newest sound checkpoint before `step` up to it again, and compare.

    `group`: also return this group of the step (from 1), logged and replayed. `threads`: CPU threads, in place of the
    run's own. Raises ArtifactError where the run has no such step or group, or its recipe or base is another.
    """
    run = run if isinstance(run, RunDir) else RunDir(run)
    evidence = read_evidence(run)
    (part,), damaged = _replay(run, [step], evidence, threads=threads, group=group, quiet=quiet)
    if part.group is not None and part.group["replayed"] is part.group["logged"] is None:
        raise ArtifactError(f"Step {step} has the groups 1 to {part.group['of']}; there is no group {group}.")
    return replace(part, differences=(*damaged, *part.differences, *_changed_files(run, evidence)))


def replay_steps(
    run: RunDir | Path, steps: int, *, seed: int | None = None, threads: int | None = None, quiet: bool = False
) -> ReplayedSteps:
    """Draw so many steps of a run at random, and do them again with one model; all of them where it has fewer.

    `seed` of the draw; None: a new one. A step costs all that lie between it and the checkpoint before, and these are
    compared, too. Raises ArtifactError where the run has done no step, or its recipe or base is another.
    """
    run = run if isinstance(run, RunDir) else RunDir(run)
    evidence, seed = read_evidence(run), secrets.randbelow(2**32) if seed is None else seed
    done = require_steps(run)
    drawn = sorted(Random(seed).sample(range(1, done + 1), min(steps, done)))
    parts, damaged = _replay(run, drawn, evidence, threads=threads, quiet=quiet)
    return ReplayedSteps(run.path, seed, tuple(drawn), tuple(parts), (*damaged, *_changed_files(run, evidence)))


def _replay(
    run: RunDir,
    steps: Sequence[int],
    evidence: Evidence,
    *,
    threads: int | None = None,
    group: int | None = None,
    quiet: bool = False,
) -> tuple[list[Replayed], list[Difference]]:
    """Do steps again, in one process with one model. Return what came of it, and what is wrong with checkpoints."""
    parts, damaged = find_starts(run, steps, evidence)
    recipe = load_recipe(str(run.path))
    refuse_other_recipe(recipe, run)
    total, console = sum(each.steps for each in parts), Screen(stderr=True, quiet=quiet)
    if len(steps) > 1:
        console.print(cost_of(parts, "replay"), markup=False)
    with settings_of(recipe, run):
        opened = open_replay(run)
        with stage(f"replay {total} steps", total, console) as report:
            done: list[Replayed] = []
            for each in parts:
                part = part_of(report, sum(one.stretch.steps for one in done), total)
                options: dict[str, Any] = {"threads": threads, "group": group, "report": part}
                done.append(replay_stretch(opened, run, each, evidence, **options))
    return done, damaged


def cost_of(parts: Sequence[Stretch], verb: str) -> str:
    """Say how many steps will be done again, and how long they took in the run."""
    known = [each.seconds for each in parts if each.seconds is not None]
    took = f", which took {duration(sum(known))} in the run" if known else ""
    return f"{verb}: doing {sum(each.steps for each in parts)} steps again{took}"


def _changed_files(run: RunDir, evidence: Evidence) -> list[Difference]:
    """Return what is wrong with the logs, and with the chain."""
    changed = [
        Difference("log", after + 1, f"{path} was changed in the lines of steps {after + 1} to {until}: their hash was "
                   f"saved with step {until}, and is another now.")
        for path, after, until in changed_logs(run, evidence)
    ]  # fmt: skip
    broken = [Difference("checkpoint", last_step(run), evidence.fault)] if evidence.fault else []
    return [*changed, *broken]


def reach(run: RunDir | Path) -> list[Stretch]:
    """Return which steps are done again from where. Raises ArtifactError where the run has done none."""
    run = run if isinstance(run, RunDir) else RunDir(run)
    require_steps(run)
    return list(stretches(run, read_evidence(run)))


def require_steps(run: RunDir) -> int:
    """Return how many steps the run has done. Raises ArtifactError where there are none."""
    if not run.exists():
        raise ArtifactError(f"{run.path} is no run's folder. Give one: runs/NAME")
    done = last_step(run)
    if not done:
        raise ArtifactError(f"{run.path} has done no step yet, so there is none to do again.")
    return done


def find_starts(run: RunDir, steps: Sequence[int], evidence: Evidence) -> tuple[list[Stretch], list[Difference]]:
    """Return from where these steps can be done, the beginning first, and what is wrong with the checkpoints between.

    Steps behind one checkpoint are done together. Raises ArtifactError where the run has not done one of them.
    """
    from minigrpo.training.checkpoint import saved_steps

    done = require_steps(run)
    if missing := [step for step in steps if not 1 <= step <= done]:
        has = f"has done the steps 1 to {done}"
        raise ArtifactError(f"{run.path} {has}, so there is no step {missing[0]} to do again.")
    left, damaged, parts = sorted(steps), list[Difference](), list[Stretch]()
    for start in reversed(saved_steps(run)):
        if not left or start >= left[-1]:
            continue
        fault = start_fault(run, start, evidence)
        if fault is None:
            parts.append(timed_stretch(run, start, left[-1]))
            left = [step for step in left if step <= start]
        else:
            damaged.append(Difference("checkpoint", start, f"{fault} Replayed from an earlier one."))
    if left:
        parts.append(timed_stretch(run, 0, left[-1]))
    return parts[::-1], damaged


def stretches(run: RunDir, evidence: Evidence) -> Iterator[Stretch]:
    """Yield the steps that are done from one start: the beginning, and each checkpoint that is left and sound."""
    done = last_step(run)
    starts = sound_starts(run, evidence, done)
    for start, until in zip(starts, [*starts[1:], done], strict=True):
        yield timed_stretch(run, start, until)


def timed_stretch(run: RunDir, start: int, until: int) -> Stretch:
    """Return the stretch, with what it took in the run: by the mean of the steps that were logged last."""
    newest = (row_of(line).get("seconds") for line in islice(lines_backwards(run.metrics), TIMED_STEPS))
    known = [seconds for seconds in newest if isinstance(seconds, int | float)]
    return Stretch(start, until, fmean(known) * (until - start) if known else None)


def open_replay(run: RunDir, recipe: Recipe | None = None) -> OpenedRun:
    """Open the run's task, model and engine as its training did, before its first step; the run is only read.

    `recipe`: the run's own as it is to be opened here; None: with what a published run carries. Raises ArtifactError
    where the base is another, or the warm-up that training began with is missing.
    """
    from minigrpo.models.model_files import local_fingerprint

    recipe = recipe or located(load_recipe(str(run.path)), run)
    opened = open_all(recipe, run)
    found = local_fingerprint(opened.policy.path, recipe.model.revision)
    if found is not None and run.base.is_file():
        settle_base(run, opened.policy.path, found)
    if recipe.warmup.steps:
        prepare.begin_with_warmup(opened, run)
    return opened


def replay_stretch(
    opened: OpenedRun,
    run: RunDir,
    stretch: Stretch,
    evidence: Evidence,
    *,
    threads: int | None = None,
    group: int | None = None,
    report: Report,
) -> Replayed:
    """Do a stretch again. One that begins at 0 needs a policy that has not been trained since it was opened."""
    from minigrpo.training import checkpoint
    from minigrpo.training.grpo import grpo

    start = sound_start(run, stretch.start, evidence)
    began = machine_of(run, start, evidence)
    with (
        scratch_run(run, start, replace(began, threads=threads or began.threads)) as scratch,
        open_logged(run, stretch.start, start.positions if start else {}) as logged,
    ):
        log = ReplayLog(scratch, logged, stretch.start, stretch.until, report=report, group=group)
        with suppress(DivergenceError):  # the run itself ended with it, after the same step
            grpo(up_to(opened.recipe, stretch.until), opened.task, opened.policy, opened.engine, log)
        if log.step < stretch.until:
            raise KeyboardInterrupt(f"Stopped after step {log.step}: {len(log.exact)} steps were exact so far.")
        compared, differing = _compare_saved(run, scratch, evidence, stretch)
        first = next(link for link in read_chain(scratch) if link.kind == "begin")
        now = checkpoint.Machine(**first.facts["machine"])
        differences = [_explained(each, log, opened, evidence) for each in log.differences]
        return Replayed(
            run.path,
            stretch,
            tuple(log.exact),
            (*differences, *differing),
            tuple(compared),
            tuple(now.differences(began)),
            _weights(scratch, stretch.until),
            log.without_ids,
            log.group,
        )


def sound_start(run: RunDir, step: int, evidence: Evidence) -> Checkpoint | None:
    """Return the checkpoint of that step; None where a stretch begins with the run itself."""
    from minigrpo.training.checkpoint import find_step

    sound = run.checkpoint(step).is_dir() and start_fault(run, step, evidence) is None
    return find_step(run, step) if sound else None


def machine_of(run: RunDir, start: Checkpoint | None, evidence: Evidence) -> Machine:
    """Return the machine on which the stretch was done first: its threads and tokens per pass are used again."""
    from minigrpo.training import checkpoint

    if start:
        return start.machine
    if evidence.begun:
        return checkpoint.Machine(**evidence.begun[0].facts["machine"])
    found = checkpoint.read_machine(run)
    if found is None:
        raise ArtifactError(f"{run.machine} is missing, so nobody knows with how many threads the run was begun.")
    return found


@contextmanager
def scratch_run(run: RunDir, start: Checkpoint | None, machine: Machine) -> Iterator[RunDir]:
    """Yield a folder elsewhere that is the run as it was at a checkpoint, without its groups."""
    from minigrpo.training.checkpoint import find_step, write_machine

    with TemporaryDirectory(prefix="minigrpo-replay-") as folder:
        scratch = RunDir(Path(folder) / run.path.absolute().name)
        scratch.path.mkdir()
        for path in (run.recipe, run.made, run.base):
            if path.is_file():
                shutil.copy2(path, scratch.path)
        write_machine(scratch, machine)
        if start:
            shutil.copytree(start.folder, scratch.checkpoint(start.step))
            find_step(scratch, start.step)  # a run that goes on meanwhile may have removed it while it was copied
            _copy_beginning(run.metrics, scratch.metrics, start.positions[run.metrics.name]["bytes"])
        yield scratch


def _copy_beginning(source: Path, target: Path, size: int) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        while size and (block := old.read(min(1 << 20, size))):
            new.write(block)
            size -= len(block)


def _weights(scratch: RunDir, step: int) -> dict[str, str]:
    saved = [link.facts["files"] for link in read_chain(scratch) if link.kind == "checkpoint" and link.step == step]
    return {name: saved[-1][name] for name in weight_files(saved[-1])} if saved else {}


def up_to(recipe: Recipe, step: int) -> Recipe:
    """Return the recipe of a run that ends after this step, at the learning rates of the whole run."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"until": step})})


def _compare_saved(
    run: RunDir, scratch: RunDir, evidence: Evidence, stretch: Stretch
) -> tuple[list[int], list[Difference]]:
    """Compare what the scratch run saved with what the run saved after the same steps, and with what lies there now."""
    compared: list[int] = []
    found: list[Difference] = []
    now = {link.step: link.facts["files"] for link in read_chain(scratch) if link.kind == "checkpoint"}
    for step, files in now.items():
        known = evidence.saved.get(step)
        if known is None:
            continue
        compared.append(step)
        found += list(_differing_files(run, scratch, step, known.files, files))
        if run.checkpoint(step).is_dir() and (fault := checkpoint_fault(run, step, evidence)):
            found.append(Difference("checkpoint", step, fault))
    if stretch.until in now:
        found += list(_compare_result(run, stretch.until, now[stretch.until]))
    return compared, found


def _differing_files(
    run: RunDir, scratch: RunDir, step: int, then: Mapping[str, str], now: Mapping[str, str]
) -> Iterator[Difference]:
    kinds = dict.fromkeys(weight_files({**then, **now}), "weights") | {
        "optimizer.pt": "optimizer",
        "trainer.json": "state",
    }
    for name, kind in kinds.items():
        if then.get(name) != now.get(name):
            what = f"{name} after this step is another than the run saved{_apart(run, scratch, step, name)}."
            yield Difference(kind, step, what, None, None, then.get(name), now.get(name))  # type: ignore[arg-type]


def _apart(run: RunDir, scratch: RunDir, step: int, name: str) -> str:
    """Say how far two saved weights are apart, where both are there."""
    one, two = run.checkpoint(step) / name, scratch.checkpoint(step) / name
    if not (name.endswith(".safetensors") and one.is_file() and two.is_file()):
        return ""
    from safetensors.torch import load_file

    try:
        before, after = load_file(one), load_file(two)
    except Exception:  # the library's own kinds of fault, for a damaged file: its hash says that it is another
        return ""
    shared = [key for key in before if key in after and before[key].shape == after[key].shape]
    gaps = [(before[key].float() - after[key].float()).abs() for key in shared]
    changed, largest = sum(int((gap > 0).sum()) for gap in gaps), max((float(gap.max()) for gap in gaps), default=0.0)
    return f": {changed} of {sum(gap.numel() for gap in gaps)} weights, by up to {largest:.1e}"


def _compare_result(run: RunDir, step: int, now: Mapping[str, str]) -> Iterator[Difference]:
    """Compare the trained adapter or model with the weights after the last step."""
    recipe = load_recipe(str(run.path))
    folder = result_path(run, recipe.train)
    if step != recipe.train.steps or recipe.save.take != "last" or not folder.is_dir():
        return
    for name in weight_files(now):
        file = folder / name
        if not file.is_file() or digest(file) != now[name]:
            yield Difference("weights", step, f"{file} is not what training ends with.", replayed=now[name])


def _explained(found: Difference, log: ReplayLog, opened: OpenedRun, evidence: Evidence) -> Difference:
    """Add to a differing reward why the same answer may have earned another."""
    if found.kind != "reward" or found.step not in log.kept:
        return found
    began = [link.facts["task"] for link in evidence.begun if link.step < found.step]
    why = why_graded_otherwise(opened.task, log.kept[found.step], opened.recipe.task, began[-1] if began else None)
    return replace(found, what=f"{found.what} {why}")
