"""Supervised warm-up for a model that never shows the form that the task asks for.

GRPO strengthens what a model does sometimes. What it never does can be shown to it: right answers, written by the task
itself or by a person, are imitated for a few steps. Only the adapter learns, by the same code as the embedded model.

Not covered: dropout. lora.dropout is off here, for its masks are named by the tokens of GRPO's passes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from minigrpo.config.schema import Recipe, WarmupConfig
from minigrpo.errors import DivergenceError, MinigrpoError, RecipeError, TaskError
from minigrpo.models.chat_template import after_opening, opening, render, whole_answer
from minigrpo.models.logprobs import OutputHead
from minigrpo.models.policy import Policy
from minigrpo.models.sft import PassLimit, SftExample, SftSchedule, mean_sft_loss, train_sft
from minigrpo.rollouts.engines.registry import release_caches
from minigrpo.rollouts.grading import gold_answer, judge
from minigrpo.rollouts.groups import prompts_of, rollout
from minigrpo.tasks.common.dataset import check_prompt, has_half_character, read_json_lines
from minigrpo.training.memory.machine import tokens_per_pass
from minigrpo.training.prompt_sampler import split_held_out
from minigrpo.types import Engine, Message, Prompt, Sampling, Task
from minigrpo.ui.progress import Report, no_report
from minigrpo.utils.paths import user_path
from minigrpo.utils.rng import name_key

HELD_ASIDE_SHARE = 0.1
"""Share of the prompts whose answers are not taught, to see whether the others are learned or learned by heart."""

MEASURED_EXAMPLES = 64
FORM_PROMPTS = 32
FORM_ANSWERS = 64

MAX_LOGITS = 128 << 20
"""Logits of one pass: 512 MB in float32, and three times that with what their gradient needs."""


@dataclass(frozen=True, slots=True)
class WrittenAnswer:
    """A right answer to a prompt, and its source (`place`). `known`.

    It is a prompt of the task, which can judge answers.
    """

    prompt: Prompt
    answer: str
    place: str
    known: bool


@dataclass(frozen=True, slots=True)
class WarmupMeasure:
    """`formed`: share of sampled answers that have the form. Losses are nats per token of the written answers."""

    formed: float
    loss: float
    held_aside: float


@dataclass(frozen=True, slots=True)
class WarmupResult:
    """What a warm-up did: how many answers it taught, how many it held aside, and what changed."""

    lessons: int
    held_aside: int
    before: WarmupMeasure
    after: WarmupMeasure
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def warmup(recipe: Recipe, task: Task, policy: Policy, engine: Engine, report: Report = no_report) -> WarmupResult:
    """Let the policy's adapter imitate written answers.

    Raises RecipeError where warmup.steps is 0, TaskError where there are no answers or one cannot be used, and
    DivergenceError where the loss is not finite.
    """
    config = recipe.warmup
    taught, aside = prepare_answers(recipe, task)
    lessons, held_aside = tokenize_answers(taught, policy), tokenize_answers(aside, policy)
    release_caches(engine)
    tokens, head = tokens_per_pass(policy, recipe), OutputHead.of(policy.model, temperature=1.0)
    limit = PassLimit(tokens, tokens if head.is_frozen else max(1, MAX_LOGITS // head.weight_VD.shape[0]))

    def measure(steps: int, when: str) -> WarmupMeasure:
        def sampled(done: int, total: int = 0, note: str = "") -> None:
            report(steps, config.steps, f"the form of {total} answers {when}: {done} of them sampled; {note}")

        report(steps, config.steps, f"the loss of written answers {when}")
        engine.update(policy)
        with policy.plain_attention():
            losses = [mean_sft_loss(policy.model, kind[:MEASURED_EXAMPLES], limit) for kind in (lessons, held_aside)]
        return WarmupMeasure(form_rate(recipe, task, policy, engine, aside, report=sampled), *losses)

    def report_loss(done: int, loss: float) -> None:
        report(done, config.steps, f"loss {loss:.2f}")

    before = measure(0, "before")
    report(0, config.steps, "supervised steps begin")
    schedule = SftSchedule(config.steps, config.rows, config.lr, warmup=max(1, config.steps // 10))
    with policy.plain_attention():
        last = train_sft(policy.model, lessons, schedule, seed=recipe.seed, limit=limit, report=report_loss)
    if not math.isfinite(last):
        raise DivergenceError(
            f"The loss of the warm-up is {last}. Nothing was kept. Lower --warmup.lr, or set --model.dtype float32"
        )
    after = measure(config.steps, "now")
    warnings = (
        *answer_warnings(task, whole_answers(taught, policy), lessons, recipe.rollout.max_tokens),
        *memorised_warnings(before, after),
        *too_short_warnings(config, after),
    )
    return WarmupResult(len(lessons), len(held_aside), before, after, warnings)


def check_warmup(recipe: Recipe, task: Task, policy: Policy) -> None:
    """Raise what `warmup` would raise about the answers, before anything is done."""
    for answers in prepare_answers(recipe, task):
        tokenize_answers(answers, policy)


def prepare_answers(recipe: Recipe, task: Task) -> tuple[list[WrittenAnswer], list[WrittenAnswer]]:
    """Return (answers to teach, answers held aside)."""
    require_warmup_steps(recipe.warmup)
    return split_answers(written_answers(recipe, task))


def require_warmup_steps(config: WarmupConfig) -> None:
    if not config.steps:
        raise RecipeError("warmup.steps is 0, so there is nothing to do. Say how long to warm up: --warmup.steps 60")


def written_answers(recipe: Recipe, task: Task) -> list[WrittenAnswer]:
    """Return as many answers as the steps can use, in random order.

    From the recipe's file, or the task's own right answers.
    """
    order = random.Random(f"warmup/{recipe.seed}")
    most = round(recipe.warmup.steps * recipe.warmup.rows / (1 - HELD_ASIDE_SHARE)) + 1
    training, judging = split_held_out(prompts_of(task, "train"), recipe.eval, recipe.seed)
    if recipe.warmup.data:
        unseen = {prompt.id for prompt in (*judging, *test_prompts(task))}
        found = list(read_answers(user_path(recipe.warmup.data), training, unseen))
        return order.sample(found, min(most, len(found)))
    if task.gold is None:
        raise TaskError(
            f"Task {task.name} cannot write right answers itself (it has no `gold`). Write some down, as lines of JSON "
            '{"prompt": ..., "completion": ...}, and name the file: --warmup.data FILE'
        )
    chosen = order.sample(training, min(most, len(training)))
    return [WrittenAnswer(prompt, gold(task, prompt), f"prompt {prompt.id}", known=True) for prompt in chosen]


def gold(task: Task, prompt: Prompt) -> str:
    answer = gold_answer(task, prompt)
    if not answer.strip():
        raise TaskError(f"The `gold` of task {task.name} gave {answer!r} on {prompt.id}. Return the text of an answer.")
    return answer


def read_answers(path: Path, training: Sequence[Prompt], unseen: set[str]) -> Iterator[WrittenAnswer]:
    """Yield the answers in a file. Raises TaskError, naming file and line, for the first that cannot be used.

    `unseen`: ids of prompts to be measured on, which must not be taught.
    """
    if not path.is_file():
        raise TaskError(f"{path} is missing. warmup.data asks for it; is the path right from {Path.cwd()}?")
    known = {prompt.id: prompt for prompt in training}
    try:
        rows = read_json_lines(path)
    except OSError as fault:
        raise TaskError(f"{path} cannot be read: {fault.strerror or fault}.") from None
    for place, row in rows:
        prompt, answer = parse_answer(row, place)
        yield make_written_answer(prompt, answer, place, known=known, unseen=unseen)


def test_prompts(task: Task) -> Sequence[Prompt]:
    try:
        return task.prompts("test")
    except TaskError:  # there is none, so none can be given away
        return ()


def parse_answer(row: Any, place: str) -> tuple[Any, str]:
    """Return the prompt, of any type, and the answer."""
    if not isinstance(row, dict) or "prompt" not in row or "completion" not in row:
        has = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise TaskError(f'{place}: it must have "prompt" and "completion"; it has {has or "nothing"}.')
    if not isinstance(row["completion"], str) or not row["completion"].strip():
        raise TaskError(f'{place}: "completion" must be the text of a right answer.')
    if has_half_character(row["completion"]):
        raise TaskError(f"{place}: its completion holds half a character (a lone surrogate), which is no text.")
    return row["prompt"], row["completion"]


def make_written_answer(
    prompt: Any, answer: str, place: str, *, known: dict[str, Prompt], unseen: set[str]
) -> WrittenAnswer:
    """Return the answer with its Prompt. `prompt`: an id of the task, a question, or messages."""
    if isinstance(prompt, str) and prompt in known:
        return WrittenAnswer(known[prompt], answer, place, known=True)
    if isinstance(prompt, str) and prompt in unseen:
        raise TaskError(
            f"{place}: {prompt!r} is a prompt to be measured on. Leave it out, or the figures mean nothing."
        )
    if not isinstance(prompt, str | list) or not prompt:
        raise TaskError(
            f'{place}: "prompt" must be a prompt id of the task, a question, or messages [{{"role", "content"}}, ...].'
        )
    asked = check_prompt(prompt, place)
    messages = ({"role": "user", "content": asked},) if isinstance(asked, str) else asked
    return WrittenAnswer(Prompt(place, messages), answer, place, known=False)


def split_answers(answers: Sequence[WrittenAnswer]) -> tuple[list[WrittenAnswer], list[WrittenAnswer]]:
    """Return (answers to teach, answers held aside).

    All answers to a prompt are on one side, or nothing would be held aside.
    """
    questions = list(dict.fromkeys(conversation_of(answer.prompt) for answer in answers))
    if len(questions) < 2:
        raise TaskError(
            f"A warm-up needs answers to two different prompts at least, of which one is held aside; here: "
            f"{len(questions)}. Raise task.size, or add lines to warmup.data."
        )
    aside = set(questions[: max(1, round(HELD_ASIDE_SHARE * len(questions)))])
    return [a for a in answers if conversation_of(a.prompt) not in aside], [
        a for a in answers if conversation_of(a.prompt) in aside
    ]


def conversation_of(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    messages: Sequence[Message] = prompt.messages
    return tuple((message["role"], message["content"]) for message in messages)


def tokenize_answers(answers: Sequence[WrittenAnswer], policy: Policy) -> list[SftExample]:
    """Tokenize answers, each ending with the eos token. Raises TaskError where some do not fit into the context."""
    tokenizer = policy.tokenizer
    context = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    rests = [after_opening(opening(tokenizer, a.prompt), a.answer) for a in answers]
    lessons = [
        SftExample(render(tokenizer, a.prompt).ids, answer_ids(rest, tokenizer))
        for a, rest in zip(answers, rests, strict=True)
    ]
    long = [(a, lesson) for a, lesson in zip(answers, lessons, strict=True) if context and len(lesson) > context]
    if long:
        places = ", ".join(answer.place for answer, _ in long[:5]) + (" ..." if len(long) > 5 else "")
        raise TaskError(
            f"{places}: with the answer that is {max(len(lesson) for _, lesson in long)} tokens, and the model reads "
            f"{context} at most. Shorten or leave out what is too long ({len(long)} in all)."
        )
    return lessons


def whole_answers(answers: Sequence[WrittenAnswer], policy: Policy) -> list[WrittenAnswer]:
    """Return the answers as they are graded, with what their prompts begin of them."""
    begun = [opening(policy.tokenizer, one.prompt) for one in answers]
    return [replace(one, answer=whole_answer(words, one.answer)) for one, words in zip(answers, begun, strict=True)]


def answer_ids(text: str, tokenizer: Any) -> tuple[int, ...]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return tuple(ids) if ids[-1:] == [end] else (*ids, end)


def form_rate(
    recipe: Recipe, task: Task, policy: Policy, engine: Engine, aside: Sequence[WrittenAnswer], *, report: Report
) -> float:
    """Return the share of sampled answers that have the form: to prompts held aside, or else to training ones."""
    prompts = list({a.prompt.id: a.prompt for a in aside if a.known}.values())[:FORM_PROMPTS]
    prompts = prompts or list(split_held_out(prompts_of(task, "train"), recipe.eval, recipe.seed)[0][:FORM_PROMPTS])
    sampling = Sampling(recipe.rollout.temperature, recipe.rollout.max_tokens, name_key(recipe.seed, "warmup"))
    n = max(1, FORM_ANSWERS // len(prompts))
    groups = rollout(engine, task, prompts, n=n, sampling=sampling, tokenizer=policy.tokenizer, report=report)
    return fmean(grade.formed for group in groups for grade in group.grades)


def answer_warnings(
    task: Task, taught: Sequence[WrittenAnswer], lessons: Sequence[SftExample], max_tokens: int
) -> Iterator[str]:
    """Yield warnings about the written answers themselves."""
    if long := sum(len(lesson.answer_ids) > max_tokens for lesson in lessons):
        yield (
            f"{long} of {len(lessons)} written answers are longer than rollout.max_tokens {max_tokens}: what imitates "
            "them will be cut off."
        )
    judged = [answer for answer in taught if answer.known][:FORM_PROMPTS]
    try:
        broken = [a for a in judged if not judge(task, a.prompt, a.answer).formed]
    except MinigrpoError as fault:
        yield f"The task could not judge the written answers: {fault}"
        return
    if broken:
        yield (
            f"{len(broken)} of {len(judged)} written answers lack the form that the task itself asks for, beginning "
            f"with {broken[0].place}."
        )
    if leaked := answers_to_tests(task, taught):
        yield (
            f"{len(leaked)} lessons answer a test prompt, beginning with {leaked[0].place}: what is measured on it "
            "means nothing."
        )


def answers_to_tests(task: Task, taught: Sequence[WrittenAnswer]) -> list[WrittenAnswer]:
    """Return the answers to what is measured: to the same question, or to what the task says must not be seen.

    A question alone need not say what is asked for: Sudoku's may name the same number of cells for other puzzles.
    """
    tests = test_prompts(task)
    if task.unseen is None:
        asked = {conversation_of(prompt) for prompt in tests}
        return [answer for answer in taught if conversation_of(answer.prompt) in asked]
    hidden = {key for prompt in tests for key in task.unseen(prompt)}
    return [answer for answer in taught if answer.known and not hidden.isdisjoint(task.unseen(answer.prompt))]


def memorised_warnings(before: WarmupMeasure, after: WarmupMeasure) -> Iterator[str]:
    if after.held_aside > 1.5 * after.loss + 0.1 or after.held_aside > before.held_aside:
        yield (
            f"The answers were learned by heart: the loss on them is {after.loss:.3f}, on those held aside "
            f"{after.held_aside:.3f}. More answers, fewer --warmup.steps or a lower --warmup.lr."
        )


def too_short_warnings(config: WarmupConfig, after: WarmupMeasure) -> Iterator[str]:
    if after.formed < 0.5:
        yield (
            f"Only {after.formed:.0%} of the answers have the form after the warm-up. Longer: --warmup.steps "
            f"{2 * config.steps}. Or faster: --warmup.lr {3 * config.lr:g}"
        )
