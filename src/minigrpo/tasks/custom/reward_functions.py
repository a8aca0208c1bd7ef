"""User-defined reward functions, whose kind follows from the names of their parameters.

    score(completion, answer) -> float | None                      per row: one completion at a time
    reward(prompts, completions, **columns) -> list[float | None]  TRL's signature: all siblings of one group at a time

A function is passed what its parameters name: a row's columns, and of TRL's extras completion_ids, trainer_state,
log_extra and log_metric. With `**` it is passed everything. Both kinds may be `async`. None means "does not apply".
Every call gets copies, so no function can change the rows, or what the next function sees.

Not covered: `trainer_state.global_step` is None, because a reward depends on the answer and not on the step, and TRL's
models as reward functions.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from minigrpo.errors import TaskError
from minigrpo.tasks.common.rewards import check_finite, shorten_repr
from minigrpo.types import Completion
from minigrpo.utils.event_loop import await_result
from minigrpo.utils.faults import told_as_task_error

FunctionKind = Literal["row", "batch"]
_ROW_PARAMETERS = ("completion", "prompt")
_BATCH_PARAMETERS = ("completions", "prompts", "completion_ids", "trainer_state", "log_extra", "log_metric")
_IMMUTABLE_TYPES = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, slots=True)
class TrainerState:
    """A stand-in for the trainer state that TRL passes."""

    global_step: int | None = None


@dataclass(frozen=True, slots=True)
class RewardCallable:
    """A reward function and how to call it. `needs`: parameters without a default; `takes_all`: it has `**`."""

    name: str
    call: Callable[..., Any]
    kind: FunctionKind
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    takes_all: bool


@dataclass(frozen=True, slots=True)
class GroupView:
    """One group as functions see it. `prompt`: text, or messages where the rows are conversations. `row`: its place."""

    id: str
    row: str
    prompt: str | list[dict[str, str]]
    columns: Mapping[str, Any]
    completions: Sequence[Completion]

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass(slots=True)
class RewardLog:
    """What functions logged with log_extra and log_metric for one group."""

    size: int
    notes: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def extra(self, column: str, values: Any) -> None:
        listed = _as_list(values)
        if listed is None or len(listed) != self.size:
            raise TaskError(
                f"log_extra({column!r}, ...) got {shorten_repr(values)}. Give a list of {self.size}, one each."
            )
        self.notes = self.notes or [{} for _ in range(self.size)]
        for note, value in zip(self.notes, listed, strict=True):
            note[str(column)] = value

    def metric(self, name: str, value: Any) -> None:
        if name == "step":
            raise TaskError("log_metric('step', ...): metrics.jsonl has a step already. Give it another name.")
        self.metrics.setdefault(str(name), []).append(check_finite(value, f"log_metric({name!r})", "this step"))


def _read_parameters(value: Callable[..., Any], where: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        raise TaskError(f"{where} does not say which parameters it takes. Wrap it in a def of your own.") from None


def function_kind(value: object, where: str) -> FunctionKind | None:
    """Return the kind of a function; None where it is no reward function (a builder of a Task, or data)."""
    if not callable(value) or inspect.isclass(value):
        return None
    found = _read_parameters(value, where)
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


def inspect_function(value: Callable[..., Any], where: str) -> RewardCallable:
    """Read the parameters of a reward function. Raise TaskError where it cannot be called by keyword."""
    kind = function_kind(value, where)
    if kind is None:
        raise TaskError(f"{where} is no reward function: none of its parameters is `completion` or `completions`.")
    found = _read_parameters(value, where)
    nameless = [one.name for one in found if one.kind in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL)]
    if nameless:
        raise TaskError(f"{where} takes {nameless[0]} by position alone. Reward functions are called by names.")
    named = [one for one in found if one.kind is not one.VAR_KEYWORD]
    return RewardCallable(
        name=_base_name(value),
        call=value,
        kind=kind,
        needs=tuple(one.name for one in named if one.default is one.empty),
        takes=tuple(one.name for one in named),
        takes_all=len(named) < len(found),
    )


def tell_apart(functions: Sequence[RewardCallable], names: Mapping[int, str]) -> list[RewardCallable]:
    """Give each function a name under which it is logged and weighted.

    `names`: the variables of the user's file that hold an object, by its id(). A function without a name of its own (a
    lambda, functools.partial, a callable object, a bound method, what a factory made) is called after its variable,
    else after what it was made of, with a number where several would be called alike.
    """
    owned = [_has_own_name(one.call) for one in functions]
    called = [
        one.name if own else names.get(id(one.call)) or _variable_of(one.call) or one.name
        for one, own in zip(functions, owned, strict=True)
    ]
    counts, seen = Counter(called), Counter[str]()
    twice = {key for key, count in Counter(id(one.call) for one in functions).items() if count > 1}
    taken = {name for name, own in zip(called, owned, strict=True) if own or counts[name] == 1}
    told = []
    for function, own, name in zip(functions, owned, called, strict=True):
        seen[name] += 1
        unique = name
        # The same object twice is a mistake, which the check of weights refuses.
        if not own and counts[name] > 1 and id(function.call) not in twice:
            numbers = range(seen[name], len(taken) + seen[name] + 1)
            unique = next(option for number in numbers if (option := f"{name}_{number}") not in taken)
            taken.add(unique)
        told.append(replace(function, name=unique))
    return told


def _has_own_name(value: Callable[..., Any]) -> bool:
    """Tell whether the value comes from a `def` that makes no other function of that name."""
    name, place = getattr(value, "__name__", ""), str(getattr(value, "__qualname__", "<locals>"))
    return inspect.isfunction(value) and name != "<lambda>" and "<locals>" not in place


def _base_name(value: Callable[..., Any]) -> str:
    """Return a function's name, that of what a partial calls, or an object's class."""
    while isinstance(value, functools.partial):
        value = value.func
    name = getattr(value, "__name__", None)
    name = name if isinstance(name, str) and name else type(value).__name__
    return "lambda" if name == "<lambda>" else name


def _variable_of(value: Callable[..., Any]) -> str | None:
    """Return the name of the variable that holds this very function in the module that made it."""
    scope = getattr(value, "__globals__", {})
    return next((name for name, held in scope.items() if held is value and not name.startswith("_")), None)


def check_columns(function: RewardCallable, columns: Sequence[str], where: str) -> None:
    """Raise TaskError where a parameter is neither a column of the row nor one of the built-in names."""
    ours = _ROW_PARAMETERS if function.kind == "row" else _BATCH_PARAMETERS
    missing = [name for name in function.needs if name not in ours and name not in columns]
    if not missing:
        return
    near = difflib.get_close_matches(missing[0], [*ours, *columns], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise TaskError(
        f"The reward function {function.name} asks for {missing[0]!r}, which {where} does not have.{hint} "
        f"There are: {', '.join([*ours, *columns])}."
    )


def score_group(function: RewardCallable, group: GroupView, log: RewardLog) -> list[float | None]:
    """Return one number for each completion, or None where the function does not apply.

    Raise TaskError for anything else.
    """
    try:
        if function.kind == "batch":
            return _score_batch(function, group, log)
        return [_score_row(function, group, one.answer) for one in group.completions]
    except TaskError as fault:
        raise name_row(fault, group) from fault.__cause__


def name_row(fault: TaskError, group: GroupView) -> TaskError:
    """Return the error with the place of the row that it is about."""
    return TaskError(f"{fault} Its row: {group.row}.")


def _score_row(function: RewardCallable, group: GroupView, text: str) -> float | None:
    given = {**group.columns, "completion": text, "prompt": group.prompt}
    where = f"prompt {group.id}, answer {shorten_repr(text)}"
    value = _call_function(function, _select_arguments(function, given), where)
    return None if value is None else check_finite(value, function.name, where)


def _score_batch(function: RewardCallable, group: GroupView, log: RewardLog) -> list[float | None]:
    count = len(group.completions)
    texts = [one.text for one in group.completions]
    given = {
        **{name: [_copy_value(value) for _ in range(count)] for name, value in group.columns.items()},
        "prompts": [_copy_value(group.prompt) for _ in range(count)],
        "completions": [[{"role": "assistant", "content": text}] for text in texts]
        if group.conversational
        else [*texts],
        "completion_ids": [list(one.token_ids) for one in group.completions],
        "trainer_state": TrainerState(),
        "log_extra": log.extra,
        "log_metric": log.metric,
    }
    value = _call_function(function, _select_arguments(function, given, copied=True), f"prompt {group.id}")
    listed = _as_list(value)
    if listed is None or len(listed) != count:
        what = f"{len(listed)} numbers" if listed is not None else shorten_repr(value)
        raise TaskError(
            f"The reward function {function.name} gave {what} for the {count} completions of prompt {group.id}. "
            f"Return a list of {count}, in their order."
        )
    wheres = [f"prompt {group.id}, answer {shorten_repr(text)}" for text in texts]
    return [
        None if one is None else check_finite(one, function.name, where)
        for one, where in zip(listed, wheres, strict=True)
    ]


def _select_arguments(function: RewardCallable, given: Mapping[str, Any], copied: bool = False) -> dict[str, Any]:
    """Select the arguments that the function takes; its own defaults hold for the rest."""
    names = given if function.takes_all else [name for name in function.takes if name in given]
    return {name: given[name] if copied else _copy_value(given[name]) for name in names}


def _copy_value(value: Any) -> Any:
    """Return a copy. A value that cannot be copied (a lock, a handle) is returned itself."""
    if isinstance(value, _IMMUTABLE_TYPES):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # deepcopy runs code of arbitrary classes
        return value


def _call_function(function: RewardCallable, given: dict[str, Any], where: str) -> Any:
    rest = f"on {where}. It must judge any text: return 0, or None for what it cannot judge."
    with told_as_task_error(f"The reward function {function.name}", rest):
        value = function.call(**given)
        return await_result(value) if inspect.isawaitable(value) else value


def _as_list(value: Any) -> list[Any] | None:
    """Return a list, tuple, array or tensor as a list; None for anything else, such as text."""
    if hasattr(value, "tolist") and not isinstance(value, list | tuple):
        with suppress(Exception):  # a tensor of another kind or device: it is no list then
            value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else None
