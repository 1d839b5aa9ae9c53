"""Recognise and convert Faster R-CNN in mmdet's and torchvision's files."""

from __future__ import annotations

from headkd_ray.detectors.conversions import shapes
from headkd_ray.detectors.conversions.from_mmdet import TwoStageFromMMDet
from headkd_ray.detectors.conversions.from_torchvision import WB, TorchvisionConversion, convs
from headkd_ray.detectors.conversions.shapes import State
from headkd_ray.job import RoIHeadSpec, RPNSpec, Spec


def _roi(state: State, in_channels: int) -> tuple[RoIHeadSpec, int]:
    return shapes.roi_head(state, "roi.", in_channels)


def _background_last(state: State) -> State:
    """Move class 0 of the RoI head to the end of the scores and drop it from the boxes."""
    weight, bias, box_weight, box_bias = shapes.need(
        state, "roi.cls_out.weight", "roi.cls_out.bias", "roi.box_out.weight", "roi.box_out.bias"
    )
    return {
        **state,
        "roi.cls_out.weight": weight.roll(-1, dims=0),
        "roi.cls_out.bias": bias.roll(-1, dims=0),
        "roi.box_out.weight": box_weight[4:],
        "roi.box_out.bias": box_bias[4:],
    }


def _torchvision_sections(state: State, in_channels: int) -> tuple[dict[str, Spec], int]:
    """Infer RPN and RoI head, with torchvision's settings.

    These are whole-pixel anchors, RoIAlign with 2 samples and no half-pixel shift, unlimited shrinking and least box sizes.
    """
    rpn = shapes.rpn(state, RPNSpec)
    roi, num_classes = _roi(state, in_channels)
    few, more = {"min_size": 1e-3, "pre_nms": 1000, "post_nms": 1000}, {"min_size": 1e-3, "pre_nms": 2000, "post_nms": 2000}
    rpn = rpn.replace(
        {
            "anchors": rpn.anchors.replace({"rounding": True}),
            "clamp_shrink": False,
            "train_proposals": rpn.train_proposals.replace(more),
            "test_proposals": rpn.test_proposals.replace(few),
        }
    )
    roi = roi.replace(
        {
            "sampling_ratio": 2,
            "aligned": False,
            "clamp_shrink": False,
            "postprocess": roi.postprocess.replace({"min_size": 1e-2}),
        }
    )
    return {"rpn": rpn, "roi": roi}, num_classes


MMDET = TwoStageFromMMDet(has=r"rpn_head\.rpn_", lacks=r"roi_head\.bbox_head\.\d", roi=_roi)
TORCHVISION = TorchvisionConversion(
    has=r"(?:rpn|roi_heads)\.",
    renames=(
        (rf"rpn\.head\.conv\.{WB}", r"rpn.tower.0.\1"),  # before torchvision 0.13
        (rf"rpn\.head\.conv\.(\d+)\.0\.{WB}", convs("rpn.tower")),
        (rf"rpn\.head\.cls_logits\.{WB}", r"rpn.cls_out.\1"),
        (rf"rpn\.head\.bbox_pred\.{WB}", r"rpn.box_out.\1"),
        (rf"roi_heads\.box_head\.fc6\.{WB}", r"roi.fcs.0.\1"),
        (rf"roi_heads\.box_head\.fc7\.{WB}", r"roi.fcs.1.\1"),
        (rf"roi_heads\.box_predictor\.cls_score\.{WB}", r"roi.cls_out.\1"),
        (rf"roi_heads\.box_predictor\.bbox_pred\.{WB}", r"roi.box_out.\1"),
        # v2's four convs, each with a norm and a ReLU, and the one Linear behind them and a Flatten.
        (r"roi_heads\.box_head\.(\d+)\.([01])\.(\w+)", lambda key: f"roi.convs.{3 * int(key[1]) + int(key[2])}.{key[3]}"),
        (rf"roi_heads\.box_head\.\d+\.{WB}", r"roi.fcs.0.\1"),
    ),
    arranged=_background_last,
    sections=_torchvision_sections,
)
