import math
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import nms

from headkd_ray.detectors import GroundTruth, RepPoints, build_detector
from headkd_ray.detectors.dense import STRIDES
from headkd_ray.detectors.ops.matching import match_nearest
from headkd_ray.detectors.reppoints import RepPointsHead, RepPointsOutputs
from headkd_ray.job import RepPointsHeadSpec
from tests.detectors.micro import batch, liven, reppoints_spec, truth_of

CLASSES = 3
SHAPES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
SIZES = torch.tensor([[64, 96], [30, 60]])
EXTENTS = ((64, 96), (32, 64))
"""Region of each image in which cells count: its size, rounded up to a multiple of 32."""
BOXES = torch.tensor(
    [
        [[4.0, 4, 40, 36], [50, 10, 90, 60], [6, 8, 14, 18], [0, 0, 96, 64], [7, 9, 13, 17]],
        [[8, 4, 30, 28], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
)
LABELS = torch.tensor([[0, 2, 1, 1, 0], [1, -1, -1, -1, -1]])
TRUTH = GroundTruth.of(BOXES, LABELS, SIZES)

Cell = tuple[int, int, int]
Box = list[float]
BASE = 1.0
"""Base scale, less than mmdet's 4, so that the boxes above spread over several levels."""


def head(**keys: Any) -> RepPointsHead:
    torch.manual_seed(0)
    keys = {"convs": 2, "channels": 8, "point_channels": 6, "norm_groups": 2, "base_scale": BASE, **keys}
    module = RepPointsHead(RepPointsHeadSpec.model_validate(keys), 8, CLASSES)
    liven(module)
    with torch.no_grad():
        module.moment_transfer.copy_(torch.tensor([0.3, -0.2]))
    return module


def pyramid() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 8, h, w) for h, w in SHAPES]


def drawn_outputs(seed: int) -> RepPointsOutputs:
    """Return points of moderate shift and spread, so that cells overlap the boxes more or less, and refined ones nearby."""
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int, h: int, w: int) -> Tensor:
        return torch.randn(2, channels, h, w, generator=generator)

    initial = [
        draw(18, h, w) * draw(1, h, w).mul(0.4).add(0.3).exp() + draw(2, h, w).mul(0.3).repeat(1, 9, 1, 1) for h, w in SHAPES
    ]
    refined = [points + draw(18, *points.shape[-2:]) * 0.2 for points in initial]
    return RepPointsOutputs([draw(CLASSES, h, w) * 2 for h, w in SHAPES], initial, refined, [])


def cells() -> list[Cell]:
    """Return (level, y, x) in the order of the head's tables."""
    return [(level, y, x) for level, (h, w) in enumerate(SHAPES) for y in range(h) for x in range(w)]


def box_at(points: list[Tensor], image: int, cell: Cell, factors: tuple[float, float]) -> Box:
    """Return the box of a cell in pixels, from its nine points."""
    level, y, x = cell
    pairs = points[level][image, :, y, x].detach().double().tolist()
    ys, xs = ([p * STRIDES[level] + origin * STRIDES[level] for p in pairs[i::2]] for i, origin in ((0, y), (1, x)))
    half_width, half_height = statistics.stdev(xs) * math.exp(factors[0]), statistics.stdev(ys) * math.exp(factors[1])
    cx, cy = statistics.mean(xs), statistics.mean(ys)
    return [cx - half_width, cy - half_height, cx + half_width, cy + half_height]


def counts(image: int, cell: Cell) -> bool:
    """Whether a cell is valid by mmdet's flags."""
    level, y, x = cell
    return all(i < math.ceil(extent / STRIDES[level]) for i, extent in zip((y, x), EXTENTS[image], strict=True))


def nearest_by_mmdet(boxes: list[Box], labels: list[int], allowed: list[bool], base: float) -> list[int]:
    """Assign like PointAssigner, one box after the other; of equally near points the first wins."""
    owner, least = [-1] * len(allowed), [math.inf] * len(allowed)
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        if labels[index] < 0:
            continue
        width, height = max(x2 - x1, 1e-6), max(y2 - y1, 1e-6)
        level = min(max(int((math.log2(width / base) + math.log2(height / base)) / 2), 3), 7) - 3
        best, where = math.inf, -1
        for place, (own, y, x) in enumerate(cells()):
            dx, dy = x * STRIDES[own] - (x1 + x2) / 2, y * STRIDES[own] - (y1 + y2) / 2
            distance = math.hypot(dx / width, dy / height)
            if own == level and allowed[place] and distance < best:
                best, where = distance, place
        if best < least[where]:
            owner[where], least[where] = index, best
    return owner


