"""Everything that a run left, opened again and held to the policy that was trained: one row for each stage.

    seals     every byte of the merged folder and of the GGUF files is as it was when it was proved
    tokens    rendered prompts, id by id: tokenizer, file, server
    numbers   KL(stage || trained) / KL(base || trained) on held texts; within the limits of each type, the merged model

One model is open at a time. What is found replaces the rows of parity.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.text import Text

from minigrpo.delivery.artifacts.source import TrainedSource, alone, merged_of, source_of
from minigrpo.delivery.gguf.parity import RELATIVE, GgufReference, asked_of, prove_file
from minigrpo.delivery.parity.compare import Reference, device_for, judged, of_merged, task_of, trained_truth
from minigrpo.delivery.parity.kl import Divergence, compare
from minigrpo.delivery.parity.table import TITLE, parity_table
from minigrpo.delivery.parity.texts import ScoredText
from minigrpo.delivery.serve.server import ServerClient, serve_gguf
from minigrpo.errors import ArtifactError
from minigrpo.runs.manifest import hash_files, read_sealed
from minigrpo.runs.rundir import RunDir, digest, read_json, write_json
from minigrpo.ui.progress import stage

PROMPTS, ASKED = 200, 8
"""Rendered prompts whose ids are compared: with a file, and with a server."""
NUMBERS = 1 << 22
"""Log-probabilities that a server is asked for: as JSON they are some thirty bytes each."""
UNKNOWN = RELATIVE["Q8_0"]
"""The share of what training did that a server may be away whose type nobody knows."""


@dataclass(frozen=True, slots=True)
class Verified:
    """`rows`: as in parity.json. `faults`: what is wrong, and the next command, a sentence or two each."""

    run: Path
    rows: tuple[dict[str, Any], ...]
    faults: tuple[str, ...]
    texts: str

    @property
    def ok(self) -> bool:
        return not self.faults and all(row["ok"] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"run": str(self.run), "ok": self.ok}


def verify(path: RunDir | Path, *, serve: bool = False, served: str | None = None, quiet: bool = False) -> Verified:
    """`serve`: start llama.cpp's server on the run's GGUF file and ask it, too; `served`: the URL of one that runs.

    What is beyond its limit, changed or stale is told in the result. Raises MinigrpoError where nothing can be
    measured: no run, no base, no memory for either.
    """
    source = source_of(path)
    if source.run is None:
        raise ArtifactError(f"{path} is no run's folder, so there are no stages to verify. Give one: runs/NAME")
    base, _ = source.open()
    run, faults = source.run, list[str]()
    files = list(_sealed_files(source, faults))
    with stage("verify", 2 + len(files), Console(stderr=True, quiet=quiet)) as report:
        report(0, 2 + len(files), "base and trained policy")
        truth = trained_truth(source, base)
        rows: list[dict[str, Any]] = [truth.base.to_dict()]
        if run.merged.is_dir() and not faults:
            report(1, 2 + len(files), "merged")
            found = of_merged(run.merged, device_for(source, base), truth.held.texts)
            judgement = judged(found, source, base, truth)
            rows = [row.to_dict() for row in judgement]
            faults += [_too_far(row, source) for row in judgement if not row.ok]
            known = _reference(run, truth, found)
            for count, (file, kind) in enumerate(files):
                report(2 + count, 2 + len(files), file.name)
                rows.append(_file_row(file, kind, known, faults))
            rows += list(_served_rows(files, known, faults, serve=serve, served=served))
    _keep(run, rows)
    return Verified(run.path, tuple(rows), tuple(faults), truth.held.source)


def verify_alone(path: Path, **options: Any) -> Verified:
    """`verify`, with the run's folder for this process alone."""
    run = RunDir(path.expanduser())
    if not run.exists():
        return verify(run.path, **options)
    with alone(run):
        return verify(run, **options)


def _sealed_files(source: TrainedSource, faults: list[str]) -> Iterator[tuple[Path, str]]:
    """GGUF files that are as they were proved, from the merged model as it is now, and their types."""
    run = source.run
    assert run is not None
    if not run.merged.is_dir():
        if run.gguf.is_dir():
            faults.append(f"{run.merged} is missing, and GGUF files are held to it. Merge: minigrpo merge {run.path}")
        return
    try:
        merged_of(run)
    except ArtifactError as fault:
        faults.append(str(fault))
        return
    sums = hash_files(run.merged)
    seal = run.gguf / "made.json"
    known = read_sealed(seal)["files"] if seal.is_file() else {}
    for file in sorted(run.gguf.glob("*.gguf")):
        entry = known.get(file.name)
        again = f"Export again: minigrpo export {run.path} --format {entry['format'] if entry else 'Q8_0'} --force"
        if entry is None or digest(file) != entry["sha256"]:
            faults.append(f"{file} was put there or changed by somebody, so nothing is proved about it. {again}")
        elif entry["from"]["model"] != sums:
            faults.append(f"{file} is stale: it was made from another {run.merged}. {again}")
        else:
            yield file, entry["format"]


