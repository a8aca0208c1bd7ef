"""A Llama-like decoder reduced to what decoding needs: fused projections, a cache that siblings share, no module calls.

It reads the policy's own modules, so there is no second copy of an architecture to keep in step: rotary tables come
from the model's own rotary module, activations from its MLP, scales and windows from its layers.

Adapters: on float32 weights the adapter is folded into private fused copies, in float32. On 16-bit weights a folded
copy would round early training away (a bf16 fold of a young adapter loses most of it), so the adapter stays a second,
narrow pass beside the untouched base weights. On a CPU, where memory admits, frozen bfloat16 weights are copied into
oneDNN's blocks (models/onednn.py): the same bits, quicker. 4-bit layers are called as they are: on a GPU few rows pass
through a product that unpacks as it goes, and a copy would cost the memory that 4 bit saves.

Shapes: n rows in flight, M prompts, P longest shared prompt (the prompt without its last token), C own tokens so far,
H query heads, K key/value heads, R = H / K, D head width, W hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from minigrpo.distributed.shards import gathered
from minigrpo.models import onednn
from minigrpo.models.adapter import active_lora
from minigrpo.models.attention import shared_prompt
from minigrpo.models.context_window import CAUSAL_DECODERS, text_config
from minigrpo.models.lora_linear import is_four_bit
from minigrpo.rollouts.engines.prompts import PromptLayout

# Other kinds (dynamic, longrope) change their frequencies with the length of the text.
FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


def decoder_supports(model: Any) -> bool:
    """Return whether this module can run the model. Each architecture is tested against the model's own forward."""
    config = text_config(model.config)
    rope = getattr(config, "rope_parameters", None) or {}
    return config.model_type in CAUSAL_DECODERS and rope.get("rope_type", "default") in FIXED_ROPE_TYPES


class Projection:
    """Linear layers that read the same input, fused into one matrix product where their weights may be copied.

    `norm`: applied to their input first. Its weights are folded into the fused copy of float32 weights. `blocks`: copy
    frozen bfloat16 weights into oneDNN's blocks.
    """

    def __init__(self, modules: Sequence[nn.Module], norm: Norm | None = None, *, blocks: bool = False) -> None:
        self.modules, self.norm = modules, norm
        self.bases: list[Any] = [getattr(module, "base_layer", module) for module in modules]
        self.sizes = [base.out_features for base in self.bases]
        self.is_fused = all(base.weight.dtype == torch.float32 for base in self.bases)
        if self.is_fused:
            self.fused = torch.cat([base.weight.detach() for base in self.bases])
        wide = sum(self.sizes) >= onednn.LEAST_OUTPUTS
        self.can_block = wide and all(onednn.is_frozen_bfloat16(base) for base in self.bases)
        self.blocked: Tensor | None = None
        if blocks and self.can_block:
            if len(self.bases) == 1:  # training multiplies by the same copy
                self.blocked = onednn.keep_blocks(self.bases[0]).forward_OI
            else:
                self.blocked = onednn.blocked(torch.cat([base.weight.detach() for base in self.bases]))
            self.blocked_bias = self._joint_bias()
        self.joint_A: Tensor | None = None
        self.Bs: list[Tensor | None] = [None for _ in modules]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current weights and adapter."""
        pairs = [active_lora(module) for module in self.modules]
        if not self.is_fused:
            self._refresh_adapters(pairs)
            return
        for fused, base, pair in zip(self.fused.split(self.sizes), self.bases, pairs, strict=True):
            fused.copy_(base.weight)
            if pair is not None:
                fused.addmm_(pair[1].float(), pair[0].float(), alpha=pair[2])
        if self.norm is not None:
            self.norm.refresh()
            self.fused.mul_(self.norm.weight)
        bias = self._joint_bias()
        self.fused_bias = None if bias is None else copy_in_place(getattr(self, "fused_bias", None), bias)

    def _joint_bias(self) -> Tensor | None:
        """Return the biases in one piece, zeros where a layer has none, or None where no layer has one."""
        if all(base.bias is None for base in self.bases):
            return None
        filled = [base.weight.new_zeros(len(base.weight)) if base.bias is None else base.bias for base in self.bases]
        return torch.cat(filled).detach()

    def _refresh_adapters(self, pairs: Sequence[tuple[Tensor, Tensor, float] | None]) -> None:
        """Copy the adapters beside weights that stay as they are: every A in one piece, since all read the same x."""
        dtype = compute_dtype(self.bases[0])
        present = [pair[0] for pair in pairs if pair is not None]
        self.ranks = [0 if pair is None else len(pair[0]) for pair in pairs]
        self.joint_A = copy_in_place(self.joint_A, torch.cat(present).to(dtype)) if present else None
        self.Bs = [
            None if pair is None else copy_in_place(old, (pair[1] * pair[2]).to(dtype))
            for old, pair in zip(self.Bs, pairs, strict=True)
        ]
        if self.blocked is not None and self.joint_A is not None:
            A, sized_Bs = self.joint_A, zip(self.sizes, self.Bs, strict=True)
            # One product for all B: between the layers lie zeros, which change no sum.
            joint_B = torch.block_diag(*[A.new_zeros(size, 0) if B is None else B for size, B in sized_Bs])
            self.blocked_A = onednn.blocked(A) if len(A) >= onednn.LEAST_OUTPUTS else None
            self.blocked_B = onednn.blocked(joint_B)

    def add_to(self, residual_nW: Tensor, x: Tensor) -> Tensor:
        """Return residual + self(x), in one call where possible."""
        if self.is_fused and self.fused_bias is None and x.ndim == 2:
            return torch.addmm(residual_nW, x, self.fused.T)
        return residual_nW + self(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., W] to [..., sum of sizes]."""
        if self.is_fused:
            return onednn.linear(x if self.norm is None else self.norm.unit_rms(x), self.fused, self.fused_bias)
        if self.blocked is not None:
            return self._by_blocks(x if self.norm is None else self.norm(x))
        outputs = self.parts(x)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _by_blocks(self, x: Tensor) -> Tensor:
        assert self.blocked is not None
        y = onednn.blocked_linear(x, self.blocked, self.blocked_bias)
        if self.joint_A is None:
            return y
        thin = linear(x, self.joint_A) if self.blocked_A is None else onednn.blocked_linear(x, self.blocked_A)
        return onednn.add_blocked_linear(y, thin, self.blocked_B)

    def parts(self, x: Tensor) -> list[Tensor]:
        """Map [..., W] to what each layer makes of it, [..., its size]."""
        if self.is_fused or self.blocked is not None:
            return list(self(x).split(self.sizes, -1))
        x = x if self.norm is None else self.norm(x)
        outputs: list[Tensor] = [base(x) for base in self.bases]
        if self.joint_A is not None:
            thin_nR = linear(x, self.joint_A).view(-1, len(self.joint_A))
            for y, thin_nr, B in zip(outputs, thin_nR.split(self.ranks, -1), self.Bs, strict=True):
                if B is not None:  # product and sum in one call, rounded once, as in the policy's own layer
                    y.view(-1, y.shape[-1]).addmm_(thin_nr, B.T)
        return outputs


