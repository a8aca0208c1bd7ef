"""The Hugging Face Hub: find the token, list a repository, upload files in one commit, and download them.

Large files go first, one by one; the Hub keeps each that arrived whole, so that after an interruption the same call
sends only the others. One commit then names all of them: a repository never holds half of a publication. Its files are
then listed and compared. Every refusal by the Hub or the network becomes one sentence; the token is in none of them.

Not covered: datasets, spaces, branches and pull requests; several publishers of one repository at the same time.
"""

from __future__ import annotations

import codecs
import hashlib
import io
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
from minigrpo.utils.paths import user_path

RETRY_DELAYS_S = (1.0, 2.0, 4.0)
"""Seconds before each retry of a request. Uploads of large files are retried by the Hub's client itself."""
READ_TIMEOUT_S = 120.0
"""Seconds without a byte after which a connection is given up; the Hub's client would wait for ever."""
SMALL_FILE_BYTES = 1 << 20
TOKEN_PAGE = "https://huggingface.co/settings/tokens"
UploadReport = Callable[[int, str], None]
"""Called with (bytes sent so far, what comes next)."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RepoFile:
    """A file to be uploaded. `content`: a file of this machine, or the bytes themselves."""

    name: str
    content: Path | bytes = field(repr=False)
    size: int
    sha256: str

    @property
    def blob(self) -> str:
        """Return git's hash of the content, by which the Hub identifies files that are not large."""
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def repo_file(name: str, content: Path | bytes) -> RepoFile:
    if isinstance(content, bytes):
        return RepoFile(name, content, len(content), hashlib.sha256(content).hexdigest())
    return RepoFile(name, content, content.stat().st_size, digest(content))


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the Hub lists it. `sha256`: of large files only; `blob`: git's hash of what the repository stores."""

    size: int
    sha256: str | None
    blob: str

    def matches(self, file: RepoFile) -> bool:
        same = self.sha256 == file.sha256 if self.sha256 else self.size == file.size and self.blob == file.blob
        return same and self.size == file.size


@dataclass(frozen=True, slots=True)
class RepoState:
    """A repository at one moment."""

    private: bool
    commit: str
    files: Mapping[str, RemoteFile]


def find_token(folder: Path | None = None) -> tuple[str, str]:
    """Return the token and where it was found: HF_TOKEN, a file .env in the working directory, the Hub's own login.
    Raises MinigrpoError where there is none."""
    sources = {
        "the environment's HF_TOKEN": lambda: os.environ.get("HF_TOKEN"),
        "HF_TOKEN in .env": lambda: read_dotenv_token((folder or Path.cwd()) / ".env"),
        "the login of huggingface_hub": _login_token,
    }
    for source, look in sources.items():
        token = (look() or "").strip().strip("\ufeff")
        if not token:
            continue
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise MinigrpoError(f"{source[0].upper()}{source[1:]} holds characters that no token has. Copy it again.")
        return token, source
    raise MinigrpoError(
        f"There is no token for the Hub. Make one that may write at {TOKEN_PAGE}, then: export HF_TOKEN=... "
        "(or a line HF_TOKEN=... in a file .env here, or: hf auth login)"
    )


def read_dotenv_token(file: Path) -> str | None:
    """Return HF_TOKEN of a .env file, as python-dotenv reads it. None where there is none."""
    from dotenv import dotenv_values

    try:
        raw = file.read_bytes() if file.is_file() else b""
    except OSError:
        return None
    value = dotenv_values(stream=io.StringIO(_decode(raw)), interpolate=False).get("HF_TOKEN")
    # Word processors and chats make other quotes of those that were typed; some programs quote with backticks.
    return value and value.strip().strip("“”„‘’‚«»`")