def iou(a: Box, b: Box) -> float:
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return overlap / max((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap, 1e-6)


def refined_by_mmdet(candidates: list[Box], boxes: list[Box], allowed: list[bool]) -> list[int]:
    """Assign like MaxIoUAssigner at 0.5, 0.4 and low quality from 0: index of the box, -1 = negative, -2 = ignored."""
    owner = [-2] * len(candidates)
    table = [[iou(candidate, box) for box in boxes] for candidate in candidates]
    for place, row in enumerate(table):
        best = max(row, default=0.0)
        owner[place] = -1 if best < 0.4 else row.index(best) if best >= 0.5 else -2
    for index in range(len(boxes)):
        most = max(row[index] for row, ok in zip(table, allowed, strict=True) if ok)
        owner = [index if row[index] == most else old for row, old in zip(table, owner, strict=True)]
    return [old if ok else -2 for old, ok in zip(owner, allowed, strict=True)]


def smooth_l1(box: Box, target: Box, unit: float, beta: float = 0.11) -> float:
    differences = [abs(a - b) / unit for a, b in zip(box, target, strict=True)]
    return sum(d * d / 2 / beta if d < beta else d - beta / 2 for d in differences)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6))
def test_the_nearest_cells_are_mmdets(seed: int, truths: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Sides are powers of 2, so that all distances are exact and ties are ties.
    sides = 2.0 ** torch.randint(1, 8, (2, truths, 2), generator=generator)
    centres = torch.randint(0, 25, (2, truths, 2), generator=generator) * 4.0
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)
    labels = torch.randint(-1, CLASSES, (2, truths), generator=generator)
    allowed = torch.tensor([[counts(image, cell) for cell in cells()] for image in range(2)])
    base = 2.0 ** float(torch.randint(-2, 3, (1,), generator=generator))
    grid = head().anchors.grid([torch.zeros(2, 1, h, w) for h, w in SHAPES])
    matched = match_nearest(grid.boxes, GroundTruth.of(boxes, labels, SIZES), base, allowed)
    for image in range(2):
        wanted = nearest_by_mmdet(boxes[image].tolist(), labels[image].tolist(), allowed[image].tolist(), base)
        assert matched[image].tolist() == wanted


