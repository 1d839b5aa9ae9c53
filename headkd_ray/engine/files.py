"""Files of a run: damaged files are reported when they are read, and a full disk is reported as such."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from headkd_ray.errors import DiskError, UserError
from headkd_ray.storage import Folder


@contextmanager
def writing(path: str, key: str) -> Iterator[None]:
    """Convert errors of writing ``path`` within the context; ``key`` names the setting that chooses its location.

    Raises:
        DiskError: the disk is full or read-only, a quota is used up, or the like.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch raises "unexpected pos" while it handles the system's error.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        reason = getattr(cause, "strerror", None) or str(cause)
        raise DiskError(
            f"{path}: cannot be written ({reason}); make room there, or choose another {key}; the same command resumes "
            "from the last checkpoint"
        ) from error


def read_json(folder: Folder, name: str, error: type[UserError], mend: str, kind: Any = dict, called: str | None = None) -> Any:
    """Read a JSON file that an earlier command wrote.

    Args:
        mend: the remedy, with which error messages end after a semicolon.
        kind: the type that the content must have.
        called: name of the folder in messages, if it is a copy of another.

    Raises:
        error: the file is missing, cannot be read or has another type of content.
    """
    place = folder.named(name) if called is None else f"{called}/{name}"
    try:
        content = json.loads(folder.read(name))
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{place}: cannot be read ({problem}); {mend}") from problem
    if not isinstance(content, kind):
        words = {dict: "an object", list: "a list"}
        raise error(f"{place}: is not {words[kind]} in JSON; {mend}")
    return content
