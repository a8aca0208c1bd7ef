"""Hold a run's folder to its chain of hashes: recipe, base, checkpoints, logs, result, and what was made of it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.delivery.artifacts.source import require_merged, source_of
from minigrpo.delivery.compressed.export import sealed_rows
from minigrpo.delivery.verify import sealed_files
from minigrpo.distributed.shards import INDEX, SHARDS, read_weights
from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.pipeline.evidence import Evidence, changed_logs, checkpoint_fault, weight_files
from minigrpo.runs.manifest import hash_files, read_sealed, refuse_other_recipe, result_path, settle_base
from minigrpo.runs.rundir import RunDir, digest, read_json
from minigrpo.training import checkpoint
from minigrpo.versions import hash_code

UNSEALED = ("seconds.json", "summary.txt", "serve.log", "evals/comparison.json: its times and deliveries")


@dataclass(slots=True)
class Findings:
    """What an audit collects, in sentences: faults, what was shown, and what was not."""

    faults: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    unshown: list[str] = field(default_factory=list)

    def check(self, shown: str, faults: Iterator[str]) -> None:
        """Take over the faults of one check; where there is none, what it has shown."""
        found = list(faults)
        self.faults += found
        if not found and shown:
            self.shown.append(shown)


def check_chain(run: RunDir, recipe: Recipe, evidence: Evidence, found: Findings, *, here: Recipe) -> None:
    """Check everything that needs no model: hashes alone. `here`: the recipe that names the base on this machine."""
    if not evidence.links and not evidence.fault:
        _without_chain(run, found)
    found.check("The recipe is the one that the run began with.", _guarded(_recipe_faults, run, recipe, evidence))
    if evidence.links or evidence.fault:
        count = len(evidence.links)
        found.check(f"The chain of {count} lines is unbroken.", _guarded(_order_faults, run, recipe, evidence))
    found.check("", _guarded(_origin_faults, run, recipe, evidence))
    found.unshown += _sessions(evidence)
    _check_base(run, here, found)
    _check_checkpoints(run, evidence, found)
    _check_logs(run, recipe, evidence, found)
    _check_result(run, recipe, evidence, found)
    _check_delivery(run, recipe, found)
    _check_sealed(run, evidence, found)
    found.unshown.append(f"Nothing was checked of files that are for people alone: {', '.join(UNSEALED)}.")


def _guarded(check: Callable[..., Iterator[str]], *given: Any) -> Iterator[str]:
    """Yield a check's faults; an error that ends it is one of them."""
    try:
        yield from check(*given)
    except MinigrpoError as fault:
        yield str(fault)


def is_adopted(run: RunDir, recipe: Recipe) -> bool:
    """Return whether another tool trained what lies there."""
    made = result_path(run, recipe.train) / "made.json"
    try:
        content = read_json(made) if made.is_file() else {}
    except ArtifactError:
        return False  # damaged: whoever checks it says so
    return isinstance(content, dict) and (content.get("made") or {}).get("verb") == "adopt"


def _without_chain(run: RunDir, found: Findings) -> None:
    faults = list(_guarded(_missing_chain, run))
    found.faults += faults
    if faults:
        return
    found.unshown.append(
        f"{run.path} has no chain: it is of before there was one, or another tool trained it. Its recipe, what was "
        "removed of its checkpoints, and that its result came from them, cannot be shown; what is sealed by itself can."
    )


def _missing_chain(run: RunDir) -> Iterator[str]:
    for step in checkpoint.saved_steps(run):
        seal = run.checkpoint(step) / "made.json"
        if seal.is_file() and "previous" in read_sealed(seal):
            yield f"{run.chain} is missing, and {seal} names a line of it."
            return


def _recipe_faults(run: RunDir, recipe: Recipe, evidence: Evidence) -> Iterator[str]:
    refuse_other_recipe(recipe, run)
    known = {link.facts["recipe"] for link in evidence.begun} - {None}
    begun = read_sealed(run.made)["sha256"] if run.made.is_file() else None
    if known and known != {begun}:
        yield f"{run.made} is not that of the recipe which {run.chain} names."


