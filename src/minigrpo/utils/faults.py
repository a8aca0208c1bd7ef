"""Describe what a user's function raised, whatever it is, and make one sentence of it."""

from __future__ import annotations

import dis
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from minigrpo.errors import MinigrpoError, TaskError

LONGEST_MESSAGE = 300
"""Characters of an exception's own words that are repeated."""


@contextmanager
def told_as_task_error(who: str, rest: str) -> Iterator[None]:
    """Raise TaskError, "{who} raised ... {rest}", for whatever a user's function raises in the block: SystemExit, too.

    Ctrl-C stays what it is, and so do errors that are sentences already.
    """
    try:
        yield
    except MinigrpoError:
        raise
    except BaseException as fault:
        if is_ctrl_c(fault):
            raise
        raise TaskError(f"{who} raised {describe_fault(fault)} {rest}") from fault


def describe_fault(fault: BaseException) -> str:
    """Return its class, its own words and the line that raised it."""
    frames = traceback.extract_tb(fault.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(fault).__name__}: {words_of(fault)}{where}"


def words_of(fault: BaseException) -> str:
    """Return an exception's own words, or that it has none: its class may be a user's."""
    try:
        words = str(fault)
    except BaseException as second:
        words = f"(its text raised {type(second).__name__})"
    return words if len(words) <= LONGEST_MESSAGE else f"{words[:LONGEST_MESSAGE]} ..."


def is_ctrl_c(fault: BaseException) -> bool:
    """Tell whether somebody pressed Ctrl-C: a KeyboardInterrupt that no `raise` of the program raised."""
    if not isinstance(fault, KeyboardInterrupt):
        return False
    deepest = fault.__traceback__
    while deepest is not None and deepest.tb_next is not None:
        deepest = deepest.tb_next
    if deepest is None:
        return True
    return deepest.tb_frame.f_code.co_code[deepest.tb_lasti] != dis.opmap["RAISE_VARARGS"]
