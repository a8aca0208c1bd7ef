"""Publish a run's models on the Hugging Face Hub: resumable, with each repository compared with the local files.

collect   proved files only, each repository with its card (hub/contents.py)
inspect   check the token and what exists: a repository with other content is refused before a byte is sent; what
          somebody added to a page by hand is taken over (hub/page.py)
send      large files one by one, then one commit: after an interruption the same command sends only what is missing
compare   every file of the repository, size and hash; on request downloaded again, byte for byte
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from minigrpo.config.schema import LICENCE_ID
from minigrpo.delivery.hub.client import (
    Hub,
    RemoteFile,
    RepoFile,
    RepoState,
    UploadReport,
    check_repo_name,
    find_token,
    format_bytes,
)
from minigrpo.delivery.hub.contents import (
    MARK_FILE,
    PAGE_FILE,
    REPO_SUFFIX,
    RepoContents,
    folder_contents,
    parse_mark,
    refuse_secrets,
    run_contents,
)
from minigrpo.delivery.hub.local_paths import refuse_local_paths
from minigrpo.delivery.hub.run_files import sizes_by_part
from minigrpo.errors import MinigrpoError, command_line
from minigrpo.runs.rundir import RunDir, digest
from minigrpo.ui.progress import stage
from minigrpo.ui.screen import Screen
from minigrpo.ui.tables import plain_table, titled
from minigrpo.utils.paths import user_path

PublishVerdict = Literal["published", "there already", "would be published"]
HUB_OWN_FILES = (".gitattributes",)
"""Files that the Hub itself puts into a new repository."""


@dataclass(frozen=True, slots=True)
class PublishedRepo:
    """One repository. `files`: sizes by name. `fetched`: the folder it was downloaded to and found identical in."""

    repo: str
    what: str
    verdict: PublishVerdict
    private: bool
    files: dict[str, int]
    address: str = ""
    commit: str = ""
    fetched: Path | None = None
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        names = ("repo", "what", "verdict", "private", "files", "address", "commit", "remarks")
        return {name: getattr(self, name) for name in names} | {"fetched": str(self.fetched) if self.fetched else None}


@dataclass(frozen=True, slots=True)
class Published:
    """The result of publishing: one entry for each repository."""

    sent: tuple[PublishedRepo, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"repositories": [each.to_dict() for each in self.sent]}


@dataclass(frozen=True, slots=True)
class PublishJob:
    """How to publish. `command`: what the user calls to begin again or go on. `with_paths`: a run's files may name
    places of this machine."""

    command: str
    private: bool
    dry_run: bool
    fetch: bool
    force: bool
    message: str
    quiet: bool
    with_paths: bool = False


def publish(
    run: RunDir | Path,
    repo: str,
    *,
    what: Sequence[str] = (),
    with_run: bool = False,
    with_paths: bool = False,
    licence: str | None = None,
    private: bool = True,
    dry_run: bool = False,
    fetch: bool = False,
    force: bool = False,
    message: str | None = None,
    quiet: bool = False,
) -> Published:
    """Publish what a run has made: merged, adapter, gguf; everything that exists where `what` is empty.

    `with_run`: also its logs, checkpoints and seals, by which others can audit it; `with_paths`: although these files
    name places of this machine.
    `licence`: the Hub's ID for it, in place of the recipe's publish.license. `fetch`: download it again into the Hub's
    cache and compare. `force`: replace what a repository holds. `dry_run`: only report what would go where, without a
    network. Raises MinigrpoError; the same command then goes on.
    """
    run = run if isinstance(run, RunDir) else RunDir(user_path(run))
    _check_licence(licence)
    words = [*(word for each in what for word in ("--what", each)), *(["--license", licence] if licence else [])]
    words += ["--with-run"] * with_run + ["--with-paths"] * with_paths
    command = _command([run.path, *words], repo, private, force)
    name = message or f"{run.path.absolute().name}"
    job = PublishJob(command, private, dry_run, fetch, force, name, quiet, with_paths)
    for kind in what or REPO_SUFFIX:
        check_repo_name(repo + REPO_SUFFIX.get(kind, ""))

    def is_published(repo: str, origin: Mapping[str, str]) -> bool:
        hub = Hub(*find_token(), command)
        state = hub.repo_state(repo)
        return state is not None and _read_mark(hub, repo, state).get("origin") == origin

    return _publish(run_contents(run, repo, what, None if dry_run else is_published, licence, with_run=with_run), job)


def publish_folder(
    folder: Path,
    repo: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    fetch: bool = False,
    force: bool = False,
    message: str | None = None,
    quiet: bool = False,
) -> Published:
    """Publish any folder as it is; the options are those of `publish`."""
    folder = user_path(folder)
    command = _command(["--folder", folder], repo, private, force)
    job = PublishJob(command, private, dry_run, fetch, force, message or folder.absolute().name, quiet)
    check_repo_name(repo)
    return _publish([folder_contents(folder, repo)], job)


def _check_licence(licence: str | None) -> None:
    if licence is not None and not re.fullmatch(LICENCE_ID, licence):
        raise MinigrpoError(
            f"--license {licence!r} is no ID of the Hub's. It is small letters and digits, such as apache-2.0 or mit: "
            "https://huggingface.co/docs/hub/repositories-licenses"
        )


def _command(first: Sequence[object], repo: str, private: bool, force: bool) -> str:
    marks = [*([] if private else ["--public"]), *(["--force"] if force else [])]
    return command_line("minigrpo", "publish", *first, "--repo", repo, *marks)


def _publish(repos: Sequence[RepoContents], job: PublishJob) -> Published:
    for contents in repos:
        if contents.what == "run":
            if not job.with_paths:
                refuse_local_paths(contents.items, job.command)
            size = f"{contents.repo}: {len(contents.items)} files, {format_bytes(contents.size)}"
            Screen(stderr=True, quiet=job.quiet).show(Text(f"{size}: {sizes_by_part(contents.items)}"))
    if job.dry_run:
        return Published(tuple(_describe_repo(contents, job, "would be published") for contents in repos))
    hub = Hub(*find_token(), job.command)
    for contents in repos:
        refuse_secrets(contents, hub.token)
    hub.whoami()
    states = [hub.repo_state(contents.repo) for contents in repos]
    plans = [_names_to_remove(hub, *pair, job) for pair in zip(repos, states, strict=True)]
    repos = [_with_published_page(hub, *pair) for pair in zip(repos, states, strict=True)]
    sent = []
    for contents, state, removed in zip(repos, states, plans, strict=True):
        sent.append(_send(hub, contents, state, removed=removed, job=job))
    return Published(tuple(sent))


def _describe_repo(contents: RepoContents, job: PublishJob, verdict: PublishVerdict, **facts: Any) -> PublishedRepo:
    files = {each.name: each.size for each in contents.items}
    facts = {"remarks": contents.remarks, "private": job.private, **facts}
    return PublishedRepo(contents.repo, contents.what, verdict, files=files, **facts)


def _names_to_remove(hub: Hub, contents: RepoContents, state: RepoState | None, job: PublishJob) -> list[str]:
    """Return the names of files to remove. Raises MinigrpoError where the repository holds something else, or is
    less private than requested."""
    there = {name: file for name, file in (state.files if state else {}).items() if name not in HUB_OWN_FILES}
    if state and job.private and not state.private:
        raise MinigrpoError(
            f"{contents.repo} is there and public. Make it private at {hub.url(contents.repo)}/settings, or publish "
            f"for everybody: {job.command} --public"
        )
    ours = {each.name: each for each in contents.items}
    if not there or state is None:
        return []
    mark = _read_mark(hub, contents.repo, state)
    if contents.what != "folder" and mark.get("origin") == contents.origin:
        return sorted(name for name in mark["files"] if name in there and name not in ours)
    kept = () if contents.what == "folder" else (PAGE_FILE,)  # the owner's text in it stays
    changed = sorted(
        name for name in there if name in ours and name not in kept and not there[name].matches(ours[name])
    )
    others = sorted(there.keys() - ours.keys())
    if (changed or others) and not job.force:
        parts = [
            f"{words} {_first_names(names)}" for words, names in (("replace", changed), ("remove", others)) if names
        ]
        raise MinigrpoError(
            f"{contents.repo} is there with other content, which was not published from here. Take another name: "
            f"--repo USER/NAME. To {' and '.join(parts)} (its history keeps them): {job.command} --force"
        )
    return others


def _with_published_page(hub: Hub, contents: RepoContents, state: RepoState | None) -> RepoContents:
    """Return the contents with what somebody added by hand to the page that is there. A folder's page goes as it is."""
    if state is None or contents.what == "folder" or PAGE_FILE not in state.files:
        return contents
    page = hub.read(contents.repo, PAGE_FILE, state.commit)
    return contents.with_published_page(page, _read_mark(hub, contents.repo, state))


