"""Small real things that the tests share: a fast tokenizer made in code, two-layer models of real architectures.

tokenizer                     byte-level, ChatML template, <|im_end|> as eos
make_tokenizer(template=None) the same with a fault
tiny_model(arch, **overrides) a model in float32, eval mode; the same every time
tiny_folder(arch)             that model and tokenizer saved as a model folder, made once
echo_task                     "say 3" is solved by "3"
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network should fail at once, not hang
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two-layer models: threads would only wait for one another
# Some virtual machines announce matrix instructions that they do not execute; 16-bit tests do not need them.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest

from minigrpo.types import Grade, Prompt, Task
from tests.helpers.marks import extras_of, reasons_to_skip
from tests.helpers.tiny import TEMPLATE, build_model, build_tokenizer


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from this session and what it starts: tests assume a CPU and float32, where a recipe says auto.

    Those that need a GPU have a session of their own: -m gpu.
    """
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(trylast=True)  # after -m and -k: what they leave out is not asked about
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine has not: the marks say what a test needs, and nothing else in tests/ decides."""
    extras = extras_of(config.rootpath / "pyproject.toml")
    for item in items:
        for reason in reasons_to_skip(item.iter_markers(), extras):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def leaves_threads_as_they_were() -> Iterator[None]:
    """Fail a test that leaves torch with other threads: those after it would wait for one another."""
    count = getattr(sys.modules.get("torch"), "get_num_threads", None)
    before = count() if count else 0
    yield
    if count and (after := count()) != before:
        sys.modules["torch"].set_num_threads(before)
        pytest.fail(f"the test leaves torch with {after} threads in place of {before}")


@pytest.fixture(scope="module", autouse=True)
def looks_for_garbage_among_new_objects_only() -> None:
    """Proofs collect garbage, to have a model's memory back at once. Here that would look through all of torch,
    transformers and pytest each time, for longer than the proof itself takes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def hears_ctrl_c() -> Iterator[None]:
    """Tests send SIGINT to what they start, which would inherit that it is ignored: so a script starts its background
    jobs. A program that is started inherits an ignored signal, but not a handler."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def template() -> str:
    return TEMPLATE


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    return build_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Read only: a test that changes files copies the folder first."""
    made: dict[str, Path] = {}

    def folder(arch: str = "qwen2") -> Path:
        if arch not in made:
            path = tmp_path_factory.mktemp("models") / arch
            build_model(arch).save_pretrained(path)
            build_tokenizer().save_pretrained(path)
            made[arch] = path
        return made[arch]

    return folder


@pytest.fixture(scope="session")
def echo_task() -> Task:
    """Twenty prompts to learn from, ten to be tested on; the answer must be a number, and the right one."""

    def prompts(split: str) -> list[Prompt]:
        start, count = (0, 20) if split == "train" else (20, 10)
        return [
            Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},), target=str(i))
            for i in range(start, start + count)
        ]

    def grade(prompt: Prompt, text: str) -> Grade:
        formed, solved = text.strip().isdigit(), text.strip() == prompt.target
        reward = 1.0 if solved else 0.1 if formed else 0.0
        return Grade(reward, {"right": float(solved), "form": float(formed)}, formed, solved)

    return Task("echo", prompts, grade, gold=lambda prompt: str(prompt.target), about="repeat a number")
