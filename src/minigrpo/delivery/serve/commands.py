"""The command lines of servers: llama.cpp's, from xllamacpp or as a program, and vLLM's, here or in a container.

Whatever a client does not ask for is neutral: the temperature of the training, and nothing cut off (llama.cpp would
keep 40 tokens, and vLLM do what generation_config.json says, which of many models punishes repetition). So a served
model samples as the policy did when it was rewarded.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from minigrpo.delivery.gguf.header import GgufHeader
from minigrpo.errors import MinigrpoError, install_hint
from minigrpo.models.vllm_compat import VLLM_LORA_RANKS, vllm_config_overrides, vllm_max_lora_rank

EngineName = Literal["llama.cpp", "vllm"]
LOCAL = "127.0.0.1"
ANYWHERE = ("0.0.0.0", "::", "")
ROOM = 4096
"""Tokens of context where nothing else is asked for: of a long context the cache alone can be larger than the model."""
IMAGE = "vllm/vllm-openai:latest"
IN_USE = (errno.EADDRINUSE, 10048)  # the second is Windows'
VLLM_PYTHON = "MINIGRPO_VLLM"
"""Names the python of an environment that holds vLLM."""
ON_HUB = "Of a GGUF repository: hf download OWNER/NAME FILE.gguf --local-dir . and then minigrpo serve FILE.gguf"
CONTAINER_CACHE = "/root/.cache/huggingface/hub"


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """What is started. `model`: the name that clients use. `what`: the artefact, as the user knows it."""

    engine: EngineName
    program: tuple[str, ...]
    host: str
    port: int
    model: str
    what: str
    context: int | None

    @property
    def url(self) -> str:
        """Where a client on this machine finds it."""
        host = LOCAL if self.host in ANYWHERE else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Model:
    """What vLLM serves: a folder or a Hub id, and an adapter that stays beside it.

    `config`: config.json of a Hub id, where it was read already.
    """

    source: str
    adapter: Path | None = None
    config: Mapping[str, Any] | None = None

    def settings(self) -> Mapping[str, Any]:
        """config.json. Raises MinigrpoError where a Hub id has none that can be read."""
        from minigrpo.delivery.hub.client import settings_on_hub
        from minigrpo.runs.rundir import read_json

        folder = Path(self.source)
        if folder.is_dir():
            return dict(read_json(folder / "config.json"))
        found = settings_on_hub(self.source, "config.json") if self.config is None else self.config
        if found is None:
            raise MinigrpoError(f"{self.source} holds no config.json, so it is no model that vLLM serves. {ON_HUB}")
        return found


def worker() -> Path:
    """The file that keeps servers."""
    return Path(__file__).with_name("supervisor.py")


def llama_launch(
    head: GgufHeader,
    *,
    host: str,
    port: int,
    context: int | None = None,
    exact: bool = False,
    temperature: float = 1.0,
    name: str | None = None,
    tools: Path | None = None,
) -> ServerCommand:
    """`tools`: a folder with llama.cpp's programs, which then serve; else xllamacpp does, or a program on the PATH.

    `exact`: keys and values in float32, and no flash attention: slower, and what the file says to the last digits.
    """
    context = fitting(context, head.context, str(head.file))
    model = name or head.file.stem
    program = find_llama_server(tools)
    if program is not None:
        line = [str(program), "--model", str(head.file), "--alias", model, "--host", host, "--port", str(port)]
        line += ["--ctx-size", str(context), "--jinja", "--reasoning-format", "none", "--no-context-shift"]
        line += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"] if exact else []
        line += ["--temp", f"{temperature:g}", "--top-k", "0", "--top-p", "1.0", "--min-p", "0.0"]
    else:
        options = {"file": str(head.file), "model": model, "host": host, "port": port, "context": context}
        options |= {"exact": exact, "temperature": temperature}
        line = [sys.executable, "-P", str(worker()), "llama", json.dumps(options)]
    return ServerCommand("llama.cpp", tuple(line), host, port, model, str(head.file), context)


def find_llama_server(tools: Path | None) -> Path | None:
    """None where xllamacpp serves. Raises MinigrpoError where there is nothing that could."""
    named = tools or (Path(os.environ["LLAMA_CPP_DIR"]) if os.environ.get("LLAMA_CPP_DIR") else None)
    for folder in (named, named / "build" / "bin", named / "bin") if named else ():
        if found := shutil.which("llama-server", path=str(folder)):
            return Path(found).absolute()
    if tools:
        raise MinigrpoError(f"{tools} holds no llama-server. Build it there with cmake, or leave --llama-cpp out.")
    if find_spec("xllamacpp") is not None:
        return None
    found = shutil.which("llama-server")
    if found is None:
        raise MinigrpoError(f"A GGUF file is served by llama.cpp, which is not installed. {install_hint('gguf')}")
    return Path(found)


def vllm_launch(
    model: Model,
    *,
    python: Path,
    host: str,
    port: int,
    name: str,
    context: int | None = None,
    temperature: float = 1.0,
    whole: bool = False,
) -> ServerCommand:
    """`python`: of the environment that holds vLLM. `whole`: let clients ask for the probability of every token."""
    config = model.settings()
    limit = config.get("text_config", config).get("max_position_embeddings")
    context = fitting(context, limit, model.source) if context or limit else None
    line = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    line += [
        "--host",
        host,
        "--port",
        str(port),
        *vllm_options(model=model, name=name, context=context, temperature=temperature),
    ]
    share = memory_share()
    line += ["--gpu-memory-utilization", f"{share:.2f}"] if share else []
    line += ["--max-logprobs", "-1"] if whole else []
    return ServerCommand("vllm", tuple(line), host, port, name, str(model.adapter or model.source), context)


def memory_share() -> float | None:
    """Of a machine without a GPU: half of what is free now. vLLM would take nearly all of it, whoever else is there."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return None
    memory = psutil.virtual_memory()
    return memory.available / memory.total / 2


