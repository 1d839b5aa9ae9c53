"""Assistant knowledge distillation: the assistant's layers imitate the teacher's on the same levels or RoIs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headkd_ray.detectors.losses import mean_squared_error
from headkd_ray.distill.scene import Tap


class AKD(nn.Module):
    """One trained adapter a layer, from the assistant's width to the teacher's: a Linear on rows, a 1x1 conv on maps."""

    def __init__(self, adapters: Sequence[nn.Module]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)

    def forward(self, taps: Sequence[Tap], taught: Sequence[Tap]) -> list[Tensor]:
        """The distance of each of the assistant's ``taps``, adapted, from the teacher's, which get no gradient."""
        return [distance(adapter, a, t) for adapter, a, t in zip(self.adapters, taps, taught, strict=True)]


def distance(adapter: nn.Module, own: Tap, theirs: Tap) -> Tensor:
    """MSE of adapted rows (R, C) with rows (R, C'), or the sum over levels of that of maps (B, C, H, W) with (B, C', H, W).

    ``theirs`` gets no gradient. Ground-truth rows count like any other.
    """
    if isinstance(own, Tensor) and isinstance(theirs, Tensor):
        return mean_squared_error(adapter(own), theirs)
    return torch.stack([mean_squared_error(adapter(o), t) for o, t in zip(own, theirs, strict=True)]).sum()
