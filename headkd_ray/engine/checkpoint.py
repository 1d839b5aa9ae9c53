"""Checkpoints: the training state to resume from, the student to deploy, and the store for runs without Ray."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from headkd_ray.detectors.safe_load import read_file
from headkd_ray.engine.files import read_json, writing
from headkd_ray.engine.scratch import Scratch
from headkd_ray.errors import CheckpointError
from headkd_ray.storage import Folder

STATE_FILE = "training_state.pt"
STUDENT_FOLDER = "student"
METRICS_FILE = "metrics.json"
CHECKSUMS_FILE = "checksums.json"
LISTING = "checkpoints.json"
SCORE = "AP"
UNSCORED = -1.0
"""AP of a checkpoint that was not evaluated: below every real AP, and not NaN, which Ray's listing stores as null."""


class Checkpoints(Protocol):
    """The checkpoint store that the training loop writes to; every rank calls ``report`` equally often."""

    notes: list[str]
    """Messages for the user about the checkpoints that were found, one sentence each."""

    def draft(self) -> Path:
        """Return an empty local folder for rank 0's next checkpoint."""
        ...

    def latest(self) -> Any:
        """Return a context manager that yields the latest intact checkpoint as a local ``Path``, or None for a new run.

        Raises CheckpointError if checkpoints exist but none of them is intact.
        """
        ...

    def report(self, name: str, metrics: dict[str, Any], folder: Path | None) -> None:
        """Store ``folder`` (rank 0's checkpoint, which is moved or deleted; None on other ranks) under ``name``."""
        ...


class LocalCheckpoints:
    """Checkpoints of a run in this process: the latest and the best by AP are kept in ``<run>/checkpoints``.

    If the latest is also the best, the one before it is kept too, so that the run can resume if the latest is damaged.

    ``checkpoints.json`` lists the complete checkpoints. It is replaced only once a checkpoint's files are in place, so a
    checkpoint that was half written when the process died is never used. Listed checkpoints that are missing or damaged are
    skipped.
    """

    def __init__(self, run: Folder) -> None:
        """Read the listing of checkpoints. Raises CheckpointError if it is damaged."""
        self.folder = run / "checkpoints"
        self.scratch = Scratch()
        self.notes: list[str] = []
        self.entries = _listed(self.folder)

    def draft(self) -> Path:
        return self.scratch.folder()

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        problems: list[str] = []
        copy: Path | None = None
        while self.entries and copy is None:
            name = self.entries[-1]["name"]
            copy = self.scratch.folder()
            try:
                if not (self.folder / name).has(STATE_FILE):
                    raise CheckpointError(f"{self.folder.named(name)}: is missing")
                Folder.open(copy).copy_from(self.folder / name)
                check(Folder.open(copy), called=self.folder.named(name))
                if not (copy / CHECKSUMS_FILE).exists():  # written by an earlier version: only readability can be checked
                    load_state(copy)
            except CheckpointError as error:
                problems += error.problems
                self.entries.pop()
                shutil.rmtree(copy)
                copy = None
        if problems and copy is None:
            raise none_intact(self.folder, problems)
        if problems:
            self.notes += [*problems, f"resuming from the previous checkpoint, {self.entries[-1]['name']}"]
        try:
            yield copy
        finally:
            if copy is not None:
                shutil.rmtree(copy)

    def report(self, name: str, metrics: dict[str, Any], folder: Path | None) -> None:
        """Store a checkpoint. Raises DiskError if it cannot be written; earlier checkpoints are then left as they were."""
        assert folder is not None, "a single process is rank 0"
        place = self.folder / name
        try:
            with writing(place.uri, "run.storage"):
                place.remove()  # a killed process may have left a partial copy
                try:
                    place.copy_from(Folder.open(folder))
                except OSError:
                    place.remove()  # a partial copy is useless and takes up space
                    raise
        finally:
            shutil.rmtree(folder)
        self.entries = [entry for entry in self.entries if entry["name"] != name] + [{"name": name, "score": metrics[SCORE]}]
        latest, *others = [entry["name"] for entry in reversed(self.entries)]
        best = self.ranking()[0]
        keep = {latest, best if best != latest or not others else others[0]}
        dropped = [entry["name"] for entry in self.entries if entry["name"] not in keep]
        self.entries = [entry for entry in self.entries if entry["name"] in keep]
        with writing(self.folder.named(LISTING), "run.storage"):
            self.folder.write(LISTING, json.dumps(self.entries, indent=1).encode())
        for old in dropped:
            (self.folder / old).remove()

    def ranking(self) -> list[str]:
        """Return the names of the checkpoints by decreasing AP; of equal ones, the later comes first."""
        order = sorted(range(len(self.entries)), key=lambda place: (self.entries[place]["score"], place), reverse=True)
        return [self.entries[place]["name"] for place in order]


