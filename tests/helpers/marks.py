"""What a test may need, as marks, and why it is skipped where that is missing. The hook in conftest.py asks here.

gpu             a CUDA GPU
network         the network
extra(NAME)     an optional extra of pyproject.toml
env(VARIABLE)   a variable that names real data, or the python of another environment: a row of VARIABLES
needs(NAME)     something of the system: a row of SYSTEM
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

NETWORK = "MINIGRPO_NETWORK"
VARIABLES = {
    "MINIGRPO_AXE": "axe.min.js of npm's axe-core, which looks for what shuts people out of a page",
    "MINIGRPO_COMPRESSOR": "the python of an environment that has llm-compressor",
    "MINIGRPO_GSM8K": "a folder with GSM8K's train.jsonl and test.jsonl",
    "MINIGRPO_REAL_MODEL": "a folder with a pretrained instruct model, such as Qwen2.5-0.5B-Instruct",
    "MINIGRPO_TRANSFORMERS4": "the python of an environment that has transformers 4.57",
    "MINIGRPO_VLLM": "the python of an environment that has vLLM",
}
MODULES = {"ipython": "IPython", "mlflow-skinny": "mlflow", "sqlalchemy": "sqlalchemy"}
"""Import names that do not follow from the name of the package."""


@dataclass(frozen=True)
class Need:
    is_met: Callable[[], bool]
    reason: str


def rest_is_long(values: Iterable[Any], *now: Any) -> list[Any]:
    """Return the values as parameters of a test: those of `now` run at once, the others in `make prove`.

    For claims that hold for each of many models alike, where one of each kind tells most.
    """
    every = list(values)
    assert set(now) <= set(every), f"{now} are not all among {every}"
    return [value if value in now else pytest.param(value, marks=pytest.mark.long) for value in every]


def has_gpu() -> bool:
    import torch  # here: a session without such a test need not wait for it

    return torch.cuda.is_available()


def has_bfloat16_blocks() -> bool:
    import torch

    from minigrpo.models.onednn import gains_by_blocks

    return gains_by_blocks(torch.bfloat16, "cpu")


def has_onednn() -> bool:
    import torch

    return bool(torch.backends.mkldnn.is_available())


def has_browser() -> bool:
    return shutil.which("chromium") is not None and find_spec("playwright") is not None


def can_pretend_gpu() -> bool:
    import torch

    built_without = torch.version.cuda is None and torch.version.hip is None
    return built_without and shutil.which("c++") is not None and hasattr(os, "fork")


def can_join_namespaces() -> bool:
    """Whether this user may make network namespaces: one is made, and removed again."""
    if not (shutil.which("ip") and shutil.which("unshare")):
        return False
    name = f"mgprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return made


def interpreter_for_all() -> str | None:
    """Return a Python that an ordinary user may start too, and our files with it. None where there is none, or no root.

    Virtual environments of root often lie where nobody else may look.
    """
    code = (
        "import os, sys; os.setgid(65534); os.setuid(65534)\n"
        "os.stat(sys.argv[1]); import dataclasses\n"
        "sys.exit(sys.version_info < (3, 11) or os.system(sys.executable + ' -c 1'))"
    )
    for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        if Path(path).exists():
            tried = subprocess.run([path, "-c", code, __file__], check=False, capture_output=True)
            if tried.returncode == 0:
                return path
    return None


SYSTEM = {
    "bfloat16": Need(has_bfloat16_blocks, "this processor has no products in bfloat16, or this torch no oneDNN"),
    "chromium": Need(
        has_browser, "no chromium on the PATH, or no playwright: apt-get install chromium; pip install playwright"
    ),
    "clear_refs": Need(
        Path("/proc/self/clear_refs").exists, "peaks of memory are reset in /proc/self/clear_refs: run it on Linux"
    ),
    "file_size_limit": Need(lambda: os.name != "nt", "Windows has no limit on the size of a file"),
    "linux": Need(lambda: sys.platform.startswith("linux"), "what is tested is Linux's own: run it there"),
    "llama-quantize": Need(
        lambda: shutil.which("llama-quantize") is not None, "no llama-quantize on the PATH: it comes with llama.cpp"
    ),
    "namespaces": Need(
        can_join_namespaces,
        "network namespaces are made by root, with iproute2 and util-linux: apt-get install iproute2",
    ),
    "onednn": Need(has_onednn, "this torch is built without oneDNN"),
    "pretended_gpu": Need(
        can_pretend_gpu,
        "a GPU is pretended with a C++ compiler (c++ on the PATH), a torch that is built without CUDA, and no Windows",
    ),
    "procfs": Need(
        Path("/proc/self").is_dir, "needs /proc, a folder in which even root can make no file: run it on Linux"
    ),
    "root": Need(
        lambda: hasattr(os, "getuid") and os.getuid() == 0, "only root can become another user: run it as root"
    ),
    "shared_python": Need(
        lambda: interpreter_for_all() is not None,
        "no Python here that an ordinary user may start, and this checkout with it: install python3, and keep the "
        "checkout where others may read it",
    ),
}


def extras_of(pyproject: Path) -> dict[str, tuple[str, ...]]:
    """Return the modules of each optional extra. Without `dev`, which whoever runs the tests has."""
    extras = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return {name: tuple(map(module_of, packages)) for name, packages in extras.items() if name != "dev"}


def module_of(requirement: str) -> str:
    """reasoning_gym for "reasoning-gym==0.1.25"."""
    package = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return MODULES.get(package.lower(), package.replace("-", "_"))


def reasons_to_skip(marks: Iterable[pytest.Mark], extras: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    for mark in marks:
        for need in needs_of(mark, extras):
            if not need.is_met():
                yield need.reason


def needs_of(mark: pytest.Mark, extras: Mapping[str, tuple[str, ...]]) -> list[Need]:
    """Return what a mark asks for, nothing for other marks. Raises UsageError where it names no known thing."""
    if mark.name == "gpu":
        return [Need(has_gpu, "torch finds no CUDA GPU: run it on a machine that has one, with -m gpu")]
    if mark.name == "network":
        return [Need(lambda: os.environ.get(NETWORK) == "1", f"reaches for the network: allow it with {NETWORK}=1")]
    if mark.name == "extra":
        return [extra_need(name, modules) for name, modules in named(mark, extras)]
    if mark.name == "env":
        return [variable_need(name, value) for name, value in named(mark, VARIABLES)]
    return [need for _, need in named(mark, SYSTEM)] if mark.name == "needs" else []


def named(mark: pytest.Mark, known: Mapping[str, T]) -> list[tuple[str, T]]:
    asked = ", ".join(map(repr, mark.args))
    if not mark.args or not known.keys() >= set(mark.args):
        raise pytest.UsageError(f"The mark {mark.name}({asked}) must name one of {', '.join(sorted(known))}.")
    return [(name, known[name]) for name in mark.args]


def extra_need(name: str, modules: tuple[str, ...]) -> Need:
    missing = [module for module in modules if find_spec(module) is None]
    return Need(lambda: not missing, f"{' and '.join(missing)} not installed: pip install 'minigrpo[{name}]'")


def variable_need(name: str, value: str) -> Need:
    return Need(lambda: bool(os.environ.get(name)), f"{name} is not set: let it name {value}")
