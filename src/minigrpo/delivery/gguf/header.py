"""What a GGUF file says of itself before its weights, read with the standard library: enough to refuse it early.

Layout: magic, version, two counts; then keys with typed values; then for each tensor its name, shape, type and offset;
then the weights, each at a multiple of the alignment. Values longer than a line (vocabularies) are skipped.
Source: ggml/docs/gguf.md of llama.cpp.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from minigrpo.errors import ArtifactError

MAGIC, VERSIONS = b"GGUF", (2, 3)
TEXT, ARRAY = 8, 9
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
LONGEST = 1 << 24
"""Bytes of a text: what claims to be longer is damaged."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """`context`: tokens that the model was made for. `tokens`: of its vocabulary. `eos`: the one that ends an answer.

    None stands for what the file does not say.
    """

    file: Path
    architecture: str
    context: int | None
    tokens: int
    eos: int | None
    template: bool


class _CutError(Exception):
    """The file ends, or says something that cannot be, in the middle of its head."""


def read_head(file: Path) -> GgufHeader:
    """Raises ArtifactError where the file is missing, is no GGUF file, or ends before its last weight."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            if stream.read(4) != MAGIC:
                raise ArtifactError(f"{file} is no GGUF file ({size:,} bytes). Make one: minigrpo export RUN")
            keys, end = _read(stream)
    except FileNotFoundError:
        raise ArtifactError(f"{file} is not there. Make it: minigrpo export RUN") from None
    except OSError as fault:
        raise ArtifactError(f"{file} cannot be read: {fault.strerror or fault}.") from None
    except (_CutError, struct.error, UnicodeDecodeError, MemoryError):
        raise ArtifactError(f"{file} is cut short or damaged ({size:,} bytes). {AGAIN}") from None
    if end > size:
        raise ArtifactError(f"{file} is cut short: it has {size:,} bytes of {end:,}. {AGAIN}")
    architecture = str(keys.get("general.architecture", ""))
    context = keys.get(f"{architecture}.context_length")
    tokens = keys.get("tokenizer.ggml.tokens", 0)
    eos = keys.get("tokenizer.ggml.eos_token_id")
    return GgufHeader(file, architecture, context, tokens, eos, "tokenizer.chat_template" in keys)


AGAIN = "Copy it again, or export it again with --force"


def _read(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """Its keys (of a list its length), and where the last weight ends, as far as that can be told."""
    version, tensors, count = struct.unpack("<IQQ", stream.read(20))
    if version not in VERSIONS or tensors > 1 << 20 or count > 1 << 20:
        raise _CutError
    keys = dict(_pair(stream) for _ in range(count))
    ends = [_tensor(stream) for _ in range(tensors)]
    step = int(keys.get("general.alignment", 32)) or 32
    begin = -(-stream.tell() // step) * step
    return keys, begin + max(ends, default=0)


def _pair(stream: BinaryIO) -> tuple[str, Any]:
    return _text(stream), _value(stream, _number(stream, "<I"))


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == TEXT:
        return _text(stream)
    if kind == ARRAY:
        inner, length = _number(stream, "<I"), _number(stream, "<Q")
        if inner in NUMBERS:
            stream.seek(length * struct.calcsize(NUMBERS[inner]), 1)
        else:
            for _ in range(length):
                _value(stream, inner)
        return length
    if kind not in NUMBERS:
        raise _CutError
    return _number(stream, NUMBERS[kind])


def _number(stream: BinaryIO, form: str) -> Any:
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]


def _text(stream: BinaryIO) -> str:
    length = _number(stream, "<Q")
    raw = stream.read(length) if length < LONGEST else b""
    if len(raw) != length:
        raise _CutError
    return raw.decode(errors="replace")


def _tensor(stream: BinaryIO) -> int:
    """Where it ends, counted from the first; where it begins, of a type whose size is not known here."""
    _text(stream)
    shape = [_number(stream, "<Q") for _ in range(min(_number(stream, "<I"), 8))]
    kind, offset = _number(stream, "<I"), _number(stream, "<Q")
    block, size = _sizes().get(kind, (1, 0))
    return int(offset + prod(shape) // block * size)


def _sizes() -> dict[int, tuple[int, int]]:
    """Weights and bytes of a block, by type."""
    if find_spec("gguf") is None:
        return {}
    import gguf

    return {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
