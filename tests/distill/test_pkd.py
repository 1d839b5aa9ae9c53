"""PKD agrees with NumPy's correlation coefficients, compares the right levels, and refuses jobs that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headkd_ray.detectors import Detector, build_detector
from headkd_ray.distill import TrainingModel, build_training_model
from headkd_ray.distill.pkd import pearson_distance
from headkd_ray.errors import JobError
from headkd_ray.job import Job, problems
from tests.detectors.micro import SPECS, batch, faster_rcnn_spec, liven, whole

CLASSES = 3


def teacher_of(spec: Any) -> Detector:
    torch.manual_seed(11)
    teacher = build_detector(spec, CLASSES)
    liven(teacher)
    return teacher


def job(method: str = "head", student: str = "retinanet", **distill: Any) -> Job:
    keys = {"run": {"name": "test"}, "method": method, "data": {"train": "t", "val": "v"}, "student": SPECS[student]()}
    keys["student"] = keys["student"].model_dump()
    return Job.model_validate({**keys, "teacher": {"checkpoint": "c"}, "distill": {"warmup_steps": 0, **distill}})


def model_of(teacher: Detector, **keys: Any) -> TrainingModel:
    torch.manual_seed(0)
    return build_training_model(job(**keys), CLASSES, teacher, steps_per_epoch=10).train()


def step(model: TrainingModel) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = model(whole(batch()), 5, torch.Generator().manual_seed(3))
    return losses


def correlation(one: Tensor, other: Tensor) -> float:
    """Return the mean over channels of (n - 1) / n (1 - r)."""
    rows = [m.detach().double().transpose(0, 1).flatten(1).numpy() for m in (one, other)]
    each = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(*rows, strict=True)]
    return float(np.mean(each)) * (rows[0].shape[1] - 1) / rows[0].shape[1]


def test_the_distance_is_one_minus_pearson_s_correlation() -> None:
    torch.manual_seed(0)
    own, theirs = torch.randn(2, 5, 4, 7, requires_grad=True), torch.randn(2, 5, 4, 7, requires_grad=True)
    loss = pearson_distance(own, theirs)
    assert loss.item() == pytest.approx(correlation(own, theirs), rel=1e-4)
    loss.backward()
    assert own.grad is not None and theirs.grad is None
    assert pearson_distance(3 * theirs + 7, theirs).item() == pytest.approx(0, abs=1e-6)
    assert pearson_distance(-theirs, theirs).item() == pytest.approx(2 * 55 / 56, rel=1e-4)
    one = torch.ones(1, 2, 1, 1, requires_grad=True)  # a batch of one small image has a P7 of one value per channel
    loss = pearson_distance(one, torch.zeros(1, 2, 1, 1))
    loss.backward()
    assert loss == 0 and one.grad is not None and (one.grad == 0).all()


@pytest.mark.parametrize(
    ("student", "teacher", "levels"),
    [("retinanet", "faster_rcnn", 4), ("fcos", "gfl", 5), ("faster_rcnn", "faster_rcnn", 5)],
)
def test_levels_of_equal_stride_are_compared(student: str, teacher: str, levels: int) -> None:
    model = model_of(teacher_of(SPECS[teacher]()), student=student, pkd_weight=6.0)
    losses = step(model)
    x = model.student.normalise(batch()["images"], batch()["sizes"])
    assert model.teacher is not None
    own = dict(zip(model.student.strides, model.student.features(x), strict=True))
    theirs = dict(zip(model.teacher.strides, model.teacher.features(x), strict=True))
    shared = [stride for stride in own if stride in theirs]
    assert len(shared) == levels
    expected = 6 * sum(correlation(own[stride], theirs[stride]) for stride in shared)
    assert losses["loss_pkd"].item() == pytest.approx(expected, rel=1e-3)


def test_one_key_adds_it_to_head_and_changes_nothing_else() -> None:
    teacher = teacher_of(faster_rcnn_spec())
    plain, more = step(model_of(teacher)), step(model_of(teacher, pkd_weight=2.0))
    assert list(more) == [*plain, "loss_pkd"] and more["loss_pkd"] > 0
    assert all(torch.equal(loss, more[name]) for name, loss in plain.items())


@pytest.mark.parametrize("method", ["copy_only", "fitnet"])
def test_any_method_with_a_teacher_takes_it(method: str) -> None:
    model = model_of(teacher_of(SPECS["retinanet"]()), method=method, pkd_weight=1.0)
    losses = step(model)
    torch.stack(list(losses.values())).sum().backward()
    assert losses["loss_pkd"] > 0 and model.teacher is not None
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_a_pyramid_of_another_width_is_refused_with_the_key() -> None:
    spec = faster_rcnn_spec().model_dump()
    wide = type(faster_rcnn_spec()).model_validate({**spec, "neck": {**spec["neck"], "channels": 8}})
    with pytest.raises(JobError, match=r"distill\.pkd_weight: .* 16 channels, the teacher's 8; set student\.neck"):
        model_of(teacher_of(wide), pkd_weight=1.0, copy_head=False)


def test_what_the_job_alone_gets_wrong() -> None:
    sound = job(pkd_weight=1.0).model_dump()
    alone = Job.model_validate({**sound, "method": "supervised", "teacher": None})
    assert [p for p in problems(alone) if p.path[-1] == "pkd_weight"]
    cached = Job.model_validate(
        {**sound, "teacher": {"checkpoint": "c", "placement": "cache"}, "distill": {"pkd_weight": 1.0, "rois": "teacher"}}
    )
    (problem,) = (p for p in problems(cached) if "pkd_weight" in p.message)
    assert problem.path == ("teacher", "placement") and "use inline" in problem.message
