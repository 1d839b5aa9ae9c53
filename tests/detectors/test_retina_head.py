import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from headkd_ray.detectors import GroundTruth, RetinaNet, build_detector
from headkd_ray.detectors.ops.anchors import padded_extents
from headkd_ray.detectors.ops.boxes import decode, encode
from headkd_ray.detectors.ops.matching import match
from headkd_ray.detectors.retinanet import RetinaHead, RetinaOutputs
from headkd_ray.golden.conventions import AnchorsWithin
from headkd_ray.job import RetinaHeadSpec
from tests.detectors.micro import batch, liven, retinanet_spec, truth_of

CLASSES = 3
SHAPES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
SIZES = torch.tensor([[64, 96], [50, 60]])


def head(**keys: Any) -> RetinaHead:
    torch.manual_seed(0)
    spec = RetinaHeadSpec.model_validate({"convs": 1, "channels": 8, **keys})
    module = RetinaHead(spec, 8, CLASSES)
    liven(module)
    return module


def pyramid() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 8, h, w) for h, w in SHAPES]


def by_cell(outputs: RetinaOutputs) -> list[dict[str, Any]]:
    """Read each image's anchors straight from the maps, cell by cell: logits (C,), deltas (4,), (level, y, x, anchor)."""
    images = []
    for image in range(2):
        rows = []
        for level, (height, width) in enumerate(SHAPES):
            logits = outputs.logits[level][image].reshape(9, CLASSES, height, width)
            deltas = outputs.deltas[level][image].reshape(9, 4, height, width)
            for y in range(height):
                for x in range(width):
                    for a in range(9):
                        rows.append((logits[a, :, y, x], deltas[a, :, y, x], (level, y, x, a)))
        logits, deltas, cells = zip(*rows, strict=True)
        images.append({"logits": torch.stack(logits), "deltas": torch.stack(deltas), "cells": cells})
    return images


def test_proposals_are_the_papers_recipe_done_by_hand() -> None:
    module = head(proposals={"pre_nms": 40, "post_nms": 60, "nms_iou": 0.7})
    with torch.no_grad():
        outputs = module(pyramid())
    proposals = module.proposals(outputs, SIZES)
    anchors = module.anchors.grid(outputs.logits).boxes
    for image, table in enumerate(by_cell(outputs)):
        score = table["logits"].max(1).values.sigmoid()
        height, width = SIZES[image].tolist()
        kept: list[tuple[float, tuple[int, ...], list[float]]] = []
        first = 0
        for level, (h, w) in enumerate(SHAPES):
            own = torch.arange(first, first + h * w * 9)
            first += h * w * 9
            own = own[score[own].argsort(descending=True)[:40]]
            boxes = decode(table["deltas"][own], anchors[own])
            boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
            boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
            real = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            own, boxes = own[real], boxes[real]
            for i in nms(boxes, score[own], 0.7).tolist():
                kept.append((float(score[own[i]]), table["cells"][int(own[i])], boxes[i].tolist()))
            assert all(cell[0] == level for _, cell, _ in kept[-1:])
        kept = sorted(kept, key=lambda row: -row[0])[:60]
        valid = proposals.valid[image]
        assert [tuple(c) for c in proposals.cells[image][valid].tolist()] == [cell for _, cell, _ in kept]
        torch.testing.assert_close(proposals.boxes[image][valid], torch.tensor([box for _, _, box in kept]))
        torch.testing.assert_close(proposals.scores[image][valid], torch.tensor([s for s, _, _ in kept]))
    assert not proposals.boxes.requires_grad


def test_losses_are_the_papers_formulas_in_float64() -> None:
    module = head()
    outputs = module(pyramid())
    boxes = torch.tensor([[[4.0, 4, 40, 36], [50, 10, 90, 60]], [[8, 8, 30, 44], [0, 0, 0, 0]]])
    labels = torch.tensor([[0, 2], [1, -1]])
    losses = module.losses(outputs, GroundTruth.of(boxes, labels, SIZES))
    anchors = module.anchors.grid(outputs.logits)
    limits = padded_extents(SIZES).tolist()
    strides = [8, 16, 32, 64, 128]
    cls, box, normaliser = 0.0, 0.0, 0
    for image, table in enumerate(by_cell(RetinaOutputs(*([m.detach() for m in maps] for maps in outputs[:2]), []))):
        valid = torch.tensor(
            [
                y * strides[level] < limits[image][0] and x * strides[level] < limits[image][1]
                for level, y, x, _ in table["cells"]
            ]
        )
        truth = GroundTruth.of(boxes[image : image + 1], labels[image : image + 1], SIZES[image : image + 1])
        matched = match(anchors.boxes, truth, 0.5, 0.4, 0.0, valid[None])[0]
        positives = 0
        for row, target in enumerate(matched.tolist()):
            if not valid[row] or target == -2:
                continue
            for c in range(CLASSES):
                p = 1 / (1 + math.exp(-float(table["logits"][row, c])))
                hit = target >= 0 and int(labels[image, target]) == c
                cls += -0.25 * (1 - p) ** 2 * math.log(p) if hit else -0.75 * p**2 * math.log(1 - p)
            if target >= 0:
                positives += 1
                wanted = encode(boxes[image, target].double(), anchors.boxes[row].double())
                box += float((table["deltas"][row].double() - wanted).abs().sum())
        normaliser += max(1, positives)
        assert not valid.all() or image == 0
    assert float(losses["loss_cls"].detach()) == pytest.approx(cls / normaliser, rel=1e-5)
    assert float(losses["loss_box"].detach()) == pytest.approx(box / normaliser, rel=1e-5)


