"""The first minutes on a GPU: one command, one JSON file, one page.

    python -m benchmarks.gpu_first                   # at most nine minutes on a CUDA GPU
    python -m benchmarks.gpu_first --tiny            # the same stages in tiny sizes on a CPU: a rehearsal

Stages, each in a process of its own with a limit of time, so that one that fails or hangs costs only itself:

    doctor    what minigrpo finds here
    tests     those marked `gpu`
    engines   each engine's tokens beside the CPU's, and its speed
    memory    two steps of training beside the plan
    bench     workloads half and 3b beside TRL, and beside this machine's limit

The file is written after each stage. Exit code 1 where a stage failed or tokens differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from minigrpo.errors import last_words

SECONDS = 540.0
FILE, PAGE = "gpu_first.json", "gpu_first.md"


@dataclass(frozen=True, slots=True)
class Stage:
    """A command and the seconds that it may take. It prints its figures as JSON, or writes them to `result`."""

    name: str
    command: tuple[str, ...]
    seconds: float
    result: Path | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """`fault`: why a stage has no figures, or ""."""

    name: str
    seconds: float
    fault: str
    figures: Mapping[str, Any] = field(default_factory=dict)


def stages(folder: Path, device: str, tiny: bool) -> tuple[Stage, ...]:
    module = (sys.executable, "-m")
    size = ("--tiny",) if tiny else ()
    bench = folder / "bench.json"
    workloads = ("mini",) if tiny else ("half", "3b")
    repeats = "1" if tiny else "3"
    bench_options = ("--device", device, "--repeats", repeats, "--json", str(bench))
    tests = ("pytest", "-p", "no:cacheprovider", "-m", "gpu", "tests/rollouts/test_cuda_graph_engine.py")
    checks = (*module, "benchmarks.gpu_checks")
    return (
        Stage("doctor", (*module, "minigrpo", "doctor", "--json"), 60),
        Stage("tests", (*module, *tests), 90),
        Stage("engines", (*checks, "engines", "--device", device, *size), 150),
        Stage("memory", (*checks, "memory", "--device", device, *size), 90),
        Stage("bench", (*module, "benchmarks", "--workload", *workloads, *bench_options), 360, result=bench),
    )


def run(stage: Stage, seconds: float) -> Outcome:
    """Run a stage for at most so many seconds. A benchmark that is stopped keeps what it measured."""
    began = time.monotonic()
    limit = min(stage.seconds, seconds)
    if limit <= 0:
        return Outcome(stage.name, 0.0, "not run: no time was left")
    fault, out = "", ""
    if stage.result is not None:
        stage.result.unlink(missing_ok=True)  # an earlier call's
    try:
        ended = subprocess.run(stage.command, capture_output=True, text=True, timeout=limit, check=False)
        out = ended.stdout
        if ended.returncode:
            fault = f"exit code {ended.returncode}: {last_words(ended.stderr) or last_words(out)}"
    except subprocess.TimeoutExpired:
        fault = f"stopped after {limit:.0f} seconds"
    if stage.result is not None:
        out = stage.result.read_text(encoding="utf-8") if stage.result.is_file() else ""
    return Outcome(stage.name, time.monotonic() - began, fault, figures_of(out))


def figures_of(out: str) -> Mapping[str, Any]:
    """Return the JSON object with which an output ends, or else its last line."""
    try:
        found: Mapping[str, Any] = json.loads(out[out.find("{") :])
    except ValueError:
        return {"said": last_words(out)} if out.strip() else {}
    return found


def page(report: Mapping[str, Any]) -> str:
    """Write the page of a report."""
    lines = [
        "# First minutes on a GPU" + (" (a rehearsal in tiny sizes: no figure counts)" if report["tiny"] else ""),
        "",
        f"Device {report['device']}. {report['machine']}",
        "",
        "| stage | seconds | |",
        "|---|---|---|",
        *(f"| {each['name']} | {each['seconds']:.0f} | {each['fault'] or 'done'} |" for each in report["stages"]),
    ]
    for each in report["stages"]:
        if each["figures"] and ("said" not in each["figures"] or each["name"] == "tests"):
            lines += ["", *SECTIONS[each["name"]](each["figures"])]
    return "\n".join(lines) + "\n"


def doctor_lines(figures: Mapping[str, Any]) -> list[str]:
    kept = [f for f in figures["findings"] if f["topic"] == "device" or f["level"] != "ok"]
    return ["## What doctor found", "", *(f"- {f['name']}: {f['value']}. {f['advice']}".rstrip(" .") for f in kept)]


def told_lines(figures: Mapping[str, Any]) -> list[str]:
    return ["## Tests that need a GPU", "", figures["said"]]


def engine_lines(figures: Mapping[str, Any]) -> list[str]:
    speed = {row["engine"]: row["tokens_per_second"] for row in figures["speed"]}
    rows = [
        f"| {row['engine']} | {'all' if row['same'] else 'DIFFERENT'} of {row['tokens']} | {speed[row['engine']]:.0f} |"
        for row in figures["tokens"]
    ]
    own = figures["sixteen_bit"]
    told = f"In {own['dtype']} native and slots agree in {own['share']:.1%} of the tokens; they round in another order."
    head = ["| engine | tokens as the CPU's, float64 | tokens/s |", "|---|---|---|"]
    return ["## Engines", "", *head, *rows, "", told]


def memory_lines(figures: Mapping[str, Any]) -> list[str]:
    rows = [f"| {row['phase']} | {row['planned_gb']:.2f} | {measured(row)} |" for row in figures["phases"]]
    told = f"{figures['dtype']}, passes of {figures['tokens_per_pass']} tokens, {figures['rows']} rows side by side."
    return ["## Memory, GB", "", "| phase | planned | measured |", "|---|---|---|", *rows, "", told]


def measured(row: Mapping[str, Any]) -> str:
    return "unknown" if row["measured_gb"] is None else f"{row['measured_gb']:.2f}"


def bench_lines(figures: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Beside TRL, and beside the limit",
        "",
        "| workload | times TRL | memory | share of the limit, a step |",
    ]
    lines.append("|---|---|---|---|")
    for result in figures["results"]:
        ratio, memory = result["ratio"].get("TRL"), result["memory"].get("TRL")
        share = result["reached"]["minigrpo"]["step"] if result["sides"] else None
        cells = (ratio and f"{ratio:.2f}", memory and f"{memory:.2f}", share and f"{share:.0%}")
        lines.append(f"| {result['workload']['name']} | {' | '.join(cell or '-' for cell in cells)} |")
    return lines


SECTIONS = {
    "doctor": doctor_lines,
    "tests": told_lines,
    "engines": engine_lines,
    "memory": memory_lines,
    "bench": bench_lines,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_first", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU: a rehearsal of the script")
    parser.add_argument("--device", help="default: cuda, with --tiny: cpu")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder (default: bench-results)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"in all (default: {SECONDS:.0f})")
    args = parser.parse_args(arguments)
    device = args.device or ("cpu" if args.tiny else "cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.seconds
    report: dict[str, Any] = {
        "tiny": args.tiny,
        "device": device,
        "machine": str(describe(os.cpu_count() or 1)),
        "stages": [],
    }
    for stage in stages(args.out, device, args.tiny):
        outcome = run(stage, until - time.monotonic())
        report["stages"].append(asdict(outcome))
        (args.out / FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (args.out / PAGE).write_text(page(report), encoding="utf-8")
        print(f"{outcome.name}: {outcome.fault or 'done'} ({outcome.seconds:.0f} s)", flush=True)
    print((args.out / PAGE).read_text(encoding="utf-8"))
    return 1 if failed(report) else 0


def failed(report: Mapping[str, Any]) -> bool:
    tokens = [row for each in report["stages"] for row in each["figures"].get("tokens", ())]
    return any(each["fault"] for each in report["stages"]) or not all(row["same"] for row in tokens)


if __name__ == "__main__":
    sys.exit(main())
