"""What a run sets for its whole process is given back at its end, however it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from minigrpo.utils.process import (
    ONEDNN_CACHES,
    bounded_onednn_caches,
    compute_repeatably,
    no_progress_bars,
    onednn_products,
    process_settings,
)

TASK = """

from minigrpo.types import Grade, Prompt, Task

def prompts(split):
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},), str(i)) for i in range(4)]

def grade(prompt, text):
    from __main__ import inside, state
    inside.append(state())
    if SEVERE:
        raise RuntimeError("no")
    share = sum(ord(c) % 2 == 0 for c in text) / max(1, len(text))
    return Grade(share, {"even": share}, formed=True, solved=share > 0.5)

task = Task("even", prompts, grade)
"""

RUN = """
import ctypes, json, os, resource, signal, sys
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging
import minigrpo
from minigrpo.models.attention import shared_prompt as attention
from minigrpo.rollouts.engines import decoder

libc = ctypes.CDLL(None)
linux = sys.platform.startswith("linux")
if linux:
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def keeps_freed_memory():
    "Not to be asked of another thread, which has a heap of its own."
    blocks = [libc.malloc(8 << 20) for _ in range(10)] if linux else []
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    held = resident() if linux else 0
    for block in blocks:
        libc.free(block)
    return linux and held - resident() < 10 << 20

def functions(*modules):
    return [id(value) for module in modules for value in vars(module).values() if callable(value)]

def gpu_arithmetic():
    matmul = torch.backends.cuda.matmul
    names = ["allow_fp16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction_split_k"]
    return [*(getattr(matmul, name, None) for name in names), torch.backends.cuda.cudnn_sdp_enabled()]

def state():
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "GPU": gpu_arithmetic(),
        "keeps": keeps_freed_memory(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signals": [repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "functions": functions(torch, torch.nn.functional, attention, decoder),
        "bars": [logging.is_progress_bar_enabled(), are_progress_bars_disabled()],
    }

recipe, run = minigrpo.load_recipe(sys.argv[1]), minigrpo.RunDir(sys.argv[2])
torch.set_num_threads(2)
torch.use_deterministic_algorithms(True, warn_only=True)
before, inside, fault = state(), [], ""
try:
    minigrpo.train(recipe, run)
except BaseException as raised:
    fault = type(raised).__name__
after = state()
during = inside[0] | {"keeps": before["keeps"]}
names = lambda other: [name for name in before if other[name] != before[name]]
print("\\n" + json.dumps({"inside": names(during), "after": names(after), "fault": fault}))
"""

SET = ["threads", "warns only", "fills", "GPU", "environment", "signals"]
"""What is otherwise inside a run, as the thread sees it that grades; signals wait there until the step is saved."""


@pytest.mark.parametrize(("severe", "fault"), [(False, ""), (True, "TaskError")])
def test_a_run_leaves_its_process_as_it_was(
    severe: bool, fault: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """In a process of its own: what earlier tests left in the heap would count."""
    task, recipe = tmp_path / "even.py", tmp_path / "recipe.json"
    task.write_text(TASK.replace("SEVERE", str(severe)))
    sections: dict[str, Any] = {
        "model": {"path": str(tiny_folder()), "device": "cpu"},
        "lora": {"rank": 2, "alpha": 4},
        "task": {"name": f"{task}:task"},
        "rollout": {"prompts": 2, "completions": 4, "max_tokens": 6},
        "train": {"steps": 1, "threads": 1, "tokens_per_pass": 512},
    }
    recipe.write_text(json.dumps(sections))
    command = [sys.executable, "-c", RUN, str(recipe), str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told == {"inside": SET, "after": [], "fault": fault}


def settings() -> tuple[int, bool, bool, bool]:
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("given", [(True, True), (False, False)])
def test_on_a_gpu_sums_stay_in_float32_and_attention_builds_no_plan_for_each_shape(given: tuple[bool, bool]) -> None:
    matmul = torch.backends.cuda.matmul
    with process_settings():  # gives back what this test changes
        matmul.allow_fp16_reduced_precision_reduction = (given[0], given[0])  # type: ignore[assignment]
        torch.backends.cuda.enable_cudnn_sdp(given[1])
        with process_settings():
            assert not matmul.allow_fp16_reduced_precision_reduction
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert matmul.allow_fp16_reduced_precision_reduction == given[0]
        assert matmul.allow_fp16_reduced_precision_reduction_split_k == given[0]
        assert torch.backends.cuda.cudnn_sdp_enabled() == given[1]


def test_after_an_inner_run_the_outer_one_has_its_own_settings_again() -> None:
    before = settings()
    with process_settings(threads=2):
        outer = settings()
        with process_settings(threads=1):
            compute_repeatably()
            assert settings() == (1, True, False, False)
        assert settings() == outer
        assert outer[0] == 2
    assert settings() == before


def test_what_is_set_in_the_middle_of_a_run_is_given_back_too() -> None:
    before = settings()

    @process_settings()
    def broken() -> None:
        torch.set_num_threads(before[0] + 1)
        compute_repeatably()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert settings() == before


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("hub_shown", [True, False])
def test_bars_are_shown_again_where_they_were(shown: bool, hub_shown: bool) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    with no_progress_bars():  # gives back what this test changes
        if shown:
            logging.enable_progress_bar()
        (enable_progress_bars if hub_shown else disable_progress_bars)()
        with no_progress_bars():
            assert not logging.is_progress_bar_enabled()
            assert are_progress_bars_disabled()
        assert logging.is_progress_bar_enabled() == shown
        assert are_progress_bars_disabled() == (not hub_shown)


PRODUCTS = """
import contextlib, json, sys
import torch
from minigrpo.utils.memory import resident_bytes
from minigrpo.utils.process import process_settings

torch.set_num_threads(1)
with process_settings() if sys.argv[1] == "bounded" else contextlib.nullcontext():
    weight = torch.randn(256, 256)
    weights = weight, weight.bfloat16()
    held = []
    for rows in range(1, 401):
        x = torch.randn(rows, 256)
        torch.ops.mkldnn._linear_pointwise(x, weights[0], None, "none", [], "")
        x.bfloat16() @ weights[1]
        if rows in (40, 400):
            held.append(resident_bytes())
print(held[1] - held[0])
"""


@pytest.mark.needs("linux")
@pytest.mark.needs("onednn")
def test_compiled_products_of_a_cpu_do_not_pile_up_during_a_run() -> None:
    grown = {}
    for kind in ("bounded", "unbounded"):
        done = subprocess.run([sys.executable, "-c", PRODUCTS, kind], capture_output=True, text=True, check=True)
        grown[kind] = int(done.stdout) / 1e6
    assert grown["unbounded"] > 50, "they pile up by themselves, or this test shows nothing"
    assert grown["bounded"] < grown["unbounded"] / 10, grown


def test_a_capacity_that_the_environment_sets_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = ONEDNN_CACHES
    monkeypatch.setenv(own, "7")
    monkeypatch.delenv(other, raising=False)
    with bounded_onednn_caches():
        assert (os.environ[own], os.environ[other], onednn_products()) == ("7", "32", 39)
    assert os.environ[own] == "7"
    assert other not in os.environ
