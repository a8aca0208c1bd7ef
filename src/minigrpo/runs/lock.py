"""Admit one process at a time to a run's folder: two would overwrite one another's logs and checkpoints.

The lock is the kernel's, on RUN/.lock, so it is free as soon as its holder dies, however it dies. The text in the file
(host, process, since when, command) is only for the message. Where a file system has no locks, the user is told so, and
the text decides: a live process of this host, or any process of another host, keeps others out.

Commands, and the functions of pipeline/, take the lock before they write into a run; the stages that they call do not.
The exception is an evaluation, which only adds a file of its own.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from rich.text import Text

from minigrpo.errors import ArtifactError
from minigrpo.runs.rundir import RunDir, staying, writing
from minigrpo.ui.screen import Screen
from minigrpo.utils.signals import is_alive

LOCKED_ERRNOS = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
"""Error numbers by which a kernel says that another process has the lock; any other means that there are no locks."""

_held: set[int] = set()


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that works in a run's folder."""

    host: str
    pid: int
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} ({self.command})"


@contextmanager
def run_lock(run: RunDir) -> Iterator[None]:
    """Hold the run's folder for this process alone. Make it where it is missing; remove it again if it stays empty.

    Raise ArtifactError where another process holds it, naming that process, where the folder cannot be written to, and
    where somebody moves or removes it meanwhile.
    """
    with writing(run.path):
        if run.path.exists() and not run.path.is_dir():
            raise ArtifactError(f"{run.path} is a file, so no run can be kept there. Name a folder: --run runs/NAME")
        made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
        handle = _acquire(run)
    try:
        with writing(run.lock):
            _write_holder(handle)
        with staying(run.path):
            yield
    finally:
        _release(run.lock, handle)
        with suppress(OSError):  # in use by now: it stays
            for folder in made:
                folder.rmdir()


def holder(run: RunDir) -> Holder | None:
    """Return the process that holds the run's folder, or held it last; None where that cannot be told."""
    try:
        return Holder(**json.loads(run.lock.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _acquire(run: RunDir) -> int:
    for _ in range(100):
        run.path.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(run.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # its last holder has just taken the empty folder away
        try:
            _claim(run, handle)
            if _is_file(run.lock, handle):
                _held.add(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder removed it between our opening it and our claim
    raise ArtifactError(f"{run.lock} comes and goes, so {run.path} cannot be held. Name another: --run runs/NAME")


def _claim(run: RunDir, handle: int) -> None:
    try:
        _lock(handle)
    except OSError as fault:
        if fault.errno in LOCKED_ERRNOS:
            raise _in_use(run) from None
        found = holder(run)
        if found and (found.host != socket.gethostname() or (found.pid != os.getpid() and is_alive(found.pid))):
            raise ArtifactError(f"{_in_use(run)} If that process is gone, remove {run.lock}.") from None
        warning = (
            f"The file system of {run.path} keeps no locks: begin no second process on this run from another machine."
        )
        Screen(stderr=True).show(Text(warning))


def _in_use(run: RunDir) -> ArtifactError:
    """Return the refusal, naming the holder, which writes its name after taking the lock: wait a moment for it."""
    for _ in range(20):
        found = holder(run)
        if found and (found.host != socket.gethostname() or is_alive(found.pid)):
            break
        time.sleep(0.02)
    return ArtifactError(
        f"{run.path} is in use: {found or 'another process'}. Wait for it or stop it; or begin another run: "
        "--run runs/NAME",
        entry="a-run-is-in-use",
    )


def _write_holder(handle: int) -> None:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    me = Holder(socket.gethostname(), os.getpid(), since, shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(asdict(me)).encode())


def _is_file(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _release(path: Path, handle: int) -> None:
    """Remove the file while the lock is still held, so that no other process's new file is removed."""
    if handle not in _held:
        return  # a forked child: the lock is its parent's
    _held.discard(handle)
    with suppress(OSError):  # Windows removes no open file: it stays, unlocked
        path.unlink()
    os.close(handle)


def _close_in_child() -> None:
    """Close the handles in a forked child, which must not keep the lock of a parent that was killed."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # far behind the text, which others must be able to read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    os.register_at_fork(after_in_child=_close_in_child)
