"""Where a launcher put this process among the ranks of a run: read from the environment, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Where the launcher put this process: its rank of `size`, its number among the
    `local_size` of this machine, and where the store is."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    attempt: int
    job: str
    launcher_has_store: bool

    @classmethod
    def size_of(cls, environment: Mapping[str, str]) -> int:
        """Return how many ranks the launcher started; 1 for a process that is alone."""
        place = cls.of(environment)
        return place.size if place else 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place | None:
        """Return the place that torchrun's variables name; None for a process that is alone."""
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not all(name in environment for name in names) or environment["WORLD_SIZE"] == "1":
            return None
        return cls(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            int(environment.get("LOCAL_RANK", "0")),
            int(environment.get("LOCAL_WORLD_SIZE", "1")),
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
            environment.get("TORCHELASTIC_RUN_ID", "job"),
            environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
