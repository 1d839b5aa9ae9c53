"""A training step never waits for a GPU: traced with tensors that claim to be on one, every shape is known beforehand.

Fake tensors have shapes but no values, so an operator whose result's size depends on values (``nonzero``, a boolean mask), or
that reads one (``item``), raises. So do a tensor left on the CPU, and a copy between host and device for which the host waits.
A backward pass on a GPU cannot be traced without one; it is traced on the CPU, with shapes fixed as they are on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import nms

from headkd_ray.data.batch import Batch
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.ops import fixed_size
from headkd_ray.distill import TrainingModel
from headkd_ray.engine.optim import build_optimizer
from headkd_ray.engine.step import Learner, train_step
from headkd_ray.job import Job, OptimSpec
from headkd_ray.soft_targets import SoftTargets
from headkd_ray.teacher import SoftTeacher
from tests.detectors.micro import batch, faster_rcnn_spec, whole
from tests.gpu.models import PAIRS, model_of, step

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")

QUICK = {
    ("supervised", "gfl"),
    ("supervised", "reppoints"),
    ("supervised", "cascade_rcnn"),
    ("assist", "fcos"),
    ("head", "retinanet"),
    ("head", "faster_rcnn"),
    ("tf_head", "retinanet"),
}
"""(method, student) that every run of the tests traces; they have every kind of head and of RoI. The others are slow."""
EVERY = [*PAIRS, ("head", "faster_rcnn", "retinanet"), ("head", "cascade_rcnn", "cascade_rcnn"), ("akd", "retinanet", "fcos")]


def cases(quick: set[tuple[str, str]]) -> list[Any]:
    """Return (method, student, teacher) of every pair; only the first one of each in ``quick`` is not slow."""
    first = {pair[:2]: pair for pair in reversed(EVERY)}
    fast = {first[each] for each in quick}
    return [pytest.param(*pair, marks=[] if pair in fast else pytest.mark.slow) for pair in EVERY]


@pytest.fixture
def fixed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix all shapes on the CPU, as on a GPU."""
    monkeypatch.setattr(fixed_size, "FIXED_SIZE_DEVICES", ("cpu",))


class WaitError(RuntimeError):
    """The host would wait for the device."""


class NoWaits(TorchDispatchMode):
    """Raises WaitError where tensors on two devices meet, unless one is a scalar or the host does not wait for the copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        sent = kwargs.get("non_blocking", False) and all(tensor.device == CPU for tensor in given)
        if given and not sent and len({tensor.device for tensor in [*given, *made]}) > 1:
            raise WaitError(f"{func}: {[tensor.device for tensor in given]} to {[tensor.device for tensor in made]}")
        return result


def claim(module: nn.Module, device: torch.device) -> None:
    """Replace all tensors of ``module`` by fake ones that claim to be on ``device``. Must run under a FakeTensorMode."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(empty(parameter, device), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = empty(buffer, device)


