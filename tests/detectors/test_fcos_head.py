import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import nms

from headkd_ray.detectors import FCOS, GroundTruth, build_detector
from headkd_ray.detectors.dense import STRIDES
from headkd_ray.detectors.fcos import FCOSHead, FCOSOutputs
from headkd_ray.detectors.ops.matching import match_points
from headkd_ray.job import FCOSHeadSpec
from tests.detectors.micro import batch, fcos_spec, liven, truth_of

CLASSES = 3
SHAPES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
SIZES = torch.tensor([[64, 96], [50, 60]])
BOXES = torch.tensor(
    [
        [[4.0, 4, 40, 36], [50, 10, 90, 60], [6, 8, 34, 30], [0, 0, 96, 64]],
        [[8, 8, 30, 44], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
)
LABELS = torch.tensor([[0, 2, 1, 1], [1, -1, -1, -1]])
TRUTH = GroundTruth.of(BOXES, LABELS, SIZES)
RANGES = (16.0, 32.0, 64.0, 128.0)
"""Regression ranges narrower than the paper's, so that the boxes above spread over several levels."""

Cell = tuple[int, int, int]


def head(**keys: Any) -> FCOSHead:
    torch.manual_seed(0)
    spec = FCOSHeadSpec.model_validate({"convs": 2, "channels": 8, "norm_groups": 2, "regress_ranges": RANGES, **keys})
    module = FCOSHead(spec, 8, CLASSES)
    liven(module)
    with torch.no_grad():
        for level, scale in enumerate(module.scales):
            scale.fill_(0.5 + 0.2 * level)
        module.box_out.bias.fill_(1.0)  # type: ignore[union-attr]
    return module


def pyramid() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 8, h, w) for h, w in SHAPES]


def cells() -> list[Cell]:
    """Return (level, y, x) in the order of the head's tables."""
    return [(level, y, x) for level, (h, w) in enumerate(SHAPES) for y in range(h) for x in range(w)]


def box_at(outputs: FCOSOutputs, image: int, cell: Cell) -> list[float]:
    """Return the box of a cell in pixels, read straight from the map."""
    level, y, x = cell
    stride = STRIDES[level]
    left, top, right, bottom = (float(d) * stride for d in outputs.distances[level][image, :, y, x].detach().double())
    px, py = (x + 0.5) * stride, (y + 0.5) * stride
    return [px - left, py - top, px + right, py + bottom]


def wanted_match(image: int, cell: Cell, radius: float | None) -> int:
    """Apply mmdet's rule for one point, box by box."""
    level, y, x = cell
    stride = STRIDES[level]
    px, py = (x + 0.5) * stride, (y + 0.5) * stride
    low, high = (0.0, *RANGES)[level], (*RANGES, math.inf)[level]
    best, smallest = -1, math.inf
    for index, (x1, y1, x2, y2) in enumerate(BOXES[image].tolist()):
        if LABELS[image, index] < 0:
            continue
        cx, cy, reach = (x1 + x2) / 2, (y1 + y2) / 2, math.inf if radius is None else radius * stride
        sides = (
            px - max(cx - reach, x1),
            py - max(cy - reach, y1),
            min(cx + reach, x2) - px,
            min(cy + reach, y2) - py,
        )
        if min(sides) <= 0 or not low <= max(px - x1, py - y1, x2 - px, y2 - py) <= high:
            continue
        if (x2 - x1) * (y2 - y1) < smallest:
            best, smallest = index, (x2 - x1) * (y2 - y1)
    return best


