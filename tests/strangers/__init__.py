"""What strangers bring, built from its kinds and put through the command line: rows, rewards, recipes, chat templates,
adapters. Each is done right, or refused in a sentence that names the file. Long: `make prove`."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

LIMIT_S = 1800
"""Seconds of one test: hundreds of commands."""


def cases(number: int) -> settings:
    """Return hypothesis' settings for so many cases; `tests/helpers/command_line.py` limits the time of each."""
    return settings(
        max_examples=number,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )
