"""Reward functions of people, told apart by the names of their parameters.

    score(completion, answer) -> float | None                      per row: one completion at a time
    reward(prompts, completions, **columns) -> list[float | None]  TRL's signature: all siblings of one group at a time

A function takes what it names: a row's columns, and of TRL's extras completion_ids, trainer_state, log_extra and
log_metric. Where it has `**`, it is handed everything. Both kinds may be `async`. None means "does not apply".
Every call gets copies, so no function can change the rows, or what the next function sees.

Not covered: `trainer_state.global_step` is None, because a reward belongs to an answer and not to a moment, and
TRL's models as reward functions.
"""

from __future__ import annotations

import asyncio
import copy
import difflib
import inspect
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from minigrpo.errors import MinigrpoError, TaskError
from minigrpo.tasks.common.rewards import finite, shown
from minigrpo.types import Completion

Kind = Literal["row", "batch"]
ROW_NAMES = ("completion", "prompt")
BATCH_NAMES = ("completions", "prompts", "completion_ids", "trainer_state", "log_extra", "log_metric")
UNCHANGING = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Stands where TRL hands out its trainer's state."""

    global_step: int | None = None


@dataclass(frozen=True, slots=True)
class Function:
    """A reward function and how to call it. `needs`: parameters without a default."""

    name: str
    call: Callable[..., Any]
    kind: Kind
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    takes_all: bool


@dataclass(frozen=True, slots=True)
class GroupView:
    """One group as functions see it. `prompt`: text, or messages where the rows hold conversations."""

    id: str
    prompt: str | list[dict[str, str]]
    columns: Mapping[str, Any]
    completions: Sequence[Completion]

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass(slots=True)
class Logged:
    """What functions wrote with log_extra and log_metric while they judged one group."""

    size: int
    notes: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def extra(self, column: str, values: Any) -> None:
        listed = as_list(values)
        if listed is None or len(listed) != self.size:
            raise TaskError(f"log_extra({column!r}, ...) got {shown(values)}. Give a list of {self.size}, one each.")
        self.notes = self.notes or [{} for _ in range(self.size)]
        for note, value in zip(self.notes, listed, strict=True):
            note[str(column)] = value

    def metric(self, name: str, value: Any) -> None:
        if name == "step":
            raise TaskError("log_metric('step', ...): metrics.jsonl has a step already. Give it another name.")
        self.metrics.setdefault(str(name), []).append(finite(value, f"log_metric({name!r})", "this step"))


def parameters(value: Callable[..., Any], where: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        raise TaskError(f"{where} does not say which parameters it takes. Wrap it in a def of your own.") from None


def kind_of(value: object, where: str) -> Kind | None:
    """What a function is by its parameters; None for one that is no reward function (a builder of a Task, or data)."""
    if not callable(value) or inspect.isclass(value):
        return None
    found = parameters(value, where)
    names = [one.name for one in found]
    if any(name in names for name in ("completions", "prompts", "completion_ids")):
        return "batch"
    if "completion" in names:
        return "row"
    required = [one for one in found if one.default is one.empty and one.kind not in (one.VAR_KEYWORD,)]
    near = difflib.get_close_matches("completion", names, n=1, cutoff=0.75)
    if near or len(required) > 1:
        hint = f" Did you mean completion in place of {near[0]}?" if near else ""
        raise TaskError(
            f"{where} takes {', '.join(names)}, but no completion.{hint} A reward function has a parameter completion "
            "(one text) or completions (a list); a function that builds a task takes the Recipe alone."
        )
    return None


def read_function(value: Callable[..., Any], where: str) -> Function:
    """Raises TaskError where it cannot be called by names."""
    kind = kind_of(value, where)
    if kind is None:
        raise TaskError(f"{where} is no reward function: none of its parameters is `completion` or `completions`.")
    found = parameters(value, where)
    nameless = [one.name for one in found if one.kind in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL)]
    if nameless:
        raise TaskError(f"{where} takes {nameless[0]} by position alone. Reward functions are called by names.")
    named = [one for one in found if one.kind is not one.VAR_KEYWORD]
    name = getattr(value, "__name__", None) or type(value).__name__
    return Function(
        name=name,
        call=value,
        kind=kind,
        needs=tuple(one.name for one in named if one.default is one.empty),
        takes=tuple(one.name for one in named),
        takes_all=len(named) < len(found),
    )


