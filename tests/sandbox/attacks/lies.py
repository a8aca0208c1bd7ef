"""Lying about the result: objects that pretend, frames that are forged, messages out of turn."""

from tests.sandbox.attacks import STOPPED, body, whole

FORGE = """
import os, struct, sys
def frame(nonce, kind, content): return struct.pack("!I8sc", len(content), nonce, kind) + content
def nonce():
    at = sys._getframe()
    while "nonce" not in at.f_locals: at = at.f_back
    return at.f_locals["nonce"]
"""

ATTACKS = (
    body("is equal to everything", "lying objects", """
        class Liar(int):
            def __eq__(self, other): return True
            def __hash__(self): return 0
        return Liar(number)
    """),
    body("is an index of its own", "lying objects", """
        class Liar:
            def __index__(self): return 7
            __int__ = __eq__ = __index__
        return Liar()
    """),
    body("shows another text", "lying objects", """
        class Liar(str):
            def __str__(self): return "solution"
            def __len__(self): return 1
            def encode(self, *a): return b"T"
        return Liar("x")
    """),
    body("has another class", "lying objects", """
        class Liar:
            __class__ = int
        return Liar()
    """),
    body("lists without end", "lying objects", """
        class Liar(list):
            def __iter__(self): return iter(int, 1)
            def __len__(self): return 1
        return Liar()
    """),
    body("hides in a list", "lying objects", "return [type('Liar', (int,), {'__eq__': lambda *a: True})(1)]"),
    body("hides in a key", "lying objects", "return {type('Liar', (str,), {'__hash__': lambda s: 0})('a'): 1}"),
    body("has a class that loops", "lying objects", """
        class Meta(type):
            @property
            def __name__(cls): raise SystemExit
        return Meta("M", (), {})()
    """),
    body("pickles itself", "lying objects", """
        class Shell:
            def __reduce__(self): return (print, ("pwned",))
        return Shell()
    """),
    body("raises what cannot be shown", "lying exceptions", """
        class Bad(Exception):
            def __str__(self): raise Bad
            __repr__ = __str__
        raise Bad
    """),
    body("raises a huge text", "lying exceptions", "raise ValueError('x' * 10 ** 7)", STOPPED | {"memory"}),
    body("raises control characters", "exceptions", "raise ValueError('\\x1b[2J\\x1b]0;owned\\x07\\r\\n\\u202e')"),
    body("raises surrogates", "lying exceptions", "raise ValueError('\\ud800' * 100)"),
    body("raises the judge's own exception", "lying exceptions", """
        class Wrong(Exception): pass
        raise Wrong("ok")
    """),
    body("stops the iteration", "lying exceptions", "raise StopIteration('ok')"),
    body("closes the generator", "lying exceptions", "raise GeneratorExit"),
    body("interrupts", "lying exceptions", "raise KeyboardInterrupt"),
    body("exits", "exit codes", "raise SystemExit(0)"),
    body("exits at once", "exit codes", "import os\nos._exit(0)"),
    body("exits with a message", "exit codes", "import sys\nsys.exit('ok')"),
    whole("exits while it is defined", "exit codes", "raise SystemExit"),
    whole("forges an answer and loops", "forged frames", FORGE + """
def attack(number, place):
    os.write(3, frame(nonce(), b"V", b"T"))
    while True: pass
"""),
    whole("forges many answers", "forged frames", FORGE + """
def attack(number, place):
    for _ in range(100): os.write(3, frame(nonce(), b"V", b"T"))
"""),
    whole("forges an early answer", "forged frames", FORGE + """
os.write(3, frame(b"00000000", b"V", b"T"))
def attack(number, place): return 0
"""),
    whole("forges an unknown kind", "forged frames", FORGE + """
def attack(number, place): os.write(3, frame(nonce(), b"?", b"ok"))
"""),
    whole("forges the end of the game", "forged frames", FORGE + """
def attack(number, place): os.write(3, frame(nonce(), b"R", b"T"))
"""),
    whole("forges a value too deep", "forged frames", FORGE + """
def attack(number, place):
    os.write(3, frame(nonce(), b"V", b"l\\0\\0\\0\\x01" * 5000 + b"N"))
"""),
    whole("forges a length", "forged frames", FORGE + """
def attack(number, place): os.write(3, frame(nonce(), b"V", b"l\\xff\\xff\\xff\\xff"))
"""),
    whole("forges a huge integer", "forged frames", FORGE + """
def attack(number, place): os.write(3, frame(nonce(), b"V", b"i\\0\\0\\x40\\0" + b"\\x7f" * 0x4000))
"""),
    whole("forges a key that has no hash", "forged frames", FORGE + """
def attack(number, place):
    os.write(3, frame(nonce(), b"V", b"d\\0\\0\\0\\x01l\\0\\0\\0\\0N"))
"""),
    whole("forges text that is none", "forged frames", FORGE + """
def attack(number, place): os.write(3, frame(nonce(), b"V", b"s\\0\\0\\0\\x02\\xff\\xfe"))
"""),
    whole("forges half a frame and exits", "forged frames", FORGE + """
def attack(number, place):
    os.write(3, frame(nonce(), b"V", b"N" * 100)[:50])
    os._exit(0)
"""),
    whole("forges an enormous frame", "forged frames", """
import os, struct
def attack(number, place):
    os.write(3, struct.pack("!I8sc", 2 ** 32 - 1, b"0" * 8, b"V"))
"""),
    whole("forges an error that is none", "forged frames", FORGE + """
def attack(number, place): os.write(3, frame(nonce(), b"E", b"\\xff\\x1b[31mok\\0" * 1000))
"""),
    whole("sends noise", "forged frames", """
import os
def attack(number, place): os.write(3, bytes(range(256)) * 40)
"""),
)  # fmt: skip
