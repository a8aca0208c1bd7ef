"""Settings that a run makes for its whole process: CPU threads, repeatable arithmetic, a GPU's sums and attention, what
the heap keeps.

Each is restored when the run ends, because the process of a notebook or a test suite lives on. All are restored
exactly, except the heap's rules (see utils/memory.py) and the size of oneDNN's caches. One is not restored: the name
under which transformers finds attention/shared_prompt.py, since policies that still exist use it. Runs of one process
may follow or enclose one another, but must not overlap in two threads: they would restore each other's settings.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from minigrpo.utils.memory import keep_freed_memory
from minigrpo.utils.spinning import spin_while_free


@contextmanager
def process_settings(threads: int = 0) -> Iterator[None]:
    """Set what a run needs, and restore the former settings after the block.

    `threads`: CPU threads; 0 leaves them as they are.
    """
    threads_before = torch.get_num_threads()
    repeatable = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with keep_freed_memory(), bounded_onednn_caches(), gpu_arithmetic(), spin_while_free():
        try:
            if threads:
                torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(threads_before)
            torch.use_deterministic_algorithms(repeatable, warn_only=warns)
            torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


@contextmanager
def gpu_arithmetic() -> Iterator[None]:
    """Keep two shortcuts of torch on a GPU off, until the block ends.

    Partial sums of a float16 product are added in float32: in float16 they overflow beyond 65,504, and a T4 has no
    other 16 bit. Attention is not cuDNN's, which builds a plan for every new shape: in training nearly every pass has
    a shape of its own. Torch takes another fused kernel.
    """
    matmul, cuda = torch.backends.cuda.matmul, torch.backends.cuda
    reduced, attends = matmul.allow_fp16_reduced_precision_reduction, cuda.cudnn_sdp_enabled()
    split_k = getattr(matmul, "allow_fp16_reduced_precision_reduction_split_k", None)  # older versions of torch lack it
    matmul.allow_fp16_reduced_precision_reduction = False if split_k is None else (False, split_k)
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = reduced if split_k is None else (reduced, split_k)
        cuda.enable_cudnn_sdp(attends)


ONEDNN_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables that set the capacity of oneDNN's cache of compiled products, and of that of its bindings."""
ONEDNN_PRODUCTS = 32
"""Products that each cache keeps. A decoder computes some twenty of different shapes for one number of rows."""


@contextmanager
def bounded_onednn_caches() -> Iterator[None]:
    """Let oneDNN keep few compiled products of a CPU: by default 1024 in each of two caches, a third of a megabyte
    each.

    A product is compiled for its number of rows, and in training nearly every batch has another: memory would grow over
    hundreds of steps. A capacity that the environment sets already is kept. The libraries read it once, at their first
    product: where that came before this block, it has no effect, and where it comes inside, it holds for the process.
    """
    with variables_where_unset(dict.fromkeys(ONEDNN_CACHES, str(ONEDNN_PRODUCTS))):
        yield


@contextmanager
def variables_where_unset(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment that are not set yet, until the block ends."""
    added = {name: text for name, text in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def onednn_products() -> int:
    """Return how many compiled products the two caches may keep together, unless they were read before a run began."""
    given = (os.environ.get(name, "") for name in ONEDNN_CACHES)
    return sum(int(text) if text.isdigit() else ONEDNN_PRODUCTS for text in given)


def compute_repeatably() -> None:
    """Make two runs give the same bits, until the enclosing `process_settings` ends."""
    torch.use_deterministic_algorithms(True)
    # It would fill every new tensor with NaN, to show reads of unwritten memory: seven thousand times a rollout.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers and of the Hub's client: a bar for reading local files says nothing."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    shown, hub_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            with warnings.catch_warnings():  # the client remarks that its environment may forbid its own
                warnings.simplefilter("ignore", UserWarning)
                logging.enable_progress_bar()
        (enable_progress_bars if hub_shown else disable_progress_bars)()
