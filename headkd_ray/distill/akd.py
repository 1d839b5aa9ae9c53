"""Assistant knowledge distillation: the assistant's fully connected layers imitate the teacher's on the same RoIs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from headkd_ray.detectors.losses import mean_squared_error


class AKD(nn.Module):
    """One trained Linear a layer, from the assistant's width to the teacher's."""

    def __init__(self, adapters: Iterable[nn.Linear]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """The assistant's post-ReLU outputs A_l (R, assistant_width) after their adapters, (R, teacher_width)."""
        return [adapter(tap) for adapter, tap in zip(self.adapters, taps, strict=True)]

    def losses(self, adapted: Sequence[Tensor], taught: Sequence[Tensor]) -> list[Tensor]:
        """MSE with the teacher's T_l (R, teacher_width), a layer each, averaged over all RoIs, ground-truth rows included."""
        return [mean_squared_error(a, t) for a, t in zip(adapted, taught, strict=True)]
