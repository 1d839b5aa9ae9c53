"""A run's page: what it shows, when it is written, and that it never harms the run."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from headkd_ray import run_report
from headkd_ray.engine.stored_detections import BEST, LAST, stored_detections
from headkd_ray.errors import UserError
from headkd_ray.job import Job
from headkd_ray.run_report import RunReport, reporting
from headkd_ray.storage import Folder
from headkd_ray.train import train
from tests.support import micro_job


def job_of(folder: Path, splits: dict[str, str], **log: Any) -> Job:
    log = {"report": None, "tensorboard": True, **log}
    return micro_job(folder, splits, log=log, eval={"every_epochs": 1})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, drawn_splits: dict[str, str]) -> tuple[Job, Folder]:
    """Train a run with a report, whose second evaluation is the best."""
    job = job_of(tmp_path_factory.mktemp("report"), drawn_splits)
    train(job)
    return job, Folder.open(job.run.storage) / job.run.name


def test_the_page_shows_the_run(trained: tuple[Job, Folder]) -> None:
    _, run = trained
    text = run.read("report.html").decode()
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text), "it needs nothing from the network"
    records = [json.loads(line) for line in run.read("log.jsonl").decode().splitlines()]
    assert f"Step {records[-1]['step']} of {records[-1]['steps']}, epoch 2" in text
    for part in ("AP on data.val", "Losses", "Learning rate", "Samples", "What errors cost", "Images with most mistakes"):
        assert f">{part}</h" in text, part
    assert "milestones: [1]" in text and "the best so far" in text
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"jpeg;base64,([^\"]+)", text)]
    assert len(pictures) > 1 and pictures[0].height > 1000, "four samples, one below the other"


def test_detections_of_the_last_and_the_best_evaluation_are_kept(trained: tuple[Job, Folder], drawn_splits: Any) -> None:
    _, run = trained
    last, best = (stored_detections(run, name) for name in (LAST, BEST))
    assert last is not None and best is not None and last.step >= best.step
    assert len(last.images) == 10 and {entry["image_id"] for entry in last.results} <= set(last.images)
    assert all(len(entry["bbox"]) == 4 and 0 <= entry["score"] <= 1 for entry in last.results)


def test_tensorboard_has_the_samples(trained: tuple[Job, Folder]) -> None:
    _, run = trained
    events = EventAccumulator((run / "tensorboard" / "samples").path)
    events.Reload()
    shown = events.Images("samples")
    assert [each.step for each in shown][-1] == json.loads(run.read("result.json"))["last"]["step"]
    assert shown[0].height > 1000


def test_a_page_waits_until_pages_are_a_small_share_of_the_time(
    trained: tuple[Job, Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run = trained
    written: list[float] = []
    now = [0.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    def write(report: RunReport) -> None:
        written.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr(run_report, "time", Clock)
    monkeypatch.setattr(RunReport, "_write", write)
    report = RunReport(job, run, lambda record: None, lambda picture, step: None)
    for _ in range(100):
        now[0] += 1.0
        report({"step": 1, "steps": 9, "epoch": 0.1, "val": {}})
    assert written[0] == 1.0 and 4 <= len(written) <= 6
    before = len(written)
    report({"step": 9, "steps": 9, "epoch": 1, "val": {}})
    assert len(written) == before, "the page of the end follows"
    report.update()
    assert len(written) == before + 1


def test_a_page_that_cannot_be_written_is_told_once_and_the_run_goes_on(trained: tuple[Job, Folder], tmp_path: Path) -> None:
    job, run = trained
    copy = Folder.open(tmp_path / "copy")
    copy.copy_from(run)
    (tmp_path / "copy" / "report.html").unlink()
    (tmp_path / "copy" / "report.html" / "in the way").mkdir(parents=True)
    told: list[dict[str, Any]] = []
    with reporting(job.replace({"log.tensorboard": False}), copy, told.append, lambda picture, step: None) as sink:
        sink({"step": 1, "steps": 9, "epoch": 0.1, "val": {}})
    notes = [record["note"] for record in told if "note" in record]
    assert len(notes) == 1 and notes[0].startswith(
        f"{tmp_path}/copy/report.html: not written, nor later ones in this process: "
    )


def test_without_matplotlib(trained: tuple[Job, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = trained
    monkeypatch.setattr(run_report, "find_spec", lambda name: None)
    told: list[dict[str, Any]] = []
    with reporting(job, Folder.open(tmp_path), told.append, lambda picture, step: None) as sink:
        sink({"step": 0, "steps": 9, "epoch": 0.0, "note": "x"})
    assert "no report.html without matplotlib (pip install 'headkd-ray[report]')" in told[0]["note"] and len(told) == 2
    asked = job.replace({"log.report": True, "data.val": str(tmp_path / "nowhere")})
    with pytest.raises(UserError) as caught:
        train(asked)
    assert "log.report: needs the package matplotlib, which is not installed: pip install 'headkd-ray[report]'" in str(
        caught.value
    )
    assert "nowhere" in str(caught.value)


def test_no_report_leaves_nothing(tmp_path: Path, trained: tuple[Job, Folder]) -> None:
    job, _ = trained
    sink = print
    with reporting(job.replace({"log.report": False}), Folder.open(tmp_path), sink, lambda picture, step: None) as same:
        assert same is sink
    assert not list(tmp_path.iterdir())
