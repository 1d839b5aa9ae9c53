"""Checkpoints: training state to resume from, the student to serve, and where a run without Ray keeps them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from headkd_ray.detectors.safe_load import read_file
from headkd_ray.errors import CheckpointError
from headkd_ray.storage import Folder

STATE_FILE = "training_state.pt"
STUDENT_FOLDER = "student"
METRICS_FILE = "metrics.json"
LISTING = "checkpoints.json"
SCORE = "AP"
UNSCORED = -1.0
"""AP of a checkpoint without an evaluation: below every real one, and not NaN, which Ray's listing stores as null."""


class Checkpoints(Protocol):
    """Where the loop reports progress; every rank calls ``report`` equally often."""

    def latest(self) -> Any:
        """Context manager giving the latest complete checkpoint as a local folder (``Path``), or None at a fresh start."""
        ...

    def report(self, name: str, metrics: dict[str, Any], folder: Path | None) -> None:
        """Keep ``folder`` (rank 0's checkpoint, moved or deleted by the callee; None on other ranks) under ``name``."""
        ...


class LocalCheckpoints:
    """Checkpoints of a run in this process: the latest and the best by AP stay, in ``<run>/checkpoints``.

    ``checkpoints.json`` lists the complete ones; it is replaced after the files are there, so that a checkpoint half written
    when the process died is never chosen.
    """

    def __init__(self, run: Folder) -> None:
        self.folder = run / "checkpoints"
        self.entries: list[dict[str, Any]] = json.loads(self.folder.read(LISTING)) if self.folder.has(LISTING) else []

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        if not self.entries:
            yield None
            return
        with tempfile.TemporaryDirectory() as scratch:
            Folder.open(scratch).copy_from(self.folder / self.entries[-1]["name"])
            yield Path(scratch)

    def report(self, name: str, metrics: dict[str, Any], folder: Path | None) -> None:
        assert folder is not None, "a single process is rank 0"
        try:
            (self.folder / name).remove()  # what a killed predecessor may have left half written
            (self.folder / name).copy_from(Folder.open(folder))
        finally:
            shutil.rmtree(folder)
        self.entries = [entry for entry in self.entries if entry["name"] != name] + [{"name": name, "score": metrics[SCORE]}]
        keep = {self.entries[-1]["name"], self.best()}
        dropped = [entry["name"] for entry in self.entries if entry["name"] not in keep]
        self.entries = [entry for entry in self.entries if entry["name"] in keep]
        self.folder.write(LISTING, json.dumps(self.entries, indent=1).encode())
        for old in dropped:
            (self.folder / old).remove()

    def best(self) -> str | None:
        """Name of the checkpoint with the highest AP, the later one of equals; None at first."""
        return max(reversed(self.entries), key=lambda entry: entry["score"])["name"] if self.entries else None


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the training state (nested dicts and lists of tensors and plain values)."""
    torch.save(state, folder / STATE_FILE)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote, on the CPU and without unpickling code.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return read_file(folder / STATE_FILE)
    except CheckpointError as error:
        raise CheckpointError(f"unreadable training state: {error}; start a new run.name or delete this checkpoint") from error
