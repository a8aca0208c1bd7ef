"""Go on when memory runs out in a rollout: fewer rows side by side, the same draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minigrpo.errors import RecipeError
from minigrpo.types import Completion, Engine, Progress, Ready, Rendered, Sampling
from minigrpo.utils.memory import empty_cache, first_line, ran_out


def generate_with_retries(
    engine: Engine,
    prompts: Sequence[Rendered],
    n: int,
    sampling: Sampling,
    ready: Ready | None = None,
    *,
    progress: Progress | None = None,
) -> list[tuple[Completion, ...]]:
    """Return n completions of each prompt as `engine.generate` does; where memory runs out, ask again for the rest.

    On a GPU the first try is repeated as it was, because free memory may only have been in pieces; after that the rows
    that the engine decodes side by side are halved, for this call and all later ones. Draws are functions of names, so
    each completion has the tokens that it would have had. Raise RecipeError where one prompt's own completions are too
    many.
    """
    if not prompts:  # one rank of several may have none
        return []
    done: dict[int, tuple[Completion, ...]] = {}
    emptied = False
    while True:
        left = [index for index in range(len(prompts)) if index not in done]
        counts = _Offset(progress, done.values(), n)

        def keep(place: int, own: tuple[Completion, ...], left: Sequence[int] = left) -> None:
            done[left[place]] = own
            if ready:
                ready(left[place], own)

        try:
            found = engine.generate([prompts[index] for index in left], n, sampling, keep, progress=counts.report)
            whole = done | dict(zip(left, found, strict=True))
            return [whole[index] for index in range(len(prompts))]
        except (RuntimeError, MemoryError) as fault:
            place = ran_out(fault)
            if not place:
                raise
            message = first_line(fault)
        # Beyond the handler: until then the traceback holds the tensors of the try that failed.
        empty_cache()
        if place == "CPU" or emptied:
            _halve_rows(engine, (len(prompts) - len(done)) * n, n, message)
        emptied = True


class _Offset:
    """Reports a repeated call's progress on top of the completions that had ended before it."""

    def __init__(self, progress: Progress | None, done: Any, n: int) -> None:
        self.progress, self.ended = progress, n * len(done)
        self.tokens = sum(len(completion.token_ids) for own in done for completion in own)

    def report(self, tokens: int, ended: int) -> None:
        if self.progress:
            self.progress(self.tokens + tokens, self.ended + ended)


def _halve_rows(engine: Any, rows_left: int, n: int, message: str) -> None:
    """Halve the rows that were decoded side by side. A prompt's siblings stay together."""
    rows = min(getattr(engine, "rows", n), rows_left)
    if rows <= n:
        raise RecipeError(
            f"Memory ran out while {n} completions of one prompt were sampled side by side ({message[:120]}). See what "
            "takes it: minigrpo plan RECIPE. A lower --rollout.max_tokens or --rollout.completions takes less",
            entry="memory-ran-out",
        )
    engine.rows = max(n, rows // 2)
