"""timm backbones that return the feature maps at strides 4, 8, 16 and 32 (C2 to C5)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import Format
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headkd_ray.detectors.backbone_widths import mobilenet_v2, set_plain_stem
from headkd_ray.errors import JobError
from headkd_ray.job import BackboneSpec

STRIDES = (4, 8, 16, 32)
"""Strides of C2 to C5 in pixels."""


class Backbone(nn.Module):
    """A timm feature extractor with a choice of its maps, frozen stages and control over its BatchNorms.

    ``body`` keeps timm's own parameter names.
    """

    body: Any
    """timm's feature extractor, which may be of a dozen classes; what they share is ``feature_info``."""

    def __init__(self, spec: BackboneSpec) -> None:
        """Raise JobError if timm does not know the model, or it lacks maps at strides 4 to 32 or blocks that a key needs."""
        super().__init__()
        self.spec = spec
        self.body = _body(spec)
        if spec.stride_in_1x1:
            _stride_in_1x1(self.body, spec.name)
        info: Any = self.body.feature_info  # a plain list for a whole model (final_conv), a FeatureInfo for an extractor
        taps: list[dict[str, Any]] = info if isinstance(info, list) else info.get_dicts()
        last = {tap["reduction"]: i for i, tap in enumerate(taps)}
        missing = [s for s in STRIDES if s not in last]
        if missing:
            raise JobError(f"backbone.name: {spec.name} has no feature map at stride {missing}; a pyramid needs {STRIDES}")
        self._taps = [last[s] for s in STRIDES]
        self.channels: list[int] = [taps[i]["num_chs"] for i in self._taps]
        if spec.final_conv:
            self.channels[-1] = int(self.body.num_features)
        last_frozen = taps[self._taps[spec.frozen_stages - 1]]["module"] if spec.frozen_stages else None
        self._frozen = _up_to(self.body, last_frozen) if last_frozen else []
        for module in self._frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and spec.norm_eps is not None:
                module.eps = spec.norm_eps
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return C2, C3, C4, C5 of normalised images ``x`` (B, 3, H, W): maps (B, channels, H/s, W/s)."""
        if self.spec.final_conv:
            final, maps = self.body.forward_intermediates(x)
            maps[-1] = final
        else:
            maps = self.body(x)
        maps = [maps[i] for i in self._taps]
        if getattr(self.body, "output_fmt", Format.NCHW) == Format.NHWC:
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return maps

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode as usual, but keep frozen stages, and with ``norm_eval`` every BatchNorm, in eval mode."""
        super().train(mode)
        if mode:
            for module in self._frozen:
                module.training = False
            if self.spec.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.training = False
        return self


def _body(spec: BackboneSpec) -> nn.Module:
    if not timm.is_model(spec.name.split(".")[0]):
        near = difflib.get_close_matches(spec.name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise JobError(f"backbone.name: timm has no model {spec.name!r}{hint}")
    try:
        return _created(spec, spec.kwargs)
    except Exception as error:  # timm's models raise anything for arguments that they cannot take
        key, given = _culprit(spec)
        raise JobError(f"{key}: timm cannot build {spec.name}{given} ({type(error).__name__}: {error})") from error


def _created(spec: BackboneSpec, kwargs: Mapping[str, Any]) -> nn.Module:
    """Create timm's feature extractor with ``kwargs`` in place of the spec's. Raises whatever timm raises."""
    arguments: dict[str, Any] = dict(kwargs)
    if spec.leaky_slope is not None:
        arguments["act_layer"] = partial(nn.LeakyReLU, negative_slope=spec.leaky_slope)
    pretrained = spec.weights == "timm"
    if spec.name.startswith("mobilenetv2") and {"channels", "layers", "stem_width", "head_width"} & kwargs.keys():
        return mobilenet_v2(features_only=not spec.final_conv, **arguments)
    if spec.final_conv:
        return timm.create_model(spec.name, pretrained=pretrained, num_classes=0, **arguments)
    if spec.name.startswith("resnet") and "stem_width" in arguments:
        net: Any = timm.create_model(spec.name, pretrained=pretrained, **arguments)
        return set_plain_stem(net, arguments["stem_width"], arguments.get("act_layer", nn.ReLU))
    return timm.create_model(spec.name, pretrained=pretrained, features_only=True, **arguments)


def shapes_of(spec: BackboneSpec, kwargs: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Return the parameter shapes of timm's model with ``kwargs``, or None if timm cannot build it. Allocates no memory."""
    try:
        with torch.device("meta"):
            body = _created(spec.replace({"weights": "none"}), kwargs)
    except Exception:  # timm's models raise anything for arguments that they cannot take
        return None
    return {name: tuple(parameter.shape) for name, parameter in body.named_parameters()}


def _culprit(spec: BackboneSpec) -> tuple[str, str]:
    """Return the key that keeps timm from building the model, and its value for the message.

    If no single key is to blame, it is the section's.
    """
    if shapes_of(spec, spec.kwargs) is not None:
        return "backbone.weights", ""  # timm builds the model, so it must be the weights that it cannot get
    for name, value in spec.kwargs.items():
        if shapes_of(spec, {other: spec.kwargs[other] for other in spec.kwargs if other != name}) is not None:
            return f"backbone.kwargs.{name}", f" with {value!r}"
    return ("backbone.kwargs", f" with {spec.kwargs}") if spec.kwargs else ("backbone.name", "")


def _stride_in_1x1(body: nn.Module, name: str) -> None:
    """Move the stride of every bottleneck of ``body`` from its 3x3 conv to its first 1x1 conv, as in Caffe's ResNets."""
    strided = [block for block in body.modules() if isinstance(block, Bottleneck) and max(block.conv2.stride) > 1]
    if not strided:
        raise JobError(f"backbone.stride_in_1x1: {name} has no ResNet bottlenecks whose 3x3 conv has a stride; use false")
    for block in strided:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _up_to(body: nn.Module, stage: str) -> list[nn.Module]:
    """Return the modules of ``body`` up to the end of ``stage``; timm registers modules in the order in which they run."""
    names = [name for name, _ in body.named_modules()]
    spelled = (stage, stage.replace(".", "_"))  # some extractors flatten stages.0 to stages_0
    start = next((n for n in names if n in spelled or n.endswith(tuple(f".{s}" for s in spelled))), None)
    if start is None:
        raise JobError(f"backbone.frozen_stages: cannot find stage {stage!r} in this backbone; use 0")
    end = max(i for i, name in enumerate(names) if name == start or name.startswith(f"{start}."))
    # A container that also holds later modules is not frozen itself; its early children are.
    open_containers = {part for name in names[end + 1 :] for part in _parents(name)}
    return [module for name, module in list(body.named_modules())[: end + 1] if name not in open_containers]


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return ["", *(".".join(parts[:i]) for i in range(1, len(parts)))]
