"""GFL agrees with the papers' formulas (GFL: Li et al. 2020; ATSS: Zhang et al. 2020), written with loops in float64."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from headkd_ray.detectors import GFL, GroundTruth, build_detector
from headkd_ray.detectors.gfl import GFLHead, GFLOutputs
from headkd_ray.detectors.ops.losses import mean_over_workers
from headkd_ray.detectors.ops.matching import IGNORED, NEGATIVE, match_adaptive
from headkd_ray.detectors.weights import load_mmdet
from headkd_ray.errors import CheckpointError
from headkd_ray.job import GFLHeadSpec, GFLSpec
from tests.detectors.micro import gfl_spec, liven

CLASSES, REG_MAX, TOPK, BASE = 3, 6, 4, 4.0
SHAPES, STRIDES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)], (8, 16, 32, 64, 128)
SIZES = torch.tensor([[64, 96], [30, 60]])
EXTENTS = ((64, 96), (32, 64))
"""Region of each image in which anchors count: its size, rounded up to a multiple of 32."""
BOXES = torch.tensor(
    [
        [[4.3, 5.1, 41.7, 37.2], [50.9, 11.3, 89.6, 60.2], [6.7, 8.9, 34.1, 30.5]],
        [[8.2, 3.9, 31.3, 29.4], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
)
LABELS = torch.tensor([[0, 2, 1], [1, -1, -1]])
TRUTH = GroundTruth.of(BOXES, LABELS, SIZES)

Box = list[float]


def head(**keys: Any) -> GFLHead:
    torch.manual_seed(0)
    small = {"convs": 1, "channels": 8, "norm_groups": 2, "reg_max": REG_MAX, "topk": TOPK, "base_scale": BASE}
    module = GFLHead(GFLHeadSpec.model_validate({**small, **keys}), 8, CLASSES)
    liven(module)
    with torch.no_grad():
        for level, scale in enumerate(module.scales):
            scale.fill_(0.5 + 0.2 * level)
    return module


def pyramid() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 8, h, w) for h, w in SHAPES]


CELLS = [(level, y, x) for level, (h, w) in enumerate(SHAPES) for y in range(h) for x in range(w)]


def overlap(a: Box, b: Box) -> tuple[float, float, float]:
    """Return the areas of intersection, union and smallest enclosing box."""
    inside = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inside, union, hull


def matched_by_hand(image: int) -> list[int]:
    """Match by ATSS, box by box and anchor by anchor."""
    points = [(x * STRIDES[level], y * STRIDES[level]) for level, y, x in CELLS]
    anchors = []
    for (level, _, _), (px, py) in zip(CELLS, points, strict=True):
        half = BASE * STRIDES[level] / 2
        anchors.append([px - half, py - half, px + half, py + half])
    height, width = EXTENTS[image]
    valid = [y < height and x < width for x, y in points]
    result, greatest = [NEGATIVE if v else IGNORED for v in valid], [-1.0] * len(CELLS)
    for g, box in enumerate(BOXES[image].double().tolist()):
        if LABELS[image, g] < 0:
            continue
        cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        candidates: list[int] = []
        for level in range(5):
            own = [n for n, cell in enumerate(CELLS) if cell[0] == level and valid[n]]
            candidates += sorted(own, key=lambda n: math.dist(points[n], (cx, cy)))[:TOPK]
        ious = [(inside := overlap(anchors[n], box))[0] / inside[1] for n in candidates]
        least = statistics.mean(ious) + statistics.stdev(ious)
        for n, iou in zip(candidates, ious, strict=True):
            px, py = points[n]
            if iou >= least and min(px - box[0], py - box[1], box[2] - px, box[3] - py) > 0.01 and iou > greatest[n]:
                result[n], greatest[n] = g, iou
    return result


def test_anchors_are_assigned_as_atss_does() -> None:
    module = head()
    grid = module.anchors.grid(module(pyramid()).logits)
    matched = match_adaptive(grid.boxes, grid.counts, TRUTH, TOPK, module.anchors.valid(grid, SIZES))
    assert matched.tolist() == [matched_by_hand(image) for image in range(2)]
    assert {-2, -1, 0} <= set(matched[1].tolist()) and {0, 1, 2} <= set(matched[0].tolist())


def box_by_hand(outputs: GFLOutputs, image: int, cell: tuple[int, int, int]) -> tuple[Box, list[list[float]]]:
    """Return a cell's box in pixels, which is the mean of its four distributions, and the distributions."""
    level, y, x = cell
    distributions = []
    for side in range(4):
        bins = outputs.bins[level][image, side * (REG_MAX + 1) : (side + 1) * (REG_MAX + 1), y, x].double().tolist()
        total = sum(math.exp(b) for b in bins)
        distributions.append([math.exp(b) / total for b in bins])
    left, top, right, bottom = (sum(i * p for i, p in enumerate(d)) * STRIDES[level] for d in distributions)
    px, py = x * STRIDES[level], y * STRIDES[level]
    return [px - left, py - top, px + right, py + bottom], distributions


