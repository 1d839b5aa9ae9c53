"""Detectors small enough to be built and stepped in milliseconds, and one drawn batch for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headkd_ray.data.batch import Batch
from headkd_ray.detectors import GroundTruth
from headkd_ray.job import CascadeRCNNSpec, FasterRCNNSpec, FCOSSpec, GFLSpec, RepPointsSpec, RetinaNetSpec, TransformersSpec

BACKBONE: dict[str, Any] = {
    "name": "resnet10t",
    "kwargs": {"stem_width": 4, "channels": [8, 8, 16, 16]},
    "frozen_stages": 0,
    "norm_eval": False,
}


def retinanet_spec(**head: Any) -> RetinaNetSpec:
    head = {"convs": 1, "channels": 16, "proposals": {"pre_nms": 100, "post_nms": 50}, **head}
    return RetinaNetSpec.model_validate({"backbone": BACKBONE, "neck": {"channels": 16}, "head": head})


def faster_rcnn_spec(**roi: Any) -> FasterRCNNSpec:
    proposals = {"pre_nms": 100, "post_nms": 50}
    return FasterRCNNSpec.model_validate(
        {
            "backbone": BACKBONE,
            "neck": {"channels": 16, "extra": "pool"},
            "rpn": {"train_proposals": proposals, "test_proposals": proposals, "sampler": {"size": 32}},
            "roi": {"fc_channels": 24, "pool": 3, "sampler": {"size": 16}, **roi},
        }
    )


def cascade_spec(**roi: Any) -> CascadeRCNNSpec:
    whole = faster_rcnn_spec().model_dump(include={"backbone", "neck"})
    proposals = {"pre_nms": 100, "post_nms": 50}
    rpn = {"train_proposals": proposals, "test_proposals": proposals, "sampler": {"size": 32}}
    roi = {"fc_channels": 24, "pool": 3, "sampler": {"size": 16}, **roi}
    return CascadeRCNNSpec.model_validate({**whole, "rpn": rpn, "roi": roi})


def fcos_spec(**head: Any) -> FCOSSpec:
    head = {"convs": 1, "channels": 16, "norm_groups": 4, "proposals": {"pre_nms": 100, "post_nms": 50}, **head}
    return FCOSSpec.model_validate({"backbone": BACKBONE, "neck": {"channels": 16}, "head": head})


def gfl_spec(**head: Any) -> GFLSpec:
    proposals = {"pre_nms": 100, "post_nms": 50}
    head = {"convs": 1, "channels": 16, "norm_groups": 4, "reg_max": 8, "proposals": proposals, **head}
    return GFLSpec.model_validate({"backbone": BACKBONE, "neck": {"channels": 16}, "head": head})


def reppoints_spec(**head: Any) -> RepPointsSpec:
    proposals = {"pre_nms": 100, "post_nms": 50}
    head = {"convs": 1, "channels": 16, "point_channels": 12, "norm_groups": 4, "proposals": proposals, **head}
    neck = {"channels": 16, "norm_groups": 4}
    return RepPointsSpec.model_validate({"backbone": BACKBONE, "neck": neck, "head": head})


RT_DETR: dict[str, Any] = {
    "kind": "transformers",
    "model": "rt_detr",
    "input_size": [64, 64],
    "config": {
        "backbone_config": {
            "model_type": "rt_detr_resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 12, 16],
            "depths": [1, 1, 1],
            "layer_type": "basic",
            "out_indices": [2, 3],
        },
        "freeze_backbone_batch_norms": False,
        "feat_strides": [8, 16],
        "encoder_in_channels": [12, 16],
        "decoder_in_channels": [16, 16],
        "encode_proj_layers": [1],
        "num_feature_levels": 2,
        **dict.fromkeys(("d_model", "encoder_hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 16),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "decoder_layers"), 2),
        "num_queries": 12,
        "num_denoising": 6,
    },
}
"""The keys of a micro RT-DETR of transformers."""


def transformers_spec(**config: Any) -> TransformersSpec:
    return TransformersSpec.model_validate({**RT_DETR, "config": {**RT_DETR["config"], **config}})


SPECS: dict[str, Any] = {
    "retinanet": retinanet_spec,
    "fcos": fcos_spec,
    "gfl": gfl_spec,
    "reppoints": reppoints_spec,
    "faster_rcnn": faster_rcnn_spec,
    "cascade_rcnn": cascade_spec,
}
"""A micro spec of every kind of detector with a feature pyramid."""
ALL_SPECS: dict[str, Any] = {**SPECS, "transformers": transformers_spec}
"""A micro spec of every kind of detector."""


def batch() -> dict[str, Tensor]:
    """Return three images in one 64 x 96 batch: a full-size one, a smaller one, and one without objects."""
    generator = torch.Generator().manual_seed(7)
    return {
        "images": torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8, generator=generator),
        "sizes": torch.tensor([[64, 96], [50, 60], [64, 90]]),
        "boxes": torch.tensor(
            [[[4.0, 4, 40, 36], [50, 10, 90, 60]], [[8, 8, 30, 44], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]]
        ),
        "labels": torch.tensor([[0, 2], [1, -1], [-1, -1]]),
    }


def truth_of(data: dict[str, Tensor]) -> GroundTruth:
    """Return the ground truth of a drawn batch."""
    return GroundTruth.of(data["boxes"], data["labels"], data["sizes"])


def whole(data: dict[str, Tensor]) -> Batch:
    """Return a drawn batch as the stream would deliver it."""
    count = len(data["sizes"])
    ids, views = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    ones = data["boxes"].new_ones(data["labels"].shape)
    certain = {"weights": ones, "background": torch.ones(count, dtype=torch.bool, device=ones.device)}
    return Batch(**data, **certain, image_ids=ids, original_sizes=data["sizes"], views=views, step=0)


def liven(module: torch.nn.Module, seed: int = 0) -> None:
    """Enlarge the weights of the last layers, so that scores differ between cells and some pass the threshold."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "_out." in name:
                parameter.normal_(0, 0.3, generator=generator)