def vllm_options(
    model: Model,
    name: str,
    context: int | None,
    temperature: float,
    *,
    at: str | None = None,
    beside: str | None = None,
) -> list[str]:
    """`at`, `beside`: where the server finds model and adapter, if not where they lie here."""
    config = model.settings()
    missing = vllm_config_overrides(config)
    served = f"{name}-base" if model.adapter else name
    line = ["--model", at or model.source, "--served-model-name", served]
    line += ["--max-model-len", str(context)] if context else []
    line += ["--generation-config", "vllm", "--override-generation-config", json.dumps({"temperature": temperature})]
    if (config.get("dtype") or config.get("torch_dtype")) == "float32":
        line += ["--dtype", "float32"]  # it would round to 16 bit, which may be what the merge stayed away from
    line += ["--hf-overrides", json.dumps(missing)] if missing else []
    if model.adapter:
        line += ["--enable-lora", "--max-lora-rank", str(adapter_room(model.adapter))]
        line += ["--lora-modules", f"{name}={beside or model.adapter}"]
    return line


def docker_line(launch: ServerCommand, model: Model, temperature: float) -> str:
    """vLLM in its own container, on the machine's GPUs."""
    folder = Path(model.source)
    mounts = {}
    at, (here, there) = _mounted(folder, "/model") if folder.is_dir() else (model.source, _mounted_cache())
    mounts[here] = there
    beside = None
    if model.adapter:
        beside, (here, there) = _mounted(model.adapter, "/adapter")
        mounts[here] = there
    line = ["docker", "run", "--rm", "--gpus", "all", "--ipc=host", "-p", f"{launch.port}:8000"]
    for here, there in mounts.items():
        line += ["-v", f"{here}:{there}"]
    told: dict[str, Any] = {"name": launch.model, "context": launch.context, "temperature": temperature}
    return shlex.join([*line, IMAGE, *vllm_options(model=model, **told, at=at, beside=beside)])


def _mounted(folder: Path, there: str) -> tuple[str, tuple[Path, str]]:
    """(where the container finds the folder, what is mounted where). The files of a folder in the Hub's cache are links
    into its neighbours, so the whole cache goes with it."""
    from minigrpo.delivery.hub.client import cache_of_hub

    folder, cache = folder.expanduser().absolute(), cache_of_hub()
    if folder.is_relative_to(cache):
        return f"{CONTAINER_CACHE}/{folder.relative_to(cache).as_posix()}", _mounted_cache()
    return there, (folder, there)


