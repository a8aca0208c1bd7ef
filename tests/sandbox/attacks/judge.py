"""Runs every attack, and tells which were not stopped. As a program: python -m tests.sandbox.attacks.judge FOLDER.

The planted secrets: a file that everybody may read, a variable of this process's environment, the referee's solution,
and a sibling program that runs just before.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minigrpo.sandbox import Limits, Outcome, Referee, Sandbox, Wrong
from tests.sandbox.attacks import Attack, every

LIMITS = Limits(cpu_s=0.25, wall_s=2.0, memory_mb=48)
SOLUTION = 0x5EC2E7_0123456789
MARK = "planted-5ec2e7"
"""What no program may return, raise or print: part of every secret text."""
SIBLING = f"def attack(number, place):\n    return '{MARK}-sibling'\n"


def referee(place: str, said: list[str]) -> Referee[None]:
    """Two calls with the same arguments: the second finds what the first has left behind."""
    for number in (7, 7):
        value = yield (number, place)
        said.append(repr(value))
        if type(value) is not int or value != SOLUTION:
            raise Wrong("not the solution")


def fault(sandbox: Sandbox, attack: Attack, place: str) -> str | None:
    """What is wrong with how an attack ended; None where all is well."""
    said: list[str] = []
    sandbox.run(SIBLING, "attack", referee(place, []))
    outcome = sandbox.run(attack.source, "attack", referee(place, said))
    if outcome.verdict not in attack.verdicts:
        return f"{attack.name}: {outcome.verdict} ({outcome.detail})"
    if any(secret in text for text in (*said, outcome.detail) for secret in (MARK, str(SOLUTION))):
        return f"{attack.name}: a secret leaked: {outcome.detail or said}"
    return None if shown(outcome) else f"{attack.name}: its detail cannot be printed: {outcome.detail!r}"


def shown(outcome: Outcome) -> bool:
    return len(outcome.detail) <= 300 and outcome.detail.isprintable()


def judge(folder: Path) -> list[str]:
    """One sentence for each attack that got anywhere."""
    place = folder / "secret.txt"
    place.write_text(f"{MARK}-file", encoding="utf-8")
    place.chmod(0o644)
    os.environ["MINIGRPO_SECRET"] = f"{MARK}-variable"
    with Sandbox(LIMITS, workers=2) as sandbox, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda attack: fault(sandbox, attack, str(place)), every()))
    os.environ.pop("MINIGRPO_SECRET")
    if place.read_text(encoding="utf-8") != f"{MARK}-file":
        found.append("the planted file was changed")
    return [sentence for sentence in found if sentence]


if __name__ == "__main__":
    json.dump({"attacks": len(every()), "faults": judge(Path(sys.argv[1])), "user": os.getuid()}, sys.stdout)
