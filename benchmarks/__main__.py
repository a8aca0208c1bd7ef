"""python -m benchmarks: minigrpo beside TRL, one step each in turns, and beside the limit of this machine."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from benchmarks import sweeps as along
from benchmarks.machine import Machine, describe
from benchmarks.models import SHAPES
from benchmarks.report import Result, show, write
from benchmarks.sides import BenchmarkError, Setup
from benchmarks.workloads import WORKLOADS, Stops, Workload

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


WIDTH = 130
"""Columns, where the output goes to a file."""
VARIANTS = ("best", "defaults", "continuous", "vllm")
EXAMPLES = """
examples:
  python -m benchmarks                                      tiny and half beside TRL at its best; minutes
  python -m benchmarks --workload tiny --stops draw fixed natural --trl best defaults continuous vllm
  python -m benchmarks --workload half --length long        completions of up to 256 tokens
  python -m benchmarks --workload half 3b --device cuda     32 prompts x 8 completions
  python -m benchmarks --workload tiny --neighbour 1        on a machine that is shared
  MINIGRPO_REAL_MODEL=FOLDER MINIGRPO_GSM8K=FOLDER python -m benchmarks --workload real --stops natural
  python -m benchmarks --sweep group total                  how cost grows; no TRL
  python -m benchmarks --sweep group --model half --values 4 16

