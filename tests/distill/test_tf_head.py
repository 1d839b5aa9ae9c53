"""TF-HEAD agrees with its formula, written here with loops; its gradients and schedule are as they should be."""

from collections.abc import Iterable
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from headkd_ray.detectors.ops.rois import sample_rois
from headkd_ray.distill import TrainingModel, build_training_model
from headkd_ray.distill.ckd import CKD
from headkd_ray.job import DetectorSpec, Job
from tests.detectors.micro import batch, faster_rcnn_spec, fcos_spec, liven, retinanet_spec, truth_of, whole

CLASSES = 3
STEPS_PER_EPOCH = 10
HEADS: dict[str, dict[str, Any]] = {
    "fcos": fcos_spec(channels=8).head.model_dump(),
    "rcnn": faster_rcnn_spec().roi.model_dump(),
    "retinanet": retinanet_spec(channels=12).head.model_dump(),
}
STUDENTS = {"retinanet": retinanet_spec(), "fcos": fcos_spec(), "faster_rcnn": faster_rcnn_spec()}


def model_of(
    names: Iterable[str], student: DetectorSpec | None = None, keys: dict[str, Any] | None = None, **distill: Any
) -> TrainingModel:
    """Return a TF-HEAD model with the named assistants; ``keys`` go to each of them."""
    job = Job.model_validate(
        {
            "run": {"name": "test"},
            "method": "tf_head",
            "data": {"train": "t", "val": "v"},
            "student": (student or retinanet_spec()).model_dump(),
            "distill": {"assistants": {name: {"head": HEADS[name], **(keys or {})} for name in names}, **distill},
        }
    )
    torch.manual_seed(0)
    model = build_training_model(job, CLASSES, None, STEPS_PER_EPOCH)
    liven(model)
    return model.train()


def ckd_of(model: TrainingModel, name: str) -> CKD:
    (term,) = (term for term in model.terms if isinstance(term, CKD) and term.assistant == name)
    return term


