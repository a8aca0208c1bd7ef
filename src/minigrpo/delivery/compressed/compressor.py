"""Find llm-compressor, which pins older versions of our libraries and so has an environment of its own; run it there.

    --compressor PYTHON or MINIGRPO_COMPRESSOR   the python of that environment
    this python                                  where it has llm-compressor

Shapes: N scored positions of a text, V vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigrpo.delivery.compressed.schemes import Scheme
from minigrpo.errors import ArtifactError, MinigrpoError, ModelError
from minigrpo.utils.paths import user_path

COMPRESSOR_PYTHON = "MINIGRPO_COMPRESSOR"
PACKAGE, VERSION = "llmcompressor", "0.14.0.1"
ENVIRONMENT = f"python -m venv compressor && compressor/bin/pip install {PACKAGE}=={VERSION}"
"""The two commands that make one."""


@dataclass(frozen=True, slots=True)
class Compressor:
    """llm-compressor in the environment of `python`."""

    python: Path
    version: str

    @property
    def name(self) -> str:
        return f"llm-compressor {self.version}"

    def make(self, model: Path, folder: Path, scheme: Scheme, ignored: Sequence[str]) -> None:
        """Write a model folder, packed, into `folder`. Raises ModelError where llm-compressor ends with an error."""
        options = {"model": str(model), "folder": str(folder), "preset": scheme.preset, "ignore": list(ignored)}
        for _ in self._ask("make", **options):
            pass

    def distributions(self, folder: Path, texts: Sequence[Any]) -> Iterator[Tensor]:
        """Yield log-probabilities [N, V] of each text, as transformers and compressed-tensors compute them on the CPU.

        Raises ModelError where that environment cannot run the model, ArtifactError where it misses tensors in it.
        """
        asked = [(list(text.ids), text.start) for text in texts]
        for answer, raw in self._ask("score", folder=str(folder), texts=asked):
            yield torch.frombuffer(bytearray(raw), dtype=torch.float32).view(answer["rows"], -1)

    def _ask(self, do: str, **request: Any) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yield the answers of a worker, each with its raw bytes."""
        worker = Path(__file__).with_name("compressor_worker.py")
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        process = subprocess.Popen(
            [self.python, "-P", worker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        count = 0
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
                process.stdin.flush()
            while line := process.stdout.readline():
                answer = json.loads(line)
                if "misread" in answer:
                    raise ArtifactError(f"transformers does not load it as it should: {answer['misread']}.")
                if "refused" in answer:
                    raise ModelError(f"{self.name} in {self.python} ended with an error ({answer['refused']}).")
                size = answer.get("bytes", 0)
                raw = process.stdout.read(size)
                if len(raw) < size:
                    break
                count += 1
                yield answer, raw
            if count < len(request.get("texts", [0])):
                raise ModelError(
                    f"{self.name} in {self.python} ended with code {process.wait()}: is there enough memory?"
                )
        finally:
            process.kill()  # it holds nothing that could be lost
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    stream.close()
            process.wait()


def find_compressor(named: Path | None) -> Compressor:
    """Find the python that has llm-compressor. Raises MinigrpoError, with the commands to get it."""
    chosen = named or (Path(os.environ[COMPRESSOR_PYTHON]) if os.environ.get(COMPRESSOR_PYTHON) else None)
    python = Path(shutil.which(user_path(chosen)) or chosen) if chosen else Path(sys.executable)
    probe = f"import importlib.metadata as m; print(m.version({PACKAGE!r}))"
    try:
        ended = subprocess.run(
            [python, "-P", "-c", probe], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except OSError as fault:
        raise MinigrpoError(
            f"{chosen} cannot be run ({fault.strerror}). --compressor names the python of an environment, as in "
            "--compressor compressor/bin/python"
        ) from None
    if ended.returncode == 0:
        return Compressor(python, ended.stdout.strip())
    raise MinigrpoError(
        f"Formats for vLLM are made by llm-compressor, which {chosen or 'this python'} does not have. It pins older "
        f"libraries, so make it an environment of its own: {ENVIRONMENT}. Then name it: --compressor "
        f"compressor/bin/python, or {COMPRESSOR_PYTHON}"
    )
