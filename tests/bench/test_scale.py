"""bench/scale.py and scale_ray.py: parts run at any size, and docs/scale.md has the figures of the results files."""

from __future__ import annotations

from pathlib import Path

import pytest
import scale
import scale_parts
import scale_ray
from evidence_tables import insert, read
from scale_parts import PARTS, SIZES, Size


def test_every_part_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", Size(600, 2500, 20, 40, 200))
    monkeypatch.setattr(scale_parts, "EPOCHS", 5)
    monkeypatch.setattr(scale_parts, "DATASET", 4)
    prepared, bare = tmp_path / "prepared", tmp_path / "bare"
    for folder in (prepared, bare):
        folder.mkdir()
    steps = {part: scale.measure(part, "tiny", prepared) for part in PARTS if part != "bare"}
    assert all(steps.values()) and all(record["peak_mb"] > 0 for records in steps.values() for record in records)
    assert scale.measure("bare", "tiny", bare) == []
    titles = [[record["step"] for record in scale.measure("order", "tiny", folder)] for folder in (prepared, bare)]
    assert titles[0] == titles[1], "planning needs no more than an index"
    table = scale.section([{**record, "date": "d"} for records in steps.values() for record in records])
    assert "tiny: 600 images, 2,500 boxes" in table and "resume in the middle of epoch 5" in table


def test_processes_are_told_apart() -> None:
    lines = {
        "/usr/bin/python -m headkd_ray.train /tmp/job.yaml": "driver",
        "ray::TrainController.run": "Ray Train's controller",
        "ray::run-log-1f:_QueueActor.get": "actors for the log and for stopping",
        "ray::RayTrainWorker.run_train_fn": "train workers",
        "ray::Map(DecodeChunk)": "data tasks",
        "/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/raylet": "raylets",
        "/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp": "the head's GCS",
        "ray::DashboardAgent": "dashboard and agents",
        "ray::_StatsActor": scale_ray.OTHER,
    }
    assert {line: scale_ray.group_of(line) for line in lines} == lines


def test_the_costs_of_a_step_and_of_a_trial_are_in_the_tables() -> None:
    made = {"ray": "2.60.0", "date": "d", "revision": "r"}
    spent = {"steps": 200, "seconds": 50.0, "cpu": {"driver": 1.0}, "created_bytes": 4e6, "most_bytes": 2e6}
    trials = {"states": {"finished": 4}, "minutes": 2.0, "driver": {"seconds": 8.0, "peak_mb": 700}, "proposals": {"3": 0.25}}
    records = [
        {"part": "steps", "workers": 2, **spent, **made},
        {"part": "trials", "trials": 4, **trials, "analysis": {"seconds": 9.0, "peak_mb": 500}, "page_bytes": 1e6, **made},
    ]
    table = scale_ray.section(records)
    for row in (
        "| driver | 5.0 (2.0%) |",
        "| put into the object stores a step | 20 kB |",
        "| the driver a trial: CPU s | 2.00 |",
    ):
        assert row in table
    assert "| a proposal after so many trials: CPU s | 3: 0.25 |" in table


def test_the_document_has_the_figures_of_the_files() -> None:
    text = scale.DOCUMENT.read_text()
    assert text == insert(text, scale.section(read(scale.RESULTS)), scale.BEGIN, scale.END), "run python bench/scale.py table"
    ray = scale_ray.section(read(scale_ray.RESULTS))
    assert text == insert(text, ray, scale_ray.BEGIN, scale_ray.END), "run python bench/scale_ray.py table"
