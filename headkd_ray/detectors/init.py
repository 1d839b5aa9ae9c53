"""Initialisation of the weights of necks and heads; biases start at 0."""

from __future__ import annotations

import math

from torch import nn

Layer = nn.Conv2d | nn.Linear


def normal(layer: Layer, std: float) -> None:
    """Draw weights from N(0, ``std``)."""
    nn.init.normal_(layer.weight, std=std)
    zero_bias(layer)


def xavier(layer: Layer) -> None:
    """Draw Xavier uniform weights."""
    nn.init.xavier_uniform_(layer.weight)
    zero_bias(layer)


def kaiming(layer: Layer) -> None:
    """Draw Kaiming normal weights (fan-out) for a ReLU that follows."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    zero_bias(layer)


def prior(layer: Layer, probability: float) -> None:
    """Set the bias so that a sigmoid output starts at ``probability``."""
    assert layer.bias is not None
    nn.init.constant_(layer.bias, -math.log((1 - probability) / probability))


def zero_bias(layer: Layer) -> None:
    """Set the bias to 0 if there is one."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
