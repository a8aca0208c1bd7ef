"""The Hugging Face Hub: whose token this is, what a repository holds, files to it in one commit, and back again.

Large files go first, one by one; the Hub keeps each that arrived whole, so that after a cut the same call sends only
the others. Then one commit names all of them: a repository is never half of something. What it holds is then listed and
compared. Every refusal of the Hub or the network is one sentence; the token is in none.

Not covered: datasets, spaces, branches and pull requests; several publishers of one repository at the same moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from minigrpo.errors import MinigrpoError
from minigrpo.runs.rundir import digest

PAUSES = (1.0, 2.0, 4.0)
"""Seconds before a request is tried again. Uploads of large files are tried again by the Hub's client itself."""
PATIENCE = 120.0
"""Seconds without a byte after which a connection is given up; the Hub's client would wait for ever."""
SMALL = 1 << 20
TOKENS = "https://huggingface.co/settings/tokens"
Tell = Callable[[int, str], None]
"""(bytes sent so far, what comes now)."""
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Item:
    """A file of a repository. `content`: a file of this machine, or the bytes themselves."""

    name: str
    content: Path | bytes = field(repr=False)
    size: int
    sha256: str

    @property
    def blob(self) -> str:
        """Git's name for it, by which the Hub tells files that are not large."""
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def item(name: str, content: Path | bytes) -> Item:
    if isinstance(content, bytes):
        return Item(name, content, len(content), hashlib.sha256(content).hexdigest())
    return Item(name, content, content.stat().st_size, digest(content))


@dataclass(frozen=True, slots=True)
class Remote:
    """A file as the Hub lists it. `sha256`: of large files only; `blob`: git's name of what the repository stores."""

    size: int
    sha256: str | None
    blob: str

    def holds(self, item: Item) -> bool:
        same = self.sha256 == item.sha256 if self.sha256 else self.size == item.size and self.blob == item.blob
        return same and self.size == item.size


@dataclass(frozen=True, slots=True)
class Visit:
    """What a repository is at this moment."""

    private: bool
    commit: str
    files: Mapping[str, Remote]


def find_token(folder: Path | None = None) -> tuple[str, str]:
    """The token, and where it was found: HF_TOKEN, a file .env in the working directory, the Hub's own login."""
    from huggingface_hub import get_token

    places = {
        "the environment's HF_TOKEN": lambda: os.environ.get("HF_TOKEN"),
        "HF_TOKEN in .env": lambda: token_in((folder or Path.cwd()) / ".env"),
        "the login of huggingface_hub": get_token,
    }
    for place, look in places.items():
        token = (look() or "").strip()
        if not token:
            continue
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise MinigrpoError(f"{place[0].upper()}{place[1:]} holds characters that no token has. Copy it again.")
        return token, place
    raise MinigrpoError(
        f"There is no token for the Hub. Make one that may write at {TOKENS}, then: export HF_TOKEN=... "
        "(or a line HF_TOKEN=... in a file .env here, or: hf auth login)"
    )


def token_in(file: Path) -> str | None:
    """HF_TOKEN of a .env file: NAME=value, with or without `export` and quotes."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    except OSError:
        return None
    found = [re.fullmatch(r"\s*(?:export\s+)?HF_TOKEN\s*=\s*(.*?)\s*", line) for line in lines]
    values = [match[1] for match in found if match]
    return re.sub(r"^(['\"])(.*)\1$", r"\2", values[-1].partition(" #")[0].strip()) if values else None


def check_name(repo: str) -> None:
    """Raises MinigrpoError where the Hub would take no such name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        fits = repo.count("/") == 1
    except HFValidationError:
        fits = False
    if not fits:
        raise MinigrpoError(
            f"--repo {repo!r} cannot be a repository's name. It is USER/NAME: letters, digits, '-', '_' and '.', with "
            "neither '--' nor '..' in it, and at most 96 characters."
        )


