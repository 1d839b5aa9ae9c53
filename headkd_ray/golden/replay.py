"""Replay of a golden file's training step: load its state dicts with the mmdet loader, then compute losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from headkd_ray.detectors import Detections
from headkd_ray.detectors.build import AnyDetector
from headkd_ray.detectors.weights import LoadedDetector
from headkd_ray.detectors.weights.mmdet import load_mmdet_model
from headkd_ray.detectors.weights.mmdet_names import mmdet_names
from headkd_ray.golden.file import Golden
from headkd_ray.golden.pair_jobs import official_model, parameters
from headkd_ray.golden.proposed import Proposed
from headkd_ray.golden.recorded import Recorded, training_step


@dataclass
class Replay:
    """Our values of everything that a golden file may hold."""

    student: LoadedDetector[AnyDetector]
    teacher: LoadedDetector[AnyDetector] | None
    device: torch.device
    """Device on which the values were computed."""
    initial: dict[str, Tensor] = field(default_factory=dict)
    """Parameters as we initialise them, by mmdet's names."""
    assistants: list[str] = field(default_factory=list)
    """Parameters of the assistants, by mmdet's names."""
    frozen: list[str] = field(default_factory=list)
    """Parameters that are not trained, by mmdet's names."""
    step: Recorded = field(default_factory=Recorded)
    """The values of the training step."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of the total, by mmdet's parameter names."""
    evaluations: list[tuple[str, list[Tensor], Detections]] = field(default_factory=list)
    """A note, the pyramid and the detections in eval mode for each convention that could apply, the plain one first."""
    teacher_features: list[Tensor] = field(default_factory=list)
    teacher_detections: Detections | None = None

    @property
    def losses(self) -> dict[str, float]:
        """The losses of the step by the official code's names, with ``total``."""
        return {name: float(loss.detach()) for name, loss in self.step.losses.items()}

    def evaluate(self, note: str, x: Tensor, sizes: Tensor) -> None:
        """Add an evaluation of the student in its present state."""
        detector = self.student.detector.eval()
        with torch.no_grad():
            self.evaluations.append((note, detector.features(x), detector.detect(x, sizes)))


def replay(golden: Golden, device: torch.device | str = "cpu", precision: str = "fp32") -> Replay:
    """Load the models of a golden file and compute its training step again.

    Args:
        device: where to compute (on a GPU without TF32); the values of the replay are on the CPU.
        precision: fp32, or bf16 as in ``optim.precision``.

    Raises:
        CheckpointError, DataError: the state dicts are not of a model that can be replayed.
    """
    device = torch.device(device)
    with _exact(device), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return on_cpu(_replay(golden, device))


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Compute in true float32 on a GPU, where convolutions use TF32 by default."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def on_cpu(value: Any) -> Any:
    """Copy a nested value with all its tensors on the CPU, bfloat16 ones as float32; modules stay on their device."""
    if isinstance(value, Tensor):
        return value.cpu().float() if value.dtype == torch.bfloat16 else value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(on_cpu, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_cpu, value))
    if isinstance(value, (Replay, Recorded, Proposed)):
        return replace(value, **{each.name: on_cpu(getattr(value, each.name)) for each in fields(value)})
    return value


def _replay(golden: Golden, device: torch.device) -> Replay:
    state, teacher_state = golden.state("student"), golden.state("teacher")
    student = load_mmdet_model(state, source=f"{golden.source}: student")
    teacher = load_mmdet_model(teacher_state, source=f"{golden.source}: teacher").loaded if teacher_state else None
    official = official_model(student, teacher, golden.source)
    detector, names = student.loaded.detector, mmdet_names(state)
    own = parameters(detector, student.assistants, student.adapters)
    run = Replay(student.loaded, teacher, device)
    run.initial = {key: official.initial[name] for key, name in names.items() if name in official.initial}
    run.assistants = [key for key, name in names.items() if name.startswith("assistants.")]
    run.frozen = [key for key, name in names.items() if name in own and not own[name].requires_grad]
    official.model.to(device)
    if teacher is not None:
        teacher.detector.to(device)
    x, sizes = golden.tensor("images").float().to(device), golden.tensor("image_sizes").long().to(device)

    run.evaluate("", x, sizes)
    run.step = training_step(golden, official, teacher.detector if teacher else None, x, sizes)
    total = torch.stack(list(run.step.losses.values())).sum()
    total.backward()
    run.step.losses["total"] = total.detach()
    gradients = {key: own[name].grad for key, name in names.items() if name in own}
    run.gradients = {key: gradient for key, gradient in gradients.items() if gradient is not None}

    if any(isinstance(m, _BatchNorm) and m.training for m in detector.modules()):
        # The official values in eval mode may then have been taken after the step had updated the running statistics, or even
        # after a second forward pass in train mode, which recorded the pyramid.
        run.evaluate("after one update of the running statistics", x, sizes)
        with torch.no_grad():
            detector.train().features(x)
        run.evaluate("after two updates of the running statistics", x, sizes)
    if teacher is not None:
        with torch.no_grad():
            run.teacher_features = teacher.detector.eval().features(x)
        run.teacher_detections = teacher.detector.detect(x, sizes)
    return run
