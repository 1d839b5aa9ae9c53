"""mmdet's MobileNetV2 in plain PyTorch, under mmdet's parameter names, as a reference for ours."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

STAGES = ((1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))
"""Expansion, blocks and stride of layer1 to layer7."""


class ConvModule(nn.Module):
    def __init__(self, i: int, o: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(o)
        self.act = nn.LeakyReLU(0.1) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class InvertedResidual(nn.Module):
    def __init__(self, i: int, o: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = i * expansion
        self.expand_conv = ConvModule(i, hidden, 1) if expansion > 1 else None
        self.depthwise_conv = ConvModule(hidden, hidden, 3, stride, hidden)
        self.linear_conv = ConvModule(hidden, o, 1, act=False)
        self.shortcut = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand_conv(x) if self.expand_conv else x
        y = self.linear_conv(self.depthwise_conv(y))
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """The network, whose outputs are those of layer2, layer3, layer5 and conv2, at strides 4, 8, 16, 32."""

    def __init__(self, stem: int, channels: Sequence[int], head: int) -> None:
        super().__init__()
        self.conv1 = ConvModule(3, stem, 3, stride=2)
        width = stem
        for number, ((expansion, blocks, stride), out) in enumerate(zip(STAGES, channels, strict=True), start=1):
            layers = []
            for block in range(blocks):
                layers.append(InvertedResidual(width, out, stride if block == 0 else 1, expansion))
                width = out
            self.add_module(f"layer{number}", nn.Sequential(*layers))
        self.conv2 = ConvModule(width, head, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.conv1(x), []
        for number in range(1, 8):
            x = self.get_submodule(f"layer{number}")(x)
            if number in (2, 3, 5):
                maps.append(x)
        return [*maps, self.conv2(x)]
