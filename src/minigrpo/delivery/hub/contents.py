"""What goes into which repository: only files that are proved, a card, and the marks by which a publication is known.

    USER/NAME       the merged model, as it was sealed
    USER/NAME-lora  the adapter, which was checked or merged as it is now; its base by its public name, or by none
    USER/NAME-GGUF  the GGUF files that were proved from that merged model, and their Modelfiles

minigrpo.json names the run, every file with its SHA-256 and all proofs as numbers. Nothing that looks like a secret is
taken, and no path of this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from minigrpo.delivery.artifacts.source import merged_of
from minigrpo.delivery.hub.client import Item, item
from minigrpo.delivery.hub.model_card import card, facts_of, hub_name
from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.models.model_files import compatible_tokenizer_config
from minigrpo.runs.manifest import hash_files, read_sealed
from minigrpo.runs.rundir import RunDir, digest, read_json
from minigrpo.versions import this_version

What = Literal["merged", "adapter", "gguf", "folder"]
KINDS: tuple[What, ...] = get_args(What)[:3]
There = Callable[[str, Mapping[str, str]], bool]
SUFFIX: dict[str, str] = {"merged": "", "adapter": "-lora", "gguf": "-GGUF", "folder": ""}
MARK = "minigrpo.json"
LEFT_OUT = (".git", ".cache", "__pycache__", ".ipynb_checkpoints")
"""Folders that are not of the model: git's own, the Hub client's, editors'."""
SECRET_FILES = re.compile(
    r"\.env(\..+)?|\.netrc|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519)|token|stored_tokens|.+\.pem"
)
SECRET_WORDS = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----")
TEXT = 8 << 20
"""Bytes up to which a file is searched for secrets: larger ones are weights."""


@dataclass(frozen=True, slots=True)
class RepoContents:
    """The whole content of one repository. `origin`: what it is known by when it is published again."""

    what: What
    repo: str
    items: tuple[Item, ...]
    origin: dict[str, str]
    remarks: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(each.size for each in self.items)


def contents_of_run(run: RunDir, repo: str, what: Sequence[str], there: There | None) -> list[RepoContents]:
    """Raises ArtifactError where what is asked for is missing, stale or changed.

    `there`: whether a repository is there already, published from the same origin, so that pages name it; None: no
    network, and no licence is looked up either.
    """
    if not run.exists():
        raise ArtifactError(f"{run.path} is no run. To publish any folder as it is: --folder {run.path}")
    if unknown := [name for name in what if name not in KINDS]:
        raise MinigrpoError(f"--what {unknown[0]} is not known. There are: {', '.join(KINDS)}")
    kinds = [kind for kind in KINDS if kind in what] if what else _there(run)
    if not kinds:
        raise ArtifactError(f"{run.path} has nothing to publish yet. Merge first: minigrpo merge {run.path}")
    contents = {kind: CONTENTS[kind](run) for kind in kinds}
    origin = {"run": run.path.absolute().name, "begun": digest(run.made if run.made.is_file() else run.recipe)}
    others = [
        kind for kind in KINDS if there and kind not in kinds and there(repo + SUFFIX[kind], {**origin, "what": kind})
    ]
    repos: dict[str, str] = {kind: repo + SUFFIX[kind] for kind in KINDS if kind in (*kinds, *others)}
    facts = facts_of(run, repos, online=there is not None)
    found = []
    for kind, items in contents.items():
        readme = item("README.md", card(facts, kind).encode())
        proofs = {"stages": facts.stages, "versions": facts.versions}
        items = (*(each for each in items if each.name != "README.md"), *_licences(run, items), readme)
        mark: dict[str, Any] = {"minigrpo": this_version(), "origin": {**origin, "what": kind}, **proofs}
        mark["files"] = {each.name: each.sha256 for each in items}
        whole = (*items, item(MARK, (json.dumps(mark, indent=2, ensure_ascii=False) + "\n").encode()))
        parcel = RepoContents(kind, repos[kind], whole, {**origin, "what": kind}, facts.remarks)
        refuse_secrets(parcel)
        found.append(parcel)
    return found


def _there(run: RunDir) -> list[What]:
    """All that a run has made. An adapter that nothing proves is not among it."""
    there: dict[What, bool] = {
        "merged": run.merged.is_dir(),
        "adapter": run.adapter.is_dir(),
        "gguf": (run.gguf / "made.json").is_file(),
    }
    return [kind for kind, exists in there.items() if exists]


def _merged(run: RunDir) -> tuple[Item, ...]:
    folder = merged_of(run)  # reads every byte
    sums = read_sealed(folder / "made.json")["sha256"]
    return tuple(Item(name, folder / name, (folder / name).stat().st_size, sums[name]) for name in sorted(sums))


