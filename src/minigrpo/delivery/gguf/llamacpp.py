"""llama.cpp as the reference reader of GGUF files: next-token distributions of given ids, greedy continuations,
tokenizer.

It computes on the CPU with a float32 KV cache, so its output is what the file holds. It is not used in training, whose
weights change.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from minigrpo.errors import ArtifactError, MinigrpoError, install_hint


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What llama.cpp reads in the file. `bos`, `eos`: -1 where there is none. `ends`: tokens that end an answer."""

    vocabulary: int
    bos: int
    eos: int
    adds_bos: bool
    adds_eos: bool
    ends: tuple[int, ...]
    template: str | None


def find_library() -> Path | None:
    """Return the shared library of xllamacpp; None where it is not installed."""
    spec = find_spec("xllamacpp")
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places for kind in ("*.so", "*.pyd") for file in sorted(Path(place).glob(kind))]
    return files[0] if files else None


def require_library() -> Path:
    """Return the shared library of xllamacpp. Raises MinigrpoError where it is not installed."""
    found = find_library()
    if found is None:
        raise MinigrpoError(
            f"A GGUF file is proved by llama.cpp itself, and xllamacpp is not installed. {install_hint('gguf')}"
        )
    return found


class LlamaCpp:
    """A GGUF file, open in a process of its own until the block ends: `with LlamaCpp(file, context=512) as llama`.

    `context`: tokens of the longest text. Raises ArtifactError where llama.cpp refuses the file or dies on it.
    """

    def __init__(self, file: Path, *, context: int, threads: int | None = None) -> None:
        self.file = file
        worker = Path(__file__).with_name("llamacpp_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(worker), str(require_library())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            answer, _ = self._ask("open", path=str(file), room=context, threads=threads or torch.get_num_threads())
        except BaseException:
            self.close()
            raise
        self.facts = GgufFacts(**{**answer, "ends": tuple(answer["ends"])})

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with suppress(BrokenPipeError):  # it ended before it had read all requests
                    stream.close()
        self._process.kill()  # it holds nothing that could be lost
        self._process.wait()

    def logprobs(self, ids: Sequence[int], start: int) -> Tensor:
        """Return log-probabilities [N, V] in float32 of the tokens that follow each position from `start` on."""
        answer, raw = self._ask("logits", ids=list(ids), start=start)
        logits_NV = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(answer["rows"], -1)
        return logits_NV.log_softmax(-1)

    def distributions(self, texts: Sequence[Any]) -> Iterator[Tensor]:
        """Yield the log-probabilities of each text, as `texts.text_logprobs` does for a model in memory."""
        for text in texts:
            yield self.logprobs(text.ids[:-1], text.start - 1)

    def greedy(self, ids: Sequence[int], count: int) -> tuple[int, ...]:
        """Return the greedy continuation, up to `count` tokens or the end of the answer."""
        return tuple(self._ask("greedy", ids=list(ids), count=count)[0]["ids"])

    def tokenize(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """Return token ids; names of special tokens in the text are parsed. `special`: add the beginning and end
        that the file asks for."""
        return tuple(self._ask("tokenize", text=text, special=special)[0]["ids"])

    def _ask(self, do: str, **request: Any) -> tuple[dict[str, Any], bytes]:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            requests.write(json.dumps({"do": do, **request}).encode() + b"\n")
            requests.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = b""
        answer = json.loads(line) if line else {}
        size = answer.pop("bytes", 0)
        raw = answers.read(size) if size else b""
        if not line or len(raw) < size:
            raise ArtifactError(
                f"llama.cpp ended with code {self._process.wait()} while it read {self.file}. It needs memory for the "
                "whole file; if there is enough, the file is damaged. Export it again with --force"
            )
        if "refused" in answer:
            raise ArtifactError(f"llama.cpp refuses {self.file}: {answer['refused']}")
        return answer, raw
