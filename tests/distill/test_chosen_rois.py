"""AKD and CKD are the same with RoIs and soft targets computed beforehand, and no teacher is in the step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headkd_ray.detectors import Detector, FasterRCNN, build_detector
from headkd_ray.distill import TrainingModel, build_training_model
from headkd_ray.errors import JobError
from headkd_ray.job import Job
from headkd_ray.soft_targets import SoftTargets
from headkd_ray.teacher import SoftTeacher
from tests.detectors.micro import batch, cascade_spec, faster_rcnn_spec, fcos_spec, liven, retinanet_spec, whole

CLASSES = 3
BUDGET = 10
WIDTH = 24
STUDENTS = {"retinanet": retinanet_spec, "fcos": fcos_spec}
WEIGHTS = {"assistant_weight": 0.5, "akd_weight": 3.0, "ckd_weight": 5.0}


def teacher_of(spec: Any = None) -> Detector:
    torch.manual_seed(11)
    teacher = build_detector(spec or faster_rcnn_spec(), CLASSES)
    liven(teacher)
    return teacher


def model_of(
    student: str = "retinanet", method: str = "head", teacher: Detector | None = None, **distill: Any
) -> TrainingModel:
    job = Job.model_validate(
        {
            "run": {"name": "test"},
            "method": method,
            "data": {"train": "t", "val": "v"},
            "student": STUDENTS[student]().model_dump(),
            "teacher": {"checkpoint": "c"},
            "distill": {"rois": "teacher", "roi_budget": BUDGET, **WEIGHTS, **distill},
        }
    )
    torch.manual_seed(0)
    return build_training_model(job, CLASSES, teacher or teacher_of(), 10)


def targets_for(data: dict[str, Tensor]) -> SoftTargets:
    """Return targets with nine RoIs, four, and none: ground truth, boxes near it and anywhere; noise as teacher's features."""
    generator = torch.Generator().manual_seed(5)
    targets = SoftTargets.empty(3, BUDGET, 2, WIDTH)
    for i, count in enumerate((9, 4, 0)):
        own = data["boxes"][i][data["labels"][i] >= 0]
        near = own + 4 * torch.rand(len(own), 4, generator=generator) - 2
        corner = 40 * torch.rand(count, 2, generator=generator)
        anywhere = torch.cat([corner, corner + 4 + 30 * torch.rand(count, 2, generator=generator)], dim=1)
        targets.boxes[i, :count] = torch.cat([own, near, anywhere])[:count]
        targets.truth[i, : len(own)] = count > 0
        targets.valid[i, :count] = True
        targets.taps[i, :, :count] = torch.rand(2, count, WIDTH, generator=generator)
    return targets


def step(
    model: TrainingModel, data: dict[str, Tensor], targets: SoftTargets | None, at: int = 10_000, seed: int = 0
) -> dict[str, Tensor]:
    drawn_by = torch.Generator().manual_seed(seed)
    return model(replace(whole(data), targets=targets), at, drawn_by)


def distances(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss for name, loss in losses.items() if name.startswith(("loss_akd", "loss_ckd"))}


def by_hand(model: TrainingModel, data: dict[str, Tensor], targets: SoftTargets) -> dict[str, float]:
    """Compute the loss terms that depend on RoIs, RoI by RoI, from the features on in float64."""
    student, head = model.student, model.assistants.assist.head
    features = student.features(student.normalise(data["images"], data["sizes"]))
    outputs = student.head(features)  # type: ignore[operator, union-attr]
    image, place = targets.valid.nonzero(as_tuple=True)
    boxes = targets.boxes[image, place]
    looked = head(features[:4], boxes, image)
    cells = student.head.nearest_cells(outputs, boxes)  # type: ignore[operator, union-attr]
    _, akd_term, cross = model.terms
    akd, ckd = [[], []], []  # type: ignore[var-annotated]
    for row, (i, k) in enumerate(zip(image.tolist(), place.tolist(), strict=True)):
        for layer in range(2):
            adapted = akd_term.adapters[layer](looked.taps[layer][row])
            akd[layer].append((adapted - targets.taps[i, layer, k]).double() ** 2)
        if not targets.truth[i, k]:
            level, y, x, _ = cells[row].tolist()
            seen = outputs.taps[0][level][i, :, y, x]
            ckd.append((cross.adapter(seen) - targets.taps[i, -1, k]).double() ** 2)
    assert 0 < len(ckd) < len(akd[0]) == 13
    return {
        "loss_akd_1": WEIGHTS["akd_weight"] * float(torch.stack(akd[0]).mean()),
        "loss_akd_2": WEIGHTS["akd_weight"] * float(torch.stack(akd[1]).mean()),
        "loss_ckd": WEIGHTS["ckd_weight"] * float(torch.stack(ckd).mean()),
    }


@pytest.mark.parametrize("student", STUDENTS)
def test_the_formula(student: str) -> None:
    model, data = model_of(student).eval(), batch()
    liven(model.assistants)
    targets = targets_for(data)
    with torch.no_grad():
        losses = step(model, data, targets)
        expected = by_hand(model, data, targets)
    assert expected.keys() == distances(losses).keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5), name
    with torch.no_grad():  # halfway through the warm-up AKD and CKD have half their weight
        half = step(model, data, targets, at=1000)
    for name in losses:
        factor = 0.5 if name in expected else 1.0
        torch.testing.assert_close(half[name], factor * losses[name])


