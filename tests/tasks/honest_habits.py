"""Honest strategies for Sudoku in further habits: harmless imports, caches, copies, and scripts around the function."""

from __future__ import annotations

from tests.tasks.honest_programs import PLAY, SOLVE, ends, inside

WINNERS = {
    "a deep copy": "from copy import deepcopy\n"
    + inside("grid = deepcopy(board)\nassert solve(grid) and grid != board"),
    "a copy by its module, inside": inside("""
        import copy
        def solved(rows):
            rows = copy.deepcopy(rows)
            return rows if solve(rows) else None
        assert solved(board) is not None and copy.copy(board) == board
    """),
    "a recursion limit above everything": "import sys\nsys.setrecursionlimit(10000)\n" + SOLVE + PLAY,
    "a recursion limit inside": "import sys\n" + inside("sys.setrecursionlimit(10 ** 6)\nleast = sys.maxsize"),
    "caches of functions": "import functools\nfrom functools import lru_cache\n@lru_cache(maxsize=None)\n"
    "def peers(r, c):\n    return frozenset((i, j) for i in range(9) for j in range(9) if i == r or j == c)\n"
    "@functools.cache\ndef box(r, c):\n    return r // 3 * 3 + c // 3\n"
    + inside("""
        @lru_cache
        def size(r, c):
            return len(peers(r, c)) + box(r, c)
        assert size(8, 8) == 17 + 8
    """),
    "numbers in random order": "import random\nrandom.seed(42)\n"
    + SOLVE.replace("for n in free(board, r, c):", "numbers = free(board, r, c)\n    random.shuffle(numbers)\n"
    "    for n in numbers:")
    + PLAY,
    "a random empty cell": "from random import choice, randint\n"
    + ends("r, c = choice(empties(board))\nsolve(board)\nassert randint(1, 9)\nreturn r, c, board[r][c]"),
    "iterators of the library": "from itertools import product, chain\nimport itertools\n"
    + inside("""
        cells = [(r, c) for r, c in product(range(9), repeat=2) if board[r][c] == 0]
        assert len(list(chain.from_iterable(board))) == 81 and cells == empties(board)
        assert list(itertools.combinations(range(3), 2))[0] == (0, 1)
    """),
    "a heap of cells": "import heapq\n"
    + ends("""
        heap = [(len(free(board, r, c)), r, c) for r, c in empties(board)]
        heapq.heapify(heap)
        assert heapq.nsmallest(1, heap)[0] == heap[0]
        _, r, c = heapq.heappop(heap)
        solve(board)
        return r, c, board[r][c]
    """),
    "the infinite as the least so far": "import math\nfrom math import *\n"
    + inside("""
        best = math.inf
        for r, c in empties(board):
            if len(free(board, r, c)) < best:
                best = len(free(board, r, c))
        assert best < inf and int(math.sqrt(81)) == 9
    """),
    "a limit of time": "import time\n"
    + inside("start = time.time()\nif time.time() - start > 60:\n    return None\nend = time.perf_counter()"),
    "sums by reduce and operators": "from functools import reduce\nimport operator\nfrom operator import itemgetter\n"
    + inside("""
        used = reduce(operator.or_, (set(row) for row in board))
        assert used <= set(range(10)) and min(empties(board), key=itemgetter(1))[1] == 0 or True
    """),
    "imports that it does not need": "import math, random\nimport itertools as it\nfrom collections import Counter\n"
    "from string import digits\nimport json, re, sys, time, heapq, bisect\n" + SOLVE + PLAY,
    "a generator of candidates": ends("""
        def candidates(grid):
            for r, c in empties(grid):
                options = free(grid, r, c)
                if not options:
                    return
                yield len(options), r, c
        size, r, c = next(iter(sorted(candidates(board))))
        solve(board)
        return r, c, board[r][c]
    """),
    "a dataclass that fills itself": "from dataclasses import dataclass, field\n@dataclass\nclass State:\n"
    "    grid: list\n    cells: list = field(default_factory=list)\n"
    "    def __post_init__(self):\n        self.cells = empties(self.grid)\n"
    "    def is_done(self) -> bool:\n        return not self.cells\n"
    + inside("state = State([row[:] for row in board])\nif state.is_done():\n    return None"),
    "type aliases without an import": "Board = list[list[int]]\nMove = tuple[int, int, int]\n"
    + SOLVE
    + PLAY.replace("(board, initial):", "(board: Board, initial: Board) -> Move | None:"),
    "walrus and early returns": ends("""
        if not (cells := empties(board)):
            return None
        for r, c in cells:
            if len(options := free(board, r, c)) == 1:
                return r, c, options[0]
        solve(board)
        if (n := board[(cell := cells[0])[0]][cell[1]]) > 0:
            return *cell, n
        return None
    """),
    "debug output and asserts": inside("""
        print(f"{board=}", file=None)
        print(f"{'-' * 10:>20}\\n{len(empties(board))!r} empty", end=" ", flush=True)
        assert len(board) == 9, f"nine rows, not {len(board)}"
        assert all(isinstance(n, int) and 0 <= n <= 9 for row in board for n in row)
    """),
    "an abstract solver and its kind": "from abc import ABC, abstractmethod\nclass Solver(ABC):\n    @abstractmethod\n"
    "    def play(self, board):\n        raise NotImplementedError\n" + SOLVE
    + "class Backtracking(Solver):\n    def __init__(self, name='deep', *, depth=0):\n        super().__init__()\n"
    "        self.name, self.depth = name, depth\n    def play(self, board):\n        return solve(board)\n"
    "    def __call__(self, board):\n        return self.play(board)\n"
    + PLAY.replace("solve(board)", "assert Backtracking()(board)"),
    "names of modules for something else": "import copy, time\nfrom random import Random\ndef doubled(board):\n"
    "    copy = []\n    for row in board:\n        copy.append(row[:])\n    Random = time = len(copy)\n"
    "    return [copy, Random, time]\n"
    + inside("""
        grid = copy.deepcopy(board)
        def last(copy):
            return copy[-1]
        assert doubled(grid)[0][-1] == last(grid) and time.time() and Random(1)
    """),
    "names in other alphabets": SOLVE.replace("cells", "celdas_vacías").replace("used", "數字")
    + PLAY.replace("r, c", "строка, c").replace("[r]", "[строка]"),
    "states of an enumeration": "from enum import Enum, auto\nclass State(Enum):\n    OPEN, FULL = auto(), 2\n"
    + inside("state = State.OPEN if empties(board) else State.FULL\nif state == State.FULL:\n    return None"),
    "a pretty print and a breakpoint": "from pprint import pprint\n" + inside("pprint(board)\nbreakpoint()"),
    "a main function": SOLVE + PLAY + "\ndef print_board(board):\n    for row in board:\n        print(*row)\n"
    "\ndef main():\n    import sys\n    board = eval(input()) if len(sys.argv) > 1 else [[0] * 9] * 9\n"
    "    print_board(board)\n"
    "\nif __name__ == '__main__':\n    main()\n",
}  # fmt: skip
"""Programs that win every game."""

LOSERS = {
    "a random number": "import random\n"
    + ends("r, c = random.choice(empties(board))\nreturn r, c, random.randint(1, 9)"),
    "a question to the user": ends("r, c = empties(board)[0]\nreturn r, c, int(input(f'number for {r}, {c}: '))"),
    "an exit": ends("if len(board) == 9:\n    print('solved')\n    exit()\nquit(1)"),
    "a cache of lists": "from functools import lru_cache\n"
    + ends("@lru_cache(None)\ndef full(rows):\n    return solve(rows)\nfull(board)\nreturn 0, 0, board[0][0]"),
    "an assertion that fails": ends("cells = empties(board)\nassert not cells, f'{len(cells)} left'\nreturn cells[0]"),
    "a recursion without an end": "import sys\nsys.setrecursionlimit(10 ** 9)\n" + ends("""
        sys.setrecursionlimit(10 ** 9)
        def deeper(n):
            return deeper(n + 1)
        return deeper(0)
    """),
}  # fmt: skip
"""Programs that lose, by an illegal move or an error."""