def _read_mark(hub: Hub, repo: str, state: RepoState) -> dict[str, Any]:
    """Return the mark of a repository that was published from here; {} where it has none."""
    return parse_mark(hub.read(repo, MARK_FILE, state.commit)) if MARK_FILE in state.files else {}


def _first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _send(
    hub: Hub, contents: RepoContents, state: RepoState | None, *, removed: Sequence[str], job: PublishJob
) -> PublishedRepo:
    remarks = list(contents.remarks)
    if state is None:
        hub.create(contents.repo, private=job.private)
    elif state.private and not job.private:
        remarks.append(f"It stays private, as it was. To open it: {hub.url(contents.repo)}/settings")
    missing = _differing(contents.items, state.files) if state else [each.name for each in contents.items]
    verdict: PublishVerdict = "published" if missing or removed else "there already"
    commit = state.commit if state else ""
    if verdict == "published":
        with _progress(contents, job) as report:
            commit = hub.upload(contents.repo, contents.items, removed=removed, message=job.message, report=report)
    if wrong := _differing(contents.items, hub.list_files(contents.repo, commit)):
        raise MinigrpoError(
            f"{contents.repo} was committed, but {_first_names(wrong)} of {len(contents.items)} files did not arrive "
            f"or differ there (a .gitignore in it leaves files out). Send them again: {job.command}"
        )
    fetched = _fetch(hub, contents, job) if job.fetch else None
    facts = {"address": hub.url(contents.repo), "commit": commit, "fetched": fetched, "remarks": tuple(remarks)}
    return _describe_repo(contents, job, verdict, **facts, private=state.private if state else job.private)