def test_the_nearer_box_wins_a_cell_and_the_first_of_equals() -> None:
    grid = head().anchors.grid([torch.zeros(1, 1, h, w) for h, w in SHAPES])
    everywhere = torch.ones(1, len(grid.boxes), dtype=torch.bool)
    far, near, twin = [9.0, 8, 13, 12], [7.0, 7, 11, 11], [7.0, 7, 11, 11]
    for boxes, winner in (([far, near], 1), ([near, far], 0), ([near, twin], 0), ([far, near, twin], 1)):
        truth = GroundTruth.of(torch.tensor([boxes]), torch.zeros(1, len(boxes), dtype=torch.int64), SIZES[:1])
        (matched,) = match_nearest(grid.boxes, truth, 4.0, everywhere).tolist()
        assert [(cells()[i], owner) for i, owner in enumerate(matched) if owner >= 0] == [((0, 1, 1), winner)]


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_losses_are_mmdets_formulas_in_float64(seed: int) -> None:
    module, outputs = head(), drawn_outputs(seed)
    losses = module.losses(outputs, TRUTH)
    cls, init, refine, initial_positives, positives, left_out = 0.0, 0.0, 0.0, 0, 0, 0
    for image in range(2):
        boxes = [box for box, label in zip(BOXES[image].tolist(), LABELS[image].tolist(), strict=True) if label >= 0]
        allowed = [counts(image, cell) for cell in cells()]
        guesses = [box_at(outputs.initial, image, cell, (0.3, -0.2)) for cell in cells()]
        nearest = nearest_by_mmdet(BOXES[image].tolist(), LABELS[image].tolist(), allowed, BASE)
        matched = refined_by_mmdet(guesses, boxes, allowed)
        initial_positives += max(sum(owner >= 0 for owner in nearest), 1)
        positives += max(sum(owner >= 0 for owner in matched), 1)
        left_out += sum(owner == -2 and ok for owner, ok in zip(matched, allowed, strict=True))
        for place, cell in enumerate(cells()):
            level, y, x = cell
            if nearest[place] >= 0:
                init += smooth_l1(guesses[place], boxes[nearest[place]], BASE * STRIDES[level])
            if matched[place] >= 0:
                refined = box_at(outputs.refined, image, cell, (0.3, -0.2))
                refine += smooth_l1(refined, boxes[matched[place]], BASE * STRIDES[level])
            if matched[place] >= -1:
                for c, logit in enumerate(outputs.logits[level][image, :, y, x].tolist()):
                    p = sigmoid(logit)
                    hit = matched[place] >= 0 and int(LABELS[image, matched[place]]) == c
                    cls += -0.25 * (1 - p) ** 2 * math.log(p) if hit else -0.75 * p**2 * math.log(1 - p)
    assert initial_positives == 5, "two boxes want one cell"
    assert positives > 6 and left_out > 0, "more positives than each box's best"
    assert losses.keys() == {"loss_cls", "loss_init", "loss_refine"}
    assert float(losses["loss_cls"].detach()) == pytest.approx(cls / positives, rel=1e-5)
    assert float(losses["loss_init"].detach()) == pytest.approx(0.5 * init / initial_positives, rel=1e-5)
    assert float(losses["loss_refine"].detach()) == pytest.approx(1.0 * refine / positives, rel=1e-5)


def test_loss_weights() -> None:
    outputs = drawn_outputs(0)
    usual, other = (head(**keys).losses(outputs, TRUTH) for keys in ({}, {"init_weight": 2.0, "refine_weight": 0.5}))
    torch.testing.assert_close(other["loss_init"], 4 * usual["loss_init"])
    torch.testing.assert_close(other["loss_refine"], usual["loss_refine"] / 2)
    assert torch.equal(other["loss_cls"], usual["loss_cls"])


@pytest.mark.parametrize("truths", [0, 2])
def test_a_batch_without_any_object_trains_the_classes_alone(truths: int) -> None:
    module = head()
    none = GroundTruth.of(torch.zeros(2, truths, 4), torch.full((2, truths), -1), SIZES)
    losses = module.losses(module(pyramid()), none)
    assert losses["loss_cls"] > 0
    assert losses["loss_init"] == losses["loss_refine"] == 0
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # The initial points decide where classes are read, so they learn from classes too.
        assert (parameter.grad != 0).any() == (not name.startswith(("refine_", "moment_"))), name


def test_boxes_are_the_moments_of_the_points() -> None:
    module = head()
    ys, xs = [-1.0, 0.0, 2.0, 0.5, 0.0, -3.0, 1.0, 1.5, 0.25], [4.0, 3.0, 5.0, 2.5, 4.0, 4.5, 3.0, 6.0, 4.25]
    points = torch.tensor([[y, x] for y, x in zip(ys, xs, strict=True)]).reshape(1, 18, 1, 1)
    left, top, right, bottom = module.distances(points).flatten().tolist()
    half_width, half_height = statistics.stdev(xs) * math.exp(0.3), statistics.stdev(ys) * math.exp(-0.2)
    assert -left == pytest.approx(statistics.mean(xs) - half_width)
    assert right == pytest.approx(statistics.mean(xs) + half_width)
    assert -top == pytest.approx(statistics.mean(ys) - half_height)
    assert bottom == pytest.approx(statistics.mean(ys) + half_height)


@pytest.mark.parametrize("value", [0.0, 0.37, -1e4])
def test_points_without_spread_have_finite_gradients(value: float) -> None:
    module = head()
    points = torch.full((1, 18, 2, 2), value, requires_grad=True)
    distances = module.distances(points)
    (distances.square().sum() + distances.sum()).backward()
    assert points.grad is not None and points.grad.isfinite().all()
    assert module.moment_transfer.grad is not None and module.moment_transfer.grad.isfinite().all()


