"""Join the ranks that torch's launcher started: `torchrun -m minigrpo train RECIPE`, or `minigrpo train --nproc N`.

The launcher puts the place of each process into its environment. Two times are short and one is long: a rank that does
not come is missed after JOIN_S, one that stands still after SILENCE_S (distributed/watch.py), and an exchange may
take as long as the plan says that the slowest rollout could (`exchange_seconds`), for ranks wait there for one another.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from minigrpo.config.schema import Recipe
from minigrpo.distributed.place import Place
from minigrpo.distributed.ranks import Ranks
from minigrpo.distributed.watch import SILENCE_S, Watch, exit_code
from minigrpo.errors import MinigrpoError, RankLostError

JOIN_S = 60.0
"""Seconds in which all ranks must have come: each has loaded torch and nothing else by then."""
SILENCE_VARIABLE = "MINIGRPO_SILENCE"
"""Seconds without a beat after which a rank is lost, where they are not SILENCE_S."""


class Team(Ranks):
    """This process among ranks that have joined. They exchange through the store until `connect`."""

    def __init__(self, place: Place, store: Any, watch: Watch) -> None:
        super().__init__(place.rank, place.size, at=watch.at)
        self.place, self.watch = place, watch
        self._store = store

    def tell(self, name: str, data: Any) -> None:
        """Leave data in the store, for `hear` on the other ranks."""
        self._store.set(name, json.dumps(data))

    def hear(self, name: str) -> Any:
        """Return what another rank tells; wait for it as long as no rank is lost."""
        while not self._store.check([name]):
            if self.watch.verdict is not None:
                self.watch.explain("")
            time.sleep(0.05)
        return json.loads(self._store.get(name))

    def hosts(self) -> Counter[str]:
        """Return how many ranks run on each machine, by its name."""
        return Counter(json.loads(self._store.get(f"here/{rank}"))[0] for rank in range(self.size))

    def connect(self, seconds: float) -> None:
        """Open the wire. `seconds`: how long ranks may wait for one another in an exchange."""
        from torch.distributed import PrefixStore

        from minigrpo.distributed.torch_wire import TorchWire

        store = PrefixStore("wire", self._store)
        self.wire = TorchWire(store, self.rank, self.size, seconds=seconds, on_failure=self.watch.explain)


@contextmanager
def joined_ranks(place: Place, environment: Mapping[str, str] = os.environ) -> Iterator[Team]:
    """Join the other ranks that the launcher started, until the block ends.

    Raise RankLostError where one does not come, or is lost later. Of an error that all ranks come to, one tells; the
    others end in silence, with the same exit code.
    """
    team = _join(place, float(environment.get(SILENCE_VARIABLE, SILENCE_S)))
    try:
        yield team
    except BaseException as fault:
        team.watch.close(fault)
        if isinstance(fault, MinigrpoError | KeyboardInterrupt) and not team.watch.speaks(fault):
            raise SystemExit(exit_code(fault)) from None
        raise
    team.watch.close(None)
    if team.wire is not None:
        team.wire.close()


def _join(place: Place, silence: float) -> Team:
    from torch.distributed import PrefixStore

    name = f"minigrpo/{place.job}/{place.attempt}"
    store = PrefixStore(name, _open_store(place, host=place.rank == 0 and not place.launcher_has_store))
    store.set(f"here/{place.rank}", json.dumps([socket.gethostname(), os.getpid()]))
    names = [f"here/{rank}" for rank in range(place.size)]
    deadline = time.monotonic() + JOIN_S
    while not store.check(names):
        if time.monotonic() > deadline:
            missing = [rank for rank, name in enumerate(names) if not store.check([name])]
            raise RankLostError(
                f"Of {place.size} ranks {len(missing)} did not come within {JOIN_S:.0f} s, the first of them rank "
                f"{missing[0]}. Look at what its process says, then begin again."
            )
        time.sleep(0.05)
    # A connection of its own: the other one may be waiting for an answer when a beat is due.
    watch = Watch(PrefixStore(name, _open_store(place, host=False)), place.rank, place.size, silence=silence)
    watch.start()
    return Team(place, store, watch)


def _open_store(place: Place, *, host: bool) -> Any:
    from torch.distributed import TCPStore

    limit = timedelta(seconds=JOIN_S)
    try:
        return TCPStore(place.address, place.port, is_master=host, timeout=limit, wait_for_workers=False)
    except RuntimeError as fault:
        raise RankLostError(
            f"Rank {place.rank} on {socket.gethostname()} found no store of the job at {place.address}:{place.port} "
            f"within {JOIN_S:.0f} s ({str(fault).partition(chr(10))[0][:120]}). Is that address reached from here?"
        ) from None


def exchange_seconds(recipe: Recipe, ranks: int, *, weights: int, rows: int, device: str) -> float:
    """Return how long a rank may wait for the others: twice the longest rollout that there could be.

    Every completion runs into its limit there, every grade takes its longest, and the device is the slowest on which
    anybody would train. `weights`: parameters of the model; `rows`: completions decoded side by side.
    """
    rollout, task = recipe.rollout, recipe.task
    groups = math.ceil(rollout.prompts * max(1.0, recipe.groups.resample) / ranks)
    completions = max(groups * rollout.completions, math.ceil(recipe.eval.held_out / ranks) if recipe.eval.every else 0)
    side_by_side = min(completions, rows or completions)
    passes = math.ceil(completions / side_by_side) * rollout.max_tokens
    a_pass = max(
        4 * weights / SLOWEST_BYTES[device == "cuda"], 2 * weights * side_by_side / SLOWEST_FLOPS[device == "cuda"]
    )
    return 2 * (passes * a_pass + groups * task.seconds / task.workers) + 300


SLOWEST_BYTES, SLOWEST_FLOPS = (1e9, 50e9), (2e9, 5e12)
"""Bytes of weights that a decoder reads in a second, and what it computes, on the slowest CPU and GPU."""
