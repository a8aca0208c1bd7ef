"""Cheats found in the text of a strategy: forbidden uses cost twenty, and names of its own cost nothing."""

from __future__ import annotations

from enum import Enum
from importlib import import_module
from types import ModuleType

import pytest

from minigrpo.tasks.builtin.sudoku import GOLD_PROGRAM
from minigrpo.tasks.common.code_task import find_program, format_code_block
from minigrpo.tasks.common.harmless_imports import CALLED, VALUES
from tests.tasks.test_sudoku import after, graded, parts

pytestmark = pytest.mark.needs("linux")  # the sandbox runs nowhere else


@pytest.mark.parametrize(
    "source",
    [
        after("import os"),
        after("from inspect import stack"),
        "import numpy as np\n" + after("np.zeros(9)"),
        after("__import__('os')"),
        after("eval('1')"),
        after("getattr(board, 'po' + 'p')"),
        after("board.__class__"),
        after("board.__class__.__base__"),
        after("kind = board.__class__\nkind.pop"),
        after("board.__class__.mro()"),
        after("match board:\n    case object(__class__=kind):\n        pass"),
        after("(1 for _ in ()).gi_frame"),
        after("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    e.__traceback__.tb_frame"),
        after("__builtins__['memo'] = board"),
        after("quit.memo = board"),
        after("stop = exit\nstop()"),
        after("sorted(board, key=help)"),
        after("setattr(strategy, 'memo', 1)"),
        after("global __builtins__\n__builtins__ = {}"),
        after("class Liar:\n    __class__ = int"),
        after("class Own:\n    f_back = gi_frame = None\nframe = (1 for _ in ()).gi_frame.f_back"),
        after("board.tb_frame = 1\ndef run():\n    return run.__code__.co_code"),
        after("async def wait(): pass\nwait().cr_frame"),
        # A class body looks for a name outside until it is bound, past every function.
        after("class Own:\n    door = open\n    open = None"),
        after("exit = len\nclass Own:\n    exit = exit"),
        after("def ask():\n    global open\n    open = open"),
        after("inner = lambda: [exec for _ in range(1)]"),
        after("if False:\n    def unused():\n        eval = 1\nelse:\n    eval('1')"),
    ],
)
def test_an_import_or_a_hiding_builtin_costs_twenty(source: str) -> None:
    grade = graded(source)
    assert grade.parts["no_cheating"] == -20.0
    assert grade.parts["strategy_succeeds"] <= 0.0
    assert not grade.solved
    assert grade.notes["cheats"]


@pytest.mark.parametrize(
    "lines",
    [
        "def help(x):\n    return x\nhelp(1)",
        "def exit(): return 1\nexit()",
        "quit = license = credits = copyright = 3\nvars = [quit + license]",
        "input, compile = board[0], [n for n in range(9)]\nlen(input) + len(compile)",
        "for open in range(3): pass\nopen += 1",
        "eval = lambda locals, globals=2: locals + globals\neval(1)",
        "[exit for exit in range(3) if exit]",
        "try:\n    1 / 0\nexcept ZeroDivisionError as help:\n    str(help)",
        "help = 2\ndef inner():\n    nonlocal help\n    help += 1\n    return help\ninner()",
        "f_row, co_pilot, tb_count, gi_joe = range(4)\nf_row + co_pilot + tb_count + gi_joe",
        "class Cell:\n    pass\ncell = Cell()\ncell.f_row = cell.co_ords = cell.ag_e = 1\ncell.f_row + cell.co_ords",
        "class Node:\n    def __init__(self, x):\n        self.tb_next = x\n        self.__seen = 0\nNode(1).tb_next",
        "class Menu(list):\n    __slots__ = ()\n    __hash__ = None\n    def __init__(self): super().__init__([1])\n"
        "    def exit(self): return self.help()\n    def help(self): return len(self)\nMenu().exit()",
    ],
)  # fmt: skip
def test_a_name_that_the_program_defines_is_no_cheat(lines: str) -> None:
    program = find_program(format_code_block(after(lines)), "strategy", ("board", "initial"))
    assert (program.cheats, program.missing, program.refused) == ((), "", "")
    grade = graded(after(lines))
    assert (parts(grade), grade.solved) == ((1.0, 1.0, 30.0), True)


