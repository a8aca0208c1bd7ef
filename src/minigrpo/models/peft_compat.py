"""Prepare PEFT for what else is installed: packages that it asks for whenever it wraps a layer.

PEFT raises ImportError for every linear layer where it finds an optional package that is too old for it, although no
layer of ours has anything to do with it: Colab's torchao 0.10, for one.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from minigrpo.errors import ModelError
from minigrpo.versions import installed

CHECKED = {"torchao": "is_torchao_available", "gptqmodel": "is_gptqmodel_available"}
"""Packages that PEFT may refuse, each with PEFT's function that does; it answers once, and keeps its answer."""

_refused: dict[str, str] = {}
"""What has been found in this process, which PEFT no longer tells once it has been asked to go on without."""


def prepare_peft() -> None:
    """Make PEFT go on without the packages that it refuses, and warn of each once. Call it before PEFT wraps a layer.

    Raise ModelError where it insists.
    """
    mute_bitsandbytes()
    known = dict(_refused)
    for package, reason in refused_packages().items():
        if package not in known:
            warnings.warn(f"Going on without {package}, which PEFT refuses: {reason}.", stacklevel=3)


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """Hide a warning that users cannot act on: peft 0.21 reads an attribute that transformers 5 renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def refused_packages() -> Mapping[str, str]:
    """Return the installed packages that PEFT refuses, each with its reason, after making it go on without them."""
    for package in filter(installed, CHECKED):
        from peft import import_utils

        check = getattr(import_utils, CHECKED[package])
        if reason := _refusal(check):
            _refused[package] = reason
            _go_on_without(package, check, reason)
    return dict(_refused)


def _go_on_without(package: str, check: Callable[[], bool], reason: str) -> None:
    """Have PEFT's check answer no, which it keeps. Raise ModelError where it does not."""
    with _hidden(package):
        insists = _refusal(check)
    if insists or _refusal(check):
        raise ModelError(f"PEFT does not work beside this {package}: {reason}. pip uninstall {package}")


def _refusal(check: Callable[[], bool]) -> str:
    """Return why PEFT's check refuses a package, or "" where it answers yes or no."""
    try:
        check()
    except ImportError as fault:
        return " ".join(str(fault).split()).rstrip(".")
    return ""


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Hide a package from `find_spec` inside the block."""
    modules: dict[str, Any] = sys.modules
    before = {package: modules[package]} if package in modules else {}
    modules[package] = None
    try:
        yield
    finally:
        del modules[package]
        modules.update(before)


def mute_bitsandbytes() -> None:
    """Silence bitsandbytes: PEFT imports it, and it warns about a faster kernel that it would have to download."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
