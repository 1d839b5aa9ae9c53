"""Files of a run: what was written is read back with care, and a disk that is full is told as what it is."""

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
    """Tell of a file at ``path`` that cannot be written within; ``key`` says what chooses its place.

    Raises:
        DiskError: the disk is full or read-only, a quota is used up, or the like.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch says "unexpected pos", while it handles the system's error.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        reason = getattr(cause, "strerror", None) or str(cause)
        raise DiskError(
            f"{path}: cannot be written ({reason}); make room there, or choose another {key}; the same command goes on from "
            "the last checkpoint"
        ) from error


def read_json(folder: Folder, name: str, error: type[UserError], mend: str, kind: Any = dict, called: str | None = None) -> Any:
    """The content of a JSON file that was written by an earlier command.

    Args:
        mend: the end of the message, after a semicolon.
        kind: the type that the whole must have.
        called: what messages call the folder, if it is a copy of another.

    Raises:
        error: it is missing, cannot be read or is something else.
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
