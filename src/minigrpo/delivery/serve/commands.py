"""Command lines of model servers: llama.cpp's, from xllamacpp or as a program, and vLLM's, here or in a container.

Sampling options that a client leaves out are neutral: the temperature of training, and no truncation (llama.cpp would
keep 40 tokens, and vLLM follow generation_config.json, which in many models penalizes repetition). So a served model
samples as the policy did during training.
"""

from __future__ import annotations

import errno
import json
import os
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
from minigrpo.delivery.serve.access import OPEN, Access
from minigrpo.errors import MinigrpoError, command_line, install_hint
from minigrpo.models.vllm_compat import VLLM_LORA_RANKS, vllm_config_overrides, vllm_max_lora_rank
from minigrpo.utils.paths import user_path

EngineName = Literal["llama.cpp", "vllm"]
LOCALHOST = "127.0.0.1"
ALL_INTERFACES = ("0.0.0.0", "::", "")
DEFAULT_CONTEXT = 4096
"""Context length in tokens if none is requested: for a long context the KV cache alone can be larger than the model."""
VLLM_IMAGE = "vllm/vllm-openai:latest"
PORT_IN_USE = (errno.EADDRINUSE, 10048)  # the second is Windows' code
VLLM_PYTHON = "MINIGRPO_VLLM"
"""Environment variable that names the python of an environment with vLLM."""
GGUF_ON_HUB_HINT = (
    "Of a GGUF repository: hf download OWNER/NAME FILE.gguf --local-dir . and then minigrpo serve FILE.gguf"
)
CONTAINER_CACHE = "/root/.cache/huggingface/hub"


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """A command that starts a server. `model`: the name that clients use. `what`: the artefact, as the user knows
    it."""

    engine: EngineName
    program: tuple[str, ...]
    host: str
    port: int
    model: str
    what: str
    context: int | None
    access: Access = OPEN

    @property
    def url(self) -> str:
        """Return the address for clients on this machine."""
        host = LOCALHOST if self.host in ALL_INTERFACES else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass(frozen=True, slots=True)
class VllmModel:
    """What vLLM serves: a folder or a Hub id, and an adapter that stays unmerged.

    `config`: config.json of a Hub id, where it was read already.
    """

    source: str
    adapter: Path | None = None
    config: Mapping[str, Any] | None = None

    def settings(self) -> Mapping[str, Any]:
        """Return config.json. Raises MinigrpoError where a Hub id has none that can be read."""
        from minigrpo.delivery.hub.client import read_hub_json
        from minigrpo.runs.rundir import read_json

        folder = Path(self.source)
        if folder.is_dir():
            return dict(read_json(folder / "config.json"))
        found = read_hub_json(self.source, "config.json") if self.config is None else self.config
        if found is None:
            raise MinigrpoError(
                f"{self.source} holds no config.json, so it is no model that vLLM serves. {GGUF_ON_HUB_HINT}"
            )
        return found


def process_guard_file() -> Path:
    """Return the path of the script that supervises a server process."""
    return Path(__file__).with_name("process_guard.py")


def llama_server_file() -> Path:
    """Return the path of the script that serves with xllamacpp."""
    return Path(__file__).with_name("llama_server.py")


def llama_command(
    head: GgufHeader,
    *,
    host: str,
    port: int,
    context: int | None = None,
    exact: bool = False,
    temperature: float = 1.0,
    name: str | None = None,
    tools: Path | None = None,
    parallel: int | None = None,
    access: Access = OPEN,
) -> ServerCommand:
    """Return the command of llama.cpp's server. `tools`: a folder with llama.cpp's programs; without it xllamacpp
    serves, or a program on the PATH.

    `parallel`: requests at a time, each with the whole context. `access`: who may ask. `exact`: keys and values in
    float32 and no flash attention: slower, but exact to the last digits.
    """
    context = fit_context(context, head.context, str(head.file))
    model = name or head.file.stem
    program = find_llama_server(tools)
    if program is not None:
        line = [str(program), "--model", str(head.file), "--alias", model, "--host", host, "--port", str(port)]
        # llama.cpp divides the context among its slots.
        line += [
            "--ctx-size",
            str(context * (parallel or 1)),
            "--jinja",
            "--reasoning-format",
            "none",
            "--no-context-shift",
        ]
        line += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"] if exact else []
        line += ["--temp", f"{temperature:g}", "--top-k", "0", "--top-p", "1.0", "--min-p", "0.0"]
        line += ["--parallel", str(parallel)] if parallel else []
    else:
        options = {"file": str(head.file), "model": model, "host": host, "port": port, "context": context}
        options |= {"exact": exact, "temperature": temperature}
        options |= {"parallel": parallel} if parallel else {}
        options |= {"cors": access.cors} if access.cors else {}
        line = [sys.executable, "-P", str(llama_server_file()), json.dumps(options)]
    return ServerCommand("llama.cpp", tuple(line), host, port, model, str(head.file), context, access)


