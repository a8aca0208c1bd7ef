"""Checkpoints: everything that the next step depends on, written completely or not at all, verified on reading.

    checkpoints/000050/  adapter (or model) files  optimizer.pt  trainer.json  state.json  made.json
                         shards/ in place of the first two, where the model is sharded (distributed/shards.py)
    checkpoints/000050.exploded/                   set aside by `discard_after`

made.json holds the step and the SHA-256 of every other file, and is sealed itself (runs/manifest.py), so any
change is detected. It also holds the hash of the line before its own in the run's chain (runs/chain.py).

Random numbers need no state here: every draw is named by seed, step and place (utils/rng.py). What does shape the
arithmetic besides the weights (threads, number types, tokens per pass, rows, versions) is the Machine, stored with
the run and used again. What the trainer itself remembers from step to step is its `state`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import platform
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minigrpo.distributed.ranks import ALONE, Ranks
from minigrpo.distributed.shards import SHARDS, WEIGHT, names_of_shards, read_shards, slice_like, write_shards
from minigrpo.errors import ArtifactError
from minigrpo.runs.chain import append_link, link_text
from minigrpo.runs.manifest import hash_files, kept_files, read_sealed, write_sealed
from minigrpo.runs.rundir import RunDir, complete_folder, read_json, remove_folder, write_json, writing
from minigrpo.versions import this_version

Positions = Mapping[str, Mapping[str, Any]]
"""For each log of the run: its length in bytes and the SHA-256 of those bytes (runs/logger.py)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the exact result of a step depends on: on a CPU, runs agree bit for bit where these agree."""

    tokens_per_pass: int
    rows: int
    threads: int
    device: str
    dtype: str
    processor: str
    torch: str
    transformers: str
    peft: str
    ranks: int = 1

    def differences(self, then: Machine) -> list[str]:
        """Return a sentence for each field that differs from `then`."""
        pairs = [(f.name, getattr(then, f.name), getattr(self, f.name)) for f in fields(self)]
        return [f"{name} was {before}, is {now}" for name, before, now in pairs if before != now]


def this_machine(
    tokens_per_pass: int, rows: int, device: torch.device, dtype: torch.dtype, *, ranks: int = 1
) -> Machine:
    """Describe this machine. `rows`: completions decoded side by side, 0 where the engine has no such number."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    threads = torch.get_num_threads()
    return Machine(tokens_per_pass, rows, threads, str(device), str(dtype), processor, **libraries, ranks=ranks)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified folder after `step` finished steps; `positions` are those of the run's logs at that moment."""

    folder: Path
    step: int
    positions: Positions
    machine: Machine
    state: Mapping[str, Any] = field(default_factory=dict)


