"""A group in one row gives the same numbers as one padded row per completion, and as the model's own forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.algorithms.objective import OBJECTIVES
from minigrpo.algorithms.packing import MicroBatch, pack
from minigrpo.config.schema import AdapterConfig, ModelConfig, ObjectiveConfig, Recipe, TrainConfig
from minigrpo.errors import ModelError
from minigrpo.models.policy import Policy, open_policy
from minigrpo.training.grpo import accumulate_gradient
from tests.helpers.models import gradients, made_up_groups, make_policy, set_lora
from tests.helpers.tiny import ARCHITECTURES, LLAMA_LIKE

EVERYTHING = 1 << 30


@contextmanager
def padded(policy: Policy) -> Iterator[None]:
    policy.shares_prompts = False
    policy.model.set_attn_implementation("sdpa")
    yield
    policy.shares_prompts = True
    policy.model.set_attn_implementation("minigrpo_shared_prompt")


def one_micro_batch(policy: Policy) -> MicroBatch:
    (part,) = pack(made_up_groups(), OBJECTIVES["grpo"], 60).split(EVERYTHING)
    return part


def scores_and_gradients(policy: Policy, part: MicroBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logprobs_N = policy.logprobs(part, step=3).logprobs_N
    (logprobs_N * torch.linspace(-1, 2, len(logprobs_N), dtype=logprobs_N.dtype)).sum().backward()
    return logprobs_N.detach(), gradients(policy)


WINDOWS = [
    pytest.param("mistral", {"sliding_window": 8}, id="mistral-window"),
    pytest.param("ministral3", {"sliding_window": 8}, id="ministral3-window"),
    pytest.param("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, id="qwen2-window"),
]


@pytest.mark.parametrize(("arch", "config"), [*[pytest.param(a, {}, id=a) for a in LLAMA_LIKE], *WINDOWS])
def test_a_shared_row_scores_like_padded_rows_values_and_gradients_in_float64(
    arch: str, config: dict[str, Any]
) -> None:
    policy = make_policy(arch, double=True, **config)
    assert policy.shares_prompts
    part = one_micro_batch(policy)
    shared, shared_gradients = scores_and_gradients(policy, part)
    with padded(policy):
        plain, plain_gradients = scores_and_gradients(policy, part)
    assert float((shared - plain).abs().max()) < 1e-11
    for left, right in zip(shared_gradients, plain_gradients, strict=True):
        assert float((left - right).abs().max()) <= 1e-10 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_scores_are_those_of_the_models_own_forward_one_text_at_a_time(arch: str) -> None:
    policy = make_policy(arch)
    logprobs_N = policy.logprobs(one_micro_batch(policy), step=0).logprobs_N.detach()
    expected = []
    with policy.sampling_mode(), torch.no_grad():
        for group in made_up_groups():
            for completion in group.completions:
                ids = torch.tensor([group.prompt_ids + completion.token_ids])
                logits_TV = policy.model(ids).logits[0, len(group.prompt_ids) - 1 : -1] / 0.9
                expected.append(logits_TV.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0])
    assert float((logprobs_N - torch.cat(expected)).abs().max()) < 1e-4


def test_an_architecture_that_mixes_tokens_outside_attention_takes_the_padded_path() -> None:
    assert not make_policy("lfm2").shares_prompts


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(name: str, kl: float, dropout: float) -> None:
    policy = make_policy(double=True, dropout=dropout)
    objective = replace(OBJECTIVES[name], kl=kl)
    batch = pack(made_up_groups(), objective, 60)
    figures, results = [], []
    for budget in (EVERYTHING, 120, 30, 1):
        figures.append(accumulate_gradient(policy, objective, list(batch.split(budget)), step=3)[1])
        results.append(gradients(policy))
    assert float(sum(g.abs().max() for g in results[0])) > 1e-3
    for other, other_figures in zip(results[1:], figures[1:], strict=True):
        assert other_figures["loss"] == pytest.approx(figures[0]["loss"], abs=1e-12)
        for left, right in zip(results[0], other, strict=True):
            assert float((left - right).abs().max()) < 1e-12


def test_dropout_is_named_by_token_so_both_paths_drop_the_same_and_other_steps_drop_others() -> None:
    policy = make_policy(double=True, dropout=0.3)
    part = one_micro_batch(policy)
    shared = policy.logprobs(part, step=3).logprobs_N
    with padded(policy):
        plain = policy.logprobs(part, step=3).logprobs_N
    assert float((shared - plain).abs().max()) < 1e-11
    assert float((shared - policy.logprobs(part, step=4).logprobs_N).abs().max()) > 1e-3


def test_dropout_leaves_the_mean_of_what_it_passes() -> None:
    dropout = make_policy(dropout=0.25).dropouts[0]
    dropout.step = 0
    dropout.token_keys = torch.arange(4000)[None]
    assert float(dropout(torch.ones(1, 4000, 32)).mean()) == pytest.approx(1, abs=0.01)


def test_the_reference_is_the_model_without_its_adapter_and_without_dropout() -> None:
    policy, base = make_policy(dropout=0.3), make_policy(lora=None)
    part = one_micro_batch(policy)
    policy.logprobs(part, step=0)
    assert torch.equal(policy.reference(part), base.logprobs(part, step=0).logprobs_N.detach())


def test_checkpointed_activations_change_nothing() -> None:
    from minigrpo.models.policy import recompute_activations

    policy = make_policy(double=True, dropout=0.1)
    part = one_micro_batch(policy)
    plain, plain_gradients = scores_and_gradients(policy, part)
    recompute_activations(policy.model)
    again, again_gradients = scores_and_gradients(policy, part)
    assert torch.equal(plain, again)
    assert all(torch.equal(a, b) for a, b in zip(plain_gradients, again_gradients, strict=True))


def test_a_reference_pass_between_forward_and_recomputing_backward_changes_no_mask() -> None:
    from minigrpo.models.policy import recompute_activations

    policy, objective = make_policy(double=True, dropout=0.3), replace(OBJECTIVES["grpo"], kl=0.1)
    batch = pack(made_up_groups(), objective, 60)
    accumulate_gradient(policy, objective, list(batch.split(EVERYTHING)), step=3)
    plain = gradients(policy)
    recompute_activations(policy.model)
    accumulate_gradient(policy, objective, list(batch.split(EVERYTHING)), step=3)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(policy), strict=True))


def test_groups_that_tie_are_left_out_of_the_passes_but_count_in_the_weights() -> None:
    groups = made_up_groups()
    tied = replace(groups[1], grades=tuple(replace(grade, reward=1.0) for grade in groups[1].grades))
    batch = pack([groups[0], tied, groups[2]], OBJECTIVES["dapo"], 60)
    (part,) = batch.split(EVERYTHING)
    assert [group.index for group in part.groups] == [0, 2]
    assert float(part.weights_N[0]) == pytest.approx(1 / sum(len(c.token_ids) for g in groups for c in g.completions))
    (whole,) = pack([groups[0], tied, groups[2]], replace(OBJECTIVES["dapo"], kl=0.1), 60).split(EVERYTHING)
    assert len(whole.groups) == 3


def test_no_pass_exceeds_the_budget_unless_one_completion_alone_does() -> None:
    parts = list(pack(made_up_groups(), OBJECTIVES["grpo"], 60).split(70))
    assert all(part.tokens <= 70 for part in parts)
    assert sum(len(part.advantages_N) for part in parts) == 124
    lone = list(pack(made_up_groups(), OBJECTIVES["grpo"], 60).split(1))
    assert len(lone) == 9


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [2, 16], ids=["narrow", "folded"])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_a_fused_adapter_layer_computes_what_peft_does_values_and_gradients_in_float64(
    arch: str, rank: int, dropout: float, checkpointing: bool
) -> None:
    from minigrpo.models.lora import add_lora
    from minigrpo.models.policy import recompute_activations

    policy = make_policy(arch, lora=None, double=True)
    policy.model.requires_grad_(False)
    config = AdapterConfig(rank=rank, alpha=16, rslora=True, dropout=dropout)
    policy.model, policy.dropouts = add_lora(policy.model, config, seed=1)
    policy.model.double()
    set_lora(policy, 0.05)
    if checkpointing:
        recompute_activations(policy.model)
    part = one_micro_batch(policy)
    fused, fused_gradients = scores_and_gradients(policy, part)
    layers = [module for module in policy.model.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 14
    for layer in layers:
        del layer.forward  # PEFT's own stands below
    plain, plain_gradients = scores_and_gradients(policy, part)
    assert float((fused - plain).abs().max()) < 1e-11
    for left, right in zip(fused_gradients, plain_gradients, strict=True):
        assert float((left - right).abs().max()) <= 1e-10 * max(1.0, float(right.abs().max()))
    assert max(float(gradient.abs().max()) for gradient in fused_gradients) > 1e-2


def test_every_layer_with_dropout_is_one_step_of_the_graph() -> None:
    policy = make_policy(dropout=0.3)
    logprobs_N = policy.logprobs(one_micro_batch(policy), step=3).logprobs_N
    seen, waiting, steps = set(), [logprobs_N.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            steps += node.name() == "_NarrowLoraBackward"
            waiting += [parent for parent, _ in node.next_functions]
    assert steps == 14


def test_in_sixteen_bit_a_fused_layer_is_as_near_to_float32_as_pefts() -> None:
    from peft.tuners.lora import Linear

    layers = [module for module in make_policy(lora=0.05).model.modules() if isinstance(module, Linear)]
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    layer = next(layer for layer in layers if layer.base_layer.in_features == 32)
    exact = layer(x)
    layer.base_layer.weight.data = layer.base_layer.weight.data.bfloat16()
    if layer.base_layer.bias is not None:
        layer.base_layer.bias.data = layer.base_layer.bias.data.bfloat16()
    fused = layer(x.bfloat16())
    del layer.forward
    plain = layer(x.bfloat16())
    assert fused.dtype == plain.dtype == torch.bfloat16
    errors = [float((y.float() - exact).abs().mean().detach()) for y in (fused, plain)]
    assert errors[0] < 1.2 * errors[1]


def whole_recipe(folder: Path, **train: Any) -> Recipe:
    return Recipe(
        model=ModelConfig(path=str(folder)), train=TrainConfig(full=True, **train), objective=ObjectiveConfig(kl=0.1)
    )


def test_the_frozen_copy_gives_the_same_values_wherever_it_lies(tiny_folder: Callable[..., Path]) -> None:
    policies = [open_policy(whole_recipe(tiny_folder(), reference=where)) for where in ("device", "cpu", "auto")]
    part = one_micro_batch(policies[0])
    with torch.no_grad():
        for policy in policies:
            for parameter in policy.trainable:
                parameter += 0.05
    found = [policy.reference(part) for policy in policies]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert float((found[0] - policies[0].logprobs(part, step=0).logprobs_N.detach()).abs().max()) > 1e-2


@pytest.mark.parametrize("arch", ["qwen2", "lfm2"])
def test_a_copy_on_another_device_is_asked_there_and_only_its_answer_moves(
    arch: str, tiny_folder: Callable[..., Path]
) -> None:
    policy = open_policy(whole_recipe(tiny_folder(arch), reference="cpu"))
    policy.device = torch.device("meta")  # a device that cannot compute: ids sent there would fail
    found = policy.reference(one_micro_batch(policy))
    assert found.device.type == "meta"
    assert found.shape == one_micro_batch(policy).advantages_N.shape


@pytest.mark.parametrize(
    ("room", "memory", "where"), [(5.1, None, "cuda"), (4.9, None, "cpu"), (9.0, 5.9, "cpu"), (9.0, 6.1, "cuda")]
)
def test_a_copy_goes_to_the_cpu_where_the_gpu_has_no_room_for_it_beside_what_training_needs(
    room: float, memory: float | None, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minigrpo.models.policy import _reference_device
    from minigrpo.models.quantize import weight_bytes

    policy = make_policy(lora=None)
    weights = weight_bytes(policy.model)
    policy.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(room * weights), 0))
    train = TrainConfig(full=True, memory=None if memory is None else memory * weights / 1e9)
    assert _reference_device(policy, train).type == where


def test_training_everything_in_sixteen_bit_is_refused_with_both_ways_out(tiny_folder: Callable[..., Path]) -> None:
    recipe = whole_recipe(tiny_folder())
    recipe = recipe.model_copy(update={"model": ModelConfig(path=recipe.model.path, dtype="bfloat16")})
    with pytest.raises(ModelError, match=r"model\.dtype is bfloat16.*--model\.dtype auto, or train an adapter"):
        open_policy(recipe)
