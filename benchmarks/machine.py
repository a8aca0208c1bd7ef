"""Describe the machine that the figures come from, and read its clock."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "trl", "vllm")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    features: tuple[str, ...]
    cores: int
    threads: int
    memory_gib: float
    load: float
    python: str
    versions: dict[str, str]
    date: str
    neighbours: int = 0

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.cpu} ({' '.join(self.features)}), {self.cores} cores, {self.memory_gib:.0f} GiB; "
            f"{self.threads} threads a side, load {self.load:.1f} at the start"
            f"{f', {self.neighbours} busy neighbours' if self.neighbours else ''}; {self.date}; "
            f"Python {self.python}, {versions}"
        )


def describe(threads: int, neighbours: int = 0) -> Machine:
    """Describe this machine. `load`: processes that wanted a core in the last minute; above 0, others share it."""
    info = _read("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info)
    flags = set((re.search(r"flags\s*:\s*(.+)", info) or [""])[0].split())
    memory = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    return Machine(
        cpu=model[1].strip() if model else platform.processor() or platform.machine(),
        features=tuple(name for name in CPU_FEATURES if name in flags),
        cores=os.cpu_count() or 1,
        threads=threads,
        memory_gib=int(memory[1]) / 2**20 if memory else 0.0,
        load=os.getloadavg()[0],
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        neighbours=neighbours,
    )


@contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """Keep so many other processes busy inside the block, one thread each, as on a machine that is shared."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def busy_seconds() -> float:
    """Return the seconds that all cores together have worked for any program since the start, or were kept from it.

    What the host of a virtual machine took counts, too (steal). 0 where the system does not tell.
    """
    line = re.search(r"^cpu +(.+)", _read("/proc/stat"))
    if line is None:
        return 0.0
    user, nice, system, _idle, _waiting, *interrupts_and_steal = (int(word) for word in line[1].split()[:8])
    return (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")


def now(device: str = "cpu") -> float:
    """Return the clock in seconds, once the device has finished its work."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
