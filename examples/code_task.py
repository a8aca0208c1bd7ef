"""minigrpo train sudoku-ministral --task.name examples/code_task.py:task --task.size 8"""

from minigrpo.tasks.common.code_task import Problem, code_task

WORDS = ("level", "noon", "table", "", "a", "ab")
problems = [
    Problem("mirrored", ("word",), "Is it the same read backwards?", [((w,), w == w[::-1]) for w in WORDS]),
    Problem("vowels", ("word",), "How many of aeiou it has.", [((w,), sum(v in "aeiou" for v in w)) for w in WORDS]),
    Problem("largest", ("numbers",), "The largest, None where there is none.", [(([3, 9, 4],), 9), (([],), None)]),
    Problem("total", ("numbers",), "Their sum.", [(([1, 2],), 3), (([],), 0), (([-5],), -5)]),
]
golds = {
    "mirrored": "def mirrored(word):\n    return word == word[::-1]",
    "vowels": "def vowels(word):\n    return sum(letter in 'aeiou' for letter in word)",
    "largest": "def largest(numbers):\n    return max(numbers, default=None)",
    "total": "def total(numbers):\n    return sum(numbers)",
}


def task(recipe):
    right = [Problem(p.name, p.parameters, p.asked, p.cases, gold=golds[p.name]) for p in problems]
    return code_task(right, sandbox=recipe.sandbox)
