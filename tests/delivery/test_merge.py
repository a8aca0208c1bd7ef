"""Merging: equal to PEFT's own, complete or absent, and refused where the result is not what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minigrpo.delivery.artifacts.source import require_merged
from minigrpo.delivery.merge.merge import Merged, merge
from minigrpo.errors import ArtifactError, ModelError
from minigrpo.models.loading import model_class
from minigrpo.models.model_files import compatible_config, find_base, open_base
from minigrpo.runs.rundir import RunDir, digest
from tests.helpers.delivered import FAMILIES, VARIANTS, adapted, edit, edit_json, make_run, save_adapter, save_base
from tests.helpers.tiny import build_tokenizer

YOUNG, GROWN = 1e-5, 0.05


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "base"


def merge_files(adapter: Path, **options: Any) -> Merged:
    return merge(adapter, quiet=True, **{"proof": False, **options})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def loaded(folder: Path) -> Any:
    """Load with transformers; no weight may be missing or unexpected."""
    from transformers import AutoConfig

    opener = model_class(AutoConfig.from_pretrained(folder))
    model, info = opener.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_equals_pefts_own(tmp_path: Path, base: Path, family: str, variant: str) -> None:
    under = adapted(save_base(base, family), base, **VARIANTS[variant])
    found = merge_files(save_adapter(tmp_path / "adapter", under))
    theirs = under.merge_and_unload().state_dict()
    ours = loaded(found.folder).state_dict()
    assert ours.keys() == theirs.keys()
    before = {name: value.clone() for name, value in loaded(base).state_dict().items()}
    assert sum(not torch.equal(before[name], ours[name]) for name in ours) >= 14
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_merge_is_the_exact_sum_rounded_once(tmp_path: Path, base: Path, dtype: torch.dtype) -> None:
    under = adapted(save_base(base, "qwen3", dtype=dtype), base, size=GROWN)
    found = merge_files(save_adapter(tmp_path / "adapter", under), dtype=str(dtype).removeprefix("torch."))
    exact = under.merge_and_unload().state_dict()
    for name, value in weights(found.folder).items():
        assert value.dtype == dtype
        torch.testing.assert_close(value, exact[name].to(dtype), rtol=1e-2, atol=1e-7)
        # A tie may be rounded either way where two sums differ in their last bit.
        assert (value != exact[name].to(dtype)).double().mean() < 1e-3


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_zeros_gives_the_base_back_byte_for_byte(
    tmp_path: Path, base: Path, family: str, shard: str
) -> None:
    under = adapted(save_base(base, family, dtype=torch.bfloat16, shard=shard), base, size=0.0)
    found = merge_files(save_adapter(tmp_path / "adapter", under))
    assert {f.name: digest(f) for f in base.glob("*.safetensors")} == {
        f.name: digest(f) for f in found.folder.glob("*.safetensors")
    }
    if shard != "1GB":
        index = "model.safetensors.index.json"
        assert json.loads((base / index).read_text()) == json.loads((found.folder / index).read_text())
    assert found.dtype == "bfloat16"


def test_an_untied_embedding_may_be_adapted(tmp_path: Path, base: Path) -> None:
    model = save_base(base, "llama")
    under = adapted(model, base, target_modules=["embed_tokens", "q_proj"])
    found = merge_files(save_adapter(tmp_path / "adapter", under))
    torch.testing.assert_close(
        weights(found.folder)["model.embed_tokens.weight"],
        under.merge_and_unload().state_dict()["model.embed_tokens.weight"],
    )


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_merged(tmp_path: Path, base: Path, bias: str) -> None:
    under = adapted(save_base(base, "qwen2"), base, bias=bias)
    with torch.no_grad():
        for name, weight in under.named_parameters():
            if name.endswith("bias"):
                weight.add_(1.0)
    ours = weights(merge_files(save_adapter(tmp_path / "adapter", under)).folder)
    theirs = under.merge_and_unload().state_dict()
    biases = [name for name in ours if name.endswith("bias")]
    assert len(biases) == 6
    assert all(torch.equal(ours[name], theirs[name]) for name in biases)


def test_the_vision_tower_stays_byte_for_byte_whatever_the_dtype(tmp_path: Path, base: Path) -> None:
    under = adapted(save_base(base, "mistral3", dtype=torch.bfloat16), base)
    before = weights(base)
    after = weights(merge_files(save_adapter(tmp_path / "adapter", under), dtype="float32").folder)
    assert before.keys() == after.keys()
    for name, value in before.items():
        text = name.startswith("language_model.")
        assert after[name].dtype == (torch.float32 if text else torch.bfloat16)
        assert text or torch.equal(value, after[name])


def test_tied_embeddings_stay_tied_and_a_second_copy_is_dropped(tmp_path: Path, base: Path) -> None:
    model = save_base(base, "qwen2", tied=True)
    under = adapted(model, base)
    edit(base / "model.safetensors", lm_head__weight=weights(base)["model.embed_tokens.weight"].clone())
    found = merge_files(save_adapter(tmp_path / "adapter", under))
    assert "lm_head.weight" not in weights(found.folder)
    whole = loaded(found.folder)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight


def test_a_tied_head_that_differs_from_the_embedding_is_named(tmp_path: Path, base: Path) -> None:
    under = adapted(save_base(base, "qwen2", tied=True), base)
    edit(base / "model.safetensors", lm_head__weight=weights(base)["model.embed_tokens.weight"] + 1)
    with pytest.raises(ModelError, match="says that the embeddings are tied, but lm_head"):
        merge_files(save_adapter(tmp_path / "adapter", under))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_half_of_a_tied_pair_cannot_be_replaced(tmp_path: Path, base: Path, module: str) -> None:
    model = save_base(base, "qwen2", tied=True)
    under = adapted(model, base, modules_to_save=[module])
    with pytest.raises(ModelError, match="one and the same"):
        merge_files(save_adapter(tmp_path / "adapter", under))


def test_everything_that_later_stages_need_is_beside_the_weights(tmp_path: Path, base: Path) -> None:
    under = adapted(save_base(base, "mistral3"), base)
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "PixtralImageProcessor"}')
    (base / "generation_config.json").write_text('{"temperature": 0.15}')
    (base / "LICENSE").write_text("free")
    for other in ("consolidated.safetensors", "params.json", "tekken.json", "pytorch_model.bin"):
        (base / other).write_text("{}")
    adapter = save_adapter(tmp_path / "adapter", under)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{%- set enable_thinking = false %}" + tokenizer.chat_template
    tokenizer.save_pretrained(adapter)
    folder = merge_files(adapter).folder
    for name in ("preprocessor_config.json", "generation_config.json", "LICENSE"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert "enable_thinking" in (folder / "chat_template.jinja").read_text()
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    there = {file.name for file in folder.iterdir()}
    assert not there & {"consolidated.safetensors", "params.json", "tekken.json", "pytorch_model.bin"}
    assert not [name for name in there if name.startswith("adapter")]
    from transformers import AutoTokenizer

    question = [{"role": "user", "content": "hi"}]
    again = AutoTokenizer.from_pretrained(folder)
    assert again.apply_chat_template(question)["input_ids"] == tokenizer.apply_chat_template(question)["input_ids"]


@pytest.mark.parametrize("family", ["qwen3", "mistral3"])
def test_older_transformers_find_the_rope_settings_and_newer_ones_are_unaffected(
    tmp_path: Path, base: Path, family: str
) -> None:
    from transformers import AutoConfig

    under = adapted(save_base(base, family, dtype=torch.bfloat16), base, size=GROWN)
    folder = merge_files(save_adapter(tmp_path / "adapter", under), dtype="float16").folder
    written = json.loads((folder / "config.json").read_text())
    text = written.get("text_config", written)
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]
    assert written["dtype"] == "float16"
    before, after = AutoConfig.from_pretrained(base), AutoConfig.from_pretrained(folder)
    assert before.get_text_config().rope_parameters == after.get_text_config().rope_parameters


def test_the_scale_of_attention_beyond_the_context_stands_where_vllm_looks_for_it() -> None:
    rope = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 32}
    config = compatible_config({"text_config": {"rope_parameters": rope}}, None)
    wanted = {"beta": 0.1, "original_max_position_embeddings": 32}
    assert config["text_config"]["llama_4_scaling"] == wanted
    assert compatible_config(config, None) == config


def test_a_config_that_says_it_already_is_left_alone() -> None:
    config = {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}, "torch_dtype": "bfloat16"}
    assert compatible_config(config, torch.bfloat16) == config
    assert compatible_config({"rope_parameters": {"full": {"rope_theta": 7.0}}}, None) == {
        "rope_parameters": {"full": {"rope_theta": 7.0}}
    }


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda base, adapter: edit_json(base / "config.json", quantization_config={"quant_method": "fp8"}), "-BF16"),
        (lambda base, adapter: shutil.rmtree(base), "moved or deleted.*--base FOLDER"),
        (lambda base, adapter: (base / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda base, adapter: cut(base / "model.safetensors"), "was cut short"),
        (lambda base, adapter: cut(adapter / "adapter_model.safetensors"), "was cut short"),
        (lambda base, adapter: nan_in(base / "model.safetensors", "model.norm.weight"), "not finite"),
        (lambda base, adapter: nan_in(adapter / "adapter_model.safetensors", "q_proj.lora_B"), "lora_B.*not finite"),
        (lambda base, adapter: odd_pair(adapter), "half"),
        (lambda base, adapter: edit_json(adapter / "adapter_config.json", peft_type="IA3"), "only LoRA"),
        (lambda base, adapter: edit_json(adapter / "adapter_config.json", init_lora_weights="pissa"), "began as pissa"),
        (lambda base, adapter: edit_json(adapter / "adapter_config.json", use_dora=True), "contradict"),
        (lambda base, adapter: save_base(base, "qwen2", hidden_size=48), "is not the base of"),
        (lambda base, adapter: save_base(base, "qwen2", num_hidden_layers=1), "is not the base of.*it has no"),
    ],
)
def test_what_cannot_be_merged_is_told_in_a_sentence_and_leaves_nothing(
    tmp_path: Path, base: Path, fault: Any, told: str
) -> None:
    adapter = save_adapter(tmp_path / "adapter", adapted(save_base(base, "qwen2"), base))
    fault(base, adapter)
    before = set(tmp_path.iterdir())
    with pytest.raises((ArtifactError, ModelError), match=told):
        merge_files(adapter)
    assert set(tmp_path.iterdir()) == before


def test_weights_in_eight_bits_are_refused_without_a_word_of_the_config(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", adapted(save_base(base, "qwen2"), base))
    edit(base / "model.safetensors", model__norm__weight=torch.ones(32).to(torch.float8_e4m3fn))
    with pytest.raises(ModelError, match="quantised weights"):
        merge_files(adapter)


def test_values_that_float16_cannot_hold_are_named(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", adapted(save_base(base, "qwen2"), base))
    edit(base / "model.safetensors", model__norm__weight=torch.full((32,), 1e5))
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*beyond 65504.*--dtype float32"):
        merge_files(adapter, dtype="float16")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def odd_pair(adapter: Path) -> None:
    """Add an A without its B."""
    edit(adapter / "adapter_model.safetensors", base_model__model__x__lora_A__weight=torch.ones(4, 4))


def nan_in(file: Path, name: str) -> None:
    whole = next(key for key in load_file(file) if name in key)
    value = load_file(file)[whole]
    value.view(-1)[3] = float("nan")
    edit(file, **{whole.replace(".", "__"): value})


def test_a_shard_that_is_missing_is_named(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", adapted(save_base(base, "qwen2", shard="20KB"), base))
    (base / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    next(base.glob("model-00003-*")).unlink()
    with pytest.raises(ArtifactError, match=r"model-0000[23]-of.*cannot be read: No such file"):
        merge_files(adapter)


def test_a_base_may_have_moved(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", adapted(save_base(base, "qwen2"), base))
    base.rename(tmp_path / "moved")
    assert merge_files(adapter, base=str(tmp_path / "moved")).folder.is_dir()


def test_the_parts_of_the_base_are_found_by_any_of_their_names(base: Path) -> None:
    save_base(base, "mistral3")
    files = open_base(base)
    own = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert files.on_disk("model.language_model.layers.0.self_attn.q_proj.weight") == own
    assert files.on_disk("model.layers.0.self_attn.q_proj.weight") == own
    assert files.on_disk("model.layers.9.self_attn.q_proj.weight") is None
    assert find_base(str(base)).fingerprint() == files.fingerprint()


def test_a_run_is_merged_once_and_again_only_where_something_changed(tmp_path: Path, base: Path) -> None:
    under = adapted(save_base(base, "qwen2"), base)
    run = make_run(tmp_path / "run", base, under)
    first = merge(run, quiet=True)
    assert (first.verdict, first.folder) == ("merged", run.merged)
    assert require_merged(run) == run.merged
    assert merge(run, quiet=True).verdict == "there already"
    save_adapter(run.adapter, adapted(save_base(tmp_path / "other", "qwen2"), base, seed=4))
    with pytest.raises(ArtifactError, match=r"merged is stale.*minigrpo merge"):
        require_merged(run)
    assert merge(run, quiet=True).verdict == "merged"
    assert require_merged(run) == run.merged


@pytest.mark.parametrize("act", ["change", "add", "remove"])
def test_a_merged_folder_that_was_edited_is_neither_used_nor_replaced(tmp_path: Path, base: Path, act: str) -> None:
    run = make_run(tmp_path / "run", base, adapted(save_base(base, "qwen2"), base))
    merge(run, quiet=True, proof=False)
    file = run.merged / "generation_config.json"
    {"change": lambda: file.write_text("{}"), "remove": file.unlink, "add": (run.merged / "x").touch}[act]()
    name = "x was added" if act == "add" else f"generation_config.json {'is missing' if act == 'remove' else 'was ch'}"
    for use in (require_merged, lambda run: merge(run, quiet=True, proof=False)):
        with pytest.raises(ArtifactError, match=f"{name}.*--force"):
            use(run)
    assert merge(run, quiet=True, proof=False, force=True).verdict == "not proved"
    assert require_merged(run) == run.merged


@pytest.mark.parametrize(
    "place", ["a thesis", "another run", "the run itself", "its checkpoints", "its adapter", "a file"]
)
def test_forcing_a_merge_replaces_nothing_but_a_merge(tmp_path: Path, base: Path, place: str) -> None:
    run = make_run(tmp_path / "run", base, adapted(save_base(base, "qwen2"), base))
    (run.checkpoint(5)).mkdir(parents=True)
    (run.checkpoint(5) / "made.json").write_text('{"made": {"verb": "train"}}')
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("It began well.")
    (tmp_path / "notes").write_text("mine")
    other = make_run(tmp_path / "other", base, None)
    target = {
        **{"a thesis": tmp_path / "thesis", "another run": other.path, "the run itself": run.path},
        **{"its checkpoints": run.checkpoints, "its adapter": run.adapter, "a file": tmp_path / "notes"},
    }[place]
    before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    with pytest.raises(ArtifactError, match=r"Move it away, or name another place: --out FOLDER"):
        merge(run, out=target, force=True, quiet=True, proof=False)
    assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()} == before


def test_nothing_is_merged_before_something_is_trained(tmp_path: Path, base: Path) -> None:
    run: RunDir = make_run(tmp_path / "run", base, adapted(save_base(base, "qwen2"), base))
    shutil.rmtree(run.adapter)
    with pytest.raises(ArtifactError, match="trained nothing yet"):
        merge(run)
    with pytest.raises(ArtifactError, match="is missing"):
        require_merged(run)
    with pytest.raises(ArtifactError, match="is not there"):
        merge(tmp_path / "nowhere")


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", adapted(save_base(base, "qwen2", shard="20KB"), base))
    index = json.loads((base / "model.safetensors.index.json").read_text())
    edit_json(base / "model.safetensors.index.json", weight_map=dict.fromkeys(index["weight_map"], "../x"))
    with pytest.raises(ModelError, match="Do not use this model"):
        merge_files(adapter)
