"""Open everything that a run made again and compare it with the policy that was trained: one row for each stage.

    seals     every byte of the merged folder, the GGUF files and the folders for vLLM is as it was when it was proved
    tokens    rendered prompts, id by id: tokenizer, file, server
    numbers   KL(stage || trained) / KL(base || trained) on held texts, within the limit of each type

One model is open at a time. The rows found replace those of parity.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from minigrpo.delivery.artifacts.source import TrainedSource, require_merged, source_of
from minigrpo.delivery.compressed.export import sealed_rows
from minigrpo.delivery.gguf.parity import (
    RELATIVE_LIMITS,
    GgufReference,
    comparison_prompts,
    prove_file,
    rows_of_proof,
)
from minigrpo.delivery.parity.compare import (
    ParityReference,
    broken_link,
    compare_merged,
    find_task,
    merged_logprobs,
    trained_reference,
)
from minigrpo.delivery.parity.kl import Divergence, compare_distributions
from minigrpo.delivery.parity.table import parity_table, proof_title
from minigrpo.delivery.parity.texts import ScoredText
from minigrpo.delivery.parity.weights import prove_weights
from minigrpo.delivery.serve.server import ServerClient, serve_gguf
from minigrpo.errors import ArtifactError, command_line
from minigrpo.models.chat_template import render_ids, template_messages
from minigrpo.models.loading import open_tokenizer
from minigrpo.models.model_files import open_base
from minigrpo.runs.manifest import hash_files, read_sealed, write_sealed
from minigrpo.runs.rundir import RunDir, digest, read_json
from minigrpo.ui.progress import stage
from minigrpo.ui.screen import Screen
from minigrpo.utils.memory import return_freed_memory

COMPARED_PROMPTS, SERVER_PROMPTS = 200, 8
"""Number of rendered prompts whose ids are compared: with a file, and with a server."""
MAX_SERVER_LOGPROBS = 1 << 22
"""Log-probabilities requested from a server: as JSON each takes some thirty bytes."""
UNKNOWN_TYPE_LIMIT = RELATIVE_LIMITS["Q8_0"]
"""Limit of relative KL for a server whose quantization type is unknown."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The result of verify. `rows`: as in parity.json. `faults`: what is wrong and the next command, a sentence or two
    each."""

    run: Path
    rows: tuple[Mapping[str, Any], ...]
    faults: tuple[str, ...]
    texts: str

    @property
    def ok(self) -> bool:
        return not self.faults and all(row["ok"] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"run": str(self.run), "ok": self.ok}


@return_freed_memory()
def verify(path: RunDir | Path, *, serve: bool = False, served: str | None = None, quiet: bool = False) -> Verified:
    """Verify every stage of a run. `serve`: also start llama.cpp's server on the run's GGUF file and query it;
    `served`: the URL of a server that already runs.

    Whatever is beyond its limit, changed or stale is reported in the result. Raises MinigrpoError where nothing can be
    measured: no run, no base, not enough memory.
    """
    source = source_of(path)
    if source.run is None:
        raise ArtifactError(f"{path} is no run's folder, so there are no stages to verify. Give one: runs/NAME")
    base, adapter = source.open()
    run, faults = source.run, list[str]()
    files = list(sealed_files(source, faults))
    with stage("verify", 2 + len(files), Screen(stderr=True, quiet=quiet)) as report:
        report(0, 2 + len(files), "base and trained policy")
        written = open_base(run.merged) if run.merged.is_dir() and not faults else None
        reference = trained_reference(source, base, written, exact=bool(files))
        rows: list[Mapping[str, Any]] = [row.to_dict() for row in reference.base_rows]
        if written:
            report(1, 2 + len(files), "merged")
            dtype = getattr(torch, read_sealed(run.merged / "made.json")["dtype"])
            weights = prove_weights(written, base, adapter, dtype)
            measured = merged_logprobs(run.merged, reference.place, reference.held.all)
            judgement = compare_merged(measured, source, base, reference)
            rows = [row.to_dict() for row in judgement]
            faults += [_distance_fault(row, source) for row in judgement if not row.ok]
            told = (weights.fault, broken_link(measured, reference))
            faults += [f"{run.merged}: {fault}" for fault in told if fault]
            gguf = _gguf_reference(run, reference, measured)
            for count, (file, kind) in enumerate(files):
                report(2 + count, 2 + len(files), file.name)
                rows += _file_rows(file, kind, gguf, faults)
            rows += sealed_rows(run, faults)
            rows += list(_served_rows(files, gguf, faults, serve=serve, served=served))
    _replace_rows(run, rows)
    return Verified(run.path, tuple(rows), tuple(faults), reference.held.source)


def sealed_files(source: TrainedSource, faults: list[str]) -> Iterator[tuple[Path, str]]:
    """Yield GGUF files, with their types, that are unchanged since their proof and were made from the current merged
    model; add a fault for each other file."""
    run = source.run
    assert run is not None
    if not run.merged.is_dir():
        if run.gguf.is_dir():
            merge = command_line("minigrpo", "merge", run.path)
            faults.append(f"{run.merged} is missing, and GGUF files are held to it. Merge: {merge}")
        return
    try:
        require_merged(run)
    except ArtifactError as fault:
        faults.append(str(fault))
        return
    sums = hash_files(run.merged)
    seal = run.gguf / "made.json"
    known = read_sealed(seal)["files"] if seal.is_file() else {}
    for file in sorted(run.gguf.glob("*.gguf")):
        entry = known.get(file.name)
        kind = entry["format"] if entry else "Q8_0"
        again = f"Export again: {command_line('minigrpo', 'export', run.path, '--format', kind, '--force')}"
        if entry is None or digest(file) != entry["sha256"]:
            faults.append(f"{file} was put there or changed by somebody, so nothing is proved about it. {again}")
        elif entry["from"]["model"] != sums:
            faults.append(f"{file} is stale: it was made from another {run.merged}. {again}")
        else:
            yield file, entry["format"]


def _distance_fault(row: Divergence, source: TrainedSource) -> str:
    finer = command_line("minigrpo", "merge", source.named, "--dtype", "float32", "--force")
    return f"The merged model is not what was trained: {row.excess}. Merge again, in more bits: {finer}"


def _gguf_reference(run: RunDir, reference: ParityReference, merged: Sequence[Any]) -> GgufReference:
    tokenizer = open_tokenizer(run.merged)
    return GgufReference(
        *(
            open_base(run.merged),
            reference.held,
            merged,
            comparison_prompts(find_task(run), tokenizer, COMPARED_PROMPTS),
            tokenizer,
            reference.base.mean_kl,
        ),
        trained=reference.trained,
    )


def _file_rows(file: Path, kind: str, gguf: GgufReference, faults: list[str]) -> list[Mapping[str, Any]]:
    proof = prove_file(file, kind, gguf)
    faults += [f"{file}: {fault}" for fault in proof.faults]
    return rows_of_proof(proof.to_dict())


def _served_rows(
    files: list[tuple[Path, str]], gguf: GgufReference, faults: list[str], *, serve: bool, served: str | None
) -> Iterator[dict[str, Any]]:
    """Yield rows for a server of the run's own file, and for one that runs elsewhere."""
    if serve and not files:
        faults.append("There is no sound GGUF file to serve. Export one: minigrpo export RUN")
    elif serve:
        file, kind = next((each for each in files if each[1] == "Q8_0"), files[0])
        with serve_gguf(file, context=gguf.longest + 64) as server:
            yield _served_row(server, f"served {kind}", RELATIVE_LIMITS.get(kind, UNKNOWN_TYPE_LIMIT), gguf, faults)
    if served:
        yield _served_row(
            ServerClient.at(served), f"served {urlsplit(served).netloc}", UNKNOWN_TYPE_LIMIT, gguf, faults
        )