def step(model: TrainingModel, at: int = 5000, **change: Tensor) -> dict[str, Tensor]:
    data = {**batch(), **change}
    return model(whole(data), at, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("names", list(chain.from_iterable(combinations(HEADS, count) for count in (1, 2, 3))))
def test_every_subset_of_assistants_trains_all_its_parts(names: tuple[str, ...], student: str) -> None:
    model = model_of(names, STUDENTS[student])
    losses = step(model)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert {name for name in losses if name.endswith("_ckd")} == {f"loss_{name}_ckd" for name in names}
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("decouple", [True, False])
def test_ckd_of_the_rcnn_assistant_is_the_formula(decouple: bool) -> None:
    """CKD is MSE(D_a(S), A2): S the student's last cls conv at the proposal's cell, a its anchor, ground-truth rows dropped."""
    model = model_of(["rcnn"], keys={"decouple": decouple})
    losses = step(model)
    data = batch()
    x = model.student.normalise(data["images"], data["sizes"])
    features = model.student.features(x)
    outputs = model.student.head(features)
    assistant = model.assistants["rcnn"].head
    proposals = model.student.head.proposals(outputs, data["sizes"])
    truth = truth_of(data)
    rois = sample_rois(proposals, truth, assistant.spec, CLASSES, torch.Generator().manual_seed(3))
    taught = assistant(features, rois.boxes, rois.image).taps[-1]

    adapter = ckd_of(model, "rcnn").adapter
    weight, bias = adapter.weight.double(), adapter.bias.double()
    width = taught.shape[1]
    squares, rows, anchors = [], 0, set()
    for row, (level, y, x_, anchor) in enumerate(rois.cells.tolist()):
        if level < 0:
            continue
        seen = outputs.taps[0][level][rois.image[row], :, y, x_].double()
        start = anchor * width if decouple else 0
        adapted = weight[start : start + width] @ seen + bias[start : start + width]
        squares.append((adapted - taught[row]).square().sum())
        rows += 1
        anchors.add(anchor)
    assert rows > 3 and len(anchors) > 1
    expected = 1.3 * torch.stack(squares).sum() / (rows * width)
    torch.testing.assert_close(losses["loss_rcnn_ckd"].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
def test_ckd_of_a_dense_assistant_is_the_formula(name: str) -> None:
    """CKD is the sum over five levels of MSE(1x1 conv(student's last cls conv), the assistant's)."""
    model = model_of([name])
    losses = step(model)
    data = batch()
    features = model.student.features(model.student.normalise(data["images"], data["sizes"]))
    assistant, adapter = model.assistants[name], ckd_of(model, name).adapter
    kernel, bias = adapter.weight[:, :, 0, 0].double(), adapter.bias.double()
    expected = torch.zeros((), dtype=torch.float64)
    for own, theirs in zip(model.student.head(features).taps[0], assistant.head(features).taps[0], strict=True):
        adapted = torch.einsum("oc,bchw->bohw", kernel, own.double()) + bias[:, None, None]
        expected = expected + (adapted - theirs).square().mean()
    torch.testing.assert_close(losses[f"loss_{name}_ckd"].double(), expected, rtol=1e-5, atol=0)


def reached(loss: Tensor, model: TrainingModel) -> set[str]:
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    touched = {name for name, g in zip(parameters, gradients, strict=True) if g is not None and g.abs().sum() > 0}
    parts = ["student.backbone", "student.neck", "student.head.cls_tower", "student.head.cls_out", "student.head.box"]
    parts += [f"assistants.{name}" for name in model.assistants]
    parts += [f"terms.{number}" for number, term in enumerate(model.terms) if isinstance(term, CKD)]
    return {part for part in parts if any(name.startswith(part) for name in touched)}


def test_gradients_reach_what_they_should_and_nothing_else() -> None:
    model = model_of(HEADS)
    losses = step(model)
    below = {"student.backbone", "student.neck"}
    for number, name in enumerate(HEADS):
        assert reached(losses[f"loss_{name}_cls"], model) == below | {f"assistants.{name}"}
        assert reached(losses[f"loss_{name}_ckd"], model) == below | {"student.head.cls_tower", f"terms.{2 * number + 1}"}
    assert reached(losses["loss_cls"], model) == below | {"student.head.cls_tower", "student.head.cls_out"}


def test_warmup_early_stop_and_weights() -> None:
    model = model_of(HEADS, warmup_steps=40, ckd_epochs=5)
    full = step(model, at=STEPS_PER_EPOCH * 5 - 1)
    for at, gt, ckd in ((0, 0.0, 0.0), (10, 0.25, 0.25), (49, 1.0, 1.0), (50, 1.0, 0.0), (1000, 1.0, 0.0)):
        losses = step(model, at=at)
        assert losses.keys() == full.keys()
        for name, loss in losses.items():
            factor = 1.0 if name in ("loss_cls", "loss_box") else ckd if name.endswith("_ckd") else gt
            torch.testing.assert_close(loss, factor * full[name], msg=f"{name} at {at}")

    doubled = model_of(HEADS, keys={"gt_weight": 2.0, "ckd_weight": 4.0})
    single = model_of(HEADS, keys={"gt_weight": 1.0, "ckd_weight": 1.0})
    one, other = step(single), step(doubled)
    for name, loss in other.items():
        factor = 1.0 if name in ("loss_cls", "loss_box") else 4.0 if name.endswith("_ckd") else 2.0
        torch.testing.assert_close(loss, factor * one[name])


def test_a_batch_without_objects_is_finite() -> None:
    data = batch()
    losses = step(model_of(HEADS), boxes=torch.zeros_like(data["boxes"]), labels=torch.full_like(data["labels"], -1))
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.isfinite()


def test_the_research_branch_weights_are_the_defaults() -> None:
    """The research branch has FCOS 0.5 and 1.0, R-CNN 1 and 1.3 (weights of ground truth and CKD)."""
    model = model_of(HEADS)
    assert [term.weight for term in model.terms] == [0.5, 1.0, 1.0, 1.3, 1.0, 1.0]
    assert ckd_of(model, "rcnn").anchors == 9
    assert ckd_of(model_of(["rcnn"], fcos_spec()), "rcnn").anchors == 1