def box_price(kind: str, a: list[float], b: list[float]) -> float:
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return 1 - overlap / union + (hull - union) / hull if kind == "giou" else -math.log(max(overlap / union, 1e-6))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("radius", [1.5, 0.8, None])
def test_points_are_assigned_as_mmdet_does(radius: float | None) -> None:
    module = head(center_radius=radius)
    outputs = module(pyramid())
    grid = module.anchors.grid(outputs.logits)
    centre = (grid.boxes[:, :2] + grid.boxes[:, 2:]) / 2
    assert centre.tolist() == [[(x + 0.5) * STRIDES[level], (y + 0.5) * STRIDES[level]] for level, y, x in cells()]
    matched = match_points(grid.boxes, TRUTH, *module._ranges(grid), radius)
    wanted = [[wanted_match(image, cell, radius) for cell in cells()] for image in range(2)]
    assert matched.tolist() == wanted
    levels = {cell[0] for image in range(2) for cell, target in zip(cells(), wanted[image], strict=True) if target >= 0}
    assert len(levels) >= 3
    assert {0, 1, 2} <= set(wanted[0])


@pytest.mark.parametrize(("norm_on_bbox", "kind"), [(True, "giou"), (False, "giou"), (False, "iou")])
def test_losses_are_mmdets_formulas_in_float64(norm_on_bbox: bool, kind: str) -> None:
    module = head(norm_on_bbox=norm_on_bbox, box_loss=kind)
    outputs = module(pyramid())
    losses = module.losses(outputs, TRUTH)
    cls, box, centerness, weight, positives = 0.0, 0.0, 0.0, 0.0, 0
    for image in range(2):
        for cell in cells():
            level, y, x = cell
            target = wanted_match(image, cell, 1.5)
            for c, logit in enumerate(outputs.logits[level][image, :, y, x].tolist()):
                p = sigmoid(logit)
                hit = target >= 0 and int(LABELS[image, target]) == c
                cls += -0.25 * (1 - p) ** 2 * math.log(p) if hit else -0.75 * p**2 * math.log(1 - p)
            if target < 0:
                continue
            positives += 1
            x1, y1, x2, y2 = BOXES[image, target].tolist()
            px, py = (x + 0.5) * STRIDES[level], (y + 0.5) * STRIDES[level]
            across, down = sorted([px - x1, x2 - px]), sorted([py - y1, y2 - py])
            quality = math.sqrt(across[0] / across[1] * down[0] / down[1])
            weight += quality
            box += quality * box_price(kind, box_at(outputs, image, cell), [x1, y1, x2, y2])
            q = sigmoid(float(outputs.centerness[level][image, 0, y, x].detach()))
            centerness -= quality * math.log(q) + (1 - quality) * math.log(1 - q)
    assert positives > 10
    assert float(losses["loss_cls"].detach()) == pytest.approx(cls / positives, rel=1e-5)
    assert float(losses["loss_box"].detach()) == pytest.approx(box / weight, rel=1e-5)
    assert float(losses["loss_centerness"].detach()) == pytest.approx(centerness / positives, rel=1e-5)


