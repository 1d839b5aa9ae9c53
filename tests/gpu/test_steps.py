"""One training step of every method with every kind of detector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.gpu.models import PAIRS, model_of, step

pytestmark = pytest.mark.gpu
EVERY = pytest.mark.parametrize(("method", "student", "teacher"), PAIRS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@EVERY
def test_a_step_is_finite_and_on_the_device(
    method: str, student: str, teacher: str | None, precision: str, device: torch.device
) -> None:
    model = model_of(method, student, teacher)
    losses = step(model, device, precision)
    assert {name: loss.item() for name, loss in losses.items() if not loss.isfinite()} == {}
    assert all(loss.device == device and loss.dtype == torch.float32 for loss in losses.values())
    left = [name for name, p in model.named_parameters() if p.device != device or p.grad is None or p.grad.device != device]
    assert left == []
    assert [name for name, p in model.named_parameters() if not p.grad.isfinite().all()] == []
    assert model.teacher is None or all(p.device == device and p.grad is None for p in model.teacher.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    nn.utils.clip_grad_norm_(model.parameters(), 20.0)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@EVERY
def test_losses_and_gradients_are_the_cpu_s(method: str, student: str, teacher: str | None, device: torch.device) -> None:
    """From the same weights and batch, losses agree to 1e-4 and the whole gradient to 1e-3 of its norm."""
    ours, theirs = model_of(method, student, teacher), model_of(method, student, teacher)
    here, there = step(ours, device), step(theirs, torch.device("cpu"))
    assert here.keys() == there.keys()
    for name, loss in there.items():
        torch.testing.assert_close(here[name].cpu(), loss, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    gradients = [torch.cat([p.grad.flatten().cpu() for p in model.parameters()]) for model in (ours, theirs)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-3 * gradients[1].norm()


def test_ddp_over_nccl_gives_the_gradients_of_the_bare_step(device: torch.device, tmp_path: Path) -> None:
    """The process group has one member, as Ray Train starts it: NCCL for gradients, gloo for other messages between ranks."""
    bare, wrapped = (model_of("head", "retinanet", "faster_rcnn") for _ in range(2))
    step(bare, device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        wrapped.to(device).to(memory_format=torch.channels_last)
        step(DistributedDataParallel(wrapped), device)
        votes = torch.ones(1, dtype=torch.int32)
        torch.distributed.all_reduce(votes)
    finally:
        torch.distributed.destroy_process_group()
    assert votes.item() == 1
    for (name, one), other in zip(bare.named_parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
