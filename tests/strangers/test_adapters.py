"""Adapters and bases that strangers bring: a merge is what their files say, or the file is named that says no sense."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.delivery.test_damaged_folders import pickled, renamed, without
from tests.helpers.command_line import DONE, REFUSED, UNFIT, Ended, called, started
from tests.helpers.delivered import adapted, edit_json, make_run, save_adapter, save_base
from tests.strangers import LIMIT_S, cases

pytestmark = [pytest.mark.long, pytest.mark.timeout(LIMIT_S)]
Harm = Callable[[Path], Any]
TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of it that no run made, and a run with the same adapter."""
    folder = tmp_path_factory.mktemp("strangers")
    under = adapted(save_base(folder / "base", "qwen2"), folder / "base")
    save_adapter(folder / "adapter", under)
    make_run(folder / "run", folder / "base", under)
    return folder


# Values that do not belong where they stand.

odd_values = st.sampled_from(
    [None, True, 0, -1, -3.5, 8, 2**31, 10**30, 1e300, float("nan"), float("inf"), [], [3], ["x"], [None], {}]
) | st.sampled_from(
    ["", "x", "4", "(", "*", ".*", "\ud800", "../../etc", "a/b", {"x": "y"}, {"(": 1}, {"q_proj": -1}, {"q_proj": 8}]
)


def words(text: str) -> st.SearchStrategy[str]:
    return st.sampled_from(text.split())


options = words("""
    r lora_alpha target_modules exclude_modules modules_to_save layers_to_transform rank_pattern alpha_pattern
    base_model_name_or_path revision use_rslora use_dora fan_in_fan_out bias peft_type task_type init_lora_weights
    lora_dropout layers_pattern loftq_config lora_bias inference_mode auto_mapping megatron_config target_parameters
    layer_replication nowhere
""")
sizes = words("""
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size model_type intermediate_size
    max_position_embeddings rope_parameters rope_scaling rope_theta layer_types tie_word_embeddings text_config
    quantization_config rms_norm_eps hidden_act dtype torch_dtype architectures eos_token_id bos_token_id pad_token_id
    sliding_window use_sliding_window attention_dropout initializer_range auto_map head_dim nowhere
""")


def saying(name: str, **changes: Any) -> Harm:
    return lambda folder: edit_json(folder / name, **changes)


odd_options = st.builds(lambda option, value: saying("adapter_config.json", **{option: value}), options, odd_values)
odd_sizes = st.builds(lambda size, value: saying("config.json", **{size: value}), sizes, odd_values)


# Files that were cut, changed or exchanged.


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Harm:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def headed(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Change a safetensors file's header, and leave its tensors."""

    def changed(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + length])
        change(table)
        header = json.dumps(table).encode()
        return len(header).to_bytes(8, "little") + header + raw[8 + length :]

    return changed


def entry_of(table: dict[str, Any], number: int) -> dict[str, Any]:
    names = sorted(name for name in table if name != "__metadata__")
    entry: dict[str, Any] = table[names[number % len(names)]]
    return entry


odd_entries = st.builds(
    lambda number, key, value: headed(lambda table: entry_of(table, number).update({key: value})),
    st.integers(0, 50),
    st.sampled_from(["dtype", "shape", "data_offsets"]),
    odd_values | st.sampled_from(["F64", "I32", "F8_E4M3", "BOOL", [4], [-4, 32], [0, 2**70], [32, 4], [4.0, 32]]),
)
odd_headers = odd_entries | st.sampled_from(
    [
        headed(lambda table: table.update({"__metadata__": 3})),
        headed(lambda table: table.update({"__metadata__": {"format": 3}})),
        headed(lambda table: table.update({"x": {}})),
        headed(lambda table: table.clear()),
        lambda raw: (2**64 - 1).to_bytes(8, "little") + raw[8:],
        lambda raw: (0).to_bytes(8, "little") + raw[8:],
        lambda raw: (7).to_bytes(8, "little") + raw[8:],
    ]
)
cuts = st.floats(0, 1).map(lambda share: lambda raw: raw[: int(share * len(raw))])
flips = st.builds(
    lambda share, value: lambda raw: raw[: (at := int(share * len(raw)))] + bytes([value]) + raw[at + 1 :],
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 255),
)
other_bytes = st.binary(max_size=20) | st.sampled_from([b"{}", b"[]", b"null", b"{" * 9999, "{}".encode("utf-16")])
exchanged = other_bytes.map(lambda raw: lambda _: raw)


