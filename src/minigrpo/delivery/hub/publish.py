"""A run's models to the Hugging Face Hub, resumable, each repository compared with what lies here.

pack      only proved files, each repository with its card (hub/contents.py)
look      who am I, what is there: a repository with other content is refused before a byte is sent
send      large files one by one, then one commit: after a cut the same command sends only what is missing
compare   every file of the repository, size and hash; on request downloaded again, byte for byte
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.text import Text

from minigrpo.delivery.hub.client import Hub, Item, Remote, Tell, Visit, check_name, find_token, in_bytes
from minigrpo.delivery.hub.contents import (
    MARK,
    SUFFIX,
    RepoContents,
    contents_of_folder,
    contents_of_run,
    mark_of,
    refuse_secrets,
)
from minigrpo.errors import MinigrpoError
from minigrpo.runs.lock import hold
from minigrpo.runs.rundir import RunDir, digest
from minigrpo.ui.progress import stage
from minigrpo.ui.tables import plain_table, titled

Verdict = Literal["published", "there already", "would be published"]
OF_THE_HUB = (".gitattributes",)
"""What the Hub itself puts into a new repository."""


@dataclass(frozen=True, slots=True)
class PublishedRepo:
    """One repository. `files`: sizes by name. `fetched`: where it was downloaded to, and is byte for byte the same."""

    repo: str
    what: str
    verdict: Verdict
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
    sent: tuple[PublishedRepo, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"repositories": [each.to_dict() for each in self.sent]}


@dataclass(frozen=True, slots=True)
class PublishJob:
    """How it is to be published. `command`: the one that begins again or goes on."""

    command: str
    private: bool
    dry_run: bool
    fetch: bool
    force: bool
    message: str
    quiet: bool


def publish(
    run: RunDir | Path,
    repo: str,
    *,
    what: Sequence[str] = (),
    private: bool = True,
    dry_run: bool = False,
    fetch: bool = False,
    force: bool = False,
    message: str | None = None,
    quiet: bool = False,
) -> Published:
    """Publish what a run has made: merged, adapter, gguf; all that is there where `what` is empty.

    `fetch`: download it again into the Hub's cache and compare. `force`: replace what a repository holds. `dry_run`:
    only say what would go where; no network. Raises MinigrpoError; then the same command goes on.
    """
    run = run if isinstance(run, RunDir) else RunDir(Path(run).expanduser())
    command = _command([str(run.path), *(word for each in what for word in ("--what", each))], repo, private, force)
    order = PublishJob(command, private, dry_run, fetch, force, message or f"{run.path.absolute().name}", quiet)
    for kind in what or SUFFIX:
        check_name(repo + SUFFIX.get(kind, ""))

    def there(repo: str, origin: Mapping[str, str]) -> bool:
        hub = Hub(*find_token(), command)
        visit = hub.visit(repo)
        return visit is not None and _mark(hub, repo, visit).get("origin") == origin

    return _publish(contents_of_run(run, repo, what, None if dry_run else there), order)


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
    """Publish any folder as it is; the rest as in `publish`."""
    folder = folder.expanduser()
    command = _command(["--folder", str(folder)], repo, private, force)
    order = PublishJob(command, private, dry_run, fetch, force, message or folder.absolute().name, quiet)
    check_name(repo)
    return _publish([contents_of_folder(folder, repo)], order)


def publish_alone(path: Path, repo: str, **options: Any) -> Published:
    """`publish`, with the run's folder for this process alone."""
    run = RunDir(path.expanduser())
    if not run.exists():
        return publish(run, repo, **options)
    with hold(run, lambda remark: Console(stderr=True).print(Text(remark), soft_wrap=True)):
        return publish(run, repo, **options)


def _command(first: Sequence[str], repo: str, private: bool, force: bool) -> str:
    words = ["minigrpo", "publish", *first, "--repo", repo]
    return shlex.join([*words, *([] if private else ["--public"]), *(["--force"] if force else [])])


def _publish(parcels: Sequence[RepoContents], order: PublishJob) -> Published:
    if order.dry_run:
        return Published(tuple(_told(parcel, order, "would be published") for parcel in parcels))
    hub = Hub(*find_token(), order.command)
    for parcel in parcels:
        refuse_secrets(parcel, hub.token)
    hub.whoami()
    visits = [hub.visit(parcel.repo) for parcel in parcels]
    plans = [_admit(hub, *pair, order) for pair in zip(parcels, visits, strict=True)]
    sent = []
    for parcel, visit, removed in zip(parcels, visits, plans, strict=True):
        sent.append(_send(hub, parcel, visit, removed=removed, order=order))
    return Published(tuple(sent))


def _told(parcel: RepoContents, order: PublishJob, verdict: Verdict, **facts: Any) -> PublishedRepo:
    files = {each.name: each.size for each in parcel.items}
    facts = {"remarks": parcel.remarks, "private": order.private, **facts}
    return PublishedRepo(parcel.repo, parcel.what, verdict, files=files, **facts)