def test_anchors_beyond_an_images_own_padding_cost_nothing() -> None:
    module, features = head(), pyramid()
    outputs = RetinaOutputs(*([m.detach().requires_grad_() for m in maps] for maps in module(features)[:2]), [])
    none = GroundTruth.of(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), SIZES)
    module.losses(outputs, none)["loss_cls"].backward()
    gradient = outputs.logits[0].grad
    assert gradient is not None
    # Image 1 is 50 x 60, padded by itself to 64 x 64: eight columns of P3, in a batch that has twelve.
    assert (gradient[1, :, :, 8:] == 0).all()
    assert (gradient[1, :, :, :8] != 0).all()
    assert (gradient[0] != 0).all()
    own = module.losses(outputs, none)["loss_cls"]
    module.anchors = AnchorsWithin(module.anchors, extents=torch.tensor([[64, 96]] * 2))
    assert module.losses(outputs, none)["loss_cls"] > own


def test_detections_are_the_best_pairs_after_nms_per_class() -> None:
    module = head(postprocess={"pre_nms": 30, "score": 0.3, "nms_iou": 0.5, "max_detections": 25})
    with torch.no_grad():
        outputs = module(pyramid())
    found = module.detect(outputs, SIZES)
    anchors = module.anchors.grid(outputs.logits).boxes
    for image, table in enumerate(by_cell(outputs)):
        height, width = SIZES[image].tolist()
        rows: list[tuple[float, int, list[float]]] = []
        first = 0
        for h, w in SHAPES:
            own = range(first, first + h * w * 9)
            first += h * w * 9
            pairs = [(float(table["logits"][n, c].sigmoid()), n, c) for n in own for c in range(CLASSES)]
            for score, n, c in sorted(pairs, reverse=True)[:30]:
                if score > 0.3:
                    box = decode(table["deltas"][n], anchors[n])
                    box = torch.stack(
                        [box[0].clamp(0, width), box[1].clamp(0, height), box[2].clamp(0, width), box[3].clamp(0, height)]
                    )
                    rows.append((score, c, box.tolist()))
        kept = []
        for c in range(CLASSES):
            own_rows = [row for row in rows if row[1] == c]
            boxes, scores = torch.tensor([r[2] for r in own_rows]), torch.tensor([r[0] for r in own_rows])
            kept += [own_rows[i] for i in nms(boxes, scores, 0.5).tolist()]
        kept = sorted(kept, key=lambda row: -row[0])[:25]
        real = found.labels[image] >= 0
        assert found.labels[image][real].tolist() == [c for _, c, _ in kept]
        torch.testing.assert_close(found.scores[image][real], torch.tensor([s for s, _, _ in kept]))
        torch.testing.assert_close(found.boxes[image][real], torch.tensor([b for _, _, b in kept]))


def test_the_tap_is_the_last_classification_conv_after_its_relu() -> None:
    module, features = head(convs=3), pyramid()
    outputs = module(features)
    for level, tap in enumerate(outputs.taps[0]):
        assert (tap >= 0).all()
        torch.testing.assert_close(module.cls_out(tap), outputs.logits[level])


def test_prior_and_initial_spread() -> None:
    torch.manual_seed(0)
    module = RetinaHead(RetinaHeadSpec(channels=64), 64, 20)
    assert module.cls_out.bias is not None
    torch.testing.assert_close(module.cls_out.bias.sigmoid(), torch.full_like(module.cls_out.bias, 0.01))
    assert float(module.cls_out.weight.std().detach()) == pytest.approx(0.01, rel=0.05)


def test_losses_stay_float32_under_autocast() -> None:
    net = build_detector(retinanet_spec(), CLASSES)
    assert isinstance(net, RetinaNet)
    data = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = net.features(net.normalise(data["images"], data["sizes"]))
        outputs = net.head(features)
        losses = net.head.losses(outputs, truth_of(data))
        proposals = net.head.proposals(outputs, data["sizes"])
        found = net.head.detect(outputs, data["sizes"])
    assert outputs.logits[0].dtype == torch.bfloat16
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert proposals.boxes.dtype == proposals.scores.dtype == found.boxes.dtype == torch.float32
    sum(losses.values()).backward()  # type: ignore[union-attr]
