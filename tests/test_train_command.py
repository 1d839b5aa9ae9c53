"""The command train as a user runs it: what it refuses before anything starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from headkd_ray import train
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.job import Job, load_job
from tests.support import MICRO_STUDENT, MICRO_TEACHER, micro_job, other_split, refused

Write = Callable[[Job], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a job file."""

    def write(job: Job) -> str:
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
        return str(path)

    return write


def test_print_config_is_a_job_that_loads_to_the_same(
    tmp_path: Path, drawn_splits: dict[str, str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "runs"
    job = micro_job(storage, drawn_splits)
    assert train.main([write(job), "optim.lr=0.125", "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_job(printed) == job.replace({"optim.lr": 0.125})
    assert not storage.exists()


def _without_boxes(split: str, out: Path) -> str:
    """Return the same prepared split with an index that counts no boxes, which prepare itself would refuse to write."""
    shutil.copytree(split, out)
    table = pq.read_table(out / "index.parquet")
    column = table.schema.get_field_index("boxes")
    none = np.zeros(len(table), np.int32)
    pq.write_table(table.set_column(column, table.schema.field(column), [none]), out / "index.parquet")
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps({**meta, "boxes": 0}))
    return str(out)


def _detector(folder: Path, kind: dict[str, Any], classes: tuple[str, ...], splits: dict[str, str]) -> str:
    """Save a checkpoint with random weights."""
    method = micro_job(folder, splits, student=kind)
    save_detector(folder, build_detector(method.student, len(classes)), classes)
    return str(folder)


def _taught_by(checkpoint: str) -> dict[str, Any]:
    return {"method": "head", "teacher": {"checkpoint": checkpoint}}


def _missing_split(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    return {"data": {"train": str(tmp_path / "nowhere")}}, [
        f"{tmp_path}/nowhere: the data set is missing or empty",
        "headkd_ray.prepare",
    ]


def _unprepared_folder(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"")
    return {"data": {"val": str(tmp_path / "photos")}}, [f"{tmp_path}/photos: the data set is not completely prepared"]


def _other_classes_in_val(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    return {"data": {"val": other_split(tmp_path, ["cat", "dog"])}}, ["Class lists disagree", "data.val", "'cat', 'dog'"]


def _empty_training_split(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    return {"data": {"train": _without_boxes(splits["train"], tmp_path / "empty")}}, ["/empty: no image has a box to train on"]


def _teacher_of_other_classes(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    teacher = _detector(tmp_path / "teacher", MICRO_TEACHER, ("cat", "dog"), splits)
    return _taught_by(teacher), [
        f"teacher ({teacher}) has 2 classes",
        "'cat', 'dog'",
        "must know at least one class of the data",
    ]


def _teacher_of_the_wrong_kind(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    classes = ShardSet.open(splits["train"]).meta.classes
    teacher = _detector(tmp_path / "teacher", MICRO_TEACHER, classes, splits)
    return {**_taught_by(teacher), "method": "fitnet"}, ["needs a retinanet teacher", "faster_rcnn"]


def _teacher_of_another_architecture(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The folder has model.json of one detector and model.safetensors of another."""
    classes = ShardSet.open(splits["train"]).meta.classes
    teacher = _detector(tmp_path / "teacher", MICRO_TEACHER, classes, splits)
    _detector(tmp_path / "other", MICRO_STUDENT, classes, splits)
    shutil.copy(tmp_path / "other" / "model.safetensors", teacher)
    return _taught_by(teacher), ["roi.fcs.0.weight", "head."]


def _missing_teacher(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    return _taught_by(str(tmp_path / "gone")), [f"{tmp_path}/gone: no such folder or file"]


def _folder_that_is_no_checkpoint(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    _detector(tmp_path / "run" / "student", MICRO_TEACHER, ("cat",), splits)
    return _taught_by(str(tmp_path / "run")), [f"{tmp_path}/run: no checkpoint here", f"did you mean {tmp_path}/run/student"]


def _start_of_another_architecture(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    classes = ShardSet.open(splits["train"]).meta.classes
    start = _detector(tmp_path / "start", {**MICRO_STUDENT, "neck": {"channels": 24}}, classes, splits)
    student = {**MICRO_STUDENT, "checkpoint": start}
    return {"student": student}, ["student.neck.channels: 16 in the job, 24 in the checkpoint", "set student.neck.channels=24"]


def _missing_start_and_teacher(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    start, teacher = (f"{tmp_path}/{name}" for name in ("gone", "lost"))
    gone = "no such folder or file"
    student = {**MICRO_STUDENT, "checkpoint": start}
    return {"student": student, **_taught_by(teacher)}, [
        f"student.checkpoint: {start}: {gone}",
        f"teacher.checkpoint: {teacher}: {gone}",
    ]


@pytest.mark.parametrize(
    "case",
    [
        _missing_split,
        _unprepared_folder,
        _other_classes_in_val,
        _empty_training_split,
        _teacher_of_other_classes,
        _teacher_of_the_wrong_kind,
        _teacher_of_another_architecture,
        _missing_teacher,
        _folder_that_is_no_checkpoint,
        _start_of_another_architecture,
        _missing_start_and_teacher,
    ],
    ids=lambda case: case.__name__.strip("_"),
)
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_input_is_refused_before_anything_starts_or_is_written(
    case: Callable[[Path, dict[str, str]], tuple[dict[str, Any], list[str]]],
    workers: int,
    tmp_path: Path,
    drawn_splits: dict[str, str],
    write: Write,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "headkd_ray.cluster.trainer", None)  # importing it would be too late to report an error
    sections, causes = case(tmp_path, drawn_splits)
    storage = tmp_path / "runs"
    message = refused(capsys, train.main, [write(micro_job(storage, drawn_splits, **sections, cluster={"workers": workers}))])
    assert all(cause in message for cause in causes), message
    assert not storage.exists()


def test_storage_that_cannot_be_written(
    tmp_path: Path, drawn_splits: dict[str, str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    job = micro_job(tmp_path / "file" / "runs", drawn_splits)
    message = refused(capsys, train.main, [write(job)])
    assert f"run.storage: {tmp_path}/file/runs/run: not writable" in message
    assert (tmp_path / "file").read_text() == "kept"
    message = refused(capsys, train.main, [write(job), "run.storage=nosuch://bucket/runs"])
    assert "nosuch://bucket/runs: no filesystem for this URI" in message


def test_all_problems_are_reported_at_once(
    tmp_path: Path, drawn_splits: dict[str, str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    job = micro_job(
        tmp_path / "file", {"train": str(tmp_path / "no1"), "val": str(tmp_path / "no2")}, **_taught_by(str(tmp_path / "no3"))
    )
    message = refused(capsys, train.main, [write(job)])
    assert message.startswith("error: run run cannot start:\n")
    assert all(cause in message for cause in ("/no1: ", "/no2: ", "/no3: ", "run.storage: ")), message
    assert len(message.strip().splitlines()) == 5


def test_exit_code_and_last_words_of_the_process(tmp_path: Path, drawn_splits: dict[str, str], write: Write) -> None:
    job = write(micro_job(tmp_path / "runs", {**drawn_splits, "val": str(tmp_path / "nowhere")}))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-m", "headkd_ray.train", job], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/nowhere: the data set is missing")
    assert "Traceback" not in done.stderr
