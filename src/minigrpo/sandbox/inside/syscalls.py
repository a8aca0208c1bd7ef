"""The system calls that a locked process may make, and the filter by which the kernel enforces them.

There are three answers: allowed; refused with EPERM, for calls that CPython itself makes in honest programs (it opens
the source file when it reports a syntax error); any other call ends the process at once with SIGSYS. Numbers are those
of the kernel's own tables for x86_64 and for aarch64; other machines have no filter here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

CHANNEL = 3
"""The only descriptor of a locked process: its end of the channel."""

ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000
X32_BIT = 0x40000000
PROT_EXEC, MAP_ANONYMOUS = 4, 0x20
FUTEX_COMMAND, FUTEX_WAKE, FUTEX_WAKE_BITSET = 0x7F, 1, 10


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture's system calls by name; `audit`: the kernel's number of the architecture."""

    audit: int
    numbers: dict[str, int]


def _table(text: str) -> dict[str, int]:
    return {name: int(number) for name, _, number in (word.partition("=") for word in text.split())}


X86_64 = Architecture(
    0xC000003E,
    _table("""
    read=0 write=1 open=2 close=3 stat=4 fstat=5 lstat=6 poll=7 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12
    rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 ioctl=16 access=21 pipe=22 select=23 sched_yield=24 mremap=25
    madvise=28 shmget=29 dup=32 nanosleep=35 setitimer=38 getpid=39 socket=41 connect=42 sendto=44 sendmsg=46 clone=56
    fork=57 vfork=58 execve=59 exit=60 kill=62 uname=63 semget=64 msgget=68 fcntl=72 getdents=78 getcwd=79 chdir=80
    rename=82 mkdir=83 unlink=87 symlink=88 readlink=89 chmod=90 gettimeofday=96 getrlimit=97 getrusage=98 sysinfo=99
    times=100 ptrace=101 getuid=102 getgid=104 setuid=105 geteuid=107 getegid=108 getppid=110 personality=135
    statfs=137 mount=165 chroot=161 prctl=157 setrlimit=160 gettid=186 tkill=200 time=201 futex=202
    sched_getaffinity=204 getdents64=217 timer_create=222 clock_gettime=228 clock_getres=229 clock_nanosleep=230
    restart_syscall=219 exit_group=231 tgkill=234 add_key=248 openat=257 newfstatat=262 readlinkat=267 faccessat=269
    unshare=272 perf_event_open=298 prlimit64=302 process_vm_readv=310 process_vm_writev=311 seccomp=317 getrandom=318
    memfd_create=319 bpf=321 execveat=322 userfaultfd=323 membarrier=324 statx=332 rseq=334 pidfd_send_signal=424
    io_uring_setup=425 open_tree=428 pidfd_open=434 clone3=435 openat2=437 pidfd_getfd=438 faccessat2=439
"""),
)
AARCH64 = Architecture(
    0xC00000B7,
    _table("""
    getcwd=17 dup=23 fcntl=25 ioctl=29 statfs=43 faccessat=48 chdir=49 chroot=51 openat=56 close=57 pipe2=59
    getdents64=61 lseek=62 read=63 write=64 readlinkat=78 newfstatat=79 fstat=80 exit=93 exit_group=94 futex=98
    mount=40 nanosleep=101 setitimer=103 timer_create=107 clock_gettime=113 clock_getres=114 clock_nanosleep=115
    ptrace=117 sched_getaffinity=123 sched_yield=124 restart_syscall=128 kill=129 tkill=130 tgkill=131
    rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 setuid=146 times=153 uname=160 getrlimit=163 setrlimit=164
    getrusage=165 prctl=167 gettimeofday=169 getpid=172 getppid=173 getuid=174 geteuid=175 getgid=176 getegid=177
    gettid=178 sysinfo=179 msgget=186 semget=190 shmget=194 socket=198 connect=203 sendto=206 sendmsg=211 brk=214
    munmap=215 mremap=216 add_key=217 clone=220 execve=221 mmap=222 mprotect=226 madvise=233 perf_event_open=241
    prlimit64=261 process_vm_readv=270 process_vm_writev=271 seccomp=277 getrandom=278 memfd_create=279 bpf=280
    execveat=281 userfaultfd=282 membarrier=283 statx=291 rseq=293 personality=92 unshare=97 pidfd_send_signal=424
    io_uring_setup=425 open_tree=428 pidfd_open=434 clone3=435 openat2=437 pidfd_getfd=438 faccessat2=439
    unlinkat=35 mkdirat=34
"""),
)
ARCHITECTURES = {"x86_64": X86_64, "aarch64": AARCH64, "arm64": AARCH64}