def find_llama_server(tools: Path | None) -> Path | None:
    """Find the llama-server program; None where xllamacpp serves. Raises MinigrpoError where neither is installed."""
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


def vllm_command(
    model: VllmModel,
    *,
    python: Path,
    host: str,
    port: int,
    name: str,
    context: int | None = None,
    temperature: float = 1.0,
    all_logprobs: bool = False,
    parallel: int | None = None,
    access: Access = OPEN,
) -> ServerCommand:
    """Return the command of vLLM's server. `python`: of the environment that holds vLLM. `all_logprobs`: let clients
    request the log-probability of every token. `parallel`: requests at a time, at most."""
    config = model.settings()
    limit = config.get("text_config", config).get("max_position_embeddings")
    context = fit_context(context, limit, model.source) if context or limit else None
    line = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    line += [
        "--host",
        host,
        "--port",
        str(port),
        *vllm_options(model=model, name=name, context=context, temperature=temperature),
    ]
    share = memory_fraction()
    line += ["--gpu-memory-utilization", f"{share:.2f}"] if share else []
    line += ["--max-logprobs", "-1"] if all_logprobs else []
    line += access_options(access, parallel)
    return ServerCommand("vllm", tuple(line), host, port, name, str(model.adapter or model.source), context, access)


def access_options(access: Access, parallel: int | None) -> list[str]:
    """Return vLLM's options for who may ask it, and how many at a time. Without the first every web page could read
    its answers; the key is left to the environment."""
    line = ["--allowed-origins", json.dumps([access.cors] if access.cors else [])]
    return [*line, *(["--max-num-seqs", str(parallel)] if parallel else [])]


def memory_fraction() -> float | None:
    """Return half of the share of memory that is free, for a machine without a GPU; else None. By default vLLM takes
    nearly all memory, whatever else runs there."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return None
    memory = psutil.virtual_memory()
    return memory.available / memory.total / 2


def vllm_options(
    model: VllmModel,
    name: str,
    context: int | None,
    temperature: float,
    *,
    model_path: str | None = None,
    adapter_path: str | None = None,
) -> list[str]:
    """Return vLLM's options. `model_path`, `adapter_path`: where the server finds them, if not at their paths here."""
    config = model.settings()
    missing = vllm_config_overrides(config)
    served = f"{name}-base" if model.adapter else name
    line = ["--model", model_path or model.source, "--served-model-name", served]
    line += ["--max-model-len", str(context)] if context else []
    line += ["--generation-config", "vllm", "--override-generation-config", json.dumps({"temperature": temperature})]
    if (config.get("dtype") or config.get("torch_dtype")) == "float32":
        line += ["--dtype", "float32"]  # by default vLLM would round to 16 bit, which may lose what was learned
    line += ["--hf-overrides", json.dumps(missing)] if missing else []
    if model.adapter:
        line += ["--enable-lora", "--max-lora-rank", str(adapter_max_rank(model.adapter))]
        line += ["--lora-modules", f"{name}={adapter_path or model.adapter}"]
    return line


def docker_command(command: ServerCommand, model: VllmModel, temperature: float, parallel: int | None = None) -> str:
    """Return the command that runs vLLM in its own container, on the machine's GPUs."""
    folder = Path(model.source)
    mounts = {}
    model_path, (here, there) = _mount(folder, "/model") if folder.is_dir() else (model.source, _mount_cache())
    mounts[here] = there
    adapter_path = None
    if model.adapter:
        adapter_path, (here, there) = _mount(model.adapter, "/adapter")
        mounts[here] = there
    line = ["docker", "run", "--rm", "--gpus", "all", "--ipc=host", "-p", f"{command.port}:8000"]
    for here, there in mounts.items():
        line += ["-v", f"{here}:{there}"]
    line += ["-e", "VLLM_API_KEY"] if command.access.key else []  # docker takes its value from the environment
    options: dict[str, Any] = {"name": command.model, "context": command.context, "temperature": temperature}
    served = vllm_options(model=model, **options, model_path=model_path, adapter_path=adapter_path)
    return command_line(*line, VLLM_IMAGE, *served, *access_options(command.access, parallel))


