"""A detector as one graph from images to detections, in which no shape depends on what is detected.

The network and its candidates are the detector's own methods; NMS, whose usual code makes lists of unknown lengths, is written
here with masks. ``tests/deploy/test_onnx_file.py`` holds both against each other for every kind of detector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray.deploy.sampled_conv import without_deform_conv
from headkd_ray.deploy.static_nms import REJECTED, Suppress, survivors
from headkd_ray.detectors import DenseDetector, TwoStageDetector
from headkd_ray.detectors.build import AnyDetector
from headkd_ray.detectors.ops.boxes import clip, decode, exceeds
from headkd_ray.detectors.ops.matching import gather_rows
from headkd_ray.detectors.ops.proposals import best_anchors, filtered
from headkd_ray.detectors.ops.tracing import at_most
from headkd_ray.detectors.rpn import RPN, RPNOutputs
from headkd_ray.engine.evaluation import in_original_pixels


class Inputs(NamedTuple):
    """The inputs of every graph, by name."""

    images: Tensor
    """uint8 (B, H, W, 3), RGB; H and W are multiples of the detector's padding. What lies outside ``sizes`` is not read."""
    sizes: Tensor
    """int64 (B, 2): height and width of each image without padding, from the upper left corner."""
    original_sizes: Tensor
    """int64 (B, 2): height and width of each image before it was resized; the same as ``sizes`` if it was not."""


class GraphDetections(NamedTuple):
    """The outputs of a :class:`DetectionGraph`, best first; N is at most the detector's ``max_detections``."""

    boxes: Tensor
    """float32 (B, N, 4): xyxy, in pixels of the original images, inside them."""
    scores: Tensor
    """float32 (B, N); 0 = padding."""
    labels: Tensor
    """int64 (B, N): index of the class; -1 = padding."""


class DetectionGraph(nn.Module):
    """From images to detections."""

    def __init__(self, detector: AnyDetector, suppress: Suppress = survivors) -> None:
        super().__init__()
        self.detector, self.suppress = without_deform_conv(detector), suppress

    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> GraphDetections:
        """Detect; the arguments are those of :class:`Inputs`."""
        x = self.detector.normalise(images.permute(0, 3, 1, 2), sizes)
        if isinstance(self.detector, DenseDetector):
            found = _dense(self.detector, x, sizes, self.suppress)
        else:
            found = _two_stage(self.detector, x, sizes, self.suppress)
        return found._replace(boxes=in_original_pixels(found.boxes, sizes, original_sizes))


