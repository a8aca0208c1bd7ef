"""What of a recipe may leave this machine: no folder of it is named, and no secret of it is told."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from minigrpo.config.load import PATHS, REWARD_KINDS

HIDDEN = "(left out)"
SECRET_NAMES = re.compile("TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
"""Variables of the environment whose values are secrets."""
SHORTEST_SECRET = 8
"""Characters of a secret: a shorter one would be found in any text."""


def portable_knobs(knobs: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return flat knobs without the folders of this machine's files, and without the secrets of its environment."""
    secrets = secrets_of(os.environ if environment is None else environment)
    return {name: _portable(name, value, secrets) for name, value in knobs.items()}


def secrets_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the values of the variables that are named like secrets."""
    named = (value for name, value in environment.items() if SECRET_NAMES.search(name))
    return tuple(value for value in named if len(value) >= SHORTEST_SECRET)


def _portable(name: str, value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _portable(str(key), each, secrets) for key, each in value.items()}
    if not isinstance(value, str):
        return value
    if name in PATHS:
        kind = next((kind for kind in REWARD_KINDS if value.startswith(kind)), "")
        path = PurePath(value.removeprefix(kind))
        value = f"{kind}{path.name}" if path.is_absolute() else value
    # http://user:password@host
    value = re.sub(r"(?<=://)[^/@\s]+@", "", value)
    return HIDDEN if any(secret in value for secret in secrets) else value
