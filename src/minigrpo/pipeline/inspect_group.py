"""What a step's update did to the tokens of one group: the log-probability and the entropy of each, before and after.

The step is done again from the checkpoint before it, in a scratch folder (pipeline/replay.py), so the tokens are those
that were sampled then, and the two policies are the ones between which the step's update lay. Dropout is off in both.
The run is only read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, DivergenceError
from minigrpo.pipeline import replay
from minigrpo.pipeline.context import OpenedRun
from minigrpo.pipeline.evidence import Evidence, read_evidence
from minigrpo.pipeline.replay_log import ReplayLog
from minigrpo.pipeline.stages import settings_of
from minigrpo.pipeline.step_differences import open_logged
from minigrpo.runs.logger import group_row
from minigrpo.runs.manifest import refuse_other_recipe
from minigrpo.runs.rundir import RunDir
from minigrpo.types import Completion, Group
from minigrpo.ui.progress import Report, stage
from minigrpo.ui.screen import Screen

if TYPE_CHECKING:
    from minigrpo.models.policy import Policy

DECODED_WITH = 8
"""Tokens before a token that it is decoded with: a character of several tokens needs the others."""


@dataclass(frozen=True, slots=True)
class TokenChange:
    """One sampled token. Log-probabilities (at the sampling temperature) and entropies in nats."""

    id: int
    text: str
    logprob: float
    logprob_after: float
    entropy: float
    entropy_after: float

    @property
    def change(self) -> float:
        """How much likelier the update has made it."""
        return self.logprob_after - self.logprob


@dataclass(frozen=True, slots=True)
class Sibling:
    """One answer. `logged`: what groups.jsonl says of it; `differs`: where its text first differs from the answer that
    earned most, as the beginning and the end of a word; None where it is the same, or is that answer."""

    number: int
    logged: Mapping[str, Any]
    differs: tuple[int, int] | None
    tokens: tuple[TokenChange, ...]

    @property
    def text(self) -> str:
        return f"{self.logged.get('opening', '')}{self.logged['text']}"


@dataclass(frozen=True, slots=True)
class InspectedGroup:
    """One group of a step. `exact`: every byte of the steps that were done again is as the run logged it, so these are
    the answers of the log; `difference`: the first one, where not."""

    run: Path
    step: int
    number: int
    of: int
    prompt: str
    messages: Sequence[Mapping[str, Any]]
    exact: bool
    difference: str | None
    siblings: tuple[Sibling, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"run": str(self.run)}


def inspect_group(
    run: RunDir | Path, step: int, number: int, *, threads: int | None = None, quiet: bool = False
) -> InspectedGroup:
    """Measure the tokens of group `number` (from 1) of a step before and after the step's update.

    `threads`: CPU threads, in place of the run's own. Raise ArtifactError where the run has no such step or group, or
    its recipe or base is another.
    """
    run = run if isinstance(run, RunDir) else RunDir(run)
    evidence = read_evidence(run)
    (stretch,), _ = replay.find_starts(run, [step], evidence)
    recipe = load_recipe(str(run.path))
    refuse_other_recipe(recipe, run)
    with settings_of(recipe, run):
        opened = replay.open_replay(run)
        words = f"replay {stretch.steps} steps"
        with stage(words, stretch.steps, Screen(stderr=True, quiet=quiet)) as report:
            wanted = _Wanted(stretch.start, step, number)
            return _inspect(opened, run, wanted, evidence, threads=threads, report=report)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The group `number` of `step`, which is done again from the checkpoint of step `start`."""

    start: int
    step: int
    number: int


class _StepLog(ReplayLog):
    """Also keeps the groups of its last step as they were sampled, with their lines."""

    groups: Sequence[Group] = ()
    rows: Sequence[Mapping[str, Any]] = ()

    def record(
        self,
        step: int,
        metrics: Mapping[str, float],
        groups: Sequence[Group],
        advantages_PG: Sequence[Sequence[float]],
    ) -> None:
        super().record(step, metrics, groups, advantages_PG)
        self.groups = groups
        self.rows = [group_row(step, *each) for each in zip(groups, advantages_PG, strict=True)]


