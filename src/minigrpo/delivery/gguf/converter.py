"""A model folder -> a GGUF file in floats: by llama.cpp's own converter where there is one, else by our small writer.

    --llama-cpp DIR or LLAMA_CPP_DIR   a checkout of llama.cpp
    the cache                          the converter of one known version, fetched once and checked by its hash
    ggufwriter                         without a network: for the architectures that it names, and no other

An unpinned llama.cpp is what breaks exports elsewhere, so what is fetched is always the same bytes.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minigrpo.delivery.gguf import writer as ggufwriter
from minigrpo.delivery.gguf.pretokenizer import kind_of
from minigrpo.errors import ArtifactError, ModelError
from minigrpo.models.model_files import open_base
from minigrpo.runs.rundir import complete_folder, digest
from minigrpo.utils.cache_dir import cache_dir

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
INSIDE = PurePosixPath("vendor/llama.cpp")
PARTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
"""Of the source distribution: the converter, what it imports, and the licence that they come under."""
SCRIPT = PARTS[0]
FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|requested and \d+ written")
"""What a converter without room ends with; the last is numpy's."""
OFFLINE = ("HF_HUB_OFFLINE", "PIP_NO_INDEX")


@dataclass(frozen=True, slots=True)
class Converter:
    """`root`: of llama.cpp; None for our own writer. `why`: of the latter, in a person's words."""

    root: Path | None
    why: str = ""

    @property
    def name(self) -> str:
        return f"llama.cpp's converter ({self.root})" if self.root else f"minigrpo's own writer ({self.why})"

    def convert(self, folder: Path, file: Path, kind: str, name: str) -> None:
        """`kind`: F32, F16 or BF16. Raises ModelError where the model is not known to the converter."""
        if self.root is None:
            ggufwriter.write(folder, file, kind, name)
            return
        command = [
            *(sys.executable, "-P", str(Path(__file__).with_name("converter_worker.py")), str(self.root)),
            *(_kind_or_theirs(folder), str(folder), kind.lower(), str(file), name),
        ]
        reads, writes = os.pipe()  # while this process lives, the other end is open: the worker ends with us
        try:
            ended = subprocess.run(command, stdin=reads, capture_output=True, text=True, errors="replace")
        finally:
            os.close(reads)
            os.close(writes)
        if ended.returncode and FULL.search(ended.stderr):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if ended.returncode or not file.is_file():
            words = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
            told = " ".join(words[-2:])[-300:]
            raise ModelError(f"llama.cpp's converter in {self.root} failed on {folder} ({told}). Try a newer one, or "
                             "our own writer: --writer own")  # fmt: skip


def _kind_or_theirs(folder: Path) -> str:
    """Our name of the pre-tokenizer; empty where llama.cpp may know better: its own list then decides."""
    try:
        return kind_of(folder)
    except ModelError:
        return ""


def find_converter(folder: Path, given: Path | None, writer: str = "auto") -> Converter:
    """`writer`: auto, official or own. Raises ArtifactError for a folder without a converter, ModelError where only
    the official one would do and it is not to be had."""
    refusal = ggufwriter.refusal(open_base(folder).config)
    if writer == "own":
        if refusal:
            raise ModelError(f"Our own writer does not know {folder}: {refusal}. Leave --writer own away.")
        return Converter(None, "as asked")
    named = given or (Path(os.environ["LLAMA_CPP_DIR"]) if os.environ.get("LLAMA_CPP_DIR") else None)
    if named:
        root = named.expanduser()
        if not (root / SCRIPT).is_file():
            raise ArtifactError(f"{root} holds no {SCRIPT}. Give the folder of llama.cpp's sources: --llama-cpp DIR")
        return Converter(root.absolute())
    try:
        return Converter(fetched())
    except ArtifactError as fault:
        if refusal or writer == "official":
            what = f"{refusal} cannot be written without llama.cpp's converter. " if refusal else ""
            raise ModelError(f"{folder}: {what}{fault}") from None
        return Converter(None, str(fault).rstrip("."))


def fetched() -> Path:
    """The converter in the cache, put there if need be. Raises ArtifactError where it cannot be had."""
    place = cache_dir() / f"llama.cpp-{SHA256[:12]}"
    if (place / SCRIPT).is_file():
        return place
    if any(os.environ.get(name, "") not in ("", "0") for name in OFFLINE):
        raise ArtifactError("llama.cpp's converter is not in the cache, and this session is offline")
    with tempfile.TemporaryDirectory() as folder:
        archive = _download(Path(folder))
        with complete_folder(place) as draft:
            _unpack(archive, draft)
    return place


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    ended = subprocess.run(
        [*command, "--dest", str(folder), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, errors="replace"
    )
    found = next(folder.glob("*.tar.gz"), None)
    if ended.returncode or found is None:
        raise ArtifactError("llama.cpp's converter is not in the cache and could not be downloaded")
    if digest(found) != SHA256:
        raise ArtifactError(f"{PACKAGE} {VERSION} as downloaded is not the one that is known: its SHA-256 differs")
    return found


def _unpack(archive: Path, folder: Path) -> None:
    """The converter's parts, and nothing outside of `folder`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            wanted = any(inside.is_relative_to(INSIDE / part) for part in PARTS)
            stream = tar.extractfile(member) if wanted and member.isfile() else None
            if stream is None or ".." in inside.parts:
                continue
            target = folder / inside.relative_to(INSIDE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(stream.read())
