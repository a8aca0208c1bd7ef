"""Honest strategies for Sudoku in the styles of small coder models, each with how it ends: wins, or loses by its moves.

Most are the same search in other clothes. What they share, `FREE` and `SOLVE`, is written out in each program.
"""

from __future__ import annotations

from textwrap import dedent, indent

HEAD = "def strategy(board, initial):\n"
FREE = """
def free(board, r, c):
    box = {board[i][j] for i in range(r // 3 * 3, r // 3 * 3 + 3) for j in range(c // 3 * 3, c // 3 * 3 + 3)}
    used = set(board[r]) | {board[i][c] for i in range(9)} | box
    return [n for n in range(1, 10) if n not in used]
"""
SOLVE = (
    FREE
    + """
def empties(board):
    return [(r, c) for r in range(9) for c in range(9) if board[r][c] == 0]

def solve(board):
    cells = empties(board)
    if not cells:
        return True
    r, c = min(cells, key=lambda cell: len(free(board, *cell)))
    for n in free(board, r, c):
        board[r][c] = n
        if solve(board):
            return True
    board[r][c] = 0
    return False
"""
)
"""Helpers that solve a board in place."""

PLAY = """
def strategy(board, initial):
    r, c = empties(board)[0]
    solve(board)
    return r, c, board[r][c]
"""


def inside(lines: str, helpers: str = SOLVE) -> str:
    """A program whose strategy runs these lines first, and then plays its first empty cell as solved."""
    body = "".join(f"    {line}\n" for line in dedent(lines).strip().splitlines())
    return helpers + PLAY.replace(HEAD, HEAD + body)


def ends(lines: str, helpers: str = SOLVE) -> str:
    """A program whose strategy is these lines."""
    return helpers + HEAD + "".join(f"    {line}\n" for line in dedent(lines).strip().splitlines())


CELL = """
class Cell:
    def __init__(self, row, col, board):
        self.row, self.col = row, col
        self.options = free(board, row, col)

    def __repr__(self):
        return f"{self.__class__.__name__}({self.row}, {self.col})"

    __str__ = __repr__
"""

