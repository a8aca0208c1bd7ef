"""QLoRA: the base in 4 bit is left alone, the adapter learns, and all readers of the weights agree on their values."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.algorithms.objective import OBJECTIVES
from minigrpo.algorithms.packing import pack
from minigrpo.config.schema import AdapterConfig, ModelConfig, Recipe, RolloutConfig, SaveConfig, TrainConfig
from minigrpo.errors import ModelError
from minigrpo.models.lora_linear import is_four_bit, unpacked_weight
from minigrpo.models.policy import Policy, open_policy, open_trained
from minigrpo.models.quantize import eight_bit_adamw, quantize_four_bit, weight_bytes
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.rollouts.engines.registry import open_engine
from minigrpo.rollouts.engines.transformers import TransformersEngine
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.training import checkpoint
from minigrpo.training.grpo import grpo
from minigrpo.types import Grade, Group, Prompt, Sampling, Task
from tests.helpers.models import gradients, made_up_groups, rendered, set_lora
from tests.helpers.tiny import ARCHITECTURES, LLAMA_LIKE, build_model

pytestmark = pytest.mark.extra("qlora")
CPU = torch.device("cpu")


def recipe_for(folder: Path, steps: int = 4, **model: Any) -> Recipe:
    return Recipe(
        model=ModelConfig(path=str(folder), **{"quantize": "nf4", **model}),
        lora=AdapterConfig(rank=8, alpha=16),
        rollout=RolloutConfig(prompts=3, completions=4, max_tokens=8),
        train=TrainConfig(steps=steps, lr=2e-2, tokens_per_pass=90),
        save=SaveConfig(every=2),
    )


def letters() -> Task:
    """Reward the share of lower-case letters. Even random weights can learn it."""

    def prompts(split: str) -> list[Prompt]:
        return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},)) for i in range(20)]

    return Task("letters", prompts, lambda prompt, text: Grade(sum(letter.islower() for letter in text) / 8))


def train(recipe: Recipe, run: RunDir) -> Policy:
    policy = open_policy(recipe)
    run.path.mkdir(exist_ok=True)
    grpo(recipe, letters(), policy, open_engine(policy, recipe), RunLogger(run, recipe.train.steps))
    return policy


def packed_layers(policy: Policy) -> dict[str, Any]:
    """PEFT's wrappers show the weights of what they wrap; the layers themselves are asked for."""
    layers = policy.model.named_modules()
    return {name: layer for name, layer in layers if is_four_bit(layer) and not hasattr(layer, "base_layer")}


def frozen_bytes(policy: Policy) -> dict[str, bytes]:
    """Return the bytes of all that is not trained.

    Packed weights with their statistics, head, embeddings, norms, biases.
    """
    found = {n: p.detach().view(torch.uint8) for n, p in policy.model.named_parameters() if not p.requires_grad}
    for name, layer in packed_layers(policy).items():
        state = layer.weight.quant_state
        found |= {f"{name}.absmax": state.absmax, f"{name}.absmax2": state.state2.absmax.view(torch.uint8)}
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in found.items()}


