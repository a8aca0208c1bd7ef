"""Damaged folders, and those of other tools, end in a sentence that names the file, in every command of delivery."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigrpo.delivery.gguf.export import export
from minigrpo.delivery.merge.check import check
from minigrpo.delivery.merge.merge import merge
from minigrpo.delivery.serve.resolve import ServeOptions, resolve_servable
from minigrpo.delivery.verify import verify
from minigrpo.errors import MinigrpoError
from minigrpo.models.loading import check_sizes
from minigrpo.models.safetensors_io import read_header
from minigrpo.pipeline.evaluate import evaluate
from minigrpo.runs.rundir import RunDir
from tests.helpers.delivered import adapted, edit, edit_json, make_run, save_base

Harm = Callable[[Path], Any]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def cut(name: str) -> Harm:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:300])


def resized(**sizes: Any) -> Harm:
    return lambda folder: edit_json(folder / "config.json", **sizes)


def emptied(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def without(*names: str) -> Harm:
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def pickled(folder: Path) -> None:
    """Leave the adapter as PEFT once wrote it."""
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def renamed(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({f"module.{name}": value for name, value in load_file(file).items()}, file)


BASES: dict[str, tuple[Harm, str]] = {
    "template": (without("chat_template.jinja"), "has no chat template.*chat_template.jinja"),
    "cut tokenizer": (cut("tokenizer.json"), "tokenizer.json could not be loaded"),
    "empty tokenizer": (emptied, "tokenizer.json could not be loaded"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer.json is missing"),
    "unknown type": (resized(model_type="martian"), "config.json cannot be used.*martian"),
    "negative": (resized(hidden_size=-32), "config.json: hidden_size is -32"),
    "absurd": (resized(num_hidden_layers=10**9), "config.json: num_hidden_layers is 1000000000"),
    "a word": (resized(vocab_size="many"), "config.json: vocab_size is many"),
    "more layers": (
        resized(num_hidden_layers=3, layer_types=None),
        r"model\.layers\.2.*config\.json|has no model\.layers\.2|missing keys: model\.layers\.2",
    ),
}
ADAPTERS: dict[str, tuple[Harm, str]] = {
    "nan": (lambda folder: edit(folder / "adapter_model.safetensors", **{FIRST: torch.full((32, 4), torch.nan)}), ""),
    "pickle": (pickled, "adapter_model.safetensors is missing; adapter_model.bin is a pickle"),
    "prefix": (renamed, "adapter_model.safetensors holds module.base_model"),
}
NOT_FINITE = "adapter_model.safetensors: .*lora_B.weight holds values that are not finite"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run with its merged model, and the base beside it."""
    folder = tmp_path_factory.mktemp("parts")
    run = make_run(folder / "run", folder / "base", adapted(save_base(folder / "base", "qwen2"), folder / "base"))
    merge(run, quiet=True)
    return folder


@pytest.mark.parametrize("name", BASES)
def test_a_damaged_base_is_told_by_the_name_of_its_file(parts: Path, tmp_path: Path, name: str) -> None:
    harm, told = BASES[name]
    base = Path(shutil.copytree(parts / "base", tmp_path / "base"))
    run = RunDir(Path(shutil.copytree(parts / "run", tmp_path / "run")))
    shutil.rmtree(run.merged)
    for file in (*run.adapter.glob("tokenizer*"), *run.adapter.glob("chat_template*")):
        file.unlink()  # adapters of other tools have none of their own
    harm(base)
    with pytest.raises(MinigrpoError, match=told):
        evaluate(str(base), limit=1, out=tmp_path / "found.json", quiet=True)
    with pytest.raises(MinigrpoError, match=told):
        merge(run.adapter, base=str(base), quiet=True)
    (fault,) = check(run.adapter, base=str(base), quiet=True).faults
    assert fault.count(".json") + fault.count(".jinja")


@pytest.mark.extra("gguf")
@pytest.mark.parametrize("name", BASES)
def test_a_damaged_model_is_not_exported(parts: Path, tmp_path: Path, name: str) -> None:
    harm, told = BASES[name]
    base = Path(shutil.copytree(parts / "base", tmp_path / "base"))
    harm(base)
    with pytest.raises(MinigrpoError, match=rf"{told}|architecture 'martian' is none of"):
        export(base, ["F32"], writer="own", quiet=True)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_cannot_be_used_is_refused_by_all(parts: Path, tmp_path: Path, name: str) -> None:
    harm, told = ADAPTERS[name]
    told = told or NOT_FINITE
    run = RunDir(Path(shutil.copytree(parts / "run", tmp_path / "run")))
    harm(run.adapter)
    uses: dict[str, Callable[[], Any]] = {
        "evaluate": lambda: evaluate(str(run.path), limit=1, out=tmp_path / "found.json", quiet=True),
        "merge": lambda: merge(run, quiet=True, force=True),
        "verify": lambda: verify(run, quiet=True),
        "serve": lambda: resolve_servable(str(run.path), ServeOptions(engine="vllm", adapter=True)),
    }
    for use in uses.values():
        with pytest.raises(MinigrpoError, match=told):
            use()
    found = check(run, quiet=True)
    assert not found.ok
    assert "adapter_model" in found.faults[0] or "not finite" in found.faults[0]


