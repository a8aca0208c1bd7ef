"""Check a trained adapter before anything is made from it: complete, finite, and with an effect on the model.

Each fault is one sentence, and so is a folder that cannot be read at all. The figures of each layer go to check.json, a
summary by kind of layer to the screen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from minigrpo.delivery.artifacts.merged_weights import WeightChange, weight_changes
from minigrpo.delivery.artifacts.source import TrainedSource, source_of
from minigrpo.delivery.parity.compare import trained_reference
from minigrpo.delivery.parity.kl import Divergence, json_safe
from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.models.adapter import Adapter, PairStats, pair_stats
from minigrpo.models.model_files import PREFIX_RENAMES, BaseFiles
from minigrpo.runs.manifest import fits, write_sealed
from minigrpo.runs.rundir import RunDir, read_json
from minigrpo.ui.progress import stage
from minigrpo.ui.screen import Screen
from minigrpo.ui.tables import plain_table, titled
from minigrpo.utils.memory import return_freed_memory

_LAYER_NUMBER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """Figures of a tensor that was trained as a whole: its norm, the norm of its change, and the share of values left
    unchanged."""

    name: str
    norm: float
    change: float
    unchanged: float
    finite: bool = True


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of a check. `effect`: the base against the trained model on `texts`; None where the model was not
    loaded. `facts`: of each LoRA pair; `tensors`: of each tensor that was trained as a whole."""

    folder: Path
    faults: tuple[str, ...]
    facts: tuple[PairStats, ...] = ()
    tensors: tuple[TensorFacts, ...] = ()
    effect: Divergence | None = None
    texts: str = ""

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        facts = [{name: json_safe(value) for name, value in asdict(fact).items()} for fact in self.facts]
        effect = self.effect.to_dict() if self.effect else None
        told = {"folder": str(self.folder), "facts": facts, "effect": effect}
        return {"ok": self.ok} | asdict(self) | told


@return_freed_memory()
def check(run: RunDir | Path, *, base: str | None = None, model: bool = True, quiet: bool = False) -> Checked:
    """Check what a run trained, or a PEFT adapter's folder; a run keeps the result as check.json.

    `model`: also load the model, and measure what the adapter does to the base's distributions. `base`: where the base
    lies now, if it was moved. Raises ArtifactError only where there is nothing to check.
    """
    source = source_of(run, base=base)
    try:
        with stage("check", 0, Screen(stderr=True, quiet=quiet)):
            found, made = _run_checks(source, model)
    except MinigrpoError as fault:
        found, made = Checked(source.folder, (str(fault),)), None
    if source.run:
        write_sealed(source.run.check, found.to_dict() | ({"made": made} if made else {}))
    return found


def has_passed_check(run: RunDir) -> bool:
    """Tell whether check.json belongs to the current adapter, found no fault, and includes the measured effect."""
    source = source_of(run)
    if not fits(run.check, source.made("check", source.open()[0])):
        return False
    found = read_json(run.check)
    return bool(found["ok"] and found["effect"])


def _run_checks(source: TrainedSource, model: bool) -> tuple[Checked, dict[str, Any]]:
    files, adapter = source.open()
    changes = weight_changes(files, adapter)
    facts = tuple(pair_stats(pair) for pair in adapter.pairs.values())
    tensors = tuple(_tensor_facts(change) for change in changes.values() if change.whole)
    faults = [*_missing_layers(files, adapter), *_pair_faults(facts), *_tensor_faults(tensors, source.full)]
    found = Checked(source.folder, tuple(faults), facts, tensors)
    if model and not faults:
        reference = trained_reference(source, files)
        if reference.nothing_learned:
            faults = ["Nothing was learned: with and without it the model gives the same probabilities. Train longer."]
        found = Checked(source.folder, tuple(faults), facts, tensors, reference.base, reference.held.source)
    return found, source.made("check", files)


def _pair_faults(facts: Sequence[PairStats]) -> Iterator[str]:
    broken = [fact.module for fact in facts if not fact.finite]
    if broken:
        yield (
            f"{_summary(broken, len(facts))} hold values that are not finite (NaN or infinity). Take an earlier "
            "checkpoint, or train again at a lower train.lr."
        )
    idle = [fact.module for fact in facts if fact.untrained]
    if idle and len(idle) == len(facts):
        yield "Nothing was learned: every B of the adapter is zero, as it was at the start. Was it saved untrained?"
    elif idle:
        yield f"{_summary(idle, len(facts))} have a B of zeros: the others were trained, and no gradient reached these."


def _tensor_faults(tensors: Sequence[TensorFacts], full: bool) -> Iterator[str]:
    broken = [fact.name for fact in tensors if not fact.finite]
    if broken:
        yield (
            f"{_summary(broken, len(tensors))} hold values that are not finite (NaN or infinity). Train at a lower "
            "rate."
        )
    if full and not broken and all(fact.unchanged == 1 for fact in tensors):
        yield "Nothing was learned: every weight is the base's."