def _decode(raw: bytes) -> str:
    """Decode a file of an editor or a shell: PowerShell writes UTF-16, some Windows editors a byte-order mark."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16", "replace")
    if b"\0" in raw[:2]:  # UTF-16 without a mark, which begins with a letter or a comment sign
        return raw.decode("utf-16-be" if raw[:1] == b"\0" else "utf-16-le", "replace")
    return raw.decode("utf-8-sig", "replace")


def _login_token() -> str | None:
    from huggingface_hub import get_token

    try:
        return get_token()
    except UnicodeError:
        raise MinigrpoError("The login of huggingface_hub is no text. Log in again: hf auth login") from None


def check_repo_name(repo: str) -> None:
    """Raise MinigrpoError where the Hub would refuse the name."""
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
    """A connection to the Hub. `command`: what the user calls again after an error. The address is the Hub client's
    own (HF_ENDPOINT)."""

    token: str = field(repr=False)
    token_source: str
    command: str

    @property
    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(token=self.token, library_name="minigrpo")

    def url(self, repo: str) -> str:
        return f"{self._api.endpoint}/{repo}"

    def whoami(self) -> str:
        with self._translated_errors("the Hub"):
            return str(_retry(lambda: self._api.whoami())["name"])

    def repo_state(self, repo: str) -> RepoState | None:
        """Return the repository's state; None where it does not exist or this token may not see it."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._translated_errors(repo):
            try:
                info = _retry(lambda: self._api.repo_info(repo))
            except RepositoryNotFoundError:
                return None
            return RepoState(bool(info.private), str(info.sha), self._list_tree(repo, info.sha))

    def create(self, repo: str, *, private: bool) -> None:
        with self._translated_errors(repo):
            _retry(lambda: self._api.create_repo(repo, private=private, exist_ok=True))

    def list_files(self, repo: str, commit: str) -> dict[str, RemoteFile]:
        """Return every file of a repository at that commit."""
        with self._translated_errors(repo):
            return self._list_tree(repo, commit)

    def read(self, repo: str, name: str, commit: str) -> bytes:
        """Return a small file's content, by way of the Hub client's cache."""
        with self._translated_errors(repo):
            return Path(_retry(lambda: self._api.hf_hub_download(repo, name, revision=commit))).read_bytes()

    def upload(
        self, repo: str, items: Sequence[RepoFile], *, removed: Sequence[str] = (), message: str, report: UploadReport
    ) -> str:
        """Upload all files in one commit and return its hash. Large files that the Hub already has are not sent."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        adds = [CommitOperationAdd(each.name, each.content) for each in items]
        for add, each in zip(adds, items, strict=True):
            add.upload_info.sha256 = bytes.fromhex(each.sha256)  # saves the client from reading each file again
        sized = sorted(zip(adds, items, strict=True), key=lambda pair: pair[1].size)
        small = [add for add, each in sized if each.size < SMALL_FILE_BYTES]
        parts = (
            [small, *([add] for add, each in sized if each.size >= SMALL_FILE_BYTES)]
            if small
            else [[add] for add, _ in sized]
        )
        sent = 0
        with self._translated_errors(repo):
            for part in parts:
                size = sum(add.upload_info.size for add in part)
                report(
                    sent, f"{part[0].path_in_repo} ({format_bytes(size)})" if len(part) == 1 else f"{len(part)} files"
                )
                _retry(partial(self._api.preupload_lfs_files, repo, part, free_memory=False))
                sent += size
            report(sent, "commit")
            changes = [*adds, *(CommitOperationDelete(name, is_folder=False) for name in removed)]
            made = _retry(lambda: self._api.create_commit(repo, changes, commit_message=message))
            return str(made.oid)

    def download(self, repo: str) -> Path:
        """Download into the Hub client's cache, under `main`, where vLLM and transformers look. Return the folder
        there."""
        from huggingface_hub import snapshot_download

        with self._translated_errors(repo):
            return Path(_retry(lambda: snapshot_download(repo, token=self.token, endpoint=self._api.endpoint)))

    def _list_tree(self, repo: str, commit: str) -> dict[str, RemoteFile]:
        found = _retry(lambda: list(self._api.list_repo_tree(repo, recursive=True, revision=commit)))
        return {
            file.path: RemoteFile(file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
            for file in found
            if hasattr(file, "blob_id")
        }

    @contextmanager
    def _translated_errors(self, repo: str) -> Iterator[None]:
        """Turn errors of the Hub or the network into one MinigrpoError. The client's own warnings are silenced: they
        hold addresses that are keys themselves."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import logging

        level = logging.get_verbosity()
        logging.set_verbosity_error()
        session = get_session()
        timeout = session.timeout
        if timeout.read is None:
            session.timeout = READ_TIMEOUT_S
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                yield
        except (OSError, RuntimeError, ValueError) as fault:  # the client raises errors of two HTTP libraries
            raise MinigrpoError(self._redact(self._describe_error(fault, repo))) from None
        except Exception as fault:
            if not is_network_error(fault):
                raise
            raise MinigrpoError(self._redact(self._describe_error(fault, repo))) from None
        finally:
            logging.set_verbosity(level)
            session.timeout = timeout

    def _redact(self, text: str) -> str:
        return text.replace(self.token, "***")

    def _describe_error(self, fault: BaseException, repo: str) -> str:
        resume = f"What was sent stays there; the same command goes on: {self.command}"
        status, said = http_status(fault), error_text(fault)
        if any(type(each).__name__ == "OfflineModeIsEnabled" for each in exception_chain(fault)):
            return f"HF_HUB_OFFLINE is set, so nothing may be asked of {repo}. Unset it: unset HF_HUB_OFFLINE"
        if status == 401:
            return (
                f"The Hub does not know the token from {self.token_source} (401). "
                f"Make a new one that may write: {TOKEN_PAGE}"
            )
        if status in (402, 413, 507) or (status in (400, 403) and re.search(r"quota|storage|billing|payment", said)):
            return (
                f"The Hub has no room for {repo} ({status}): {said}. Free some, or take --public or another USER: "
                "https://huggingface.co/settings/billing"
            )
        if status == 403:
            return (
                f"The token from {self.token_source} may not write to {repo} (403): {said}. Give it the right to "
                f"write at {TOKEN_PAGE}, or name a repository of your own: --repo USER/NAME"
            )
        if status == 404:
            return f"{repo} is not there, or was removed meanwhile (404). Begin again: {self.command}"
        if status == 429:
            return f"The Hub asks for a pause (429): {said}. {resume}"
        if status is not None and status >= 500:
            return f"The Hub has trouble of its own ({status}), so this went no further: {repo}. {resume}"
        if status is not None:
            return f"The Hub refused {repo} ({status}): {said}. Mend that, then: {self.command}"
        if is_network_error(fault):
            return f"The connection to {self._api.endpoint} broke or never was ({said}). {resume}"
        return f"{repo} was not finished ({type(fault).__name__}: {said}). {resume}"


