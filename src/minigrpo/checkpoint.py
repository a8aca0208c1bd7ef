"""Checkpoints: everything that the next step depends on, whole or absent, verified before it is believed.

    checkpoints/000050/  adapter (or model) files  optimizer.pt  state.json  made.json (SHA-256 of the others)

Random numbers need no state here: every draw is named by seed, step and place (noise.py), and so is the order of
prompts. What does shape the arithmetic besides the weights (threads, number types, tokens per pass, versions) is the
Machine, stored with the run and used again.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minigrpo.errors import ArtifactError
from minigrpo.rundir import RunDir, complete_folder, digest, read_json, write_json


@dataclass(frozen=True, slots=True)
class Machine:
    """What the last bits of a step depend on. Two runs agree bit for bit where these agree (CPU)."""

    tokens_per_pass: int
    threads: int
    device: str
    dtype: str
    processor: str
    torch: str
    transformers: str
    peft: str

    def differences(self, then: Machine) -> list[str]:
        """In words: what is different now from then."""
        pairs = [(f.name, getattr(then, f.name), getattr(self, f.name)) for f in fields(self)]
        return [f"{name} was {before}, is {now}" for name, before, now in pairs if before != now]


def this_machine(tokens_per_pass: int, device: torch.device, dtype: torch.dtype) -> Machine:
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    return Machine(tokens_per_pass, torch.get_num_threads(), str(device), str(dtype), processor, **libraries)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified folder: `step` steps are done; `positions` are the lengths of the run's logs at that moment."""

    folder: Path
    step: int
    positions: Mapping[str, int]
    machine: Machine


def save(run: RunDir, step: int, policy: Any, optimizer: torch.optim.Optimizer, positions: Mapping[str, int]) -> None:
    """Write the checkpoint of `step` finished steps; it appears under its name only when it is complete."""
    with complete_folder(run.checkpoint(step)) as draft:
        policy.save(draft)
        torch.save(optimizer.state_dict(), draft / "optimizer.pt")
        write_json(
            draft / "state.json", {"step": step, "positions": dict(positions), "machine": read_json(run.machine)}
        )
        sums = {str(file.relative_to(draft)): digest(file) for file in sorted(draft.rglob("*")) if file.is_file()}
        write_json(draft / "made.json", {"verb": "grpo", "minigrpo": version("minigrpo"), "sha256": sums})


def prune(run: RunDir, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for folder in _folders(run)[:-keep]:
        shutil.rmtree(folder)


def latest(run: RunDir) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence for each newer one that is not."""
    complaints: list[str] = []
    for folder in reversed(_folders(run)):
        try:
            return _verified(folder), complaints
        except ArtifactError as fault:
            complaints.append(f"{fault} Going on from the checkpoint before it.")
    return None, complaints


def load(checkpoint: Checkpoint, policy: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimizer back, bit for bit."""
    policy.restore(checkpoint.folder)
    state = torch.load(checkpoint.folder / "optimizer.pt", map_location=policy.device, weights_only=True)
    optimizer.load_state_dict(state)


def read_machine(run: RunDir) -> Machine | None:
    """The Machine that the run began on, or None for a run that has not begun."""
    return Machine(**read_json(run.machine)) if run.machine.is_file() else None


def write_machine(run: RunDir, machine: Machine) -> None:
    write_json(run.machine, asdict(machine))


def _verified(folder: Path) -> Checkpoint:
    """Raises ArtifactError, naming the file, where anything differs from what was saved."""
    made = folder / "made.json"
    try:
        sums = read_json(made)["sha256"]
        for name, expected in sums.items():
            if not (folder / name).is_file():
                raise ArtifactError(f"{folder / name} is missing.")
            if digest(folder / name) != expected:
                raise ArtifactError(f"{folder / name} is damaged: its contents are not what was saved.")
        state = read_json(folder / "state.json")
        return Checkpoint(folder, state["step"], state["positions"], Machine(**state["machine"]))
    except (KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{made} is damaged, or from another version of minigrpo.") from None


def _folders(run: RunDir) -> list[Path]:
    if not run.checkpoints.is_dir():
        return []
    return sorted(p for p in run.checkpoints.iterdir() if p.is_dir() and p.name.isdigit())


def _processor() -> str:
    """The model name where Linux tells it; platform.processor() is often empty or just an architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