def _mounted_cache() -> tuple[Path, str]:
    from minigrpo.delivery.hub.client import cache_of_hub

    return cache_of_hub(), CONTAINER_CACHE


def adapter_room(adapter: Path) -> int:
    """Give the rank to make room for. Raises MinigrpoError for what vLLM cannot serve beside its base."""
    from minigrpo.models.adapter import read_adapter_config

    config = read_adapter_config(adapter)
    whole = f"Serve the merged model: leave --adapter out, after minigrpo merge {adapter}"
    for key, kind in {"use_dora": "is a DoRA adapter", "modules_to_save": "holds layers trained as a whole"}.items():
        if config.get(key):
            raise MinigrpoError(f"{adapter} {kind}, which vLLM cannot serve unmerged. {whole}")
    rank = max([int(config.get("r", 8)), *map(int, (config.get("rank_pattern") or {}).values())])
    room = vllm_max_lora_rank(rank)
    if room is None:
        raise MinigrpoError(f"{adapter} has rank {rank}; vLLM serves up to {VLLM_LORA_RANKS[-1]} unmerged. {whole}")
    return room


def find_vllm(named: Path | None) -> Path | None:
    """The python that holds vLLM: the one named, that of MINIGRPO_VLLM, or this one; None where it is not installed."""
    chosen = named or (Path(os.environ[VLLM_PYTHON]) if os.environ.get(VLLM_PYTHON) else None)
    if chosen is None:
        return Path(sys.executable) if find_spec("vllm") is not None else None
    python = Path(shutil.which(chosen.expanduser()) or chosen)
    asked = "import sys, importlib.util as u; sys.exit(u.find_spec('vllm') is None)"
    try:
        code = subprocess.run([python, "-c", asked], stdin=subprocess.DEVNULL, capture_output=True).returncode
    except OSError as fault:
        raise MinigrpoError(
            f"{chosen} cannot be run ({fault.strerror}). --vllm names the python of an environment, as in --vllm "
            "/opt/vllm/bin/python"
        ) from None
    if code:
        raise MinigrpoError(f"{chosen} has no vLLM. In its environment: {chosen} -m pip install vllm")
    return python


def fitting(asked: int | None, limit: int | None, what: str) -> int:
    """Tokens of context. Raises MinigrpoError for more than the model was made for."""
    if asked is None:
        return min(ROOM, limit or ROOM)
    if limit is not None and asked > limit:
        raise MinigrpoError(f"--context {asked} is more than the {limit} tokens that {what} was made for. Lower it.")
    return asked


# Ports


def reserve(host: str, port: int) -> int:
    """The port itself where it is free, and any free one for 0. Raises MinigrpoError where it cannot be had."""
    try:
        return _bound(host, port)
    except OSError as fault:
        taken = _owner(port)
        if taken is None and fault.errno not in IN_USE:
            raise MinigrpoError(
                f"Nothing can listen at {host} port {port}: {fault.strerror or fault}. For this machine alone: --host "
                f"{LOCAL}; ports below 1024 belong to the system."
            ) from None
    raise MinigrpoError(
        f"Port {port} of {host} is taken{f' by {taken}' if taken else ''}. A free one: --port {_bound(host, 0)}"
    )


def _bound(host: str, port: int) -> int:
    family = socket.getaddrinfo(host or LOCAL, port, type=socket.SOCK_STREAM)[0]
    with closing(socket.socket(family[0], socket.SOCK_STREAM)) as probe:
        if os.name != "nt":  # a port that was let go a moment ago is free; on Windows this would share a taken one
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(family[4])
        return int(probe.getsockname()[1])


def _owner(port: int) -> str | None:
    """Who listens there, where the system tells."""
    try:
        import psutil

        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr.port == port and found.pid:
                return f"process {found.pid} ({psutil.Process(found.pid).name()})"
    except Exception:  # whatever a system says in place of the answer, the port is taken all the same
        return None
    return None