@dataclass(frozen=True, slots=True)
class Hub:
    """`command`: what the user calls again after a fault. The address is the Hub client's own (HF_ENDPOINT)."""

    token: str = field(repr=False)
    place: str
    command: str

    @property
    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(token=self.token, library_name="minigrpo")

    def address(self, repo: str) -> str:
        return f"{self._api.endpoint}/{repo}"

    def whoami(self) -> str:
        with self._asking("the Hub"):
            return str(_persist(lambda: self._api.whoami())["name"])

    def visit(self, repo: str) -> Visit | None:
        """None where there is no such repository, or none that this token may see."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._asking(repo):
            try:
                info = _persist(lambda: self._api.repo_info(repo))
            except RepositoryNotFoundError:
                return None
            return Visit(bool(info.private), str(info.sha), self._listed(repo, info.sha))

    def create(self, repo: str, *, private: bool) -> None:
        with self._asking(repo):
            _persist(lambda: self._api.create_repo(repo, private=private, exist_ok=True))

    def listed(self, repo: str, commit: str) -> dict[str, Remote]:
        """Every file of a repository at that commit."""
        with self._asking(repo):
            return self._listed(repo, commit)

    def read(self, repo: str, name: str, commit: str) -> bytes:
        """A small file of it, by way of the Hub client's cache."""
        with self._asking(repo):
            return Path(_persist(lambda: self._api.hf_hub_download(repo, name, revision=commit))).read_bytes()

    def upload(self, repo: str, items: Sequence[Item], *, removed: Sequence[str] = (), message: str, tell: Tell) -> str:
        """One commit of all of it; returns its hash. Large files that the Hub has already are not sent."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        adds = [CommitOperationAdd(each.name, each.content) for each in items]
        for add, each in zip(adds, items, strict=True):
            add.upload_info.sha256 = bytes.fromhex(each.sha256)  # else the client would read each file once more
        sized = sorted(zip(adds, items, strict=True), key=lambda pair: pair[1].size)
        small = [add for add, each in sized if each.size < SMALL]
        parts = [small, *([add] for add, each in sized if each.size >= SMALL)] if small else [[add] for add, _ in sized]
        sent = 0
        with self._asking(repo):
            for part in parts:
                size = sum(add.upload_info.size for add in part)
                tell(sent, f"{part[0].path_in_repo} ({in_bytes(size)})" if len(part) == 1 else f"{len(part)} files")
                _persist(partial(self._api.preupload_lfs_files, repo, part, free_memory=False))
                sent += size
            tell(sent, "commit")
            changes = [*adds, *(CommitOperationDelete(name, is_folder=False) for name in removed)]
            made = _persist(lambda: self._api.create_commit(repo, changes, commit_message=message))
            return str(made.oid)

    def download(self, repo: str) -> Path:
        """Into the Hub client's cache, under `main`: where vLLM and transformers look. Returns the folder there."""
        from huggingface_hub import snapshot_download

        with self._asking(repo):
            return Path(_persist(lambda: snapshot_download(repo, token=self.token, endpoint=self._api.endpoint)))

    def _listed(self, repo: str, commit: str) -> dict[str, Remote]:
        found = _persist(lambda: list(self._api.list_repo_tree(repo, recursive=True, revision=commit)))
        return {
            file.path: Remote(file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
            for file in found
            if hasattr(file, "blob_id")
        }

    @contextmanager
    def _asking(self, repo: str) -> Iterator[None]:
        """What the Hub or the network refuses ends as one MinigrpoError. The client's own remarks are left out: they
        hold addresses that are keys themselves."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import logging

        level = logging.get_verbosity()
        logging.set_verbosity_error()
        session = get_session()
        timeout = session.timeout
        if timeout.read is None:
            session.timeout = PATIENCE
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                yield
        except (OSError, RuntimeError, ValueError) as fault:  # the client wraps the faults of two HTTP libraries
            raise MinigrpoError(self._clean(self._sentence(fault, repo))) from None
        except Exception as fault:
            if not is_network(fault):
                raise
            raise MinigrpoError(self._clean(self._sentence(fault, repo))) from None
        finally:
            logging.set_verbosity(level)
            session.timeout = timeout

    def _clean(self, text: str) -> str:
        return text.replace(self.token, "***")

    def _sentence(self, fault: BaseException, repo: str) -> str:
        stands = f"What was sent stays there; the same command goes on: {self.command}"
        status, said = status_of(fault), words_of(fault)
        if any(type(each).__name__ == "OfflineModeIsEnabled" for each in chain(fault)):
            return f"HF_HUB_OFFLINE is set, so nothing may be asked of {repo}. Unset it: unset HF_HUB_OFFLINE"
        if status == 401:
            return f"The Hub does not know the token from {self.place} (401). Make a new one that may write: {TOKENS}"
        if status in (402, 413, 507) or (status in (400, 403) and re.search(r"quota|storage|billing|payment", said)):
            return (
                f"The Hub has no room for {repo} ({status}): {said}. Free some, or take --public or another USER: "
                "https://huggingface.co/settings/billing"
            )
        if status == 403:
            return (
                f"The token from {self.place} may not write to {repo} (403): {said}. Give it the right to write at "
                f"{TOKENS}, or name a repository of your own: --repo USER/NAME"
            )
        if status == 404:
            return f"{repo} is not there, or was removed meanwhile (404). Begin again: {self.command}"
        if status == 429:
            return f"The Hub asks for a pause (429): {said}. {stands}"
        if status is not None and status >= 500:
            return f"The Hub has trouble of its own ({status}), so this went no further: {repo}. {stands}"
        if status is not None:
            return f"The Hub refused {repo} ({status}): {said}. Mend that, then: {self.command}"
        if is_network(fault):
            return f"The connection to {self._api.endpoint} broke or never was ({said}). {stands}"
        return f"{repo} was not finished ({type(fault).__name__}: {said}). {stands}"


def in_bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"


def chain(fault: BaseException | None) -> Iterator[BaseException]:
    """A fault and what it came from: the client wraps more than once."""
    while fault is not None:
        yield fault
        fault = fault.__cause__ or fault.__context__


def status_of(fault: BaseException) -> int | None:
    found = (getattr(getattr(each, "response", None), "status_code", None) for each in chain(fault))
    return next((int(status) for status in found if status is not None), None)


def is_network(fault: BaseException) -> bool:
    """By name: the Hub's client changed its HTTP library from one version to the next."""
    kinds = {kind.__name__ for each in chain(fault) for kind in type(each).__mro__}
    return bool(kinds & {"TransportError", "ConnectionError", "TimeoutError"}) and status_of(fault) is None


def words_of(fault: BaseException) -> str:
    """The Hub's own words where it gave some; else the innermost fault's. One line, without addresses."""
    innermost = list(chain(fault))[-1]
    own = next((str(said) for each in chain(fault) if (said := getattr(each, "server_message", None))), "")
    words = re.sub(r"https?://\S+", "", own or str(innermost) or type(innermost).__name__)
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", words).split())[:200].rstrip(".")


def _persist(call: Callable[[], Answer]) -> Answer:
    """Once more after a fault that may pass, a few times."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as fault:
            if not (is_network(fault) or status_of(fault) in (408, 429, 500, 502, 503, 504)):
                raise
            time.sleep(pause)
    return call()


ADAPTER_FILES = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt"]
SIGN_IN = "export HF_TOKEN=..."


def settings_on_hub(repo: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a model's repository; None where the repository has no such file.

    Raises MinigrpoError where there is no such repository, where nobody answers, and where the file is no JSON object.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = Path(hf_hub_download(repo, name))
    except EntryNotFoundError as fault:
        if isinstance(fault, LocalEntryNotFoundError):  # nobody answered, and the cache does not have it
            raise _refused(repo, fault) from None
        return None
    except (OSError, ValueError) as fault:
        raise _refused(repo, fault) from None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise MinigrpoError(f"{name} of {repo} is damaged: it is no JSON object. Ask its owner, or name another model.")
    return found


def adapter_on_hub(repo: str) -> Path:
    """The folder of the cache that holds the adapter's files. Raises MinigrpoError where they cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=ADAPTER_FILES))
    except (OSError, ValueError) as fault:
        raise _refused(repo, fault) from None


def cache_of_hub() -> Path:
    """Where the Hub client keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def _refused(repo: str, fault: Exception) -> MinigrpoError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    hub = constants.ENDPOINT
    if isinstance(fault, GatedRepoError):
        return MinigrpoError(f"{repo} is for those who asked for it. Ask at {hub}/{repo}, and then: {SIGN_IN}")
    if isinstance(fault, RepositoryNotFoundError):
        return MinigrpoError(
            f"{repo} is neither a folder here nor a model on {hub} that you may see. Look at the name; for a private "
            f"one: {SIGN_IN}"
        )
    if isinstance(fault, HFValidationError):
        return MinigrpoError(f"{repo!r} cannot be a repository's name. It is OWNER/NAME, as its page shows it.")
    if status_of(fault) == 401:
        return MinigrpoError(f"{hub} does not know your token (401), so {repo} was not read. Take another: {SIGN_IN}")
    return MinigrpoError(
        f"{repo} could not be read from {hub} ({words_of(fault)}), and the cache does not have it. Try again when the "
        "network is back, or name a folder."
    )
