"""llama.cpp in a process of its own: a crash inside it becomes one error message, and its output never mixes with ours.

Started by path (`python -P gguf/llamacpp_worker.py`), so this file imports nothing of the package. One request a line
on stdin, as JSON; one answer a line on stdout, followed by as many raw bytes as it says. It calls the C functions of
the library in xllamacpp. Structures passed by value are first compared with the defaults that this file knows: another
version's would be read wrongly.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

_GGML_F32 = 0
"""ggml's number of float32, for the KV cache: in float16 the cache alone would cause errors of 0.001."""

CONTEXT_LAYOUT = "<14I8f2Q2I"
CONTEXT_DEFAULTS = (
    *(512, 2048, 512, 1, 0, 0, 1, 4, 4, 0, *[2**32 - 1] * 4),
    *(0.0, 0.0, -1.0, -1.0, -1.0, -1.0, 0.0, -1.0),
    *(0, 0, 1, 1),
)
"""n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_max_per_seq, n_threads, n_threads_batch,
ctx_type, rope_scaling, pooling, attention, flash_attn; rope and yarn; cb_eval, its data; type_k, type_v."""

MODEL_LAYOUT = "<2Qi"
MODEL_DEFAULTS = (0, 0, -1)
"""devices, buffer overrides, n_gpu_layers."""
EXTRA_BUFFERS_OFFSET = 74
"""Offset of use_extra_bufts: weights repacked for matrix instructions, which some virtual machines only announce."""


class OpaqueParams(ctypes.Structure):
    """A structure passed by value; larger than any version's, as is the memory it is read from."""

    _fields_ = (("raw", ctypes.c_uint8 * 512),)


