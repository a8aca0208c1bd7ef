"""Prove an exported file: whether llama.cpp's output for it is the merged model's, position by position, token by
token.

Shapes: N scored positions of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from minigrpo.delivery.gguf.llamacpp import LlamaCpp
from minigrpo.delivery.gguf.pretokenizer import token_faults
from minigrpo.delivery.gguf.rounding import explain_rounding, max_distance
from minigrpo.delivery.gguf.weights import TensorsProof, prove_tensors
from minigrpo.delivery.parity.compare import compare_texts, find_task, load_strictly, score_held_texts
from minigrpo.delivery.parity.kl import FLOAT32_ERROR, MAX_KL, MAX_RELATIVE_KL, Divergence
from minigrpo.delivery.parity.place import CPU, pick_proof_place
from minigrpo.delivery.parity.texts import HeldTexts, StoredLogprobs
from minigrpo.errors import MinigrpoError
from minigrpo.models.chat_template import check_tokenizer, probe_messages
from minigrpo.models.loading import open_tokenizer
from minigrpo.models.model_files import BaseFiles, open_base
from minigrpo.rollouts.groups import prompts_of
from minigrpo.runs.rundir import RunDir, read_json
from minigrpo.types import Message, Task

MAX_LOGPROB_ERROR = {"F32": FLOAT32_ERROR}
"""Largest error of any log-probability, at any position: with the same arithmetic only a wrong mapping exceeds it."""
RELATIVE_LIMITS = {"F32": MAX_RELATIVE_KL, "F16": MAX_RELATIVE_KL, "BF16": MAX_RELATIVE_KL, "Q8_0": 0.25}
"""Largest relative KL of a type: a file beyond it has failed, however small the KL itself is."""
ABSOLUTE_LIMITS = {"F16": 2e-5, "BF16": 1e-3, "Q8_0": 1e-2}
"""Largest KL, in nats a token, where it is known neither what training did nor how llama.cpp rounds (rounding.py): some
fifteen times what rounding costs the random models of the tests. llama.cpp rounds a layer's activations to the file's
type, so even a lossless BF16 file differs."""
LOSSLESS_LIMITS = {"BF16": ABSOLUTE_LIMITS["BF16"]}
"""KL, in nats a token, up to which the relative limit is not applied: such a file is the source of all others of a
bfloat16 model, with weights as they were merged, and differs only by llama.cpp's own rounding on a CPU."""


@dataclass(frozen=True, slots=True)
class GgufReference:
    """The merged model on the held texts. `base_kl`: how far training moved the base, in nats a token; None where it is
    unknown.

    `trained`: the policy itself on the same texts, where it was opened; elsewhere the merged model takes its place.
    `model`: the merged model's files.
    """

    model: BaseFiles
    held: HeldTexts
    merged: Sequence[Tensor]
    prompts: tuple[tuple[Message, ...], ...]
    tokenizer: Any
    base_kl: float | None
    trained: Sequence[Tensor] | None = None

    @property
    def system(self) -> str | None:
        """Return the system message that all prompts begin with; None where they do not, or differ."""
        found = {m[0]["content"] if m[0]["role"] == "system" else None for m in self.prompts[:-1]}
        return found.pop() if len(found) == 1 else None

    @property
    def longest(self) -> int:
        return max(len(text.ids) for text in self.held.all)


@dataclass(frozen=True, slots=True)
class GgufProof:
    """The result of a proof. `row`: the distance. `greatest`: largest difference of a log-probability from the merged
    model's.

    `judged`: whether its type has a limit; else it is only reported. `faults`: why the file is refused. `rounding`:
    what rounding to its type costs the merged model, nats a token, on the task's texts and on others; None: not known.
    """

    row: Divergence
    greatest: float
    judged: bool
    faults: tuple[str, ...]
    tensors: TensorsProof
    elsewhere: Divergence | None = None
    rounding: tuple[float, ...] | None = None

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        own = {"greatest": self.greatest, "judged": self.judged, "faults": list(self.faults), "ok": self.ok}
        own["tensors"] = self.tensors.to_dict()
        own["elsewhere"] = self.elsewhere and self.elsewhere.to_dict()
        own["rounding"] = self.rounding and list(self.rounding)
        return self.row.to_dict() | own


def gguf_reference(folder: Path, run: RunDir | None) -> GgufReference:
    """Open the merged model in float32, score the held texts, and release it. Raises ModelError where memory has no
    room."""
    pick_proof_place(open_base(folder), CPU, exact=True)  # a file in 16 bits is held to what its rounding alone does
    tokenizer, task = open_tokenizer(folder), find_task(run)
    check_tokenizer(tokenizer)
    held, merged = score_held_texts(load_strictly(folder).eval(), tokenizer, run, task)
    return GgufReference(open_base(folder), held, merged, comparison_prompts(task, tokenizer), tokenizer, _base_kl(run))


def comparison_prompts(task: Task | None, tokenizer: Any, count: int = 8) -> tuple[tuple[Message, ...], ...]:
    """Return conversations whose rendered ids are compared one by one."""
    questions = tuple(tuple(prompt.messages) for prompt in prompts_of(task, "test", count)) if task else ()
    return (*questions, tuple(probe_messages(tokenizer)))


def _base_kl(run: RunDir | None) -> float | None:
    """Return the merge's measurement of base against trained policy; None where there is none."""
    stages = read_json(run.parity).get("stages", []) if run and run.parity.is_file() else []
    return next((row["mean_kl"] for row in stages if row["name"] == "base"), None)


