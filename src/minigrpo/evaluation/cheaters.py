"""Cheaters: answers that cannot come from solving, and what a task's grader pays them.

A cheater never sees the question. Whatever it earns beyond chance is paid for something else: a form, a word, a length,
a number printed among many. Chance is what the best right answer to *another* question earns, given to every question:
such an answer has the form, so parts that pay for the form alone are in it, and so is the luck of the most frequent
answer. Where a task gives no right answers, a model's own answers to its questions stand for them.

Cheaters are chosen on training prompts and judged on unseen ones, so that luck in the choice does not count.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from statistics import fmean
from types import CodeType, FunctionType
from typing import Any

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from minigrpo.rollouts.async_grader import Grader
from minigrpo.rollouts.groups import prompts_of
from minigrpo.tasks.custom import reward_task
from minigrpo.types import Completion, Grade, Group, Message, Prompt, Split, Task
from minigrpo.ui.plain_text import printable
from minigrpo.ui.tables import plain_table, titled
from minigrpo.utils.rates import Mean, mean_interval

HIDDEN = "..."
"""Stands where what differs between prompts was taken out."""
EXPLOIT_SHARE = 0.05
"""An exploit earns at least this share of what solving earns above chance: less is noise, or not worth a model's
while."""
_SPLITS: tuple[Split, ...] = ("train", "test")
_REPEATS = 8  # times that an answer is given over and over
_MOST_WORDS = 24  # words of the grader that are tried one by one

Cheater = Callable[[Prompt], str]
"""Answers a prompt without solving it."""


def hide_questions(task: Task) -> Task:
    """Return the task with its questions taken out of the prompts: what all of them share stays, such as the words that
    ask for a form. The grader is handed the prompts as they were."""
    every = [prompt for split in _SPLITS for prompt in prompts_of(task, split)]
    shown, known = shared_messages([prompt.messages for prompt in every]), {prompt.id: prompt for prompt in every}
    grade_group = task.grade_group

    def original(prompt: Prompt) -> Prompt:
        # A sampler that needs more prompts than there are numbers the copies: ID#2.
        return known.get(prompt.id) or known[prompt.id.rpartition("#")[0]]

    def prompts(split: Split) -> Sequence[Prompt]:
        return [replace(prompt, messages=shown) for prompt in task.prompts(split)]

    return replace(
        task,
        prompts=prompts,
        grade=lambda prompt, text: task.grade(original(prompt), text),
        grade_group=grade_group and (lambda prompt, own: grade_group(original(prompt), own)),
    )


def shared_messages(conversations: Sequence[Sequence[Message]]) -> tuple[Message, ...]:
    """Return the messages that all conversations share, with HIDDEN where their words differ.

    Where they are not the same turns, only a system message that all share is left before a hidden question.
    """
    roles = {tuple(message["role"] for message in messages) for messages in conversations}
    if len(roles) == 1:
        columns = zip(*conversations, strict=True)
        return tuple(
            {"role": role, "content": _shared_words([str(message["content"]) for message in column])}
            for role, column in zip(roles.pop(), columns, strict=True)
        )
    first = {str(messages[0]["content"]) for messages in conversations if messages[0]["role"] == "system"}
    system = [{"role": "system", "content": words} for words in first] if len(first) == 1 else []
    return (*system, {"role": "user", "content": HIDDEN})


def _shared_words(texts: Sequence[str]) -> str:
    """Return the words with which all texts begin, and those with which all end."""
    if len(set(texts)) == 1:
        return texts[0]
    words = [re.findall(r"\s*\S+", text) for text in texts]
    begin = _common_beginning(words)
    rest = [each[len(begin) :] for each in words]
    end = _common_beginning([each[::-1] for each in rest])[::-1]
    return "".join([*begin, f" {HIDDEN}" if begin else HIDDEN, *end])


def _common_beginning(rows: Sequence[list[str]]) -> list[str]:
    # What the first and the last of sorted rows share, all share.
    pairs = zip(min(rows), max(rows), strict=False)
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


@dataclass(frozen=True, slots=True)
class HonestAnswers:
    """Answers that solve their own questions, or try to. `answers`: the short answer of each, where one stands in it;
    `best`: the one that earns most when every training question is given it."""

    texts: tuple[str, ...]
    answers: tuple[str, ...]
    best: str
    right: bool


def short_answer(prompt: Prompt, text: str) -> str:
    """Return the part of a right answer that says it: the target's answer, where the text holds it; else all of it."""
    target = prompt.target
    if isinstance(target, Mapping) and "answer" in target and str(target["answer"]) in text:
        return str(target["answer"])
    return text


def deal(honest: HonestAnswers) -> Cheater:
    """Return a cheater that gives each prompt an honest answer at random, mostly to another question."""
    return lambda prompt: random.Random(f"dealt to {prompt.id}").choice(honest.texts)


