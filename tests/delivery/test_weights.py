"""Every weight of a merge is compared with PEFT's own merge: what is wrong is refused, however little training did."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.merge_errors import ScaledPair
from minigrpo.delivery.artifacts import merged_weights
from minigrpo.delivery.artifacts.merged_weights import WeightChange
from minigrpo.delivery.artifacts.source import source_of
from minigrpo.delivery.merge import merge as merging
from minigrpo.delivery.merge.merge import merge
from minigrpo.delivery.parity.weights import prove_weights
from minigrpo.errors import ArtifactError
from minigrpo.models.adapter import read_adapter
from minigrpo.models.model_files import open_base
from minigrpo.runs.rundir import RunDir, read_json
from tests.helpers.delivered import FAMILIES, VARIANTS, adapted, edit, edit_json, make_run, save_adapter, save_base
from tests.helpers.marks import rest_is_long

Changes = dict[str, WeightChange]
SMALL = 1e-3
"""Size of the entries of B: what it adds to a weight is a thousandth of the weight."""


def trained(folder: Path, family: str = "qwen2", dtype: torch.dtype = torch.float32, **variant: Any) -> RunDir:
    base = folder / "base"
    under = adapted(save_base(base, family, dtype=dtype), base, size=variant.pop("size", SMALL), **variant)
    return make_run(folder / "run", base, under)


class Transposed(ScaledPair):
    """A pair whose product is transposed, for a square weight."""

    def factors(self) -> tuple[Tensor, Tensor]:
        left, right = self._pair.factors()
        return right.T.contiguous(), left.T.contiguous()


def scaled(factor: float, part: str = "") -> Callable[[Changes], Changes]:
    def change(changes: Changes) -> Changes:
        return {
            name: replace(each, pair=ScaledPair(each.pair, factor)) if part in name else each  # type: ignore[arg-type]
            for name, each in changes.items()
        }

    return change


def without(part: str) -> Callable[[Changes], Changes]:
    return lambda changes: {name: each for name, each in changes.items() if part not in name}


def swapped(one: str, other: str) -> Callable[[Changes], Changes]:
    def change(changes: Changes) -> Changes:
        found = dict(changes)
        for name in changes:
            if one in name:
                twin = name.replace(one, other)
                found[name] = replace(changes[name], pair=changes[twin].pair)
                found[twin] = replace(changes[twin], pair=changes[name].pair)
        return found

    return change


def transposed(changes: Changes) -> Changes:
    return {
        name: replace(each, pair=Transposed(each.pair, 1)) if "o_proj" in name else each  # type: ignore[arg-type]
        for name, each in changes.items()
    }


MUTATIONS: Mapping[str, Callable[[Changes], Changes]] = {
    **{f"times {factor}": scaled(factor) for factor in (0.5, 0.9, 0.97, 1.03)},
    "one layer left out": without("layers.1."),
    "one projection left out": without("layers.0.self_attn.v_proj"),
    "rank-stabilised for plain": scaled(2.0),
    "two layers swapped": swapped("layers.0.", "layers.1."),
    "transposed": transposed,
}


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that lets every merge write what a mutation of its changes gives."""
    write = merged_weights.write_merged

    def use(name: str) -> None:
        def mutated(base: Any, changes: Changes, *rest: Any) -> None:
            write(base, MUTATIONS[name](changes), *rest)

        monkeypatch.setattr(merged_weights, "write_merged", mutated)

    return use


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_merge_that_is_wrong_is_refused_in_every_type(
    tmp_path: Path, mutate: Callable[[str], None], name: str, dtype: Any
) -> None:
    run = trained(tmp_path, size=0.02)
    mutate(name)
    with pytest.raises(ArtifactError, match=r"not what was trained: .*values are not (the base's|base \+ adapter)"):
        merge(run, dtype=dtype, quiet=True, proof=False)
    assert not run.merged.exists()
    assert (run.path / "merged.rejected").is_dir()


@pytest.mark.parametrize("family", rest_is_long(FAMILIES, "qwen3", "mistral3"))
@pytest.mark.parametrize("name", ["times 0.97", "one projection left out"])
def test_a_small_change_that_is_a_little_wrong_is_refused_in_every_family(
    tmp_path: Path, mutate: Callable[[str], None], name: str, family: str
) -> None:
    run = trained(tmp_path, family)
    mutate(name)
    with pytest.raises(ArtifactError, match="not what was trained"):
        merge(run, quiet=True, proof=False)


