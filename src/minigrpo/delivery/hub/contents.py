"""Choose what goes into which repository: proved files only, a model card, and a mark that identifies the publication.

    USER/NAME       the merged model, as it was sealed
    USER/NAME-lora  the adapter, as it was checked or merged; its base by its public name, or unnamed
    USER/NAME-GGUF  the GGUF files that were proved from that merged model, and their Modelfiles
    USER/NAME-run   on request, all that an audit of the run needs (hub/run_files.py)

minigrpo.json names the run, every file with its SHA-256, and all proofs as numbers. Nothing that looks like a secret is
taken, and no path of this machine but where its owner agrees.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from minigrpo.delivery.artifacts.source import require_merged
from minigrpo.delivery.hub.client import RepoFile, repo_file
from minigrpo.delivery.hub.model_card import CURVE_FILE, NO_LICENCE, card_facts, card_metadata, hub_name, render_card
from minigrpo.delivery.hub.page import merge_pages, parse_header, split_page
from minigrpo.delivery.hub.reward_svg import render_reward_svg
from minigrpo.delivery.hub.run_files import audit_files, remarks_on
from minigrpo.errors import ArtifactError, MinigrpoError, command_line
from minigrpo.models.model_files import compatible_tokenizer_config
from minigrpo.runs.manifest import hash_files, read_sealed
from minigrpo.runs.rundir import RunDir, digest, read_json
from minigrpo.versions import this_version

RepoKind = Literal["merged", "adapter", "gguf", "run", "folder"]
RUN_KINDS: tuple[RepoKind, ...] = get_args(RepoKind)[:4]
MODEL_KINDS: tuple[RepoKind, ...] = RUN_KINDS[:3]
IsPublished = Callable[[str, Mapping[str, str]], bool]
REPO_SUFFIX: dict[str, str] = {"merged": "", "adapter": "-lora", "gguf": "-GGUF", "run": "-run", "folder": ""}
MARK_FILE = "minigrpo.json"
PAGE_FILE = "README.md"
IGNORED_FOLDERS = (".git", ".cache", "__pycache__", ".ipynb_checkpoints")
"""Folders that do not belong to the model: git's own, the Hub client's, editors'."""
SECRET_FILES = re.compile(
    r"\.env(\..+)?|\.netrc|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519)|token|stored_tokens|.+\.pem"
)
SECRET_WORDS = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----")
MAX_SCANNED_BYTES = 8 << 20
"""Size up to which a file is searched for secrets: larger ones are weights, unless they are TEXT_FILES."""
TEXT_FILES = (".jsonl", ".json", ".yaml", ".yml", ".toml", ".csv", ".tsv", ".txt", ".md", ".py", ".jinja")
LONGEST_SECRET = 4096
"""Bytes by which pieces of a large file overlap."""


@dataclass(frozen=True, slots=True)
class RepoContents:
    """The whole content of one repository. `origin`: identifies the publication when it is published again. `mark`:
    what minigrpo.json says besides the files. `licence_is_set`: the user names it."""

    what: RepoKind
    repo: str
    items: tuple[RepoFile, ...]
    origin: dict[str, str]
    remarks: tuple[str, ...] = ()
    mark: Mapping[str, Any] = field(default_factory=dict)
    licence_is_set: bool = False

    @property
    def size(self) -> int:
        return sum(each.size for each in self.items)

    def with_page(self, text: str, remarks: Sequence[str] = ()) -> RepoContents:
        """Return the contents with this page, and with a mark that names it."""
        others = [each for each in self.items if each.name not in (PAGE_FILE, MARK_FILE)]
        items = (*others, repo_file(PAGE_FILE, text.encode()))
        mark = {**self.mark, "files": {each.name: each.sha256 for each in items}}
        whole = (*items, repo_file(MARK_FILE, (json.dumps(mark, indent=2, ensure_ascii=False) + "\n").encode()))
        return replace(self, items=whole, remarks=(*self.remarks, *remarks))

    def with_published_page(self, page: bytes, mark: Mapping[str, Any]) -> RepoContents:
        """Return the contents with what the owner of the published page added to it. `mark`: the repository's
        minigrpo.json, {} where it has none."""
        own = next(each.content for each in self.items if each.name == PAGE_FILE)
        assert isinstance(own, bytes)
        theirs = page.decode("utf-8", errors="replace")
        if not split_page(theirs).block and mark.get("files", {}).get(PAGE_FILE) == hashlib.sha256(page).hexdigest():
            return self  # an earlier version wrote it, without marks, and nobody changed it
        written = mark.get("front_matter")
        known = written if isinstance(written, dict) else {}
        text, notes = merge_pages(own.decode(), theirs, known, licence_is_set=self.licence_is_set)
        remarks = self.remarks
        if (parse_header(split_page(text).header) or {}).get("license"):
            remarks = tuple(remark for remark in remarks if remark != NO_LICENCE)
        return replace(self, remarks=remarks).with_page(text, [f"{self.repo}: {note}" for note in notes])


