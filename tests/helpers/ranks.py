"""Ranks of a test: processes forked from this one, connected by gloo on this machine alone, each with a deadline."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from minigrpo.distributed.ranks import Ranks
from minigrpo.distributed.torch_wire import TorchWire

DEADLINE_S = 120
"""Seconds after which ranks that have not ended fail the test. Alone they take less than one."""


def on_ranks(size: int, folder: Path, work: Callable[[Ranks], Any]) -> list[Any]:
    """Call `work` on so many ranks at once; return what each returned, in their order. One that fails fails the test.

    The processes are forked: they begin with all that this one has loaded.
    """
    fork = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    processes = [fork.Process(target=_be_rank, args=(rank, size, folder, work)) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + DEADLINE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    codes = [process.exitcode for process in processes]
    assert not hung, f"ranks {hung} have not ended after {DEADLINE_S} s"
    assert not any(codes), f"exit codes {codes}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _be_rank(rank: int, size: int, folder: Path, work: Callable[[Ranks], Any]) -> NoReturn:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform.startswith("linux") else "lo0"
    try:
        store = dist.FileStore(str(folder / "store"), size)
        wire = TorchWire(store, rank, size, seconds=DEADLINE_S, on_failure=_fail)
        torch.save(work(Ranks(rank, size, wire)), folder / f"{rank}.pt")
        wire.close()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # what the parent would do at its end (pytest's, too) is the parent's


def _fail(why: str) -> NoReturn:
    raise AssertionError(why)
