"""Count memory on a policy without weights, made from a config alone (meta tensors).

It is the policy's own code on tensors without contents, so no formula has to follow when a layer changes. What cannot
be run like this, because its shapes depend on values (a mixture of experts), raises UnplannableError.

Every tensor that an operation makes is counted while it lives, the backward pass and its recomputation included. What
is counted is what the allocator is asked for. Not counted: what kernels borrow for themselves, a few MB.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minigrpo.algorithms.packing import MicroBatch, PackedGroup
from minigrpo.config.schema import Recipe
from minigrpo.errors import MinigrpoError, ModelError
from minigrpo.models.attention import cpu, shared_prompt
from minigrpo.models.attention.shared_prompt import TORCH_BACKEND, AttentionBackend
from minigrpo.models.loading import LoadedModel, model_class
from minigrpo.models.logprobs import Float32Head
from minigrpo.models.lora import add_lora
from minigrpo.models.policy import Policy, decoder_of, make_all_trainable, recompute_activations

META = torch.device("meta")
CASTING: tuple[Any, ...] = (torch.ops.aten.cumsum.default,)
CASTING_ON_CPU: tuple[Any, ...] = (torch.ops.aten.sum.default, torch.ops.aten.sum.dim_IntList)


class MemoryCounter(TorchDispatchMode):
    """Counts live bytes (`now`), their maximum (`peak`) and its `phase`. Tensors in `known` are not counted."""

    def __init__(self, known: Iterable[Tensor], device: str) -> None:
        super().__init__()
        self.device = device
        self.now, self.peak = 0, 0
        self.phase = self.peak_phase = ""
        self._known = [tensor.untyped_storage() for tensor in known]
        self._seen = {storage._cdata: 0 for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # asked whether there is no padding, so that no mask is needed
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._count(leaf.untyped_storage())
        self._raise_peak(self.now + self._borrowed(func, args, kwargs or {}))
        return out

    def _borrowed(self, func: Any, args: Any, kwargs: Any) -> int:
        """Return bytes of temporary copies: a sum in a wider type first copies its whole input."""
        copies = CASTING + (CASTING_ON_CPU if self.device == "cpu" else ())
        wide = kwargs.get("dtype")
        if func not in copies or wide is None or wide == args[0].dtype:
            return 0
        return int(args[0].numel()) * int(wide.itemsize)

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self.now += storage.nbytes()
        self._raise_peak(self.now)
        weakref.finalize(storage, self._forget, key)

    def _raise_peak(self, height: int) -> None:
        if height > self.peak:
            self.peak, self.peak_phase = height, self.phase

    def _forget(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)


@cache
def meta_backend(device: str) -> AttentionBackend:
    """Return attention for meta tensors as torch would choose it on `device` (cpu, cuda).

    On meta tensors torch itself would choose the form that keeps all scores.
    """
    on_cpu = device in TORCH_BACKEND.segments_on
    kernel = _on_cpu if on_cpu else _on_gpu
    return AttentionBackend(
        kernel, TORCH_BACKEND.segments_on | ({"meta"} if on_cpu else set()), _registered(kernel, device)
    )


def _registered(kernel: Callable[..., Tensor], device: str) -> str:
    """Register transformers' sdpa attention with another kernel and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(*args: Any, **options: Any) -> Any:
        # Around each call, not around a pass: autograd recomputes activations in a thread of its own.
        with _KernelOverride(kernel):
            return sdpa_attention_forward(*args, **options)

    name = f"minigrpo_sdpa_on_{device}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


class _KernelOverride(TorchFunctionMode):
    """Replaces torch's attention kernel by another, inside the block and in this thread."""

    def __init__(self, kernel: Callable[..., Tensor]) -> None:
        super().__init__()
        self.kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = self.kernel if func is scaled_dot_product_attention else func
        return chosen(*args, **(kwargs or {}))


def _on_cpu(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    mask = _as_bias(options.get("attn_mask"), query)
    key, value = _all_heads(query, key, value)
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, bool(options.get("is_causal")), attn_mask=mask, scale=options.get("scale")
    )[0]
    return out