class RawGraph(nn.Module):
    """From images to the outputs of the head, before anything is sorted, filtered or suppressed."""

    def __init__(self, detector: AnyDetector, suppress: Suppress = survivors) -> None:
        super().__init__()
        self.detector, self.suppress = without_deform_conv(detector), suppress

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return the head's outputs; the arguments are those of :class:`Inputs`.

        Of a dense head these are its maps, named with the number of their level, 0 = finest. Of P RoIs of a two-stage detector
        they are ``boxes`` (B, P, C, 4), or (B, P, 1, 4) if class-agnostic, in pixels of the input, and ``scores`` (B, P, C), 0
        in the padding.
        """
        x = self.detector.normalise(images.permute(0, 3, 1, 2), sizes)
        if isinstance(self.detector, DenseDetector):
            outputs = self.detector.head(self.detector.features(x))._asdict()
            maps = {name: levels for name, levels in outputs.items() if name != "taps"}
            return {f"{name}_{level}": m for name, levels in maps.items() for level, m in enumerate(levels)}
        boxes, scores, valid = _scored_rois(self.detector, x, sizes, self.suppress)
        return {"boxes": boxes, "scores": scores.where(valid.unsqueeze(-1), 0.0)}


def _dense(detector: DenseDetector, x: Tensor, sizes: Tensor, suppress: Suppress) -> GraphDetections:
    rules = detector.head.spec.postprocess
    found, passed = filtered(detector.head.candidates(detector.head(detector.features(x))), sizes, rules)
    mine = found.labels.unsqueeze(1) == torch.arange(detector.num_classes, device=x.device)[:, None]
    scores = found.scores.unsqueeze(1).where(mine & passed.unsqueeze(1), REJECTED)
    kept = suppress(found.boxes, scores, rules.nms_iou).any(1)
    return _best(found.boxes, found.scores.where(kept, REJECTED), found.labels, rules.max_detections)


def _two_stage(detector: TwoStageDetector, x: Tensor, sizes: Tensor, suppress: Suppress) -> GraphDetections:
    rules, classes = detector.roi.stages[-1].spec.postprocess, detector.num_classes
    boxes, scores, valid = _scored_rois(detector, x, sizes, suppress)
    boxes = boxes.expand(-1, -1, classes, -1).transpose(1, 2)  # (B, C, P, 4)
    passed = (scores > rules.score) & valid.unsqueeze(-1)
    scores = scores.where(passed, REJECTED).transpose(1, 2).where(exceeds(boxes, rules.min_size), REJECTED)  # (B, C, P)
    kept = suppress(boxes.flatten(0, 1), scores.flatten(0, 1).unsqueeze(1), rules.nms_iou).reshape(scores.shape)
    labels = torch.arange(classes, device=x.device)[:, None].expand_as(scores)
    return _best(boxes.flatten(1, 2), scores.where(kept, REJECTED).flatten(1), labels.flatten(1), rules.max_detections)


def _scored_rois(detector: TwoStageDetector, x: Tensor, sizes: Tensor, suppress: Suppress) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (B, P, C or 1, 4), class scores (B, P, C) and validity (B, P) of the RoIs of the last stage."""
    features = detector.features(x)
    rois, valid = _proposals(detector.rpn, detector.rpn(features), sizes, suppress)
    batch, count = valid.shape
    image = torch.arange(batch, device=x.device)[:, None].expand(batch, count).flatten()
    outputs, rois = detector.roi.final(features, rois.flatten(0, 1), image, sizes)
    spec = detector.roi.stages[-1].spec
    boxes = decode(outputs.deltas.float(), rois.unsqueeze(1), spec.stds, spec.clamp_shrink)  # (R, C or 1, 4)
    scores = outputs.logits.float().softmax(-1)[:, :-1]
    boxes = clip(boxes, sizes[image])
    # Not unflatten: it makes constants of traced sizes.
    return boxes.reshape(batch, count, *boxes.shape[1:]), scores.reshape(batch, count, detector.num_classes), valid


def _proposals(rpn: RPN, outputs: RPNOutputs, sizes: Tensor, suppress: Suppress) -> tuple[Tensor, Tensor]:
    """Propose as ``RPN.proposals`` does at test settings: boxes (B, P, 4) and the mask (B, P) of those that are not padding."""
    rules = rpn.spec.test_proposals
    boxes, scores, cells = best_anchors(*rpn.scored(outputs), rpn.anchors, sizes, rules, rpn.decode)
    passed = exceeds(boxes, rules.min_size)
    mine = cells[..., 0].unsqueeze(1) == torch.arange(len(rpn.anchors.strides), device=boxes.device)[:, None]
    kept = suppress(boxes, scores.unsqueeze(1).where(mine & passed.unsqueeze(1), REJECTED), rules.nms_iou).any(1)
    best, row = scores.where(kept, REJECTED).topk(at_most(rules.post_nms, scores.shape[1]), dim=1)
    return gather_rows(boxes, row), best >= 0


def _best(boxes: Tensor, scores: Tensor, labels: Tensor, limit: int) -> GraphDetections:
    """Return the best ``limit`` rows of boxes (B, K, 4), scores (B, K) and labels (B, K) that are not REJECTED."""
    best, row = scores.topk(at_most(limit, scores.shape[1]), dim=1)
    real = best >= 0
    return GraphDetections(
        gather_rows(boxes, row).where(real.unsqueeze(-1), 0.0),
        best.where(real, 0.0),
        labels.gather(1, row).where(real, -1),
    )
