"""Detours: harm that a program has others do for it: libc, odd doors of the kernel, hooks, decoders."""

from tests.sandbox.attacks import STOPPED, body, calls, whole

FULL = frozenset({"memory", "timeout", "error"})
ENDLESS = frozenset({"timeout"})

LIBRARY = """
import gc
gc.unfreeze()
lib = next(x for x in gc.get_objects() if type(x).__name__ == "CDLL")
"""

BY_NUMBER = {
    "calls by the numbers of another ABI": "lib.syscall(0x40000000 | 2, place.encode(), 0)",
    "sets up a ring of calls": "lib.syscall(425, 8, bytes(120))",
    "reads another process's memory": "lib.syscall(310, 1, None, 0, None, 0, 0)",
    "handles its own page faults": "lib.syscall(323, 0)",
    "filters its own filter": "lib.syscall(317, 1, 8, None)",
    "shares memory by a key": "lib.syscall(29, 7, 4096, 0o1777)",
    "opens a queue of messages": "lib.syscall(240, b'minigrpo', 0o102, 0o600, None)",
    "clones itself without memory of its own": "lib.syscall(56, 0x100, 0, 0, 0, 0)",
    "ends its only thread": "lib.syscall(60, 0)",
    "returns from a signal that never came": "lib.syscall(15)",
    "passes a descriptor over the channel": "lib.syscall(46, 3, bytes(56), 0)",
}
"""Numbers of x86_64; elsewhere they are other calls, or none."""

LIBC = {
    "has libc read a file as a time zone": "os.environ.update(TZ=':' + place) or __import__('time').tzset()",
    "has libc read the users": "__import__('pwd').getpwall()",
    "has libc read a locale": "__import__('_locale').setlocale(6, place)",
    "reads source lines as a traceback does": "__import__('linecache').getlines(place)",
    "imports from an archive": "__import__('zipimport').zipimporter(place)",
    "runs a file as a program": "__import__('runpy').run_path(place)",
    "debugs itself": "breakpoint()",
    "goes into another interpreter": "__import__('_xxsubinterpreters').create()",
    "formats its way to the globals": "'{0.__globals__}'.format(sys._getframe(1).f_globals['answer_call'])[:60000]",
}

ATTACKS = (
    *calls("files", LIBC),
    *(
        body(name, "system calls by number", f"{LIBRARY}\nreturn str({line})", STOPPED | {"timeout"})
        for name, line in BY_NUMBER.items()
    ),
    body("gives the processor away for ever", "time", "import os\nwhile True: os.sched_yield()", ENDLESS),
    body("divides to a million million digits", "memory", """
        import decimal
        decimal.getcontext().prec = decimal.MAX_PREC
        return str(decimal.Decimal(1) / 3)
    """, FULL),
    body("prints a number digit by digit", "time", """
        import sys
        sys.set_int_max_str_digits(0)
        return str(3 ** (10 ** 8))
    """, FULL),
    body("repeats repeats in a pattern", "memory", """
        import re
        return re.match("(?:" * 40 + "a" + "{1,99})" * 40 + "b", "a" * 30) is None and 0
    """, FULL | {"wrong"}),
    body("loads code that never was", "a crash", """
        import marshal
        code = marshal.dumps(attack.__code__)
        for place in range(len(code)):
            for bit in (1, 16, 128):
                try: eval(marshal.loads(code[:place] + bytes([code[place] ^ bit]) + code[place + 1:]))
                except Exception: pass
        return 0
    """, FULL | {"wrong", "blocked"}),
    body("runs bytes as code", "a crash", """
        def f(): return 1
        f.__code__ = f.__code__.replace(co_code=bytes(range(256)), co_stacksize=1, co_consts=())
        return f()
    """, FULL | {"blocked"}),
    body("changes its answer while it is being written", "hooks", """
        import gc
        answer = [[] for _ in range(1000)]
        gc.set_threshold(1)
        gc.callbacks.append(lambda *_: answer.clear() or answer.append(answer))
        return answer
    """, FULL | STOPPED),
    body("answers from a profiler", "hooks", """
        import os, struct, sys
        def hook(frame, *_):
            if "once" in frame.f_locals:
                os.write(3, struct.pack("!I8sc", 1, frame.f_locals["once"], b"V") + b"T")
        sys.setprofile(hook)
        return 0
    """),
    body("leaves its harness no stack", "hooks", "import sys\nsys.setrecursionlimit(30)\nreturn [[[[[[[[0]]]]]]]]"),
    body("raises when it is thrown away", "hooks", """
        import sys
        class Last:
            def __del__(self): raise SystemExit(0)
        sys.unraisablehook = lambda fault: (_ for _ in ()).throw(SystemExit(0))
        kept = [Last()]
        kept.append(kept)
        return 0
    """),
    body("interrupts whoever comes next", "hooks", LIBRARY + "lib.PyErr_SetInterrupt()\nreturn 0"),
    body("exits as its harness would", "exit codes", "import os\nos._exit(72)", STOPPED | {"memory"}),
    whole("is a module of its own", "hooks", """
        import sys
        class Own(type(sys)):
            def __getattribute__(self, name): return lambda *a: 0
        sys.modules[__name__].__class__ = Own
        def attack(number, place): return 0
    """),
)  # fmt: skip
