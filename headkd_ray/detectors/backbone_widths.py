"""Backbones at widths that timm's factories do not offer, for micro models and checkpoints of reduced networks."""

from __future__ import annotations

from typing import Any

from timm.models._efficientnet_builder import decode_arch_def
from timm.models._features import FeatureListNet
from timm.models.efficientnet import EfficientNet, EfficientNetFeatures
from timm.models.resnet import ResNet, make_blocks
from torch import nn

_MOBILENET_V2 = ("ds_s1", "ir_s2_e6", "ir_s2_e6", "ir_s2_e6", "ir_s1_e6", "ir_s2_e6", "ir_s1_e6")
"""Block type, stride and expansion of MobileNetV2's seven stages, in timm's notation."""


def set_plain_stem(net: ResNet, width: int, act_layer: Any = nn.ReLU) -> FeatureListNet:
    """Return timm's feature extractor over ``net`` with a 7x7 stem of ``width`` channels.

    timm fixes a plain (not deep) stem at 64 channels. Only three modules depend on it (conv1, bn1 and layer1), and they are
    rebuilt with timm's own blocks. A deep stem already has the width that ``stem_width`` gave it.
    """
    stem: nn.Module = net.conv1
    if isinstance(stem, nn.Conv2d) and stem.out_channels != width:
        first: Any = net.layer1
        planes = first[-1].bn2.num_features
        norm = nn.BatchNorm2d
        stages, _ = make_blocks((type(first[0]),), (planes,), (len(first),), width, act_layer=act_layer, norm_layer=norm)
        net.set_submodule("conv1", nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False))
        net.bn1 = norm(width)
        net.layer1 = stages[0][1]
        net.feature_info[0]["num_chs"] = width
        net.init_weights()
    return FeatureListNet(net, out_indices=(0, 1, 2, 3, 4))


def mobilenet_v2(
    features_only: bool,
    channels: tuple[int, ...] = (16, 24, 32, 64, 96, 160, 320),
    layers: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1),
    stem_width: int = 32,
    head_width: int = 1280,
    act_layer: Any = nn.ReLU6,
) -> EfficientNet | EfficientNetFeatures:
    """Build timm's MobileNetV2 with seven stages of ``channels`` and ``layers`` and a stem of ``stem_width`` channels.

    Unless ``features_only``, a final 1x1 conv to ``head_width`` follows. The expansion is 6, in the first stage 1.
    """
    plan = [[f"{stage}_k3_r{n}_c{c}"] for stage, c, n in zip(_MOBILENET_V2, channels, layers, strict=True)]
    common: dict[str, Any] = {
        "block_args": decode_arch_def(plan),
        "stem_size": stem_width,
        "round_chs_fn": lambda value, **_: int(value),  # widths are meant as given, not rounded to multiples of 8
        "norm_layer": nn.BatchNorm2d,
        "act_layer": act_layer,
    }
    if features_only:
        return EfficientNetFeatures(**common)
    return EfficientNet(**common, num_features=head_width, num_classes=0)
