"""Bring numbers from main memory to a device, without making the host wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on that device.

    From pinned memory a copy takes its place in the queue of a GPU and the host goes on; from ordinary memory the host
    would wait until the GPU has done all that it was given before.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
