"""Fixtures that run the evidence on drawn data."""

from __future__ import annotations

from pathlib import Path

import evidence
import pytest
from evidence_plan import Bench
from evidence_rows import ROWS


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, drawn_splits: dict[str, str]) -> Path:
    """Return a folder with the splits train, val and test."""
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "halves").mkdir()
    halves = {"halves/train": drawn_splits["val"], "halves/val": drawn_splits["train"]}
    for split, source in {**drawn_splits, "test": drawn_splits["val"], **halves}.items():
        (folder / split).symlink_to(source, target_is_directory=True)
    return folder


@pytest.fixture(params=["micro", "standard"])
def tier(request: pytest.FixtureRequest, tmp_path: Path, data: Path) -> Bench:
    """Return the real rows of each tier without pretrained weights, on drawn data, without the results of any search."""
    return real_rows(request.param, tmp_path, data)


@pytest.fixture
def micro(tmp_path: Path, data: Path) -> Bench:
    """Return the real rows of the micro tier on drawn data."""
    return real_rows("micro", tmp_path, data)


def real_rows(tier: str, folder: Path, data: Path) -> Bench:
    jobs = folder / "jobs"
    jobs.mkdir()
    for file in (evidence.JOBS / tier).glob("*.yaml"):
        (jobs / file.name).symlink_to(file)
    return Bench(tier, ROWS[tier], jobs, data, folder / "runs", folder / "results.jsonl")