def test_a_name_defined_beside_the_function_is_no_cheat() -> None:
    beside = "def help(): return 1\n" + after("help()") + "\nif __name__ == '__main__':\n    help()\n"
    assert parts(graded(beside)) == (1.0, 1.0, 30.0)


ANY_VALUE = "class Any(type):\n    def __instancecheck__(cls, value): return True\n"
NAMED_BY_A_TEXT = [
    "getattr(board, '__class__')",
    "get = getattr\nget(board, 'pop')",
    "getattr(board, *['pop'])",
    "list(map(getattr, [board], ['pop']))",
    "'{0.__class__}'.format(board)",
    "'{0:{1.gi_frame}}'.format(board, 1)",
    "try:\n    '{0.x.y}'.format(board)\nexcept AttributeError as error:\n    error.obj",
    "try:\n    ('{0' + '.x}').format(board)\nexcept AttributeError as error:\n    getattr(error, 'obj')",
    "try:\n    board.x\nexcept AttributeError as error:\n    match error:\n        case Exception(obj=found): pass",
    "try:\n    str.format('{0.__class__.x}', board)\nexcept AttributeError as error:\n    error.obj",
    "try:\n    board.x\nexcept* AttributeError as group:\n    group.exceptions[0].obj",
    "class Own:\n    obj = 1\n    def __exit__(self, kind, error, trace): return error.obj",
    "class Own:\n    tb_frame = 1\n    def __exit__(self, kind, error, trace): return trace.tb_frame",
]
NAMED_BY_A_PATTERN = [
    ANY_VALUE + "class P(metaclass=Any):\n    __match_args__ = ('gi_frame',)",
    ANY_VALUE + "class P(metaclass=Any):\n    __match_args__ = ('harmless',)",
    ANY_VALUE + "class Q(metaclass=Any): pass\nclass P(Q): pass",
    "P = type('P', (), {'__match_args__': ('__class__',)})",
    "class P: pass\nP = type('P', (), {})",
    "class P(type('Q', (), {})): pass",
    "class P:\n    __match_args__ = ('__dict__',)",
    "class P:\n    __match_args__ = ('__di' + 'ct__',)",
    "class P:\n    for __match_args__ in [('x',)]: pass",
    "class P:\n    match ('x',):\n        case __match_args__: pass",
    "class P:\n    __dict__: int",
    "def turned(kind): return kind\n@turned\nclass P: pass",
    "int = P = board",
]


@pytest.mark.parametrize(
    "lines",
    NAMED_BY_A_TEXT + [f"{lines}\nmatch board:\n    case P(found): pass" for lines in NAMED_BY_A_PATTERN],
)
def test_an_attribute_that_a_text_or_a_pattern_names_is_a_cheat(lines: str) -> None:
    program = find_program(format_code_block(after(lines)), "strategy", ("board", "initial"))
    assert program.cheats


@pytest.mark.parametrize(
    "lines",
    [
        "from collections import Counter\nCounter.memo = board",
        "from collections import Counter\nkept = Counter",
        "from collections import Counter\ntype(Counter()).memo = board",
        "from collections import Counter\nclass Own(Counter): pass",
        "from collections import Counter\nCounter().__class__ == board",
        "from collections import namedtuple\nnamedtuple.memo = board",
        "from dataclasses import dataclass\ndataclass.memo = board",
        "from dataclasses import make_dataclass",
        "from collections import _sys",
        "from collections import deque as __builtins__",
        "import collections\ncollections._sys",
        "import collections\ncollections.deque = board",
        "import collections\nkept = collections",
        "class Own:\n    import collections",
        "import typing, os",
        "import math, sys\nsys.modules",
        "import random\nrandom._os",
        "import random\nrandom.choice = board",
        "import random\nrandom.setstate((3, tuple(range(625)), None))",
        "from random import Random\ntype(Random()).memo = board",
        "from random import SystemRandom",
        "from functools import wraps",
        "from functools import lru_cache\nlru_cache.memo = board",
        "from operator import attrgetter\nattrgetter('__class__')(board)",
        "from copy import deepcopy\ndeepcopy.memo = board",
        "from copy import deepcopy\nlist(map(deepcopy, board))",
        "import copy\nkept = copy.deepcopy",
        "from copy import copy\nclass Own:\n    def __reduce_ex__(self, way): return lambda: board, (), {'memo': 1}",
        "from copy import copy\nclass Own:\n    def __getattr__(self, name): return lambda way: (board, (), 1)",
        "from copy import copy\nclass Own:\n    class __reduce_ex__: pass",
        "from copy import copy\nOwn = type('Own', (), {'__reduce' + '_ex__': lambda self, way: 'x'})",
        "from heapq import merge\nmerge.memo = board",
        "import re\nre.IGNORECASE",
        "import re\ntry:\n    re.compile('(')\nexcept Exception as error:\n    error.__class__.memo = board",
        "import json\ntry:\n    json.loads('(')\nexcept ValueError as error:\n    type(error).memo = board",
        "class Own:\n    from collections import Counter\nOwn.Counter.memo = board",
        "class Own:\n    if True:\n        import collections\nOwn.collections._sys",
        "import time\ntime.sleep(1)",
        "from enum import Enum\nclass Own(Enum): A = 1\ntype(Own).memo = board",
        "from enum import Enum\nEnum.memo = board",
        "import collections\ndef other(x):\n    return [0 for collections in x], collections._sys",
        "import collections\ndef other(x):\n    global collections\n    collections = x\ndef more(): collections._sys",
        "def other(collections):\n    import collections\n    return collections._sys",
        "import collections\ndef other(x=collections):\n    collections = 1",
    ],
)
def test_an_imported_object_that_could_keep_notes_is_a_cheat(lines: str) -> None:
    program = find_program(format_code_block(after(lines)), "strategy", ("board", "initial"))
    assert program.cheats == ("import",)