def _differing(items: Sequence[RepoFile], there: Any) -> list[str]:
    files: dict[str, RemoteFile] = dict(there)
    return [each.name for each in items if each.name not in files or not files[each.name].matches(each)]


def _fetch(hub: Hub, contents: RepoContents, job: PublishJob) -> Path:
    """Download into the Hub's cache and compare byte for byte. Raises MinigrpoError for the first file that differs."""
    with _progress(contents, job, "download") as report:
        report(0, contents.repo)
        folder = hub.download(contents.repo)
        report(contents.size, "comparing")
        for each in contents.items:
            copy = folder / each.name
            if not copy.is_file() or digest(copy) != each.sha256:
                raise MinigrpoError(
                    f"{copy} is not what was published. Remove {folder.parents[1]} and download it again: "
                    f"{job.command} --fetch"
                )
    return folder


@contextmanager
def _progress(contents: RepoContents, job: PublishJob, name: str = "upload") -> Iterator[UploadReport]:
    """Report the progress of a transfer. In a terminal: one line for each large file, under which the Hub's client
    draws a progress bar; elsewhere: our own progress lines."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    console = Screen(stderr=True, quiet=job.quiet)
    if console.is_terminal and not job.quiet:

        def report(done: int, note: str) -> None:
            place = f"{format_bytes(done)} of {format_bytes(contents.size)}"
            console.print(Text(f"{name} {contents.repo}: {place}, {note}", style="dim"), soft_wrap=True)

        yield report
        return
    off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with stage(f"{name} {contents.repo} (kB)", contents.size // 1000, console) as progress:
            yield lambda done, note: progress(done // 1000, contents.size // 1000, note)
    finally:
        if not off:
            enable_progress_bars()


def published_table(found: Published) -> RenderableType:
    """Show each repository: which files, how large, and its address."""
    lines: list[RenderableType] = []
    for each in found.sent:
        table = plain_table("")
        for name, size in sorted(each.files.items(), key=lambda pair: -pair[1]):
            table.add_row(Text(name), format_bytes(size))
        kind = "private" if each.private else "public"
        title = f"{each.repo} ({each.what}, {kind}, {format_bytes(sum(each.files.values()))}): {each.verdict}"
        lines.append(titled(title, table))
        lines += [Text(f"downloaded again, byte for byte the same: {each.fetched}")] if each.fetched else []
        lines += [Text(each.address, style="bold green")] if each.address else []
    remarks = dict.fromkeys(remark for each in found.sent for remark in each.remarks)
    return Stack(*lines, *(Text(remark, style="yellow") for remark in remarks))
