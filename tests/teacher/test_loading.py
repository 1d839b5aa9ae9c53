"""A teacher with more or fewer classes than the data can teach; the log says what became of its outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import FasterRCNN, build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.engine.preflight import preflight
from headkd_ray.job import Job
from headkd_ray.teacher.loading import load_teacher
from headkd_ray.train import train
from tests.support import MICRO_TEACHER, assert_same_weights, micro_job, student_weights


def taught(tmp_path: Path, splits: dict[str, str], names: tuple[str, ...]) -> Job:
    """Return a HEAD job with a random teacher of these classes."""
    job = micro_job(tmp_path, splits, student=MICRO_TEACHER)
    torch.manual_seed(3)
    save_detector(tmp_path / "teacher", build_detector(job.student, len(names)), names)
    once = {"epochs": 1, "milestones": []}
    return micro_job(tmp_path, splits, method="head", teacher={"checkpoint": str(tmp_path / "teacher")}, optim=once)


@pytest.mark.parametrize("change", ["superset", "subset", "order"])
def test_outputs_follow_class_names_and_the_log_says_so(change: str, tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    classes = ShardSet.open(drawn_splits["train"]).meta.classes
    names = {"superset": ("zebra", *classes), "subset": classes[2:], "order": tuple(reversed(classes))}[change]
    job = taught(tmp_path, drawn_splits, names)
    teacher = load_teacher(job, classes)
    assert teacher is not None and teacher.note is not None and isinstance(teacher.detector, FasterRCNN)
    own = load_teacher(job, None)
    assert own is not None and own.note is None and isinstance(own.detector, FasterRCNN)
    for label, name in enumerate(classes):
        if name in names:
            rows = teacher.detector.roi.cls_out.weight[label], own.detector.roi.cls_out.weight[names.index(name)]
            assert torch.equal(*rows)
    assert torch.equal(teacher.detector.roi.fcs[0].weight, own.detector.roi.fcs[0].weight)

    train(job, lambda record: None)
    first, *_ = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert first["note"] == teacher.note
    told = {
        "superset": [f"{len(classes)} of {len(classes)} matched", "left out because the data does not have them: 'zebra'"],
        "subset": [
            f"{len(classes) - 2} of {len(classes)} matched",
            f"new weights for classes that the teacher does not know: {classes[0]!r}",
        ],
        "order": [f"{len(classes)} of {len(classes)} matched"],
    }[change]
    assert all(part in first["note"] for part in told)


def test_fresh_outputs_depend_on_the_seed_alone(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    classes = ShardSet.open(drawn_splits["train"]).meta.classes
    job = taught(tmp_path, drawn_splits, classes[2:])
    weights = []
    for name, state_before in (("one", 1), ("other", 2)):
        torch.manual_seed(state_before)
        run = job.replace({"run.name": name})
        weights.append(student_weights(train(run, lambda record: None)))
    assert_same_weights(*weights)


def test_a_teacher_of_partly_other_classes(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """Its features do not depend on classes; outputs that both name are copied, and names that differ in case are reported."""
    classes = ShardSet.open(drawn_splits["train"]).meta.classes
    job = taught(tmp_path, drawn_splits, ("zebra", classes[1].upper(), *classes[2:]))
    teacher, own = load_teacher(job, classes), load_teacher(job, None)
    assert teacher is not None and own is not None and teacher.note is not None
    assert isinstance(teacher.detector, FasterRCNN) and isinstance(own.detector, FasterRCNN)
    assert torch.equal(teacher.detector.roi.cls_out.weight[2:], own.detector.roi.cls_out.weight[2:])
    assert not torch.equal(teacher.detector.roi.cls_out.weight[:2], own.detector.roi.cls_out.weight[:2])
    loud = classes[1].upper()
    assert teacher.note.split("; ") == [
        f"teacher: its head's outputs follow the data's class names ({len(classes) - 2} of {len(classes)} matched)",
        f"new weights for classes that the teacher does not know: {classes[0]!r}, {classes[1]!r}",
        f"warning: not matched because the letter case differs: {classes[1]!r} (the teacher's {loud!r})",
        f"left out because the data does not have them: 'zebra', {loud!r}",
    ]
    preflight(job)
