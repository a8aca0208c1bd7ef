"""What `import minigrpo` hands out stays what it is, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import minigrpo

PROGRAM = """
import importlib, pkgutil, types
import minigrpo

GGUF = "minigrpo.delivery.gguf"
LEFT_OUT = ("minigrpo.sandbox.inside", f"{GGUF}.converter_worker", f"{GGUF}.llamacpp_worker")
first = {name: getattr(minigrpo, name) for name in minigrpo.HOME_OF}
for module in pkgutil.walk_packages(minigrpo.__path__, "minigrpo."):
    if not module.name.startswith(LEFT_OUT):  # programs of processes of their own
        importlib.import_module(module.name)
for name, then in first.items():
    now = getattr(minigrpo, name)
    assert now is then, name
    assert callable(now) and not isinstance(now, types.ModuleType), name
recipe = minigrpo.load_recipe("quickstart", {"task.size": 8})
for _ in range(2):
    assert minigrpo.dump_recipe(recipe)
    for verb in (minigrpo.preflight, minigrpo.train, minigrpo.warmup, minigrpo.evaluate, minigrpo.rollout):
        try:
            verb()
        except TypeError as fault:
            assert "missing" in str(fault), fault  # a function that lacks its arguments, not a module
"""


def test_a_public_name_is_the_same_function_after_every_module_was_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_no_public_name_is_the_name_of_a_module() -> None:
    from importlib.util import find_spec

    assert not [name for name in minigrpo.HOME_OF if find_spec(f"minigrpo.{name}") is not None]
