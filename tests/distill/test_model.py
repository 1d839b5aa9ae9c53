"""What each method trains, which losses it has, and what it must never change."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

from headkd_ray.detectors import DenseHead, Detector, FasterRCNN, RoIHead, build_detector, weigh_classes
from headkd_ray.detectors.weights import load_torchvision
from headkd_ray.distill import TrainingModel, build_training_model, ckd, warmup
from headkd_ray.distill.fitnet import FitNet
from headkd_ray.errors import JobError
from headkd_ray.job import Job
from tests.detectors.micro import batch, faster_rcnn_spec, fcos_spec, liven, retinanet_spec, whole

CLASSES = 3
STEPS_PER_EPOCH = 10
STUDENT = ("loss_cls", "loss_box")
ASSISTANT = ("loss_assist_cls", "loss_assist_box")
AKD = ("loss_akd_1", "loss_akd_2")
LOSSES: dict[str, tuple[str, ...]] = {
    "supervised": STUDENT,
    "assist": STUDENT + ASSISTANT,
    "copy_only": STUDENT + ASSISTANT,
    "akd": STUDENT + ASSISTANT + AKD,
    "head": (*STUDENT, *ASSISTANT, *AKD, "loss_ckd"),
    "fitnet": (*STUDENT, "loss_fitnet"),
}


def job(method: str, **distill: Any) -> Job:
    with_teacher = method not in ("supervised", "assist")
    if method == "assist":
        distill.setdefault("assistant", faster_rcnn_spec().roi.model_dump())
    return Job.model_validate(
        {
            "run": {"name": "test"},
            "method": method,
            "data": {"train": "t", "val": "v"},
            "student": retinanet_spec().model_dump(),
            "teacher": {"checkpoint": "c"} if with_teacher else None,
            "distill": distill,
        }
    )


def teacher_of(method: str, classes: int = CLASSES) -> Detector | None:
    if method in ("supervised", "assist"):
        return None
    torch.manual_seed(11)
    teacher = build_detector(retinanet_spec() if method == "fitnet" else faster_rcnn_spec(), classes)
    liven(teacher)
    return teacher.train()


def model_of(method: str, **distill: Any) -> TrainingModel:
    torch.manual_seed(0)
    return build_training_model(job(method, **distill), CLASSES, teacher_of(method), STEPS_PER_EPOCH).train()


def step(model: TrainingModel, at: int = 1000, seed: int = 0, **change: Tensor) -> dict[str, Tensor]:
    data = {**batch(), **change}
    return model(whole(data), at, torch.Generator().manual_seed(seed))


def ckd_of(model: TrainingModel) -> ckd.CKD:
    (term,) = (term for term in model.terms if isinstance(term, ckd.CKD))
    return term


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("method", LOSSES)
def test_gradients_reach_exactly_what_the_method_trains(method: str) -> None:
    model = model_of(method)
    losses = step(model)
    assert tuple(losses) == LOSSES[method]
    assert all(loss.dtype == torch.float32 and loss.isfinite() and loss > 0 for loss in losses.values())
    total(losses).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    if model.teacher is not None:
        assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())


def reached(loss: Tensor, model: TrainingModel) -> set[str]:
    """Return the parts of the model that a loss has a gradient for."""
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    touched = {name for name, g in zip(parameters, gradients, strict=True) if g is not None and g.abs().sum() > 0}
    parts = ("student.backbone", "student.neck", "student.head.cls_tower", "student.head.cls_out", "student.head.box")
    return {
        part
        for part in (*parts, "assistants.assist.head.fcs", "assistants.assist.head.box_out", "terms.1", "terms.2")
        if any(t.startswith(part) for t in touched)
    }


def test_each_loss_of_head_reaches_what_it_should() -> None:
    model = model_of("head")
    losses = step(model)
    below = {"student.backbone", "student.neck"}
    assert reached(losses["loss_cls"], model) == below | {"student.head.cls_tower", "student.head.cls_out"}
    assert reached(losses["loss_box"], model) == below | {"student.head.box"}
    assert reached(losses["loss_assist_cls"], model) == below | {"assistants.assist.head.fcs"}
    assert reached(losses["loss_akd_1"], model) == below | {"assistants.assist.head.fcs", "terms.1"}
    assert reached(losses["loss_akd_2"], model) == below | {"assistants.assist.head.fcs", "terms.1"}
    assert reached(losses["loss_ckd"], model) == below | {"student.head.cls_tower", "terms.2"}


@pytest.mark.parametrize("method", ["copy_only", "akd", "head", "fitnet"])
def test_the_teacher_stays_frozen(method: str) -> None:
    teacher = teacher_of(method)
    assert teacher is not None
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    torch.manual_seed(0)
    model = build_training_model(job(method), CLASSES, teacher, STEPS_PER_EPOCH).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    total(step(model)).backward()
    optimizer.step()
    own = {id(p) for p in teacher.parameters()}
    assert not own & {id(p) for p in model.parameters()}
    assert teacher not in set(model.modules())
    assert not any("teacher" in name for name in model.state_dict())
    if model.teacher is not None:
        assert not any(m.training for m in teacher.modules())
    assert all(torch.equal(before[n], t) for n, t in teacher.state_dict().items())


def test_the_teacher_follows_to_another_dtype_and_device() -> None:
    model = model_of("head")
    assert model.teacher is not None
    model.to(torch.float64)
    assert {p.dtype for p in model.teacher.parameters()} == {torch.float64}
    model.to("meta")
    assert {p.device.type for p in model.teacher.parameters()} == {"meta"}


@pytest.mark.parametrize("method", ["copy_only", "akd", "head"])
def test_the_assistant_starts_as_the_teachers_head_and_then_lives_its_own_life(method: str) -> None:
    teacher = teacher_of(method)
    assert teacher is not None
    model = build_training_model(job(method), CLASSES, teacher, STEPS_PER_EPOCH)
    theirs = teacher.roi.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(t, theirs[n]) for n, t in model.assistants.assist.head.state_dict().items())
    with torch.no_grad():
        for parameter in model.assistants.assist.head.parameters():
            parameter.add_(1)
    assert not any(torch.equal(t, theirs[n]) for n, t in model.assistants.assist.head.state_dict().items())
    assert model.assistants.assist.head.strides == (8, 16, 32, 64)


def test_copying_can_be_switched_off() -> None:
    teacher = teacher_of("head")
    assert teacher is not None
    model = build_training_model(job("head", copy_head=False), CLASSES, teacher, STEPS_PER_EPOCH)
    assert not torch.equal(model.assistants.assist.head.cls_out.weight, teacher.roi.cls_out.weight)  # type: ignore[union-attr]


def test_fitnet_copies_the_dense_head() -> None:
    teacher = teacher_of("fitnet")
    assert teacher is not None
    model = build_training_model(job("fitnet"), CLASSES, teacher, STEPS_PER_EPOCH)
    theirs = teacher.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in model.student.state_dict().items() if n.startswith("head."))


@pytest.mark.parametrize("levels", [5, 2])
def test_fitnet_formula(levels: int) -> None:
    model, data = model_of("fitnet", fitnet_weight=3.0, fitnet_levels=levels).eval(), batch()
    loss = step(model, at=0)["loss_fitnet"]
    assert model.teacher is not None
    x = model.student.normalise(data["images"], data["sizes"])
    expected = 0.0
    (term,) = model.terms
    assert isinstance(term, FitNet)
    pyramids = model.student.features(x)[:levels], model.teacher.features(x)[:levels]
    for adapter, mine, theirs in zip(term.adapters, *pyramids, strict=True):
        expected += float(((adapter(mine) - theirs).double() ** 2).mean().detach())
    assert float(loss.detach()) == pytest.approx(3 * expected, rel=1e-5)


def test_warmup_and_weights() -> None:
    assert [warmup(t, 2000) for t in (0, 1, 1000, 2000, 9999)] == [0.0, 0.0005, 0.5, 1.0, 1.0]
    assert warmup(0, 0) == 1.0
    model = model_of("head").eval()
    start, half, full = (step(model, at=t) for t in (0, 1000, 5000))
    for name in (*AKD, "loss_ckd"):
        assert start[name].item() == 0
        torch.testing.assert_close(2 * half[name], full[name])
    for name in STUDENT + ASSISTANT:
        torch.testing.assert_close(start[name], full[name])
    weighted = model_of("head", akd_weight=6.0, ckd_weight=1.0, assistant_weight=0.5).eval()
    other = step(weighted, at=5000)
    for name in AKD:
        torch.testing.assert_close(other[name], 3 * full[name])
    torch.testing.assert_close(other["loss_ckd"], 0.5 * full["loss_ckd"])
    for name in ASSISTANT:
        torch.testing.assert_close(other[name], 0.5 * full[name])


def test_teacher_and_assistant_see_the_same_rois() -> None:
    model = model_of("head").eval()
    assert model.teacher is not None
    data = batch()
    x = model.student.normalise(data["images"], data["sizes"])
    forward = model.run(whole(data), torch.Generator().manual_seed(0))
    (rois, _), *more = forward.comparison.assistant.stages
    theirs = model.teacher.roi(model.teacher.features(x), rois.boxes, rois.image)  # type: ignore[union-attr, operator]
    assert not more
    for mine, tap in zip(forward.comparison.teacher.taps, theirs.taps, strict=True):
        torch.testing.assert_close(mine, tap)
    assert forward.student.outputs is not None
    rows = ckd_of(model).rows(forward.student.outputs.taps[0], rois)
    assert 0 < len(rows) == int(rois.from_proposal.sum()) < len(rois.boxes) == 3 * 16


@pytest.mark.parametrize("method", LOSSES)
@pytest.mark.parametrize("truths", [0, 2])
def test_a_batch_without_any_object(method: str, truths: int) -> None:
    model = model_of(method)
    losses = step(model, boxes=torch.zeros(3, truths, 4), labels=torch.full((3, truths), -1))
    total(losses).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("truths", [0, 1])
def test_no_proposal_at_all(truths: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("head")
    propose = model.student.head.proposals
    monkeypatch.setattr(model.student.head, "proposals", lambda *a: type(propose(*a))(*(field[:, :0] for field in propose(*a))))
    boxes = torch.tensor([[[4.0, 4, 40, 36]]] * 3)[:, :truths]
    losses = step(model, boxes=boxes, labels=torch.zeros(3, truths, dtype=torch.int64))
    total(losses).backward()
    assert losses["loss_ckd"].item() == 0
    assert (losses["loss_akd_1"].item() == 0) == (truths == 0)
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_one_seed_one_step() -> None:
    def run(seed: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        model = model_of("head")
        losses = step(model, seed=seed)
        total(losses).backward()
        return losses, [p.grad for p in model.parameters() if p.grad is not None]

    (first, grads), (again, same), (other, _) = run(1), run(1), run(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert not torch.equal(first["loss_akd_1"], other["loss_akd_1"])
    assert torch.equal(first["loss_cls"], other["loss_cls"])


def test_a_teacher_of_other_pixel_statistics_gets_its_own_input() -> None:
    spec = faster_rcnn_spec()
    other = spec.replace({"pixels.mean": (0.0, 0.0, 0.0), "pixels.std": (255.0, 255.0, 255.0)})
    torch.manual_seed(11)
    teacher = build_detector(other, CLASSES)
    seen: list[Tensor] = []
    features = teacher.features
    teacher.features = lambda x: (seen.append(x), features(x))[1]  # type: ignore[method-assign, func-returns-value]
    model, data = build_training_model(job("head"), CLASSES, teacher, STEPS_PER_EPOCH), batch()
    step(model)
    torch.testing.assert_close(seen[0], teacher.normalise(data["images"], data["sizes"]))


def test_losses_stay_float32_under_autocast() -> None:
    model = model_of("head")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    total(losses).backward()


def problems() -> Iterator[tuple[str, dict[str, Any], Detector | None, str]]:
    yield "head", {}, None, "method head needs one"
    yield "supervised", {}, teacher_of("head"), "method supervised uses none"
    yield "fitnet", {}, teacher_of("head"), "needs a retinanet teacher, but this one is a faster_rcnn"
    yield "head", {}, teacher_of("head", classes=5), "the teacher has 5 classes, but the data has 3"
    yield "copy_only", {"copy_head": False}, teacher_of("head"), "distill.copy_head"
    yield "akd", {"assistant": {"fcs": 3}, "copy_head": False}, teacher_of("head"), "3 fully connected layers, the teacher 2"
    yield (
        "head",
        {"assistant": {"fc_channels": 8, "pool": 3}},
        teacher_of("head"),
        "fcs.0.weight is 8x144 here and 24x144 in the teacher",
    )


@pytest.mark.parametrize(("method", "distill", "teacher", "message"), list(problems()), ids=range(7))
def test_what_does_not_fit_is_a_job_error(method: str, distill: dict[str, Any], teacher: Detector | None, message: str) -> None:
    with pytest.raises(JobError) as caught:
        build_training_model(job(method, **distill), CLASSES, teacher, STEPS_PER_EPOCH)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["assist", "copy_only", "akd", "head"])
def test_an_fcos_student_learns_from_a_faster_rcnn(method: str) -> None:
    """FCOS serves as RPN: class scores without centerness, cells with one point each, a plain Linear for CKD."""
    sound = job(method)
    torch.manual_seed(0)
    fcos = Job.model_validate({**sound.model_dump(), "student": fcos_spec().model_dump()})
    model = build_training_model(fcos, CLASSES, teacher_of(method), STEPS_PER_EPOCH).train()
    losses = step(model)
    assert tuple(losses) == ("loss_cls", "loss_box", "loss_centerness", *LOSSES[method][2:])
    total(losses).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    if method == "head":
        assert ckd_of(model).anchors == 1
        parts = reached(step(model)["loss_ckd"], model)
        assert parts == {"student.backbone", "student.neck", "student.head.cls_tower", "terms.2"}


def test_ckd_of_head_stops_at_its_epoch() -> None:
    model = model_of("head", ckd_epochs=7, warmup_steps=0)
    before, after = (step(model, at=at) for at in (7 * STEPS_PER_EPOCH - 1, 7 * STEPS_PER_EPOCH))
    assert before["loss_ckd"] > 0 and after["loss_ckd"] == 0
    for name in LOSSES["head"][:-1]:
        assert torch.equal(before[name], after[name])


def test_torchvision_s_strong_teacher_needs_no_special_case() -> None:
    """fasterrcnn_resnet50_fpn_v2 has two convs in the RPN, and four convs with BatchNorm and one fc in the RoI head."""
    theirs = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    teacher = load_torchvision(theirs.state_dict(), "random").detector
    wide = retinanet_spec().model_dump() | {"neck": {"channels": 256}}
    v2 = Job.model_validate({**job("head").model_dump(), "student": wide})
    model = build_training_model(v2, CLASSES, teacher, STEPS_PER_EPOCH).train()
    assert isinstance(teacher, FasterRCNN)
    copied = model.assistants.assist.head.state_dict()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in teacher.roi.state_dict().items())
    losses = step(model)
    assert tuple(losses) == (*STUDENT, *ASSISTANT, "loss_akd_1", "loss_ckd")
    total(losses).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_class_weights_reach_the_assistant_but_not_the_teacher() -> None:
    torch.manual_seed(0)
    model = build_training_model(job("head"), CLASSES, teacher_of("head"), STEPS_PER_EPOCH)
    weigh_classes(model, (2.0, 2.0, 2.0))
    heads = {name: head for name, head in model.named_modules() if isinstance(head, DenseHead | RoIHead)}
    assert len(heads) == 2 and all(head.class_weights.tolist() == [2, 2, 2, 1] for head in heads.values())
    assert model.teacher is not None and model.teacher.detection_head.class_weights is None
