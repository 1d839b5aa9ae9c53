"""Model repositories of the Hugging Face Hub: ``hf://owner/name``, or ``hf://owner/name@revision`` for a branch, tag or commit.

Only the files that are asked for are downloaded, into huggingface_hub's cache, and no code of a repository is ever run. As with
huggingface_hub's own commands, ``HF_TOKEN`` or ``hf auth login`` gives access, and ``HF_ENDPOINT`` names another hub.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from headkd_ray.errors import CheckpointError, StorageError, UserError

SCHEME = "hf://"
EXTRA = 'python -m pip install "headkd-ray[hub]"'
_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_ADDRESS = re.compile(rf"{SCHEME}(?P<name>{_NAME})(?:@(?P<revision>[^@?#\s]+))?")
LOG_IN = "log in (hf auth login), or set HF_TOKEN"
REFUSED = {
    401: f"the token is not valid: {LOG_IN}",
    403: "the token lacks the permission: set HF_TOKEN to one with write access",
}
"""Remedies by HTTP status."""


class Repository(NamedTuple):
    """A model repository at a revision."""

    name: str
    """``owner/name``."""
    revision: str | None = None
    """A branch, tag or commit; None = the default branch."""

    @property
    def address(self) -> str:
        """``hf://owner/name[@revision]``."""
        return f"{SCHEME}{self.name}" + (f"@{self.revision}" if self.revision else "")

    @classmethod
    def of(cls, address: str) -> Repository:
        """Parse ``hf://owner/name[@revision]``. Raises CheckpointError if it is none."""
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise CheckpointError(
                f"{address}: is not the address of a model repository; write hf://owner/name, or hf://owner/name@revision"
            )
        return cls(match["name"], match["revision"])


def is_repository(name: str) -> bool:
    """Return whether ``name`` has the form ``owner/name``."""
    return re.fullmatch(_NAME, name) is not None


def download(address: str, names: Sequence[str], also: Sequence[str] = (), what: str = "checkpoint of headkd_ray") -> Path:
    """Download the files ``names`` of a repository, all of one commit, and return the local folder that holds them.

    Files that are in huggingface_hub's cache already are not downloaded again; without network the cached ones serve.

    Args:
        also: patterns of files that are downloaded if the repository has them.
        what: what the files make up, for the message if one is missing.

    Raises:
        CheckpointError: the address is malformed, or the repository lacks one of the files.
        StorageError: there is no such repository or revision, no access or no network, or huggingface_hub is not installed.
    """
    repository = Repository.of(address)
    with _plain_errors(repository) as hub:
        if not sys.stderr.isatty():
            hub.utils.disable_progress_bars()
        folder = Path(hub.snapshot_download(repository.name, revision=repository.revision, allow_patterns=[*names, *also]))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{address}: is not a {what}; the repository has no {' and no '.join(missing)}")
    return folder


def check_token() -> None:
    """Check that there is a token to upload with. Raises StorageError."""
    if _huggingface_hub("pushing a checkpoint").get_token() is None:
        raise StorageError(f"pushing a checkpoint needs a token with write access: {LOG_IN}")


def upload(name: str, content: Mapping[str, bytes], message: str, private: bool) -> str:
    """Write files to the repository ``name``, which is created if need be, in one commit; return the commit's URL.

    Args:
        private: create a new repository as private, and write to none that is public. False = as the account does by default.

    Raises:
        StorageError: no write access or no network, the repository is not private although it should be, or huggingface_hub is
            not installed.
    """
    with _plain_errors(Repository(name)) as hub:
        api = hub.HfApi()
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise StorageError(
                f"{SCHEME}{name}: is a public repository already; make it private first, or push without --private"
            )
        operations = [hub.CommitOperationAdd(file, data) for file, data in content.items()]
        return str(api.create_commit(name, operations, commit_message=message).commit_url)


def _huggingface_hub(needed_by: str) -> Any:
    """Return the package huggingface_hub, which is an extra. Raises StorageError if it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise StorageError(f"{needed_by} needs huggingface_hub ({error}); install it: {EXTRA}") from error
    return huggingface_hub


@contextmanager
def _plain_errors(repository: Repository) -> Iterator[Any]:
    """Yield huggingface_hub, and raise its errors within the context as StorageError."""
    hub = _huggingface_hub(repository.address)
    from huggingface_hub import constants, errors

    where = constants.ENDPOINT
    try:
        yield hub
    except UserError:
        raise
    except Exception as error:
        match error:
            case errors.GatedRepoError():
                said = f"is gated; accept its conditions on {where}/{repository.name}, and {LOG_IN}"
            case errors.RepositoryNotFoundError():
                said = f"no such model repository on {where}, or it is private; correct the address, or {LOG_IN}"
            case errors.RevisionNotFoundError():
                said = f"the repository has no branch, tag or commit {repository.revision or constants.DEFAULT_REVISION!r}"
            case errors.HfHubHTTPError():
                said = f"{where} refuses ({_reason(error)}); {REFUSED.get(error.response.status_code, 'try again later')}"
            case errors.LocalEntryNotFoundError():
                said = f"{where} cannot be reached, and the files are not in the cache; check the network"
            case OSError(errno=int() as code) if not isinstance(error, ConnectionError):
                said = (
                    f"the cache {constants.HF_HUB_CACHE} cannot be written ({os.strerror(code)}); set HF_HOME to another folder"
                )
            case _:  # connection errors are of whichever HTTP library this version of huggingface_hub uses
                said = f"{where} cannot be used ({type(error).__name__}: {' '.join(str(error).split())}); check the network"
        raise StorageError(f"{repository.address}: {said}") from error


def _reason(error: Any) -> str:
    """Return the HTTP status of an error and what the server says."""
    return f"status {error.response.status_code}: {error.server_message or error.response.reason_phrase}"
