"""Errors that a user can mend. Commands print them without a traceback and exit with code 2."""

from __future__ import annotations

import signal
from collections.abc import Iterable

from headkd_ray.text import printable


class UserError(Exception):
    """Something the user can mend: one or more problems, all found before anything is lost.

    ``problems`` holds one line each; ``str(error)`` is the headline (if any) and the problems, one a line. Both are made
    ``printable``: they quote names from files and addresses, and are shown, logged and written into records.
    """

    def __init__(self, problems: str | Iterable[str], headline: str | None = None) -> None:
        lines = [problems] if isinstance(problems, str) else problems
        self.problems: list[str] = [printable(line) for line in lines]
        self.headline = None if headline is None else printable(headline)
        # Exception.args stays rebuildable, so that the error survives pickling between processes (Ray, process pools).
        super().__init__(self.problems, self.headline)

    def __str__(self) -> str:
        lines = self.problems if self.headline is None else [self.headline, *(f"  - {line}" for line in self.problems)]
        return "\n".join(lines)


class DataError(UserError):
    """The data set (COCO JSON, images, prepared shards) is missing, damaged or contradicts itself."""


class JobError(UserError):
    """The job file has unknown, missing or contradictory keys."""


class CacheError(UserError):
    """A cache of soft targets is missing, incomplete, damaged or of another teacher, recipe or data set."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another architecture."""


class ClusterError(UserError):
    """The cluster cannot run what was asked: too few CPUs or GPUs, no address, storage not writable."""


class StorageError(UserError):
    """A storage folder or URI that cannot be used."""


class DiskError(StorageError):
    """A file cannot be written: the disk is full or read-only, or a quota is used up."""


class TrainingError(UserError):
    """Training cannot go on: the loss is not finite."""


class DeviceMemoryError(UserError):
    """A GPU, or the machine, has too little memory for the sizes that were asked for."""


class StoppedError(UserError):
    """The run was asked to stop (SIGTERM, Ctrl-C) and did, with a checkpoint: started again, it goes on."""

    signal: int = signal.SIGTERM
    """What asked."""