def format_bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"


def exception_chain(fault: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes: the client wraps more than once."""
    while fault is not None:
        yield fault
        fault = fault.__cause__ or fault.__context__


def http_status(fault: BaseException) -> int | None:
    """Return the HTTP status of an exception or one of its causes; None where there is none."""
    found = (getattr(getattr(each, "response", None), "status_code", None) for each in exception_chain(fault))
    return next((int(status) for status in found if status is not None), None)


def is_network_error(fault: BaseException) -> bool:
    """Tell by class name whether the network failed: the Hub's client changed its HTTP library between versions."""
    kinds = {kind.__name__ for each in exception_chain(fault) for kind in type(each).__mro__}
    return bool(kinds & {"TransportError", "ConnectionError", "TimeoutError"}) and http_status(fault) is None


def error_text(fault: BaseException) -> str:
    """Return the Hub's own message if there is one, else the innermost exception's. One line, without addresses."""
    innermost = list(exception_chain(fault))[-1]
    own = next((str(said) for each in exception_chain(fault) if (said := getattr(each, "server_message", None))), "")
    words = re.sub(r"https?://\S+", "", own or str(innermost) or type(innermost).__name__)
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", words).split())[:200].rstrip(".")


def _retry(call: Callable[[], _T]) -> _T:
    """Call again after an error that may pass, a few times."""
    for pause in RETRY_DELAYS_S:
        try:
            return call()
        except Exception as fault:
            if not (is_network_error(fault) or http_status(fault) in (408, 429, 500, 502, 503, 504)):
                raise
            time.sleep(pause)
    return call()


ADAPTER_FILES = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt"]
SIGN_IN_COMMAND = "export HF_TOKEN=..."


def read_hub_json(repo: str, name: str) -> dict[str, Any] | None:
    """Return a JSON file of a model's repository; None where the repository has no such file.

    Raises MinigrpoError where there is no such repository, where the Hub does not answer, and where the file is no JSON
    object.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = Path(hf_hub_download(repo, name))
    except EntryNotFoundError as fault:
        if isinstance(fault, LocalEntryNotFoundError):  # the Hub did not answer, and the cache lacks the file
            raise _download_error(repo, fault) from None
        return None
    except (OSError, ValueError) as fault:
        raise _download_error(repo, fault) from None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise MinigrpoError(f"{name} of {repo} is damaged: it is no JSON object. Ask its owner, or name another model.")
    return found


def download_adapter(repo: str) -> Path:
    """Download an adapter and return its folder in the cache. Raises MinigrpoError where that fails."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=ADAPTER_FILES))
    except (OSError, ValueError) as fault:
        raise _download_error(repo, fault) from None


def hub_cache() -> Path:
    """Return the folder in which the Hub client keeps what it downloads."""
    from huggingface_hub import constants

    return user_path(constants.HF_HUB_CACHE).absolute()


def _download_error(repo: str, fault: Exception) -> MinigrpoError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    hub = constants.ENDPOINT
    if isinstance(fault, GatedRepoError):
        return MinigrpoError(f"{repo} is for those who asked for it. Ask at {hub}/{repo}, and then: {SIGN_IN_COMMAND}")
    if isinstance(fault, RepositoryNotFoundError):
        return MinigrpoError(
            f"{repo} is neither a folder here nor a model on {hub} that you may see. Look at the name; for a private "
            f"one: {SIGN_IN_COMMAND}"
        )
    if isinstance(fault, HFValidationError):
        return MinigrpoError(f"{repo!r} cannot be a repository's name. It is OWNER/NAME, as its page shows it.")
    if http_status(fault) == 401:
        return MinigrpoError(
            f"{hub} does not know your token (401), so {repo} was not read. Take another: {SIGN_IN_COMMAND}"
        )
    return MinigrpoError(
        f"{repo} could not be read from {hub} ({error_text(fault)}), and the cache does not have it. Try again when "
        "the network is back, or name a folder."
    )
