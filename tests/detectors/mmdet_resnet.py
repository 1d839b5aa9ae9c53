"""mmdet's ResNet and FPN as plain functions of a state dict under mmdet's names, as a reference for ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def conv_bn(state: State, conv: str, bn: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    x = F.conv2d(x, state[f"{conv}.weight"], None, stride, padding)
    parts = (state[f"{bn}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts)


def bottleneck(state: State, name: str, x: Tensor, stride: int, style: str) -> Tensor:
    first, second = (stride, 1) if style == "caffe" else (1, stride)
    y = conv_bn(state, f"{name}.conv1", f"{name}.bn1", x, first).relu()
    y = conv_bn(state, f"{name}.conv2", f"{name}.bn2", y, second, padding=1).relu()
    y = conv_bn(state, f"{name}.conv3", f"{name}.bn3", y)
    if f"{name}.downsample.0.weight" in state:
        x = conv_bn(state, f"{name}.downsample.0", f"{name}.downsample.1", x, stride)
    return (x + y).relu()


def resnet(state: State, x: Tensor, style: str) -> list[Tensor]:
    """Return C2 to C5 of the network input ``x`` (B, 3, H, W), which is normalised already."""
    x = conv_bn(state, "backbone.conv1", "backbone.bn1", x, 2, padding=3).relu()
    x, maps = F.max_pool2d(x, 3, stride=2, padding=1), []
    for stage in (1, 2, 3, 4):
        block = 0
        while f"backbone.layer{stage}.{block}.conv1.weight" in state:
            stride = 2 if stage > 1 and block == 0 else 1
            x = bottleneck(state, f"backbone.layer{stage}.{block}", x, stride, style)
            block += 1
        maps.append(x)
    return maps


def fpn_on_output(state: State, maps: list[Tensor]) -> list[Tensor]:
    """Return P3 to P7 of C3 to C5 as with ``add_extra_convs='on_output', relu_before_extra_convs=True``."""

    def conv(name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, state[f"neck.{name}.conv.weight"], state[f"neck.{name}.conv.bias"], stride, padding)

    p3, p4, p5 = (conv(f"lateral_convs.{level}", c) for level, c in enumerate(maps))
    p4 = p4 + F.interpolate(p5, size=p4.shape[2:], mode="nearest")
    p3 = p3 + F.interpolate(p4, size=p3.shape[2:], mode="nearest")
    levels = [conv(f"fpn_convs.{level}", p, padding=1) for level, p in enumerate((p3, p4, p5))]
    p6 = conv("fpn_convs.3", levels[2], 2, padding=1)
    return [*levels, p6, conv("fpn_convs.4", p6.relu(), 2, padding=1)]
