"""What a locked child does: read one program, call it when told to, answer with plain data.

The program shares this interpreter, so nothing here is a secret or a judge: a program that takes these functions apart
can only answer for itself. The namespace is executed afresh for every call.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import random
import struct
import sys
from types import CodeType, ModuleType
from typing import Any

from . import codec
from .syscalls import CHANNEL

NECESSARY_LOCKS = ("filter", "limits")
"""Locks of a child without which no program is run."""

HEAD = struct.Struct("!I8sc")
"""Bytes that follow the head, the call's number-used-once, and the kind of message."""

CALL, DEFINE = b"C", b"D"
VALUE, ERROR, MEMORY, BLOCKED = b"V", b"E", b"M", b"B"
TEXT = 300
RESERVE = 2**18
NAME = "program"
NO_MEMORY = 72
"""The exit code of a child that had none left to answer with, or to hear what it is asked."""


class Nowhere(io.RawIOBase):
    """Where print goes."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


def serve() -> None:
    """Until the other side has gone, or the kernel ends it."""
    sys.stdout = sys.stderr = io.TextIOWrapper(io.BufferedWriter(Nowhere()), errors="replace")
    sys.stdin = None
    vars(sys).update(__stdin__=None, __stdout__=None, __stderr__=None)
    random.seed(0)  # the same program answers the same, run after run
    gc.enable()
    output, source, entry = codec.decode(read(HEAD.unpack(read(HEAD.size))[0]))
    code, failure = compiled(source)
    while True:
        size, once, kind = HEAD.unpack(read(HEAD.size))
        arguments = codec.decode(read(size))
        answer = failure or answered(code, entry, arguments if kind == CALL else None, output)
        write(HEAD.pack(len(answer[1]), once, answer[0]) + answer[1])


def compiled(source: str) -> tuple[CodeType | None, tuple[bytes, bytes] | None]:
    try:
        return compile(source, f"<{NAME}>", "exec", dont_inherit=True), None
    except BaseException as fault:
        return None, described(fault)


def answered(code: CodeType | None, entry: str, arguments: Any, output: int) -> tuple[bytes, bytes]:
    """(kind, content) of one call, or of the definition alone where there are no arguments."""
    reserve = bytearray(RESERVE)  # to say in that there is no memory left
    try:
        assert code is not None
        function = defined(code, entry)
        return VALUE, codec.encode(None if arguments is None else function(*arguments), output)
    except codec.CodecError as fault:
        return ERROR, f"returns {fault}".encode(errors="replace")[:TEXT]
    except BaseException as fault:
        del reserve
        return described(fault)


def defined(code: CodeType, entry: str) -> Any:
    module = ModuleType(NAME)
    sys.modules[NAME] = module  # dataclasses look their own module up
    exec(code, module.__dict__)
    function = module.__dict__.get(entry)
    if not callable(function):
        raise NameError(f"no function {entry} is defined")
    return function


def described(fault: BaseException) -> tuple[bytes, bytes]:
    """(kind, words) of an exception. Its own code may run in here, and may fail again."""
    try:
        if isinstance(fault, MemoryError):
            return MEMORY, b""
        kind = BLOCKED if isinstance(fault, OSError) and fault.errno == errno.EPERM else ERROR
        name = "SyntaxError" if isinstance(fault, SyntaxError) else type(fault).__name__
        words = f"{name}: {str(fault)[:TEXT]}"
        return kind, words.encode(errors="replace")[:TEXT]
    except BaseException:
        return ERROR, b"an exception that cannot be shown"


def read(size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.read(CHANNEL, size - len(data))
        if not piece:
            os._exit(0)
        data += piece
    return data


def write(data: bytes) -> None:
    while data:
        data = data[os.write(CHANNEL, data) :]