def _on_gpu(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The memory-efficient kernel: the only memory-saving one that takes a mask."""
    mask = _as_bias(options.get("attn_mask"), query)
    key, value = _all_heads(query, key, value)
    if mask is not None:
        # The kernel wants rows of 16: torch pads the mask, and gives a view of it.
        wide = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 16))
        mask = wide[..., : mask.shape[-1]].expand(*query.shape[:2], query.shape[2], key.shape[2])
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query,
        key,
        value,
        mask,
        query.requires_grad,
        0.0,
        bool(options.get("is_causal")),
        scale=options.get("scale"),
    )[0]
    return out


def _as_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return a boolean mask as an additive one, as torch converts it in every layer."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)


def _all_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    groups = query.shape[-3] // key.shape[-3]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)


class UnplannableError(Exception):
    """The model's shapes depend on values, so its memory cannot be told without running it."""


@dataclass(frozen=True, slots=True)
class PassCost:
    """Bytes of one micro-batch: `kept` for the backward pass when the forward pass ends, and `passing`, which the peak,
    in `phase`, takes on top of them.
    """

    tokens: int
    kept: int
    passing: int
    phase: str

    @property
    def peak(self) -> int:
        return self.kept + self.passing


def meta_policy(
    config: Any, recipe: Recipe, dtype: torch.dtype, *, device: str = "cpu", recompute: bool = False
) -> Policy:
    """Return the recipe's policy with every tensor on "meta", and attention as torch computes it on `device`.

    `device`: cpu or cuda.

    Raises RecipeError where lora.targets fits no layer, ModelError where the weights could not be trained.
    """
    with META:
        model = _model_of(config, dtype)
        if recipe.model.head_float32 and dtype != torch.float32:
            model.set_output_embeddings(Float32Head.of(model.get_output_embeddings()))
        policy = Policy(
            LoadedModel(model, None, "shadow"),
            temperature=recipe.rollout.temperature,
            seed=recipe.seed,
            backend=meta_backend(device),
        )
        policy.model.requires_grad_(False)
        if recipe.train.full:
            make_all_trainable(policy.model)
        else:
            policy.model, policy.dropouts = add_lora(policy.model, recipe.lora, seed=recipe.seed)
    if recompute:
        recompute_activations(policy.model)
    for parameter in policy.trainable:
        parameter.grad = torch.empty_like(parameter)  # from the second micro-batch on they are there
    return policy


def _model_of(config: Any, dtype: torch.dtype) -> Any:
    """Make a model of a config. Raise ModelError where that holds something which no model can be made of."""
    try:
        return model_class(config).from_config(config, dtype=dtype).eval()
    except MinigrpoError:
        raise
    except Exception as fault:  # of transformers, torch, and Python where a number is a word
        reason = " ".join(str(fault).split())[:200]
        raise ModelError(
            f"No model can be made of config.json in {config.name_or_path}: {type(fault).__name__}: {reason}. Download "
            "or save the model again."
        ) from fault


def policy_tensors(policy: Policy) -> list[Tensor]:
    """Return the policy's parameters, buffers and gradients, which have plan lines of their own."""
    gradients = [parameter.grad for parameter in policy.trainable if parameter.grad is not None]
    return [*policy.model.parameters(), *policy.model.buffers(), *gradients]


def uniform_micro_batch(
    prompt: int, completions: int, length: int, *, groups: int = 1, vocabulary: int = 2
) -> MicroBatch:
    """Return a micro-batch whose groups all have that shape, its tokens taken from the vocabulary in turn."""

    def ids(start: int, n: int) -> tuple[int, ...]:
        return tuple((start + at) % vocabulary for at in range(n))

    answers = tuple(ids(g, length) for g in range(completions))
    packed = tuple(
        PackedGroup(place, ids(place, prompt), tuple(range(completions)), answers) for place in range(groups)
    )
    tokens = groups * completions * length
    equal_N = torch.full((tokens,), 1 / tokens)
    return MicroBatch(packed, torch.ones(tokens), equal_N, equal_N, torch.zeros(tokens))


def training_pass(policy: Policy, micro_batch: MicroBatch, device: str, *, entropy_learns: bool = False) -> PassCost:
    """Count one micro-batch, forward and backward, on `device` (cpu or cuda)."""
    for cached in (shared_prompt._own_mask, shared_prompt._shared_mask, cpu.attention_plan):
        cached.cache_clear()  # what is still there from another count would cost nothing
    counter = MemoryCounter(policy_tensors(policy), device)
    with counter:
        try:
            counter.phase = "forward pass"
            scores = policy.logprobs(micro_batch, step=0, entropy_learns=entropy_learns)
            loss = scores.logprobs_N.sum() + (scores.entropy_N.sum() if entropy_learns else 0.0)
            kept = counter.now
            counter.phase = "backward pass"
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        except (NotImplementedError, RuntimeError) as fault:
            raise UnplannableError(str(fault).splitlines()[0]) from fault
    return PassCost(micro_batch.tokens, kept, counter.peak - kept, counter.peak_phase)


def quantised_share(policy: Policy) -> tuple[int, int]:
    """Return (bytes spared by holding the frozen layers in 4 bit, bytes of the largest of them unpacked).

    NF4 with double quantisation (QLoRA, arXiv 2305.14314): half a byte a weight, a byte for each 64 weights, and 4
    bytes for each 256 of those. Embeddings, head and norms stay as they are.
    """
    layers = [m.base_layer if hasattr(m, "base_layer") else m for m in decoder_of(policy.model).modules()]
    weights = {id(m): m.weight for m in layers if type(m) is nn.Linear and not m.weight.requires_grad}.values()
    spared = sum(w.nbytes - int(w.numel() * (1 / 2 + 1 / 64 + 4 / (64 * 256))) for w in weights)
    return spared, max((w.nbytes for w in weights), default=0)
