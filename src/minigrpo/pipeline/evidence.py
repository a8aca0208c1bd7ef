"""What a run's folder holds as evidence: its chain, its checkpoints, and whether its logs are what these say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigrpo.errors import ArtifactError
from minigrpo.pipeline.step_differences import row_of
from minigrpo.runs.chain import Link, read_chain
from minigrpo.runs.logger import Prefix, lines_backwards
from minigrpo.runs.manifest import read_sealed
from minigrpo.runs.rundir import RunDir, read_json
from minigrpo.training import checkpoint

WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class Saved:
    """What was saved after a step: the hashes of its files, and the logs' lengths and hashes then."""

    step: int
    files: Mapping[str, str]
    logs: checkpoint.Positions


@dataclass(frozen=True, slots=True)
class Evidence:
    """A run's chain as far as it holds, with the fault that ends it, and what was saved at which step.

    `saved` comes from the chain; where there is none yet (a run of before), from the checkpoints that are left.
    """

    links: tuple[Link, ...]
    fault: str | None
    saved: Mapping[int, Saved]

    @property
    def begun(self) -> tuple[Link, ...]:
        return tuple(link for link in self.links if link.kind == "begin")


def read_evidence(run: RunDir) -> Evidence:
    """Read a run's chain up to its first fault, and what it says was saved."""
    fault = None
    try:
        links = list(read_chain(run))
    except ArtifactError as broken:
        fault = str(broken)
        links = list(read_chain(run, strict=False))
    made = [link for link in links if link.kind == "checkpoint"]
    saved = {each.step: each for each in _left(run) if not links or each.step <= links[0].step}
    saved |= {link.step: Saved(link.step, link.facts["files"], link.facts["logs"]) for link in made}
    return Evidence(tuple(links), fault, saved)


def _left(run: RunDir) -> Iterator[Saved]:
    """Yield what the seals of the checkpoints that are left say; a damaged one says nothing."""
    for step in checkpoint.saved_steps(run):
        folder = run.checkpoint(step)
        try:
            yield Saved(
                step, read_sealed(folder / "made.json")["sha256"], read_json(folder / "state.json")["positions"]
            )
        except (ArtifactError, LookupError, TypeError):
            continue


def checkpoint_fault(run: RunDir, step: int, evidence: Evidence) -> str | None:
    """Say what is wrong with a checkpoint's folder; None where it is what was saved, and where the chain says so."""
    try:
        found = checkpoint.find_step(run, step)
        files = read_sealed(found.folder / "made.json")["sha256"]
    except ArtifactError as fault:
        return str(fault)
    if not evidence.links or 0 < step <= evidence.links[0].step:  # of before the chain
        return None
    known = evidence.saved.get(step)
    if known is None:
        return f"{found.folder} is in no line of {run.chain}: nobody saved it in this run."
    differing = sorted(name for name in {*files, *known.files} if files.get(name) != known.files.get(name))
    if differing:
        return f"{found.folder / differing[0]} is not the one that {run.chain} names, though its own seal fits."
    hashes = {link.sha256 for link in evidence.links if link.kind == "checkpoint" and link.step == step}
    if checkpoint.hash_link(found.folder) not in hashes:
        return f"{found.folder / 'made.json'} names another line before it than {run.chain} has."
    return None


def start_fault(run: RunDir, step: int, evidence: Evidence, figures: Prefix | None = None) -> str | None:
    """Say why no replay can begin at a checkpoint: its own fault, or figures before it that were changed.

    `figures`: of the metrics, shared by calls for one step after the other, so that the log is read once.
    """
    if fault := checkpoint_fault(run, step, evidence):
        return fault
    then = checkpoint.find_step(run, step).positions.get(run.metrics.name, {"bytes": 0})
    figures = figures or Prefix(run.metrics)
    return None if figures.matches(then) else f"{run.metrics} was changed in the lines up to step {step}."


def sound_starts(run: RunDir, evidence: Evidence, done: int) -> list[int]:
    """Return from where steps can be done again, in order: the beginning, and each sound checkpoint before `done`."""
    figures = Prefix(run.metrics)
    saved = [step for step in checkpoint.saved_steps(run) if step < done]
    return sorted({0, *(step for step in saved if start_fault(run, step, evidence, figures) is None)})


def changed_logs(run: RunDir, evidence: Evidence) -> Iterator[tuple[Path, int, int]]:
    """Yield (log, after step, up to step) for each log whose lines of these steps are not what was saved.

    Each log is read once, from its beginning to what was saved last.
    """
    for path in (run.metrics, run.groups):
        prefix, before = Prefix(path), 0
        for saved in sorted(evidence.saved.values(), key=lambda each: each.step):
            then = saved.logs.get(path.name)
            if then is not None and not prefix.matches(then):
                yield path, before, saved.step
                break
            before = saved.step


def last_step(run: RunDir) -> int:
    """Return the number of the last step in the log; 0 where there is none."""
    steps = (row_of(line).get("step") for line in lines_backwards(run.metrics))
    return next((step for step in steps if isinstance(step, int)), 0)


def weight_files(files: Mapping[str, Any] | Sequence[str]) -> list[str]:
    return sorted(name for name in files if name.endswith(WEIGHTS))