def _admit(hub: Hub, parcel: RepoContents, visit: Visit | None, order: PublishJob) -> list[str]:
    """Names to be removed. Raises MinigrpoError where the repository is somebody's own, or not as private as asked."""
    there = {name: file for name, file in (visit.files if visit else {}).items() if name not in OF_THE_HUB}
    if visit and order.private and not visit.private:
        raise MinigrpoError(
            f"{parcel.repo} is there and public. Make it private at {hub.address(parcel.repo)}/settings, or publish "
            f"for everybody: {order.command} --public"
        )
    ours = {each.name: each for each in parcel.items}
    if not there or visit is None:
        return []
    mark = _mark(hub, parcel.repo, visit)
    if parcel.what != "folder" and mark.get("origin") == parcel.origin:
        return sorted(name for name in mark["files"] if name in there and name not in ours)
    changed = sorted(name for name in there if name in ours and not there[name].holds(ours[name]))
    others = sorted(there.keys() - ours.keys())
    if (changed or others) and not order.force:
        parts = [f"{words} {_some(names)}" for words, names in (("replace", changed), ("remove", others)) if names]
        raise MinigrpoError(
            f"{parcel.repo} is there with other content, which was not published from here. To {' and '.join(parts)} "
            f"(its history keeps them): {order.command} --force. Or take another name: --repo USER/NAME"
        )
    return others


def _mark(hub: Hub, repo: str, visit: Visit) -> dict[str, Any]:
    """How a repository says that it was published from here; {} where it does not."""
    return mark_of(hub.read(repo, MARK, visit.commit)) if MARK in visit.files else {}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _send(
    hub: Hub, parcel: RepoContents, visit: Visit | None, *, removed: Sequence[str], order: PublishJob
) -> PublishedRepo:
    remarks = list(parcel.remarks)
    if visit is None:
        hub.create(parcel.repo, private=order.private)
    elif visit.private and not order.private:
        remarks.append(f"It stays private, as it was. To open it: {hub.address(parcel.repo)}/settings")
    missing = _differing(parcel.items, visit.files) if visit else [each.name for each in parcel.items]
    verdict: Verdict = "published" if missing or removed else "there already"
    commit = visit.commit if visit else ""
    if verdict == "published":
        with _progress(parcel, order) as tell:
            commit = hub.upload(parcel.repo, parcel.items, removed=removed, message=order.message, tell=tell)
    if wrong := _differing(parcel.items, hub.listed(parcel.repo, commit)):
        raise MinigrpoError(
            f"{parcel.repo} was committed, but {_some(wrong)} of {len(parcel.items)} files did not arrive or differ "
            f"there (a .gitignore in it leaves files out). Send them again: {order.command}"
        )
    fetched = _fetch(hub, parcel, order) if order.fetch else None
    facts = {"address": hub.address(parcel.repo), "commit": commit, "fetched": fetched, "remarks": tuple(remarks)}
    return _told(parcel, order, verdict, **facts, private=visit.private if visit else order.private)


def _differing(items: Sequence[Item], there: Any) -> list[str]:
    files: dict[str, Remote] = dict(there)
    return [each.name for each in items if each.name not in files or not files[each.name].holds(each)]


def _fetch(hub: Hub, parcel: RepoContents, order: PublishJob) -> Path:
    """Into the Hub's cache, compared byte for byte. Raises MinigrpoError for the first file that is not the same."""
    with _progress(parcel, order, "download") as tell:
        tell(0, parcel.repo)
        folder = hub.download(parcel.repo)
        tell(parcel.size, "comparing")
        for each in parcel.items:
            copy = folder / each.name
            if not copy.is_file() or digest(copy) != each.sha256:
                raise MinigrpoError(
                    f"{copy} is not what was published. Remove {folder.parents[1]} and download it again: "
                    f"{order.command} --fetch"
                )
    return folder


@contextmanager
def _progress(parcel: RepoContents, order: PublishJob, name: str = "upload") -> Iterator[Tell]:
    """In a terminal one line for each large file, under which the Hub's client draws a bar of its bytes, with the time
    left; elsewhere, lines of ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    console = Console(stderr=True, quiet=order.quiet)
    if console.is_terminal and not order.quiet:

        def tell(done: int, note: str) -> None:
            place = f"{in_bytes(done)} of {in_bytes(parcel.size)}"
            console.print(Text(f"{name} {parcel.repo}: {place}, {note}", style="dim"), soft_wrap=True)

        yield tell
        return
    off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with stage(f"{name} {parcel.repo} (kB)", parcel.size // 1000, console) as report:
            yield lambda done, note: report(done // 1000, parcel.size // 1000, note)
    finally:
        if not off:
            enable_progress_bars()


def published_table(found: Published) -> RenderableType:
    """Repository by repository: which files, how large, where they are now."""
    lines: list[RenderableType] = []
    for each in found.sent:
        table = plain_table("")
        for name, size in sorted(each.files.items(), key=lambda pair: -pair[1]):
            table.add_row(Text(name), in_bytes(size))
        kind = "private" if each.private else "public"
        title = f"{each.repo} ({each.what}, {kind}, {in_bytes(sum(each.files.values()))}): {each.verdict}"
        lines.append(titled(title, table))
        lines += [Text(f"downloaded again, byte for byte the same: {each.fetched}")] if each.fetched else []
        lines += [Text(each.address, style="bold green")] if each.address else []
    remarks = dict.fromkeys(remark for each in found.sent for remark in each.remarks)
    return Stack(*lines, *(Text(remark, style="yellow") for remark in remarks))
