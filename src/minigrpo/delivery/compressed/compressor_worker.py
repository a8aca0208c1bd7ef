"""llm-compressor in the python of an environment of its own, which holds other versions of our libraries.

    python -P compressor_worker.py      one request on stdin, as one line of JSON

    {"do": "make", model, folder, preset, ignore}    writes the folder; answers {"made": true}
    {"do": "score", folder, texts}                   answers {"rows": N, "bytes": B} for each text, then B raw bytes:
                                                     log-probabilities [N, V] in float32

Started by path, so this file imports nothing of the package. {"refused": why} stands for an answer where a library ends
with an error, {"misread": what} where tensors are missing or left over. It ends when its standard input does, so that a
killed export leaves no process that goes on writing.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
from typing import Any, BinaryIO


class MisreadError(Exception):
    """Tensors of the folder have no place in the model, or places no tensor."""


def exit_when_stdin_closes() -> None:
    """Exit when standard input closes: a pipe that the parent holds open and writes to only once."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def read_request() -> dict[str, Any]:
    """Read one line, byte by byte: what Python's own stdin reads ahead would be lost to the thread."""
    line = bytearray()
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return dict(json.loads(line))


def make(out: BinaryIO, model: str, folder: str, preset: str, ignore: list[str]) -> None:
    """Pack the weights shard by shard, without calibration data."""
    importlib.import_module("llmcompressor").model_free_ptq(model, folder, scheme=preset, ignore=ignore, device="cpu")
    answer(out, made=True)


def score(out: BinaryIO, folder: str, texts: list[tuple[list[int], int]]) -> None:
    """Score texts as (ids, start of what is scored) with transformers, which unpacks by compressed-tensors."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as stream:
        opener = getattr(transformers, json.load(stream)["architectures"][0])
    unpack = transformers.CompressedTensorsConfig(dequantize=True)
    model, info = opener.from_pretrained(
        folder, dtype=torch.float32, quantization_config=unpack, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise MisreadError(f"{kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]}")
    model = model.float().eval()  # some formats are unpacked to bfloat16
    for ids, start in texts:
        with torch.no_grad():
            logits_NV = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0, start - 1 :]
        raw = logits_NV.float().log_softmax(-1).contiguous().numpy().tobytes()
        answer(out, rows=len(logits_NV), bytes=len(raw))
        out.write(raw)
        out.flush()


def answer(out: BinaryIO, **fields: Any) -> None:
    out.write(json.dumps(fields).encode() + b"\n")
    out.flush()


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the libraries print is no answer
    request = read_request()
    exit_when_stdin_closes()
    try:
        if request.pop("do") == "make":
            make(out, **request)
        else:
            score(out, **request)
    except MisreadError as fault:
        answer(out, misread=str(fault))
    except Exception as fault:
        words = " ".join(str(fault).split())
        answer(out, refused=f"{type(fault).__name__}: {words[-300:]}")
    out.close()


if __name__ == "__main__":
    main()
