"""Translation of other libraries' names of backbone tensors into timm's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_MMDET_MOBILENET = {  # layer1 has no expansion, so its block is timm's depthwise-separable one
    "first": {"depthwise_conv": ("conv_dw", "bn1"), "linear_conv": ("conv_pw", "bn2")},
    "later": {"expand_conv": ("conv_pw", "bn1"), "depthwise_conv": ("conv_dw", "bn2"), "linear_conv": ("conv_pwl", "bn3")},
}
_TORCHVISION_MOBILENET = {
    "first": {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"},
    "later": {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"},
}
_MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)


def mmdet_name(key: str) -> str:
    """Return timm's name for mmdet's or mmcls's backbone tensor ``key`` (without ``backbone.``); ResNet names are the same.

    MobileNetV2: conv1/conv2 and layerN.M.{expand,depthwise,linear}_conv, each a ConvModule with .conv and .bn.
    """
    if match := re.fullmatch(r"conv([12])\.(conv|bn)\.(\w+)", key):
        names = {"1": ("conv_stem", "bn1"), "2": ("conv_head", "bn2")}[match[1]]
        return f"{names[match[2] == 'bn']}.{match[3]}"
    if match := re.fullmatch(r"layer(\d+)\.(\d+)\.(expand_conv|depthwise_conv|linear_conv)\.(conv|bn)\.(\w+)", key):
        stage, block, part, kind, tensor = match.groups()
        pair = _MMDET_MOBILENET["first" if stage == "1" else "later"].get(part)
        if pair:
            return f"blocks.{int(stage) - 1}.{block}.{pair[kind == 'bn']}.{tensor}"
    return key


def torchvision_name(key: str) -> str:
    """Return timm's name for torchvision's backbone tensor ``key``.

    ResNet names are the same; MobileNetV2's are ``features.*``.
    """
    if match := re.fullmatch(r"features\.(0|18)\.([01])\.(\w+)", key):
        names = {"0": ("conv_stem", "bn1"), "18": ("conv_head", "bn2")}[match[1]]
        return f"{names[int(match[2])]}.{match[3]}"
    if match := re.fullmatch(r"features\.(\d+)\.conv\.(\d(?:\.\d)?)\.(\w+)", key):
        flat = int(match[1]) - 1
        for stage, blocks in enumerate(_MOBILENET_BLOCKS):
            if flat < blocks:
                part = _TORCHVISION_MOBILENET["first" if stage == 0 else "later"].get(match[2])
                return f"blocks.{stage}.{flat}.{part}.{match[3]}" if part else key
            flat -= blocks
    return key


def classifier_names(names: Iterable[str]) -> set[str]:
    """Return those of a classification network's ``names`` that belong to its classifier, not to the backbone."""
    return {n for n in names if re.match(r"(fc|classifier|head|head\.fc)\.", n)}


def backbone_names(state: Mapping[str, object]) -> dict[str, str]:
    """Map the keys of a classification network's state dict (timm, torchvision, mmcls or mmdet) to timm's names.

    The classifier is left out.
    """
    names = {}
    for key in state:
        bare = key.removeprefix("backbone.")
        names[key] = torchvision_name(mmdet_name(bare))
    dropped = classifier_names(names.values())
    return {key: name for key, name in names.items() if name not in dropped}
