"""Read the header of a GGUF file with the standard library: enough to refuse a bad file early.

Layout: magic, version, two counts; then keys with typed values; then for each tensor its name, shape, type and offset;
then the weights, each at a multiple of the alignment. Long values (vocabularies) are skipped. Source: ggml/docs/gguf.md
of llama.cpp.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from minigrpo.errors import ArtifactError

GGUF_MAGIC, GGUF_VERSIONS = b"GGUF", (2, 3)
STRING_TYPE, ARRAY_TYPE = 8, 9
NUMBER_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
MAX_STRING_BYTES = 1 << 24
"""Bytes of a string: a file that claims a longer one is damaged."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself. `context`: tokens that the model was made for. `tokens`: size of its vocabulary.
    `eos`: the token that ends an answer. `template`: whether it holds a chat template.

    None stands for what the file does not say.
    """

    file: Path
    architecture: str
    context: int | None
    tokens: int
    eos: int | None
    template: bool


class _CutError(Exception):
    """The header is truncated or holds an impossible value."""


def read_header(file: Path) -> GgufHeader:
    """Read the header. Raises ArtifactError where the file is missing, unreadable, truncated or no GGUF file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            if stream.read(4) != GGUF_MAGIC:
                raise ArtifactError(f"{file} is no GGUF file ({size:,} bytes). Make one: minigrpo export RUN")
            keys, end = _read_keys(stream)
    except FileNotFoundError:
        raise ArtifactError(f"{file} is not there. Make it: minigrpo export RUN") from None
    except OSError as fault:
        raise ArtifactError(f"{file} cannot be read: {fault.strerror or fault}.") from None
    except (_CutError, struct.error, UnicodeDecodeError, MemoryError):
        raise ArtifactError(f"{file} is cut short or damaged ({size:,} bytes). {COPY_AGAIN_HINT}") from None
    if end > size:
        raise ArtifactError(f"{file} is cut short: it has {size:,} bytes of {end:,}. {COPY_AGAIN_HINT}")
    architecture = str(keys.get("general.architecture", ""))
    context = keys.get(f"{architecture}.context_length")
    tokens = keys.get("tokenizer.ggml.tokens", 0)
    eos = keys.get("tokenizer.ggml.eos_token_id")
    return GgufHeader(file, architecture, context, tokens, eos, "tokenizer.chat_template" in keys)


COPY_AGAIN_HINT = "Copy it again, or export it again with --force"


def _read_keys(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the keys (for a list, its length) and the offset at which the last weight ends, as far as it is known."""
    version, tensors, count = struct.unpack("<IQQ", stream.read(20))
    if version not in GGUF_VERSIONS or tensors > 1 << 20 or count > 1 << 20:
        raise _CutError
    keys = dict(_read_pair(stream) for _ in range(count))
    ends = [_read_tensor_end(stream) for _ in range(tensors)]
    step = int(keys.get("general.alignment", 32)) or 32
    begin = -(-stream.tell() // step) * step
    return keys, begin + max(ends, default=0)


def _read_pair(stream: BinaryIO) -> tuple[str, Any]:
    return _read_string(stream), _read_value(stream, _read_number(stream, "<I"))


def _read_value(stream: BinaryIO, kind: int) -> Any:
    if kind == STRING_TYPE:
        return _read_string(stream)
    if kind == ARRAY_TYPE:
        inner, length = _read_number(stream, "<I"), _read_number(stream, "<Q")
        if inner in NUMBER_FORMATS:
            stream.seek(length * struct.calcsize(NUMBER_FORMATS[inner]), 1)
        else:
            for _ in range(length):
                _read_value(stream, inner)
        return length
    if kind not in NUMBER_FORMATS:
        raise _CutError
    return _read_number(stream, NUMBER_FORMATS[kind])


def _read_number(stream: BinaryIO, form: str) -> Any:
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]


def _read_string(stream: BinaryIO) -> str:
    length = _read_number(stream, "<Q")
    raw = stream.read(length) if length < MAX_STRING_BYTES else b""
    if len(raw) != length:
        raise _CutError
    return raw.decode(errors="replace")


def _read_tensor_end(stream: BinaryIO) -> int:
    """Return the offset of the tensor's end, counted from the first weight; for a type of unknown size, that of its
    start."""
    _read_string(stream)
    shape = [_read_number(stream, "<Q") for _ in range(min(_read_number(stream, "<I"), 8))]
    kind, offset = _read_number(stream, "<I"), _read_number(stream, "<Q")
    block, size = _block_sizes().get(kind, (1, 0))
    return int(offset + prod(shape) // block * size)


def _block_sizes() -> dict[int, tuple[int, int]]:
    """Return (weights, bytes) of a block, by type."""
    if find_spec("gguf") is None:
        return {}
    import gguf

    return {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