def _order_faults(run: RunDir, recipe: Recipe, evidence: Evidence) -> Iterator[str]:
    if evidence.fault:
        yield evidence.fault
    if not evidence.links:
        return
    first, ended = evidence.links[0], False
    done, saved = first.step, -1
    for place, link in enumerate(evidence.links, 1):
        follows = link.step > saved and link.step >= done if link.kind == "checkpoint" else link.step == done
        if not follows or ended or first.kind != "begin":
            yield f"{run.chain}: its line {place} cannot follow there (a {link.kind} of step {link.step})."
            return
        done, ended = link.step, link.kind == "result"
        saved = done if link.kind == "checkpoint" else saved
    if result_path(run, recipe.train).is_dir() and not ended and not is_adopted(run, recipe):
        yield f"{run.chain} was cut: it ends after step {done}, before {result_path(run, recipe.train).name}/ was made."


def _origin_faults(run: RunDir, recipe: Recipe, evidence: Evidence) -> Iterator[str]:
    if not evidence.begun:
        return
    last = evidence.begun[-1].facts
    base = read_sealed(run.base)["sha256"] if run.base.is_file() else None
    if {link.facts["base"] for link in evidence.begun} != {base}:
        yield f"{run.base} names another base than {run.chain}."
    if last["warmup"] and (not run.warmup.is_dir() or digest(run.warmup) != last["warmup"]):
        yield f"{run.warmup} is not the adapter that training began with."
    machine = read_sealed(run.machine) if run.machine.is_file() else {}
    names = sorted(name for name, value in last["machine"].items() if machine.get(name) != value)
    if differing := [name for name in names if name != "tokens_per_pass"]:  # falls where memory runs out
        yield f"{run.machine} says another {', '.join(differing)} than {run.chain}."


def _sessions(evidence: Evidence) -> Iterator[str]:
    """Say where a run changed hands, and whether the code here is the one that trained it."""
    if not evidence.begun:
        return
    first, *others = evidence.begun
    if first.step:
        yield f"The chain begins after step {first.step}: of the steps before, nothing is in it."
    for before, link in zip(evidence.begun, others, strict=False):
        names = [name for name in link.facts if name != "after" and link.facts[name] != before.facts.get(name)]
        yield f"After step {link.step} the run went on with another {', '.join(names)}."
    if evidence.begun[-1].facts["code"] != hash_code():
        yield "The code that checks here is not the code that trained: what is done again is done by this one."


def _check_base(run: RunDir, recipe: Recipe, found: Findings) -> None:
    from minigrpo.models.model_files import find_base

    if not run.base.is_file():
        found.unshown.append(
            "The base has no hash in this run: when it began, the base was not on its machine as files."
        )
        return
    try:
        base = find_base(recipe.model.path, revision=recipe.model.revision, seed=recipe.seed)
    except MinigrpoError as fault:
        found.unshown.append(f"The base is not here, so it was not compared: {fault}")
        return
    found.check("The base here is the one that the run began from.", _base_faults(run, recipe, base.fingerprint()))


def _base_faults(run: RunDir, recipe: Recipe, sha256: str) -> Iterator[str]:
    try:
        settle_base(run, recipe.model.path, sha256)
    except ArtifactError as fault:
        yield str(fault)


def _check_checkpoints(run: RunDir, evidence: Evidence, found: Findings) -> None:
    steps = checkpoint.saved_steps(run)
    faults = [fault for step in steps if (fault := checkpoint_fault(run, step, evidence))]
    listed = ", ".join(map(str, steps))
    where = "that their lines in the chain name" if evidence.links else "that their own seals name"
    found.check(f"Checkpoints {listed} are the ones {where}." if steps else "", iter(faults))
    gone = sorted(evidence.saved.keys() - set(steps))
    if gone and evidence.links:
        what = f"{len(gone)} checkpoints were removed ({', '.join(map(str, gone[:9]))}{' ...' if gone[9:] else ''})"
        found.unshown.append(f"{what}: of them the chain has the hashes alone.")


