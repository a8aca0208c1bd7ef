"""Examine this machine: devices and the number types of their hardware, memory, disk, versions, optional parts.

Everything is looked at, nothing is changed, and nothing is downloaded.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from minigrpo.cli.options import AsJson, print_json, stdout_for_json
from minigrpo.errors import ModelError, install_hint
from minigrpo.models.peft_compat import refused_packages
from minigrpo.sandbox.doctor import Finding, Level
from minigrpo.ui.screen import Screen
from minigrpo.utils.cache_dir import cache_dir
from minigrpo.utils.cpu import bfloat16_instructions, usable_cores
from minigrpo.utils.paths import user_path
from minigrpo.versions import installed

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "safetensors": "0.8.0",
    "huggingface_hub": "2.4.0",
    "tokenizers": "0.23.3",
    "numpy": "2.4.6",
    "typer": "0.29.2",
    "pydantic": "2.14.3",
    "rich": "15.0.0",
    "PyYAML": "6.0.3",
}
"""The versions of constraints.txt, for those who installed from a package index; a test holds both equal."""

OPTIONAL = {
    "bitsandbytes": ("weights in 4 bit: model.quantize nf4", install_hint("qlora")),
    "trl": ("the benchmark against TRL; never needed to train", install_hint("bench")),
}
"""Import name -> what it is for, and how to get it."""

GIB = 1024**3


def examine() -> tuple[Finding, ...]:
    """Return all findings in the order of the report. Imports torch."""
    return (*machine(), *devices(), *disks(), *versions(), *optional_parts(), *refused_parts())


def doctor_table(findings: Sequence[Finding]) -> RenderableType:
    """Show what was found, topic by topic, with what to do about it."""
    marks = {"ok": "[green]ok[/]", "note": "[yellow]--[/]", "bad": "[bold red]!![/]"}
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    topic = ""
    for found in findings:
        if topic and found.topic != topic:
            table.add_row()
        topic = found.topic
        advice = f"\n{found.advice}" if found.advice else ""
        table.add_row(marks[found.level], found.name, Text.assemble(found.value, (advice, "dim")))
    return table


def machine() -> list[Finding]:
    # A container or a batch system may grant fewer cores than the machine has.
    granted = usable_cores()
    total, free = memory()
    low = free is not None and free < 2 * GIB
    return [
        Finding("machine", "system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        Finding("machine", "python", platform.python_version()),
        Finding("machine", "CPU cores", f"{granted} of {os.cpu_count()}"),
        Finding(
            "machine",
            "memory",
            f"{_gib(free)} free of {_gib(total)}",
            "note" if low else "ok",
            "Little is free: the embedded model fits, a 0.5B model does not." if low else "",
        ),
    ]


def memory() -> tuple[int | None, int | None]:
    """Return total and free bytes, within the limit of a container; None where the system does not tell."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        return _physical_memory(), None
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None and limit < total:
        return limit, min(free, max(limit - used, 0))
    return total, free


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def devices() -> list[Finding]:
    """Return the CPU, and every accelerator with the number types that its hardware computes in."""
    try:
        import torch
    except (ImportError, OSError) as fault:  # OSError: a library of its own is missing
        return [Finding("device", "torch", f"cannot be loaded: {fault}", "bad", "Install it: pip install torch")]
    found = [Finding("device", "cpu", cpu_number_types(), "ok", f"torch computes on {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        found += [_cuda(index) for index in range(torch.cuda.device_count())]
    elif shutil.which("nvidia-smi"):
        advice = f"torch {torch.__version__} does not see it: install a CUDA build, or update the driver."
        found.append(Finding("device", "NVIDIA GPU", "driver found, unusable", "bad", advice))
    else:
        found.append(Finding("device", "GPU", "none", "note", "Small models train on the CPU; see the quickstart."))
    if torch.backends.mps.is_available():
        advice = "not run on one yet: --model.device mps takes it"
        found.append(Finding("device", "mps", "Apple GPU, float32; bfloat16 if asked for", "note", advice))
    return found


def _cuda(index: int) -> Finding:
    import torch

    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    with torch.cuda.device(index):
        # Without this argument a T4 says yes, and emulates bfloat16 slowly.
        true_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    kinds = "bfloat16" if true_bf16 else "float16, no true bfloat16"
    value = f"{facts.name}, {_gib(free)} free of {_gib(total)}, {kinds}, compute {facts.major}.{facts.minor}"
    return Finding("device", f"cuda:{index}", value)


def cpu_number_types() -> str:
    """Return whether the hardware has 16-bit arithmetic. Without it bfloat16 saves memory and costs time."""
    fast = bfloat16_instructions()
    return f"float32; bfloat16 in hardware ({', '.join(fast)})" if fast else "float32; bfloat16 only emulated"


def disks() -> list[Finding]:
    """Return the free space where runs go, and where models are cached."""
    places = {"this folder": Path.cwd(), "Hub cache": hub_cache(), "own cache": cache_dir()}
    return [_disk(name, path) for name, path in places.items()]


def hub_cache() -> Path:
    """Return the folder of downloaded models, as huggingface_hub chooses it."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    return user_path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")


def _disk(name: str, path: Path) -> Finding:
    existing = next(place for place in (path, *path.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    advice = "Checkpoints and models need room; free some." if free < 2 * GIB else ""
    return Finding("disk", name, f"{_gib(free)} free at {path}", "note" if advice else "ok", advice)


def versions() -> list[Finding]:
    found = []
    for package, tested in TESTED.items():
        here = installed(package)
        # A build tag is no other version: 2.13.0+cu130 is the tested 2.13.0.
        same = here is not None and here.split("+")[0] == tested
        advice = "" if same else f"tested with {tested}: pip install '{package}=={tested}'"
        level: Level = "bad" if here is None else "ok" if same else "note"
        found.append(Finding("version", package, here or "missing", level, advice))
    return found


def optional_parts() -> list[Finding]:
    found = []
    for module, (purpose, line) in OPTIONAL.items():
        here = installed(module)
        value = f"{here}: {purpose}" if here else f"not installed: {purpose}"
        found.append(Finding("optional", module, value, "ok" if here else "note", "" if here else line))
    return found


def refused_parts() -> list[Finding]:
    """Return the installed packages that PEFT refuses: training goes on without them."""
    try:
        refused = refused_packages()
    except (ImportError, ModelError) as fault:  # PEFT itself is missing, which `versions` says, or cannot go on
        return [Finding("optional", "peft", str(fault), "bad")] if isinstance(fault, ModelError) else []
    advice = (
        "Training goes on without it, and no layer of ours needs it; PEFT would take a newer one: pip install -U {}"
    )
    return [
        Finding("optional", name, f"PEFT refuses it: {why}", "note", advice.format(name))
        for name, why in refused.items()
    ]


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"


def sandbox(
    doctor: Annotated[bool, typer.Option("--doctor", help="Look at this machine; also the default.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show which locks hold for model-written programs here.

    Starts a worker, makes the system calls that must fail, and runs a few programs. Exit code 0 where programs are run
    on this machine, 1 where they are refused. What the lines mean stands in docs/sandbox.md.
    """
    from minigrpo.sandbox.doctor import examine, to_dict

    with stdout_for_json(as_json):
        findings = examine()
    report = to_dict(findings)
    if as_json:
        print_json(report)
    else:
        Screen().show(doctor_table(findings))
    raise typer.Exit(0 if report["ok"] else 1)
