"""Temporary folders of a training process, which a killed one cannot delete: the next one does."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "headkd-scratch-"
LOCK_FILE = ".lock"


class Scratch:
    """A temporary folder that is deleted when it is closed, when this object is garbage, or when the process ends.

    It holds a lock as long as it is used. The operating system releases the lock however the process ends, so a folder whose
    lock is free is that of a dead process, also where containers share the folder and process ids mean nothing.
    """

    def __init__(self) -> None:
        sweep()
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        self._lock = open(Path(self._folder.name) / LOCK_FILE, "w")  # noqa: SIM115  # closing it would release the lock
        with suppress(OSError):  # a file system without locks: nobody sweeps there either
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def folder(self) -> Path:
        """A new empty folder in it."""
        return Path(tempfile.mkdtemp(dir=self._folder.name))

    def close(self) -> None:
        """Delete it with all that is in it."""
        self._folder.cleanup()
        self._lock.close()


def sweep() -> None:
    """Delete the scratch folders of this user's dead processes."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is gone meanwhile, still in use, not yet locked, or somebody else's
            if folder.stat().st_uid != os.getuid():
                continue
            with open(folder / LOCK_FILE, "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