def empty(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def claimed(model: TrainingModel, device: torch.device) -> Batch:
    """Claim a model and its teacher for ``device``, and return a batch there."""
    claim(model, device)
    if model.teacher is not None:
        claim(model.teacher, device)
    return whole({name: empty(tensor, device) for name, tensor in batch().items()})


@pytest.mark.parametrize(("method", "student", "teacher"), cases(QUICK))
def test_a_forward_pass_never_waits_for_the_gpu(method: str, student: str, teacher: str | None) -> None:
    model = model_of(method, student, teacher)
    with FakeTensorMode(), NoWaits():
        losses = model(claimed(model, GPU), 5)
    assert len(losses) >= 2
    assert {name: (loss.device, loss.shape) for name, loss in losses.items() if (loss.device, loss.shape) != (GPU, ())} == {}


def test_soft_targets_that_come_with_the_batch_are_compared_without_a_wait() -> None:
    model, count = model_of("head", "retinanet", "faster_rcnn"), len(batch()["images"])
    targets = SoftTargets.empty(count, budget=16, layers=2, width=24)
    with FakeTensorMode(), NoWaits():
        data = replace(claimed(model, GPU), targets=targets.map(lambda tensor: empty(tensor, GPU)))
        losses = model(data, 5)
    assert {"loss_akd_2", "loss_ckd"} < losses.keys()


def test_batchnorm_in_a_roi_head_still_waits() -> None:
    """This and the next are all that wait within the process of a training step; docs/performance.md has what they cost."""
    detector = build_detector(faster_rcnn_spec(convs=1, conv_channels=8, conv_norm=True), 3)
    with FakeTensorMode(), NoWaits():
        data = claimed(TrainingModel(detector), GPU)
        with pytest.raises(DynamicOutputShapeException):
            TrainingModel(detector).train()(data, 5)


def test_a_teacher_that_chooses_its_own_rois_in_the_step_still_waits() -> None:
    teacher = build_detector(faster_rcnn_spec(), 3)
    soft_teacher = SoftTeacher(teacher, budget=16, seed=0, pad=32)
    with FakeTensorMode(), NoWaits():
        claim(teacher, GPU)
        data = whole({name: empty(tensor, GPU) for name, tensor in batch().items()})
        with pytest.raises(DynamicOutputShapeException):
            soft_teacher(data)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_update_never_waits_for_the_gpu(optimizer: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with FakeTensorMode(), NoWaits():
        claim(model, GPU)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        nn.utils.clip_grad_norm_(model.parameters(), 20.0)
        stepper, schedule = build_optimizer(OptimSpec.model_validate({"optimizer": optimizer}), model.parameters(), 16, 10)
        stepper.step()
        schedule.step()


@pytest.mark.parametrize(("method", "student", "teacher"), cases({("head", "retinanet")}))
def test_no_shape_of_a_whole_step_depends_on_values(method: str, student: str, teacher: str | None, fixed_here: None) -> None:
    model = model_of(method, student, teacher)
    job = Job.model_validate({"run": {"name": "test"}, "method": "supervised", "data": {"train": "t", "val": "v"}})
    noted = []
    with FakeTensorMode():
        data = claimed(model, CPU)
        learner = Learner(0, model, *build_optimizer(job.optim, model.parameters(), 16, 10), ema=None)
        train_step(learner, job, iter([data]), note=lambda losses, _: noted.append(losses))
    assert len(noted[0]) >= 3
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.filterwarnings("ignore:`create_unbacked_symint` is deprecated")  # by torchvision
@pytest.mark.parametrize(
    "wait",
    [
        lambda rows: rows[rows[:, 0] > 0],
        lambda rows: (rows > 0).nonzero(),
        lambda rows: rows.sum().item(),
        lambda rows: rows.long().flatten().bincount().tolist(),
        lambda rows: nms(rows, rows[:, 0], 0.5),
        lambda rows: rows * torch.ones(4),
        lambda rows: rows.cpu(),
        lambda rows: rows[torch.tensor([1, 0])],
        lambda rows: rows.new_tensor([1.0, 2.0]),
    ],
)
def test_whatever_waits_is_found(wait: Callable[[Tensor], object]) -> None:
    with FakeTensorMode(), NoWaits(), pytest.raises(RuntimeError, match=r"aten\.|torchvision|device"):
        wait(torch.empty(8, 4, device=GPU))


@pytest.mark.parametrize(("method", "student", "teacher"), cases(QUICK | {("akd", "retinanet"), ("akd", "cascade_rcnn")}))
def test_padding_changes_no_loss_and_no_gradient(
    method: str, student: str, teacher: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step on the CPU, once as it is there and once with shapes fixed as on a GPU.

    Losses agree to 1e-5, and the whole gradient to 1e-4 of its norm.
    """
    dropped, padded = model_of(method, student, teacher), model_of(method, student, teacher)
    expected = step(dropped, CPU)
    monkeypatch.setattr(fixed_size, "FIXED_SIZE_DEVICES", ("cpu",))
    losses = step(padded, CPU)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (dropped, padded)]
    assert (gradients[1] - gradients[0]).norm() <= 1e-4 * gradients[0].norm()