def test_the_place_of_a_cache_that_could_keep_notes_is_a_cheat() -> None:
    lines = "from functools import cache\n@cache\ndef f(x): return x\nf.cache_info()._field_defaults['memo'] = board"
    assert find_program(format_code_block(after(lines)), "strategy", ("board", "initial")).cheats == (
        "uses cache_info",
    )


def test_what_an_enumeration_has_of_all_others_is_barred_where_it_could_keep_notes() -> None:
    class Own(Enum):
        A = 1

    def takes_notes(value: object) -> bool:
        try:
            value.memo = 1  # type: ignore[attr-defined]
        except (AttributeError, TypeError):
            return False
        del value.memo  # type: ignore[attr-defined]
        return True

    names = {name for name in (*dir(Own), *vars(Enum)) if not name.startswith("__") and hasattr(Own, name)} - {"A"}
    lasting = {name for name in names if takes_notes(getattr(Own, name))}
    assert "_generate_next_value_" in lasting
    for name in lasting:
        lines = f"from enum import Enum\nclass Own(Enum): A = 1\nOwn.{name}.memo = board"
        assert find_program(format_code_block(after(lines)), "strategy", ("board", "initial")).cheats


EVERY_VALUE = [(module, name) for module, names in VALUES.items() for name in names]
EVERY_NAME = EVERY_VALUE + [(module, name) for module, names in CALLED.items() for name in names]


def test_nothing_can_be_attached_to_an_import_that_may_be_used_in_any_way() -> None:
    for module, name in EVERY_VALUE:
        value = getattr(import_module(module), name)
        with pytest.raises((AttributeError, TypeError)):
            value.memo = 1
        assert not isinstance(value, ModuleType | list | dict | set)


def test_every_harmless_import_costs_nothing_and_can_be_made_in_the_sandbox() -> None:
    lines = "\n".join(f"from {module} import {name} as {module}_{name}" for module, name in sorted(EVERY_NAME))
    assert parts(graded(after(lines))) == (1.0, 1.0, 30.0)
    assert parts(graded(lines + "\n" + GOLD_PROGRAM)) == (1.0, 1.0, 30.0)
    whole = "".join(f"import {module}\n" for module in sorted({module for module, _ in EVERY_NAME}))
    assert parts(graded(whole + GOLD_PROGRAM)) == (1.0, 1.0, 30.0)


@pytest.mark.parametrize("line", ["seen = []", "seen = {}", "seen = 0"])
def test_a_constant_beside_the_function_carries_nothing_from_call_to_call(line: str) -> None:
    """A counter in the module would win by its second call; the module is executed afresh for each."""
    counting = f"{line}\n" + GOLD_PROGRAM.replace(
        "    def free", "    global seen\n    seen = [1] if seen in ([], {}, 0) else 1 / 0\n\n    def free", 1
    )
    assert parts(graded(counting)) == (1.0, 1.0, 30.0)
