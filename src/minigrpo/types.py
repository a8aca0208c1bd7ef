"""The data types that all packages share, frozen. No torch here.

A Task gives a Prompt; an Engine answers it with G Completions; the task grades each text; prompt, completions and
grades are a Group, the unit of everything: sampled, graded, compared and logged together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Message = Mapping[str, Any]
"""One turn of a conversation: {"role": ..., "content": ...}, both text; an assistant's may have tool_calls beside."""

Finish = Literal["stop", "length"]
"""Why a completion ended: the model stopped, or the limit cut it off."""

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question. The model sees `messages`; only the grader sees `target`. `id` is unique within its task."""

    id: str
    messages: tuple[Message, ...]
    target: Any = None


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as the model reads it: the chat template applied, tokenised once."""

    prompt: Prompt
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn: from softmax(logits / temperature); temperature 0 takes the likeliest token.

    `seed` names the random stream: the same (seed, prompt id, sibling) draws the same numbers, whatever else is in
    the batch.
    """

    temperature: float = 1.0
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer. `token_ids` *are* the sample (the stop token included): nothing is tokenised again.

    `logprobs`: the sampler's own log-probability of each token, at the sampling temperature, in nats. `opening`: the
    beginning of the answer's form, where it stands in the prompt already (`models/chat_template.py`). `sampler`: the
    server that sampled it, where there are several.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    opening: str = ""
    sampler: str = ""

    @property
    def answer(self) -> str:
        """Return what is graded: the text, with what the prompt began of it."""
        return self.opening + self.text


@dataclass(frozen=True, slots=True)
class Grade:
    """What a completion earned. `reward` is what training sees; `parts` are its unweighted pieces, by name.

    `formed`: the answer had the asked-for form, so that it could be judged at all. `solved`: it is right. `weights`:
    what each part counts in the sum (1 where it is not named). `notes` are logged beside the completion, `metrics`
    beside the figures of the step. `answer`: what it said, in a form that is the same for the same answer, for a vote
    among samples; None where it said nothing that can be compared. A reward of NaN means that it could not be told (no
    function applied, or the grader hung): the completion is left out of its group's comparison.
    """

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    formed: bool = True
    solved: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = None

    @property
    def scored(self) -> bool:
        return not math.isnan(self.reward)


@dataclass(frozen=True, slots=True)
class Group:
    """The G completions of one prompt with their grades, in sibling order."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    grades: tuple[Grade, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(grade.reward for grade in self.grades)

    @property
    def spread(self) -> float:
        """Return the largest minus the smallest reward; a group with spread 0 has no gradient."""
        known = [grade.reward for grade in self.grades if grade.scored]
        return max(known) - min(known) if known else 0.0


RewardFunction = Callable[[Prompt, str], float]
"""Returns the reward of one completion's text."""


@dataclass(frozen=True, slots=True)
class Task:
    """A source of prompts with a grader for their completions.

    `gold(prompt)` returns a right answer in full, so that anyone can check that the grader rewards it. `grade_group`,
    if given, grades all siblings at once, in their order, in place of `grade`. `unseen(prompt)` names what must not
    occur in training if the prompt is to be a fair test: None means the words of the prompt; a task whose prompts read
    alike, but are graded by something hidden, names each hidden thing. `grading_seconds(n)`, if given, is the longest
    that grading one completion takes within the task's own limits while n are graded side by side: no grader that takes
    less is taken for hung. `closing` is called when grading ends; it returns sentences for the user: what was asked of
    a model that judges, say.
    """

    name: str
    prompts: Callable[[Split], Sequence[Prompt]]
    grade: Callable[[Prompt, str], Grade]
    gold: Callable[[Prompt], str] | None = None
    about: str = ""
    grade_group: Callable[[Prompt, Sequence[Completion]], Sequence[Grade]] | None = None
    unseen: Callable[[Prompt], Sequence[str]] | None = None
    grading_seconds: Callable[[int], float] | None = None
    closing: Callable[[], Sequence[str]] | None = None


Ready = Callable[[int, tuple[Completion, ...]], None]
"""Called once for each prompt, with its index and completions, as soon as its last sibling has ended; in any order."""


Progress = Callable[[int, int], None]
"""Called while an engine decodes, every 16 tokens at least: (tokens sampled in this call, completions that ended)."""


class Engine(Protocol):
    """Whatever answers prompts, with the log-probability of each sampled token under softmax(logits / temperature).

    `is_exact`: whether float32 weights give the policy's own log-probabilities, up to rounding. Where they do not,
    the loss corrects for the difference (objective.importance). An engine that decodes a fixed number of completions
    side by side has that number as `rows`. One with `keeps_weights` may be asked in a thread while the policy's
    adapter is trained (rollout.ahead): it samples with what the last `update` gave it.
    """

    is_exact: bool

    def generate(
        self,
        prompts: Sequence[Rendered],
        n: int,
        sampling: Sampling,
        ready: Ready | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Return n completions of each prompt, in order. Raise MinigrpoError where a prompt leaves no room."""
        ...

    def update(self, policy: Any) -> None:
        """Take over the policy's weights as they are now."""
        ...
