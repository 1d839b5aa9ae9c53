"""A Faster R-CNN that chooses its own RoIs, from its own proposals.

The RoIs of a view are a sample of its ground-truth boxes and of the teacher's own proposals. A hash of (seed, image, view,
candidate) draws it, and each view is processed without the padding that its batch adds, so neither the batch nor the machine
matters but for rounding errors. A proposal is identified by the anchor that it came from, not by its rank: where a rounding
error lets one proposal in or out, all ranks below it would shift and another sample would be drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from headkd_ray.data.batch import Batch
from headkd_ray.data.rng import key_bits
from headkd_ray.detectors import GroundTruth, RoIHead, TwoStageDetector
from headkd_ray.detectors.ops.rois import Candidates, candidates
from headkd_ray.detectors.ops.sampling import sample
from headkd_ray.job import SamplerSpec
from headkd_ray.soft_targets import SoftTargets
from headkd_ray.teacher.cache_recipe import weights_digest
from headkd_ray.teacher.source import TeacherSource


class SoftTeacher(TeacherSource):
    """Computes soft targets with a frozen two-stage detector whose RoI head has one stage."""

    signed = False

    def __init__(self, detector: TwoStageDetector, budget: int, seed: int, pad: int, precision: str = "fp32") -> None:
        """``budget`` is the number of RoIs per view; each view is padded on its own to a multiple of ``pad`` pixels."""
        self.detector = detector.eval().requires_grad_(False)
        self.seed = seed
        self.pad = pad
        self.precision = precision
        (self.head,) = detector.roi.stages
        roi = self.head.spec
        self.sampler = SamplerSpec(size=budget, positive_fraction=roi.sampler.positive_fraction)
        self.budget, self.layers, self.width = budget, roi.fcs, roi.fc_channels
        self.num_classes, self.num_logits = detector.num_classes, detector.num_classes + 1

    @property
    def device(self) -> torch.device:
        """The device that the teacher is on."""
        return next(self.detector.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        self.detector.to(device).to(memory_format=torch.channels_last)
        return self

    @property
    def detection_head(self) -> RoIHead:
        return self.detector.roi

    def recipe(self, logits: bool) -> dict[str, Any]:
        return {"teacher.checkpoint (weights)": weights_digest(self.detector, classes=logits)}

    def with_logits(self, batch: Batch, count: int) -> tuple[SoftTargets, Tensor, Tensor]:
        targets = self(batch)
        return (targets, *self.top_logits(targets.taps, count))

    def answers_at(self, batch: Batch, boxes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        taps = self.taps_at(batch, boxes)
        logits, classes = self.top_logits(taps.unsqueeze(0), count)
        return taps, logits[0], classes[0]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> SoftTargets:
        targets = self.nothing(len(batch.sizes))
        if batch.idle:
            return targets
        # Views of one padded size share a forward pass.
        extents = (batch.sizes + self.pad - 1) // self.pad * self.pad
        for height, width in extents.unique(dim=0).tolist():
            rows = (extents == extents.new_tensor([height, width])).all(1).nonzero().squeeze(1)
            group = self._look(batch, rows, height, width)
            for whole, part in zip(targets, group, strict=True):
                whole[rows] = part
        return targets

    @torch.no_grad()
    def taps_at(self, batch: Batch, boxes: Tensor) -> Tensor:
        """Compute the features (L, k, D) at ``boxes`` (k, 4) in a ``batch`` of one view."""
        height, width = ((batch.sizes[0] + self.pad - 1) // self.pad * self.pad).tolist()
        x = self.detector.normalise(batch.images[:, :, :height, :width], batch.sizes)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            image = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
            taps = self.head(self.detector.features(x), boxes, image).taps
        return torch.stack([tap.float() for tap in taps])

    @torch.no_grad()
    def top_logits(self, taps: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Compute the ``count`` = M greatest class logits for ``taps`` (B, L, K, D) of :class:`SoftTargets`, greatest first.

        Returns them and their classes, both (B, K, M); the greatest class number is background.
        """
        return self.head.cls_out(taps[:, -1]).topk(count)

    def _look(self, batch: Batch, rows: Tensor, height: int, width: int) -> SoftTargets:
        """Compute the targets of the views at ``rows`` (N,), which fit a canvas of ``height`` x ``width`` pixels."""
        sizes = batch.sizes[rows]
        truth = GroundTruth.of(batch.boxes[rows], batch.labels[rows], sizes)
        x = self.detector.normalise(batch.images[rows, :, :height, :width], sizes)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            features = self.detector.features(x)
            proposals = self.detector.rpn.proposals(self.detector.rpn(features), sizes)
            pool = candidates(proposals, truth, self.head.spec.positive_iou)
            tickets = self._tickets(batch, rows, pool)
            positive = pool.matched >= 0
            chosen = sample(positive & pool.valid, ~positive & pool.valid, self.sampler, ticket=tickets)
            places = chosen.picked.unsqueeze(-1)
            boxes = pool.boxes.gather(1, places.expand(-1, -1, 4)) * chosen.valid.unsqueeze(-1)
            image, place = chosen.valid.nonzero(as_tuple=True)
            taps = self.head(features, boxes[image, place], image).taps
        targets, count = self.nothing(len(rows)), chosen.picked.shape[1]
        targets.boxes[:, :count] = boxes
        targets.truth[:, :count] = (chosen.picked < truth.labels.shape[1]) & chosen.valid
        targets.valid[:, :count] = chosen.valid
        for layer, tap in enumerate(taps):
            targets.taps[image, layer, place] = tap.float()
        return targets

    def _tickets(self, batch: Batch, rows: Tensor, pool: Candidates) -> Tensor:
        """Return numbers (N, G + P) in [0, 1), each a hash of (seed, image, view, candidate)."""
        views = zip(batch.image_ids[rows].tolist(), batch.views[rows].tolist(), strict=True)
        keys = [key_bits("rois", self.seed, image, view) & 0xFFFFFFFF for image, view in views]
        bits = torch.tensor(keys, device=self.device).unsqueeze(1)
        for part in pool.cells.unbind(-1):
            bits = hashed_bits(bits ^ (part & 0xFFFFFFFF))
        return bits.double() / (1 << 32)


def hashed_bits(bits: Tensor) -> Tensor:
    """Hash 32 ``bits`` held in int64 to 32 bits; products stay below 2^63, so all devices compute the same."""
    for multiplier in (0x7FEB352D, 0x2C1B3C6D):
        bits = bits ^ (bits >> 16)
        bits = (bits * multiplier) & 0xFFFFFFFF
    return bits ^ (bits >> 15)
