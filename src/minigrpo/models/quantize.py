"""Quantisation by bitsandbytes: frozen weights in 4 bit, and an optimizer's moments in 8 bit.

Frozen linear layers in 4 bit: NF4 with double quantisation (Dettmers et al., "QLoRA", arXiv 2305.14314).

bitsandbytes packs the weights and unpacks them, on a CPU and on a GPU. The output head and the embeddings keep their
type, so what is tied stays tied. A 4-bit layer computes in the type that its weights had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from minigrpo.errors import ModelError, install_hint
from minigrpo.models.peft_compat import mute_bitsandbytes


def quantize_four_bit(model: Any, device: torch.device) -> Any:
    """Return the model with every plain linear layer of its decoder packed, layer by layer, on `device`.

    The output head and a vision tower stay as and where they are. Raise ModelError where bitsandbytes is
    missing, or the weights are packed already.
    """
    _check_quantizable(model)
    _require_bitsandbytes_device("model.quantize nf4", device)
    head = model.get_output_embeddings()
    for parent in list(model.get_decoder().modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and layer is not head:
                setattr(parent, name, _packed_linear(layer, device))
    model.is_loaded_in_4bit = True  # what PEFT asks before it wraps a layer
    return model


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of all weights, with the constants that unpack the packed ones."""
    tensors: dict[int, torch.Tensor] = {}
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        parts = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
        tensors |= {tensor.untyped_storage().data_ptr(): tensor for tensor in (weight.data, *parts)}
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


MIN_PACKED_SIZE = 4096
"""Moments of tensors with fewer elements stay unpacked: packing would save nothing."""
MOMENTS_PER_SCALE = 256
"""Moments that share a scale (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861)."""


def eight_bit_adamw(
    parameters: Sequence[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Make an AdamW whose moments are kept in 8 bit, block by block. Raise ModelError where bitsandbytes is missing."""
    _require_bitsandbytes("train.optimizer adamw8bit")
    _require_bitsandbytes_device("train.optimizer adamw8bit", parameters[0].device)
    from bitsandbytes.optim import AdamW8bit

    found: torch.optim.Optimizer = AdamW8bit(
        parameters, lr=lr, betas=betas, weight_decay=weight_decay, min_8bit_size=MIN_PACKED_SIZE
    )
    return found


def moment_bytes(parameters: Sequence[nn.Parameter], optimizer: str) -> int:
    """Count the bytes of AdamW's two moments."""
    if optimizer == "adamw":
        return 2 * sum(parameter.nbytes for parameter in parameters)
    small = [p.numel() for p in parameters if p.numel() < MIN_PACKED_SIZE]
    packed = [p.numel() for p in parameters if p.numel() >= MIN_PACKED_SIZE]
    return 2 * (4 * sum(small) + sum(count + 4 * -(-count // MOMENTS_PER_SCALE) for count in packed))


def _require_bitsandbytes(knob: str) -> None:
    mute_bitsandbytes()
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError(f"{knob} needs bitsandbytes, which is not installed: {install_hint('qlora')}") from None


def _require_bitsandbytes_device(knob: str, device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ModelError(
            f"{knob} is bitsandbytes' work, which has no kernels for {device.type}. Leave the knob at its default, or "
            "use --model.device cpu"
        )


def _check_quantizable(model: Any) -> None:
    _require_bitsandbytes("model.quantize nf4")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            "model.quantize nf4: the weights of this model are quantised already. Give its 16-bit original as "
            "--model.path, or leave model.quantize at none."
        )


def _packed_linear(layer: nn.Linear, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype = layer.weight.dtype
    packed: Any = Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4", module=packed)
    packed.weight = weight.to(device)
    packed.bias = layer.bias
    # Else it repacks its weights at the first pass without a gradient, for a kernel that has none: later gradients
    # would be lost without a word.
    packed.support_avx512bf16_for_cpu = False
    return packed