def run_contents(
    run: RunDir,
    repo: str,
    what: Sequence[str],
    there: IsPublished | None,
    licence: str | None = None,
    *,
    with_run: bool = False,
) -> list[RepoContents]:
    """Collect the repositories of a run. Raises ArtifactError where something requested is missing, stale or changed.

    `there`: tells whether a repository was already published from the same origin, so that model cards link to it;
    None: without a network, and no licence is looked up either. `licence`: an ID for the pages; None: the recipe's
    publish.license, else the base's. `with_run`: also all that an audit needs.
    """
    if not run.exists():
        as_it_is = command_line("--folder", run.path)
        raise ArtifactError(f"{run.path} is no run. To publish any folder as it is: {as_it_is}")
    if unknown := [name for name in what if name not in MODEL_KINDS]:
        raise MinigrpoError(f"--what {unknown[0]} is not known. There are: {', '.join(MODEL_KINDS)}")
    kinds = [kind for kind in MODEL_KINDS if kind in what] if what else _available_kinds(run)
    if not kinds:
        merge = command_line("minigrpo", "merge", run.path)
        raise ArtifactError(f"{run.path} has nothing to publish yet. Merge first: {merge}")
    kinds += ["run"] if with_run else []
    contents = {kind: FILE_COLLECTORS[kind](run) for kind in kinds}
    origin = {"run": run.path.absolute().name, "begun": digest(run.made if run.made.is_file() else run.recipe)}
    others = [
        kind
        for kind in RUN_KINDS
        if there and kind not in kinds and there(repo + REPO_SUFFIX[kind], {**origin, "what": kind})
    ]
    repos: dict[str, str] = {kind: repo + REPO_SUFFIX[kind] for kind in RUN_KINDS if kind in (*kinds, *others)}
    facts = card_facts(run, repos, online=there is not None, licence=licence)
    curve = [repo_file(CURVE_FILE, render_reward_svg(facts.rewards).encode())] if facts.rewards else []
    found = []
    for kind, items in contents.items():
        whole = (*items, *_licence_files(run, items), *curve)
        mark: dict[str, Any] = {"minigrpo": this_version(), "origin": {**origin, "what": kind}}
        mark |= {"stages": facts.stages, "versions": facts.versions, "front_matter": card_metadata(facts, kind)}
        remarks = (*facts.remarks, *(remarks_on(run) if kind == "run" else ()))
        repo_contents = RepoContents(kind, repos[kind], whole, mark["origin"], remarks, mark, facts.licence_is_set)
        repo_contents = repo_contents.with_page(render_card(facts, kind), _local_page_remarks(run, kind))
        refuse_secrets(repo_contents)
        found.append(repo_contents)
    return found


def _local_page_remarks(run: RunDir, kind: RepoKind) -> tuple[str, ...]:
    """Say that a page which the user wrote beside the adapter or the GGUF files is not published. (Beside the merged
    model it would break the seal, and is refused.)"""
    page = {"merged": run.merged, "adapter": run.adapter, "gguf": run.gguf}.get(kind, run.path) / PAGE_FILE
    if kind == "run" or not page.is_file():
        return ()
    return (f"{page} stays here. Write into the page on the Hub instead: what you add there is kept.",)


