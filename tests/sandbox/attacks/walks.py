"""Walking through the interpreter: frames, the garbage collector, subclasses, the harness's own functions."""

from tests.sandbox.attacks import STOPPED, body, whole

ATTACKS = (
    body("reads every frame", "frames", """
        import sys
        frame, found = sys._getframe(), []
        while frame:
            found.append({name: repr(value)[:2000] for name, value in frame.f_locals.items()})
            frame = frame.f_back
        return repr(found)[:60000]
    """),
    body("reads every global it can reach", "frames", """
        import sys
        frame, found = sys._getframe(), []
        while frame:
            found += [repr(value)[:500] for value in frame.f_globals.values()]
            frame = frame.f_back
        return repr(found)[:60000]
    """),
    body("reads frames of an exception", "frames", """
        try: 1 / 0
        except Exception as fault: frame = fault.__traceback__.tb_frame.f_back
        return repr(frame.f_locals)[:60000]
    """),
    body("reads every frame of every thread", "frames", "import sys\nreturn repr(sys._current_frames())[:60000]"),
    body("reads every object", "the garbage collector", """
        import gc
        gc.unfreeze()
        return repr([repr(x)[:200] for x in gc.get_objects() if isinstance(x, (dict, list, tuple))])[:60000]
    """, STOPPED | {"memory", "timeout"}),
    body("looks for a generator", "the garbage collector", """
        import gc
        return repr([x.gi_frame.f_locals for x in gc.get_objects() if type(x).__name__ == "generator"])
    """),
    body("looks for sockets", "the garbage collector", """
        import gc
        gc.unfreeze()
        found = [x for x in gc.get_objects() if type(x).__name__ == "socket"]
        return repr([x.recv(10) for x in found])
    """),
    body("looks for ctypes", "the garbage collector", """
        import gc
        gc.unfreeze()
        lib = next(x for x in gc.get_objects() if type(x).__name__ == "CDLL")
        return lib.system(b"id")
    """),
    body("opens a file by way of ctypes", "the garbage collector", """
        import gc
        gc.unfreeze()
        lib = next(x for x in gc.get_objects() if type(x).__name__ == "CDLL")
        return lib.open(place.encode(), 0)
    """),
    body("writes memory that may be executed", "the garbage collector", """
        import gc
        gc.unfreeze()
        lib = next(x for x in gc.get_objects() if type(x).__name__ == "CDLL")
        return lib.mprotect(id(number) & -4096, 4096, 7)
    """, STOPPED | {"error"}),
    body("calls the zygote's functions", "the garbage collector", """
        import gc
        gc.unfreeze()
        zygote = next(x for x in gc.get_objects() if type(x).__name__ == "Zygote")
        return str(zygote.fork())
    """),
    body("sends on the control socket", "the garbage collector", """
        import gc
        gc.unfreeze()
        zygote = next(x for x in gc.get_objects() if type(x).__name__ == "Zygote")
        zygote.send({"status": 0, "cpu_s": 0.0, "state": "?"})
    """),
    body("walks the subclasses to a shell", "the object graph", """
        for cls in ().__class__.__base__.__subclasses__():
            if cls.__name__ == "_wrap_close": return cls.__init__.__globals__["system"]("id")
        return [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == "Popen"][0](["id"])
    """),
    body("walks the subclasses to a loader", "the object graph", """
        for cls in object.__subclasses__():
            if "Importer" in cls.__name__: cls.load_module("_socket").socket()
    """),
    body("finds a file class", "the object graph", """
        import io
        for cls in io.IOBase.__subclasses__()[0].__subclasses__(): cls(place)
    """),
    body("reads the modules", "the object graph", """
        import sys
        return repr({name: list(vars(module)) for name, module in sys.modules.items()})[:60000]
    """),
    body("restores hidden modules", "the object graph", """
        import random
        return random.__dict__["_os"].__dict__["sys"].modules["os"].open(place, 0)
    """),
    body("patches the harness's encoder", "the harness", """
        import sys
        frame = sys._getframe().f_back
        frame.f_globals["codec"].encode = lambda value, limit: b"T"
        return object()
    """),
    body("patches the harness's writer", "the harness", """
        import sys
        names = sys._getframe().f_back.f_globals
        names["write"] = lambda data: None
        names["os"].write(3, b"\\0" * 13)
    """),
    body("patches builtins", "the harness", """
        import builtins
        for name in ("type", "len", "isinstance", "int", "str", "bytes", "min", "set", "map"):
            setattr(builtins, name, lambda *a, **k: True)
        return 1
    """, STOPPED | {"timeout"}),
    body("traces the harness", "the harness", """
        import sys
        def spy(frame, event, argument):
            frame.f_trace_opcodes = True
            return spy
        sys._getframe().f_back.f_trace = spy
        sys.settrace(spy); sys.setprofile(spy)
        return 0
    """),
    body("audits the harness", "the harness", "import sys\nsys.addaudithook(print)\nreturn 0"),
    body("replaces the module table", "the harness", "import sys\nsys.modules.clear()\nreturn 0"),
    body("deletes builtins", "the harness", """
        import builtins
        for name in list(vars(builtins)):
            if name not in ("list", "vars"): delattr(builtins, name)
        return 0
    """),
    body("frees what it does not own", "the harness", """
        import gc
        gc.unfreeze()
        for thing in gc.get_objects():
            if type(thing) is dict and thing is not globals(): thing.clear()
    """, STOPPED | {"timeout", "memory"}),
    whole("leaves a message for the next call", "state", """
        import builtins
        seen = getattr(builtins, "seen", 0)
        builtins.seen = seen + 1
        def attack(number, place): return seen
    """),
    body("changes its arguments", "state", """
        import sys
        frame = sys._getframe().f_back
        frame.f_locals["arguments"] = (0, "")
        return frame.f_locals["entry"]
    """),
    body("registers at exit", "state", "import atexit\natexit.register(print, 'late')\nraise SystemExit(0)"),
    body("looks for other programs", "state", """
        import gc
        gc.unfreeze()
        return repr([x.co_consts for x in map(lambda f: getattr(f, "__code__", None), gc.get_objects()) if x])[:60000]
    """, STOPPED | {"memory", "timeout"}),
)  # fmt: skip