def harmed(names: list[str]) -> st.SearchStrategy[Harm]:
    return st.builds(rewritten, st.sampled_from(names), cuts | flips | exchanged)


def folder_in_place(name: str) -> Harm:
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


# Tensors that are no part of an adapter of this base.


def retensored(number: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Harm:
    def act(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        name = sorted(tensors)[number % len(tensors)]
        save_file({**tensors, name: change(tensors[name]).contiguous()}, folder / TENSORS, {"format": "pt"})

    return act


odd_tensors = st.builds(
    retensored,
    st.integers(0, 50),
    st.sampled_from(
        [
            lambda value: value * torch.nan,
            lambda value: value * torch.inf,
            lambda value: value * 1e30,
            lambda value: value * 0,
            lambda value: value * 3,
            lambda value: value.T,
            lambda value: value[:0],
            lambda value: value[:, :0],
            lambda value: value[:1],
            lambda value: value[None],
            lambda value: value.flatten(),
            lambda value: value.sum(),
            lambda value: value.half(),
            lambda value: value.bfloat16(),
            lambda value: value.double(),
            lambda value: value.to(torch.int8),
            lambda value: value > 0,
            lambda value: value.to(torch.float8_e4m3fn),
        ]
    ),
)


def named_anew(change: Callable[[str], str]) -> Harm:
    def act(folder: Path) -> None:
        save_file({change(name): value for name, value in load_file(folder / TENSORS).items()}, folder / TENSORS)

    return act


odd_names = st.sampled_from(
    [
        named_anew(lambda name: name.replace("base_model.model.", "")),
        named_anew(lambda name: name.replace("base_model.model.", "base_model.model.base_model.model.")),
        named_anew(lambda name: name.replace("lora_A.weight", "lora_A.default.weight")),
        named_anew(lambda name: name.replace("lora_A", "lora_down")),
        named_anew(lambda name: name.replace("lora_B", "lora_C")),
        named_anew(lambda name: name.replace("layers.1", "layers.7")),
        named_anew(lambda name: name.replace(".q_proj", ".c_attn")),
        named_anew(lambda name: name.replace(".lora_A.weight", ".weight").replace(".lora_B.weight", ".bias")),
        renamed,
        pickled,
        lambda folder: save_file({}, folder / TENSORS),
        lambda folder: save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / TENSORS),
    ]
)
OWN = ["adapter_config.json", TENSORS]
harms = (
    odd_options
    | st.builds(rewritten, st.just(TENSORS), odd_headers)
    | harmed(OWN)
    | odd_tensors
    | odd_names
    | st.sampled_from([*map(without, OWN), *map(folder_in_place, OWN)])
)
harms_of_bases = (
    odd_sizes
    | st.builds(rewritten, st.just("model.safetensors"), odd_headers)
    | harmed(["config.json", "model.safetensors", "generation_config.json", "tokenizer.json"])
    | st.sampled_from([without("config.json"), without("model.safetensors"), folder_in_place("config.json")])
)

# What is done with them. Each takes a place with `adapter` and `base`.

EVALUATION = ("--limit", "1", "--rollout.max_tokens", "2", "--model.device", "cpu", "--json")


def checked(place: Path, run: Callable[..., Ended] = called) -> Ended:
    return run("check", place / "adapter", "--base", place / "base", "--no-model", "--json")


def checked_with_its_model(place: Path, run: Callable[..., Ended] = called) -> Ended:
    return run("check", place / "adapter", "--base", place / "base", "--json")


def merged(place: Path, run: Callable[..., Ended] = called) -> Ended:
    where = ("--base", place / "base", "--dtype", "float32", "--out", place / "merged")
    return run("merge", place / "adapter", *where, "--no-proof", "--json")


def adopted(place: Path, run: Callable[..., Ended] = called) -> Ended:
    where = ("--base", place / "base", "--run", place / "theirs")
    return run("adopt", place / "adapter", *where, "--task.name", "wordproblems", "--json")


def evaluated(place: Path, run: Callable[..., Ended] = called) -> Ended:
    """It asks for the base that the adapter names."""
    return run("evaluate", place / "adapter", "--out", place / "found.json", *EVALUATION)


def evaluated_base(place: Path, run: Callable[..., Ended] = called) -> Ended:
    return run("evaluate", place / "base", "--out", place / "found.json", *EVALUATION)


def planned(place: Path, run: Callable[..., Ended] = called) -> Ended:
    return run("plan", "quickstart", "--model.path", place / "base", "--model.device", "cpu", "--json")


def exported(place: Path, run: Callable[..., Ended] = called) -> Ended:
    return run("export", place / "base", "--format", "F32", "--writer", "own", "--out", place / "gguf", "--json")


def adds_up(place: Path) -> None:
    """Compute the merge by itself, from the files as they are, and hold the merged folder to it."""
    config = json.loads((place / "adapter" / "adapter_config.json").read_text())
    tensors, base = load_file(place / "adapter" / TENSORS), load_file(place / "base" / "model.safetensors")
    found = load_file(place / "merged" / "model.safetensors")
    assert found.keys() == base.keys()
    for name, before in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in tensors:
            continue
        a, b = (tensors[f"{module}.lora_{part}.weight"].double() for part in "AB")
        patterns = config.get("alpha_pattern") or {}
        alpha = next((value for key, value in patterns.items() if module.endswith(key)), config["lora_alpha"])
        scale = alpha / (a.shape[0] ** 0.5 if config.get("use_rslora") else a.shape[0])
        change = scale * ((a.T @ b.T) if config.get("fan_in_fan_out") else b @ a)
        torch.testing.assert_close(found[name].double(), before.double() + change, rtol=1e-5, atol=1e-5)


def named(ended: Ended, place: Path) -> None:
    """A refusal, and each fault of a check, names one of the files or folders that were given."""
    if ended.code == REFUSED:
        assert str(place) in ended.refused
        assert len(ended.refused) < 1500
    elif ended.code == UNFIT and '"faults"' in ended.out:
        assert json.loads(ended.out)["faults"]


@cases(150)
@given(harm=harms, verb=st.sampled_from([checked, merged, adopted]))
def test_an_odd_adapter_is_taken_for_what_it_says_or_refused_with_its_file(
    parts: Path, harm: Harm, verb: Callable[..., Ended]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(parts / "adapter", place / "adapter")
        shutil.copytree(parts / "base", place / "base")
        harm(place / "adapter")
        ended = verb(place)
        event(f"{verb.__name__}: {ended.code}")
        named(ended, place)
        if verb is merged and ended.code == DONE:
            adds_up(place)


@cases(50)
@given(harm=harms, verb=st.sampled_from([checked_with_its_model, evaluated]))
def test_an_odd_adapter_is_opened_or_refused_with_its_file(parts: Path, harm: Harm, verb: Callable[..., Ended]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(parts / "adapter", place / "adapter")
        shutil.copytree(parts / "base", place / "base")
        edit_json(place / "adapter" / "adapter_config.json", base_model_name_or_path=str(place / "base"))
        harm(place / "adapter")
        ended = verb(place)
        event(f"{verb.__name__}: {ended.code}")
    named(ended, place)


@pytest.mark.extra("gguf")
@cases(100)
@given(harm=harms_of_bases, verb=st.sampled_from([checked, merged, adopted, planned, evaluated_base, exported]))
def test_an_odd_base_is_taken_or_refused_with_its_file(parts: Path, harm: Harm, verb: Callable[..., Ended]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(parts / "adapter", place / "adapter")
        shutil.copytree(parts / "base", place / "base")
        harm(place / "base")
        ended = verb(place)
        event(f"{verb.__name__}: {ended.code}")
    named(ended, place)


@cases(40)
@given(harm=harms, verb=st.sampled_from(["verify", "check", "merge", "serve", "publish", "export"]))
def test_a_run_with_an_odd_adapter_is_refused_by_every_stage(parts: Path, harm: Harm, verb: str) -> None:
    options = {"serve": ("--dry-run",), "publish": ("--repo", "me/x", "--dry-run"), "check": ("--no-model",)}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(parts / "run", Path(folder) / "run"))
        harm(run / "adapter")
        ended = called(verb, run, *options.get(verb, ()))
        event(f"{verb}: {ended.code}")
    assert ended.code != REFUSED or str(folder) in ended.refused


@cases(3)
@given(harm=harms)
def test_a_process_of_its_own_says_the_same(parts: Path, harm: Harm) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(parts / "adapter", place / "adapter")
        shutil.copytree(parts / "base", place / "base")
        harm(place / "adapter")
        named(merged(place, lambda *args: started(*args, cwd=place)), place)