class LlamaBatch(ctypes.Structure):
    """llama.cpp's llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class RefusedError(Exception):
    """What llama.cpp would not do, to be reported to the parent."""


POINTER_FUNCTIONS = ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory")
LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Llama:
    """One model file, its vocabulary, and a context of the requested length."""

    def __init__(self, library: str) -> None:
        try:
            self.lib = lib = ctypes.CDLL(library)
            for name in POINTER_FUNCTIONS:
                getattr(lib, name).restype = ctypes.c_void_p
            for name in ("llama_model_default_params", "llama_context_default_params"):
                getattr(lib, name).restype = OpaqueParams
            lib.llama_batch_init.restype = LlamaBatch
            lib.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
            lib.llama_model_chat_template.restype = ctypes.c_char_p
        except (OSError, AttributeError) as fault:
            raise RefusedError(f"the library of xllamacpp cannot be used here ({fault})") from None
        self.log_lines: list[str] = []
        self._log = LOG_CALLBACK(lambda level, text, data: self.log_lines.append(text.decode(errors="replace")))
        lib.llama_log_set(self._log, None)
        lib.llama_backend_init()
        self.vocab = self.model = self.context = ctypes.c_void_p()
        self.size = self.room = 0

    def open(self, path: str, room: int, threads: int) -> dict[str, Any]:
        lib, options = self.lib, _require_defaults(self.lib.llama_model_default_params(), MODEL_LAYOUT, MODEL_DEFAULTS)
        struct.pack_into(MODEL_LAYOUT, options.raw, 0, 0, 0, 0)
        options.raw[EXTRA_BUFFERS_OFFSET] = 0
        self.model = ctypes.c_void_p(lib.llama_model_load_from_file(path.encode(), options))
        if not self.model:
            raise RefusedError(self.last_log_lines())
        options = _require_defaults(lib.llama_context_default_params(), CONTEXT_LAYOUT, CONTEXT_DEFAULTS)
        ours = (room, room, room, 1, 0, 0, 0, threads, threads, 0, *[2**32 - 1] * 3, 0)
        struct.pack_into(CONTEXT_LAYOUT, options.raw, 0, *ours, *CONTEXT_DEFAULTS[14:24], _GGML_F32, _GGML_F32)
        self.context = ctypes.c_void_p(lib.llama_init_from_model(self.model, options))
        if not self.context:
            raise RefusedError(self.last_log_lines())
        self.vocab, self.room = ctypes.c_void_p(lib.llama_model_get_vocab(self.model)), room
        self.size = lib.llama_vocab_n_tokens(self.vocab)
        template = lib.llama_model_chat_template(self.model, None)
        return {
            "vocabulary": self.size,
            "bos": lib.llama_vocab_bos(self.vocab),
            "eos": lib.llama_vocab_eos(self.vocab),
            "adds_bos": bool(lib.llama_vocab_get_add_bos(self.vocab) & 1),
            "adds_eos": bool(lib.llama_vocab_get_add_eos(self.vocab) & 1),
            "ends": [i for i in range(self.size) if lib.llama_vocab_is_eog(self.vocab, i) & 1],
            "template": template.decode() if template is not None else None,
        }

    def tokenize(self, text: str, special: bool) -> dict[str, Any]:
        """Tokenize the text. `special`: add the beginning and end that the file asks for."""
        raw = text.encode()
        room = len(raw) + 16
        buffer = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(
            self.vocab, raw, len(raw), buffer, room, ctypes.c_bool(special), ctypes.c_bool(True)
        )
        if count < 0:
            raise RefusedError("the text has more tokens than bytes")
        return {"ids": list(buffer[:count])}

    def logits(self, ids: list[int], start: int) -> tuple[dict[str, Any], bytes]:
        """Return logits [N, V] of the tokens that follow each position from `start` on, as raw float32."""
        rows = len(ids) - start
        values = self._decode(ids, start, clear=True)
        return {"rows": rows, "bytes": 4 * rows * self.size}, ctypes.string_at(values, 4 * rows * self.size)

    def greedy(self, ids: list[int], count: int) -> dict[str, Any]:
        """Return the greedy continuation, up to `count` tokens or an end token."""
        answer_ids: list[int] = []
        values = self._decode(ids, len(ids) - 1, clear=True)
        while len(answer_ids) < count:
            row = values[: self.size]
            answer_ids.append(row.index(max(row)))
            if self.lib.llama_vocab_is_eog(self.vocab, answer_ids[-1]) & 1 or len(ids) + len(answer_ids) >= self.room:
                break
            values = self._decode(answer_ids[-1:], 0, at=len(ids) + len(answer_ids) - 1)
        return {"ids": answer_ids}

    def _decode(self, ids: list[int], start: int, *, at: int = 0, clear: bool = False) -> Any:
        if at + len(ids) > self.room:  # llama.cpp would abort the process
            raise RefusedError(f"it could not read {at + len(ids)} tokens: it was opened for {self.room}")
        if clear:
            self.lib.llama_memory_clear(ctypes.c_void_p(self.lib.llama_get_memory(self.context)), ctypes.c_bool(True))
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= start
        code = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        if code:
            raise RefusedError(f"it could not read {len(ids)} tokens (code {code}): {self.last_log_lines()}")
        return self.lib.llama_get_logits(self.context)

    def last_log_lines(self) -> str:
        words = [line.strip() for line in "".join(self.log_lines[-40:]).splitlines() if line.strip()]
        errors = [line for line in words if "error" in line or "failed" in line]
        return " ".join((errors or words)[-3:])


def _require_defaults(params: OpaqueParams, form: str, expected: tuple[Any, ...]) -> OpaqueParams:
    """Return the parameters, if their defaults lie where this file expects them. Raises RefusedError otherwise."""
    if struct.unpack_from(form, bytes(params.raw)) != expected:
        raise RefusedError("this version of xllamacpp is not known: its structures differ. Install the tested one")
    return params


def answer_requests(requests: BinaryIO, answers: BinaryIO, library: str) -> None:
    """Answer requests until the input ends."""
    llama = None
    for line in requests:
        request = json.loads(line)
        raw = b""
        try:
            llama = llama or Llama(library)
            answer = getattr(llama, request.pop("do"))(**request)
            if isinstance(answer, tuple):
                answer, raw = answer
        except RefusedError as fault:
            answer = {"refused": str(fault)}
        answers.write(json.dumps(answer).encode() + b"\n" + raw)
        answers.flush()


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps whatever the library prints out of our answers
    answer_requests(sys.stdin.buffer, out, str(Path(sys.argv[1])))
