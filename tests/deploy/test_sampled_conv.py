"""Deformable convolution by sampling equals torchvision's."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import DeformConv2d

from headkd_ray.deploy.sampled_conv import SampledDeformConv


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 5), (40, 60)])
@pytest.mark.parametrize("reach", [0.0, 1.5, 30.0])
def test_samples_are_torchvision_s(size: tuple[int, int], reach: float) -> None:
    """Also on and far beyond the edges of the map, where a sample fades to 0."""
    generator = torch.Generator().manual_seed(0)
    conv = DeformConv2d(6, 5, 3, padding=1, bias=False)
    torch.nn.init.normal_(conv.weight, generator=generator)
    x = torch.randn(2, 6, *size, generator=generator)
    offset = reach * torch.randn(2, 18, *size, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(SampledDeformConv(conv)(x, offset), conv(x, offset), rtol=1e-4, atol=1e-4)