def _served_row(
    server: ServerClient, name: str, limit: float, gguf: GgufReference, faults: list[str]
) -> dict[str, Any]:
    """Compare a server's answers over HTTP with the trained policy, on up to MAX_SERVER_LOGPROBS log-probabilities."""
    references = gguf.trained or gguf.merged
    texts = list(_truncate_texts(gguf.held.texts, max(8, MAX_SERVER_LOGPROBS // references[0].shape[-1])))
    measured = [server.logprobs(text.ids[:-1], text.start - 1) for text in texts]
    fewer = [reference_NV[: text.scored] for text, reference_NV in zip(texts, references, strict=False)]
    row = compare_distributions(name, measured, fewer, base_kl=gguf.base_kl, limit=limit)
    if not row.ok:
        faults.append(
            f"{name} is {row.mean_kl:.2g} nats a token from the trained policy, beyond {limit:g} of what training did. "
            "Is it this run's model? If so, serve a finer type: minigrpo export RUN --format F16"
        )
    for messages in gguf.prompts[:SERVER_PROMPTS]:
        if server.render(template_messages(gguf.tokenizer, messages)) != render_ids(gguf.tokenizer, messages):
            faults.append(f"{name} renders a prompt as other tokens than training did: its chat template is another.")
            break
    return row.to_dict()


def _truncate_texts(texts: tuple[ScoredText, ...], room: int) -> Iterator[ScoredText]:
    for text in texts:
        count = min(text.scored, room)
        if count:
            yield replace(text, ids=text.ids[: text.start + count])
            room -= count


def _replace_rows(run: RunDir, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace all rows of parity.json: a stage that is gone loses its row."""
    then: Any = {}
    with suppress(ArtifactError):  # missing, or damaged: written anew
        then = read_json(run.parity)
    write_sealed(run.parity, {**(then if isinstance(then, dict) else {}), "stages": rows})


def verified_table(verified: Verified) -> RenderableType:
    """Show one line for each stage, then the faults and the result."""
    lines: list[RenderableType] = [parity_table(verified.rows, proof_title(verified.rows, verified.texts))]
    lines += [Text(f"fault: {fault}", style="red") for fault in verified.faults]
    style = "bold green" if verified.ok else "bold red"
    lines.append(Text(f"{'verified' if verified.ok else 'not verified'}: {verified.run}", style=style))
    return Stack(*lines)