@pytest.mark.long
def test_reward_rises_the_base_stays_to_the_last_byte_and_checkpoints_hold_the_adapter_alone(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, run = recipe_for(tiny_folder(), steps=15), RunDir(tmp_path / "run")
    fresh = open_policy(recipe)
    policy = train(recipe, run)
    assert len(packed_layers(policy)) == 14
    assert frozen_bytes(policy) == frozen_bytes(fresh)
    assert all(weight.dtype == torch.float32 for weight in policy.trainable)
    assert not any(torch.equal(a, b) for a, b in zip(policy.trainable, fresh.trainable, strict=True))
    rewards = [json.loads(line)["reward"] for line in run.metrics.read_text().splitlines()]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15
    saved = {file.name for file in run.checkpoint(14).iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved


@pytest.mark.long
def test_a_resumed_run_ends_at_the_same_bits(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    expected = train(recipe_for(tiny_folder(), steps=4), whole)
    train(recipe_for(tiny_folder(), steps=2), cut)
    found = train(recipe_for(tiny_folder(), steps=4), cut)
    assert all(torch.equal(a, b) for a, b in zip(expected.trainable, found.trainable, strict=True))
    found_checkpoint, _ = checkpoint.find_latest(cut)
    assert found_checkpoint is not None
    assert found_checkpoint.step == 4


def test_packed_weights_take_a_quarter_of_sixteen_bit_ones() -> None:
    size = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    sixteen, packed = (build_model("qwen3", **size).bfloat16() for _ in range(2))
    rest = {sixteen.get_input_embeddings().weight, sixteen.get_output_embeddings().weight}
    rest_bytes = sum(weight.nbytes for weight in rest)
    before = weight_bytes(sixteen) - rest_bytes
    after = weight_bytes(quantize_four_bit(packed, CPU)) - rest_bytes
    assert 0.25 < after / before < 0.27


def test_head_embeddings_and_norms_keep_their_type_and_what_is_tied_stays_tied() -> None:
    model = quantize_four_bit(build_model("qwen2", tie_word_embeddings=True), CPU)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    floating = [name for name, weight in model.named_parameters() if weight.dtype == torch.float32]
    assert {name.rsplit(".", 2)[-2] for name in floating if name.endswith("weight")} == {
        *("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm")
    }


def dense_twin(policy: Policy) -> Policy:
    """Return the same policy with its weights unpacked permanently."""
    for layer in packed_layers(policy).values():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = torch.nn.Parameter(unpacked_weight(layer), requires_grad=False), layer.bias
        owner = next(m for m in policy.model.modules() if getattr(m, "base_layer", None) is layer)
        owner.base_layer = plain
    return policy


def test_a_device_for_which_bitsandbytes_has_no_kernels_is_refused_with_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"nf4 .* no kernels for mps.*--model\.device cpu"):
        quantize_four_bit(build_model("qwen2"), torch.device("mps"))
    with pytest.raises(ModelError, match=r"adamw8bit .* no kernels for meta"):
        eight_bit_adamw([torch.nn.Parameter(torch.zeros(8, device="meta"))], lr=1.0, betas=(0.9, 0.9), weight_decay=0.0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_values_and_gradients_are_those_of_the_unpacked_weights(
    checkpointing: str, dropout: float, tiny_folder: Callable[..., Path]
) -> None:
    recipe = recipe_for(tiny_folder(), checkpointing=checkpointing)
    recipe = recipe.model_copy(update={"lora": AdapterConfig(rank=2, alpha=16, dropout=dropout)})
    results = []
    for policy in (open_policy(recipe), dense_twin(open_policy(recipe))):
        set_lora(policy, 0.05)
        (part,) = pack(made_up_groups(), OBJECTIVES["grpo"], 60).split(1 << 30)
        # A pass without a gradient comes first: it must not repack the weights for a kernel that has none.
        reference_N = policy.reference(part)
        logprobs_N = policy.logprobs(part, step=3).logprobs_N
        (logprobs_N * torch.linspace(-1, 2, len(logprobs_N))).sum().backward()
        results.append((reference_N, logprobs_N.detach(), gradients(policy)))
    (ref, logprobs, found), (other_ref, other_logprobs, expected) = results
    torch.testing.assert_close(ref, other_ref, atol=1e-5, rtol=0)
    torch.testing.assert_close(logprobs, other_logprobs, atol=1e-5, rtol=0)
    assert min(float(gradient.abs().max()) for gradient in found) > 1e-3
    for left, right in zip(found, expected, strict=True):
        assert float((left - right).abs().max()) < 1e-4 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("lora", [0.0, 1e-3, 0.02])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_engine_and_policy_agree_in_four_bit(arch: str, lora: float, tiny_folder: Callable[..., Path]) -> None:
    recipe = recipe_for(tiny_folder(arch))
    policy = open_policy(recipe)
    engine = open_engine(policy, recipe)
    assert isinstance(engine, NativeEngine if arch in LLAMA_LIKE else TransformersEngine)
    set_lora(policy, lora)
    engine.update(policy)
    answers = engine.generate(rendered(), 4, Sampling(1.0, 50, 7))
    grades = tuple(Grade(float(i)) for i in range(4))
    groups = [Group(p.prompt, p.ids, own, grades) for p, own in zip(rendered(), answers, strict=True)]
    (part,) = pack(groups, OBJECTIVES["grpo"], 50).split(1 << 30)
    assert float((policy.logprobs(part, step=0).logprobs_N.detach() - part.engine_N).abs().max()) < 1e-4


def test_a_finished_adapter_is_opened_over_the_base_that_it_was_trained_on(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_for(tiny_folder())
    policy = open_policy(recipe)
    set_lora(policy, 0.05)
    policy.save(tmp_path / "adapter")
    (part,) = pack(made_up_groups(), OBJECTIVES["grpo"], 60).split(1 << 30)
    with torch.no_grad():
        expected = policy.logprobs(part, step=0).logprobs_N
        found = open_trained(str(tmp_path / "adapter"), recipe).logprobs(part, step=0).logprobs_N
        other = recipe.model_copy(update={"model": ModelConfig(path=recipe.model.path)})
        unpacked = open_trained(str(tmp_path / "adapter"), other).logprobs(part, step=0).logprobs_N
    assert torch.equal(expected, found)
    assert float((expected - unpacked).abs().max()) > 1e-2


def test_in_sixteen_bit_packed_layers_compute_in_sixteen_bit(tiny_folder: Callable[..., Path]) -> None:
    policy = open_policy(recipe_for(tiny_folder(), dtype="bfloat16"))
    assert all(unpacked_weight(layer).dtype == torch.bfloat16 for layer in packed_layers(policy).values())
    assert all(weight.dtype == torch.float32 for weight in policy.trainable)
    (part,) = pack(made_up_groups(), OBJECTIVES["grpo"], 60).split(1 << 30)
    policy.logprobs(part, step=0).logprobs_N.sum().backward()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(policy))


def test_without_bitsandbytes_the_error_says_how_to_get_it(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install 'minigrpo\[qlora\]'"):
        open_policy(recipe_for(tiny_folder()))


def test_weights_that_are_quantised_already_are_refused() -> None:
    model = build_model()
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ModelError, match="quantised already"):
        quantize_four_bit(model, CPU)


def test_training_packed_weights_is_a_contradiction(tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"model\.quantize packs frozen weights"):
        Recipe(model=ModelConfig(quantize="nf4"), train=TrainConfig(full=True))
