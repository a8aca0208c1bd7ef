"""Shared by the tests of publishing: a run with all that can be published, and a Hub for the client."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minigrpo.cli import main
from minigrpo.delivery.hub import client
from minigrpo.delivery.hub.publish import Published, publish
from minigrpo.delivery.merge.merge import merge
from minigrpo.runs.manifest import hash_files, read_sealed, write_sealed
from minigrpo.runs.rundir import RunDir, digest
from tests.helpers.delivered import adapted, make_run, save_base
from tests.helpers.hub_server import standing
from tests.helpers.hub_storage import TOKEN, StandIn

REPOS = ("me/tiny", "me/tiny-lora", "me/tiny-GGUF")


@pytest.fixture(scope="session", name="whole")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Make a run that is trained, merged and exported. llama.cpp is not used: the content of the GGUF does not
    matter here."""
    folder = tmp_path_factory.mktemp("publish")
    under = adapted(save_base(folder / "base", "qwen2", shard="60KB"), folder / "base")
    run = make_run(folder / "tiny", folder / "base", under)
    merge(run, quiet=True)
    add_gguf(run, "Q8_0", 150_000)
    return run


def add_gguf(run: RunDir, kind: str, size: int, **figures: Any) -> Path:
    run.gguf.mkdir(exist_ok=True)
    file = run.gguf / f"{run.path.name}-{kind}.gguf"
    file.write_bytes(b"GGUF" + random.Random(kind).randbytes(size))
    file.with_suffix(".Modelfile").write_text(f"FROM ./{file.name}\n")
    made = run.gguf / "made.json"
    then = read_sealed(made)["files"] if made.is_file() else {}
    proof = {"name": f"gguf {kind}", "mean_kl": 1e-5, "faults": [], **figures}
    origin = {"model": hash_files(run.merged), "converter": "own"}
    entry = {"format": kind, "by": "own", "bits": 8.5, "types": {"F32": 3}, "proof": proof, "sha256": digest(file)}
    write_sealed(made, {"made": {"versions": {}}, "files": {**then, file.name: {**entry, "from": origin}}})
    return file


@pytest.fixture(name="run")
def run_copy(whole: RunDir, tmp_path: Path) -> RunDir:
    shutil.copytree(whole.path, tmp_path / "tiny")
    return RunDir(tmp_path / "tiny")


@pytest.fixture(name="hub")
def hub_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """Point the client at a stand-in Hub, with a token and without delays."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with standing() as server:
        settings = {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "login" / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setattr(client, "RETRY_DELAYS_S", (0.0,))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield server


def send(run: RunDir, **options: Any) -> Published:
    return publish(run, REPOS[0], quiet=True, **options)


def command(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit code and everything printed by the command line."""
    with pytest.raises(SystemExit) as end:
        main.main(["publish", *words])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return int(end.value.code or 0), printed.out + printed.err


def large(run: RunDir) -> dict[str, int]:
    files = [*run.merged.glob("*.safetensors"), *run.adapter.glob("*.safetensors"), *run.gguf.glob("*.gguf")]
    return {digest(file): file.stat().st_size for file in files}
