"""What a run sets for its whole process: CPU threads, repeatable arithmetic, what the heap keeps.

Each is given back when the run ends, for a notebook and a test suite live on. All of it is given back exactly but the
heap's rules, of which utils/memory.py tells. Never taken back: the name under which transformers finds
attention/shared_prompt.py, since policies that are still held go on using it. Runs of one process follow or enclose one
another: two at the same time, in two threads, would give back each other's settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minigrpo.utils.memory import keep_freed_memory


@contextmanager
def process_settings(threads: int = 0) -> Iterator[None]:
    """Sets what a run needs; gives back what was set before the block, whatever was set inside.

    `threads`: of the CPU; 0 leaves them as they are.
    """
    threads_before = torch.get_num_threads()
    repeatable = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with keep_freed_memory():
        try:
            if threads:
                torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(threads_before)
            torch.use_deterministic_algorithms(repeatable, warn_only=warns)
            torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def compute_repeatably() -> None:
    """Makes two runs give the same bits, until the enclosing `process_settings` ends."""
    torch.use_deterministic_algorithms(True)
    # It would fill every new tensor with NaN, to show who reads what was never written: seven thousand times a rollout.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hides the bars of transformers and of the Hub's client: one for reading local files says nothing."""
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
