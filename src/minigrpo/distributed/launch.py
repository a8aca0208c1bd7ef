"""Start the ranks of a run on this machine with torch's own launcher, and start them again where one was lost.

The launcher's own restarts would also repeat what a restart cannot mend, a misspelled knob or Ctrl-C, so each attempt
is a launch of its own; what its processes ended with decides about the next.
"""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence

from minigrpo.errors import RankLostError
from minigrpo.utils.cpu import usable_cores
from minigrpo.utils.process import variables_where_unset

FINAL_CODES = (2, 130)
"""Exit codes of a rank after which no attempt follows: an error that the user can mend, and Ctrl-C."""
STOP_S = 600
"""Seconds that ranks have after Ctrl-C to finish their step and save it. A lost rank never takes them: the others end
by themselves (distributed/watch.py)."""


def launch_ranks(
    arguments: Callable[[int], Sequence[str]], ranks: int, restarts: int, say: Callable[[str], None]
) -> int:
    """Run `minigrpo` on so many ranks, again where one is lost, and return the exit code.

    `arguments`: of the command line, for attempt number 0, 1 ...
    """
    for attempt in range(restarts + 1):
        code, what = _attempt(arguments(attempt), ranks)
        if code in (0, *FINAL_CODES) or attempt == restarts:
            if code not in (0, *FINAL_CODES):
                say(f"{what} No attempt is left (--max-restarts {restarts}).")
            return code
        say(f"{what} All ranks begin again at the newest checkpoint: restart {attempt + 1} of {restarts}.")
    raise AssertionError("the last attempt returns")


def _attempt(arguments: Sequence[str], ranks: int) -> tuple[int, str]:
    """Return the exit code of one launch, and a sentence on what ended it."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the sentences are ours
    with variables_where_unset(_variables(ranks)), tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "minigrpo", *arguments)
        except ChildFailedError as fault:
            return _code_of({rank: failure.exitcode for rank, failure in fault.failures.items()})
        except SignalException as stop:
            return 128 + int(stop.sigval), "Stopped."
    return 0, ""


def _code_of(codes: Mapping[int, int]) -> tuple[int, str]:
    for code in FINAL_CODES:
        if code in codes.values():
            return code, ""
    rank, code = min(codes.items(), key=lambda pair: (pair[1] == RankLostError.exit_code, pair[0]))
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return (RankLostError.exit_code if code < 0 else code), f"Rank {rank} {how}."


def _variables(ranks: int) -> dict[str, str]:
    """Return what the ranks of one machine need in their environment, besides what torch's launcher puts there."""
    cores = usable_cores()
    return {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        # gloo would look the machine's own name up, which not every network knows.
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform.startswith("linux") else "lo0",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_S),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # torch's store warns of every lost connection with the frames of its stack
    }