def test_sizes_of_real_configs_pass() -> None:
    """Some give one size a layer, and null stands for a default."""
    text = {"hidden_size": 18432, "num_hidden_layers": 126, "vocab_size": 262208, "max_position_embeddings": 10485760}
    check_sizes({"text_config": text, "head_dim": None, "intermediate_size": [64, 128]}, Path("config.json"))
    with pytest.raises(MinigrpoError, match="num_key_value_heads is True"):
        check_sizes({"text_config": json.loads('{"num_key_value_heads": true}')}, Path("config.json"))


OPTIONS: dict[str, Any] = {
    "r": 0,
    "lora_alpha": "many",
    "target_modules": "(",
    "exclude_modules": 3,
    "modules_to_save": "lm_head",
    "layers_to_transform": "all",
    "rank_pattern": {"(": 4},
    "alpha_pattern": {"q_proj": "many"},
    "base_model_name_or_path": 3,
    "revision": ["main"],
    "use_dora": "no",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_peft_would_not_write_is_told_by_its_name(parts: Path, tmp_path: Path, option: str) -> None:
    run = RunDir(Path(shutil.copytree(parts / "run", tmp_path / "run")))
    edit_json(run.adapter / "adapter_config.json", **{option: OPTIONS[option]})
    with pytest.raises(MinigrpoError, match=rf"adapter_config\.json: {option} is .*, and must be"):
        merge(run.adapter, base=str(parts / "base"), quiet=True)
    (fault,) = check(run, quiet=True).faults
    assert f"adapter_config.json: {option} is" in fault


def test_an_adapter_without_its_alpha_is_refused(parts: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(parts / "run", tmp_path / "run")))
    edit_json(run.adapter / "adapter_config.json", lora_alpha=None)
    with pytest.raises(MinigrpoError, match="lora_alpha is null, and must be a number"):
        merge(run.adapter, base=str(parts / "base"), quiet=True)


def test_a_pair_of_rank_zero_is_refused(parts: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(parts / "run", tmp_path / "run")))
    pair = {FIRST: torch.empty(32, 0), FIRST.replace("lora_B", "lora_A"): torch.empty(0, 32)}
    edit(run.adapter / "adapter_model.safetensors", **pair)
    with pytest.raises(MinigrpoError, match=r"adapter_model\.safetensors: .*q_proj has an A .*: it is empty"):
        merge(run, quiet=True, force=True)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"shape": [1e999]}, "no list of whole numbers"),
        ({"shape": "12"}, "no list of whole numbers"),
        ({"data_offsets": [0, 1e999]}, "no list of whole numbers"),
        ({"shape": [0, 2**70]}, "cannot be read here"),
        ({"shape": [-1, -1]}, "cannot be read here"),
    ],
)
def test_a_header_that_says_no_sense_is_refused_with_its_file(
    parts: Path, tmp_path: Path, entry: dict[str, Any], told: str
) -> None:
    table = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}
    raw = json.dumps(table).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(MinigrpoError, match=rf"x\.safetensors is damaged.*{told}"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["text_config", "rope_parameters", "rope_scaling", "quantization_config"])
def test_a_part_of_a_config_that_is_no_object_is_told_by_its_name(parts: Path, tmp_path: Path, name: str) -> None:
    base = Path(shutil.copytree(parts / "base", tmp_path / "base"))
    edit_json(base / "config.json", **{name: 3})
    with pytest.raises(MinigrpoError, match=rf"config\.json: {name} is 3, and must be an object"):
        merge(RunDir(parts / "run").adapter, base=str(base), quiet=True)


@pytest.mark.parametrize("targets", ["x", ".*"])
def test_layers_that_peft_does_not_find_are_told_when_a_merge_is_proved(
    parts: Path, tmp_path: Path, targets: str
) -> None:
    adapter = Path(shutil.copytree(parts / "run" / "adapter", tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", target_modules=targets)
    with pytest.raises(MinigrpoError, match=r"PEFT cannot put .*adapter on .*base"):
        merge(adapter, base=str(parts / "base"), out=tmp_path / "merged", quiet=True)
    assert not (tmp_path / "merged").exists()


def test_metadata_of_a_header_that_is_no_text_is_refused_with_its_file(tmp_path: Path) -> None:
    raw = json.dumps({"__metadata__": {"format": 3}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(MinigrpoError, match=r"x\.safetensors is damaged.*its metadata is"):
        read_header(tmp_path / "x.safetensors")
