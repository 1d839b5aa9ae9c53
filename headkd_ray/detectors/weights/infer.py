"""A detector's spec from the shapes of its tensors (under our names)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import ValidationError
from torch import Tensor

from headkd_ray.detectors.reppoints import POINTS
from headkd_ray.errors import CheckpointError
from headkd_ray.job import (
    BackboneSpec,
    CascadeHeadSpec,
    FCOSHeadSpec,
    FPNSpec,
    GFLHeadSpec,
    RepPointsHeadSpec,
    RetinaHeadSpec,
    RoIHeadSpec,
    RPNSpec,
)

State = Mapping[str, Tensor]

_RESNETS: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}


@contextmanager
def inferring(source: str) -> Iterator[None]:
    """Turn what impossible shapes cause (a scalar conv weight, zero channels) into a CheckpointError."""
    try:
        yield
    except (IndexError, ZeroDivisionError, ValidationError) as error:
        raise CheckpointError(f"{source}: the tensors' shapes are no detector's ({type(error).__name__})") from error


def count(state: State, pattern: str) -> int:
    """How many different numbers stand at the group of ``pattern`` in the names of ``state``."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def need(state: State, *names: str) -> list[Tensor]:
    """The named tensors; CheckpointError listing those that are absent."""
    absent = [name for name in names if name not in state]
    if absent:
        headline = "the architecture cannot be read from the tensors"
        raise CheckpointError([f"missing: {name}" for name in absent], headline=headline)
    return [state[name] for name in names]