def save(
    run: RunDir,
    step: int,
    policy: Any,
    optimizer: torch.optim.Optimizer,
    positions: Positions,
    *,
    state: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write the checkpoint of `step` finished steps; it appears under its name only when it is complete.

    `state`: the trainer's own state as JSON (names are text, sequences are lists); some MB at most. The leading rank
    calls it; where the model is sharded, the others call `add_shards`. Raises ArtifactError where the disk is full or
    does not let us write.
    """
    with complete_folder(run.checkpoint(step)) as draft:
        if policy.is_sharded:
            add_shards(policy, optimizer, ranks, draft)
        else:
            policy.save(draft)
            # Through a stream of ours: torch's own hides why a disk refuses.
            with (draft / "optimizer.pt").open("wb") as stream:
                torch.save(optimizer.state_dict(), stream)
        (draft / "trainer.json").write_text(json.dumps(state or {}, separators=(",", ":")), encoding="utf-8")
        machine = asdict(_machine_of(run.machine, read_sealed(run.machine)))
        write_json(draft / "state.json", {"positions": positions, "machine": machine})
        sums = hash_files(draft)
        previous = append_link(run, "checkpoint", _link_facts(step, sums, positions))
        made = {"verb": "grpo", "step": step, "bytes": _sizes(draft), "sha256": sums, "previous": previous}
        write_sealed(draft / "made.json", made)


def add_shards(policy: Any, optimizer: torch.optim.Optimizer, ranks: Ranks, draft: Path | None = None) -> None:
    """Write this rank's slices of weights and moments, in the draft that the leading rank names.

    Do nothing where the model is not sharded. Raises ArtifactError where the disk is full or does not let us write.
    """
    if not policy.is_sharded:
        return
    folder = Path(ranks.gather("figures", str(draft))[0]) / SHARDS
    tensors = {WEIGHT + name: weight.detach() for name, weight in policy.parameters_by_name().items()}
    for name, parameter in policy.parameters_by_name().items():
        # Sorted: AdamW names them in another order after a resume, and the same slices shall be the same bytes.
        tensors |= {f"{kind}/{name}": moment for kind, moment in sorted(optimizer.state.get(parameter, {}).items())}
    with writing(folder):
        write_shards(folder, tensors, ranks)


def _link_facts(step: int, sums: Mapping[str, str], positions: Positions) -> dict[str, Any]:
    return {"step": step, "files": sums, "logs": positions}


def hash_link(folder: Path) -> str | None:
    """Return the hash of a checkpoint's line in the chain, from its own folder; None for one that was saved without.

    Raises ArtifactError where the folder is not what was saved.
    """
    found, made = _verified(folder), read_sealed(folder / "made.json")
    if "previous" not in made:
        return None
    text = link_text("checkpoint", made["previous"], _link_facts(found.step, made["sha256"], found.positions))
    return hashlib.sha256(text.encode()).hexdigest()


def prune(run: RunDir, keep: int, spare: Collection[int] = frozenset()) -> None:
    """Remove all but the newest `keep` checkpoints, those of the steps in `spare`, and what was set aside.

    Incomplete ones do not count, so the last complete one always stays.
    """
    whole = [folder for folder in _folders(run) if _looks_whole(folder)]
    kept = {*whole[-max(keep, 1) :], *(folder for folder in whole if int(folder.name) in spare)}
    if whole:
        for folder in [*_folders(run), *_set_aside(run)]:
            if folder not in kept:
                remove_folder(folder)


def discard_after(run: RunDir, step: int, why: str = "exploded") -> None:
    """Set aside the checkpoints later than `step`, as 000050.exploded: kept for inspection until the next `prune`."""
    for folder in _folders(run):
        if int(folder.name) > step:
            aside = folder.with_name(f"{folder.name}.{why}")
            with writing(aside):
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)


def find_latest(run: RunDir) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest intact checkpoint (None before the first) and a sentence for each newer damaged one.

    Raises ArtifactError where there are checkpoints and none is intact: starting over silently would lose the run.
    """
    complaints: list[str] = []
    for folder in reversed(_folders(run)):
        try:
            return _verified(folder), complaints
        except ArtifactError as fault:
            complaints.append(f"{fault} Going on from the checkpoint before it.")
    if complaints:
        first = complaints[0].removesuffix(" Going on from the checkpoint before it.")
        raise ArtifactError(
            f"None of the {len(complaints)} checkpoints of {run.path} can be used. The newest: {first} To begin this "
            f"run again from its first step, remove {run.checkpoints}; or begin another: --run runs/NAME"
        )
    return None, complaints


def find_step(run: RunDir, step: int) -> Checkpoint:
    """Return the verified checkpoint of that step. Raises ArtifactError where it is missing or not whole."""
    if not run.checkpoint(step).is_dir():
        there = ", ".join(str(int(folder.name)) for folder in _folders(run)) or "none"
        raise ArtifactError(f"{run.path} has no checkpoint of step {step}. There are: {there}.")
    return _verified(run.checkpoint(step))


def saved_steps(run: RunDir) -> list[int]:
    """Return the steps of the checkpoints that are there, whole or not, in order."""
    return [int(folder.name) for folder in _folders(run)]


def newest_before(run: RunDir, step: int) -> int | None:
    """Return the step of the newest intact checkpoint before `step`, or None."""
    for folder in reversed(_folders(run)):
        if int(folder.name) < step:
            with suppress(ArtifactError):
                return _verified(folder).step
    return None


MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")
"""Names of AdamW's two moments in torch and bitsandbytes; each has its parameter's shape."""


def load(checkpoint: Checkpoint, policy: Any, optimizer: torch.optim.Optimizer) -> None:
    """Restore weights and optimizer exactly. Raises ArtifactError where they belong to another model or recipe."""
    try:
        policy.restore(checkpoint.folder)
        if (checkpoint.folder / SHARDS).is_dir():
            _read_moments(checkpoint.folder / SHARDS, policy, optimizer)
        else:
            place = "cpu" if policy.is_sharded else policy.device
            state = torch.load(checkpoint.folder / "optimizer.pt", map_location=place, weights_only=True)
            optimizer.load_state_dict(_sliced(state, policy.trainable) if policy.is_sharded else state)
    except torch.OutOfMemoryError:
        raise
    except (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, OSError, EOFError) as fault:
        why = " ".join(str(fault).split())[:200]
        raise ArtifactError(f"{checkpoint.folder} does not fit this model and recipe: {why}") from fault
    # The optimizer compares counts alone: a moment of another shape would fail at the next step, far from its cause.
    for parameter, state in optimizer.state.items():
        moments = [state[name] for name in MOMENTS if name in state]
        if any(moment.shape != parameter.shape for moment in moments):
            raise ArtifactError(f"{checkpoint.folder / 'optimizer.pt'} does not fit this model: shapes differ.")


def _read_moments(folder: Path, policy: Any, optimizer: torch.optim.Optimizer) -> None:
    """Read what AdamW remembers of each parameter: the whole of it, or the slice that this rank holds."""
    parameters = policy.parameters_by_name()
    tensors: dict[str, Any] = {}
    optimizer.state.clear()
    for each in names_of_shards(folder):
        kind, _, name = each.partition("/")
        if not each.startswith(WEIGHT):
            parameter = parameters[name].detach()
            empty = torch.zeros((), device=parameter.device) if kind == "step" else torch.zeros_like(parameter)
            tensors[each] = optimizer.state[parameters[name]][kind] = empty
    if tensors:  # before the first step there are none
        read_shards(folder, tensors)


def _sliced(state: Mapping[str, Any], parameters: Sequence[Any]) -> dict[str, Any]:
    """Return the optimizer's state with this rank's slices in place of whole moments."""
    slices = {
        place: {
            kind: slice_like(parameters[place], value) if value.shape == parameters[place].shape else value
            for kind, value in own.items()
        }
        for place, own in state["state"].items()
    }
    return {**state, "state": slices}


def read_machine(run: RunDir) -> Machine | None:
    """Return the Machine that the run began on, or None for a run that has not begun.

    Where its file is missing, read it from the newest checkpoint. Raises ArtifactError where it is damaged.
    """
    if not run.machine.is_file():
        found, _ = find_latest(run)
        return found.machine if found else None
    try:
        return _machine_of(run.machine, read_sealed(run.machine))
    except ArtifactError as fault:
        if not _folders(run):
            raise
        raise ArtifactError(f"{fault} Or remove that file: the newest checkpoint holds the same.") from None


def write_machine(run: RunDir, machine: Machine) -> None:
    write_sealed(run.machine, asdict(machine))


def _machine_of(file: Path, data: Mapping[str, Any]) -> Machine:
    names = {f.name for f in fields(Machine)}
    data = {"ranks": 1, **data}  # runs of versions that knew one rank only
    own = {name: value for name, value in data.items() if name not in ("format", "minigrpo", "seal")}
    if differing := sorted(own.keys() ^ names):
        raise ArtifactError(
            f"{file} is of minigrpo {data.get('minigrpo', 'of another version')}, and this is {this_version()}, which "
            f"does not agree on: {', '.join(differing)}. Go on with the version that made it, or begin another run: "
            "--run runs/NAME"
        )
    return Machine(**own)


def _verified(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint. Raises ArtifactError naming the file that differs from what was saved."""
    made = read_sealed(folder / "made.json")
    if made["step"] != int(folder.name):
        raise ArtifactError(f"{folder} is of step {made['step']}, so it was renamed.")
    now = hash_files(folder)
    for name, expected in made["sha256"].items():
        if name not in now:
            raise ArtifactError(f"{folder / name} is missing.")
        if now[name] != expected:
            raise ArtifactError(f"{folder / name} is damaged: its contents are not what was saved.")
    if extra := sorted(now.keys() - made["sha256"].keys()):
        raise ArtifactError(f"{folder / extra[0]} is not of this checkpoint: nobody saved it there. Remove it.")
    state = read_json(folder / "state.json")
    machine = _machine_of(folder / "state.json", {**state["machine"], "minigrpo": made["minigrpo"]})
    return Checkpoint(folder, made["step"], state["positions"], machine, read_json(folder / "trainer.json"))


def _looks_whole(folder: Path) -> bool:
    """Return whether a checkpoint is complete by its file sizes, without reading weights.

    `prune` follows every save.
    """
    try:
        made = read_sealed(folder / "made.json")
    except ArtifactError:
        return False
    return made["bytes"] == _sizes(folder)


def _sizes(folder: Path) -> dict[str, int]:
    return {name: file.stat().st_size for name, file in kept_files(folder).items()}


def _folders(run: RunDir) -> list[Path]:
    """Return the checkpoint folders in the order of their steps."""
    if not run.checkpoints.is_dir():
        return []
    found = [p for p in run.checkpoints.iterdir() if re.fullmatch("[0-9]{6,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda folder: int(folder.name))


def _set_aside(run: RunDir) -> list[Path]:
    return [p for p in run.checkpoints.iterdir() if re.fullmatch(r"[0-9]{6,}\.[a-z]+", p.name) and p.is_dir()]


def _processor() -> str:
    """Return the processor's model name where Linux tells it.

    Platform.processor() is often empty or just an architecture.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