def _listed(folder: Folder) -> list[dict[str, Any]]:
    if not folder.has(LISTING):
        return []
    mend = f"restore it, or delete {folder.uri} to train the run from the start"
    entries = read_json(folder, LISTING, CheckpointError, mend, list)
    for entry in entries:
        if not (isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("score"), int | float)):
            raise CheckpointError(f"{folder.named(LISTING)}: {entry!r} is not a checkpoint's name and score; {mend}")
    return entries


def none_intact(folder: Folder, problems: list[str]) -> CheckpointError:
    """Return the error for a run whose checkpoints are all missing or damaged."""
    return CheckpointError(
        [*problems, f"none is left to resume from; restore one, or delete {folder.uri} to train the run from the start"],
        headline=f"{folder.uri}: no checkpoint can be used:",
    )


def seal(folder: Path) -> None:
    """Complete a checkpoint by writing the checksums with which ``check`` detects damage.

    Raises DiskError if there is no space left.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_FILE)
    sums = {path.relative_to(folder).as_posix(): _sha256(Folder.open(path.parent), path.name) for path in files}
    with writing(str(folder / CHECKSUMS_FILE), "TMPDIR"):
        (folder / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=1))


def check(folder: Folder, called: str | None = None, under: str = "") -> None:
    """Compare a checkpoint's files with their checksums.

    Args:
        called: name of the folder in error messages, if it is a copy of another.
        under: compare only files whose names start with this.

    Raises:
        CheckpointError: a file is missing or differs from what was written. (A checkpoint of an earlier version, which has no
            checksums, is accepted.)
    """
    called = called or folder.uri
    if not folder.has(CHECKSUMS_FILE):
        return
    sums = read_json(folder, CHECKSUMS_FILE, CheckpointError, "the checkpoint is damaged", called=called)
    for name, expected in sums.items():
        if not name.startswith(under):
            continue
        if not folder.has(name):
            raise CheckpointError(f"{called}/{name}: is missing")
        if _sha256(folder, name) != expected:
            raise CheckpointError(f"{called}/{name}: is damaged: its content differs from what was written")


def first_intact(candidates: Iterable[Folder]) -> tuple[Folder, list[str]]:
    """Return the first evaluated checkpoint whose student and metrics are intact, and a sentence about each one skipped.

    Raises CheckpointError if there is none.
    """
    problems: list[str] = []
    for folder in candidates:
        if not folder.has(METRICS_FILE):
            continue
        try:
            for part in (STUDENT_FOLDER, METRICS_FILE):
                check(folder, under=part)
            return folder, problems
        except CheckpointError as error:
            problems += error.problems
    raise CheckpointError([*problems, "no evaluated checkpoint of the run is intact; choose another run.name"])


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the training state (nested dicts and lists of tensors and plain values). Raises DiskError."""
    path = folder / STATE_FILE
    with writing(str(path), "TMPDIR"), path.open("wb") as file:  # given a path, torch would hide the cause of an error
        torch.save(state, file)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote, onto the CPU and without unpickling code.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return read_file(folder / STATE_FILE)
    except CheckpointError as error:
        raise CheckpointError(f"unreadable training state: {error}; choose another run.name") from error


def scores_of(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's metrics, which are empty if it was not evaluated. Raises CheckpointError."""
    if not (folder / METRICS_FILE).exists():
        return {}
    return read_json(Folder.open(folder), METRICS_FILE, CheckpointError, "the checkpoint is damaged")


def _sha256(folder: Folder, name: str) -> str:
    digest = hashlib.sha256()
    with folder.fs.open_input_file(folder.at(name)) as file:
        while chunk := file.read(16 << 20):
            digest.update(chunk)
    return digest.hexdigest()