def _check_logs(run: RunDir, recipe: Recipe, evidence: Evidence, found: Findings) -> None:
    faults = [
        f"{path} was changed in the lines of steps {after + 1} to {until}: their hash was saved with step {until}."
        for path, after, until in changed_logs(run, evidence)
    ]
    newest = max(evidence.saved, default=0)
    tail = [path for path in (run.metrics, run.groups) if _size(path) > _saved_bytes(path, evidence)]
    if tail and not faults and result_path(run, recipe.train).exists():
        faults += [f"{path} has lines after step {newest}, the last one that was saved." for path in tail]
    elif tail and not faults:
        found.unshown.append(f"What the logs say after step {newest} was not saved yet: a resumed run does it again.")
    shown = f"Every line of both logs up to step {newest} is what was saved with the checkpoints."
    found.check(shown if newest else "", iter(faults))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _saved_bytes(path: Path, evidence: Evidence) -> int:
    return max((saved.logs.get(path.name, {"bytes": 0})["bytes"] for saved in evidence.saved.values()), default=0)


def _check_result(run: RunDir, recipe: Recipe, evidence: Evidence, found: Findings) -> None:
    folder = result_path(run, recipe.train)
    link = next((link for link in evidence.links if link.kind == "result"), None)
    if not folder.is_dir() and link is None:
        found.unshown.append("The run has not ended: there is no result to check.")
    elif link is not None:
        step = origin_step(run, folder, link.facts, evidence)
        shown = f"{folder.name}/ is what training ended with: the weights saved after step {step}."
        found.check(shown, _result_faults(folder, link.facts, step))
    elif is_adopted(run, recipe):
        found.unshown.append(f"{folder.name}/ was trained by another tool: nothing of its training can be shown.")


def origin_step(run: RunDir, folder: Path, told: Mapping[str, Any], evidence: Evidence) -> int | None:
    """Return the step after which the result's weights were saved; None where no checkpoint of the chain had them."""
    wanted = {name: told["files"][name] for name in weight_files(told["files"])}
    steps = [step for step, saved in evidence.saved.items() if wanted.items() <= saved.files.items()]
    if not steps and folder.is_dir() and hash_files(folder) == told["files"]:
        sharded = [step for step, saved in evidence.saved.items() if f"{SHARDS}/{INDEX}" in saved.files]
        steps = [step for step in sharded if _are_the_weights(run, step, folder)]
    return max(steps, default=None)


def _are_the_weights(run: RunDir, step: int, folder: Path) -> bool:
    """Tell whether a model's files hold the tensors of a sharded checkpoint; in a file their names may differ."""
    from safetensors.torch import load_file

    try:
        shards = checkpoint.find_step(run, step).folder / SHARDS
    except ArtifactError:  # it is gone since, or damaged, which another check names
        return False
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    one = Counter(_hash(tensor) for tensors in files for tensor in tensors.values())
    return one == Counter(map(_hash, read_weights(shards).values()))


def _hash(tensor: Any) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).numpy().tobytes()).hexdigest()


def _result_faults(folder: Path, told: Mapping[str, Any], step: int | None) -> Iterator[str]:
    now = hash_files(folder) if folder.is_dir() else {}
    for name in sorted({*told["files"], *now}):
        if told["files"].get(name) != now.get(name):
            what = "is missing" if name not in now else "was added" if name not in told["files"] else "was changed"
            yield f"{folder / name} {what} after training had ended."
            return
    if digest(folder) != told["digest"]:
        yield f"{folder / 'made.json'} was changed after training had ended."
    if step is None:
        yield f"{folder} holds weights that no checkpoint of the chain had."