def test_only_a_share_of_the_gradient_reaches_the_initial_points_and_the_factors() -> None:
    features, gradients = pyramid(), {}
    for share in (1.0, 0.1, 0.0):
        module = head(gradient_mul=share, moment_mul=share)
        outputs = module(features)
        torch.stack([m.square().sum() for m in (*outputs.logits, *outputs.refined)]).sum().backward()
        through_points = module.init_out.weight.grad
        assert through_points is not None and module.refine_out.weight.grad is not None
        module.distances(outputs.refined[0].detach()).square().sum().backward()
        assert module.moment_transfer.grad is not None
        gradients[share] = (through_points.clone(), module.refine_out.weight.grad.clone(), module.moment_transfer.grad)
    points, refined, factors = gradients[1.0]
    assert (points != 0).any() and (factors != 0).all()
    for share in (0.1, 0.0):
        torch.testing.assert_close(gradients[share][0], points * share, rtol=1e-3, atol=1e-3 * float(points.abs().max()))
        torch.testing.assert_close(gradients[share][1], refined)
        torch.testing.assert_close(gradients[share][2], factors * share)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (0, 2), (-1, 1)])
def test_the_deformable_convs_read_at_the_initial_points(down: int, right: int) -> None:
    """At the positions of a plain conv's taps they act like one; shifted by whole cells they read the shifted map."""
    module, features = head(), pyramid()
    steps = [(y + down, x + right) for y in (-1.0, 0.0, 1.0) for x in (-1.0, 0.0, 1.0)]
    with torch.no_grad():
        module.init_out.weight.zero_()
        assert module.init_out.bias is not None
        module.init_out.bias.copy_(torch.tensor(steps).flatten())
    cls_taps, box_taps, _, classify, refine = module.taps(features)
    for tap, conv, read in ((cls_taps[0], module.cls_conv, classify[0]), (box_taps[0], module.refine_conv, refine[0])):
        around = F.pad(tap, (3, 3, 3, 3))
        height, width = tap.shape[-2:]
        moved = around[:, :, 2 + down : 4 + down + height, 2 + right : 4 + right + width]
        torch.testing.assert_close(read, F.conv2d(moved, conv.weight).relu(), rtol=1e-4, atol=1e-5)