def _available_kinds(run: RunDir) -> list[RepoKind]:
    """Return the kinds of artefact that the run has made."""
    there: dict[RepoKind, bool] = {
        "merged": run.merged.is_dir(),
        "adapter": run.adapter.is_dir(),
        "gguf": (run.gguf / "made.json").is_file(),
    }
    return [kind for kind, exists in there.items() if exists]


def _merged_files(run: RunDir) -> tuple[RepoFile, ...]:
    folder = require_merged(run)  # compares every byte
    sums = read_sealed(folder / "made.json")["sha256"]
    return tuple(RepoFile(name, folder / name, (folder / name).stat().st_size, sums[name]) for name in sorted(sums))


def _adapter_files(run: RunDir) -> tuple[RepoFile, ...]:
    if not run.adapter.is_dir():
        train = command_line("minigrpo", "train", run.recipe, "--run", run.path, "--resume")
        raise ArtifactError(f"{run.adapter} is missing. Train first: {train}")
    check = command_line("minigrpo", "check", run.path)
    now = digest(run.adapter)
    checked = read_json(run.check) if run.check.is_file() else {}
    if checked.get("made", {}).get("from", {}).get("adapter") == now and not checked["ok"]:
        raise ArtifactError(f"{run.adapter} did not pass its check. What is wrong: {check}")
    sealed = read_sealed(run.merged / "made.json") if (run.merged / "made.json").is_file() else {}
    if now not in (each.get("made", {}).get("from", {}).get("adapter") for each in (checked, sealed)):
        raise ArtifactError(
            f"{run.adapter} is not as it was when it was checked or merged, or it never was. Check it: {check}"
        )
    files = [file for file in sorted(run.adapter.iterdir()) if file.is_file() and not file.name.startswith(".")]
    kept = [file for file in files if file.name != "made.json"]
    return tuple(
        repo_file(file.name, REWRITTEN_FILES[file.name](file) if file.name in REWRITTEN_FILES else file)
        for file in kept
    )


def _without_local_base(file: Path) -> Path | bytes:
    """Return the adapter's config without a base that is a path of this machine, which nobody else has."""
    config = read_json(file)
    base = config.get("base_model_name_or_path")
    if not base or hub_name(base):
        return file
    return (json.dumps(config | {"base_model_name_or_path": None}, indent=2) + "\n").encode()


