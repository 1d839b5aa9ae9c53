"""Define the errors that a user can fix. Commands print them without a traceback and exit with code 2."""

from __future__ import annotations

import signal
from collections.abc import Iterable

from headkd_ray.text import printable


class UserError(Exception):
    """One or more problems that the user can fix, all found before anything is lost.

    ``problems`` holds one line each; ``str(error)`` is the headline (if any) and the problems, one per line. Both are made
    ``printable``, because they quote names from files and addresses, and are displayed, logged and stored.
    """

    def __init__(self, problems: str | Iterable[str], headline: str | None = None) -> None:
        lines = [problems] if isinstance(problems, str) else problems
        self.problems: list[str] = [printable(line) for line in lines]
        self.headline = None if headline is None else printable(headline)
        # Exception.args must match __init__, so that the error survives pickling between processes (Ray, process pools).
        super().__init__(self.problems, self.headline)

    def __str__(self) -> str:
        lines = self.problems if self.headline is None else [self.headline, *(f"  - {line}" for line in self.problems)]
        return "\n".join(lines)


class DataError(UserError):
    """The data set (COCO JSON, images, prepared shards) is missing, damaged or inconsistent."""


class JobError(UserError):
    """The job file has unknown, missing or contradictory keys."""


class CacheError(UserError):
    """A cache of soft targets is missing, incomplete or damaged, or belongs to another teacher, job or data set."""


class CheckpointError(UserError):
    """A checkpoint is missing or damaged, or has another architecture."""


class ClusterError(UserError):
    """The cluster cannot run the job: it has too few CPUs or GPUs, no address, or storage that is not writable."""


class StorageError(UserError):
    """A storage folder or URI cannot be used."""


class DiskError(StorageError):
    """A file cannot be written: the disk is full or read-only, or a quota is used up."""


class ExportError(UserError):
    """A detector cannot be exported, or the exported file does not detect what the checkpoint detects."""


class TrainingError(UserError):
    """Training cannot continue because the loss is not finite."""


class TrackerError(UserError):
    """An experiment tracker cannot be reached, or refuses the run."""


class DeviceMemoryError(UserError):
    """A GPU, or the machine, has too little memory for the requested sizes."""


class StoppedError(UserError):
    """The run stopped on request (SIGTERM, Ctrl-C) after writing a checkpoint; if started again, it continues from there."""

    signal: int = signal.SIGTERM
    """The signal that requested the stop."""
