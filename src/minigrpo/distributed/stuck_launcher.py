"""End torch's launcher where it hangs.

On a host that was cut off the launcher waits for its store's answer until TCP gives up, a quarter of an hour, and does
not see that its rank has ended. A rank that ends because that store is silent leaves a process behind, which looks
after two of the store's own time-outs (60 s each, torch 2.13) whether the launcher has taken notice, and ends it if it
has not. A launcher that goes on, or begins again, takes the ended rank from the list of processes, and is left alone.

    python -m minigrpo.distributed.stuck_launcher RANK_PID LAUNCHER_PID SECONDS
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from minigrpo.errors import RankLostError, more_at

LAUNCHER_WAIT_S = 120.0
LOOK_S = 0.5


def leave_guard(wait: float = LAUNCHER_WAIT_S) -> None:
    """Start the process that looks after this one's launcher, where torch's launcher started this one on Linux."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not Path("/proc/self/stat").exists():
        return
    words = ["-m", "minigrpo.distributed.stuck_launcher", str(os.getpid()), str(os.getppid()), str(wait)]
    with suppress(OSError):
        subprocess.Popen([sys.executable, *words], stdin=subprocess.DEVNULL, start_new_session=True)


def is_unnoticed(rank: int, launcher: int) -> bool:
    """Tell whether the rank's process has ended, and the launcher that started it has not asked how."""
    try:
        state, parent = Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    return state == "Z" and int(parent) == launcher


def end_if_stuck(rank: int, launcher: int, wait: float) -> bool:
    """Wait, and end the launcher if it has not taken notice of the rank's end all the while; tell whether it was."""
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        time.sleep(LOOK_S)
        if not Path(f"/proc/{rank}").exists():  # the launcher knows
            return False
    if not is_unnoticed(rank, launcher):
        return False
    sentence = (
        f"torch's launcher (process {launcher}) has waited {wait:.0f} s for the host that started the job and was ended"
    )
    print(f"error: {sentence}.\n{more_at(RankLostError.entry)}", file=sys.stderr, flush=True)
    with suppress(ProcessLookupError, PermissionError):
        os.kill(launcher, signal.SIGKILL)
    return True


if __name__ == "__main__":
    end_if_stuck(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