def _inspect(
    opened: OpenedRun, run: RunDir, wanted: _Wanted, evidence: Evidence, *, threads: int | None, report: Report
) -> InspectedGroup:
    """Do the steps before the wanted one, then that one alone: each leaves a checkpoint in the scratch folder."""
    from minigrpo.training.grpo import grpo

    start = replay.sound_start(run, wanted.start, evidence)
    began = replay.machine_of(run, start, evidence)
    machine = replace(began, threads=threads or began.threads)
    recipe = _keeping_two(opened.recipe)
    with (
        replay.scratch_run(run, start, machine) as scratch,
        open_logged(run, wanted.start, start.positions if start else {}) as logged,
    ):
        for first, last in _legs(wanted):
            log = _StepLog(scratch, logged, first, last, report=_behind(report, first, wanted))
            with suppress(DivergenceError):  # the run itself ended with it, after the same step
                grpo(replay.up_to(recipe, last), opened.task, opened.policy, opened.engine, log)
            if log.step < last:
                raise KeyboardInterrupt(f"Stopped after step {log.step}.")
        if wanted.number > len(log.groups):
            raise ArtifactError(
                f"Step {wanted.step} has the groups 1 to {len(log.groups)}; there is no group {wanted.number}."
            )
        group, row = log.groups[wanted.number - 1], log.rows[wanted.number - 1]
        scores = []
        for saved in (wanted.step - 1, wanted.step):
            opened.policy.restore(scratch.checkpoint(saved))
            scores.append(measure_group(opened.policy, group, machine.tokens_per_pass))
        first_difference = log.differences[0] if log.differences else None
        return InspectedGroup(
            run.path,
            wanted.step,
            wanted.number,
            len(log.groups),
            group.prompt.id,
            group.prompt.messages,
            first_difference is None,
            f"{first_difference.kind}: {first_difference.what}" if first_difference else None,
            tuple(_siblings(opened.policy, group, row, *scores)),
        )


def _behind(report: Report, first: int, wanted: _Wanted) -> Report:
    """Report the steps of a leg as steps of the whole way."""

    def moved(done: int, total: int = 0, note: str = "") -> None:
        report(done + first - wanted.start, wanted.step - wanted.start, note)

    return moved


def _keeping_two(recipe: Recipe) -> Recipe:
    """Keep both checkpoints between which the update lies, and leave the policy as the last step made it."""
    saved = recipe.save.model_copy(update={"keep": max(2, recipe.save.keep), "take": "last"})
    return recipe.model_copy(update={"save": saved})


def _legs(wanted: _Wanted) -> Iterator[tuple[int, int]]:
    if wanted.step - 1 > wanted.start:
        yield wanted.start, wanted.step - 1
    yield wanted.step - 1, wanted.step


def measure_group(policy: Policy, group: Group, tokens_per_pass: int) -> tuple[list[float], list[float]]:
    """Return log-probability and entropy of all sampled tokens of a group, in nats, sibling after sibling."""
    from minigrpo.algorithms.objective import OBJECTIVES
    from minigrpo.algorithms.packing import pack

    longest = max(len(completion.token_ids) for completion in group.completions)
    # As if a KL term pulled on every token: a group that ties would be left out.
    batch = replace(pack([group], OBJECTIVES["grpo"], longest), needs_all=True)
    logprobs: list[float] = []
    entropies: list[float] = []
    for part in batch.split(tokens_per_pass):
        scores = policy.present(part)
        logprobs += scores.logprobs_N.tolist()
        entropies += scores.entropy_N.tolist()
    return logprobs, entropies


Scores = tuple[list[float], list[float]]


def _siblings(policy: Policy, group: Group, row: Mapping[str, Any], before: Scores, after: Scores) -> Iterator[Sibling]:
    logged = row["completions"]
    texts = [f"{each.get('opening', '')}{each['text']}" for each in logged]
    best = max(range(len(logged)), key=lambda at: group.rewards[at] if group.grades[at].scored else -math.inf)
    figures = list(zip(before[0], after[0], before[1], after[1], strict=True))
    for at, completion in enumerate(group.completions):
        own, figures = figures[: len(completion.token_ids)], figures[len(completion.token_ids) :]
        words = token_texts(policy.tokenizer, completion)
        tokens = [TokenChange(*each, *four) for each, four in zip(words, own, strict=True)]
        differs = None if at == best else first_different_word(texts[best], texts[at])
        yield Sibling(at + 1, logged[at], differs, tuple(tokens))


def token_texts(tokenizer: Any, completion: Completion) -> Iterator[tuple[int, str]]:
    """Yield each token with what it adds to the text; a character of several tokens stands at its last one."""
    ids = completion.token_ids
    for at, token in enumerate(ids):
        window = ids[max(0, at - DECODED_WITH) : at]
        known, whole = (_decoded(tokenizer, each) for each in (window, (*window, token)))
        yield token, whole[len(known) :] if whole.startswith(known) else ""


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode without what is not yet a character."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False)).rstrip("\ufffd") if ids else ""


def first_different_word(best: str, text: str) -> tuple[int, int] | None:
    """Return where `text` first differs from `best`, as the beginning and the end of a word of it."""
    if text == best or not text:
        return None
    pairs = enumerate(zip(best, text, strict=False))
    at = next((at for at, (one, two) in pairs if one != two), min(len(best), len(text)))
    start = min(at, len(text) - 1)
    while start > 0 and not text[start].isspace() and not text[start - 1].isspace():
        start -= 1
    end = max(at, start + 1)
    while end < len(text) and not text[end].isspace():
        end += 1
    return start, end