def _with_portable_tokens(file: Path) -> Path | bytes:
    """Return the tokenizer's config in a form that transformers 4 reads, too, as for a merged model."""
    config = read_json(file)
    found = compatible_tokenizer_config(config)
    return file if found == config else (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()


REWRITTEN_FILES: dict[str, Callable[[Path], Path | bytes]] = {
    "adapter_config.json": _without_local_base,
    "tokenizer_config.json": _with_portable_tokens,
}
"""Files of an adapter that are rewritten for the Hub."""


def _gguf_files(run: RunDir) -> tuple[RepoFile, ...]:
    made = run.gguf / "made.json"
    words = ("minigrpo", "export", run.path)
    if not made.is_file():
        raise ArtifactError(f"{run.gguf} holds no proved files. Export first: {command_line(*words)}")
    sums, items = hash_files(require_merged(run)), list[RepoFile]()
    for name, entry in read_sealed(made)["files"].items():
        file = run.gguf / name
        if not file.is_file():
            continue  # removed by its owner
        if entry["from"]["model"] != sums:
            again = command_line(*words, "--format", entry["format"])
            raise ArtifactError(f"{file} was made from another merged model. Export again: {again}")
        items.append(repo_file(name, file))
        if items[-1].sha256 != entry["sha256"]:
            again = command_line(*words, "--format", entry["format"], "--force")
            raise ArtifactError(f"{file} was changed after it was proved. Export again: {again}")
        recipe = file.with_suffix(".Modelfile")
        items += [repo_file(recipe.name, recipe)] if recipe.is_file() else []
    if not items:
        raise ArtifactError(f"{run.gguf} holds no proved files. Export again: {command_line(*words)}")
    recipes = [each.content for each in items if isinstance(each.content, Path) and each.name.endswith(".Modelfile")]
    texts = ollama_files(recipes[0].read_text(encoding="utf-8")) if recipes else {}
    return (*items, *(repo_file(name, text.encode()) for name, text in texts.items()))


def ollama_files(modelfile: str) -> dict[str, str]:
    """Return the files that Ollama looks for in a repository of the Hub, which has no Modelfile for it: template,
    system, params, each only where the Modelfile says it."""
    found = {}
    for name in ("template", "system"):
        if text := re.search(rf'^{name.upper()} """(.*?)"""$', modelfile, re.DOTALL | re.MULTILINE):
            found[name] = text[1]
    params: dict[str, Any] = {}
    for name, value in re.findall(r"^PARAMETER (\w+) (.+)$", modelfile, re.MULTILINE):
        if name == "stop":
            params.setdefault(name, []).append(json.loads(value))
        else:
            params[name] = json.loads(value)
    return found | ({"params": json.dumps(params, ensure_ascii=False) + "\n"} if params else {})


def _licence_files(run: RunDir, items: Sequence[RepoFile]) -> Iterator[RepoFile]:
    """Yield the base's licence, which accompanies its weights everywhere."""
    names = {each.name for each in items}
    for file in sorted(file for kind in ("LICENSE*", "NOTICE*") for file in run.merged.glob(kind)):
        if file.name not in names:
            yield repo_file(file.name, file)


FILE_COLLECTORS = {"merged": _merged_files, "adapter": _adapter_files, "gguf": _gguf_files, "run": audit_files}


def folder_contents(folder: Path, repo: str) -> RepoContents:
    """Collect any folder as it is. Raises MinigrpoError for files that look like secrets."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder. To publish one: --folder DIR")
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    ours = {name: file for name, file in files.items() if not set(Path(name).parts[:-1]) & set(IGNORED_FOLDERS)}
    if not ours:
        raise ArtifactError(f"{folder} holds no files.")
    left = len(files) - len(ours)
    remarks = (f"{left} files of {', '.join(IGNORED_FOLDERS)} are left out.",) if left else ()
    repo_contents = RepoContents("folder", repo, (), {"what": "folder"}, remarks)
    for name in ours:
        if SECRET_FILES.fullmatch(Path(name).name):
            raise MinigrpoError(f"{folder / name} looks like a secret. Nothing was sent. Move it out of the folder.")
    repo_contents = replace(repo_contents, items=tuple(repo_file(name, file) for name, file in ours.items()))
    refuse_secrets(repo_contents)
    return repo_contents


def refuse_secrets(repo_contents: RepoContents, token: str = "") -> None:
    """Raise MinigrpoError where a file holds this token, or what looks like a token or a private key."""
    for each in repo_contents.items:
        if any((token and token.encode() in data) or SECRET_WORDS.search(data) for data in _scanned(each)):
            where = each.content if isinstance(each.content, Path) else f"{each.name} (made from the run's files)"
            raise MinigrpoError(f"{where} holds an access token or a private key. Nothing was sent. Take it out.")


def _scanned(file: RepoFile) -> Iterator[bytes]:
    """Yield a file in pieces that overlap; nothing of a large one that is no text."""
    if isinstance(file.content, bytes):
        yield file.content
    elif file.size <= MAX_SCANNED_BYTES or file.content.suffix in TEXT_FILES:
        with file.content.open("rb") as stream:
            begun = b""
            while block := stream.read(MAX_SCANNED_BYTES):
                yield begun + block
                begun = block[-LONGEST_SECRET:]


def parse_mark(data: bytes) -> dict[str, Any]:
    """Return the content of a repository's minigrpo.json; {} where it is not valid."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    fits = isinstance(found, dict) and isinstance(found.get("origin"), dict) and isinstance(found.get("files"), dict)
    return found if fits else {}
