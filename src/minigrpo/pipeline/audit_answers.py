"""Hold evaluations to their own answers, and ask randomly drawn prompts again.

Scores and comparison are computed from the answers. Every answer is graded again where that is cheap; those that are
graded otherwise, and those drawn, are asked again: the same text, tokens and grade must come.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from minigrpo.config.schema import Recipe
from minigrpo.errors import MinigrpoError
from minigrpo.pipeline.audit_chain import Findings, evaluation_files
from minigrpo.pipeline.context import OpenedRun
from minigrpo.runs.manifest import read_sealed, result_path, stamp
from minigrpo.runs.rundir import RunDir, read_json
from minigrpo.types import Completion, Grade, Group, Prompt, Sampling
from minigrpo.ui.progress import Report

if TYPE_CHECKING:
    from minigrpo.evaluation.evaluate import Evaluation

MOST_SUSPECTS = 20
"""Prompts of one evaluation that are asked again because their answers are graded otherwise now."""
GIVEN = ("prompt", "messages", "target")


@dataclass(frozen=True, slots=True)
class Answered:
    """One evaluation of a run. `groups`: its answers as groups, with token ids of the right number and no meaning."""

    file: Path
    evaluation: Evaluation
    groups: tuple[Group, ...]
    made: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.file.name


def read_answers(run: RunDir, found: Findings) -> list[Answered]:
    """Read every evaluation in the run's folder. One that cannot be read is a fault."""
    read: list[Answered] = []
    for file in evaluation_files(run):
        try:
            read.append(_answered(file))
        except (MinigrpoError, LookupError, TypeError, ValueError, AttributeError) as fault:
            found.faults.append(f"{file} is no evaluation that can be read: {fault}")
    return read


def _answered(file: Path) -> Answered:
    from minigrpo.evaluation.evaluate import Evaluation

    content = read_json(file)
    evaluation = Evaluation.from_dict(content)
    answers, n = evaluation.scores.answers, evaluation.scores.samples
    groups = tuple(_group(answers[start : start + n]) for start in range(0, len(answers), n))
    return Answered(file, evaluation, groups, content.get("made") or {})


def _group(answers: Sequence[Mapping[str, Any]]) -> Group:
    first = answers[0]
    completions = [
        Completion(row["text"], (0,) * row["tokens"], (), row["finish"], row.get("opening", "")) for row in answers
    ]
    grades = [
        Grade(
            math.nan if row["reward"] is None else row["reward"],
            row["parts"],
            row["formed"],
            row["solved"],
            notes=row.get("notes", {}),
            answer=row.get("answer"),
        )
        for row in answers
    ]
    return Group(
        Prompt(first["prompt"], tuple(first["messages"]), first["target"]), (), tuple(completions), tuple(grades)
    )


def check_scores(run: RunDir, read: Sequence[Answered], found: Findings) -> None:
    """Compute the scores of each evaluation, and the comparison before and after, from the answers."""
    faults = [f"{each.file}: its scores are not those of its answers." for each in read if not _scores_fit(each)]
    faults += list(_comparison_faults(run, read))
    if read:
        found.check("The scores, and the comparison before and after, are those of the answers.", iter(faults))


def _scores_fit(answered: Answered) -> bool:
    from minigrpo.evaluation.statistics import score_groups

    return _plain(score_groups(answered.groups).to_dict()) == _plain(answered.evaluation.scores.to_dict())


def _comparison_faults(run: RunDir, read: Sequence[Answered]) -> Iterator[str]:
    from minigrpo.evaluation.evaluate import compare

    file = run.evals / "comparison.json"
    if not file.is_file():
        return
    sides = {(each.evaluation.name, each.evaluation.decoding): each.evaluation for each in read}
    try:
        for decoding, told in read_json(file)["comparisons"].items():
            pair = compare(sides["base", decoding], sides["tuned", decoding])
            if _plain(pair.summary()) != told:
                yield f"{file}: {decoding} is not what the evaluations beside it say."
    except (MinigrpoError, LookupError, TypeError, AttributeError) as fault:
        yield f"{file} cannot be compared with the evaluations beside it: {type(fault).__name__}: {fault}"


def _plain(value: Any) -> Any:
    """Return the value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


@dataclass(frozen=True, slots=True)
class AnswerDraw:
    """Prompts of one evaluation to ask again. `side`: whom it asked, "tuned" or "base"; `drawn` at random; `suspects`:
    graded otherwise now."""

    answered: Answered
    side: str
    drawn: tuple[str, ...]
    suspects: tuple[str, ...]


def draw_answers(
    run: RunDir, recipe: Recipe, opened: OpenedRun, read: Sequence[Answered], *, count: int, draw: Random
) -> list[AnswerDraw]:
    """Draw prompts over all evaluations that this run's own model answered, and add those that are suspect."""
    sides = [(each, side_of(run, recipe, each, opened)) for each in read]
    own = [(each, side) for each, side in sides if side is not None]
    places = [(index, group.prompt.id) for index, (each, _) in enumerate(own) for group in each.groups]
    chosen = draw.sample(places, min(count, len(places)))
    draws = []
    for index, (each, side) in enumerate(own):
        drawn = tuple(name for place, name in chosen if place == index)
        suspects = tuple(name for name in graded_otherwise(opened, each) if name not in drawn)
        draws.append(AnswerDraw(each, side, drawn, suspects[:MOST_SUSPECTS]))
    return [each for each in draws if each.drawn or each.suspects]


