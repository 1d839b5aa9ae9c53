"""Every student with every teacher and every set of assistants: all parts learn, and the dense pairs keep to their formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headkd_ray.detectors import FCOS, Detector, RetinaNet, build_detector
from headkd_ray.distill import DenseHEAD, Trainee, build_trainee
from headkd_ray.errors import JobError
from headkd_ray.job import Job
from tests.detectors.micro import batch, faster_rcnn_spec, fcos_spec, liven, retinanet_spec

CLASSES = 3
STUDENTS = {"retinanet": retinanet_spec(), "fcos": fcos_spec()}
TEACHERS = {"faster_rcnn": faster_rcnn_spec(), "retinanet": retinanet_spec(channels=12), "fcos": fcos_spec(channels=8)}


def teacher_of(kind: str) -> Detector:
    torch.manual_seed(11)
    teacher = build_detector(TEACHERS[kind], CLASSES)
    liven(teacher)
    return teacher


def trainee_of(student: str, teacher: str, method: str = "head", **distill: Any) -> Trainee:
    job = Job.model_validate(
        {
            "run": {"name": "test"},
            "method": method,
            "data": {"train": "t", "val": "v"},
            "student": STUDENTS[student].model_dump(),
            "teacher": {"checkpoint": "c"},
            "distill": {"warmup_steps": 0, **distill},
        }
    )
    torch.manual_seed(0)
    return build_trainee(job, CLASSES, teacher_of(teacher), steps_per_epoch=10).train()


def step(trainee: Trainee, at: int = 5) -> dict[str, Tensor]:
    data = batch()
    return trainee(data["images"], data["sizes"], data["boxes"], data["labels"], at, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", ["copy_only", "akd", "head"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_pair_trains_all_its_parts_and_leaves_the_teacher(student: str, teacher: str, method: str) -> None:
    trainee = trainee_of(student, teacher, method)
    losses = step(trainee)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert ("loss_akd_1" in losses, "loss_ckd" in losses) == (method != "copy_only", method == "head")
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in trainee.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    if trainee.teacher is not None:
        assert all(p.grad is None for p in trainee.teacher.parameters())
        assert not [name for name in trainee.state_dict() if "teacher" in name]


@pytest.mark.parametrize("teacher", ["retinanet", "fcos"])
@pytest.mark.parametrize("student", STUDENTS)
def test_dense_pairs_are_the_formula(student: str, teacher: str) -> None:
    trainee = trainee_of(student, teacher, ckd_epochs=1)
    assert isinstance(trainee, DenseHEAD) and isinstance(trainee.teacher, (RetinaNet, FCOS))
    assert trainee.akd is not None and trainee.ckd is not None
    losses, data = step(trainee), batch()
    x = trainee.student.normalise(data["images"], data["sizes"])
    features = trainee.student.features(x)
    own, assisted = trainee.student.head(features), trainee.assistant(features)
    taught = trainee.teacher.head(trainee.teacher.features(x))

    def distance(adapter: nn.Module, maps: list[Tensor], targets: list[Tensor]) -> Tensor:
        kernel, bias = adapter.weight[:, :, 0, 0].double(), adapter.bias.double()  # type: ignore[index, union-attr]
        total = torch.zeros((), dtype=torch.float64)
        for map_, target in zip(maps, targets, strict=True):
            adapted = torch.einsum("oc,bchw->bohw", kernel, map_.double()) + bias[:, None, None]  # type: ignore[index]
            total = total + (adapted - target).square().mean()
        return total

    expected = {
        "loss_akd_1": 2 * distance(trainee.akd[0], assisted.taps, taught.taps),
        "loss_akd_2": 2 * distance(trainee.akd[1], assisted.box_taps, taught.box_taps),
        "loss_ckd": 2 * distance(trainee.ckd, own.taps, taught.taps),
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value, rtol=1e-5, atol=0)
    assert step(trainee, at=10)["loss_ckd"] == 0 and step(trainee, at=10)["loss_akd_1"] == losses["loss_akd_1"]


def test_the_dense_assistant_starts_as_the_teacher_s_head_and_ckd_does_not_train_it() -> None:
    trainee = trainee_of("retinanet", "fcos")
    assert isinstance(trainee, DenseHEAD) and isinstance(trainee.teacher, FCOS)
    theirs = trainee.teacher.head.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in trainee.assistant.state_dict().items())
    losses = step(trainee)
    reached = torch.autograd.grad(
        losses["loss_ckd"], list(trainee.assistant.parameters()), retain_graph=True, allow_unused=True
    )
    assert all(gradient is None for gradient in reached)
    towers = torch.autograd.grad(losses["loss_ckd"], list(trainee.student.head.cls_tower.parameters()), allow_unused=True)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in towers)


def test_an_rcnn_assistant_of_a_dense_teacher_is_refused() -> None:
    with pytest.raises(JobError, match="describes an R-CNN head"):
        trainee_of("retinanet", "fcos", assistant=faster_rcnn_spec().roi.model_dump())