ALLOWED = (
    "brk munmap mremap madvise clock_gettime gettimeofday time clock_getres sched_yield rt_sigreturn restart_syscall "
    "exit exit_group getrusage times rseq"
)
REFUSED = (
    "open openat openat2 stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getcwd "
    "lseek ioctl fcntl close dup getdents getdents64 statfs getrandom uname sysinfo getrlimit sched_getaffinity prctl "
    "getpid getppid gettid getuid geteuid getgid getegid nanosleep clock_nanosleep poll select membarrier"
)

Instruction = tuple[int, int, int, int]
LOAD, EQUAL, BITS, AT_LEAST, AND, RETURN = 0x20, 0x15, 0x45, 0x35, 0x54, 0x06
NUMBER_AT, ARCH_AT = 0, 4


def _argument(index: int) -> int:
    """Return the offset of the low half of an argument; what is checked here fits into it."""
    return 16 + 8 * index


def _rules(numbers: dict[str, int]) -> list[tuple[str, list[Instruction]]]:
    """Return the instructions for each call that does not end the process, the frequent calls first."""
    own_channel: list[Instruction] = [
        (LOAD, 0, 0, _argument(0)),
        (EQUAL, 0, 1, CHANNEL),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]
    mapping: list[Instruction] = [
        (LOAD, 0, 0, _argument(2)),
        (BITS, 2, 0, PROT_EXEC),
        (LOAD, 0, 0, _argument(3)),
        (BITS, 1, 0, MAP_ANONYMOUS),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    protecting: list[Instruction] = [
        (LOAD, 0, 0, _argument(2)),
        (BITS, 0, 1, PROT_EXEC),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    # A single thread has nobody to wake it: it would wait for ever, without using CPU time that counts.
    waking: list[Instruction] = [
        (LOAD, 0, 0, _argument(1)),
        (AND, 0, 0, FUTEX_COMMAND),
        (EQUAL, 2, 0, FUTEX_WAKE),
        (EQUAL, 1, 0, FUTEX_WAKE_BITSET),
        (RETURN, 0, 0, KILL),
        (RETURN, 0, 0, ALLOW),
    ]
    special = {"read": own_channel, "write": own_channel, "mmap": mapping, "mprotect": protecting, "futex": waking}
    answers = dict.fromkeys(ALLOWED.split(), ALLOW) | dict.fromkeys(REFUSED.split(), REFUSE)
    plain: dict[str, list[Instruction]] = {name: [(RETURN, 0, 0, answer)] for name, answer in answers.items()}
    return [(name, body) for name, body in (special | plain).items() if name in numbers]


def program(architecture: Architecture) -> bytes:
    """Return the filter as the kernel reads it: an array of struct sock_filter."""
    lines: list[Instruction] = [
        (LOAD, 0, 0, ARCH_AT),
        (EQUAL, 1, 0, architecture.audit),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
        (AT_LEAST, 0, 1, X32_BIT),
        (RETURN, 0, 0, KILL),
    ]
    for name, body in _rules(architecture.numbers):
        lines += [(EQUAL, 0, len(body), architecture.numbers[name]), *body]
    lines.append((RETURN, 0, 0, KILL))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