def resnet(state: State, prefix: str = "backbone.body.") -> BackboneSpec:
    """timm's ResNet with the depths and widths of ``state``; stem and first stage frozen, BatchNorm in eval mode (paper)."""
    kind = "bottleneck" if f"{prefix}layer1.0.conv3.weight" in state else "basic"
    layers = tuple(count(state, rf"{re.escape(prefix)}layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    stem, *convs = need(state, f"{prefix}conv1.weight", *(f"{prefix}layer{s}.0.conv2.weight" for s in (1, 2, 3, 4)))
    channels = [conv.shape[0] for conv in convs]
    if any(conv.shape[1] != conv.shape[0] for conv in convs):
        raise CheckpointError("grouped or widened ResNets (ResNeXt, Wide ResNet, Res2Net) are not supported")
    kwargs: dict[str, Any] = {}
    if (stem.shape[0], channels) != (64, [64, 128, 256, 512]):
        kwargs |= {"stem_width": stem.shape[0], "channels": channels}
    name = _RESNETS.get((kind, layers))
    if name is None:
        name = "resnet18" if kind == "basic" else "resnet50"
        kwargs["layers"] = list(layers)
    return BackboneSpec(name=name, kwargs=kwargs)


def mobilenet_v2(state: State, leaky_slope: float | None, prefix: str = "backbone.body.") -> BackboneSpec:
    """timm's MobileNetV2 with the widths of ``state``; else as in the paper: nothing frozen, BatchNorm trained, final conv."""
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
    """The neck of ``state``; where a first extra conv could read C5 or P5 (equal widths) it reads C5, as the paper's does."""
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


def retina_head(state: State) -> tuple[RetinaHeadSpec, int]:
    """The dense head of ``state`` and its number of classes."""
    cls_out, box_out = need(state, "head.cls_out.weight", "head.box_out.weight")
    spec = RetinaHeadSpec(convs=count(state, r"head\.cls_tower\.(\d+)\."), channels=cls_out.shape[1])
    anchors = len(spec.anchors.ratios) * spec.anchors.octave_scales
    if box_out.shape[0] != 4 * anchors:
        raise CheckpointError(f"a dense head with {box_out.shape[0] / 4:g} anchors a cell; only {anchors} is supported")
    return spec, cls_out.shape[0] // anchors


def is_fcos(state: State) -> bool:
    """Whether the dense head of ``state`` is FCOS's: the only one with a centerness."""
    return any(name.startswith("head.centerness_out.") for name in state)


def fcos_head(state: State) -> tuple[FCOSHeadSpec, int]:
    """The FCOS head of ``state`` and its number of classes; what no shape tells is as in the paper, 32 groups in the norm."""
    cls_out, box_out = need(state, "head.cls_out.weight", "head.box_out.weight")
    if box_out.shape[0] != 4:
        raise CheckpointError(f"an FCOS head with {box_out.shape[0] / 4:g} boxes a cell; only 1 is supported")
    channels = cls_out.shape[1]
    convs, groups = _tower(state, "an FCOS head", channels, FCOSHeadSpec().norm_groups)
    return FCOSHeadSpec(convs=convs, channels=channels, norm_groups=groups), cls_out.shape[0]


def is_gfl(state: State) -> bool:
    """Whether the dense head of ``state`` is GFL's: the only one that scales its levels and has no centerness."""
    return any(name.startswith("head.scales.") for name in state) and not is_fcos(state)


def gfl_head(state: State) -> tuple[GFLHeadSpec, int]:
    """The GFL head of ``state`` and its number of classes; what no shape tells is as in mmdet, 32 groups in the norm."""
    cls_out, box_out = need(state, "head.cls_out.weight", "head.box_out.weight")
    if box_out.shape[0] % 4 or box_out.shape[0] < 8:
        raise CheckpointError(f"a GFL head with {box_out.shape[0]} box outputs a cell; 4 x (reg_max + 1) are needed")
    channels = cls_out.shape[1]
    convs, groups = _tower(state, "a GFL head", channels, GFLHeadSpec().norm_groups)
    return GFLHeadSpec(convs=convs, channels=channels, norm_groups=groups, reg_max=box_out.shape[0] // 4 - 1), cls_out.shape[0]


def is_reppoints(state: State) -> bool:
    """Whether the dense head of ``state`` is RepPoints': the only one that refines."""
    return any(name.startswith("head.refine_out.") for name in state)


def reppoints_head(state: State) -> tuple[RepPointsHeadSpec, int]:
    """The RepPoints head of ``state`` and its number of classes; what no shape tells is as in mmdet, 32 groups in the norm."""
    cls_out, cls_conv, points = need(state, "head.cls_out.weight", "head.cls_conv.weight", "head.refine_out.weight")
    if points.shape[0] != 2 * POINTS or "head.moment_transfer" not in state:
        raise CheckpointError(
            f"a RepPoints head of another kind than moment with {POINTS} points a cell; only that is supported"
        )
    channels = cls_conv.shape[1]
    convs, groups = _tower(state, "a RepPoints head", channels, RepPointsHeadSpec().norm_groups)
    spec = RepPointsHeadSpec(convs=convs, channels=channels, point_channels=cls_out.shape[1], norm_groups=groups)
    return spec, cls_out.shape[0]


def _tower(state: State, what: str, channels: int, groups: int | None) -> tuple[int, int | None]:
    """Depth of the classification tower of ``what``, and ``groups`` if it has a norm."""
    if "head.cls_tower.1.weight" not in state:
        groups = None
    elif groups is not None:
        _check_groups(what, channels, groups)
    depth = sum(name.startswith("head.cls_tower.") and tensor.dim() == 4 for name, tensor in state.items())
    return depth, groups


def _check_groups(what: str, channels: int, groups: int) -> None:
    if channels % groups:
        raise CheckpointError(f"{what} with GroupNorm on {channels} channels, which {groups} groups do not divide")


def rpn(state: State) -> RPNSpec:
    """The RPN of ``state``."""
    (box_out,) = need(state, "rpn.box_out.weight")
    spec = RPNSpec(convs=count(state, r"rpn\.tower\.(\d+)\."))
    anchors = len(spec.anchors.ratios)
    if box_out.shape[0] != 4 * anchors:
        raise CheckpointError(f"an RPN with {box_out.shape[0] / 4:g} anchors a cell; only {anchors} is supported")
    return spec


def roi_head(state: State, prefix: str, in_channels: int) -> tuple[RoIHeadSpec, int]:
    """The RoI head of ``state`` under ``prefix`` (``roi.``, ``assistant.``) and its number of classes."""
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


def is_cascade(state: State) -> bool:
    """Whether the RoI head of ``state`` has stages."""
    return any(name.startswith("roi.stages.") for name in state)


def cascade_head(state: State, in_channels: int) -> tuple[CascadeHeadSpec, int]:
    """The cascade of ``state`` and its number of classes; what no shape tells (IoUs, delta scales, weights) is mmdet's."""
    stages, usual = count(state, r"roi\.stages\.(\d+)\."), len(CascadeHeadSpec().stages)
    if stages != usual:
        raise CheckpointError(f"a cascade of {stages} stages; only {usual} are supported")
    first, num_classes = roi_head(state, "roi.stages.0.", in_channels)
    shape = {name: getattr(first, name) for name in ("convs", "conv_channels", "conv_norm", "fcs", "fc_channels", "pool")}
    agnostic = state["roi.stages.0.box_out.weight"].shape[0] == 4
    return CascadeHeadSpec(**shape, class_agnostic=agnostic), num_classes