def _bytes_in_blocks(projection: Projection) -> int:
    weights = sum(base.weight.nbytes for base in projection.bases)
    if projection.joint_A is None:
        return weights
    rank, inputs = projection.joint_A.shape
    wide = inputs if rank >= onednn.LEAST_OUTPUTS else 0
    return weights + rank * (wide + sum(projection.sizes)) * projection.joint_A.itemsize


def copy_in_place(old: Tensor | None, new: Tensor) -> Tensor:
    """Copy `new` into `old` where shape and type agree, and return it: captured CUDA graphs read fixed addresses."""
    if old is None or old.shape != new.shape or old.dtype != new.dtype:
        return new
    return old.copy_(new)


def compute_dtype(layer: Any) -> torch.dtype:
    """Return the dtype a layer computes in; for 4-bit weights, the dtype they unpack to."""
    dtype: torch.dtype = layer.weight.quant_state.dtype if is_four_bit(layer) else layer.weight.dtype
    return dtype


class UnitRms:
    """Divides x by the root of its mean square over the last dimension: six calls, where torch's own makes ten."""

    def __init__(self, eps: float, width: int, device: torch.device) -> None:
        self.eps = torch.full((1,), eps, device=device)
        self.inverse_width_D = torch.full((width,), 1 / width, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        mean = torch.addmv(self.eps, (x * x).view(-1, len(self.inverse_width_D)), self.inverse_width_D)
        return x * mean.rsqrt_().view(*x.shape[:-1], 1)


class Norm:
    """RMSNorm, computed in float32 for any input type, as in the model's own layer."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.unit_rms = UnitRms(module.variance_epsilon, len(module.weight), module.weight.device)
        self.refresh()

    def refresh(self) -> None:
        """Look up the weight: of a sharded model it is another tensor each time that it is gathered."""
        self.weight = self.module.weight

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return self.unit_rms(x) * self.weight
        return self.weight * self.unit_rms(x.float()).to(x.dtype)


class HeadNorm:
    """The RMSNorms of query and key heads (Qwen3), fused: [..., H + K, D]."""

    def __init__(self, attn: Any, heads: int, kv_heads: int) -> None:
        self.attn, self.heads, self.kv_heads = attn, heads, kv_heads
        weight = attn.q_norm.weight
        self.unit_rms = UnitRms(attn.q_norm.variance_epsilon, len(weight), weight.device)
        self.refresh()

    def refresh(self) -> None:
        """Copy the current weights, which change where all parameters are trained."""
        query, key = self.attn.q_norm.weight.detach(), self.attn.k_norm.weight.detach()
        both_HD = torch.cat([query.expand(self.heads, -1), key.expand(self.kv_heads, -1)])
        self.weight_HD = copy_in_place(getattr(self, "weight_HD", None), both_HD)

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight_HD * self.unit_rms(x.float()).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: Projection
    qk_norm: HeadNorm | None
    out: Projection
    gate_up: Projection
    act: Callable[[Tensor], Tensor]
    down: Projection
    uses_rope: bool
    window: int | None
    scaling: float

    @classmethod
    def from_module(cls, module: Any, heads: int, kv_heads: int, *, blocks: bool) -> Layer:
        attn, mlp = module.self_attn, module.mlp
        own_window = getattr(attn, "sliding_window", None)
        # Mistral and Ministral3 keep the window in the config alone; Qwen and SmolLM3 decide per layer.
        window = own_window if hasattr(attn, "sliding_window") else getattr(attn.config, "sliding_window", None)
        return cls(
            qkv=Projection([attn.q_proj, attn.k_proj, attn.v_proj], Norm(module.input_layernorm), blocks=blocks),
            qk_norm=HeadNorm(attn, heads, kv_heads) if hasattr(attn, "q_norm") else None,
            out=Projection([attn.o_proj], blocks=blocks),
            gate_up=Projection([mlp.gate_proj, mlp.up_proj], Norm(module.post_attention_layernorm), blocks=blocks),
            act=mlp.act_fn,
            down=Projection([mlp.down_proj], blocks=blocks),
            uses_rope=bool(getattr(attn, "use_rope", True)),
            window=window,
            scaling=attn.scaling,
        )

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def refresh(self) -> None:
        for projection in self.projections:
            projection.refresh()
        if self.qk_norm is not None:
            self.qk_norm.refresh()


@dataclass(frozen=True, slots=True)
class Rope:
    """Cosine and sine of the rotary angles of some positions, [..., 1, D]; the query scale of Ministral3, or None.

    The sine carries the sign of the rotated half, so that the rotation needs no negation.
    """

    cos: Tensor
    signed_sin: Tensor
    query_scale: Tensor | None

    def at(self, positions: Tensor) -> Rope:
        scale = None if self.query_scale is None else self.query_scale[positions]
        return Rope(self.cos.index_select(0, positions), self.signed_sin.index_select(0, positions), scale)


class Decoder:
    """The decoder. `prefill` reads prompts, `decode` one token of each row; both write the cache they are given.

    `blocks`: copy frozen bfloat16 weights into blocks, where `onednn.gains_by_blocks`.
    """

    def __init__(
        self,
        model: Any,
        head: nn.Linear,
        backend: shared_prompt.AttentionBackend = shared_prompt.TORCH_BACKEND,
        *,
        blocks: bool = False,
    ) -> None:
        config = model.config
        self.model, self.head, self.config = model, head, config
        self.kernel = backend.kernel
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = model.layers[0].self_attn.head_dim
        self.layers = [Layer.from_module(module, self.heads, self.kv_heads, blocks=blocks) for module in model.layers]
        self.norm = Norm(model.norm)
        self.dtype, self.device = model.dtype, head.weight.device
        bases = [base for layer in self.layers for part in layer.projections for base in part.bases]
        self.products = sum(base.in_features * base.out_features for base in bases)  # of one token, without the head
        may_block = blocks and onednn.is_frozen_bfloat16(head)
        self.blocked_head = onednn.keep_blocks(head).forward_OI if may_block else None

    @property
    def block_bytes(self) -> int:
        """Bytes of what may be copied into blocks: frozen weights, and the adapters beside them."""
        projections = [projection for layer in self.layers for projection in layer.projections if projection.can_block]
        return sum(map(_bytes_in_blocks, projections)) + self._head_bytes

    @property
    def training_block_bytes(self) -> int:
        """Bytes of what a training pass copies into blocks besides: each weight under an adapter for the gradient of
        its inputs, and for its outputs where it is fused with others here.
        """
        pairs = [
            (base.weight.nbytes, len(projection.bases))
            for layer in self.layers
            for projection in layer.projections
            for base, module in zip(projection.bases, projection.modules, strict=True)
            if projection.can_block and module is not base
        ]
        return sum(size * (1 + (fused > 1)) for size, fused in pairs) + self._head_bytes

    @property
    def _head_bytes(self) -> int:
        return int(self.head.weight.nbytes) if onednn.is_frozen_bfloat16(self.head) else 0

    def refresh(self) -> None:
        """Copy the current weights, layer by layer: one of a sharded model is gathered for as long as that takes."""
        for layer, module in zip(self.layers, self.model.layers, strict=True):
            with gathered(module):
                layer.refresh()
        self.norm.refresh()

    def weight_copies(self) -> list[Tensor]:
        """Return the decoder's own copies of weights: all tensors that `refresh` writes."""
        copies: list[Tensor | None] = []
        for layer in self.layers:
            for projection in layer.projections:
                copies += (
                    [projection.fused, projection.fused_bias]
                    if projection.is_fused
                    else [projection.joint_A, *projection.Bs]
                )
            copies += [layer.qk_norm.weight_HD] if layer.qk_norm else []
        return [tensor for tensor in copies if tensor is not None]

    def rope_table(self, length: int) -> Rope:
        """Return the rotary angles of positions 0 .. length - 1, from the model's own rotary module."""
        positions = torch.arange(length, device=self.device)
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = (table[0].unsqueeze(1) for table in self.model.rotary_emb(probe, positions[None]))
        first, second = sin.chunk(2, -1)
        return Rope(cos, torch.cat([-first, second], -1), self._query_scale(positions))

    def _query_scale(self, positions: Tensor) -> Tensor | None:
        """Return 1 + beta ln(1 + floor(position / original context)).

        Ministral3, after Llama 4's temperature tuning.
        """
        rope = getattr(self.config, "rope_parameters", None) or {}
        beta = rope.get("llama_4_scaling_beta")
        if beta is None or self.config.model_type != "ministral3":
            return None
        octave = torch.floor(positions / rope["original_max_position_embeddings"])
        return (1 + beta * torch.log(1 + octave)).to(self.dtype)[:, None, None]

    def _project(self, layer: Layer, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Map hidden states [..., W] to queries [..., H, D], keys and values [..., K, D]; apply RoPE."""
        H, K = self.heads, self.kv_heads
        query_key, value = layer.qkv(x).unflatten(-1, (H + 2 * K, self.width)).split([H + K, K], -2)
        if layer.qk_norm is not None:
            query_key = layer.qk_norm(query_key)
        if layer.uses_rope:
            query_key = torch.addcmul(query_key * rope.cos, query_key.roll(self.width // 2, -1), rope.signed_sin)
        query, key = query_key.split([H, K], -2)
        return query if rope.query_scale is None else query * rope.query_scale, key, value

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up.parts(x)
        return layer.down.add_to(x, layer.act(gate) * up)

    @torch.no_grad()
    def prefill(self, prompts: PromptLayout, rope: Rope, shared: Tensor) -> None:
        """Fill `shared` [layers, 2, M, K, P, D] with the keys and values of prompts, from `prompts.start` on.

        What is behind the end of a prompt is left as it is, or filled with padding: nobody looks there. The last layer
        stops at its keys and values, since no token is drawn here.
        """
        x = self.model.embed_tokens(prompts.ids)
        rope_at = rope.at(prompts.positions)
        end = shared.shape[-2]
        repeats = self.heads // self.kv_heads
        for layer, cache in zip(self.layers, shared, strict=True):
            query, key, value = self._project(layer, x, rope_at)
            prompts.store(cache, key, value)
            if layer is self.layers[-1]:
                return
            attended = self.kernel(
                prompts.spread(query),
                cache[0].repeat_interleave(repeats, 1),
                cache[1].repeat_interleave(repeats, 1),
                attn_mask=_mask(prompts.start, end, layer.window, self.device),
                is_causal=not prompts.start and (layer.window is None or layer.window >= end),
                scale=layer.scaling,
            )
            x = self._mlp(layer, x + layer.out(prompts.gather(attended)))

    @torch.no_grad()
    def decode(self, tokens_n: Tensor, rope_n: Rope, attend: Callable[..., Tensor]) -> Tensor:
        """Decode one token of every row and return logits [n, V].

        `attend(layer index, layer, query, key, value)` reads and writes the cache.
        """
        x_nW = self.model.embed_tokens(tokens_n)
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, x_nW, rope_n)
            x_nW = self._mlp(layer, layer.out.add_to(x_nW, attend(index, layer, query, key, value)))
        return self._logits(self.norm(x_nW))

    def _logits(self, x_nW: Tensor) -> Tensor:
        if self.blocked_head is not None:
            return onednn.blocked_linear(x_nW, self.blocked_head, self.head.bias)
        if type(self.head) is nn.Linear:
            return onednn.linear(x_nW, self.head.weight, self.head.bias)
        logits_nV: Tensor = self.head(x_nW)
        return logits_nV


def _mask(start: int, end: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys [end - start, end] the queries from `start` on see. None where the kernel's own mask will do:
    each sees all before it, from the first on.
    """
    if not start and (window is None or end <= window):
        return None
    ahead = torch.arange(start, end, device=device)[:, None] - torch.arange(end, device=device)
    return (ahead >= 0) & (ahead < (window or end))
