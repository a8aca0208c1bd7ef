"""python -m benchmarks.sandboxing: what a locked process costs, on this machine.

No-op programs a second from several threads, and the time of one from a single thread, which is all overhead. Whole
games a second: a backtracker in plain Python fills the 40 empty cells of a 9x9 board, one call a move, against the
small referee below. The time to read that program, and to look for cheats in its text, before it is run. And what
grows over many programs: memory, descriptors, processes (--long N).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minigrpo.sandbox import Limits, Referee, Sandbox
from minigrpo.tasks.common.code_task import find_program, format_code_block

NOOP = "def answer(value):\n    return value"
BACKTRACKER = """
def strategy(board, initial):
    def open_numbers(r, c):
        used = set(board[r]) | {board[i][c] for i in range(9)}
        r0, c0 = r - r % 3, c - c % 3
        used |= {board[i][j] for i in range(r0, r0 + 3) for j in range(c0, c0 + 3)}
        return [n for n in range(1, 10) if n not in used]

    def solve():
        best = None
        for r in range(9):
            for c in range(9):
                if board[r][c] == 0:
                    numbers = open_numbers(r, c)
                    if best is None or len(numbers) < len(best[2]):
                        best = (r, c, numbers)
                    if len(numbers) < 2:
                        break
            if best and len(best[2]) < 2:
                break
        if best is None:
            return True
        r, c, numbers = best
        for n in numbers:
            board[r][c] = n
            if solve():
                return True
        board[r][c] = 0
        return False

    empty = [(r, c) for r in range(9) for c in range(9) if board[r][c] == 0]
    solve()
    r, c = empty[0]
    return (r, c, board[r][c])
"""
ANSWER = format_code_block(BACKTRACKER)
EMPTY = 40


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds are wall time. Growth is that of this process and of its workers together."""

    cores: int
    threads: int
    noop_per_s: float
    noop_p50_ms: float
    noop_p95_ms: float
    noop_p99_ms: float
    games_per_s: float
    reading_ms: float
    programs: int = 0
    grown_mb: float = 0.0
    grown_descriptors: int = 0
    grown_processes: int = 0


def echo() -> Referee[bool]:
    return (yield (1,)) == 1


def game(seed: int) -> Referee[int]:
    """Return the moves until the board is full and right: 40."""
    draw = random.Random(seed)
    rows, digits = list(range(9)), draw.sample(range(1, 10), 9)
    board = [[digits[(3 * (r % 3) + r // 3 + c) % 9] for c in range(9)] for r in rows]
    for cell in draw.sample(range(81), EMPTY):
        board[cell // 9][cell % 9] = 0
    initial = [row[:] for row in board]
    moves = 0
    while any(0 in row for row in board):
        move: Any = yield (board, initial)
        r, c, number = move
        if board[r][c] != 0:
            raise AssertionError("the benchmark's own program plays wrong")
        board[r][c] = number
        moves += 1
    return moves


def rate(work: Callable[[int], None], count: int, threads: int) -> float:
    """Return calls a second. Each thread takes every n-th: one queue of all would look like growth."""

    def share(first: int) -> None:
        for index in range(first, count, threads):
            work(index)

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))
    return count / (time.perf_counter() - began)


def milliseconds(work: Callable[[int], None], count: int) -> list[float]:
    """Return the time of each call, one after the other."""
    times = []
    for index in range(count):
        began = time.perf_counter()
        work(index)
        times.append(1000 * (time.perf_counter() - began))
    return times


def read(_: int) -> None:
    program = find_program(ANSWER, "strategy", ("board", "initial"))
    if not program.runs:
        raise AssertionError(program.complaint)


def measure(count: int, long: int, threads: int) -> Figures:
    with Sandbox(Limits(cpu_s=5.0), workers=threads) as sandbox:

        def noop(_: int) -> None:
            outcome = sandbox.run(NOOP, "answer", echo())
            if outcome.verdict != "ok":
                raise AssertionError(outcome)

        def play(seed: int) -> None:
            outcome = sandbox.run(BACKTRACKER, "strategy", game(seed))
            if outcome.result != EMPTY:
                raise AssertionError(outcome)

        rate(noop, 20 * threads, threads)  # every worker is up
        times_ms = milliseconds(noop, count)
        parts = statistics.quantiles(times_ms, n=100)
        found = {
            "noop_p50_ms": statistics.median(times_ms),
            "noop_p95_ms": parts[94],
            "noop_p99_ms": parts[98],
            "noop_per_s": rate(noop, count, threads),
            "games_per_s": rate(play, max(count // 4, threads), threads),
            "reading_ms": statistics.median(milliseconds(read, count)),
        }
        before = belongings()
        if long:
            rate(noop, long, threads)
        grown = [now - then for now, then in zip(belongings(), before, strict=True)]
    cores = len(os.sched_getaffinity(0))
    return Figures(cores, threads, **found, programs=long, grown_mb=grown[0], grown_descriptors=int(grown[1]),
                   grown_processes=int(grown[2]))  # fmt: skip


LOOKS, APART = 10, 0.02
"""Samples of the resources in use, and seconds between two."""


def belongings() -> tuple[float, int, int]:
    """Return the least of several samples: a starting child shows what it is about to close, and a leak is in all."""
    looks = []
    for _ in range(LOOKS):
        looks.append(seen())
        time.sleep(APART)
    megabytes, descriptors, processes = zip(*looks, strict=True)
    return min(megabytes), min(descriptors), min(processes)


def seen() -> tuple[float, int, int]:
    """Return MB in memory, open descriptors and processes of this process and its descendants, now."""
    processes = below(os.getpid())
    resident, descriptors = 0.0, 0
    for pid in processes:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            resident += pages * os.sysconf("SC_PAGE_SIZE") / 1e6
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue  # it ended, or is not ours to look into
    return resident, descriptors, len(processes)


def below(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(process for child in children for process in below(int(child)))]


def show(figures: Figures, console: Console) -> None:
    table = Table("", "measured", "wanted", box=None, padding=(0, 2, 0, 0))
    table.add_row("no-op programs a second", f"{figures.noop_per_s:.0f}", ">= 500 on 2 quiet cores")
    table.add_row("one no-op, median", f"{figures.noop_p50_ms:.2f} ms", "<= 5 ms")
    table.add_row("one no-op, 95 of 100", f"{figures.noop_p95_ms:.2f} ms", "")
    table.add_row("one no-op, 99 of 100", f"{figures.noop_p99_ms:.2f} ms", "<= 25 ms")
    table.add_row("whole games a second", f"{figures.games_per_s:.0f}", ">= 100")
    table.add_row("reading one program, median", f"{figures.reading_ms:.2f} ms", "<= 3 ms")
    if figures.programs:
        grown = (
            f"{figures.grown_mb:+.1f} MB, {figures.grown_descriptors:+d} files, {figures.grown_processes:+d} processes"
        )
        table.add_row(f"growth over {figures.programs} programs", grown, "none")
    console.print(table)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandboxing", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="programs of each measurement")
    parser.add_argument("--long", type=int, default=0, help="programs in a row, to see what grows")
    parser.add_argument("--threads", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--json", action="store_true", help="print JSON to stdout, and the table to stderr")
    chosen = parser.parse_args(args)
    figures = measure(chosen.count, chosen.long, chosen.threads)
    show(figures, Console(stderr=chosen.json))
    if chosen.json:
        json.dump(asdict(figures), sys.stdout, indent=2)
        print()


if __name__ == "__main__":
    main()