def test_gradients_of_the_box_loss_are_those_of_float64() -> None:
    module = head()
    outputs = module(pyramid())
    levels = [d.detach().requires_grad_() for d in outputs.distances]
    module.losses(outputs._replace(distances=levels), TRUTH)["loss_box"].backward()
    precise = [d.detach().double().requires_grad_() for d in levels]
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for image in range(2):
        for cell in cells():
            level, y, x = cell
            target = wanted_match(image, cell, 1.5)
            if target < 0:
                continue
            stride = STRIDES[level]
            point = torch.tensor([x + 0.5, y + 0.5], dtype=torch.float64)
            goal = BOXES[image, target].double() / stride
            low, high = point - goal[:2], goal[2:] - point
            near, far = torch.minimum(low, high), torch.maximum(low, high)
            quality = float((near / far).prod().sqrt())
            left, right = precise[level][image, :2, y, x], precise[level][image, 2:, y, x]
            inner = (torch.minimum(left, low) + torch.minimum(right, high)).prod()
            hull = (torch.maximum(left, low) + torch.maximum(right, high)).prod()
            union = (left + right).prod() + (goal[2:] - goal[:2]).prod() - inner
            total = total + quality * (1 - inner / union + (hull - union) / hull)
            weight += quality
    (total / weight).backward()
    for mine, wanted in zip(levels, precise, strict=True):
        assert mine.grad is not None
        reference = torch.zeros_like(wanted) if wanted.grad is None else wanted.grad
        # At a distance of exactly 0, ReLU's input decides; elsewhere the two agree.
        inside = (wanted > 0).to(torch.float64)
        torch.testing.assert_close(mine.grad.double() * inside, reference * inside, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("norm_on_bbox", [True, False])
@pytest.mark.parametrize("truths", [0, 2])
def test_a_batch_without_any_object_trains_the_classes_alone(norm_on_bbox: bool, truths: int) -> None:
    module = head(norm_on_bbox=norm_on_bbox)
    none = GroundTruth.of(torch.zeros(2, truths, 4), torch.full((2, truths), -1), SIZES)
    losses = module.losses(module(pyramid()), none)
    assert losses["loss_cls"] > 0
    assert losses["loss_box"] == losses["loss_centerness"] == 0
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any() == name.startswith(("cls_tower.", "cls_out.")), name


def test_boxes_are_scaled_per_level_and_by_the_stride() -> None:
    features = pyramid()
    normed, plain = head(norm_on_bbox=True), head(norm_on_bbox=False)
    plain.load_state_dict(normed.state_dict())
    raw = [normed.box_out(normed.box_tower(f)) * scale for f, scale in zip(features, normed.scales, strict=True)]
    for level, stride in enumerate(STRIDES):
        torch.testing.assert_close(normed(features).distances[level] * stride, raw[level].relu() * stride)
        torch.testing.assert_close(plain(features).distances[level] * stride, raw[level].exp())


@pytest.mark.parametrize(("groups", "kinds"), [(2, [nn.Conv2d, nn.GroupNorm, nn.ReLU]), (None, [nn.Conv2d, nn.ReLU])])
def test_towers_with_and_without_norm(groups: int | None, kinds: list[type]) -> None:
    module = head(norm_groups=groups)
    assert [type(layer) for layer in module.cls_tower] == kinds * 2
    assert [type(layer) for layer in module.box_tower] == kinds * 2
    assert all(layer.num_groups == groups for layer in module.modules() if isinstance(layer, nn.GroupNorm))


@pytest.mark.parametrize("on_reg", [True, False])
def test_the_tap_and_where_the_centerness_is_read(on_reg: bool) -> None:
    module, features = head(centerness_on_reg=on_reg), pyramid()
    outputs = module(features)
    for level, tap in enumerate(outputs.taps[0]):
        assert (tap >= 0).all()
        torch.testing.assert_close(module.cls_out(tap), outputs.logits[level])
        hidden = module.box_tower(features[level]) if on_reg else tap
        torch.testing.assert_close(module.centerness_out(hidden), outputs.centerness[level])


def test_proposals_are_the_papers_recipe_done_by_hand() -> None:
    module = head(proposals={"pre_nms": 40, "post_nms": 60, "nms_iou": 0.7})
    with torch.no_grad():
        outputs = module(pyramid())
    proposals = module.proposals(outputs, SIZES)
    for image in range(2):
        height, width = SIZES[image].tolist()
        kept: list[tuple[float, Cell, list[float]]] = []
        for level in range(5):
            own = [
                (sigmoid(float(outputs.logits[level][image, :, y, x].max())), (lv, y, x)) for lv, y, x in cells() if lv == level
            ]
            rows = []
            for score, cell in sorted(own, reverse=True)[:40]:
                x1, y1, x2, y2 = box_at(outputs, image, cell)
                box = [min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)]
                if box[2] > box[0] and box[3] > box[1]:
                    rows.append((score, cell, box))
            boxes, scores = torch.tensor([r[2] for r in rows]).float().reshape(-1, 4), torch.tensor([r[0] for r in rows])
            kept += [rows[i] for i in nms(boxes, scores, 0.7).tolist()]
        kept = sorted(kept, key=lambda row: -row[0])[:60]
        valid = proposals.valid[image]
        assert len(kept) > 20
        assert [tuple(c) for c in proposals.cells[image][valid].tolist()] == [(*cell, 0) for _, cell, _ in kept]
        torch.testing.assert_close(proposals.boxes[image][valid], torch.tensor([box for _, _, box in kept]).float())
        torch.testing.assert_close(proposals.scores[image][valid], torch.tensor([s for s, _, _ in kept]))
    assert not proposals.boxes.requires_grad
    deaf = outputs._replace(centerness=[m + 5 for m in outputs.centerness])
    assert all(torch.equal(a, b) for a, b in zip(proposals, module.proposals(deaf, SIZES), strict=True))


