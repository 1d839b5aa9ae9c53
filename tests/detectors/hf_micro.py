"""Tiny detectors of transformers with random weights, saved as a user's folder: model and image processor."""

from pathlib import Path
from typing import Any

import pytest
import torch

STRETCHED: dict[str, Any] = {"size": {"height": 96, "width": 96}, "do_normalize": False}
SHORT_SIDE: dict[str, Any] = {"size": {"shortest_edge": 64, "longest_edge": 128}}
COMMON = {
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_layers": 3,
    "num_queries": 20,
}
KINDS = ("detr", "deformable_detr", "rt_detr_v2", "d_fine", "deimv2", "rf_detr")
"""The kinds whose answers are compared with transformers' own; older versions of it lack the last two."""


def hf_config(kind: str, labels: tuple[str, ...]) -> Any:
    """Return the config of a tiny detector."""
    import transformers as hf

    names: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: place for place, name in enumerate(labels)},
    }
    tiny: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    levels = ["stage2", "stage3", "stage4"]
    if kind in ("detr", "deformable_detr"):
        several = kind == "deformable_detr"
        config = hf.DeformableDetrConfig if several else hf.DetrConfig
        more = {"num_feature_levels": 3} if several else {}
        backbone = hf.ResNetConfig(**tiny, out_features=levels if several else levels[-1:])
        plain = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "encoder_layers": 1}
        return config(backbone_config=backbone, **plain, **COMMON, **more, **names)
    if kind == "yolos":
        yolos = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
        return hf.YolosConfig(**yolos, image_size=[64, 64], num_detection_tokens=20, **names)
    if kind == "rf_detr":
        return _rf_detr(names)
    configs = {"rt_detr": "RTDetrConfig", "rt_detr_v2": "RTDetrV2Config", "d_fine": "DFineConfig", "deimv2": "Deimv2Config"}
    config = known(configs[kind])
    channels = {"encoder_hidden_dim": 32, "encoder_in_channels": [12, 16, 20], "decoder_in_channels": [32, 32, 32]}
    more = {"decoder_n_points": [4, 4, 4]} if kind in ("d_fine", "deimv2") else {}
    return config(backbone_config=hf.RTDetrResNetConfig(**tiny, out_features=levels), **channels, **COMMON, **more, **names)


def _rf_detr(names: dict[str, Any]) -> Any:
    backbone = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2}
    views = {"image_size": 96, "patch_size": 16, "num_windows": 1, "out_indices": [2, 4], "use_mask_token": False}
    decoder = {"d_model": 32, "decoder_ffn_dim": 32, "decoder_layers": 3, "num_queries": 20, "group_detr": 1}
    heads = {"decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4}
    config = known("RfDetrConfig")
    return config(backbone_config=known("RfDetrDinov2Config")(**backbone, **views), **decoder, **heads, **names)


def known(name: str) -> Any:
    """Return a class of transformers; where it has none of this name, the test is skipped."""
    import transformers

    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def hf_folder(folder: Path, kind: str = "rt_detr_v2", labels: tuple[str, ...] = ("a", "b", "c"), seed: int = 0) -> Path:
    """Save a tiny detector with random weights, and an image processor as models of its kind have it."""
    import transformers as hf

    torch.manual_seed(seed)
    model = hf.AutoModelForObjectDetection.from_config(hf_config(kind, labels)).eval()
    for name, weight in model.named_parameters():
        if "class_embed" in name or "class_labels" in name:  # scores of random weights hardly differ otherwise
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    processors = {
        "detr": hf.DetrImageProcessor,
        "deformable_detr": hf.DeformableDetrImageProcessor,
        "yolos": hf.YolosImageProcessor,
    }
    size = SHORT_SIDE if kind in processors else STRETCHED
    processors.get(kind, hf.RTDetrImageProcessor)(**size).save_pretrained(folder)
    return folder