def test_padding_of_the_targets_and_of_the_truth_is_never_read() -> None:
    model, data = model_of().eval(), batch()
    targets = targets_for(data)
    noise = torch.Generator().manual_seed(1)
    spoilt = targets._replace(
        boxes=torch.where(targets.valid[..., None], targets.boxes, 50 * torch.rand(targets.boxes.shape, generator=noise)),
        truth=targets.truth | ~targets.valid,
        taps=torch.where(targets.valid[:, None, :, None], targets.taps, torch.nan),
    )
    wider = data | {"boxes": F.pad(data["boxes"], (0, 0, 0, 3)), "labels": F.pad(data["labels"], (0, 3), value=-1)}
    with torch.no_grad():
        first, same, padded = (step(model, data, targets), step(model, data, spoilt), step(model, wider, targets))
    for name, loss in first.items():
        assert torch.equal(loss, same[name]), name
        # The assistant samples its own RoIs, and the padding adds to the candidates.
        assert name.startswith("loss_assist") or torch.equal(loss, padded[name]), name


def test_the_losses_are_those_of_a_teacher_asked_in_the_step() -> None:
    """Given the RoIs that ``SoftTeacher`` chose, a teacher in the step gives the same features for them, and for no others."""
    teacher, data = teacher_of(), batch() | {"sizes": torch.tensor([[64, 96], [50, 90], [64, 90]])}  # padded alike
    assert isinstance(teacher, FasterRCNN)
    targets = SoftTeacher(teacher, BUDGET, seed=0, pad=32)(whole(data))
    given, inline = model_of(teacher=teacher).eval(), model_of(teacher=teacher, rois="student").eval()
    inline.load_state_dict(given.state_dict())
    assert given.teacher is None and inline.teacher is teacher
    with torch.no_grad():
        forward = given.run(replace(whole(data), targets=targets))
        losses, chosen = given.losses(forward, 5000), forward.comparison.assistant.stages[0].rois
        inline.assistants.assist.sample = lambda *_: chosen
        other = inline.run(whole(data))
        expected = inline.losses(other, 5000)
    assert torch.equal(chosen.boxes, targets.boxes[targets.valid]) and losses.keys() == expected.keys()
    for mine, theirs in zip(forward.comparison.teacher.taps, other.comparison.teacher.taps, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for name in losses:
        if not name.startswith("loss_assist"):
            torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("student", STUDENTS)
def test_the_assistant_learns_from_labels_where_the_student_looks(student: str) -> None:
    """It does the same beside a teacher in the step: RoIs chosen beforehand serve only the comparison."""
    given, data = model_of(student).eval(), batch()
    inline = model_of(student, rois="student").eval()
    inline.load_state_dict(given.state_dict())
    with torch.no_grad():
        losses, expected = step(given, data, targets_for(data), seed=3), step(inline, data, None, seed=3)
    assert losses.keys() == expected.keys()
    for name in losses:
        assert torch.equal(losses[name], expected[name]) != (name in distances(losses)), name


def test_no_teacher_is_in_the_model() -> None:
    teacher = teacher_of()
    model = model_of(teacher=teacher)
    assert model.teacher is None and len(model.terms) == 3
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}
    assert not any("teacher" in name for name in model.state_dict())
    with_teacher = model_of(teacher=teacher, rois="student")
    assert with_teacher.teacher is teacher and with_teacher.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("method", ["akd", "head"])
@pytest.mark.parametrize("rois", ["all", "truth", "none"])
def test_every_parameter_gets_a_gradient(student: str, method: str, rois: str) -> None:
    """This holds even if the batch has no RoI at all, or none but ground truth, which CKD leaves out."""
    model, data = model_of(student, method).train(), batch()
    targets = targets_for(data)
    if rois != "all":
        kept = targets.truth if rois == "truth" else torch.zeros_like(targets.truth)
        targets = targets._replace(valid=kept)
    losses = step(model, data, targets)
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert len(distances(losses)) == (3 if method == "head" else 2)
    for name, loss in distances(losses).items():
        assert (loss.item() == 0) == (rois == "none" or (rois == "truth" and name == "loss_ckd"))


def test_what_is_compared_is_not_drawn() -> None:
    model, data = model_of().eval(), batch()
    targets = targets_for(data)
    first, other = (step(model, data, targets, seed=seed) for seed in (1, 2))
    assert all(torch.equal(loss, first[name]) for name, loss in distances(other).items())
    before = torch.get_rng_state()
    step(model, data, targets)
    assert torch.equal(torch.get_rng_state(), before)


def test_mixed_precision() -> None:
    model, data = model_of().train(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model, data, targets_for(data))
    assert {loss.dtype for loss in losses.values()} == {torch.float32} and all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()


@pytest.mark.parametrize("spec", [retinanet_spec(), cascade_spec()], ids=["retinanet", "cascade_rcnn"])
def test_only_a_faster_rcnn_chooses_rois(spec: Any) -> None:
    with pytest.raises(JobError, match=r"distill.rois: teacher needs a faster_rcnn teacher.*this one is a (retinanet|cascade)"):
        model_of(teacher=teacher_of(spec))
    assert model_of(teacher=teacher_of(spec), rois="student", copy_head=False).teacher is not None
