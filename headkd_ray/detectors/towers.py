"""The conv towers of dense heads and the RPN, and their initial weights."""

from __future__ import annotations

from torch import nn

from headkd_ray.detectors import init


def tower(in_channels: int, channels: int, depth: int, norm_groups: int | None = None, conv_bias: bool = True) -> nn.Sequential:
    """Stack ``depth`` times a 3x3 conv, GroupNorm (unless ``norm_groups`` is None) and ReLU.

    Beside a norm the convs have a bias only with ``conv_bias``; without one they always have.
    """
    layers: list[nn.Module] = []
    bias = conv_bias or norm_groups is None
    for i in range(depth):
        layers.append(nn.Conv2d(in_channels if i == 0 else channels, channels, 3, padding=1, bias=bias))
        if norm_groups is not None:
            layers.append(nn.GroupNorm(norm_groups, channels))
        layers.append(nn.ReLU())  # not in-place: the last output is a tap, and FPN maps feed two towers
    return nn.Sequential(*layers)


def first_convs(tower: nn.Sequential, convs: int) -> nn.Sequential:
    """Return the beginning of a ``tower``, whose layers it shares, up to the ReLU after its ``convs``-th conv."""
    ends = [i for i, layer in enumerate(tower, start=1) if isinstance(layer, nn.ReLU)]
    return tower[: ends[convs - 1]]


def init_dense_head(head: nn.Module, tower_std: float | None) -> None:
    """Draw output convs from N(0, 0.01), and tower convs from N(0, tower_std) or, if that is None, by He et al. (2015)."""
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d):
            if "tower" not in name:
                init.normal(module, std=0.01)
            elif tower_std is None:
                init.kaiming(module)
            else:
                init.normal(module, std=tower_std)
