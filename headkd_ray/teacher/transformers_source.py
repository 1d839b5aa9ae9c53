"""A DETR of the package transformers as a teacher: its RoIs are the boxes of its queries, its features their hidden states.

The RoIs of a view are ground-truth boxes, each with the hidden states of the query whose box overlaps it most, and the boxes of
the queries that the teacher is surest of. A ground-truth box that no query's box overlaps enough is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert
from typing_extensions import Self

from headkd_ray.data.batch import Batch
from headkd_ray.detectors import GroundTruth
from headkd_ray.detectors.hf_models import DecoderAnswer, HFModel, decoder_states
from headkd_ray.detectors.ops.boxes import clip, pairwise_iou
from headkd_ray.job import RoIHeadSpec
from headkd_ray.soft_targets import SoftTargets
from headkd_ray.teacher.source import QueryFeatures, TeacherSource


class _Chosen(NamedTuple):
    """The RoIs of N views and what the teacher says of them; padding is at the end of each view."""

    targets: SoftTargets
    logits: Tensor
    """float32 (N, K, C'): the model's own class logits, of all its outputs."""


class TransformersSource(TeacherSource):
    """Computes soft targets with a frozen detector of transformers, which gets each view as its own processor prepares it.

    Each view is processed without the padding that its batch adds; views that are equally large then share a forward pass.
    """

    signed = True

    def __init__(
        self,
        model: HFModel,
        names: Sequence[str],
        classes: Sequence[str],
        budget: int,
        layers: Sequence[int],
        truth_iou: float = 0.5,
        precision: str = "fp32",
    ) -> None:
        """
        Args:
            names: class names of the model's outputs.
            classes: class names of the data. Logits of outputs that it does not have are not given.
            budget: number of RoIs per view, of which ground-truth boxes take at most half.
            layers: the decoder layers whose hidden states are features, 1 = the first.
            truth_iou: IoU of a ground-truth box with the box of the query that answers for it.
        """
        self.model = model
        self.budget, self.truth_iou, self.precision = budget, truth_iou, precision
        self.chosen_layers = [layer - 1 for layer in layers]
        self.layers, self.width = len(layers), model.width
        self.num_classes = len(classes)
        places = {name: place for place, name in enumerate(classes)}
        known = [(output, places[name]) for output, name in enumerate(names) if name in places]
        if model.softmax:
            known.append((model.num_classes, self.num_classes))
        self.outputs, self.labels = torch.tensor(known).unbind(1)
        self.num_logits = len(known)

    @property
    def device(self) -> torch.device:
        return next(self.model.module.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        self.model.module.to(device)
        self.outputs, self.labels = self.outputs.to(device), self.labels.to(device)
        return self

    @property
    def detection_head(self) -> QueryFeatures:
        return QueryFeatures(RoIHeadSpec(fcs=self.layers), [self.width] * self.layers)

    def recipe(self, logits: bool) -> dict[str, Any]:
        own = {
            "teacher.checkpoint (weights)": self.model.fingerprint,
            "teacher.layers": [layer + 1 for layer in self.chosen_layers],
            "teacher.truth_iou": self.truth_iou,
        }
        named = {"teacher.classes": [self.outputs.tolist(), self.labels.tolist()]} if logits else {}
        return {**own, **named}

    def __call__(self, batch: Batch) -> SoftTargets:
        return self._answer(batch).targets

    def with_logits(self, batch: Batch, count: int) -> tuple[SoftTargets, Tensor, Tensor]:
        targets, logits = self._answer(batch)
        return (targets, *self._top(logits, count))

    @torch.no_grad()
    def answers_at(self, batch: Batch, boxes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TeacherSource.answers_at`; each box is answered by the query whose box overlaps it most."""
        answer = self._run(batch)
        query = pairwise_iou(boxes, self._boxes(answer.boxes, batch.sizes)[0]).argmax(1)
        return (answer.states[self.chosen_layers][:, 0, query], *self._top(answer.logits[0, query], count))

    @torch.no_grad()
    def _answer(self, batch: Batch) -> _Chosen:
        targets = self.nothing(len(batch.sizes))
        outputs = self.model.num_classes + self.model.softmax
        logits = torch.zeros(len(batch.sizes), self.budget, outputs, device=self.device)
        if batch.idle:
            return _Chosen(targets, logits)
        chosen = self._choose(self._run(batch), GroundTruth.of(batch.boxes, batch.labels, batch.sizes))
        count = chosen.logits.shape[1]
        logits[:, :count] = chosen.logits
        targets.taps[:, :, :count] = chosen.targets.taps
        for whole, part in zip(targets[:3], chosen.targets[:3], strict=True):
            whole[:, :count] = part
        return _Chosen(targets, logits)

    def _run(self, batch: Batch) -> DecoderAnswer:
        """Run the model on the views of ``batch``, each as its processor prepares it, and return its answer in their order."""
        views = [image[:, :h, :w] for image, (h, w) in zip(batch.images, batch.sizes.tolist(), strict=True)]
        made = [self.model.inputs([view], self.device) for view in views]
        alike: dict[tuple[int, ...], list[int]] = {}
        for row, inputs in enumerate(made):
            alike.setdefault(tuple(inputs["pixel_values"].shape), []).append(row)
        answers = []
        for rows in alike.values():
            inputs = {name: torch.cat([made[row][name] for row in rows]) for name in made[rows[0]]}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                answers.append(decoder_states(self.model.module, **inputs))
        order = torch.tensor([row for rows in alike.values() for row in rows], device=self.device).argsort()
        states, boxes, logits = zip(*answers, strict=True)
        return DecoderAnswer(torch.cat(states, dim=1)[:, order], torch.cat(boxes)[order], torch.cat(logits)[order])

    def _boxes(self, shares: Tensor, sizes: Tensor) -> Tensor:
        """Turn boxes (N, Q, 4) of a DecoderAnswer into x1 y1 x2 y2 in pixels of views of ``sizes`` (N, 2), within the view."""
        extent = sizes.flip(1).repeat(1, 2).unsqueeze(1).to(shares.dtype)
        return clip(box_convert(shares, "cxcywh", "xyxy") * extent, sizes)

    def _choose(self, answer: DecoderAnswer, truth: GroundTruth) -> _Chosen:
        """Choose the RoIs of N views: ground-truth boxes by index, then queries by index."""
        boxes = self._boxes(answer.boxes, truth.sizes)
        overlap, nearest = pairwise_iou(truth.boxes, boxes).max(2)
        answered = truth.present & (overlap >= self.truth_iou)
        answered &= answered.cumsum(1) <= (self.budget + 1) // 2
        usable = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        sureness = self.model.probabilities(answer.logits).amax(-1).masked_fill(~usable, -1)
        rank = sureness.argsort(dim=1, descending=True, stable=True).argsort(1)
        surest = usable & (rank < self.budget - answered.sum(1, keepdim=True))

        taken = torch.cat([answered, surest], dim=1)
        place = torch.arange(taken.shape[1], device=taken.device).masked_fill(~taken, taken.shape[1])
        place = place.sort(1).values[:, : self.budget]
        valid = place < taken.shape[1]
        place = place.masked_fill(~valid, 0)
        views = torch.arange(len(place), device=place.device).unsqueeze(1)
        query = torch.cat([nearest, torch.arange(boxes.shape[1], device=place.device).expand(len(place), -1)], dim=1)
        query = query[views, place]
        rows = valid.unsqueeze(-1)
        targets = SoftTargets(
            boxes=torch.cat([truth.boxes, boxes], dim=1)[views, place] * rows,
            truth=(place < truth.labels.shape[1]) & valid,
            valid=valid,
            taps=(answer.states[self.chosen_layers][:, views, query] * rows).transpose(0, 1),
        )
        return _Chosen(targets, answer.logits[views, query] * rows)

    def _top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the ``count`` = M greatest of ``logits`` (..., C') for classes of the data, and those classes, (..., M)."""
        found, place = logits[..., self.outputs].topk(count)
        return found, self.labels[place]