def check_columns(function: Function, columns: Sequence[str], where: str) -> None:
    """Raises TaskError where a parameter is neither a column of the row nor one of ours."""
    ours = ROW_NAMES if function.kind == "row" else BATCH_NAMES
    missing = [name for name in function.needs if name not in ours and name not in columns]
    if not missing:
        return
    near = difflib.get_close_matches(missing[0], [*ours, *columns], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise TaskError(
        f"The reward function {function.name} asks for {missing[0]!r}, which {where} does not have.{hint} "
        f"There are: {', '.join([*ours, *columns])}."
    )


def scores(function: Function, asked: GroupView, logged: Logged) -> list[float | None]:
    """One number for each completion, or None where the function does not apply; raises TaskError for anything else."""
    if function.kind == "batch":
        return batch_scores(function, asked, logged)
    return [row_score(function, asked, one.text) for one in asked.completions]


def row_score(function: Function, asked: GroupView, text: str) -> float | None:
    given = {**asked.columns, "completion": text, "prompt": asked.prompt}
    where = f"prompt {asked.id}, answer {shown(text)}"
    value = called(function, fitting(function, given), where)
    return None if value is None else finite(value, function.name, where)


def batch_scores(function: Function, asked: GroupView, logged: Logged) -> list[float | None]:
    count = len(asked.completions)
    texts = [one.text for one in asked.completions]
    given = {
        **{name: [fresh(value) for _ in range(count)] for name, value in asked.columns.items()},
        "prompts": [fresh(asked.prompt) for _ in range(count)],
        "completions": [[{"role": "assistant", "content": text}] for text in texts]
        if asked.conversational
        else [*texts],
        "completion_ids": [list(one.token_ids) for one in asked.completions],
        "trainer_state": TrainerState(),
        "log_extra": logged.extra,
        "log_metric": logged.metric,
    }
    value = called(function, fitting(function, given, copied=True), f"prompt {asked.id}")
    listed = as_list(value)
    if listed is None or len(listed) != count:
        what = f"{len(listed)} numbers" if listed is not None else shown(value)
        raise TaskError(
            f"The reward function {function.name} gave {what} for the {count} completions of prompt {asked.id}. "
            f"Return a list of {count}, in their order."
        )
    wheres = [f"prompt {asked.id}, answer {shown(text)}" for text in texts]
    return [
        None if one is None else finite(one, function.name, where) for one, where in zip(listed, wheres, strict=True)
    ]


def fitting(function: Function, given: Mapping[str, Any], copied: bool = False) -> dict[str, Any]:
    """Of all there is, what the function takes; its own defaults hold for the rest."""
    names = given if function.takes_all else [name for name in function.takes if name in given]
    return {name: given[name] if copied else fresh(given[name]) for name in names}


def fresh(value: Any) -> Any:
    """A copy that may be changed. What cannot be copied (a lock, a handle) is handed out as it is."""
    if isinstance(value, UNCHANGING):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # deepcopy runs code of any class there is
        return value


def called(function: Function, given: dict[str, Any], where: str) -> Any:
    try:
        value = function.call(**given)
        return waited_for(value) if inspect.isawaitable(value) else value
    except MinigrpoError:
        raise
    except (Exception, SystemExit) as fault:
        last = traceback.extract_tb(fault.__traceback__)[-1]
        raise TaskError(
            f"The reward function {function.name} raised {type(fault).__name__}: {fault} "
            f"({last.filename}:{last.lineno}) on {where}. It must judge any text: return 0, or None for what it "
            "cannot judge."
        ) from fault


def waited_for(awaitable: Any) -> Any:
    """The result of an async function. A notebook has a loop running in this thread; then another thread waits."""

    async def whole() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(whole())
    found: list[Any] = []
    faults: list[BaseException] = []

    def run() -> None:
        try:
            found.append(asyncio.run(whole()))
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if faults:
        raise faults[0]
    return found[0]


def as_list(value: Any) -> list[Any] | None:
    """A list, tuple, array or tensor as a list; None for anything else, text above all."""
    if hasattr(value, "tolist") and not isinstance(value, list | tuple):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else None