def _adapter(run: RunDir) -> tuple[Item, ...]:
    if not run.adapter.is_dir():
        raise ArtifactError(
            f"{run.adapter} is missing. Train first: minigrpo train {run.recipe} --run {run.path} --resume"
        )
    now = digest(run.adapter)
    checked = read_json(run.check) if run.check.is_file() else {}
    if checked.get("made", {}).get("from", {}).get("adapter") == now and not checked["ok"]:
        raise ArtifactError(f"{run.adapter} did not pass its check. What is wrong: minigrpo check {run.path}")
    sealed = read_sealed(run.merged / "made.json") if (run.merged / "made.json").is_file() else {}
    if now not in (each.get("made", {}).get("from", {}).get("adapter") for each in (checked, sealed)):
        raise ArtifactError(
            f"{run.adapter} is not as it was when it was checked or merged, or it never was. Check it: minigrpo check "
            f"{run.path}"
        )
    files = [file for file in sorted(run.adapter.iterdir()) if file.is_file() and not file.name.startswith(".")]
    kept = [file for file in files if file.name != "made.json"]
    return tuple(item(file.name, PUBLIC[file.name](file) if file.name in PUBLIC else file) for file in kept)


def _public(file: Path) -> Path | bytes:
    """The adapter's config without a base that lies on this machine: nobody else has that path."""
    config = read_json(file)
    base = config.get("base_model_name_or_path")
    if not base or hub_name(base):
        return file
    return (json.dumps(config | {"base_model_name_or_path": None}, indent=2) + "\n").encode()


def _readable(file: Path) -> Path | bytes:
    """The tokenizer's config so that transformers 4 reads it, too, as it does that of a merged model."""
    config = read_json(file)
    found = compatible_tokenizer_config(config)
    return file if found == config else (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()


PUBLIC: dict[str, Callable[[Path], Path | bytes]] = {
    "adapter_config.json": _public,
    "tokenizer_config.json": _readable,
}
"""Files of an adapter that are written anew where they go."""


def _gguf(run: RunDir) -> tuple[Item, ...]:
    made = run.gguf / "made.json"
    again = f"Export again: minigrpo export {run.path}"
    if not made.is_file():
        raise ArtifactError(f"{run.gguf} holds no proved files. Export first: minigrpo export {run.path}")
    sums, items = hash_files(merged_of(run)), list[Item]()
    for name, entry in read_sealed(made)["files"].items():
        file = run.gguf / name
        if not file.is_file():
            continue  # taken away by its owner
        if entry["from"]["model"] != sums:
            raise ArtifactError(f"{file} was made from another merged model. {again} --format {entry['format']}")
        items.append(item(name, file))
        if items[-1].sha256 != entry["sha256"]:
            raise ArtifactError(f"{file} was changed after it was proved. {again} --format {entry['format']} --force")
        recipe = file.with_suffix(".Modelfile")
        items += [item(recipe.name, recipe)] if recipe.is_file() else []
    if not items:
        raise ArtifactError(f"{run.gguf} holds no proved files. {again}")
    return tuple(items)


def _licences(run: RunDir, items: Sequence[Item]) -> Iterator[Item]:
    """The base's licence goes wherever its weights go."""
    names = {each.name for each in items}
    for file in sorted(file for kind in ("LICENSE*", "NOTICE*") for file in run.merged.glob(kind)):
        if file.name not in names:
            yield item(file.name, file)


CONTENTS = {"merged": _merged, "adapter": _adapter, "gguf": _gguf}


def contents_of_folder(folder: Path, repo: str) -> RepoContents:
    """Any folder, as it is. Raises MinigrpoError for files that look like secrets."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder. To publish one: --folder DIR")
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    ours = {name: file for name, file in files.items() if not set(Path(name).parts[:-1]) & set(LEFT_OUT)}
    if not ours:
        raise ArtifactError(f"{folder} holds no files.")
    left = len(files) - len(ours)
    remarks = (f"{left} files of {', '.join(LEFT_OUT)} are left out.",) if left else ()
    parcel = RepoContents("folder", repo, (), {"what": "folder"}, remarks)
    for name in ours:
        if SECRET_FILES.fullmatch(Path(name).name):
            raise MinigrpoError(f"{folder / name} looks like a secret. Nothing was sent. Move it out of the folder.")
    parcel = replace(parcel, items=tuple(item(name, file) for name, file in ours.items()))
    refuse_secrets(parcel)
    return parcel


def refuse_secrets(parcel: RepoContents, token: str = "") -> None:
    """Raises MinigrpoError where a file holds this token, or what looks like one or like a private key."""
    for each, data in _texts(parcel):
        if (token and token.encode() in data) or SECRET_WORDS.search(data):
            where = each.content if isinstance(each.content, Path) else f"{each.name} (made from the run's files)"
            raise MinigrpoError(f"{where} holds an access token or a private key. Nothing was sent. Take it out.")


def _texts(parcel: RepoContents) -> Iterator[tuple[Item, bytes]]:
    for each in parcel.items:
        if each.size <= TEXT:
            yield each, each.content if isinstance(each.content, bytes) else each.content.read_bytes()


def mark_of(data: bytes) -> dict[str, Any]:
    """What minigrpo.json of a repository says; {} where it is no such file."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    fits = isinstance(found, dict) and isinstance(found.get("origin"), dict) and isinstance(found.get("files"), dict)
    return found if fits else {}
