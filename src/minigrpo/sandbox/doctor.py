"""Examine the sandbox on this machine: which locks close, what the self-test found, how fast programs run."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from minigrpo.errors import SandboxError
from minigrpo.sandbox.inside.program import NECESSARY_LOCKS
from minigrpo.sandbox.pool import Sandbox, missing, open_worker
from minigrpo.sandbox.protocol import Limits, Referee
from minigrpo.sandbox.worker import Worker

ABOUT = {
    "filter": "system calls are held to a short list (seccomp)",
    "limits": "CPU time, memory, processes, files, descriptors",
    "dies with the zygote": "no program outlives the process that started it",
    "no new privileges": "no setuid program can be used",
    "own user": "not root, even where you are",
    "no capabilities": "no special rights",
    "not traceable": "nobody of the same user reads its memory",
    "empty root": "no file is there to be opened",
    "namespaces": "no network interface, no shared memory of others",
    "landlock": "no file and no port, a second time",
}
"""Each lock with what it does, the necessary ones first."""

Level = Literal["ok", "note", "bad"]
PROGRAM = "def answer(question):\n    return question"
ROUNDS = 50


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a report. bad: what it is about cannot be used; note: worth knowing, such as a missing lock."""

    topic: str
    name: str
    value: str
    level: Level = "ok"
    advice: str = ""


def examine() -> tuple[Finding, ...]:
    """Start a worker, report its locks, and run a few programs where it is safe."""
    try:
        worker = open_worker(Limits(), unsafe=True)
    except SandboxError as fault:
        return (*system(), Finding("verdict", "programs", "refused", "bad", str(fault)))
    try:
        found = (*system(), *locks(worker), *selftest(worker))
        holes = missing(worker.report)
    finally:
        worker.close()
    return (*found, *verdict(holes))


def to_dict(findings: tuple[Finding, ...]) -> dict[str, Any]:
    return {"ok": all(finding.level != "bad" for finding in findings), "findings": [asdict(f) for f in findings]}


def system() -> tuple[Finding, ...]:
    return (
        Finding("machine", "system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        Finding("machine", "python", platform.python_version()),
    )


def locks(worker: Worker) -> list[Finding]:
    reasons = worker.report.get("locks", {})
    findings = []
    for name, about in ABOUT.items():
        reason = reasons.get(name, "not tried")
        level: Level = "ok" if not reason else "bad" if name in NECESSARY_LOCKS else "note"
        findings.append(
            Finding("locks", name, about if not reason else f"open: {reason}", level, about if reason else "")
        )
    return findings


def selftest(worker: Worker) -> list[Finding]:
    calls = worker.report.get("selftest", {})
    through = sorted(name for name, met in calls.items() if met == "got through")
    if not calls:
        return [Finding("self-test", "forbidden calls", "none was tried: there is no filter", "bad")]
    value = f"{len(calls) - len(through)} of {len(calls)} are stopped"
    return [Finding("self-test", "forbidden calls", value, "bad" if through else "ok", ", ".join(through))]


def verdict(holes: list[str]) -> list[Finding]:
    if holes:
        advice = (
            f"{'; '.join(holes)}. Use a Linux kernel with seccomp, x86_64 or aarch64; in a container, its default "
            "rules allow that. If you trust every program: --sandbox.unsafe"
        )
        return [Finding("verdict", "programs", "refused", "bad", advice)]
    with Sandbox(workers=1) as sandbox:
        sandbox.run(PROGRAM, "answer", question())
        began = time.perf_counter()
        for _ in range(ROUNDS):
            sandbox.run(PROGRAM, "answer", question())
        rate = ROUNDS / (time.perf_counter() - began)
    return [Finding("verdict", "programs", f"run, each in a locked process of its own; {rate:.0f} a second one by one")]


def question() -> Referee[object]:
    return (yield (42,))
