"""Encode plain data as bytes, and decode it: all that is passed between a program and its judge.

One tag byte, then the content: N none, T true, F false, i integer, f float, s text, l list, t tuple, d dictionary,
B a list of integers from 0 to 255 (boards are made of them). Lengths are four bytes, big-endian. Decoding executes,
imports and looks up nothing; size, depth, integer bits and dictionaries are bounded. Only exactly these types are
encoded: a subclass of int, which could lie about its value, is refused.
"""

from __future__ import annotations

import struct
from typing import Any

MAX_DEPTH = 20
MAX_BITS = 1024
MAX_ENTRIES = 1000
"""Entries of one dictionary: keys can be chosen so that they all collide."""

LENGTH = struct.Struct("!I")
"""The length before every message and every content: four bytes, big-endian."""
REAL = struct.Struct("!d")


class CodecError(ValueError):
    """A value that cannot be encoded, or bytes that cannot be decoded."""


def encode(value: Any, limit: int) -> bytes:
    """Encode a value. Raise CodecError where it is not plain, too deep, or longer than `limit` bytes."""
    out = bytearray()
    _write(out, value, limit, 0)
    if len(out) > limit:
        raise CodecError(f"more than {limit} bytes")
    return bytes(out)


def _write(out: bytearray, value: Any, limit: int, depth: int) -> None:
    kind = type(value)
    if kind is int:
        _write_int(out, value)
    elif kind is list or kind is tuple:
        _write_sequence(out, value, limit, depth)
    elif kind is str:
        _write_text(out, value, limit)
    elif value is None or kind is bool:
        out += b"N" if value is None else b"T" if value else b"F"
    elif kind is float:
        out += b"f" + REAL.pack(value)
    elif kind is dict:
        _write_dict(out, value, limit, depth)
    else:
        raise CodecError(f"{kind.__name__!s:.60} is not plain data")


def _write_int(out: bytearray, value: int) -> None:
    bits = value.bit_length()
    if bits > MAX_BITS:
        raise CodecError(f"an integer of more than {MAX_BITS} bits")
    body = value.to_bytes(bits // 8 + 1, "big", signed=True)
    out += b"i" + LENGTH.pack(len(body)) + body


def _write_text(out: bytearray, value: str, limit: int) -> None:
    if len(value) > limit:
        raise CodecError(f"more than {limit} bytes")
    try:
        body = value.encode()
    except UnicodeEncodeError:
        raise CodecError("text with lone surrogates") from None
    out += b"s" + LENGTH.pack(len(body)) + body


def _write_sequence(out: bytearray, value: Any, limit: int, depth: int) -> None:
    _fits(out, limit, depth)
    if len(value) > limit:
        raise CodecError(f"more than {limit} bytes")
    if type(value) is list and value and set(map(type, value)) == {int} and min(value) >= 0 and max(value) < 256:
        out += b"B" + LENGTH.pack(len(value)) + bytes(value)
        return
    out += (b"l" if type(value) is list else b"t") + LENGTH.pack(len(value))
    for item in value:
        _write(out, item, limit, depth + 1)
        if len(out) > limit:
            raise CodecError(f"more than {limit} bytes")


def _write_dict(out: bytearray, value: Any, limit: int, depth: int) -> None:
    _fits(out, limit, depth)
    if len(value) > MAX_ENTRIES:
        raise CodecError(f"a dictionary of more than {MAX_ENTRIES} entries")
    out += b"d" + LENGTH.pack(len(value))
    for key, item in value.items():
        _write(out, key, limit, depth + 1)
        _write(out, item, limit, depth + 1)


def _fits(out: bytearray, limit: int, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise CodecError(f"more than {MAX_DEPTH} levels deep")
    if len(out) > limit:
        raise CodecError(f"more than {limit} bytes")


def decode(data: bytes) -> Any:
    """Decode bytes from an untrusted source. Raise CodecError, and nothing else, where they are no value."""
    try:
        value, end = _read(data, 0, 0)
    except CodecError:
        raise
    except (ValueError, TypeError, struct.error, IndexError, OverflowError) as fault:
        raise CodecError(f"bytes that are no value: {type(fault).__name__}") from None
    if end != len(data):
        raise CodecError("bytes after the value")
    return value


def _read(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    """Return the value that begins at index `at`, and the index after it."""
    tag = data[at : at + 1]
    if tag in _ATOMS:
        return _ATOMS[tag], at + 1
    if tag == b"f":
        return REAL.unpack_from(data, at + 1)[0], at + 9
    (length,) = LENGTH.unpack_from(data, at + 1)
    start = at + 5
    # Every item takes a byte at least: a length beyond the data is a lie, and is found before it costs anything.
    if length > len(data) - start:
        raise CodecError("a length beyond the data")
    if tag in _BODIES:
        return _BODIES[tag](data[start : start + length]), start + length
    if depth > MAX_DEPTH:
        raise CodecError(f"more than {MAX_DEPTH} levels deep")
    if tag in (b"l", b"t"):
        items, end = _read_items(data, start, length, depth)
        return (items if tag == b"l" else tuple(items)), end
    if tag == b"d" and length <= MAX_ENTRIES:
        flat, end = _read_items(data, start, 2 * length, depth)
        return dict(zip(flat[::2], flat[1::2], strict=True)), end
    raise CodecError("an unknown tag")


def _read_items(data: bytes, at: int, count: int, depth: int) -> tuple[list[Any], int]:
    items = []
    for _ in range(count):
        item, at = _read(data, at, depth + 1)
        items.append(item)
    return items, at


def _read_int(body: bytes) -> int:
    if not 0 < len(body) <= MAX_BITS // 8 + 1:
        raise CodecError(f"an integer of more than {MAX_BITS} bits")
    return int.from_bytes(body, "big", signed=True)


_ATOMS = {b"N": None, b"T": True, b"F": False}
_BODIES = {b"i": _read_int, b"s": lambda body: body.decode(), b"B": list}