def prove_file(file: Path, kind: str, reference: GgufReference) -> GgufProof:
    """Load the file in llama.cpp and compare it. `kind`: F16, Q8_0 and the like. Raises MinigrpoError for another
    vocabulary."""
    tensors = prove_tensors(file, reference.model)
    known = tensors.compared and not tensors.fault
    costs = explain_rounding(reference.model.folder, kind, reference.held, reference.merged) if known else None
    with LlamaCpp(file, context=reference.longest + 8) as llama:
        if llama.facts.vocabulary != reference.merged[0].shape[-1]:
            raise MinigrpoError(
                f"{file} knows {llama.facts.vocabulary} tokens and the model {reference.merged[0].shape[-1]}. It was "
                "made from another model: export again with --force"
            )
        file_logprobs = StoredLogprobs(llama.distributions(reference.held.all))
        tokens = tuple(token_faults(llama, reference.tokenizer, reference.prompts))
    limit = RELATIVE_LIMITS.get(kind) if reference.base_kl is not None else None
    compare = partial(compare_texts, f"gguf {kind}", file_logprobs)
    trained = reference.trained or reference.merged
    row, elsewhere = compare(trained, reference.held, base_kl=reference.base_kl, limit=limit)
    greatest = max(
        float((each - other).abs().max()) for each, other in zip(file_logprobs, reference.merged, strict=True)
    )
    faults = ([tensors.fault] if tensors.fault else []) + list(tokens)
    from_merged = compare(reference.merged, reference.held) if costs and reference.trained else (row, elsewhere)
    unexplained = list(_rounding_faults(from_merged, costs, kind)) if costs else []
    if unexplained:
        faults += unexplained
    elif not tensors.fault:
        faults += _distance_faults(row, greatest, kind, rounding_known=costs is not None)
        faults += _faults_elsewhere(elsewhere, kind)
    rounding = tuple(cost.mean_kl for cost in costs if cost) if costs else None
    return GgufProof(row, greatest, kind in RELATIVE_LIMITS, tuple(faults), tensors, elsewhere, rounding)


def _rounding_faults(
    rows: tuple[Divergence, Divergence | None], costs: tuple[Divergence, Divergence | None], kind: str
) -> Iterator[str]:
    """Yield a fault where a file is further from the merged model than rounding explains. `rows`: its distances."""
    for row, cost in zip(rows, costs, strict=True):
        if row is not None and cost is not None and not row.mean_kl <= max_distance(cost):
            where = "On texts of other kinds it" if cost is costs[1] else "It"
            yield (
                f"{where} is {row.mean_kl:.2g} nats a token from the merged model, and rounding to {kind} explains "
                f"{cost.mean_kl:.2g} (limit {max_distance(cost):.2g}): settings were written wrongly. Report it with "
                "the model's name."
            )
            return


def _distance_faults(row: Divergence, greatest: float, kind: str, *, rounding_known: bool) -> Iterator[str]:
    """Yield a fault where a file is too far from what was trained to be of use. `rounding_known`: it was found to be no
    further than rounding explains."""
    if greatest > MAX_LOGPROB_ERROR.get(kind, greatest):
        yield (
            f"In {kind} nothing is rounded, and yet a log-probability differs by {greatest:.2g} (limit "
            f"{MAX_LOGPROB_ERROR[kind]:g}): tensors or settings were written wrongly. Report it with the model's name."
        )
        return
    share, ceiling = row.relative_kl, MAX_KL if kind in RELATIVE_LIMITS else None
    limit = ceiling if share is not None or rounding_known else ABSOLUTE_LIMITS.get(kind)
    if limit is not None and row.mean_kl > limit:
        yield (
            f"Its distance from the merged model is {row.mean_kl:.2g} nats a token (limit {limit:g}). {_remedy(kind)}"
        )
    elif (
        share is not None and row.mean_kl > LOSSLESS_LIMITS.get(kind, 0.0) and share > RELATIVE_LIMITS.get(kind, share)
    ):
        yield (
            f"Its distance is {row.mean_kl:.2g} nats a token, {share:.2g} of what training did (limit "
            f"{RELATIVE_LIMITS[kind]:g}). {_remedy(kind)}"
        )


def _faults_elsewhere(row: Divergence | None, kind: str) -> Iterator[str]:
    if row is not None and kind in RELATIVE_LIMITS and row.mean_kl > MAX_KL:
        yield (
            f"On texts of other kinds its distance from the merged model is {row.mean_kl:.2g} nats a token (limit "
            f"{MAX_KL:g}). {_remedy(kind)}"
        )


def rows_of_proof(proof: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of a file's proof, as `GgufProof.to_dict` gives it: on the task's texts, and on others."""
    return [proof, *([proof["elsewhere"]] if proof.get("elsewhere") else [])]


def _remedy(kind: str) -> str:
    if kind == "Q8_0":
        return "Export as F16 or BF16, or train longer, so that the change is larger than the rounding."
    return "Export as F32: if that is refused, too, the model was written wrongly; if not, this type is too coarse."


def describe_texts(reference: GgufReference) -> dict[str, Any]:
    """Return the number of texts and tokens that a proof was made on, and their source."""
    held: HeldTexts = reference.held
    counts = {"texts": len(held.texts), "tokens": sum(text.scored for text in held.texts), "source": held.source}
    return counts | {"other_texts": len(held.others), "other_tokens": sum(text.scored for text in held.others)}
