"""Deformable convolution by sampling, for runtimes that have no operator for it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

from headkd_ray.detectors.build import AnyDetector


class SampledDeformConv(nn.Module):
    """Computes what a :class:`DeformConv2d` of stride 1, without groups, computes: bilinear samples, then a 1x1 convolution."""

    def __init__(self, conv: DeformConv2d) -> None:
        super().__init__()
        assert (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1)
        self.weight = nn.Parameter(conv.weight.detach().flatten(1)[:, :, None, None])
        self.bias = conv.bias
        self.kernel: tuple[int, int] = conv.kernel_size
        self.padding: tuple[int, int] = conv.padding

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Return (B, O, H, W) of ``x`` (B, C, H, W) and ``offset`` (B, 2 * K, H, W), K pairs of y and x, in pixels."""
        batch, height, width = x.shape[0], x.shape[2], x.shape[3]
        sides = zip(self.kernel, self.padding, strict=True)
        down, across = (torch.arange(side, device=x.device, dtype=x.dtype) - pad for side, pad in sides)
        tap = torch.stack(torch.meshgrid(down, across, indexing="ij"), dim=-1).reshape(-1, 2, 1, 1)  # (K, 2, 1, 1)
        rows, columns = (torch.arange(side, device=x.device, dtype=x.dtype) for side in (height, width))
        cell = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))  # (2, H, W)
        points = offset.reshape(batch, -1, 2, height, width) + tap + cell
        y, x_ = points.unbind(2)
        # grid_sample's coordinates: the edges of the map are -1 and 1.
        grid = torch.stack([(2 * x_ + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1).reshape(batch, -1, width, 2)
        samples = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)  # (B, C, K * H, W)
        return F.conv2d(samples.reshape(batch, -1, height, width), self.weight, self.bias)


def without_deform_conv(detector: AnyDetector) -> AnyDetector:
    """Return ``detector`` with each deformable convolution replaced by a :class:`SampledDeformConv`; itself if it has none."""
    names = [name for name, module in detector.named_modules() if isinstance(module, DeformConv2d)]
    if not names:
        return detector
    detector = copy.deepcopy(detector)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        conv = detector.get_submodule(name)
        assert isinstance(conv, DeformConv2d)
        setattr(detector.get_submodule(owner), attribute, SampledDeformConv(conv))
    return detector
