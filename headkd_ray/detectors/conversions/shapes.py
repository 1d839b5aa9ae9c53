"""Infer the specs of parts that several kinds share from the shapes of their tensors, under our names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from torch import Tensor

from headkd_ray.errors import CheckpointError
from headkd_ray.job import BackboneSpec, FPNSpec, RoIHeadSpec, RPNSpec

State = Mapping[str, Tensor]
_RPN = TypeVar("_RPN", bound=RPNSpec)

_RESNETS: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}


class ShapeError(CheckpointError):
    """Tensors that are missing, or whose shapes no detector here has; :func:`inferring` adds the file's name."""


@contextmanager
def inferring(source: str) -> Iterator[None]:
    """Turn a ShapeError, and what impossible shapes cause (a scalar conv weight, zero channels), into a CheckpointError that
    names the file ``source``."""
    try:
        yield
    except ShapeError as error:
        if error.headline is None:
            raise CheckpointError([f"{source}: {problem}" for problem in error.problems]) from error
        raise CheckpointError(error.problems, f"{source}: {error.headline}") from error
    except (IndexError, ZeroDivisionError, ValidationError) as error:
        raise CheckpointError(f"{source}: the tensors' shapes are no detector's ({type(error).__name__})") from error


def count(state: State, pattern: str) -> int:
    """Count the different numbers at the group of ``pattern`` in the names of ``state``."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def need(state: State, *names: str) -> list[Tensor]:
    """Return the named tensors, or raise ShapeError listing those that are absent."""
    absent = [name for name in names if name not in state]
    if absent:
        headline = "the architecture cannot be read from the tensors"
        raise ShapeError([f"missing: {name}" for name in absent], headline=headline)
    return [state[name] for name in names]


def resnet(state: State, prefix: str = "backbone.body.") -> BackboneSpec:
    """Return timm's ResNet with the depths and widths of ``state``; else as in the paper: stem and first stage frozen,
    BatchNorm in eval mode."""
    kind = "bottleneck" if f"{prefix}layer1.0.conv3.weight" in state else "basic"
    layers = tuple(count(state, rf"{re.escape(prefix)}layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    stem, *convs = need(state, f"{prefix}conv1.weight", *(f"{prefix}layer{s}.0.conv2.weight" for s in (1, 2, 3, 4)))
    channels = [conv.shape[0] for conv in convs]
    if any(conv.shape[1] != conv.shape[0] for conv in convs):
        raise ShapeError("grouped or widened ResNets (ResNeXt, Wide ResNet, Res2Net) are not supported")
    kwargs: dict[str, Any] = {}
    if (stem.shape[0], channels) != (64, [64, 128, 256, 512]):
        kwargs |= {"stem_width": stem.shape[0], "channels": channels}
    name = _RESNETS.get((kind, layers))
    if name is None:
        name = "resnet18" if kind == "basic" else "resnet50"
        kwargs["layers"] = list(layers)
    return BackboneSpec(name=name, kwargs=kwargs)


def mobilenet_v2(state: State, leaky_slope: float | None, prefix: str = "backbone.body.") -> BackboneSpec:
    """Return timm's MobileNetV2 with the widths of ``state``; else as in the paper: nothing frozen, BatchNorm trained, final
    conv."""
    ends = [f"{prefix}blocks.0.0.conv_pw.weight", *(f"{prefix}blocks.{stage}.0.conv_pwl.weight" for stage in range(1, 7))]
    stem, head, *convs = need(state, f"{prefix}conv_stem.weight", f"{prefix}conv_head.weight", *ends)
    widths = {
        "stem_width": stem.shape[0],
        "channels": [conv.shape[0] for conv in convs],
        "layers": [count(state, rf"{re.escape(prefix)}blocks\.{stage}\.(\d+)\.") for stage in range(7)],
        "head_width": head.shape[0],
    }
    usual = {"stem_width": 32, "channels": [16, 24, 32, 64, 96, 160, 320], "layers": [1, 2, 3, 4, 3, 3, 1], "head_width": 1280}
    return BackboneSpec(
        name="mobilenetv2_100",
        kwargs={} if widths == usual else widths,
        frozen_stages=0,
        norm_eval=False,
        leaky_slope=leaky_slope,
        final_conv=True,
    )


def fpn(state: State) -> FPNSpec:
    """Return the neck of ``state``; where a first extra conv could read C5 or P5 (equal widths) it reads C5, as the
    paper's does."""
    norm: Literal["none", "batch", "group"] = "none"
    if "neck.lateral.0.1.weight" in state:
        norm = "batch" if "neck.lateral.0.1.running_mean" in state else "group"
    last = count(state, r"neck\.lateral\.(\d+)\.") - 1
    conv = "weight" if norm == "none" else "0.weight"
    (lateral,) = need(state, f"neck.lateral.{last}.{conv}")
    width = lateral.shape[0]
    if norm == "group":
        _check_groups("a pyramid", width, FPNSpec().norm_groups)
    first = state.get("neck.extra.0.0.weight" if norm == "group" else "neck.extra.0.weight")
    if first is None:
        return FPNSpec(channels=width, extra="pool", norm=norm)
    return FPNSpec(channels=width, extra="conv_c5" if first.shape[1] == lateral.shape[1] else "conv_p5", norm=norm)


