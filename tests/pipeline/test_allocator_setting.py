"""torch's allocator on a GPU is set before torch is loaded, for every stage, unless somebody else has set it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigrpo.config.schema import Recipe
from minigrpo.pipeline.context import allocator_for
from minigrpo.utils.memory import ALLOCATOR_VARIABLES

SET = "PYTORCH_ALLOC_CONF"
SEE = """
import builtins, os, sys
own = builtins.__import__
def watch(name, *rest, **more):
    if name == "torch" and "torch" not in sys.modules:
        print(os.environ.get("PYTORCH_ALLOC_CONF"), flush=True)
        os._exit(0)
    return own(name, *rest, **more)
builtins.__import__ = watch
from minigrpo.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.needs("linux")
@pytest.mark.parametrize("verb", ["train", "preflight", "evaluate"])
def test_it_is_set_when_torch_is_loaded(verb: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    more = ["empty", "--recipe", "quickstart"] if verb == "evaluate" else ["quickstart", "--run", "runs/one"]
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path("src").resolve()), environment.get("PYTHONPATH")))
    )
    command = [sys.executable, "-c", SEE, verb, *more]
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout.split() == ["expandable_segments:True"], ran.stderr


@pytest.mark.needs("linux")
@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "backend:cudaMallocAsync")
    with allocator_for(Recipe()):
        found = {each: os.environ[each] for each in ALLOCATOR_VARIABLES if each in os.environ}
    assert found == {name: "backend:cudaMallocAsync"}
    assert os.environ[name] == "backend:cudaMallocAsync"


@pytest.mark.needs("linux")
def test_beside_vllm_in_the_same_process_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(each, raising=False)
    with allocator_for(Recipe(rollout={"engine": "vllm"})):  # type: ignore[arg-type]
        assert SET not in os.environ
    with allocator_for(Recipe(rollout={"engine": "vllm", "server": "http://localhost:8000"})):  # type: ignore[arg-type]
        assert os.environ[SET] == "expandable_segments:True"
    assert SET not in os.environ