@pytest.mark.parametrize("score", ["product", "sqrt"])
def test_detections_are_the_best_pairs_after_nms_per_class(score: str) -> None:
    module = head(score=score, postprocess={"pre_nms": 30, "score": 0.4, "nms_iou": 0.5, "max_detections": 25})
    with torch.no_grad():
        outputs = module(pyramid())
    found = module.detect(outputs, SIZES)
    for image in range(2):
        height, width = SIZES[image].tolist()
        rows: list[tuple[float, int, list[float]]] = []
        for level in range(5):
            pairs = []
            for lv, y, x in cells():
                if lv != level:
                    continue
                q = sigmoid(float(outputs.centerness[level][image, 0, y, x]))
                for c in range(CLASSES):
                    p = sigmoid(float(outputs.logits[level][image, c, y, x]))
                    # In mmdet 2.20 the class probability alone decides what is a candidate.
                    ranked, final = (p, p * q) if score == "product" else (math.sqrt(p * q), math.sqrt(p * q))
                    pairs.append((ranked, final, (lv, y, x), c))
            for ranked, final, cell, c in sorted(pairs, reverse=True)[:30]:
                if ranked > 0.4:
                    x1, y1, x2, y2 = box_at(outputs, image, cell)
                    clipped = [min(max(v, 0), limit) for v, limit in zip((x1, y1, x2, y2), (width, height) * 2, strict=True)]
                    rows.append((final, c, clipped))
        kept = []
        for c in range(CLASSES):
            own = [row for row in rows if row[1] == c]
            boxes, scores = torch.tensor([r[2] for r in own]).float().reshape(-1, 4), torch.tensor([r[0] for r in own])
            kept += [own[i] for i in nms(boxes, scores, 0.5).tolist()]
        kept = sorted(kept, key=lambda row: -row[0])[:25]
        real = found.labels[image] >= 0
        assert len(kept) > 5
        assert found.labels[image][real].tolist() == [c for _, c, _ in kept]
        torch.testing.assert_close(found.scores[image][real], torch.tensor([s for s, _, _ in kept]))
        torch.testing.assert_close(found.boxes[image][real], torch.tensor([b for _, _, b in kept]).float())


def test_prior_scales_and_initial_spread() -> None:
    torch.manual_seed(0)
    module = FCOSHead(FCOSHeadSpec(channels=64), 64, 20)
    assert module.cls_out.bias is not None
    torch.testing.assert_close(module.cls_out.bias.sigmoid(), torch.full_like(module.cls_out.bias, 0.01))
    for layer in (module.cls_out, module.box_out, module.cls_tower[0], module.box_tower[9]):
        assert isinstance(layer, nn.Conv2d)
        assert float(layer.weight.std().detach()) == pytest.approx(0.01, rel=0.1)
    assert [float(scale.detach()) for scale in module.scales] == [1.0] * 5


def test_losses_stay_float32_under_autocast() -> None:
    net = build_detector(fcos_spec(), CLASSES)
    assert isinstance(net, FCOS)
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
