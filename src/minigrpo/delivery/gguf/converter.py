"""Convert a model folder to a GGUF file in floats: with llama.cpp's own converter if there is one, else our small
writer.

    --llama-cpp DIR or LLAMA_CPP_DIR   a checkout of llama.cpp
    the cache                          the converter of one known version, downloaded once and checked by its hash
    writer.py                          without a network: for the architectures that it names, and no other

Exports elsewhere break because their llama.cpp is not pinned; what is downloaded here is always the same bytes.
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

from minigrpo.delivery.gguf import writer as gguf_writer
from minigrpo.delivery.gguf.pretokenizer import pretokenizer_name
from minigrpo.errors import ArtifactError, ModelError
from minigrpo.models.model_files import open_base
from minigrpo.runs.rundir import complete_folder, digest
from minigrpo.utils.cache_dir import cache_dir
from minigrpo.utils.paths import user_path

SDIST_PACKAGE, SDIST_VERSION = "llama-cpp-python", "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SDIST_FOLDER = PurePosixPath("vendor/llama.cpp")
SDIST_PARTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
"""What is taken from the source distribution: the converter, what it imports, and their licence."""
CONVERTER_SCRIPT = SDIST_PARTS[0]
DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|requested and \d+ written")
"""How a converter's errors on a full disk read; the last is numpy's."""
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "PIP_NO_INDEX")


@dataclass(frozen=True, slots=True)
class Converter:
    """A converter to GGUF. `root`: llama.cpp's folder; None for our own writer. `why`: the reason for our own
    writer, in words for the user."""

    root: Path | None
    why: str = ""

    @property
    def name(self) -> str:
        return f"llama.cpp's converter ({self.root})" if self.root else f"minigrpo's own writer ({self.why})"

    def convert(self, folder: Path, file: Path, kind: str, name: str) -> None:
        """Write the GGUF file. `kind`: F32, F16 or BF16. Raises ModelError where the converter does not know the
        model."""
        if self.root is None:
            gguf_writer.write_gguf(folder, file, kind, name)
            return
        known = _pretokenizer_or_fault(folder)
        command = [
            *(sys.executable, "-P", str(Path(__file__).with_name("converter_worker.py")), str(self.root)),
            # Where we know no name, llama.cpp's own list decides.
            *("" if isinstance(known, ModelError) else known, str(folder), kind.lower(), str(file), name),
        ]
        reads, writes = os.pipe()  # the write end stays open while we live: the worker ends with us
        try:
            ended = subprocess.run(command, stdin=reads, capture_output=True, text=True, errors="replace")
        finally:
            os.close(reads)
            os.close(writes)
        if ended.returncode and DISK_FULL.search(ended.stderr):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if ended.returncode or not file.is_file():
            if isinstance(known, ModelError) and UNKNOWN_SPLIT in ended.stderr:
                raise known
            reason = describe_failure(ended.returncode, ended.stderr)
            raise ModelError(f"{folder} was not written as GGUF: {reason}. {_alternatives(folder, known)}")


UNKNOWN_SPLIT = "BPE pre-tokenizer was not recognized"
FAILURES = {
    r"Model (\S+) is not supported": "llama.cpp's converter does not know the architecture {}",
    r"Architecture '(\S+)' not supported": "llama.cpp's converter does not know the architecture {}",
    r"Can not map tensor '(\S+)'": "llama.cpp has no place for its tensor {}",
    r"No module named '(\S+)'": "llama.cpp's converter needs the Python package {}, which is not installed",
    r"MemoryError": "llama.cpp's converter ran out of memory",
}
"""A pattern of the converter's own words -> ours, with what the pattern found."""
_FOLDERS = re.compile(r"(?:/[^\s/'\"]+)+/")


