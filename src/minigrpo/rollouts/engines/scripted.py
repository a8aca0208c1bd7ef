"""An engine that returns scripted texts: the public fake, for trying a task without a model.

engine = Scripted(["4", "5"], tokenizer)                       # sibling 0 says 4, sibling 1 says 5, then again
engine = Scripted(lambda prompt, sibling: "...", tokenizer)    # an answer for each question
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minigrpo.rollouts.engines.sampling import ProgressCounter
from minigrpo.types import Completion, Progress, Prompt, Ready, Rendered, Sampling

Script = Callable[[Prompt, int], str]


class Scripted:
    """Token ids are real, so its groups can be packed and trained on; every token is certain (log-probability 0)."""

    is_exact = keeps_weights = True

    def __init__(self, script: Sequence[str] | Script, tokenizer: Any) -> None:
        if not callable(script) and not script:
            raise ValueError("Scripted needs at least one text to say.")
        self.script = script
        self.tokenizer = tokenizer

    def generate(
        self,
        prompts: Sequence[Rendered],
        n: int,
        sampling: Sampling,
        ready: Ready | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[tuple[Completion, ...]]:
        answers = []
        counter = ProgressCounter(progress, ready)
        for index, rendered in enumerate(prompts):
            own = tuple(self.say(self.line(rendered.prompt, sibling), sampling) for sibling in range(n))
            answers.append(own)
            counter.finish(index, own)
        return answers

    def update(self, policy: Any) -> None:
        """Do nothing: there are no weights."""

    def line(self, prompt: Prompt, sibling: int) -> str:
        if callable(self.script):
            return self.script(prompt, sibling)
        return self.script[sibling % len(self.script)]

    def say(self, text: str, sampling: Sampling) -> Completion:
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        kept = tuple(ids[: sampling.max_tokens])
        if len(kept) == len(ids):
            return Completion(text, kept, (0.0,) * len(kept), "stop")
        truncated = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        return Completion(truncated, kept, (0.0,) * len(kept), "length")