A run that is stopped keeps what it measured: the file is written after every repetition.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=["tiny", "half"], help="what to run")
    p.add_argument(
        "--stops",
        nargs="+",
        choices=["draw", "fixed", "natural"],
        default=["draw"],
        help="stop lengths; fixed: no stragglers; natural: the model ends its completions itself (tiny, real)",
    )
    p.add_argument("--length", nargs="+", choices=["short", "long"], default=["short"], help="longest completion")
    p.add_argument(
        "--trl", nargs="*", choices=VARIANTS, default=["best"], help="ways to set TRL, a row each; none: minigrpo alone"
    )
    p.add_argument("--sweep", nargs="+", choices=list(along.AXES), help="minigrpo alone, along these axes")
    p.add_argument("--model", choices=list(SHAPES), default="slim", help="shape that is swept (default: slim)")
    p.add_argument("--values", nargs="+", type=int, metavar="N", help="values of the axis (default: its own)")
    p.add_argument("--repeats", type=int, metavar="N", help="timed steps a side (default: the workload's own)")
    p.add_argument("--warmup", type=int, metavar="N", default=1, help="steps before the timed ones (default: 1)")
    p.add_argument("--threads", type=int, metavar="N", default=os.cpu_count() or 1, help="CPU threads of each side")
    p.add_argument("--neighbour", type=int, metavar="N", default=0, help="other busy processes beside the timed steps")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--dtype", help="float32 or bfloat16, for minigrpo (default: the workload's own)")
    p.add_argument("--trl-dtype", help="the same for TRL; +autocast: bf16 products over these weights")
    p.add_argument("--no-proof", action="store_true", help="do not compare gradients first")
    p.add_argument("--json", type=Path, metavar="FILE", help="where the figures go (default: bench-results/DATE.json)")
    return p


@dataclass(slots=True)
class ResultStore:
    """The measurements so far, and the file that they are written to; the plot goes beside it."""

    file: Path
    machine: Machine
    console: Console
    results: list[Result] = field(default_factory=list)
    sweeps: list[along.Sweep] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.console.print(line, style="dim", highlight=False, soft_wrap=True, markup=False)

    def save(self, unfinished: Result | along.Sweep | None = None) -> None:
        """Write all results, `unfinished` included."""
        results = [*self.results, *([unfinished] if isinstance(unfinished, Result) else [])]
        swept = [*self.sweeps, *([unfinished] if isinstance(unfinished, along.Sweep) else [])]
        write(self.file, self.machine, results, [sweep.as_json() for sweep in swept])

    def close(self) -> None:
        from benchmarks.plots import draw

        self.save()
        picture = self.file.with_suffix(".png")
        self.console.print(draw(picture, str(self.machine), self.results, self.sweeps), highlight=False, markup=False)
        self.console.print(f"Every step's figures: {self.file}", highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    if fault := refuse_reason(args):
        console.print(fault, markup=False, soft_wrap=True)
        return 2
    machine = describe(args.threads, args.neighbour)
    console.print(str(machine), soft_wrap=True, highlight=False)
    file = args.json or Path("bench-results") / f"{datetime.now(UTC):%Y%m%d-%H%M}.json"
    store = ResultStore(file, machine, console)
    with tempfile.TemporaryDirectory(prefix="minigrpo-bench-") as scratch:
        jobs = swept(args, Path(scratch), store) if args.sweep else compared(args, Path(scratch), store)
        try:
            for job in jobs:
                job()
        except BenchmarkError as fault:
            console.print(str(fault), markup=False)
            return 1
        except KeyboardInterrupt:
            console.print(f"Stopped. What was measured is kept: {file}", markup=False)
            return 130
    store.close()
    return 0


def refuse_reason(args: argparse.Namespace) -> str | None:
    """Return why this cannot be run, and what can; None where it can."""
    if not args.sweep and importlib.util.find_spec("trl") is None:
        return "The benchmark compares with TRL, which is not installed: pip install 'minigrpo[bench]'"
    for name in [] if args.sweep else args.workload:
        if WORKLOADS[name].needs_gpu and args.device == "cpu":
            return f"Workload {name} has too many weights for a CPU: run it with --device cuda, or take --workload half"
        for stops in args.stops:
            if why := replace(WORKLOADS[name], stops=stops).missing():
                return why
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    import torch  # reads the environment above

    if args.device == "cuda" and not torch.cuda.is_available():
        return "This machine shows no CUDA GPU to torch: run without --device cuda"
    return None if args.device == "cuda" else _sixteen_bit()


def _sixteen_bit() -> str | None:
    """Return what is wrong with this machine's 16-bit products, or None."""
    from minigrpo.errors import ModelError
    from minigrpo.models.loading import check_dtype_support

    try:
        check_dtype_support("bfloat16")
    except ModelError as fault:
        return str(fault)
    return None


Job = Callable[[], None]


def compared(args: argparse.Namespace, scratch: Path, store: ResultStore) -> list[Job]:
    """Return one job for each workload."""

    def job(setup: Setup) -> None:
        from benchmarks.harness import Plan, make_model, measure

        make_model(setup, setup.folder)
        repeats = args.repeats or setup.workload.repeats
        plan = Plan(repeats, args.warmup, not args.no_proof, args.trl, store.say, store.save, args.neighbour)
        store.results.append(measure(setup, plan))
        store.save()
        show(store.results[-1], store.console)

    return [lambda setup=setup: job(setup) for setup in setups(args, scratch)]  # type: ignore[misc]


def swept(args: argparse.Namespace, scratch: Path, store: ResultStore) -> list[Job]:
    """Return one job for each axis."""

    def job(axis: str) -> None:
        asked = along.Asked(
            args.model, args.values or (), args.repeats or 3, args.threads, args.device, store.say, store.save
        )
        store.sweeps.append(along.run(axis, asked, scratch))
        store.save()
        along.show(store.sweeps[-1], store.console)

    return [lambda axis=axis: job(axis) for axis in args.sweep]  # type: ignore[misc]


def setups(args: argparse.Namespace, scratch: Path) -> list[Setup]:
    chosen = []
    for name in args.workload:
        for length in args.length:
            for stops in args.stops:
                workload = shaped(WORKLOADS[name], args, length, stops)
                folder = scratch / (f"{name}-grown" if stops == "natural" else name)
                runs = scratch / f"{name}-{stops}-{length}"
                chosen.append(Setup(workload, folder, runs, args.threads, workload.dtype, 1, args.device))
    return chosen


def shaped(plain: Workload, args: argparse.Namespace, length: str, stops: Stops) -> Workload:
    sized = plain.on_gpu() if args.device == "cuda" else plain
    return replace(
        sized,
        stops=stops,
        limit=sized.long if length == "long" else sized.limit,
        dtype=args.dtype or sized.dtype,
        trl_dtype=args.trl_dtype or sized.trl_dtype,
    )


if __name__ == "__main__":
    sys.exit(main())