def _mount(folder: Path, there: str) -> tuple[str, tuple[Path, str]]:
    """Return (the folder's path in the container, (host folder, container folder) of the mount). Files of a folder
    in the Hub's cache are links to its neighbours, so the whole cache is mounted."""
    from minigrpo.delivery.hub.client import hub_cache

    folder, cache = user_path(folder).absolute(), hub_cache()
    if folder.is_relative_to(cache):
        return f"{CONTAINER_CACHE}/{folder.relative_to(cache).as_posix()}", _mount_cache()
    return there, (folder, there)


def _mount_cache() -> tuple[Path, str]:
    from minigrpo.delivery.hub.client import hub_cache

    return hub_cache(), CONTAINER_CACHE


def adapter_max_rank(adapter: Path) -> int:
    """Return the rank to reserve memory for. Raises MinigrpoError for an adapter that vLLM cannot serve unmerged."""
    from minigrpo.models.adapter import read_adapter_config

    config = read_adapter_config(adapter)
    merge = command_line("minigrpo", "merge", adapter)
    whole = f"Serve the merged model: leave --adapter out, after {merge}"
    for key, kind in {"use_dora": "is a DoRA adapter", "modules_to_save": "holds layers trained as a whole"}.items():
        if config.get(key):
            raise MinigrpoError(f"{adapter} {kind}, which vLLM cannot serve unmerged. {whole}")
    rank = max([int(config.get("r", 8)), *map(int, (config.get("rank_pattern") or {}).values())])
    room = vllm_max_lora_rank(rank)
    if room is None:
        raise MinigrpoError(f"{adapter} has rank {rank}; vLLM serves up to {VLLM_LORA_RANKS[-1]} unmerged. {whole}")
    return room


def find_vllm(named: Path | None) -> Path | None:
    """Find the python that holds vLLM: the one named, that of MINIGRPO_VLLM, or this one; None where vLLM is not
    installed. Raises MinigrpoError where the one named cannot run it."""
    chosen = named or (Path(os.environ[VLLM_PYTHON]) if os.environ.get(VLLM_PYTHON) else None)
    if chosen is None:
        return Path(sys.executable) if find_spec("vllm") is not None else None
    python = Path(shutil.which(user_path(chosen)) or chosen)
    probe = "import sys, importlib.util as u; sys.exit(u.find_spec('vllm') is None)"
    try:
        code = subprocess.run([python, "-c", probe], stdin=subprocess.DEVNULL, capture_output=True).returncode
    except OSError as fault:
        raise MinigrpoError(
            f"{chosen} cannot be run ({fault.strerror}). --vllm names the python of an environment, as in --vllm "
            "/opt/vllm/bin/python"
        ) from None
    if code:
        install = command_line(chosen, "-m", "pip", "install", "vllm")
        raise MinigrpoError(f"{chosen} has no vLLM. In its environment: {install}")
    return python


def fit_context(asked: int | None, limit: int | None, what: str) -> int:
    """Return the context length in tokens. Raises MinigrpoError for more than the model was made for."""
    if asked is None:
        return min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if limit is not None and asked > limit:
        raise MinigrpoError(f"--context {asked} is more than the {limit} tokens that {what} was made for. Lower it.")
    return asked


# Ports


def reserve_port(host: str, port: int) -> int:
    """Return the port if it is free, and any free one for 0. Raises MinigrpoError where it cannot be bound."""
    try:
        return _bind(host, port)
    except OSError as fault:
        taken = _port_owner(port)
        if taken is None and fault.errno not in PORT_IN_USE:
            raise MinigrpoError(
                f"Nothing can listen at {host} port {port}: {fault.strerror or fault}. For this machine alone: --host "
                f"{LOCALHOST}; ports below 1024 belong to the system."
            ) from None
    raise MinigrpoError(
        f"Port {port} of {host} is taken{f' by {taken}' if taken else ''}. A free one: --port {_bind(host, 0)}"
    )


def _bind(host: str, port: int) -> int:
    family = socket.getaddrinfo(host or LOCALHOST, port, type=socket.SOCK_STREAM)[0]
    with closing(socket.socket(family[0], socket.SOCK_STREAM)) as probe:
        if os.name != "nt":  # a port released a moment ago is free; on Windows this would share a taken one
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(family[4])
        return int(probe.getsockname()[1])


def _port_owner(port: int) -> str | None:
    """Describe the process that listens on the port, where the system tells."""
    try:
        import psutil

        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr.port == port and found.pid:
                return f"process {found.pid} ({psutil.Process(found.pid).name()})"
    except Exception:  # the owner is extra information: the port is taken either way
        return None
    return None