def side_of(run: RunDir, recipe: Recipe, answered: Answered, opened: OpenedRun) -> str | None:
    """Return "tuned" or "base" where the evaluation is of the run's own policy, by its recipe; else None."""
    made = answered.made.get("from", {})
    # A run's own stages stamp the recipe as it was begun with, later commands as it is read back, with absolute paths.
    begun = read_sealed(run.made)["sha256"] if run.made.is_file() else None
    if made.get("recipe") not in (stamp("evaluate", recipe)["from"]["recipe"], begun):
        return None
    if result_path(run, recipe.train).name in made:
        return "tuned"
    return "base" if opened.policy.is_lora and made.keys() == {"recipe"} else None


def graded_otherwise(opened: OpenedRun, answered: Answered) -> list[str]:
    """Return the prompts that the task has not, or whose answers it grades otherwise now.

    Programs are not run again, and no judge is asked: that is dear.
    """
    from minigrpo.rollouts.grading import judge_group
    from minigrpo.tasks.custom.ready_made import is_ready_made

    own = own_prompts(opened, answered)
    dear = opened.task.grading_seconds is not None or is_ready_made(opened.recipe.task.name)
    return [
        group.prompt.id
        for group in answered.groups
        if not _is_prompt(own.get(group.prompt.id), group.prompt)
        or (not dear and _graded(judge_group(opened.task, group.prompt, group.completions)) != _graded(group.grades))
    ]


def own_prompts(opened: OpenedRun, answered: Answered) -> dict[str, Prompt]:
    return {prompt.id: prompt for prompt in opened.task.prompts(answered.evaluation.split)}


def _is_prompt(own: Prompt | None, told: Prompt) -> bool:
    return own is not None and _plain([own.messages, own.target]) == _plain([told.messages, told.target])


def _graded(grades: Sequence[Grade]) -> Any:
    return [
        (str(grade.reward), _plain(dict(grade.parts)), grade.formed, grade.solved, _plain(grade.answer))
        for grade in grades
    ]


def ask_again(
    run: RunDir,
    opened: OpenedRun,
    draws: Sequence[AnswerDraw],
    found: Findings,
    *,
    elsewhere: Sequence[str] = (),
    report: Report,
) -> int:
    """Ask the drawn prompts again, of the trained policy or of its base. Return how many answers were the same.

    `elsewhere`: in what this machine differs from the run's; then another text says nothing against the run.
    """
    policy, engine = opened.policy, opened.engine
    policy.restore(result_path(run, opened.recipe.train))
    same, done = 0, 0
    for each in draws:
        report(done, note=each.answered.name)
        if each.side == "tuned":
            engine.update(policy)
            same += _ask(opened, each, found, elsewhere)
        else:
            with policy.adapter_off():
                engine.update(policy)
                same += _ask(opened, each, found, elsewhere)
        done += len(each.drawn) + len(each.suspects)
    return same


def _ask(opened: OpenedRun, draw: AnswerDraw, found: Findings, elsewhere: Sequence[str]) -> int:
    wanted = {*draw.drawn, *draw.suspects}
    groups = [group for group in draw.answered.groups if group.prompt.id in wanted]
    own = own_prompts(opened, draw.answered)
    logged = {group.prompt.id: _records([group]) for group in groups}
    foreign = [group.prompt.id for group in groups if not _is_prompt(own.get(group.prompt.id), group.prompt)]
    found.faults += [f"{draw.answered.file}: the task has another prompt {name}, or none." for name in foreign]
    known = [own[group.prompt.id] for group in groups if group.prompt.id not in foreign]
    now = _sample(opened, draw.answered, known)
    if any(now[name] != logged[name] for name in now):
        # The last bits depend on which prompts are decoded side by side: ask as the evaluation did before blaming it.
        now |= {name: rows for name, rows in _sample(opened, draw.answered, _batches(draw, own)).items() if name in now}
    differing = [name for name in now if now[name] != logged[name]]
    for name in differing:
        told = _answer_fault(draw.answered.file, name, logged[name], now[name])
        if elsewhere and [row["text"] for row in now[name]] != [row["text"] for row in logged[name]]:
            found.unshown.append(f"{told} That says nothing for or against the run ({'; '.join(elsewhere)}).")
        else:
            found.faults.append(told)
    return sum(len(logged[name]) for name in now if name not in differing)


def _sample(opened: OpenedRun, answered: Answered, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Ask, and return the records of the answers by prompt, as an evaluation keeps them."""
    from minigrpo.evaluation.evaluate import ROWS
    from minigrpo.rollouts.groups import rollout

    n = answered.evaluation.scores.samples
    sampling: Sampling = answered.evaluation.sampling
    batch, records = max(1, ROWS // n), dict[str, Any]()
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        groups = rollout(opened.engine, opened.task, part, n=n, sampling=sampling, tokenizer=opened.policy.tokenizer)
        records |= {group.prompt.id: _records([group]) for group in groups}
    return records


def _batches(draw: AnswerDraw, own: Mapping[str, Prompt]) -> list[Prompt]:
    """Return the prompts that were asked together with the drawn ones, in their order, whole batches of them."""
    from minigrpo.evaluation.evaluate import ROWS

    wanted = {*draw.drawn, *draw.suspects}
    names = [group.prompt.id for group in draw.answered.groups]
    batch = max(1, ROWS // draw.answered.evaluation.scores.samples)
    parts = [names[start : start + batch] for start in range(0, len(names), batch)]
    return [own[name] for part in parts if wanted & set(part) for name in part if name in own]


def _records(groups: Sequence[Group]) -> Any:
    from minigrpo.evaluation.statistics import score_groups

    return _plain(score_groups(groups).answers)


def _answer_fault(file: Path, name: str, then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    for sibling, (old, new) in enumerate(zip(then, now, strict=True), 1):
        names = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in GIVEN]
        if names:
            pairs = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in names[:4])
            return f"{file}: answer {sibling} to prompt {name}, asked again: {pairs}."
    return f"{file}: the answers to prompt {name}, asked again, are others."
