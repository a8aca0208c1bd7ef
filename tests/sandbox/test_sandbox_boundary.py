"""What crosses the sandbox's border: the bytes, and the filter of system calls, instruction by instruction."""

import contextlib
import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigrpo.sandbox.inside import codec, syscalls
from minigrpo.sandbox.protocol import printable

KEYS = st.none() | st.booleans() | st.integers(-(2**1000), 2**1000) | st.floats(allow_nan=False) | st.text(max_size=9)
PLAIN = st.recursive(
    KEYS,
    lambda inner: st.lists(inner, max_size=5) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_data_survives_the_journey_with_its_types(value: Any) -> None:
    back = codec.decode(codec.encode(value, 2**20))
    assert back == value
    assert repr(back) == repr(value)


@given(st.binary(max_size=200) | st.lists(st.sampled_from(b"NTFifsltdB\0\1\2\xff"), max_size=60).map(bytes))
def test_bytes_that_anybody_wrote_are_a_value_or_a_codec_error(data: bytes) -> None:
    with contextlib.suppress(codec.CodecError):
        codec.encode(codec.decode(data), 2**20)


@given(PLAIN, st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_damaged_values_are_a_value_or_a_codec_error(value: Any, at: int, noise: bytes) -> None:
    data = codec.encode(value, 2**20)
    at %= len(data)
    with contextlib.suppress(codec.CodecError):
        codec.decode(data[:at] + noise + data[at + len(noise) :])


class Liar(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    "value",
    [Liar(1), [Liar(1)], {Liar(1): 1}, b"x", {1}, 1j, object(), 2**1024, "\ud800", "x" * 101, [0.5] * 90, LOOP],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_plain_or_too_large_does_not_leave(value: Any) -> None:
    with pytest.raises(codec.CodecError):
        codec.encode(value, 100)


def test_depth_and_dictionaries_are_bounded_on_arrival() -> None:
    deep = b"l\0\0\0\1" * 5000 + b"N"
    wide = b"d" + struct.pack("!I", 5000) + (b"i\0\0\0\2\1\1" + b"N") * 5000
    for data in (deep, wide, b"l\xff\xff\xff\xff", b"d\0\0\0\1l\0\0\0\0N", b"i\0\0\0\0", b"NN", b""):
        with pytest.raises(codec.CodecError):
            codec.decode(data)


def test_numbers_that_are_none_arrive_as_they_are() -> None:
    assert math.isnan(codec.decode(codec.encode(float("nan"), 9)))
    assert codec.decode(codec.encode(-0.0, 9)).hex() == "-0x0.0p+0"


def test_details_are_one_printable_line() -> None:
    assert printable("a\x1b[31m\r\nb\u202ec\0") == "a [31m b c"
    assert len(printable("x" * 10_000)) == 300


def verdict(program: bytes, audit: int, number: int, arguments: tuple[int, ...]) -> int:
    """What the kernel would do: the few instructions that the filter uses."""
    data = struct.pack("<IIQ6Q", number, audit, 0, *(*arguments, *[0] * 6)[:6])
    lines = list(struct.iter_unpack("=HBBI", program))
    at, value = 0, 0
    while True:
        code, yes, no, constant = lines[at]
        at += 1
        if code == syscalls.RETURN:
            return int(constant)
        if code == syscalls.LOAD:
            value = struct.unpack_from("<I", data, constant)[0]
        elif code == syscalls.AND:
            value &= constant
        else:
            tests = {syscalls.EQUAL: value == constant, syscalls.BITS: bool(value & constant)}
            holds = tests.get(code, value >= constant)
            at += yes if holds else no


@pytest.mark.parametrize("name", ["x86_64", "aarch64"])
def test_the_filter_allows_what_it_lists_and_ends_all_else(name: str) -> None:
    machine = syscalls.ARCHITECTURES[name]
    program = syscalls.program(machine)
    special = {"read", "write", "mmap", "mprotect", "futex"}
    lists = {
        **dict.fromkeys(syscalls.ALLOWED.split(), syscalls.ALLOW),
        **dict.fromkeys(syscalls.REFUSED.split(), syscalls.REFUSE),
    }
    wanted = {machine.numbers[call]: answer for call, answer in lists.items() if call in machine.numbers}
    skipped = {machine.numbers[call] for call in special}
    for number in range(600):
        if number not in skipped:
            assert verdict(program, machine.audit, number, ()) == wanted.get(number, syscalls.KILL), number
    assert verdict(program, machine.audit ^ 1, machine.numbers["brk"], ()) == syscalls.KILL
    assert verdict(program, machine.audit, machine.numbers["brk"] | syscalls.X32_BIT, ()) == syscalls.KILL


@pytest.mark.parametrize("name", ["x86_64", "aarch64"])
@pytest.mark.parametrize(
    ("call", "arguments", "answer"),
    [
        ("read", (3,), syscalls.ALLOW),
        ("read", (4,), syscalls.REFUSE),
        ("write", (3,), syscalls.ALLOW),
        ("write", (1,), syscalls.REFUSE),
        ("mmap", (0, 4096, 3, 0x22), syscalls.ALLOW),
        ("mmap", (0, 4096, 7, 0x22), syscalls.REFUSE),
        ("mmap", (0, 4096, 3, 0x02, 3), syscalls.REFUSE),
        ("mprotect", (0, 4096, 3), syscalls.ALLOW),
        ("mprotect", (0, 4096, 5), syscalls.REFUSE),
        ("futex", (0, 1 | 128), syscalls.ALLOW),
        ("futex", (0, 0 | 128), syscalls.KILL),
        ("futex", (0, 9 | 128 | 256), syscalls.KILL),
    ],
)
def test_the_filter_looks_at_arguments(name: str, call: str, arguments: tuple[int, ...], answer: int) -> None:
    machine = syscalls.ARCHITECTURES[name]
    assert verdict(syscalls.program(machine), machine.audit, machine.numbers[call], arguments) == answer
