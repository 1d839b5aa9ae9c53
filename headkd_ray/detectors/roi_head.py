"""The box head of Faster R-CNN, a single-stage RoI head: RoIAlign, convs and fully connected layers, class and box."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray.detectors import init
from headkd_ray.detectors.base import Losses, RoIHead, StageOutput
from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.ops.boxes import clip, decode, encode, exceeds
from headkd_ray.detectors.ops.fixed_size import fixed_size
from headkd_ray.detectors.ops.losses import cross_entropy_mean, l1_sum
from headkd_ray.detectors.ops.proposals import Detections, suppress
from headkd_ray.detectors.ops.roi_align import pool_rois
from headkd_ray.detectors.ops.rois import RoIs
from headkd_ray.job import RoIHeadSpec


class BoxOutputs(NamedTuple):
    """The head's outputs for R RoIs; C classes."""

    taps: list[Tensor]
    """Post-ReLU outputs (R, fc_channels) of the fully connected layers, in order, which AKD and CKD read."""
    logits: Tensor
    """Class logits (R, C + 1), background last."""
    deltas: Tensor
    """Box deltas (R, C, 4), or (R, 1, 4) if class-agnostic, in units of the spec's ``stds``."""


def deltas_of(outputs: BoxOutputs, labels: Tensor) -> Tensor:
    """Select the deltas (R, 4) of each RoI for its class in ``labels`` (R,); which ones others get is arbitrary."""
    column = labels.clamp(0, outputs.deltas.shape[1] - 1)
    return outputs.deltas.gather(1, column[:, None, None].expand(-1, 1, 4)).squeeze(1)


class BoxHead(RoIHead):
    """A box head over four pyramid levels with the given ``strides`` in pixels.

    Initial weights are Xavier in the fully connected layers, N(0, .01) for classes and N(0, .001) for boxes.
    """

    spec: RoIHeadSpec

    def __init__(self, spec: RoIHeadSpec, in_channels: int, num_classes: int, strides: Sequence[int]) -> None:
        super().__init__(spec, in_channels, num_classes, strides)
        self.convs = nn.Sequential(*self._convs(in_channels))
        width = (spec.conv_channels if spec.convs else in_channels) * spec.pool**2
        widths = [width] + [spec.fc_channels] * spec.fcs
        self.fcs = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.cls_out = nn.Linear(widths[-1], num_classes + 1)
        self.box_out = nn.Linear(widths[-1], 4 if spec.class_agnostic else 4 * num_classes)
        for module in self.fcs.modules():
            if isinstance(module, nn.Linear):
                init.xavier(module)
        init.normal(self.cls_out, std=0.01)
        init.normal(self.box_out, std=0.001)

    def _convs(self, in_channels: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for i in range(self.spec.convs):
            channels = in_channels if i == 0 else self.spec.conv_channels
            conv = nn.Conv2d(channels, self.spec.conv_channels, 3, padding=1, bias=not self.spec.conv_norm)
            init.kaiming(conv)
            norm = [nn.BatchNorm2d(self.spec.conv_channels)] if self.spec.conv_norm else []
            layers += [conv, *norm, nn.ReLU(inplace=True)]
        return layers

    def forward(self, features: Sequence[Tensor], rois: Tensor, image: Tensor) -> BoxOutputs:
        """Run the head on ``rois`` (R, 4) of images ``image`` (R,).

        ``features`` are pyramid levels (B, in_channels, H, W), finest first, of which the first ``len(strides)`` are pooled.
        """
        pooled = pool_rois(features[: len(self.strides)], self.strides, rois, image, self.spec)
        hidden, taps = self.convs(pooled).flatten(1), []
        for fc in self.fcs:
            hidden = fc(hidden).relu()
            taps.append(hidden)
        return BoxOutputs(taps, self.cls_out(hidden), self.box_out(hidden).unflatten(1, (-1, 4)))

    @property
    def fc_widths(self) -> list[int]:
        """Width of each fully connected layer, in order."""
        return [self.spec.fc_channels] * self.spec.fcs

    @property
    def stages(self) -> tuple[BoxHead]:  # type: ignore[override]
        """This head, the only stage."""
        return (self,)

    def stage_outputs(
        self, features: Sequence[Tensor], rois: RoIs, truth: GroundTruth, generator: torch.Generator | None = None
    ) -> list[StageOutput]:
        if not (self.spec.conv_norm and self.training and fixed_size(rois.labels)):
            return [StageOutput(rois, self(features, rois.boxes, rois.image))]
        # Padding must not enter BatchNorm's statistics; to leave it out, the host has to wait.
        real = (rois.labels >= 0).nonzero().squeeze(1)
        outputs = self(features, rois.boxes[real], rois.image[real])

        def padded(rows: Tensor) -> Tensor:
            return rows.new_zeros(len(rois.labels), *rows.shape[1:]).index_copy(0, real, rows)

        taps = [padded(tap) for tap in outputs.taps]
        return [StageOutput(rois, BoxOutputs(taps, padded(outputs.logits), padded(outputs.deltas)))]

    def losses(self, outputs: Sequence[StageOutput]) -> Losses:
        """Compute ``cls``, the cross entropy averaged over all RoIs, and ``box``, the (smooth) L1 loss divided by their number.

        The latter counts positives alone, with the deltas of their own class. RoIs of weight 0 do not count.
        """
        ((rois, said),) = outputs
        positive = (rois.labels >= 0) & (rois.labels < self.num_classes)
        # A RoI that a cascade moved off its image has no area, so it cannot be encoded; it is background.
        wanted = encode(rois.targets, rois.boxes, self.spec.stds).where(positive.unsqueeze(1), 0.0)
        box = l1_sum(deltas_of(said, rois.labels), wanted, rois.weights * positive, self.spec.box_beta)
        cls = cross_entropy_mean(said.logits, rois.labels, rois.weights, self.class_weights)
        return {"cls": cls, "box": box / (rois.weights > 0).sum().clamp(min=1)}

    def final(self, features: Sequence[Tensor], boxes: Tensor, image: Tensor, sizes: Tensor) -> tuple[BoxOutputs, Tensor]:
        return self(features, boxes, image), boxes

    @torch.no_grad()
    def conclude(self, outputs: BoxOutputs, rois: Tensor, image: Tensor, sizes: Tensor) -> Detections:
        """Turn ``outputs`` for ``rois`` into detections; ``image`` (R,) is the image of each RoI."""
        rules = self.spec.postprocess
        scores = outputs.logits.float().softmax(-1)[:, :-1]
        row, label = (scores > rules.score).nonzero(as_tuple=True)
        column = label if outputs.deltas.shape[1] > 1 else torch.zeros_like(label)
        boxes = decode(outputs.deltas[row, column].float(), rois[row], self.spec.stds, self.spec.clamp_shrink)
        boxes = clip(boxes.unsqueeze(1), sizes[image[row]]).squeeze(1)
        kept = exceeds(boxes, rules.min_size)
        return suppress(
            boxes[kept],
            scores[row, label][kept],
            label[kept],
            image[row][kept],
            batch=len(sizes),
            num_classes=self.num_classes,
            iou=rules.nms_iou,
            limit=rules.max_detections,
        )
