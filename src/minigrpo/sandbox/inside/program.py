"""The work of a locked child: read one program, call it on request, answer with plain data.

The program shares this interpreter, so nothing here is secret and nothing here judges: a program that manipulates these
functions changes its own answers only. The namespace is executed afresh for every call.
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
"""The head of a message: length of what follows, the call's nonce, and the kind of message."""

CALL, DEFINE = b"C", b"D"
VALUE, ERROR, MEMORY, BLOCKED, UNREADABLE = b"V", b"E", b"M", b"B", b"U"
MAX_TEXT_CHARS = 300
MAX_CHAIN = 100
CONTEXT: Any = BaseException.__context__
CAUSE: Any = BaseException.__cause__
MEMBERS: Any = BaseExceptionGroup.exceptions
ERRNO: Any = OSError.errno
"""Python's own fields of exceptions."""
RESERVE_BYTES = 2**18
RECURSION_LIMIT = sys.getrecursionlimit()
NAME = "program"
NO_MEMORY = 72
"""The exit code of a child without memory to read a call or to write an answer."""


class Nowhere(io.RawIOBase):
    """The stream that swallows what a program prints."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


def serve() -> None:
    """Serve calls until the other side closes the channel, or the kernel ends this process."""
    sys.stdout = sys.stderr = io.TextIOWrapper(io.BufferedWriter(Nowhere()), errors="replace")
    sys.stdin = None
    vars(sys).update(__stdin__=None, __stdout__=None, __stderr__=None)
    gc.enable()
    output, source, entry = codec.decode(read(HEAD.unpack(read(HEAD.size))[0]))
    code, failure = compile_program(source)
    while True:
        size, nonce, kind = HEAD.unpack(read(HEAD.size))
        arguments = codec.decode(read(size))
        answer = failure or answer_call(code, entry, arguments if kind == CALL else None, output)
        write(HEAD.pack(len(answer[1]), nonce, answer[0]) + answer[1])


def compile_program(source: str) -> tuple[CodeType | None, tuple[bytes, bytes] | None]:
    try:
        return compile(source, f"<{NAME}>", "exec", dont_inherit=True), None
    except BaseException as fault:
        kind, words = describe_error(fault)
        return None, (UNREADABLE if kind == ERROR else kind, words)


def answer_call(code: CodeType | None, entry: str, arguments: Any, output: int) -> tuple[bytes, bytes]:
    """Return (kind, content) of one call, or of the definitions alone where `arguments` is None."""
    reserve = bytearray(RESERVE_BYTES)  # freed to report that no memory is left
    try:
        assert code is not None
        function = define(code, entry)
        return VALUE, codec.encode(None if arguments is None else function(*arguments), output)
    except codec.CodecError as fault:
        return ERROR, f"returns {fault}".encode(errors="replace")[:MAX_TEXT_CHARS]
    except BaseException as fault:
        del reserve
        return describe_error(fault)


def define(code: CodeType, entry: str) -> Any:
    random.seed(0)  # so that the same call gives the same answer in every run, whatever was called before
    sys.setrecursionlimit(RECURSION_LIMIT)
    module = ModuleType(NAME)
    sys.modules[NAME] = module  # dataclasses look up their own module
    exec(code, module.__dict__)
    function = module.__dict__.get(entry)
    if not callable(function):
        raise NameError(f"no function {entry} is defined")
    return function


def describe_error(fault: BaseException) -> tuple[bytes, bytes]:
    """Return (kind, text) of an exception. The kind follows from what happened, never from a name or text.

    Formatting runs the exception's own code, which may fail again.
    """
    try:
        refused = any(map(is_refusal, chain_of(fault)))
        kind = BLOCKED if refused else MEMORY if isinstance(fault, MemoryError) else ERROR
    except BaseException:
        kind = MEMORY if isinstance(fault, MemoryError) else ERROR
    try:
        name = "SyntaxError" if isinstance(fault, SyntaxError) else type(fault).__name__
        words = "" if kind == MEMORY else f"{name}: {str(fault)[:MAX_TEXT_CHARS]}"
        return kind, words.encode(errors="replace")[:MAX_TEXT_CHARS]
    except BaseException:
        return kind, b"an exception that cannot be shown"


def chain_of(fault: BaseException) -> list[BaseException]:
    """Return an exception, those in whose place it was raised, and the members of groups, up to a bound.

    Their own fields are read, not what a class of the program puts over them.
    """
    chain: list[BaseException] = []
    waiting: list[BaseException | None] = [fault]
    while waiting and len(chain) < MAX_CHAIN:
        link = waiting.pop()
        if link is not None and not any(link is seen for seen in chain):
            chain.append(link)
            waiting += [CONTEXT.__get__(link), CAUSE.__get__(link)]
            waiting += MEMBERS.__get__(link) if isinstance(link, BaseExceptionGroup) else ()
    return chain


def is_refusal(fault: BaseException) -> bool:
    """Return whether the kernel refused a call."""
    return isinstance(fault, OSError) and ERRNO.__get__(fault) == errno.EPERM


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
