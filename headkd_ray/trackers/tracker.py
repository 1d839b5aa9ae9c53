"""The interface of an experiment tracker, and what it is told about a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class RunFacts(NamedTuple):
    """What is known about a run when it starts."""

    name: str
    address: str
    """The run's folder, as a path or URI."""
    job: Mapping[str, str | float | bool | None]
    """The job's keys by their dotted paths; lists and null are written as JSON, secrets of URIs are masked."""
    environment: Mapping[str, str]
    """Versions of Python and packages, and in a git checkout the commit."""


class Tracker(ABC):
    """A run in one tracking service. Every method may raise what the service's client raises."""

    @abstractmethod
    def __init__(self, place: str, facts: RunFacts, run_id: str | None) -> None:
        """Open a new run in ``place``, the value of the job's key, or continue ``run_id``."""

    @property
    @abstractmethod
    def run_id(self) -> str:
        """The service's own identifier of the run."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record finite numbers by name ("losses/total", "val/AP") at an optimizer step."""

    @abstractmethod
    def show(self, picture: bytes, step: int) -> None:
        """Record a picture of sample images with the detections of an evaluation, a JPEG file, at an optimizer step."""

    @abstractmethod
    def finish(self, metrics: Mapping[str, float], student: Path, picture: Path) -> None:
        """Record the run's result.

        Args:
            metrics: the best checkpoint's.
            student: folder of its student.
            picture: a PNG of validation images with ground truth and the student's detections.
        """

    @abstractmethod
    def close(self, failed: bool) -> None:
        """End the run, as failed or not."""