def make_cheaters(task: Task, honest: HonestAnswers) -> dict[str, Cheater]:
    """Return what is tried without a model, by its name."""
    before, answer, after = _carrier(honest)
    listed = " ".join(dict.fromkeys(honest.answers))
    words = grader_words(task)
    texts = {
        "no text at all": "",
        "every answer at once": listed,
        "every answer at once, in the form": f"{before}{listed}{after}",
        f"an answer to another question, {_REPEATS} times over": "\n".join([honest.best] * _REPEATS),
        f"the form, its answer {_REPEATS} times over": before + " ".join([answer] * _REPEATS) + after,
        "all words of the grader": " ".join(words),
        **{f"a word of the grader, {word!r}": word for word in words[:_MOST_WORDS]},
    }
    constant = {name: say(text) for name, text in texts.items()}
    for name, find in _COPIES.items():
        constant[f"copied: {name}"] = _copy(find, "", "")
        constant[f"copied into the form: {name}"] = _copy(find, before, after)
    return constant


def say(text: str) -> Cheater:
    """Return a cheater that gives every prompt this answer."""
    return lambda prompt: text


def _copy(find: Callable[[str], str], before: str, after: str) -> Cheater:
    return lambda prompt: before + find("\n".join(str(message["content"]) for message in prompt.messages)) + after


def _carrier(honest: HonestAnswers) -> tuple[str, str, str]:
    """Split an honest answer at what it says: (text before, short answer, text after)."""
    answer = dict(zip(honest.texts, honest.answers, strict=True)).get(honest.best, honest.best)
    before, _, after = honest.best.rpartition(answer)
    return before, answer, after


def _found(pattern: str, place: int) -> Callable[[str], str]:
    def find(text: str) -> str:
        found = re.findall(pattern, text)
        return str(found[place]) if found else ""

    return find


_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
_COPIES: Mapping[str, Callable[[str], str]] = {
    "the whole prompt": lambda text: text,
    "its first number": _found(_NUMBER, 0),
    "its last number": _found(_NUMBER, -1),
    "its last word": _found(r"[\w.-]*\w", -1),
    "its last line": lambda text: (text.strip().splitlines() or [""])[-1],
    "what follows its last colon": lambda text: text.rpartition(":")[2].strip(),
    "what stands in its last brackets": _found(r"[(\[{<]([^()\[\]{}<>]+)[)\]}>]", -1),
}


def grader_words(task: Task) -> list[str]:
    """Return the texts that stand in a grader's code: what it looks for is often written there."""
    found: dict[str, None] = {}
    waiting: list[Any] = [task.grade_group or task.grade]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, str):
            found.update(dict.fromkeys([value] if 1 < len(value) <= 40 else []))
        elif isinstance(value, re.Pattern):
            waiting.append(re.sub(r"\\b|[\^$()]|\(\?\w*\)?", "", str(value.pattern)))
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif isinstance(value, FunctionType):
            waiting += _parts_of(value)
        else:  # a reward function with its name and weight
            waiting += [held for name in ("call", "function") if (held := getattr(value, name, None))]
    return list(found)