def test_five_taps_and_what_is_read_from_them() -> None:
    module, features = head(), pyramid()
    outputs = module(features)
    taps = module.taps(features)
    assert len(taps) == len(outputs.taps) == 5
    for mine, theirs in zip(taps, outputs.taps, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    for level, (cls_tap, box_tap, init_tap, classify, refine) in enumerate(zip(*taps, strict=True)):
        assert all((tap >= 0).all() for tap in (cls_tap, box_tap, init_tap, classify, refine))
        torch.testing.assert_close(module.cls_tower(features[level]), cls_tap)
        torch.testing.assert_close(module.box_tower(features[level]), box_tap)
        torch.testing.assert_close(module.init_conv(box_tap).relu(), init_tap)
        torch.testing.assert_close(module.init_out(init_tap), outputs.initial[level])
        torch.testing.assert_close(module.cls_out(classify), outputs.logits[level])
        torch.testing.assert_close(module.refine_out(refine) + outputs.initial[level], outputs.refined[level])


@pytest.mark.parametrize(("groups", "kinds"), [(2, [nn.Conv2d, nn.GroupNorm, nn.ReLU]), (None, [nn.Conv2d, nn.ReLU])])
def test_towers_with_and_without_norm(groups: int | None, kinds: list[type]) -> None:
    module = head(norm_groups=groups)
    assert [type(layer) for layer in module.cls_tower] == kinds * 2
    assert [type(layer) for layer in module.box_tower] == kinds * 2


def test_proposals_are_the_recipe_done_by_hand() -> None:
    module, outputs = head(proposals={"pre_nms": 40, "post_nms": 60, "nms_iou": 0.7}), drawn_outputs(0)
    proposals = module.proposals(outputs, SIZES)
    for image in range(2):
        height, width = SIZES[image].tolist()
        kept: list[tuple[float, Cell, Box]] = []
        for level in range(5):
            own = [cell for cell in cells() if cell[0] == level]
            scored = [(sigmoid(float(outputs.logits[lv][image, :, y, x].max())), (lv, y, x)) for lv, y, x in own]
            rows = []
            for score, cell in sorted(scored, reverse=True)[:40]:
                x1, y1, x2, y2 = box_at(outputs.refined, image, cell, (0.3, -0.2))
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
    assert not module.proposals(module(pyramid()), SIZES).boxes.requires_grad


def test_detections_are_the_best_pairs_after_nms_per_class() -> None:
    rules = {"pre_nms": 30, "score": 0.4, "nms_iou": 0.5, "max_detections": 25}
    module, outputs = head(postprocess=rules), drawn_outputs(0)
    found = module.detect(outputs, SIZES)
    for image in range(2):
        height, width = SIZES[image].tolist()
        rows: list[tuple[float, int, Box]] = []
        for level in range(5):
            own = [cell for cell in cells() if cell[0] == level]
            pairs = [
                (sigmoid(float(outputs.logits[lv][image, c, y, x])), (lv, y, x), c) for lv, y, x in own for c in range(CLASSES)
            ]
            for score, cell, c in sorted(pairs, reverse=True)[:30]:
                if score > 0.4:
                    box = box_at(outputs.refined, image, cell, (0.3, -0.2))
                    clipped = [min(max(v, 0), limit) for v, limit in zip(box, (width, height) * 2, strict=True)]
                    rows.append((score, c, clipped))
        kept = []
        for c in range(CLASSES):
            same = [row for row in rows if row[1] == c]
            boxes, scores = torch.tensor([r[2] for r in same]).float().reshape(-1, 4), torch.tensor([r[0] for r in same])
            kept += [same[i] for i in nms(boxes, scores, 0.5).tolist()]
        kept = sorted(kept, key=lambda row: -row[0])[:25]
        real = found.labels[image] >= 0
        assert len(kept) > 5
        assert found.labels[image][real].tolist() == [c for _, c, _ in kept]
        torch.testing.assert_close(found.scores[image][real], torch.tensor([s for s, _, _ in kept]))
        torch.testing.assert_close(found.boxes[image][real], torch.tensor([b for _, _, b in kept]).float())


@pytest.mark.parametrize("std", [0.01, None])
def test_prior_and_initial_spread(std: float | None) -> None:
    torch.manual_seed(0)
    module = RepPointsHead(RepPointsHeadSpec(channels=64, point_channels=64, tower_std=std), 64, 20)
    assert module.cls_out.bias is not None
    torch.testing.assert_close(module.cls_out.bias.sigmoid(), torch.full_like(module.cls_out.bias, 0.01))
    he = math.sqrt(2 / (64 * 9))
    for layer in (module.cls_tower[0], module.box_tower[6], module.init_conv):
        assert float(layer.weight.std().detach()) == pytest.approx(std or he, rel=0.1)  # type: ignore[operator, arg-type, union-attr]
    for layer in (module.cls_out, module.init_out, module.refine_out):
        assert float(layer.weight.std().detach()) == pytest.approx(0.01, rel=0.1)
    for conv in (module.cls_conv, module.refine_conv):
        assert float(conv.weight.std().detach()) == pytest.approx(he, rel=0.1)
        assert float(conv.weight.abs().max().detach()) <= he * math.sqrt(3)
    assert module.moment_transfer.tolist() == [0, 0]
    assert not any("_rest" in name for name in module.state_dict())


def test_losses_stay_float32_under_autocast() -> None:
    net = build_detector(reppoints_spec(), CLASSES)
    assert isinstance(net, RepPoints)
    data = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = net.features(net.normalise(data["images"], data["sizes"]))
        outputs = net.head(features)
        losses = net.head.losses(outputs, truth_of(data))
        proposals = net.head.proposals(outputs, data["sizes"])
        found = net.head.detect(outputs, data["sizes"])
    assert outputs.logits[0].dtype == torch.bfloat16
    assert outputs.initial[0].dtype == outputs.refined[0].dtype == torch.float32
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert proposals.boxes.dtype == proposals.scores.dtype == found.boxes.dtype == torch.float32
    sum(losses.values()).backward()  # type: ignore[union-attr]
