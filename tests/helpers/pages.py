"""The code blocks of the documents, and the commands in them."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK_PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*) *$")
SHORTEST_PIECE = 8
"""Characters of a text of the package that are taken for its words: shorter ones stand in any sentence."""


@dataclass(frozen=True)
class Block:
    """`line`: where its fence stands on the page. `text`: without the fence's indent."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def is_listed_as(self, name: tuple[str, str]) -> bool:
        """Return whether a table's name means this block: its page, and words that it has."""
        return name[0] == self.page and name[1] in self.text


@cache
def blocks_of(path: Path) -> tuple[Block, ...]:
    """Return the fenced blocks of a page. Raise ValueError where one is not closed."""
    found: list[Block] = []
    begun: tuple[int, re.Match[str], list[str]] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fence = FENCE.match(line)
        if begun is None:
            begun = (number, fence, []) if fence else None
        elif fence is None:
            begun[2].append(line.removeprefix(begun[1]["indent"]))
        else:
            found.append(Block(path.name, begun[0], begun[1]["language"], "\n".join(begun[2]) + "\n"))
            begun = None
    if begun is not None:
        raise ValueError(f"The block at {path.name}:{begun[0]} is not closed.")
    return tuple(found)


def outside_of_blocks(path: Path) -> list[str]:
    """Return the lines of a page without its fenced blocks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for block in reversed(blocks_of(path)):
        del lines[block.line - 1 : block.line + 1 + block.text.count("\n") - (block.text == "\n")]
    return lines


def every_block(*languages: str) -> Iterator[Block]:
    for page in BLOCK_PAGES:
        yield from (block for block in blocks_of(page) if not languages or block.language in languages)


def commands_of(block: Block) -> Iterator[str]:
    """Yield the commands of a `bash` block, without comments: continued lines are one, `a && b` are two."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for command in re.split(r"\s+#", line)[0].split(" && "):
            if command.strip() and not command.startswith("#"):
                yield " ".join(command.split()) if "'" not in command and '"' not in command else command.strip()


def words_of(command: str) -> tuple[list[str], str]:
    """Return the words of a command, and the file that its output goes to, or ""."""
    words, _, target = command.partition(" > ")
    return shlex.split(words), target.strip()


@cache
def words_of_the_package() -> frozenset[str]:
    """Return the pieces of text in the package's source, without the letters that a format puts in."""
    texts: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.update(" ".join(line.split()) for line in node.value.splitlines())
    return frozenset(text for text in texts if len(text) >= SHORTEST_PIECE)


def share_of_known_words(text: str) -> float:
    """Return the share of a text's letters that stand in pieces of text of the package's source."""
    whole = " ".join(text.split())
    known = [False] * len(whole)
    for piece in words_of_the_package():
        start = whole.find(piece)
        while start >= 0:
            known[start : start + len(piece)] = [True] * len(piece)
            start = whole.find(piece, start + 1)
    letters = [place for place, letter in enumerate(whole) if letter.isalpha()]
    return sum(known[place] for place in letters) / max(1, len(letters))
