"""Whether llama.cpp, given an exported file, says what the merged model says: position by position, token by token.

Shapes: N scored positions of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minigrpo.delivery.gguf.llamacpp import LlamaCpp
from minigrpo.delivery.gguf.pretokenizer import token_faults
from minigrpo.delivery.parity.compare import as_loaded, task_of, what_is_said
from minigrpo.delivery.parity.kl import LIMIT, Divergence, compare
from minigrpo.delivery.parity.texts import HeldTexts
from minigrpo.errors import MinigrpoError
from minigrpo.models.chat_template import PROBE_QUESTION
from minigrpo.rollouts.groups import prompts_of
from minigrpo.runs.rundir import RunDir, read_json
from minigrpo.types import Message, Task

GREATEST = {"F32": 1e-4}
"""Of any log-probability, at any position: with the same arithmetic nothing but a wrong mapping is larger."""
RELATIVE = {"F32": LIMIT, "F16": LIMIT, "BF16": LIMIT, "Q8_0": 0.25}
"""Of what training did: a file that is further away has failed, however small that distance is."""
UNMEASURED = {"F16": 2e-5, "BF16": 1e-3, "Q8_0": 1e-2}
"""Nats a token, where nobody knows what training did. llama.cpp rounds what flows through a layer to the file's type,
so even a lossless BF16 file differs. Chat models of some billions of weights lose about 0.001 in eight bits."""
CEILING = 1e-2
"""Nats a token, for every type with a limit: whatever training did, a right file is nearer."""
LOSSLESS = {"BF16": UNMEASURED["BF16"]}
"""Nats a token that are not held against what training did: such a file is the source of all others of a bfloat16
model, with weights as they were merged, and only llama.cpp's own rounding on a CPU parts the two."""


@dataclass(frozen=True, slots=True)
class GgufReference:
    """The merged model on the held texts. `base_kl`: what training did, in nats a token; None where it is unknown.

    `trained`: the policy itself on the same texts, where it was opened; the merged model stands for it elsewhere.
    """

    held: HeldTexts
    merged: tuple[Tensor, ...]
    prompts: tuple[tuple[Message, ...], ...]
    tokenizer: Any
    base_kl: float | None
    trained: tuple[Tensor, ...] | None = None

    @property
    def longest(self) -> int:
        return max(len(text.ids) for text in self.held.texts)


@dataclass(frozen=True, slots=True)
class GgufProof:
    """`row`: the distance. `greatest`: largest difference of a log-probability from the merged model's.

    `judged`: whether there is a limit for its type; else it is only told. `faults`: why the file is refused.
    """

    row: Divergence
    greatest: float
    judged: bool
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        own = {"greatest": self.greatest, "judged": self.judged, "faults": list(self.faults), "ok": self.ok}
        return self.row.to_dict() | own


def gguf_reference(folder: Path, run: RunDir | None) -> GgufReference:
    """Opens the merged model in float32, asks it, and lets go of it."""
    from transformers import AutoTokenizer

    tokenizer, task = AutoTokenizer.from_pretrained(folder), task_of(run)
    held, merged = what_is_said(as_loaded(folder).eval(), tokenizer, run, task)
    return GgufReference(held, merged, asked_of(task), tokenizer, _base_kl(run))


def asked_of(task: Task | None, count: int = 8) -> tuple[tuple[Message, ...], ...]:
    """Conversations whose rendered ids are compared one by one."""
    asked = tuple(tuple(prompt.messages) for prompt in prompts_of(task, "test", count)) if task else ()
    return (*asked, (PROBE_QUESTION,))


def _base_kl(run: RunDir | None) -> float | None:
    """What the merge measured of base against trained policy."""
    stages = read_json(run.parity).get("stages", []) if run and run.parity.is_file() else []
    return next((row["mean_kl"] for row in stages if row["name"] == "base"), None)


def prove_file(file: Path, kind: str, truth: GgufReference) -> GgufProof:
    """Loads the file in llama.cpp. `kind`: F16, Q8_0 and the like."""
    with LlamaCpp(file, context=truth.longest + 8) as llama:
        if llama.facts.vocabulary != truth.merged[0].shape[-1]:
            raise MinigrpoError(
                f"{file} knows {llama.facts.vocabulary} tokens and the model {truth.merged[0].shape[-1]}. It was made "
                "from another model: export again with --force"
            )
        found = list(llama.distributions(truth.held.texts))
        tokens = tuple(token_faults(llama, truth.tokenizer, truth.prompts))
    truths, limit = truth.trained or truth.merged, RELATIVE.get(kind) if truth.base_kl is not None else None
    row = compare(f"gguf {kind}", found, truths, base_kl=truth.base_kl, limit=limit)
    greatest = max(float((each - other).abs().max()) for each, other in zip(found, truth.merged, strict=True))
    return GgufProof(row, greatest, kind in RELATIVE, (*tokens, *_too_far(row, greatest, kind)))


def _too_far(row: Divergence, greatest: float, kind: str) -> Iterator[str]:
    if greatest > GREATEST.get(kind, greatest):
        yield (
            f"In {kind} nothing is rounded, and yet a log-probability differs by {greatest:.2g} (limit "
            f"{GREATEST[kind]:g}): tensors or settings were written wrongly. Report it with the model's name."
        )
        return
    share, ceiling = row.relative_kl, CEILING if kind in RELATIVE else None
    limit = UNMEASURED.get(kind) if share is None else ceiling
    if limit is not None and row.mean_kl > limit:
        yield (
            f"Its distance from the merged model is {row.mean_kl:.2g} nats a token (limit {limit:g}). {_remedy(kind)}"
        )
    elif share is not None and row.mean_kl > LOSSLESS.get(kind, 0.0) and share > RELATIVE.get(kind, share):
        yield (
            f"Its distance is {row.mean_kl:.2g} nats a token, {share:.2g} of what training did (limit "
            f"{RELATIVE[kind]:g}). {_remedy(kind)}"
        )


def _remedy(kind: str) -> str:
    if kind == "Q8_0":
        return "Export as F16 or BF16, or train longer, so that the change is larger than the rounding."
    return "Export as F32: if that is refused, too, the model was written wrongly; if not, this type is too coarse."


def outline(truth: GgufReference) -> dict[str, Any]:
    """What every proof was made on."""
    texts: Sequence[Any] = truth.held.texts
    return {"texts": len(texts), "tokens": sum(text.scored for text in texts), "source": truth.held.source}
