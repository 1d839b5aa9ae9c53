"""What keeps a job's detector from starting with the weights of another: the keys in which the two architectures differ."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from headkd_ray.detectors.backbone import Backbone
from headkd_ray.detectors.base import Detector
from headkd_ray.detectors.build import build_detector
from headkd_ray.detectors.fit import check_fit
from headkd_ray.errors import CheckpointError
from headkd_ray.job import BackboneSpec, PyramidDetectorSpec, WholeDetectorSpec

_BACKBONE = ("name", "kwargs", "leaky_slope", "norm_eps", "final_conv", "stride_in_1x1")
"""The keys that shape a backbone. Different ones can mean the same network, so that the networks are compared."""
_FREE = frozenset(
    (
        *("checkpoint", "classes", "backbone"),  # the backbone is compared by itself
        *("tower_std", "prior"),  # initial weights
        *("positive_iou", "positive_ious", "negative_iou", "topk", "center_radius", "regress_ranges", "sampler"),
        *("focal_alpha", "focal_gamma", "quality_beta", "smooth_l1_beta", "box_beta", "box_loss"),
        *("weights", "box_weight", "dfl_weight", "init_weight", "refine_weight", "gradient_mul", "moment_mul"),
        *("proposals", "train_proposals", "test_proposals", "postprocess", "clamp_shrink", "score", "average"),
    )
)
"""Keys that say how a detector is trained, or how its outputs become detections: weights fit whatever they are."""
_FREE_IN_HEAD = frozenset({"head.base_scale"})
"""Likewise: in the anchor-free heads that have it, it scales targets and losses. (In ``anchors`` it scales boxes.)"""
_FREE_IN_CONFIG = re.compile(
    r".*(dropout|layerdrop|num_denoising|_cost|_coefficient|_noise.*|matcher_.*|focal_.*|mal_alpha|weight_loss_.*|init(ializer)?_.*"
    r"|auxiliary_loss|freeze_backbone_batch_norms|freeze_batch_norm_2d|disable_custom_kernels)"
)
"""Likewise in the config of a network of transformers."""


def check_architecture(mine: WholeDetectorSpec, other: Detector, section: str = "student") -> None:
    """Check that a detector built from ``mine`` can take the weights of ``other`` and would compute the same with them.

    Raises:
        CheckpointError: lists each key that differs, with both values, and how to set them all.
        JobError: a detector cannot be built from ``mine``.
    """
    theirs = other.spec
    if mine.kind != theirs.kind:
        raise CheckpointError(
            f"{section}.kind: {mine.kind} in the job, {theirs.kind} in the checkpoint; a detector starts only from one of its "
            "own kind (one of another kind can be its teacher, with teacher.checkpoint)"
        )
    differing: dict[str, tuple[Any, Any]] = {}
    if isinstance(mine, PyramidDetectorSpec) and isinstance(theirs, PyramidDetectorSpec):
        mine = mine.replace({"backbone.weights": "none"})
        differing = {f"backbone.{key}": pair for key, pair in _backbones(mine.backbone, theirs.backbone)}
    with torch.device("meta"):
        whole = build_detector(mine, other.num_classes, section)
    differing |= _differing(_architecture(whole.spec, other.num_classes), _architecture(theirs, other.num_classes))
    if not differing:
        check_fit(whole, other.state_dict(), "the checkpoint")
        return
    problems = [f"{section}.{key}: {_shown(a)} in the job, {_shown(b)} in the checkpoint" for key, (a, b) in differing.items()]
    changes = " ".join(shlex.quote(f"{section}.{key}={_shown(b)}") for key, (_, b) in differing.items())
    raise CheckpointError([*problems, f"to start from it, set {changes}"])


def _backbones(mine: BackboneSpec, theirs: BackboneSpec) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield (key, both values) of the keys in which the backbones differ, if they are not the same network."""
    if _printed(mine) == _printed(theirs):
        return
    for key in _BACKBONE:
        a, b = getattr(mine, key), getattr(theirs, key)
        if key == "name":  # a tag selects among timm's weights
            a, b = a.partition(".")[0], b.partition(".")[0]
        if a != b:
            yield key, (getattr(mine, key), b)


def _printed(spec: BackboneSpec) -> str:
    """Return the backbone's modules with their settings, but without what acts only in training (dropout, drop path)."""
    kwargs = {name: value for name, value in spec.kwargs.items() if "drop" not in name}
    with torch.device("meta"):
        return repr(Backbone(spec.replace({"weights": "none", "frozen_stages": 0, "kwargs": kwargs})))


def _architecture(spec: WholeDetectorSpec, classes: int) -> dict[str, Any]:
    """Return the keys, dotted, that the meaning of a detector's weights depends on, without our backbones'."""
    keys = dict(_flat(spec.model_dump()))
    if not isinstance(spec, PyramidDetectorSpec):
        return {key: value for key, value in keys.items() if not _FREE_IN_CONFIG.fullmatch(key)}
    unused = []
    if keys["neck.norm"] != "group":
        unused.append("neck.norm_groups")
    if keys["neck.extra"] == "pool":
        unused.append("neck.relu_before_p7")
    if keys.get("head.norm_groups") is None:  # without a norm, convs always have biases
        unused.append("head.conv_bias")
    if keys.get("roi.convs") == 0:
        unused += ["roi.conv_channels", "roi.conv_norm"]
    if classes == 1:
        unused.append("roi.class_agnostic")
    return {key: value for key, value in keys.items() if key not in unused}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name in _FREE or key in _FREE_IN_HEAD:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (value, theirs[key]) for key, value in mine.items() if key in theirs and value != theirs[key]}


def _shown(value: Any) -> str:
    """Return the value as a job file spells it."""
    return value if isinstance(value, str) else json.dumps(value)