def _check_delivery(run: RunDir, recipe: Recipe, found: Findings) -> None:
    if not result_path(run, recipe.train).is_dir():
        return
    if run.merged.is_dir():
        shown = "merged/ was made from this adapter and base, and no byte of it has changed."
        found.check(shown, _guarded(_merged_faults, run))
    if run.gguf.is_dir():
        found.check("Each GGUF file was made from this merged/, and no byte has changed.", _guarded(_gguf_faults, run))
    if run.compressed.is_dir():
        shown = "Each folder for vLLM was made from this merged/, and no byte has changed."
        found.check(shown, _guarded(_compressed_faults, run))


def _merged_faults(run: RunDir) -> Iterator[str]:
    require_merged(run)
    made = read_sealed(run.merged / "made.json")["made"]["from"]
    if run.base.is_file() and made.get("base") != read_sealed(run.base)["sha256"]:
        yield f"{run.merged} was made from another base than {run.base} names."


def _gguf_faults(run: RunDir) -> Iterator[str]:
    faults: list[str] = []
    sound = {file.name for file, _ in sealed_files(source_of(run), faults)}
    yield from faults
    seal = run.gguf / "made.json"
    listed = read_sealed(seal)["files"] if seal.is_file() else {}
    if not faults and (gone := sorted(listed.keys() - sound)):
        yield f"{run.gguf / gone[0]} is missing, and {seal} lists it."


def _compressed_faults(run: RunDir) -> Iterator[str]:
    faults: list[str] = []
    sealed_rows(run, faults)
    yield from faults


def _check_sealed(run: RunDir, evidence: Evidence, found: Findings) -> None:
    """Check the records that carry a seal of their own; those of before have none, and nothing is shown of them."""
    there = [path for path in (run.preflight, run.check, run.parity, *evaluation_files(run)) if path.is_file()]
    unsealed = [path for path in there if _seal_is_missing(path)]
    if unsealed and evidence.begun and not evidence.begun[0].step:
        found.faults += [f"{path} carries no seal, and this run seals what it writes." for path in unsealed]
    elif unsealed:
        names = ", ".join(path.relative_to(run.path).as_posix() for path in unsealed)
        found.unshown.append(f"Of before they were sealed, so a change would not be noticed: {names}.")
    sealed = [path for path in there if path not in unsealed]
    names = ", ".join(path.relative_to(run.path).as_posix() for path in sealed)
    faults = [fault for path in sealed for fault in _guarded(_seal_faults, run, path)]
    found.check(f"As they were written, and of this result: {names}." if sealed else "", iter(faults))


def evaluation_files(run: RunDir) -> list[Path]:
    return [file for file in sorted(run.evals.glob("*.json")) if file.name != "comparison.json"]


def _seal_is_missing(path: Path) -> bool:
    try:
        content = read_json(path)
    except ArtifactError:
        return False  # damaged: reading it as sealed says so
    return not isinstance(content, dict) or "seal" not in content


def _seal_faults(run: RunDir, path: Path) -> Iterator[str]:
    """Yield what is wrong with a sealed record: its bytes, or what it was made from."""
    made = read_sealed(path).get("made") or {}
    for name, sha256 in made.get("from", {}).items():
        if name == "recipe" or not re.fullmatch("[0-9a-f]{64}", str(sha256)):  # a Hub id, or a base's place
            continue
        places = [folder / name for folder in (run.path, run.gguf, run.checkpoints) if (folder / name).exists()]
        if places and digest(places[0]) != sha256:
            yield f"{path} is of another {name} than the one that is there."


def open_recipe(run: RunDir) -> Recipe:
    """Load the run's recipe. Raises ArtifactError where there is no run."""
    if not run.exists():
        raise ArtifactError(
            f"{run.path} is no run's folder. Give one: runs/NAME, or what publish --with-run has put on the Hub"
        )
    return load_recipe(str(run.path))
