"""Using everything up: time, memory, the stack, processes, output."""

from tests.sandbox.attacks import SPENT, STOPPED, body, whole

ENDLESS = frozenset({"timeout"})
FULL = frozenset({"memory", "timeout", "error"})

ATTACKS = (
    body("loops", "time", "while True: pass", ENDLESS),
    body("catches everything and loops", "time", """
        while True:
            try:
                while True: pass
            except BaseException: continue
    """, ENDLESS),
    whole("loops while it is defined", "time", "while True: pass\ndef attack(number, place): return 0", ENDLESS),
    whole("loops in a default argument", "time", """
        def forever():
            while True: pass
        def attack(number, place, x=forever()): return 0
    """, ENDLESS),
    whole("loops in a decorator", "time", """
        def forever(function):
            for _ in iter(int, 1): pass
        @forever
        def attack(number, place): return 0
    """, ENDLESS),
    body("loops in finally", "time", "try: return 1\nfinally:\n    while True: pass", ENDLESS),
    body("loops in C", "time", "import itertools\nreturn sum(itertools.repeat(0))", ENDLESS),
    body("counts in C", "time", "import itertools, collections\ncollections.deque(itertools.count(), 0)", ENDLESS),
    body("raises a power", "time", "return 7 ** (10 ** 9)", SPENT),
    body("matches for ever", "time", "import re\nreturn re.match('(a+)+b', 'a' * 60)", ENDLESS),
    body("sorts for ever", "time", """
        class L:
            def __lt__(self, other):
                while True: pass
        return sorted([L(), L()])
    """, ENDLESS),
    body("collects for ever", "time", """
        class D:
            def __del__(self):
                while True: pass
        D()
        return 1
    """, ENDLESS),
    body("loops in its exception's text", "time", """
        class E(Exception):
            def __str__(self):
                while True: pass
        raise E
    """, ENDLESS),
    body("loops in a hash", "time", """
        class H:
            def __hash__(self):
                while True: pass
        return {H(): 1}
    """, ENDLESS),
    body("waits for a lock", "time without CPU", """
        import _thread
        lock = _thread.allocate_lock()
        lock.acquire(); lock.acquire()
    """, SPENT),
    body("waits for a lock a while", "time without CPU", """
        import _thread
        lock = _thread.allocate_lock()
        lock.acquire(); lock.acquire(timeout=60)
    """, SPENT),
    body("reads the channel for ever", "time without CPU", "import os\nos.read(3, 1)", SPENT),
    body("selects", "time without CPU", "import select\nselect.select([3], [], [], 60)", STOPPED),
    body("allocates a block", "memory", "return len(bytearray(10 ** 10))", FULL),
    body("allocates a list", "memory", "x = []\nwhile True: x.append(bytearray(10 ** 5))", FULL),
    body("swallows its memory errors", "memory", """
        kept = []
        while True:
            try: kept.append(bytearray(10 ** 6))
            except MemoryError: pass
    """, FULL),
    body("doubles a text", "memory", "x = 'x'\nwhile True: x += x", FULL),
    body("nests lists", "memory", "x = []\nwhile True: x = [x]", FULL | {"error"}),
    body("multiplies a list", "memory", "return [0] * (10 ** 11)", FULL),
    body("ranges over everything", "memory", "return list(range(10 ** 12))", FULL),
    body("formats a wide field", "memory", "return f'{1:>999999999999}'", FULL),
    body("shifts far", "memory", "return 1 << (10 ** 12)", FULL),
    body("makes types", "memory", "x = []\nwhile True: x.append(type('T', (), {}))", FULL),
    body("makes generators", "memory", "x = []\nwhile True: x.append((i for i in x))", FULL),
    body("recurses", "the stack", "return attack(number, place)", SPENT),
    body("recurses without limit", "the stack", """
        import sys
        sys.setrecursionlimit(10 ** 9)
        def deep(): return deep()
        return deep()
    """, SPENT),
    body("recurses in C", "the stack", """
        import sys
        sys.setrecursionlimit(10 ** 9)
        x = []
        for _ in range(10 ** 5): x = [x]
        return repr(x)
    """, SPENT | {"wrong"}),
    body("recurses in comparison", "the stack", """
        import sys
        sys.setrecursionlimit(10 ** 9)
        a, b = [], []
        for _ in range(10 ** 6): a, b = [a], [b]
        return a == b
    """, SPENT | {"wrong"}),
    body("compiles deep text", "the stack", """
        import sys
        sys.setrecursionlimit(10 ** 9)
        return eval("-" * 10 ** 5 + "1")
    """, SPENT | {"wrong"}),
    body("corrupts the interpreter", "a crash", """
        (lambda: 0).__code__.replace(co_code=bytes([100, 255] * 50))
        def f(): pass
        f.__code__ = f.__code__.replace(co_code=bytes([100, 255] * 50), co_consts=())
        return f()
    """, SPENT | {"wrong"}),
    body("forks without end", "processes", "import os\nwhile True: os.fork()", STOPPED),
    body("forks and catches", "processes", """
        import os
        while True:
            try: os.fork()
            except BaseException: pass
    """, STOPPED),
    body("starts threads without end", "processes", """
        import _thread
        while True:
            try: _thread.start_new_thread(attack, (1, ""))
            except BaseException: pass
    """, STOPPED | {"timeout"}),
    body("prints without end", "output", "while True: print('x' * 10 ** 4)", ENDLESS),
    body("prints a lot", "output", "print('x' * 10 ** 7)\nraise ValueError('x' * 10 ** 7)", STOPPED | {"memory"}),
    body("returns a long text", "output", "return 'x' * 10 ** 6", STOPPED),
    body("returns a long list", "output", "return [None] * 10 ** 6", STOPPED),
    body("floods the channel", "output", "import os\nwhile True: os.write(3, b'\\0' * 10 ** 5)", STOPPED | {"timeout"}),
)  # fmt: skip
