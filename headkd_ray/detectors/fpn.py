"""Feature pyramid network: C3-C5 to P3-P7 for dense detectors, C2-C5 to P2-P6 for two-stage ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from headkd_ray.detectors import init
from headkd_ray.job import FPNSpec


class FPN(nn.Module):
    """A top-down pyramid over maps of ``in_channels``, finest first, with Xavier uniform initial weights."""

    def __init__(self, spec: FPNSpec, in_channels: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        width = spec.channels
        self.lateral = nn.ModuleList(self._conv(c, width, 1, spec.norm) for c in in_channels)
        self.output = nn.ModuleList(self._conv(width, width, 3, spec.norm) for _ in in_channels)
        self.extra = nn.ModuleList()
        if spec.extra != "pool":
            first = in_channels[-1] if spec.extra == "conv_c5" else width
            extra_norm = "group" if spec.norm == "group" else "none"
            self.extra.extend(self._conv(c, width, 3, extra_norm, stride=2) for c in (first, width))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init.xavier(module)

    def _conv(self, in_channels: int, channels: int, kernel: int, norm: str, stride: int = 1) -> nn.Module:
        conv = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=norm == "none")
        if norm == "none":
            return conv
        layer = nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(self.spec.norm_groups, channels)
        return nn.Sequential(conv, layer)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Turn backbone ``maps`` (B, C_i, H_i, W_i) into pyramid levels (B, channels, H, W), both finest first."""
        merged = [lateral(m) for lateral, m in zip(self.lateral, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            up = F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
            merged[i - 1] = merged[i - 1] + up
        levels = [output(m) for output, m in zip(self.output, merged, strict=True)]

        if self.spec.extra == "pool":
            return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]
        p6 = self.extra[0](maps[-1] if self.spec.extra == "conv_c5" else levels[-1])
        p7 = self.extra[1](p6.relu() if self.spec.relu_before_p7 else p6)
        return [*levels, p6, p7]
