"""Reaching out: files, environment, processes, network, signals, descriptors, other users."""

from tests.sandbox.attacks import STOPPED, body, calls

FILES = {
    "opens the planted file": "open(place).read()",
    "opens /etc/passwd": "open('/etc/passwd').read()",
    "opens its own memory": "open('/proc/self/mem', 'rb').read(1)",
    "opens its own environment": "open('/proc/self/environ').read()",
    "opens the zygote's environment": "open(f'/proc/{os.getppid()}/environ').read()",
    "opens the first process": "open('/proc/1/cmdline').read()",
    "lists the root": "os.listdir('/')",
    "lists its descriptors": "os.listdir('/proc/self/fd')",
    "walks the disk": "list(os.walk('/', onerror=lambda fault: (_ for _ in ()).throw(fault)))",
    "scans the folder it stands in": "list(os.scandir('.'))",
    "stats a file": "os.stat(place)",
    "asks where it is": "os.getcwd()",
    "reads a link": "os.readlink('/proc/self/exe')",
    "changes folder": "os.chdir('/')",
    "leaves the root": "os.chroot('.')",
    "climbs out of the root": "[os.chdir('..') for _ in range(9)]",
    "makes a folder": "os.mkdir('/tmp/made')",
    "makes a file": "open('/tmp/made', 'w')",
    "makes a file in memory": "os.memfd_create('x')",
    "deletes the planted file": "os.unlink(place)",
    "renames the planted file": "os.rename(place, place + '.old')",
    "links the planted file": "os.symlink(place, '/tmp/made')",
    "opens rights to the planted file": "os.chmod(place, 0o777)",
    "truncates the planted file": "os.truncate(place, 0)",
    "makes a pipe file": "os.mkfifo('/tmp/made')",
    "opens a terminal": "os.openpty()",
    "opens by descriptor": "os.open('..', 0, dir_fd=3)",
    "opens through posix": "__import__('posix').open(place, 0)",
    "opens through _io": "__import__('_io').FileIO(place)",
    "opens through codecs": "__import__('codecs').open(place).read()",
    "reads as the importer": "__import__('_frozen_importlib_external').FileLoader('x', place).get_data(place)",
}
PROCESSES = {
    "forks": "os.fork()",
    "forks a terminal": "os.forkpty()",
    "starts a program": "os.posix_spawn('/bin/sh', ['sh'], {})",
    "becomes a program": "os.execv('/bin/sh', ['sh'])",
    "runs a shell": "os.system('id')",
    "opens a shell": "os.popen('id').read()",
    "kills the zygote": "os.kill(os.getppid(), 9)",
    "kills everybody": "os.kill(-1, 9)",
    "kills its group": "os.killpg(0, 9)",
    "kills itself": "os.kill(os.getpid(), 9)",
    "aborts": "os.abort()",
    "opens a process": "os.pidfd_open(1)",
    "waits for a child": "os.wait()",
    "becomes root": "os.setuid(0)",
    "joins groups": "os.setgroups([0])",
    "starts a session": "os.setsid()",
    "is nicer": "os.nice(-5)",
    "changes its scheduler": "os.sched_setaffinity(0, {0})",
    "mounts by way of libc": "__import__('ctypes').CDLL(None).mount(0, 0, 0, 0, 0)",
    "traces": "__import__('ctypes').CDLL(None).ptrace(0, 0, 0, 0)",
    "loads ctypes from its file": "__import__('_ctypes').dlopen(None, 0)",
    "starts a thread": "__import__('_thread').start_new_thread(print, ())",
    "interrupts the main thread": "__import__('_thread').interrupt_main()",
    "uses subprocess": "__import__('subprocess').run(['id'])",
    "uses multiprocessing": "__import__('multiprocessing').Process().start()",
    "uses _posixsubprocess": "__import__('_posixsubprocess')",
    "opens a socket": "__import__('socket').create_connection(('127.0.0.1', 22))",
    "opens a raw socket": "__import__('_socket').socket()",
    "asks a name server": "__import__('socket').gethostbyname('localhost')",
    "asks for the host's name": "__import__('_socket').gethostname()",
    "fetches a page": "__import__('urllib.request').request.urlopen('http://127.0.0.1')",
    "shares memory": "__import__('_posixshmem').shm_open('/x', 66, 0)",
    "maps memory": "__import__('mmap').mmap(3, 4096)",
    "locks memory": "__import__('ctypes').CDLL(None).mlockall(3)",
}
SIGNALS = {
    "catches the timer": "__import__('_signal').signal(27, lambda *_: None)",
    "ignores the timer": "__import__('_signal').signal(27, 1)",
    "blocks the timer": "__import__('_signal').pthread_sigmask(0, [27])",
    "stops the timer": "__import__('_signal').setitimer(2, 0)",
    "sets an alarm": "__import__('_signal').alarm(1)",
    "waits for a signal": "__import__('_signal').pause()",
    "raises a signal": "__import__('_signal').raise_signal(9)",
    "signals a thread": "__import__('_signal').pthread_kill(1, 9)",
    "wakes by descriptor": "__import__('_signal').set_wakeup_fd(3)",
    "raises its limits": "__import__('resource').setrlimit(9, (-1, -1))",
    "raises another's limits": "__import__('resource').prlimit(1, 9, (-1, -1))",
    "handles faults": "__import__('faulthandler').enable(3)",
    "dumps a later traceback": "__import__('faulthandler').dump_traceback_later(1, file=3)",
}
DESCRIPTORS = {
    "writes to standard output": "os.write(1, b'x')",
    "writes to standard error": "os.write(2, b'x')",
    "reads standard input": "os.read(0, 1)",
    "doubles the channel": "os.dup2(3, 9)",
    "passes a descriptor": "os.sendfile(3, 3, 0, 1)",
    "opens the channel as a file": "os.fdopen(3, 'rb').read(1)",
    "reads the control socket": "os.read(5, 1)",
    "reads the rules of Landlock": "os.read(100, 1)",
    "reads past Python": "os.preadv(3, [bytearray(4)], 0)",
    "splices the channel": "os.splice(3, 3, 1)",
    "sleeps": "__import__('time').sleep(60)",
    "asks for randomness": "os.urandom(8)",
    "asks for input": "input()",
}

ATTACKS = (
    *calls("files", FILES),
    *calls("processes", PROCESSES),
    *calls("signals", SIGNALS, STOPPED | {"timeout"}),
    *calls("descriptors", DESCRIPTORS, STOPPED | {"timeout"}),
    body("tries every descriptor", "descriptors", """
        import os
        found = b""
        for handle in [*range(0, 3), *range(4, 300)]:
            try: found += os.read(handle, 100)
            except OSError: pass
        return found.decode()
    """),
    body("reads every environment it knows", "environment", """
        import os
        return repr(dict(os.environ)) + repr(os.environb) + repr(__import__('posix').environ)
    """),
    body("imports everything", "imports", """
        import sys
        found = []
        for name in sorted(sys.stdlib_module_names):
            try: found.append(__import__(name).__name__)
            except BaseException: pass
        return ",".join(found)
    """, STOPPED | {"timeout", "memory"}),
    body("puts the path back", "imports", """
        import sys
        sys.path[:] = ["/usr/lib/python3.11", sys.prefix + "/lib/python3.11", "/"]
        import socket
        return socket.gethostname()
    """),
    body("brings its own importer", "imports", """
        import sys
        sys.meta_path.insert(0, type("F", (), {"find_spec": staticmethod(lambda *a: open(place).read())}))
        import secrets
    """),
)  # fmt: skip
