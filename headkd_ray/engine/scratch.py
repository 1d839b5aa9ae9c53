"""Temporary folders of a training process; those of a killed process are deleted by the next one."""

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
    """A temporary folder that is deleted when it is closed, when this object is garbage-collected, or when the process ends.

    It holds a lock while it is in use. The operating system releases the lock however the process ends, so a folder whose lock
    is free belongs to a dead process, even where containers share the folder and process ids are meaningless.
    """

    def __init__(self) -> None:
        sweep()
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        self._lock = open(Path(self._folder.name) / LOCK_FILE, "w")  # noqa: SIM115  # closing it would release the lock
        with suppress(OSError):  # without locks on this file system, sweep() deletes nothing either
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def folder(self) -> Path:
        """Create an empty folder in this one."""
        return Path(tempfile.mkdtemp(dir=self._folder.name))

    def close(self) -> None:
        """Delete the folder with everything in it."""
        self._folder.cleanup()
        self._lock.close()


def sweep() -> None:
    """Delete the scratch folders of this user's dead processes."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # already deleted, still in use, not yet locked, or another user's
            if folder.stat().st_uid != os.getuid():
                continue
            with open(folder / LOCK_FILE, "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
