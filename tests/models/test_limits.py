"""What cannot be trained or delivered is said when a model is opened, by plan and training alike."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
import torch

from minigrpo.config.schema import AdapterConfig, Recipe
from minigrpo.errors import ModelError, RecipeError
from minigrpo.models.limits import (
    check_engine,
    check_experts,
    check_trainable,
    convert_command,
    expert_count,
    packing_method,
)
from minigrpo.models.lora import add_lora
from minigrpo.models.policy import open_policy
from minigrpo.training.memory.estimate import read_sketch
from tests.helpers.models import build_mistral3
from tests.helpers.tiny import build_model, build_tokenizer

PACKED = {
    "bitsandbytes, 4 bit": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "gptq, 4 bit": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq, 4 bit": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "mxfp4": {"quant_method": "mxfp4"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small")
    build_model("qwen2").save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def recipe_of(path):
    return Recipe.model_validate({"model": {"path": str(path)}})


def linked(folder, path, **config):
    """Return a folder with the same files and another config."""
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).symlink_to(file)
    told = json.loads((folder / "config.json").read_text()) | config
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(told))
    return path


@pytest.mark.parametrize("method", PACKED)
def test_a_base_that_is_packed_already_is_refused_by_plan_and_training_alike(folder, tmp_path, method):
    packed = linked(folder, tmp_path / "Small-bnb-4bit", quantization_config=PACKED[method])
    for look in (read_sketch, open_policy):
        with pytest.raises(
            ModelError, match=re.escape(f"packed already ({method})") + ".*--model.quantize nf4"
        ) as fault:
            look(recipe_of(packed))
        assert f"Its name usually is {tmp_path / 'Small'}" in str(fault.value)


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("unsloth/Qwen3-0.6B-unsloth-bnb-4bit", "unsloth/Qwen3-0.6B"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct"),
        ("owner/Model-quantized.w4a16", "owner/Model-quantized"),
    ],
)
def test_the_refusal_names_the_likely_original(name, original):
    config = SimpleNamespace(quantization_config=PACKED["gptq, 4 bit"], name_or_path=name)
    with pytest.raises(ModelError, match=re.escape(f"Its name usually is {original}.")):
        check_trainable(config, name)


def test_a_text_model_packed_inside_of_a_larger_one_is_seen():
    assert (
        packing_method(SimpleNamespace(text_config=SimpleNamespace(quantization_config={"quant_method": "awq"})))
        == "awq"
    )
    assert packing_method(SimpleNamespace(quantization_config=None)) is None


def test_weights_in_bin_files_are_refused_with_a_command_that_converts_them(folder, tmp_path):
    old = linked(folder, tmp_path / "it's old")
    (old / "model.safetensors").unlink()
    torch.save(build_model("qwen2").state_dict(), old / "pytorch_model.bin")
    for look in (read_sketch, open_policy):
        with pytest.raises(ModelError, match="could be trained, but not be merged") as fault:
            look(recipe_of(old))
    command = shlex.split(str(fault.value).partition("--model.path: ")[2])
    assert command == shlex.split(convert_command(str(old)))
    exec(command[2], {})
    assert read_sketch(recipe_of(f"{old}-safetensors")).config.model_type == "qwen2"


def mixture(kind, **experts):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts_per_tok=2,
        eos_token_id=3,
        **experts,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 16}),
        ("Mixtral", {"num_local_experts": 4}),
        ("GptOss", {"num_local_experts": 4}),
    ],
)
def test_a_mixture_of_experts_is_refused_by_plan_and_training_alike(tmp_path, kind, experts):
    model = mixture(kind, **experts)
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    for look in (read_sketch, open_policy):
        with pytest.raises(ModelError, match=r"is a mixture of experts.*could be trained, but not be merged"):
            look(recipe_of(tmp_path))
    with pytest.raises(ModelError, match="is a mixture of experts"):  # where the config does not tell
        check_experts(model, "x")


def test_dense_models_are_no_mixtures():
    for model in (build_model("qwen2"), build_model("lfm2"), build_mistral3()):
        assert expert_count(model.config) == 1
        check_experts(model, "x")
    assert expert_count(SimpleNamespace(num_experts=None, num_local_experts=1)) == 1
    assert expert_count(SimpleNamespace(text_config=SimpleNamespace(n_routed_experts=64))) == 64


@pytest.mark.parametrize("engine", ["native", "slots", "vllm"])
def test_an_engine_that_lacks_dora_refuses_it_when_it_is_opened(engine):
    layer = torch.nn.Linear(2, 2)
    layer.use_dora = {"default": True}
    with pytest.raises(RecipeError, match=f"rollout.engine {engine} cannot sample from a DoRA"):
        check_engine(torch.nn.Sequential(layer), engine)
    check_engine(torch.nn.Sequential(layer), "transformers")
    layer.use_dora = {"default": False}
    check_engine(torch.nn.Sequential(layer), engine)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("q_proj,,zz", r"'q_proj,,zz': an empty name and 'zz' fits no linear layer"),
        ("q_proj,v_porj", r"'v_porj' fits no linear layer of this model\. Did you mean v_proj\?"),
        ("all-linear,q_proj", r"'all-linear' fits no linear layer"),
        ("q_proj,self_attn.gate_proj", r"'self_attn\.gate_proj' fits no linear layer.*Did you mean gate_proj"),
        ("q_proj,", r"an empty name fits no linear layer"),
        ("embed_tokens", r"'embed_tokens' fits no linear layer"),
        ("q_proj,norm", r"'norm' fits no linear layer"),
        ("self_attn", r"'self_attn' fits no linear layer"),
    ],
)
@pytest.mark.parametrize("build", [build_model, build_mistral3])
def test_every_name_of_lora_targets_must_fit_a_layer(build, targets, said):
    with pytest.raises(RecipeError, match=said):
        add_lora(build(), AdapterConfig(targets=targets), seed=0)


def test_names_with_more_than_their_last_part_fit():
    model, _ = add_lora(build_model("qwen2"), AdapterConfig(targets="self_attn.q_proj, 0.mlp.up_proj"), seed=0)
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 3
