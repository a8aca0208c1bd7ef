"""Random numbers that are a function of their name, not of what was drawn before.

A draw named by (seed, step, prompt, sibling, position) is the same in any batch, on any device, in any order, and
after a resume there is nothing to restore. The mixer is splitmix64's finaliser (Steele, Lea, Flood: "Fast Splittable
Pseudorandom Number Generators", OOPSLA 2014), in 64-bit integers that wrap.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_TOP = -(1 << 63)


def name_key(*parts: int | str) -> int:
    """Hash any name to a 63-bit key: equal names give equal keys, on every machine."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def mix(keys: Tensor) -> Tensor:
    """Scramble int64 keys of any shape; neighbouring keys become unrelated."""
    keys = keys + _GOLDEN
    keys = (keys ^ _shift(keys, 30)) * _FIRST
    keys = (keys ^ _shift(keys, 27)) * _SECOND
    return keys ^ _shift(keys, 31)


WITHOUT_FLOAT64 = frozenset({"mps"})
"""Kinds of device that have no float64, in which draws are made: there the CPU makes them."""


def with_float64(tensor: Tensor) -> Tensor:
    """Return the tensor where float64 exists: where it is, or on the CPU."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor


def uniform(keys: Tensor) -> Tensor:
    """Return one float64 in [0, 1) for each int64 key: on its device, or on the CPU where that has no float64."""
    keys = with_float64(keys)
    return _shift(mix(keys), 11).double() * 2.0**-53


KEYS_IN_CACHE = 1 << 18
"""Keys of a mask that are computed at a time on a CPU, so that they stay in the cache: 2 MB."""


def keep_mask(token_keys: Tensor, channel_key: int, channels: int, drop: float) -> Tensor:
    """Return a dropout mask [*token_keys.shape, channels], True where kept; a token and a channel name each entry."""
    names = torch.arange(channels, device=token_keys.device)
    # The upper 31 bits decide, read as an unsigned number. Its top bit is flipped in the keys (an odd factor keeps it
    # flipped), so that a signed comparison gives the same: no shift, and two passes less over every entry.
    channel_keys = mix(names + channel_key) ^ _TOP
    least = (int(drop * 2**31) << 33) + _TOP
    keep = torch.empty(token_keys.numel(), channels, dtype=torch.bool, device=token_keys.device)
    size = max(1, KEYS_IN_CACHE // channels) if keep.device.type == "cpu" else max(1, len(keep))
    # One multiplication between the two names is enough for a mask, and four times cheaper than mix.
    for keys, part in zip(token_keys.reshape(-1, 1).split(size), keep.split(size), strict=True):
        torch.ge((keys ^ channel_keys).mul_(_FIRST), least, out=part)
    return keep.view(*token_keys.shape, channels)


def _shift(keys: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros: torch's own shift keeps the sign."""
    return (keys >> by) & ((1 << (64 - by)) - 1)
