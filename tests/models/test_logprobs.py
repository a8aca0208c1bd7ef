"""Log-probabilities and entropies in chunks, and the output head in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.config.schema import AdapterConfig, ModelConfig, Recipe
from minigrpo.models import logprobs
from minigrpo.models.chat_template import render
from minigrpo.models.logprobs import Float32Head, OutputHead, score_tokens
from minigrpo.models.policy import open_policy
from minigrpo.rollouts.engines.registry import open_engine
from minigrpo.types import Prompt, Sampling


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("entropy_learns", [True, False])
@pytest.mark.parametrize(("scale", "heat"), [(0.7, 0.8), (1.0, 1.0)])
def test_chunked_scores_equal_those_of_the_whole_logits_values_and_gradients(
    cap: float | None,
    biased: bool,
    frozen: bool,
    entropy_learns: bool,
    *,
    scale: float,
    heat: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(23, 6, dtype=torch.float64, generator=draw, requires_grad=True)
    weight_VD = torch.randn(40, 6, dtype=torch.float64, generator=draw, requires_grad=not frozen)
    bias_V = torch.randn(40, dtype=torch.float64, generator=draw, requires_grad=not frozen) if biased else None
    labels_N = torch.randint(0, 40, (23,), generator=draw)
    slopes_N = torch.randn(23, dtype=torch.float64, generator=draw)
    inputs = [x for x in (hidden_ND, weight_VD, bias_V) if x is not None and x.requires_grad]
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 40 * 5)
    monkeypatch.setattr(logprobs, "CACHED_LOGITS", 40 * 2)  # and within a chunk two rows at a time
    head = OutputHead(weight_VD, bias_V, scale=scale, cap=cap, temperature=heat)
    logprobs_N, entropy_N = score_tokens(hidden_ND, labels_N, head, entropy_learns=entropy_learns)
    assert entropy_N.requires_grad is entropy_learns
    own = float(entropy_learns)
    chunked = torch.autograd.grad((logprobs_N * slopes_N + own * entropy_N * slopes_N.flip(0)).sum(), inputs)

    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V) * scale
    logits_NV = logits_NV / heat if cap is None else cap * torch.tanh(logits_NV / cap) / heat
    all_NV = logits_NV.log_softmax(-1)
    expected_N = all_NV.gather(1, labels_N[:, None])[:, 0]
    true_N = -(all_NV.exp() * all_NV).sum(-1)
    whole = torch.autograd.grad((expected_N * slopes_N + own * true_N * slopes_N.flip(0)).sum(), inputs)
    torch.testing.assert_close(logprobs_N, expected_N, atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy_N.detach(), true_N.detach(), atol=1e-12, rtol=0)
    for left, right in zip(chunked, whole, strict=True):
        torch.testing.assert_close(left, right, atol=1e-11, rtol=0)


@pytest.mark.parametrize("entropy_learns", [True, False])
def test_the_few_large_pieces_of_a_gpu_give_the_same(entropy_learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rows in {"CHUNK_LOGITS": 5, "CACHED_LOGITS": 2, "GPU_CHUNK_LOGITS": 16}.items():
        monkeypatch.setattr(logprobs, name, 40 * rows)
    draw = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(23, 6, dtype=torch.float64, generator=draw, requires_grad=True)
    head = OutputHead(torch.randn(40, 6, dtype=torch.float64, generator=draw), None, 1.0, None, 0.8)
    labels_N = torch.randint(0, 40, (23,), generator=draw)
    found = []
    for on_gpu in (False, True):
        scores = score_tokens(hidden_ND, labels_N, head, entropy_learns=entropy_learns, on_gpu=on_gpu)
        loss = scores[0].sum() + (scores[1].square().sum() if entropy_learns else 0.0)
        found.append([*scores, *torch.autograd.grad(loss, hidden_ND)])
    for small, large in zip(*found, strict=True):
        torch.testing.assert_close(small, large, atol=1e-12, rtol=0)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_whole_logits_tensor_never_exists(frozen: bool) -> None:
    """Neither forward nor backward may hold N x V entries: here 2,048 x 50,000, twelve chunks' worth."""
    hidden_ND = torch.randn(2048, 4, requires_grad=True)
    head = OutputHead(torch.randn(50_000, 4, requires_grad=not frozen), None, 1.0, None, 1.0)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    with Watch():
        score_tokens(hidden_ND, torch.zeros(2048, dtype=torch.long), head)[0].sum().backward()
    assert max(sizes) <= logprobs.CHUNK_LOGITS


def test_a_float32_head_on_sixteen_bit_hidden_states_rounds_no_logit() -> None:
    draw = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 200, bias=False).bfloat16()
    hidden_ND = torch.randn(9, 16, generator=draw).bfloat16().requires_grad_()
    labels_N = torch.randint(0, 200, (9,), generator=draw)
    exact = (hidden_ND.float() @ head.weight.float().T).log_softmax(-1).gather(1, labels_N[:, None])[:, 0]
    call = OutputHead(Float32Head.of(head).weight, None, 1.0, None, 1.0)
    logprobs_N, _ = score_tokens(hidden_ND, labels_N, call)
    torch.testing.assert_close(logprobs_N, exact, atol=1e-6, rtol=0)
    (ours,) = torch.autograd.grad(logprobs_N.sum(), hidden_ND)
    (theirs,) = torch.autograd.grad(exact.sum(), hidden_ND)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_with_a_float32_head_sampler_and_policy_agree_better_in_bfloat16(
    engine: str, tiny_folder: Callable[..., Path]
) -> None:
    def opened(exact: bool) -> Any:
        recipe = Recipe(
            model=ModelConfig(path=str(tiny_folder()), dtype="bfloat16", head_float32=exact),
            lora=AdapterConfig(rank=4, alpha=8),
        ).model_copy(update={"rollout": Recipe().rollout.model_copy(update={"engine": engine})})
        policy = open_policy(recipe)
        return policy, open_engine(policy, recipe)

    def values(exact: bool) -> torch.Tensor:
        policy, asked = opened(exact)
        asked.update(policy)
        prompt = render(policy.tokenizer, Prompt("p", ({"role": "user", "content": "say 3"},)))
        (completions,) = asked.generate([prompt], 4, Sampling(1.0, 12, 0))
        return torch.tensor([logprob for one in completions for logprob in one.logprobs])

    rounded = values(True)
    # bfloat16 logits near 5 stand 2^-6 apart; log-probabilities of float32 logits fall anywhere.
    assert float((rounded * 64 - (rounded * 64).round()).abs().mean()) > 0.1
    policy, _ = opened(True)
    assert policy.model.get_output_embeddings().weight.dtype == torch.float32
    assert policy.model.get_input_embeddings().weight.dtype == torch.bfloat16