def _too_far(row: Divergence, source: TrainedSource) -> str:
    return (
        f"The merged model is {row.mean_kl:.2g} nats a token from the trained policy, beyond {row.limit:g} of what "
        f"training did. Merge again, in more bits: minigrpo merge {source.command} --dtype float32 --force"
    )


def _reference(run: RunDir, truth: Reference, merged: tuple[Any, ...]) -> GgufReference:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    return GgufReference(
        *(truth.held, merged, asked_of(task_of(run), PROMPTS), tokenizer, truth.base.mean_kl), trained=truth.trained
    )


def _file_row(file: Path, kind: str, known: GgufReference, faults: list[str]) -> dict[str, Any]:
    proof = prove_file(file, kind, known)
    faults += [f"{file}: {fault}" for fault in proof.faults]
    return proof.to_dict()


def _served_rows(
    files: list[tuple[Path, str]], known: GgufReference, faults: list[str], *, serve: bool, served: str | None
) -> Iterator[dict[str, Any]]:
    """Of a server of the run's own file, and of one that runs elsewhere."""
    if serve and not files:
        faults.append("There is no sound GGUF file to serve. Export one: minigrpo export RUN")
    elif serve:
        file, kind = next((each for each in files if each[1] == "Q8_0"), files[0])
        with serve_gguf(file, context=known.longest + 64) as server:
            yield _served_row(server, f"served {kind}", RELATIVE.get(kind, UNKNOWN), known, faults)
    if served:
        yield _served_row(ServerClient.at(served), f"served {urlsplit(served).netloc}", UNKNOWN, known, faults)


def _served_row(
    server: ServerClient, name: str, limit: float, known: GgufReference, faults: list[str]
) -> dict[str, Any]:
    """What comes back over HTTP against the trained policy, on as many positions as are bearable."""
    truths = known.trained or known.merged
    texts = list(_shorter(known.held.texts, max(8, NUMBERS // truths[0].shape[-1])))
    found = [server.logprobs(text.ids[:-1], text.start - 1) for text in texts]
    fewer = [truth_NV[: text.scored] for text, truth_NV in zip(texts, truths, strict=False)]
    row = compare(name, found, fewer, base_kl=known.base_kl, limit=limit)
    if not row.ok:
        faults.append(
            f"{name} is {row.mean_kl:.2g} nats a token from the trained policy, beyond {limit:g} of what training did. "
            "Is it this run's model? If so, serve a finer type: minigrpo export RUN --format F16"
        )
    for messages in known.prompts[:ASKED]:
        whole = known.tokenizer.apply_chat_template([*messages], add_generation_prompt=True, return_dict=True)
        if server.rendered(messages) != tuple(whole["input_ids"]):
            faults.append(f"{name} renders a prompt as other tokens than training did: its chat template is another.")
            break
    return row.to_dict()


def _shorter(texts: tuple[ScoredText, ...], room: int) -> Iterator[ScoredText]:
    for text in texts:
        count = min(text.scored, room)
        if count:
            yield replace(text, ids=text.ids[: text.start + count])
            room -= count


def _keep(run: RunDir, rows: list[dict[str, Any]]) -> None:
    """In the place of all rows that were there: what is gone since is no stage any more."""
    then: Any = {}
    with suppress(ArtifactError):  # missing, or damaged and made anew
        then = read_json(run.parity)
    write_json(run.parity, {**(then if isinstance(then, dict) else {}), "stages": rows})


def verified_table(found: Verified) -> RenderableType:
    """One line for each stage, what is wrong, and the verdict."""
    first = found.rows[0]
    lines: list[RenderableType] = [
        parity_table(found.rows, f"{TITLE}: {first['tokens']} tokens of {first['texts']} {found.texts}")
    ]
    lines += [Text(f"fault: {fault}", style="red") for fault in found.faults]
    style = "bold green" if found.ok else "bold red"
    lines.append(Text(f"{'verified' if found.ok else 'not verified'}: {found.run}", style=style))
    return Stack(*lines)