def tower(state: State, what: str, channels: int, groups: int | None) -> dict[str, Any]:
    """Return the keys that describe a dense head's towers: convs, channels, norm_groups and, beside a norm, conv_bias.

    The norm, if there is one, has ``groups``; the convs beside it have biases if any of them has.

    Raises ShapeError, which names the head as ``what``, if the groups do not divide ``channels``.
    """
    convs = [name for name, t in state.items() if name.startswith(("head.cls_tower.", "head.box_tower.")) and t.dim() == 4]
    keys = {"convs": sum(name.startswith("head.cls_tower.") for name in convs), "channels": channels}
    if "head.cls_tower.1.weight" not in state:
        return {**keys, "norm_groups": None}
    if groups is not None:
        _check_groups(what, channels, groups)
    biased = any(name.removesuffix("weight") + "bias" in state for name in convs)
    return {**keys, "norm_groups": groups, "conv_bias": biased}


def _check_groups(what: str, channels: int, groups: int) -> None:
    if channels % groups:
        raise ShapeError(f"{what} with GroupNorm on {channels} channels, which {groups} groups do not divide")


def rpn(state: State, kind: type[_RPN]) -> _RPN:
    """Return the RPN of ``state`` as a spec of class ``kind``."""
    (box_out,) = need(state, "rpn.box_out.weight")
    spec = kind(convs=count(state, r"rpn\.tower\.(\d+)\."))
    anchors = len(spec.anchors.ratios)
    if box_out.shape[0] != 4 * anchors:
        raise ShapeError(f"an RPN with {box_out.shape[0] / 4:g} anchors a cell; only {anchors} is supported")
    return spec


def roi_head(state: State, prefix: str, in_channels: int) -> tuple[RoIHeadSpec, int]:
    """Return the RoI head of ``state`` under ``prefix`` (``roi.``, ``assistant.``) and its number of classes."""
    cls_out, box_out, first = need(state, f"{prefix}cls_out.weight", f"{prefix}box_out.weight", f"{prefix}fcs.0.weight")
    convs = [t.shape[0] for name, t in state.items() if name.startswith(f"{prefix}convs.") and t.dim() == 4]
    channels = convs[-1] if convs else in_channels
    num_classes = cls_out.shape[0] - 1
    spec = RoIHeadSpec(
        convs=len(convs),
        conv_channels=channels if convs else 256,
        conv_norm=any(name.startswith(f"{prefix}convs.") and name.endswith("running_mean") for name in state),
        fcs=count(state, rf"{re.escape(prefix)}fcs\.(\d+)\."),
        fc_channels=first.shape[0],
        pool=max(round((first.shape[1] / channels) ** 0.5), 1),
        class_agnostic=box_out.shape[0] == 4 and num_classes > 1,
    )
    return spec, num_classes
