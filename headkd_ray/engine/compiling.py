"""torch.compile in a training step (``optim.compile``): which modules are compiled, and what the log says about it."""

from __future__ import annotations

import torch
from torch import nn

from headkd_ray.detectors.backbone import Backbone
from headkd_ray.detectors.base import DenseHead
from headkd_ray.detectors.fpn import FPN
from headkd_ray.detectors.rpn import RPN
from headkd_ray.distill import TrainingModel
from headkd_ray.errors import TrainingError

COMPILED = (Backbone, FPN, DenseHead, RPN)
"""The convolutional modules. RoIs and losses stay as they are, because on the CPU their shapes depend on values."""


def compile_modules(model: TrainingModel, mode: str) -> None:
    """Have the convolutional modules of student, assistants and teacher compiled, each when it first runs, in a ``mode`` of
    torch.compile.

    It happens in place, so the names of all tensors stay, and copies of a module are not compiled.

    Raises:
        TrainingError: torch.compile does not work on this machine, for example because a compiler is missing.
    """
    trees: list[nn.Module] = [model] if model.teacher is None else [model, model.teacher]
    device = next(model.parameters()).device
    check_compiler(device)
    for tree in trees:
        for module in tree.modules():
            if isinstance(module, COMPILED):
                module.compile(mode=mode)


def check_compiler(device: torch.device) -> None:
    """Compile and run a function of one operator on ``device``. Raises TrainingError with the reason if that is impossible."""
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.ones(64, device=device))
    except Exception as error:  # torch raises its own classes around anything that a compiler, a linker or Triton may raise
        reasons = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TrainingError(
            f"optim.compile: torch.compile does not work on this machine ({reasons[0] if reasons else type(error).__name__}); "
            "install a C++ compiler (g++ or clang++, which CXX may name), or set optim.compile=null"
        ) from error


class Compilations:
    """A count of the graphs that torch.compile makes in this process, for notes in the log."""

    def __init__(self) -> None:
        self.before = self.told = _graphs()

    def note(self, step: int) -> str | None:
        """Return a sentence about the graphs that were made since the last call, up to optimizer step ``step``, if any."""
        count = _graphs()
        made, self.told = count - self.told, count
        if not made:
            return None
        return f"torch.compile made {made} graphs by step {step}, {count - self.before} in all; that slowed the step down"


def _graphs() -> int:
    from torch._dynamo.utils import counters  # takes seconds to import, and is needed only where something is compiled

    return counters["stats"]["unique_graphs"]