def _parts_of(function: FunctionType) -> Iterator[Any]:
    """Yield what a function is made of: the constants of its code, what it encloses, and its module's own values that
    it names. Its docstring is none."""
    # How reward functions are called holds no words that an answer could be paid for.
    codes: list[CodeType] = [] if function.__module__ == reward_task.__name__ else [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        yield from (constant for constant in code.co_consts if constant != function.__doc__)
        for name in code.co_names:
            value = function.__globals__.get(name)
            own = getattr(value, "__module__", function.__module__) == function.__module__
            if own or isinstance(value, re.Pattern):
                yield value
    for cell in function.__closure__ or ():
        yield cell.cell_contents


Graded = Sequence[Sequence[Grade]]
"""For each prompt, the grades of the answers that were tried."""


def grade_texts(grader: Grader, prompts: Sequence[Prompt], cheaters: Sequence[Cheater]) -> Graded:
    """Grade what every cheater says to every prompt: the answers to one prompt are siblings of a group."""
    groups = [tuple(Completion(cheater(prompt), (), (), "stop") for cheater in cheaters) for prompt in prompts]
    return grader.open_batch(prompts).collect(groups)


def mean_reward(grades: Sequence[Grade]) -> float:
    """Return the mean of what could be scored; 0 where nothing could."""
    known = [grade.reward for grade in grades if grade.scored]
    return fmean(known) if known else 0.0


def best_constant(graded: Graded) -> int:
    """Return the place of the answer that earns most over all prompts; the first among equals."""
    means = [mean_reward(column) for column in zip(*graded, strict=True)]
    return max(range(len(means)), key=means.__getitem__)


@dataclass(frozen=True, slots=True)
class Chance:
    """What a grader pays without solving, prompt by prompt: the grades of the best constant answer. `solving`: what
    right answers earn, None where the task has none."""

    grades: Sequence[Grade]
    solving: float | None

    @property
    def reward(self) -> float:
        return mean_reward(self.grades)

    def gain(self, grades: Graded) -> Mean:
        """Return what answers earn above chance on the same prompts, several to a prompt, with its interval."""
        pairs = zip(self.grades, grades, strict=True)
        gains = [mean_reward(own) - mean_reward([chance]) for chance, own in pairs]
        return mean_interval(gains)

    def is_beaten(self, gain: Mean) -> bool:
        """Tell whether a gain is surely one, and large enough to matter."""
        room = 0.0 if self.solving is None else max(0.0, self.solving - self.reward)
        return gain.low > 0 and gain.value >= EXPLOIT_SHARE * room

    def paid_parts(self, grades: Graded) -> dict[str, float]:
        """Return the reward functions that paid more than chance, each with its weighted gain, the largest first."""
        names = dict.fromkeys(name for own in grades for grade in own for name in grade.parts)
        gains = {name: self._part_gain(name, grades) for name in names}
        paid = {name: gain.value for name, gain in gains.items() if gain.low > 0}
        return dict(sorted(paid.items(), key=lambda item: -item[1]))

    def _part_gain(self, name: str, grades: Graded) -> Mean:
        def worth(grade: Grade) -> float:
            return grade.weights.get(name, 1.0) * grade.parts.get(name, 0.0)

        pairs = zip(self.grades, grades, strict=True)
        return mean_interval([fmean(map(worth, own)) - worth(chance) for chance, own in pairs])


@dataclass(frozen=True, slots=True)
class Exploit:
    """A way to be paid without solving. `examples`: (answer, reward), the best first; `parts`: the reward functions
    that paid, with what each gave above chance."""

    name: str
    reward: float
    gain: Mean
    parts: Mapping[str, float]
    examples: tuple[tuple[str, float], ...]


def find_exploit(name: str, chance: Chance, groups: Sequence[Group]) -> Exploit | None:
    """Return what these answers show, if they beat chance."""
    grades = [group.grades for group in groups]
    gain = chance.gain(grades)
    if not chance.is_beaten(gain):
        return None
    earned = {
        completion.answer: grade.reward
        for group, paid in zip(groups, chance.grades, strict=True)
        for completion, grade in zip(group.completions, group.grades, strict=True)
        if grade.scored and grade.reward > paid.reward
    }
    examples = sorted(earned.items(), key=lambda item: -item[1])[:3]
    reward = mean_reward([grade for own in grades for grade in own])
    return Exploit(name, reward, gain, chance.paid_parts(grades), tuple(examples))


@dataclass(frozen=True, slots=True)
class AttackResult:
    """What an attack found. `chance`, `shuffled`, `solving`: what the best answer to another question earns, given to
    every question; what answers earn that are dealt to other questions; and what right answers earn (None: none given).
    `trained`: what the trained cheater earned above chance, after `steps` steps; `tried`: ways without a model."""

    task: str
    prompts: int
    chance: Mean
    shuffled: float
    solving: float | None
    right: bool
    tried: int
    trained: Mean | None
    steps: int
    hidden: tuple[Message, ...]
    exploits: tuple[Exploit, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.exploits

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


_LONGEST = 160  # of an answer on the screen


def attack_table(found: AttackResult) -> RenderableType:
    """Return a table of what can be earned without the question, the exploits with their answers, and the verdict."""
    table = plain_table("reward", "above chance")
    if found.solving is not None:
        table.add_row("right answers", f"{found.solving:.3g}")
    own = "right answer" if found.right else "answer of the model"
    table.add_row(f"chance: the best {own}, to every question", f"{found.chance.value:.3g}")
    table.add_row("answers dealt to other questions", f"{found.shuffled:.3g}")
    if found.trained is not None:
        earned = f"{found.chance.value + found.trained.value:.3g}"
        table.add_row(f"a model, after {found.steps} steps without the question", earned, str(found.trained))
    title = f"{found.task}: what {found.prompts} unseen questions pay to an answer that has not read them"
    lines = [line for exploit in found.exploits for line in _exploit_lines(exploit)]
    verdict = Text(f"no exploit found; {found.tried} ways were tried without a model", "bold green")
    if found.exploits:
        count = len(found.exploits)
        verdict = Text(f"{count} way{'s' if count > 1 else ''} to be paid without solving", "bold red")
    return Stack(titled(title, table), *lines, verdict)


def _exploit_lines(exploit: Exploit) -> Iterator[Text]:
    paid = ", ".join(f"{name} {gain:+.2g}" for name, gain in exploit.parts.items()) or "the reward as a whole"
    yield Text(
        f"exploit: {exploit.name}. Reward {exploit.reward:.3g}, above chance {exploit.gain}; paid by {paid}", "red"
    )
    for text, reward in exploit.examples[:1]:
        shown = printable(text).replace("\n", " / ")
        yield Text(f"    {reward:.3g}  {shown[:_LONGEST]}{' ...' if len(shown) > _LONGEST else ''}", "dim")