@pytest.mark.parametrize("keys", [{}, {"box_weight": 1.0, "dfl_weight": 1.0, "quality_beta": 1.5}])
def test_losses_are_the_papers_formulas(keys: dict[str, float]) -> None:
    module = head(**keys)
    outputs = module(pyramid())
    losses = module.losses(outputs, TRUTH)
    outputs = GFLOutputs(*([m.detach() for m in maps] for maps in outputs[:2]), [])
    beta = keys.get("quality_beta", 2.0)
    qfl = giou = dfl = weight = 0.0
    positives, clamped = 0, 0
    for image in range(2):
        matched = matched_by_hand(image)
        positives += max(1, sum(target >= 0 for target in matched))
        for cell, target in zip(CELLS, matched, strict=True):
            if target == IGNORED:
                continue
            level, y, x = cell
            scores = outputs.logits[level][image, :, y, x].double().sigmoid().tolist()
            quality = [0.0] * CLASSES
            if target >= 0:
                wanted = BOXES[image, target].double().tolist()
                box, distributions = box_by_hand(outputs, image, cell)
                inside, union, hull = overlap(box, wanted)
                quality[int(LABELS[image, target])] = inside / union
                weight += max(scores)
                giou += max(scores) * (1 - inside / union + (hull - union) / hull)
                px, py = x * STRIDES[level], y * STRIDES[level]
                sides = [px - wanted[0], py - wanted[1], wanted[2] - px, wanted[3] - py]
                for side, p in zip(sides, distributions, strict=True):
                    distance = min(max(side / STRIDES[level], 0.0), REG_MAX - 0.1)
                    clamped += distance != side / STRIDES[level]
                    low = math.floor(distance)
                    entropy = (low + 1 - distance) * math.log(p[low]) + (distance - low) * math.log(p[low + 1])
                    dfl -= max(scores) * entropy / 4
            for p, q in zip(scores, quality, strict=True):
                qfl -= abs(q - p) ** beta * ((1 - q) * math.log(1 - p) + q * math.log(p))
    assert positives > 5 and weight > 1
    expected = {
        "loss_cls": qfl / positives,
        "loss_box": keys.get("box_weight", 2.0) * giou / weight,
        "loss_dfl": keys.get("dfl_weight", 0.25) * dfl / weight,
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name


def test_detections_are_the_distributions_means_scored_by_quality() -> None:
    module = head(postprocess={"score": 0.3, "nms_iou": 1.0, "max_detections": 10_000})
    outputs = module(pyramid())
    found = module.detect(outputs, SIZES)
    wanted = set()
    for level, y, x in CELLS:
        box, _ = box_by_hand(outputs, 0, (level, y, x))
        for label, score in enumerate(outputs.logits[level][0, :, y, x].sigmoid().tolist()):
            if score > 0.3:
                limits = (96, 64, 96, 64)
                wanted.add((label, round(score, 4), *(round(min(max(v, 0), m), 2) for v, m in zip(box, limits, strict=True))))
    rows = zip(found.labels[0].tolist(), found.scores[0].tolist(), found.boxes[0].tolist(), strict=True)
    got = {(label, round(score, 4), *(round(v, 2) for v in box)) for label, score, box in rows if label >= 0}
    assert len(wanted) > 20 and len(got & wanted) > 0.95 * len(wanted) and len(got) == len(wanted)


def mmdet_state(detector: GFL) -> dict[str, Tensor]:
    """Return the tensors of ``detector``, whose backbone is a ResNet-18, under the names of mmdet's gfl_r50_fpn."""
    state: dict[str, Tensor] = {"bbox_head.integral.project": torch.linspace(0, 16, 17)}
    for name, tensor in detector.state_dict().items():
        part, _, rest = name.partition(".")
        parts = rest.split(".")
        if part == "backbone":
            rest = rest.removeprefix("body.")
            state[f"backbone.{rest}"] = tensor
        elif part == "neck":
            number = int(parts[1]) + (3 if parts[0] == "extra" else 0)
            state[f"neck.{'lateral' if parts[0] == 'lateral' else 'fpn'}_convs.{number}.conv.{parts[2]}"] = tensor
        elif parts[0] in ("cls_tower", "box_tower"):
            place, kind = divmod(int(parts[1]), 3)
            layer = ("conv", "gn")[kind]
            state[f"bbox_head.{'cls' if parts[0] == 'cls_tower' else 'reg'}_convs.{place}.{layer}.{parts[2]}"] = tensor
        elif parts[0] == "scales":
            state[f"bbox_head.scales.{parts[1]}.scale"] = tensor
        else:
            state[f"bbox_head.gfl_{'cls' if parts[0] == 'cls_out' else 'reg'}.{parts[1]}"] = tensor
    return state


CONFIG = """
test = dict(nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6), max_per_img=100)
model = dict(type='GFL', neck=dict(type='FPN', start_level=1, add_extra_convs='on_output', num_outs=5), test_cfg=test)
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
"""


@pytest.fixture(scope="module")
def official() -> GFL:
    torch.manual_seed(0)
    keys = {"backbone": {"name": "resnet18"}, "neck": {"channels": 32}, "head": {"channels": 32, "convs": 2}}
    detector = build_detector(GFLSpec.model_validate(keys), CLASSES).eval()
    liven(detector)
    assert isinstance(detector, GFL)
    with torch.no_grad():
        detector.head.scales[2].fill_(1.5)
    return detector


def test_mmdet_s_checkpoint_detects_as_what_it_was_made_from(official: GFL) -> None:
    loaded = load_mmdet(mmdet_state(official), {"config": CONFIG, "CLASSES": ("a", "b", "c")}, "gfl.pth")
    assert isinstance(loaded.detector, GFL) and loaded.classes == ("a", "b", "c")
    spec = loaded.detector.spec
    assert (spec.head.reg_max, spec.head.convs, spec.head.norm_groups) == (16, 2, 32)
    assert (spec.neck.extra, spec.neck.relu_before_p7, spec.head.postprocess.nms_iou) == ("conv_p5", False, 0.6)
    images = torch.randint(0, 256, (1, 3, 192, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[192, 256]])
    one, other = official(images, sizes), loaded.detector.eval()(images, sizes)
    assert (one.labels >= 0).sum() > 5
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)


def test_a_missing_tensor_of_mmdet_s_is_named(official: GFL) -> None:
    state = mmdet_state(official)
    del state["bbox_head.scales.3.scale"]
    with pytest.raises(CheckpointError, match=r"missing: head\.scales\.3"):
        load_mmdet(state, source="gfl.pth")


def test_one_process_is_its_own_mean() -> None:
    value = torch.tensor(3.0)
    assert mean_over_workers(value) is value


def test_autocast_does_not_round_the_distances() -> None:
    detector = build_detector(gfl_spec(), CLASSES)
    assert isinstance(detector, GFL)
    features = [torch.randn(1, 16, h, w) for h, w in SHAPES]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = detector.head(features)
        maps = detector.head.box_maps(outputs)
    exact = detector.head.box_maps(GFLOutputs([], outputs.bins, []))
    assert outputs.logits[0].dtype == torch.bfloat16 and outputs.bins[0].dtype == torch.float32
    assert all(m.dtype == torch.float32 and torch.equal(m, e) for m, e in zip(maps, exact, strict=True))