def describe_failure(code: int, said: str) -> str:
    """Return in a clause why llama.cpp's converter failed. `code`: its exit code. `said`: its standard error."""
    if code < 0:  # a signal, which leaves no words
        return f"llama.cpp's converter was ended by signal {-code}; if nobody did that, memory ran out"
    lines = [line.strip() for line in reversed(said.splitlines()) if line.strip()]
    for line in lines:  # the last first: what ended it, before what it got over
        for pattern, words in FAILURES.items():
            if found := re.search(pattern, line):
                return words.format(*found.groups())
    last = _FOLDERS.sub("", lines[0])[:300].rstrip(".") if lines else "it said nothing"
    return f"llama.cpp's converter failed with code {code}, for a reason that is not known here ({last})"


def _alternatives(folder: Path, known: str | ModelError) -> str:
    """Return what to try next: our own writer only where it would write this model."""
    newer = "Try the converter of a newer llama.cpp: --llama-cpp DIR"
    is_ours = isinstance(known, str) and gguf_writer.unsupported_reason(open_base(folder).config) is None
    return f"{newer}; or our own writer: --writer own" if is_ours else newer


def _pretokenizer_or_fault(folder: Path) -> str | ModelError:
    """Return our name of the pre-tokenizer, or why there is none."""
    try:
        return pretokenizer_name(folder)
    except ModelError as fault:
        return fault


def find_converter(folder: Path, given: Path | None, writer: str = "auto") -> Converter:
    """Choose the converter. `writer`: auto, official or own. Raises ArtifactError for a folder without a converter,
    ModelError where only the official one would do and it cannot be had."""
    refusal = gguf_writer.unsupported_reason(open_base(folder).config)
    if writer == "own":
        if refusal:
            raise ModelError(f"Our own writer does not know {folder}: {refusal}. Leave --writer own away.")
        return Converter(None, "as asked")
    named = given or (Path(os.environ["LLAMA_CPP_DIR"]) if os.environ.get("LLAMA_CPP_DIR") else None)
    if named:
        root = user_path(named)
        if not (root / CONVERTER_SCRIPT).is_file():
            raise ArtifactError(
                f"{root} holds no {CONVERTER_SCRIPT}. Give the folder of llama.cpp's sources: --llama-cpp DIR"
            )
        return Converter(root.absolute())
    try:
        return Converter(fetch_converter())
    except ArtifactError as fault:
        if refusal or writer == "official":
            what = f"{refusal} cannot be written without llama.cpp's converter. " if refusal else ""
            raise ModelError(f"{folder}: {what}{fault}") from None
        return Converter(None, str(fault).rstrip("."))


def fetch_converter() -> Path:
    """Return the converter's folder in the cache, downloading it if need be. Raises ArtifactError where that fails."""
    place = cache_dir() / f"llama.cpp-{SDIST_SHA256[:12]}"
    if (place / CONVERTER_SCRIPT).is_file():
        return place
    if any(os.environ.get(name, "") not in ("", "0") for name in OFFLINE_VARIABLES):
        raise ArtifactError("llama.cpp's converter is not in the cache, and this session is offline")
    with tempfile.TemporaryDirectory() as folder:
        archive = _download(Path(folder))
        with complete_folder(place) as draft:
            _unpack(archive, draft)
    return place


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", SDIST_PACKAGE]
    ended = subprocess.run(
        [*command, "--dest", str(folder), f"{SDIST_PACKAGE}=={SDIST_VERSION}"],
        capture_output=True,
        text=True,
        errors="replace",
    )
    found = next(folder.glob("*.tar.gz"), None)
    if ended.returncode or found is None:
        raise ArtifactError("llama.cpp's converter is not in the cache and could not be downloaded")
    if digest(found) != SDIST_SHA256:
        raise ArtifactError(
            f"{SDIST_PACKAGE} {SDIST_VERSION} as downloaded is not the one that is known: its SHA-256 differs"
        )
    return found


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the converter's parts, and nothing outside of `folder`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            is_needed = any(inside.is_relative_to(SDIST_FOLDER / part) for part in SDIST_PARTS)
            stream = tar.extractfile(member) if is_needed and member.isfile() else None
            if stream is None or ".." in inside.parts:
                continue
            target = folder / inside.relative_to(SDIST_FOLDER)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(stream.read())
