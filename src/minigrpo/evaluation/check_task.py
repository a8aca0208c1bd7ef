"""Check whether a task is fit to train on: answers that should earn all or nothing, graded without a model.

GRPO finds whatever a reward pays for. This shows in seconds what it should not pay for: right answers that earn too
little, empty or wrong ones that earn as much, scores that change from call to call, prompts in both splits.

Not covered: clever wrong answers. A grader that passes may still be fooled by others than these: an attack
(pipeline/attack.py) looks for them.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from minigrpo.config.schema import TaskConfig
from minigrpo.errors import TaskError
from minigrpo.rollouts.async_grader import Grader
from minigrpo.rollouts.grading import gold_answer
from minigrpo.rollouts.groups import prompts_of
from minigrpo.tasks.common.rewards import shorten_repr
from minigrpo.types import Completion, Grade, Prompt, Split, Task
from minigrpo.ui.tables import plain_table, titled

_SPLITS: tuple[Split, ...] = ("train", "test")
_LONG_CHARS = 100_000  # more than any completion limit allows
_MAX_FAILURES = 3  # a grader that raises does so on every prompt
_SLOW_S = 0.1  # per completion; grading a step of 256 would take half a minute
_ANSWER_KINDS: Mapping[str, str] = {
    "gold": "right answer",
    "empty": "no text at all",
    "other": "right answer of another prompt",
    "noise": "right answer, digits or letters changed",
    "long": "very long text",
    "unicode": "random characters",
}
_WRONG_KINDS = ("other", "noise", "long", "unicode")


@dataclass(frozen=True, slots=True)
class AnswerKindScores:
    """The rewards of one kind of answer; rewards are None where none could be scored."""

    name: str
    about: str
    count: int
    mean: float | None
    low: float | None
    high: float | None
    solved: float


@dataclass(frozen=True, slots=True)
class TaskFinding:
    """A finding and what to change. `stops`: training on this task would go wrong; others are worth a look."""

    what: str
    change: str
    stops: bool = True


@dataclass(frozen=True, slots=True)
class TaskCheck:
    """The result of a check. `seconds`: the mean time to grade one completion."""

    task: str
    prompts: Mapping[str, int]
    kinds: tuple[AnswerKindScores, ...]
    faults: tuple[TaskFinding, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return not any(fault.stops for fault in self.faults)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True, slots=True)
class _Trial:
    """One answer to one prompt, graded twice."""

    prompt: Prompt
    kind: str
    text: str
    first: Grade
    second: Grade


def check_task(task: Task, config: TaskConfig, limit: int = 32) -> TaskCheck:
    """Grade made-up answers to `limit` prompts, half of each split. Raise TaskError where a split has none."""
    every = {split: list(prompts_of(task, split)) for split in _SPLITS}
    asked = [prompt for prompts in every.values() for prompt in sample_evenly(prompts, max(1, limit // 2))]
    faults: list[TaskFinding] = []
    trials: list[_Trial] = []
    began = time.perf_counter()
    with Grader.of(task, config) as grader:
        for prompt in asked:
            found = _grade_twice(grader, task, prompt, asked)
            trials += found if isinstance(found, list) else []
            faults += [found] if isinstance(found, TaskFinding) else []
            if len(faults) == _MAX_FAILURES:
                break
    seconds = (time.perf_counter() - began) / max(1, 2 * len(trials))
    faults += [*_scoring_faults(task, trials), *_split_faults(task, every)]
    if seconds > _SLOW_S:
        change = "Raise --task.workers: groups are graded while others are sampled."
        faults.append(TaskFinding(f"Grading takes {seconds:.2g} s a completion.", change, stops=False))
    counts: dict[str, int] = {split: len(prompts) for split, prompts in every.items()}
    return TaskCheck(task.name, counts, tuple(_summarize_kinds(trials)), tuple(faults), seconds)


_PLACEHOLDERS = {"long": "very long", "unicode": "random characters"}
"""Descriptions in place of texts that are unreadable in a message."""


def sample_evenly(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return up to `count` prompts, evenly spaced, because files are often sorted."""
    return [prompts[i * len(prompts) // count] for i in range(count)] if len(prompts) > count else list(prompts)


def _make_answers(task: Task, prompt: Prompt, asked: Sequence[Prompt]) -> dict[str, str]:
    """Return the texts to grade by their kind."""
    rng = random.Random(f"check-task {prompt.id}")
    texts = {"empty": "", "long": "and so on " * (_LONG_CHARS // 10), "unicode": _random_characters(rng)}
    if task.gold is None:
        return texts
    gold = gold_answer(task, prompt)
    strangers = [one for one in asked if _target_key(one) != _target_key(prompt)]
    other = gold_answer(task, rng.choice(strangers)) if strangers else gold
    answers = {"gold": gold, "other": other, "noise": _shift_characters(gold)}
    return {kind: text for kind, text in answers.items() if kind == "gold" or text != gold} | texts


def _target_key(prompt: Prompt) -> str:
    target = prompt.target
    return repr(target["answer"] if isinstance(target, Mapping) and "answer" in target else target)


def _shift_characters(text: str) -> str:
    """Replace every digit by the next one, or letters if there is no digit. Tags stay, so that the form stays valid."""
    if any(letter.isdecimal() and letter.isascii() for letter in text):
        return text.translate(str.maketrans("0123456789", "1234567890"))
    body, tag = [], False
    for letter in text:
        tag = letter == "<" or (tag and letter != ">")
        shifts = not tag and letter.isascii() and letter.isalpha() and letter not in "zZ"
        body.append(chr(ord(letter) + 1) if shifts else letter)
    return "".join(body)


def _random_characters(rng: random.Random) -> str:
    """Return characters of all planes except lone surrogates, which no tokenizer produces."""
    places = (rng.randrange(0x110000) for _ in range(400))
    return "".join(chr(place) for place in places if not 0xD800 <= place <= 0xDFFF)


def _grade_twice(grader: Grader, task: Task, prompt: Prompt, asked: Sequence[Prompt]) -> list[_Trial] | TaskFinding:
    """Grade the answers as siblings of one group, twice, in the threads that training grades in."""
    texts = _make_answers(task, prompt, asked)
    group = tuple(Completion(text, (), (), "stop") for text in texts.values())
    try:
        first, second = grader.open_batch([prompt, prompt]).collect([group, group])
    except TaskError as fault:
        return TaskFinding(str(fault), "Training would end here.")
    return [_Trial(prompt, *each) for each in zip(texts, texts.values(), first, second, strict=True)]


def _scoring_faults(task: Task, trials: Sequence[_Trial]) -> Iterator[TaskFinding]:
    by_prompt: dict[str, dict[str, _Trial]] = {}
    for trial in trials:
        by_prompt.setdefault(trial.prompt.id, {})[trial.kind] = trial
    groups = list(by_prompt.values())
    yield from _report_trials(
        "gives another score when asked again",
        [trial for trial in trials if not _same_grade(trial.first, trial.second)],
        len(trials),
        "A reward must depend on prompt and answer alone.",
    )
    late = [trial for trial in trials if "took longer" in str(trial.first.notes.get("grader"))]
    yield from _report_trials("takes too long", late, len(trials), "Mend what hangs, or raise --task.seconds.")
    if trials and not any(trial.first.scored for trial in trials):
        yield TaskFinding("No answer could be scored at all.", "At least one function must apply to each prompt.")
        return
    if task.gold is None:
        yield TaskFinding(
            "The task gives no right answers, so none could be tried.", "Give it `gold(prompt) -> text`.", stops=False
        )
    constant = list(_constant_faults(trials))
    # Where every answer earns the same, the other findings follow from that.
    yield from () if any(fault.stops for fault in constant) else _earning_faults(groups)
    yield from constant


def _earning_faults(groups: Sequence[Mapping[str, _Trial]]) -> Iterator[TaskFinding]:
    """Yield wrong answers that are paid for, and right ones that do not count as solved."""
    golds = [group["gold"] for group in groups if "gold" in group]
    yield from _report_trials(
        "does not count the right answer as solved",
        [trial for trial in golds if not trial.first.solved],
        len(golds),
        "Is `gold` written in the form that the grader reads?",
    )
    empty = [group["empty"] for group in groups]
    yield from _report_trials(
        "pays for an empty answer",
        [trial for trial in empty if trial.first.reward > 0],
        len(empty),
        "Saying nothing would be learned first: give it 0.",
    )
    for kind in _WRONG_KINDS:
        pairs = [(group[kind], group["gold"]) for group in groups if {kind, "gold"} <= group.keys()]
        as_much = [wrong for wrong, gold in pairs if wrong.first.reward >= gold.first.reward]
        change = "Training would find that sooner than the right answer."
        yield from _report_trials(
            f"pays as much for the {_ANSWER_KINDS[kind]} as for the right one", as_much, len(pairs), change
        )


def _constant_faults(trials: Sequence[_Trial]) -> Iterator[TaskFinding]:
    rewards = {trial.first.reward for trial in trials if trial.first.scored}
    if len(rewards) == 1:
        golds, reward = [trial for trial in trials if trial.kind == "gold"], rewards.pop()
        if golds and reward <= 0:
            what = f"Every answer earns {reward:g}, also the right one ({shorten_repr(golds[0].text)})."
            yield TaskFinding(what, "Is `gold` written in the form that the grader reads?", stops=True)
        else:
            yield TaskFinding(f"Every answer earns {reward:g}.", "Siblings that tie teach nothing.", stops=bool(golds))
        return
    names = {name for trial in trials for name in trial.first.parts}
    for name in sorted(names):
        values = {trial.first.parts[name] for trial in trials if name in trial.first.parts}
        if len(values) == 1:
            what = f"{name} is {values.pop():g} for every answer."
            yield TaskFinding(what, "A constant adds nothing to what siblings are compared by.", stops=False)


def _split_faults(task: Task, every: Mapping[Split, Sequence[Prompt]]) -> Iterator[TaskFinding]:
    """Yield prompts in both splits, or twice in one: by their text, or by what the task names in its place."""
    ids = {split: {prompt.id for prompt in prompts} for split, prompts in every.items()}
    if shared := sorted(ids["train"] & ids["test"]):
        change = "Ids name random streams and prompts in files: make them differ."
        yield TaskFinding(f"{len(shared)} ids stand in both splits, such as {shared[0]}.", change)
    unseen = task.unseen or (lambda prompt: (_prompt_key(prompt),))
    data = {split: [tuple(unseen(prompt)) for prompt in prompts] for split, prompts in every.items()}
    trained = {one for prompt in data["train"] for one in prompt}
    seen = [one.id for one, held in zip(every["test"], data["test"], strict=True) if not trained.isdisjoint(held)]
    if seen:
        alike = "are judged by what train is judged by too" if task.unseen else "stand in train word for word"
        change = "Then an evaluation measures memory. Take them out of one split."
        yield TaskFinding(f"{len(seen)} test prompts {alike}, such as {seen[0]}.", change)
    for split, prompts in data.items():
        if twice := len(prompts) - len(set(prompts)):
            change = "They count that much more often; take them out if that is not meant."
            yield TaskFinding(f"{twice} {split} prompts repeat an earlier one.", change, stops=False)


def _prompt_key(prompt: Prompt) -> str:
    return json.dumps([dict(message) for message in prompt.messages], sort_keys=True)


def _report_trials(what: str, trials: Sequence[_Trial], out_of: int, change: str) -> Iterator[TaskFinding]:
    """Yield one finding for all these trials, with the first as an example."""
    if trials:
        example = trials[0]
        earned = f"{example.first.reward:g}" if example.first.scored else "nothing that could be told"
        text = _PLACEHOLDERS.get(example.kind) or repr(example.text[:60]) + (" ..." if len(example.text) > 60 else "")
        yield TaskFinding(
            f"The grader {what}: {len(trials)} of {out_of}, such as prompt {example.prompt.id}, {text}, "
            f"which earned {earned}.",
            change,
        )


def _same_grade(first: Grade, second: Grade) -> bool:
    rewards = first.reward == second.reward or (math.isnan(first.reward) and math.isnan(second.reward))
    return rewards and first.solved == second.solved and dict(first.parts) == dict(second.parts)


def _summarize_kinds(trials: Sequence[_Trial]) -> Iterator[AnswerKindScores]:
    for name, about in _ANSWER_KINDS.items():
        grades = [trial.first for trial in trials if trial.kind == name]
        known = [grade.reward for grade in grades if grade.scored]
        if grades:
            mean = math.fsum(known) / len(known) if known else None
            solved = sum(grade.solved for grade in grades) / len(grades)
            yield AnswerKindScores(
                name, about, len(grades), mean, min(known, default=None), max(known, default=None), solved
            )


def task_check_table(check: TaskCheck) -> RenderableType:
    """Return a table of what each kind of answer earned, and what to change."""
    table = plain_table("tried", "mean", "low", "high", "right")
    for kind in check.kinds:
        earned = ["-" if value is None else f"{value:.3g}" for value in (kind.mean, kind.low, kind.high)]
        table.add_row(kind.about, str(kind.count), *earned, f"{kind.solved:.0%}")
    prompts = ", ".join(f"{count} {split}" for split, count in check.prompts.items())
    title = f"{check.task}: {prompts} prompts; {1000 * check.seconds:.2g} ms to grade a completion"
    lines = [
        Text(
            f"{'change this' if fault.stops else 'note'}: {fault.what} {fault.change}",
            "red" if fault.stops else "yellow",
        )
        for fault in check.faults
    ]
    fit = "fit to train on" + ("" if any(kind.name == "gold" for kind in check.kinds) else ", as far as could be tried")
    verdict = Text(fit, "bold green") if check.ok else Text("not yet fit to train on", "bold red")
    return Stack(titled(title, table), *lines, verdict)