WINNERS = {
    "a script with a docstring, typed, with a main block": '"""Sudoku solver.\n\nUses backtracking.\n"""\n'
    "from typing import List, Tuple, Optional\n"
    + SOLVE.replace("def solve(board):", 'def solve(board: "List[List[int]]") -> "bool":\n    """Solve in place."""')
    + PLAY.replace("(board, initial)", "(board: List[List[int]], initial: List[List[int]]) -> Tuple[int, int, int]")
    + "\n\nif __name__ == \"__main__\":\n    board = [[0] * 9 for _ in range(9)]\n    print(strategy(board, board))\n",
    "annotations of the future and type aliases": "from __future__ import annotations\nimport typing as t\n"
    "Grid = t.List[t.List[int]]\nMove = t.Tuple[int, int, int]\n"
    + SOLVE
    + PLAY.replace("(board, initial):", "(board: Grid, initial: Grid) -> Move:\n    Row = t.List[int]"),
    "an import for annotations inside": inside("""
        from typing import Dict, List
        seen: Dict[int, List[int]] = {}
    """),
    "a dataclass beside the function": "from dataclasses import dataclass, field\nfrom typing import List\n"
    "@dataclass(order=True)\nclass Cell:\n    row: int\n    col: int\n"
    "    options: List[int] = field(default_factory=list)\n"
    + inside("cells = [Cell(r, c, free(board, r, c)) for r, c in empties(board)]\nassert str(cells[0])[:4] == 'Cell'"),
    "a frozen dataclass with string annotations": "import dataclasses\n@dataclasses.dataclass(frozen=True)\n"
    "class Move:\n    '''One move.'''\n    row: 'int'\n    col: 'int'\n    number: 'int' = 0\n"
    "    def as_tuple(self) -> 'tuple[int, int, int]':\n        return self.row, self.col, self.number\n"
    + ends("r, c = empties(board)[0]\nsolve(board)\nreturn Move(r, c, board[r][c]).as_tuple()"),
    "a named tuple of typing": "from typing import NamedTuple\nclass Move(NamedTuple):\n    row: int\n    col: int\n"
    + inside("move = Move(*empties(board)[0])\nassert move.row < 9"),
    "a named tuple of collections": inside("""
        from collections import namedtuple
        Cell = namedtuple('Cell', 'row col options')
        cells = [Cell(r, c, free(board, r, c)) for r, c in empties(board)]
        assert min(cells, key=lambda cell: len(cell.options)).options
    """),
    "a queue of naked singles": "from collections import deque\n"
    + ends("""
        queue = deque(empties(board))
        while queue:
            r, c = queue.popleft()
            options = free(board, r, c)
            if len(options) == 1:
                return r, c, options[0]
        r, c = empties(board)[0]
        solve(board)
        return r, c, board[r][c]
    """),
    "a defaultdict of candidates": inside("""
        from collections import defaultdict, Counter
        counts = defaultdict(int)
        for row in board:
            for n in row:
                counts[n] += 1
        assert Counter(n for row in board for n in row)[0] == counts[0]
    """),
    "deque of a module": "import collections\n" + inside("queue = collections.deque([board])\nqueue.append(1)"),
    "the least of a dictionary by __getitem__": ends("""
        sizes = {cell: len(free(board, *cell)) for cell in empties(board)}
        r, c = min(sizes, key=sizes.__getitem__)
        solve(board)
        return (r, c, board[r][c])
    """),
    "a class that prints itself": CELL
    + inside("cells = [Cell(r, c, board) for r, c in empties(board)]\nassert str(cells[0]).startswith('Cell(')"),
    "the docstring of its own function": inside("assert solve.__doc__ is None and free.__name__ == 'free'"),
    "getattr of a written name": CELL
    + inside("cell = Cell(*empties(board)[0], board)\nr = getattr(cell, 'row')\nassert getattr(cell, 'box', r) == r"),
    "a set of tuples": ends("""
        cells = {(len(free(board, r, c)), r, c) for r, c in empties(board)}
        _, r, c = cells.pop()
        solve(board)
        return r, c, board[r][c]
    """),
    "a set of objects": CELL
    + ends("""
        cells = {Cell(r, c, board) for r, c in empties(board)}
        solve(board)
        for cell in cells:
            return cell.row, cell.col, board[cell.row][cell.col]
    """),
    "a set of functions": ends("""
        todo = {(lambda r=r, c=c: (r, c)) for r, c in empties(board)}
        r, c = todo.pop()()
        solve(board)
        return r, c, board[r][c]
    """),
    "objects sorted by their address": CELL
    + ends("""
        cell = sorted((Cell(r, c, board) for r, c in empties(board)), key=id)[-1]
        solve(board)
        return [cell.row, cell.col, board[cell.row][cell.col]]
    """),
    "written constants": "SIZE = 9\nBOX = 3\nDIGITS = '123456789'\n"
    + inside("assert len(DIGITS) == SIZE == len(board) and BOX * BOX == SIZE"),
    "computed constants": "DIGITS = set(range(1, 10))\nCELLS = [(r, c) for r in range(9) for c in range(9)]\n"
    "ROWS: 'list[list[int]]' = [[r * 9 + c for c in range(9)] for r in range(9)]\n"
    + inside("assert all(set(row) - {0} <= DIGITS for row in board) and len(CELLS) == 81 and ROWS[1][0] == 9"),
    "tables of peers built in a loop": "PEERS = {}\nfor r in range(9):\n    for c in range(9):\n"
    "        PEERS[r, c] = {(r, j) for j in range(9)} | {(i, c) for i in range(9)}\n"
    + inside("assert len(PEERS[0, 0]) == 17"),
    "tables of units in the style of Norvig": "digits = '123456789'\nrows = 'ABCDEFGHI'\ncols = digits\n"
    "def cross(A, B):\n    return [a + b for a in A for b in B]\nsquares = cross(rows, cols)\n"
    "unitlist = [cross(rows, c) for c in cols] + [cross(r, cols) for r in rows]\n"
    "units = dict((s, [u for u in unitlist if s in u]) for s in squares)\n"
    + inside("assert len(squares) == 81 and len(units['A1']) == 2"),
    "a helper with defaults": "def clamp(n, low=min(1, 2), high=9, seen=set()):\n    return max(low, min(n, high))\n"
    + inside("assert clamp(20) == 9"),
    "everything inside": HEAD
    + indent(SOLVE, "    ")
    + "    r, c = empties(board)[0]\n    solve(board)\n    return r, c, board[r][c]\n",
    "a class of its own with a method": HEAD
    + """
    class Solver:
        def __init__(self, grid):
            self.grid = [row[:] for row in grid]

        @staticmethod
        def box(r, c):
            return r // 3 * 3, c // 3 * 3

        def free(self, r, c):
            i, j = self.box(r, c)
            used = set(self.grid[r]) | {row[c] for row in self.grid}
            used.update(n for row in self.grid[i : i + 3] for n in row[j : j + 3])
            return [n for n in range(1, 10) if n not in used]

        def solve(self):
            cells = [(r, c) for r in range(9) for c in range(9) if not self.grid[r][c]]
            if not cells:
                return True
            r, c = min(cells, key=lambda cell: len(self.free(*cell)))
            for n in self.free(r, c):
                self.grid[r][c] = n
                if self.solve():
                    return True
            self.grid[r][c] = 0
            return False

    solver = Solver(board)
    assert solver.solve()
    return next((r, c, solver.grid[r][c]) for r in range(9) for c in range(9) if not board[r][c])
""",
    "a class beside the function with a property": FREE
    + """
class Grid(list):
    SIZE = 9

    @property
    def cells(self):
        return [(r, c) for r in range(Grid.SIZE) for c in range(Grid.SIZE) if not self[r][c]]

    def __contains__(self, n):
        return any(n in row for row in self)
"""
    + SOLVE
    + ends("grid = Grid(board)\nr, c = grid.cells[-1]\nsolve(board)\nreturn r, c, board[r][c]", ""),
    "bit masks and a closure": HEAD
    + """
    rows, cols, boxes = [0] * 9, [0] * 9, [0] * 9
    for r in range(9):
        for c in range(9):
            if board[r][c]:
                bit = 1 << board[r][c]
                rows[r] |= bit; cols[c] |= bit; boxes[r // 3 * 3 + c // 3] |= bit
    cells = [(r, c) for r in range(9) for c in range(9) if not board[r][c]]
    def masks(cell):
        r, c = cell
        return ~(rows[r] | cols[c] | boxes[r // 3 * 3 + c // 3]) & 0b1111111110
    def go(left):
        if not left:
            return True
        cell = min(left, key=lambda one: bin(masks(one)).count('1'))
        r, c = cell; b = r // 3 * 3 + c // 3
        mask = masks(cell)
        while mask:
            bit = mask & -mask
            mask ^= bit
            rows[r] |= bit; cols[c] |= bit; boxes[b] |= bit
            board[r][c] = bit.bit_length() - 1
            if go([one for one in left if one != cell]):
                return True
            rows[r] ^= bit; cols[c] ^= bit; boxes[b] ^= bit
        return False
    go(cells)
    r, c = cells[0]
    return r, c, board[r][c]
""",
    "recursion by a generator": ends("""
        def complete(grid):
            cells = empties(grid)
            if not cells:
                yield [row[:] for row in grid]
                return
            r, c = min(cells, key=lambda cell: len(free(grid, *cell)))
            for n in free(grid, r, c):
                grid[r][c] = n
                yield from complete(grid)
            grid[r][c] = 0
        solved = next(complete([list(row) for row in board]))
        return next((r, c, solved[r][c]) for r, c in empties(board))
    """),
    "lambdas throughout": inside("""
        row = lambda r: board[r]
        col = lambda c: list(map(lambda r: board[r][c], range(9)))
        ok = lambda r, c, n: n not in row(r) and n not in col(c)
        assert any(ok(0, c, 1) for c in range(9)) or 1 in row(0)
    """),
    "formatting of every kind": inside("""
        lines = ['{} {}'.format(r, ' '.join(map(str, row))) for r, row in enumerate(board)]
        lines += ['%d%%' % 5, f'{board[0][0]:>3}', '{0:{1}}'.format(7, '>3'), 'ROW'.lower(), str(board)]
        text = '\\n'.join(lines)
        print(text, len(text))
    """),
    "formatting of an object's attributes": CELL
    + inside("""
        cell = Cell(*empties(board)[0], board)
        print('{0.row},{0.col} {c.__class__.__name__}'.format(cell, c=cell))
    """),
    "errors that are caught and printed": inside("""
        try:
            board[0].index(0)
        except ValueError as error:
            print(error, error.args)
        try:
            board.rows
        except AttributeError as error:
            print('no rows', str(error))
    """),
    "a match statement": inside("""
        match board[0]:
            case [0, *rest]:
                print('begins empty', rest)
            case [int(first), *_]:
                print(first)
    """),
    "a pattern of its own class": inside("""
        class Point:
            __match_args__ = ('x', 'y')
            def __init__(self, x, y):
                self.x, self.y = x, y
        match Point(1, 2):
            case Point(x, y):
                assert x + y == 3
    """),
    "comparison by class": inside("""
        class Cell:
            def __init__(self, r, c):
                self.r, self.c = r, c
            def __eq__(self, other):
                return self.__class__ == other.__class__ and (self.r, self.c) == (other.r, other.c)
            def __hash__(self):
                return hash((self.r, self.c))
            def __lt__(self, other):
                return self.r < other.r
            def copy(self):
                return self.__class__(self.r, self.c)
        assert Cell(1, 2).copy() == Cell(1, 2) and len({Cell(0, 0), Cell(0, 0)}) == 1
    """),
    "a counter and a constant of its class": inside("""
        class Node:
            count, SIZE = 0, 9
            def __init__(self):
                self.__class__.count += 1
            def cells(self):
                return self.__class__.SIZE ** 2
            def copy(self):
                return self.__class__.make()
            @classmethod
            def make(cls):
                return cls()
        assert Node().copy().cells() == 81 and Node.count == 2 and type(Node()).count == 3
    """),
    "a list of its own kind": inside("""
        class Stack(list):
            def __init__(self, *items):
                super().__init__(items)
            @property
            def top(self):
                return self[-1]
            @staticmethod
            def kind():
                return 'stack'
        assert Stack(1, 2).top == 2 and Stack.kind() == 'stack'
    """),
    "an error of its own that ends the search": inside("""
        class Found(Exception):
            pass
        try:
            while (cells := empties(board)):
                raise Found(cells[0])
        except Found as found:
            r, c = found.args[0]
    """),
    "operators as functions": inside("""
        row = board[0]
        assert [row.__getitem__(i) for i in range(9)] == row and list(map(row.__contains__, [10])) == [False]
    """),
    "a singleton by __new__": inside("""
        class Box:
            def __new__(cls, *args):
                return super().__new__(cls)
            def __enter__(self):
                return self
            def __exit__(self, *args):
                return False
        with Box() as box:
            assert box.__class__.__name__ == 'Box'
    """),
    "metadata of a module": "__author__ = 'me'\n__all__ = ['strategy']\n" + SOLVE + PLAY,
    "examples that are never run": SOLVE + PLAY + "\nboard = [[0] * 9 for _ in range(9)]\nwhile True:\n"
    "    row, col, number = strategy(board, board)\n    board[row][col] = number\n",
    "a counter of steps kept in a global": "steps = 0\n" + inside("global steps\nsteps += 1"),
    "names of built-ins": inside("input, vars, help = board, [1], 2\nassert len(input) == 9 and vars and help"),
    "typed variables": inside("""
        total: int = 0
        grid: "list[list[int]]" = [row[:] for row in board]
        best: tuple[int, int]
        for row in grid:
            total += sum(row)
    """),
}  # fmt: skip
"""Programs that win every game."""

LOSERS = {
    "the first legal number": FREE
    + ends(
        "r, c = next((r, c) for r in range(9) for c in range(9) if not board[r][c])\nreturn r, c, free(board, r, c)[0]",
        "",
    ),
    "the first number of a cell in a set of objects": CELL.replace("class", FREE + "class", 1)
    + ends("""
        cells = {Cell(r, c, board) for r in range(9) for c in range(9) if not board[r][c]}
        cell = max(cells, key=lambda cell: len(cell.options))
        return cell.row, cell.col, cell.options[-1]
    """, ""),
    "from one to nine": ends("r, c = empties(board)[0]\nreturn (r, c, len(board[r]) % 9 + 1)"),
    "from one to nine as text": ends("r, c = empties(board)[0]\nreturn f'{r}, {c}, 1'"),
    "an error of an index": ends("r, c = empties(board)[0]\nreturn r, c, board[9][9]"),
    "a missing name": ends("return row, col, number"),
    "nothing": ends("for r, c in empties(board):\n    n = len(free(board, r, c))"),
    "a module that is not there": ends("solve(board)\nreturn np.argmin(board)"),
}  # fmt: skip
"""Programs that lose, by an illegal move or an error."""
