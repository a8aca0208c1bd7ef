"""Serving from the Hub: settings are read there first, and vLLM gets those that it would miss in them."""

from __future__ import annotations

import hashlib
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from minigrpo.cli import main
from minigrpo.delivery.serve.commands import CONTAINER_CACHE, VllmModel, adapter_max_rank
from minigrpo.delivery.serve.resolve import ServeOptions, resolve_servable
from minigrpo.delivery.serve.serve import plan_server
from minigrpo.errors import MinigrpoError
from minigrpo.runs.rundir import RunDir
from tests.helpers.delivered import edit_json
from tests.helpers.exported import merged_run
from tests.helpers.hub_storage import READER, Repo, StandIn
from tests.helpers.marks import rest_is_long
from tests.helpers.published import hub_here  # noqa: F401
from tests.helpers.served import after, told_of

pytestmark = pytest.mark.extra("gguf")

SCALE = {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 32}}
VLLM = ServeOptions(engine="vllm")


def put(hub: StandIn, name: str, folder: Path) -> None:
    """Publish the folder as a repository."""
    hub.repos[name] = Repo(private=True)
    for file in folder.iterdir():
        data, large = file.read_bytes(), file.suffix == ".safetensors"
        hub.repos[name].files[file.name] = (data, large)
        hub.objects |= {hashlib.sha256(data).hexdigest(): data} if large else {}


def served(name: str, **wanted: Any) -> VllmModel:
    model = resolve_servable(name, ServeOptions(engine="vllm", **wanted)).model
    assert model is not None
    return model


def base_of(run: RunDir) -> Path:
    return run.path.with_name(f"{run.path.name}-base")


@pytest.mark.parametrize("family", rest_is_long(["ministral3", "mistral3", "qwen2"], "mistral3"))
def test_vllm_is_told_what_a_model_on_the_hub_lacks(tmp_path: Path, hub: StandIn, family: str) -> None:
    run = merged_run(tmp_path / "mine", family)
    put(hub, "me/base", base_of(run))
    put(hub, "me/merged", run.merged)
    wanted = {"ministral3": [SCALE], "mistral3": [{"text_config": SCALE}], "qwen2": []}[family]
    assert resolve_servable("me/base", VLLM).name == "base"
    assert told_of(served("me/base")) == wanted
    assert told_of(VllmModel("me/base")) == wanted
    assert told_of(served("me/merged")) == []
    assert not any(path.endswith(".safetensors") for _, path in hub.asked)  # vLLM downloads the weights itself


def test_an_adapter_on_the_hub_is_served_beside_its_base(tmp_path: Path, hub: StandIn) -> None:
    run = merged_run(tmp_path / "mine", "ministral3")
    put(hub, "me/base", base_of(run))
    edit_json(run.adapter / "adapter_config.json", base_model_name_or_path="me/base")
    put(hub, "me/adapter", run.adapter)
    artefact = resolve_servable("me/adapter", VLLM)
    model = artefact.model
    assert artefact.name == "adapter"
    assert model is not None
    assert model.adapter is not None
    assert adapter_max_rank(model.adapter) == 8
    for folder, here in ((Path(model.source), base_of(run)), (model.adapter, run.adapter)):
        for name in ("model.safetensors", "adapter_model.safetensors"):
            if (here / name).is_file():
                assert (folder / name).read_bytes() == (here / name).read_bytes()
    assert told_of(model) == [SCALE]


def test_the_container_finds_a_hub_model_in_the_cache_that_is_mounted(
    tmp_path: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files there are links to their neighbours, so a mount of one folder alone would hold dangling links."""
    monkeypatch.setattr("minigrpo.delivery.serve.serve.find_vllm", lambda named: Path(sys.executable))
    run = merged_run(tmp_path / "mine", "qwen2")
    put(hub, "me/base", base_of(run))
    edit_json(run.adapter / "adapter_config.json", base_model_name_or_path="me/base")
    put(hub, "me/adapter", run.adapter)
    line = shlex.split(plan_server("me/adapter", ServeOptions(engine="vllm", port=0)).docker or "")
    assert after("-v", line) == [f"{tmp_path / 'cache'}:{CONTAINER_CACHE}"]
    lora = after("--lora-modules", line)[0].removeprefix("adapter=")
    for inside, name in ((after("--model", line)[0], "config.json"), (lora, "adapter_config.json")):
        assert (tmp_path / "cache" / Path(inside).relative_to(CONTAINER_CACHE) / name).is_file()
    line = shlex.split(plan_server("me/base", ServeOptions(engine="vllm", port=0)).docker or "")
    assert (after("-v", line), after("--model", line)) == ([f"{tmp_path / 'cache'}:{CONTAINER_CACHE}"], ["me/base"])


def test_an_adapter_whose_base_is_elsewhere_is_served_beside_the_one_that_is_named(
    tmp_path: Path, hub: StandIn
) -> None:
    run = merged_run(tmp_path / "mine", "qwen2")
    edit_json(run.adapter / "adapter_config.json", base_model_name_or_path=None)
    put(hub, "me/adapter", run.adapter)
    with pytest.raises(MinigrpoError, match=r"names no base model. Say which: --base MODEL"):
        served("me/adapter")
    assert served("me/adapter", base=str(base_of(run))).source == str(base_of(run))


def test_what_was_read_once_is_served_without_a_network(tmp_path: Path, hub: StandIn) -> None:
    run = merged_run(tmp_path / "mine", "ministral3")
    put(hub, "me/base", base_of(run))
    assert told_of(served("me/base")) == [SCALE]
    hub.refuse.append(("GET", ".*", 503, "out of order"))
    hub.refuse.append(("HEAD", ".*", 503, "out of order"))
    assert told_of(served("me/base")) == [SCALE]
    with pytest.raises(MinigrpoError, match=r"me/other could not be read from http.*cache does not have it"):
        served("me/other")


def test_what_the_hub_refuses_is_reported_in_a_sentence(
    tmp_path: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    hub.repos["me/files"] = Repo(private=True)
    hub.repos["me/broken"] = Repo(private=True, files={"config.json": (b"[1", False)})
    hub.repos["me/adapter"] = Repo(private=True, files={"adapter_config.json": (b"[]", False)})
    said = {
        "me/nothing": "me/nothing is neither a folder here nor a model on http",
        "me/files": "me/files holds no config.json, so it is no model that vLLM serves. Of a GGUF repository: hf",
        "me/broken": "config.json of me/broken is damaged",
        "me/adapter": "adapter_config.json of me/adapter is damaged",
    }
    for name, sentence in said.items():
        assert sentence in refused(capsys, name)
    monkeypatch.setenv("HF_TOKEN", READER[:-1])
    assert "does not know your token (401), so me/files was not read" in refused(capsys, "me/files")


def refused(capsys: Any, name: str) -> str:
    """Return what `serve` prints, after an exit code of 2."""
    with pytest.raises(SystemExit) as ended:
        main.main(["serve", name, "--engine", "vllm", "--dry-run"])
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert "Traceback" not in said.err
    return " ".join(str(said.err).split())