def test_a_refusal_says_how_much_of_the_change_is_there(tmp_path: Path, mutate: Callable[[str], None]) -> None:
    run = trained(tmp_path)
    mutate("times 0.5")
    with pytest.raises(ArtifactError, match=r"0\.50 of the adapter's change is in it; and \d+ more"):
        merge(run, quiet=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", rest_is_long(FAMILIES, "qwen2", "ministral3"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_merge_passes_whatever_the_adapter(tmp_path: Path, family: str, variant: str, dtype: Any) -> None:
    run = trained(tmp_path, family, size=0.02, **VARIANTS[variant])
    found = merge(run, dtype=dtype, quiet=True, proof=False)
    assert found.weights is not None
    assert found.weights.ok
    assert found.weights.changed >= 14


@pytest.mark.parametrize("count", rest_is_long([9, 100], 9))
def test_right_merges_pass_one_after_the_other(tmp_path: Path, count: int) -> None:
    for seed in range(count):
        run = trained(tmp_path / str(seed), seed=seed, r=2 + seed % 7, dtype=torch.bfloat16)
        source = source_of(run)
        files, adapter = source.open()
        changes = merged_weights.weight_changes(files, adapter)
        dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
        folder = tmp_path / f"merged{seed}"
        folder.mkdir()
        (folder / "config.json").write_bytes((files.folder / "config.json").read_bytes())
        merged_weights.write_merged(files, changes, dtype, folder)
        assert prove_weights(open_base(folder), files, adapter, dtype).fault is None


def test_a_merge_warns_of_nothing_that_only_the_makers_of_a_library_can_mend(tmp_path: Path) -> None:
    run = trained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        found = merge(run, quiet=True, proof=False)
    assert found.weights is not None
    assert found.weights.ok


def test_another_revision_of_the_base_is_not_the_base(tmp_path: Path) -> None:
    run = trained(tmp_path)
    files, adapter = source_of(run).open()
    merge(run, quiet=True, proof=False)
    save_base(tmp_path / "newer", "qwen2", dtype=torch.float32)
    newer = open_base(tmp_path / "newer")
    name = next(name for name in newer.tensors if name.endswith("input_layernorm.weight"))
    edit(tmp_path / "newer" / "model.safetensors", **{name.replace(".", "__"): newer.tensors[name].read() + 1e-6})
    found = prove_weights(open_base(run.merged), open_base(tmp_path / "newer"), adapter, torch.float32)
    assert [each.name for each in found.wrong] == [name]
    assert prove_weights(open_base(run.merged), files, adapter, torch.float32).ok


def test_an_older_adapter_in_place_of_the_last_is_found(tmp_path: Path) -> None:
    run = trained(tmp_path)
    merge(run, quiet=True, proof=False)
    later = tmp_path / "later"
    save = adapted(save_base(tmp_path / "again", "qwen2"), tmp_path / "base", size=SMALL, seed=4)
    files = source_of(run).open()[0]
    found = prove_weights(open_base(run.merged), files, read_adapter(save_adapter(later, save)), torch.float32)
    assert len(found.wrong) == 14


def test_weights_that_are_missing_or_added_are_named(tmp_path: Path) -> None:
    run = trained(tmp_path)
    merge(run, quiet=True, proof=False)
    edit(run.merged / "model.safetensors", model__norm__weight=None, more=torch.zeros(2))
    files, adapter = source_of(run).open()
    told = prove_weights(open_base(run.merged), files, adapter, torch.float32).fault
    assert told == "model.norm.weight is missing; more was added"


def test_a_folder_that_loads_as_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = merging.write_companions

    def careless(*arguments: Any) -> None:
        write(*arguments)
        edit_json(arguments[2] / "config.json", rms_norm_eps=2e-5)

    monkeypatch.setattr(merging, "write_companions", careless)
    with pytest.raises(ArtifactError, match=r"Its weights are right, but transformers makes another model"):
        merge(trained(tmp_path, size=0.02), quiet=True)


def test_what_was_compared_is_kept_with_the_merge(tmp_path: Path) -> None:
    run = trained(tmp_path, size=0.02)
    merge(run, quiet=True)
    kept = read_json(run.merged / "made.json")["weights"]
    assert kept["ok"]
    assert kept == read_json(run.parity)["weights"]
    assert kept["changed"] == 14
    assert kept["values"] == sum(each.rows * each.width for each in open_base(run.merged).tensors.values())


@pytest.fixture(scope="module", name="real_adapter")
def adapter_of_a_real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a PEFT adapter of the real model, in which every part matters."""
    from transformers import AutoModelForCausalLM

    base = Path(os.environ["MINIGRPO_REAL_MODEL"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return save_adapter(tmp_path_factory.mktemp("real") / "adapter", adapted(model, base, size=0.01))


@pytest.mark.long
@pytest.mark.env("MINIGRPO_REAL_MODEL")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [None, *MUTATIONS])
def test_of_a_real_model_the_right_merge_passes_and_no_wrong_one(
    real_adapter: Path, tmp_path: Path, name: str | None
) -> None:
    files, adapter = source_of(real_adapter).open()
    changes = merged_weights.weight_changes(files, adapter)
    for companion in files.folder.glob("*.json"):
        shutil.copy(companion, tmp_path)
    merged_weights.write_merged(files, MUTATIONS[name](changes) if name else changes, torch.bfloat16, tmp_path)
    fault = prove_weights(open_base(tmp_path), files, adapter, torch.bfloat16).fault
    (tmp_path / "model.safetensors").unlink(missing_ok=True)  # a gigabyte each
    assert (fault is None) == (name is None)
