"""Find the job and search files that come with this package.

In a checkout they are in ``jobs/``, beside the package; a wheel has them in ``headkd_ray/job_files/``.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

GROUPS = ("", "small/")
"""Subfolders with provided jobs; ``jobs/evidence`` belongs to ``bench/`` and is not installed."""


class ProvidedJob(NamedTuple):
    """A job or search file of this package."""

    name: str
    """Path below the folder of jobs, without its suffix: ``head``, ``small/head``."""
    path: Path

    @property
    def description(self) -> str:
        """The first line of the file's comment, after the one that names the schema."""
        return self.path.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")


def job_folder() -> Path:
    """Return the folder of the provided jobs and their schemas."""
    package = Path(str(files("headkd_ray")))
    installed = package / "job_files"
    return installed if installed.is_dir() else package.parent / "jobs"


def provided_jobs() -> dict[str, ProvidedJob]:
    """Return the provided jobs by their names, full-size ones first."""
    folder = job_folder()
    names = [f"{group}{path.stem}" for group in GROUPS for path in sorted((folder / group).glob("*.yaml"))]
    return {name: ProvidedJob(name, folder / f"{name}.yaml") for name in names}


def job_name(path: str) -> str:
    """Return the name that a provided job of this path would have: ``small/head`` for ``any/small/head.yaml``."""
    match = re.search(rf"(?:^|/)((?:{'|'.join(filter(None, GROUPS))})?[^/]+?)(?:\.yaml)?$", path)
    return match[1] if match else path
