"""Keeps one server, and ends it when whoever asked for it is gone: no server is ever left behind.

    python -P serve/supervisor.py watch PROGRAM ...     runs a program; its end is our end, with its code
    python -P serve/supervisor.py llama JSON            llama.cpp's server, as xllamacpp brings it

The leash is stdin: nobody writes to it, and it closes when the other side lets go or dies, however it dies. Then the
program is asked to end (SIGINT, then SIGTERM), and what is left of its group is killed. Ctrl-C in a terminal reaches a
whole group of processes: that is why we lead one of our own. Started by path, so it imports nothing of the package.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PATIENCE = 10.0
"""Seconds for a program to end by itself after each signal."""
F32 = 0
"""ggml's number of float32."""
SMALL = 1 << 26
"""Bytes of a file whose layers are so small that threads would only wait for one another."""
DIES_WITH_PARENT = 1
"""Linux: PR_SET_PDEATHSIG of prctl."""


def watch(program: list[str]) -> int:
    child = subprocess.Popen(program, stdin=subprocess.DEVNULL, preexec_fn=_tied())
    ending = threading.Event()

    def end(*_: object) -> None:
        if not ending.is_set():
            ending.set()
            threading.Thread(target=_ask_to_end, args=(child,), daemon=True).start()

    def follow() -> None:
        while os.read(0, 4096):  # not through Python's stdin, whose lock an exit would wait for
            pass
        end()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=follow, daemon=True).start()
    code = child.wait()
    if ending.is_set() and os.name != "nt":
        os.killpg(os.getpgrp(), signal.SIGKILL)  # what the program started and left, and ourselves
    return 128 - code if code < 0 else code


def _tied() -> Callable[[], None] | None:
    """For the child to run on its way: it dies with us even where nothing lets us say goodbye."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(DIES_WITH_PARENT, signal.SIGKILL)


def _ask_to_end(child: subprocess.Popen[bytes]) -> None:
    """Ask, ask again, and do not ask."""
    ways = (child.terminate,) if os.name == "nt" else (lambda: child.send_signal(signal.SIGINT), child.terminate)
    for way in ways:
        with suppress(OSError):
            way()
        with suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)
            return
    child.kill()


def llama(options: dict[str, Any]) -> int:
    """Serves until it is killed. Clients get what the model says: nothing is cut off or reshaped by default."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options["file"]
    params.model_alias = {options["model"]}
    params.hostnames = [options["host"]]
    params.port = options["port"]
    params.n_ctx = options["context"]
    params.ctx_shift = False
    if options["exact"]:
        params.cache_type_k = params.cache_type_v = F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if Path(options["file"]).stat().st_size < SMALL:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # Weights packed anew for matrix instructions, which some virtual machines only announce.
    params.no_extra_bufts = True
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    params.sampling.temp = options["temperature"]
    params.sampling.top_k, params.sampling.top_p, params.sampling.min_p = 0, 1.0, 0.0
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        return 1  # the log says why
    print(f"listening on {server.listening_address}", flush=True)
    threading.Event().wait()
    return 0


def main(arguments: list[str]) -> int:
    do, *rest = arguments
    return llama(json.loads(rest[0])) if do == "llama" else watch(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
