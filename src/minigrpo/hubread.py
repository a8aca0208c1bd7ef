"""What a repository of the Hub says of itself before anything is served from it: its settings, and a whole adapter.

What is read stays in the Hub client's cache, where vLLM and transformers look; without a network the cache answers. The
token is the Hub client's own (HF_TOKEN, or its login), for vLLM has no other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minigrpo.errors import MinigrpoError
from minigrpo.hub import status_of, words_of

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