def _summary(names: Sequence[str], of: int) -> str:
    return f"{len(names)} of {of} layers (such as {names[0]})"


def _missing_layers(base: BaseFiles, adapter: Adapter) -> Iterator[str]:
    """Describe layers that target_modules names and the base has, but the adapter lacks."""
    have = {name for module in adapter.pairs if (name := base.on_disk(f"{module}.weight"))}
    wanted = expected_weights(base, adapter, have)
    if missing := sorted(wanted - have):
        names = [name.removesuffix(".weight") for name in missing]
        yield (
            f"{_summary(names, len(wanted))} that its target_modules name are not in the adapter: it was cut short, or "
            "put together from parts. Save or copy it again."
        )


def expected_weights(base: BaseFiles, adapter: Adapter, have: Iterable[str]) -> set[str]:
    """Return the base's weights that target_modules selects, as PEFT reads it: a regular expression for whole names, or
    a list of name endings.

    Endings select only from the parts of the model in which the adapter has any layer: a vision tower may have layers
    of the same names.
    """
    targets, config = adapter.targets, adapter.config
    towers = {_tower(name) for name in have}
    found = set()
    for name, stored in base.tensors.items():
        if not name.endswith(".weight") or len(stored.shape) != 2:
            continue
        modules = list(_module_names(base, name))
        meant = any(_matches_target(targets, module) for module in modules)
        meant = meant and (isinstance(targets, str) or _tower(name) in towers)
        excluded = config.get("exclude_modules") or []
        if (
            meant
            and _is_adapted_layer(name, config)
            and not any(_matches_target(excluded, module) for module in modules)
        ):
            found.add(name)
    return found


def _module_names(base: BaseFiles, name: str) -> Iterator[str]:
    """Yield the module names that a model may give to a stored weight."""
    for here, there in PREFIX_RENAMES:
        module = here + name.removeprefix(there).removesuffix(".weight")
        if name.startswith(there) and base.on_disk(f"{module}.weight") == name:
            yield module


def _matches_target(targets: str | Sequence[str], module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _tower(name: str) -> str:
    return _LAYER_NUMBER.split(name)[0]


def _is_adapted_layer(name: str, config: Any) -> bool:
    only = config.get("layers_to_transform")
    place = _LAYER_NUMBER.search(name)
    if only is None or place is None:
        return only is None
    return int(place[1]) in ([only] if isinstance(only, int) else only)


def _tensor_facts(change: WeightChange) -> TensorFacts:
    norm = moved = same = 0.0
    try:
        for before, after in change.blocks():
            norm += float(before.double().square().sum())
            moved += float((after - before).double().square().sum())
            same += float(torch.eq(before, after).sum())
    except ArtifactError:
        return TensorFacts(change.base.name, 0.0, 0.0, 0.0, finite=False)
    count = max(1, change.base.rows * change.base.width)
    return TensorFacts(change.base.name, norm**0.5, moved**0.5, same / count)


def checked_table(found: Checked) -> RenderableType:
    """Show each kind of layer with its figures, then the effect, the faults and the result."""
    lines: list[RenderableType] = []
    if found.facts:
        table = plain_table("layers", "rank", "A", "B", "change", "zeros")
        for kind, facts in _group_by_kind(found.facts).items():
            ranks = "-".join(str(rank) for rank in sorted({fact.rank for fact in facts}))
            norms = [_min_median_max([getattr(f, name) for f in facts]) for name in ("norm_a", "norm_b", "norm_delta")]
            table.add_row(kind, str(len(facts)), ranks, *norms, f"{max(f.zeros for f in facts):.1%}")
        lines.append(titled(f"{found.folder}; norms: least, median, largest", table))
    if found.tensors:
        changed = median(fact.change / fact.norm if fact.norm else 0.0 for fact in found.tensors)
        lines.append(Text(f"{len(found.tensors)} tensors trained as a whole, changed by {changed:.2g} of their norm"))
    if found.effect:
        lines.append(
            Text(
                f"effect: {found.effect.mean_kl:.3g} nats a token (largest {found.effect.max_kl:.3g}) on "
                f"{found.effect.tokens} tokens; the likeliest token changed at {1 - found.effect.top1:.1%} of them "
                f"({found.texts})"
            )
        )
    lines += [Text(f"fault: {fault}", style="red") for fault in found.faults]
    sound = Text("sound", style="bold green")
    lines.append(sound if found.ok else Text("not fit to be used", style="bold red"))
    return Stack(*lines)


def _group_by_kind(facts: Sequence[PairStats]) -> dict[str, list[PairStats]]:
    kinds: dict[str, list[PairStats]] = {}
    for fact in facts:
        kinds.setdefault(fact.module.rpartition(".")[2], []).append(fact)
    return kinds


def _min_median_max(values: Sequence[float]) -> str:
    return f"{min(values):.3g} {median(values):.3g} {max(values):.3g}"
