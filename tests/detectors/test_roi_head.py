import math
from typing import Any

import pytest
import torch
from torchvision.ops import nms, roi_align

from headkd_ray.detectors import BoxHead, GroundTruth, RoIs, StageOutput
from headkd_ray.detectors.ops import fixed_size
from headkd_ray.detectors.ops.boxes import decode, encode
from headkd_ray.detectors.ops.proposals import Proposals
from headkd_ray.detectors.ops.roi_align import pool_rois, roi_levels
from headkd_ray.detectors.ops.rois import candidates, choose, draw, flatten
from headkd_ray.detectors.roi_head import BoxOutputs
from headkd_ray.job import RoIHeadSpec, SamplerSpec

STRIDES = (8, 16, 32, 64)
CLASSES = 3
STDS = (0.1, 0.1, 0.2, 0.2)
SIZES = torch.tensor([[256, 256]] * 2)
NO_TRUTH = GroundTruth.of(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), SIZES)


def spec(**keys: Any) -> RoIHeadSpec:
    return RoIHeadSpec.model_validate({"fc_channels": 12, "pool": 3, **keys})


def scene(count: int = 40) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return the pyramid of two 256 x 256 images, and boxes of all sizes."""
    torch.manual_seed(0)
    features = [torch.randn(2, 4, 256 // s, 256 // s) for s in STRIDES]
    corner = torch.rand(count, 2) * 128
    boxes = torch.cat([corner, corner + 2 + torch.rand(count, 2) ** 2 * 900], dim=1)
    return features, boxes, torch.randint(0, 2, (count,))


@pytest.mark.parametrize(
    ("side", "level"), [(1, 0), (55.9, 0), (111.9, 0), (112, 1), (223.9, 1), (224, 2), (448, 3), (2000, 3)]
)
def test_level_map(side: float, level: int) -> None:
    # k = floor(log2(sqrt(area) / 56)): level 1 starts at a side of 112 pixels, whatever the strides are.
    assert roi_levels(torch.tensor([[0.0, 0, side, side]]), 4, 56.0).tolist() == [level]


KEYS = [{}, {"aligned": False}, {"sampling_ratio": 2}, {"aligned": False, "sampling_ratio": 2}]
"""The kinds of RoIAlign: mmdet's first, torchvision's last."""


@pytest.mark.parametrize("keys", KEYS)
def test_pooling_in_one_pass_equals_torchvision_box_by_box(keys: dict[str, Any]) -> None:
    features, boxes, image = scene()
    boxes[:5] = torch.tensor([[-90.0, 5, 20, 60], [200, 200, 400, 300], [9, 9, 9, 9], [250, 0, 270, 9], [300, 300, 340, 340]])
    features = [level.to(memory_format=torch.channels_last).requires_grad_() for level in features]
    pooled = pool_rois(features, STRIDES, boxes, image, spec(**keys))
    expected, levels = [], set()
    for n in range(len(boxes)):
        area = max(0.0, float((boxes[n, 2] - boxes[n, 0]) * (boxes[n, 3] - boxes[n, 1])))
        level = min(max(math.floor(math.log2(math.sqrt(area) / 56 + 1e-6)), 0), 3)
        levels.add(level)
        row = torch.cat([image[n : n + 1].float(), boxes[n]]).unsqueeze(0)
        ratio, aligned = keys.get("sampling_ratio", 0), keys.get("aligned", True)
        expected.append(roi_align(features[level], row, 3, 1 / STRIDES[level], ratio, aligned)[0])
    torch.testing.assert_close(pooled, torch.stack(expected))
    assert levels == {0, 1, 2, 3}
    weights = torch.randn_like(pooled)
    found, wanted = (torch.autograd.grad((rows * weights).sum(), features) for rows in (pooled, torch.stack(expected)))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("device_types", [(), ("cpu",)])
def test_boxes_of_a_detector_that_diverged_are_pooled(device_types: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Or training would end with an error about an index, not with the one about its loss."""
    monkeypatch.setattr(fixed_size, "FIXED_SIZE_DEVICES", device_types)
    features, boxes, image = scene(3)
    boxes[1] = torch.nan
    assert pool_rois(features, STRIDES, boxes, image, spec()).isfinite().all()


def test_no_boxes_are_pooled_to_no_rows_that_still_belong_to_the_graph() -> None:
    features = [level.requires_grad_() for level in scene()[0]]
    pooled = pool_rois(features, STRIDES, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), spec())
    assert pooled.shape == (0, 4, 3, 3)
    assert [float(gradient.abs().sum()) for gradient in torch.autograd.grad(pooled.sum(), features)] == [0.0] * 4


@pytest.mark.parametrize("keys", KEYS)
def test_levels_side_by_side_as_on_a_gpu_are_pooled_alike(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes reach every edge of their image, whose levels of odd sides are larger than it; so do their gradients."""
    _, boxes, image = scene(60)
    limit = torch.tensor([200.0, 250.0, 200.0, 250.0])
    boxes = torch.minimum(boxes, limit)
    boxes[:4] = torch.tensor([[0.0, 0, 200, 250], [0, 0, 9, 9], [190, 240, 200, 250], [50, 60, 50, 60]])
    sides = [(-(-250 // stride), -(-200 // stride)) for stride in STRIDES]
    features = [torch.randn(2, 4, *side, requires_grad=True) for side in sides]

    def pooled() -> tuple[torch.Tensor, ...]:
        rows = pool_rois(features, STRIDES, boxes, image, spec(**keys))
        return rows, *torch.autograd.grad(rows.square().sum(), features)

    expected = pooled()
    monkeypatch.setattr(fixed_size, "FIXED_SIZE_DEVICES", ("cpu",))
    for found, wanted in zip(pooled(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_taps_are_after_the_relu_and_in_order() -> None:
    features, boxes, image = scene(5)
    head = BoxHead(spec(fcs=3), 4, CLASSES, STRIDES)
    outputs = head(features, boxes, image)
    hidden = pool_rois(features, STRIDES, boxes, image, head.spec).flatten(1)
    for fc, tap in zip(head.fcs, outputs.taps, strict=True):
        hidden = fc(hidden).clamp(min=0)
        torch.testing.assert_close(tap, hidden)
    torch.testing.assert_close(outputs.logits, head.cls_out(hidden))
    assert outputs.logits.shape == (5, CLASSES + 1)
    assert outputs.deltas.shape == (5, CLASSES, 4)


def rois(labels: list[int]) -> RoIs:
    torch.manual_seed(2)
    count = len(labels)
    boxes = torch.rand(count, 4).cumsum(1) * 50
    targets = torch.rand(count, 4).cumsum(1) * 50
    return RoIs(
        boxes,
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, 4, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        targets,
        torch.ones(count),
    )


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize(("stds", "beta"), [(STDS, 0.0), (STDS, 1.0), ((0.05, 0.1, 0.3, 0.2), 1.0)])
def test_losses_in_float64(agnostic: bool, stds: tuple[float, ...], beta: float) -> None:
    head = BoxHead(spec(class_agnostic=agnostic, stds=stds, box_beta=beta), 4, CLASSES, STRIDES)
    sample = rois([0, 2, 3, 1, 3])  # 3 = background
    logits, deltas = torch.randn(5, 4), torch.randn(5, 1 if agnostic else CLASSES, 4)
    losses = head.losses([StageOutput(sample, BoxOutputs([], logits, deltas))])
    cls, box = 0.0, 0.0
    for n, label in enumerate(sample.labels.tolist()):
        cls -= float(logits[n].double().log_softmax(0)[label])
        if label < CLASSES:
            shift = encode(sample.targets[n].double(), sample.boxes[n].double())
            wanted = [float(d) / std for d, std in zip(shift, stds, strict=True)]
            for said, d in zip(deltas[n, 0 if agnostic else label].tolist(), wanted, strict=True):
                off = abs(said - d)
                box += 0.5 * off**2 / beta if off < beta else off - 0.5 * beta
    assert float(losses["cls"]) == pytest.approx(cls / 5, rel=1e-5)
    assert float(losses["box"]) == pytest.approx(box / 5, rel=1e-5)


def test_padding_enters_no_loss_and_no_statistics_of_batchnorm(monkeypatch: pytest.MonkeyPatch) -> None:
    features, boxes, image = scene(6)
    boxes = boxes.clamp(max=256)
    image, labels = image.sort().values, torch.tensor([0, 3, 1, 2, 3, 0])
    padding = torch.tensor([False, False, True, False, True, True])
    weights = (~padding).float()
    whole = RoIs(boxes, image, torch.zeros(6, 4).long(), labels.masked_fill(padding, -1), boxes + 4, weights)
    real = RoIs(*(rows[~padding] for rows in whole))

    def step(rois: RoIs) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        torch.manual_seed(4)
        head = BoxHead(spec(convs=1, conv_channels=4, conv_norm=True), 4, CLASSES, STRIDES).train()
        losses = head.losses(head.stage_outputs(features, rois, NO_TRUTH))
        (losses["cls"] + losses["box"]).backward()
        return losses, head.convs[1].running_var, head.convs[0].weight.grad

    expected = step(real)
    monkeypatch.setattr(fixed_size, "FIXED_SIZE_DEVICES", ("cpu",))
    torch.testing.assert_close(step(whole), expected, rtol=1e-4, atol=1e-6)


def test_no_rois_no_loss_but_gradients_of_zero() -> None:
    features, _, _ = scene(1)
    features = [f.requires_grad_() for f in features]
    head = BoxHead(spec(), 4, CLASSES, STRIDES)
    nothing = rois([])
    losses = head.losses(head.stage_outputs(features, nothing, NO_TRUTH))
    (losses["cls"] + losses["box"]).backward()
    assert losses["cls"].item() == losses["box"].item() == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


def test_detections_by_hand() -> None:
    torch.manual_seed(3)
    head = BoxHead(spec(postprocess={"score": 0.2, "max_detections": 12}), 4, CLASSES, STRIDES)
    boxes, image = torch.rand(30, 4).cumsum(1) * 60, torch.arange(30) % 2
    outputs = BoxOutputs([], torch.randn(30, 4) * 2, torch.randn(30, CLASSES, 4))
    sizes = torch.tensor([[64, 96], [50, 60]])
    found = head.conclude(outputs, boxes, image, sizes)
    for i in range(2):
        kept = []
        for c in range(CLASSES):
            rows = [n for n in range(30) if image[n] == i and outputs.logits[n].softmax(0)[c] > 0.2]
            decoded = decode(outputs.deltas[rows, c], boxes[rows], STDS)
            decoded[:, 0::2] = decoded[:, 0::2].clamp(0, float(sizes[i, 1]))
            decoded[:, 1::2] = decoded[:, 1::2].clamp(0, float(sizes[i, 0]))
            scores = outputs.logits[rows].softmax(1)[:, c]
            kept += [(float(scores[k]), c, decoded[k].tolist()) for k in nms(decoded, scores, 0.5).tolist()]
        kept = sorted(kept, key=lambda row: -row[0])[:12]
        real = found.labels[i] >= 0
        assert found.labels[i][real].tolist() == [c for _, c, _ in kept]
        torch.testing.assert_close(found.boxes[i][real], torch.tensor([b for _, _, b in kept]))


def test_candidates_put_the_truth_in_front_and_ids_survive_sampling() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40]], [[5, 5, 9, 9], [0, 0, 0, 0]]])
    truth = GroundTruth.of(boxes, torch.tensor([[2, 0], [1, -1]]), SIZES)
    proposed = torch.tensor(
        [[[0.0, 0, 10, 9], [50, 50, 60, 60], [21, 21, 40, 40]], [[80, 80, 90, 90], [5, 5, 9, 8], [0, 0, 0, 0]]]
    )
    cells = torch.arange(24).reshape(2, 3, 4)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    pool = candidates(Proposals(proposed, torch.zeros(2, 3), cells, valid), truth, 0.5)
    chosen = choose(pool, draw(pool, SamplerSpec(size=99, positive_fraction=1.0)), truth, 5)
    assert chosen.image.tolist() == [0] * 5 + [1] * 3
    gt = [-1, -1, -1]
    assert chosen.cells.tolist() == [
        [*gt, 0], [*gt, 1], cells[0, 0].tolist(), cells[0, 2].tolist(), cells[0, 1].tolist(),
        [*gt, 0], cells[1, 1].tolist(), cells[1, 0].tolist(),
    ]  # fmt: skip
    assert chosen.labels.tolist() == [2, 0, 2, 0, 5, 1, 1, 5]
    assert chosen.from_proposal.tolist() == [False, False, True, True, True, False, True, True]
    torch.testing.assert_close(chosen.targets[3], boxes[0, 1])
    torch.testing.assert_close(chosen.targets[4], chosen.boxes[4])


def test_flatten_reads_real_rows_in_order() -> None:
    boxes = torch.arange(24.0).reshape(2, 3, 4)
    valid = torch.tensor([[True, False, False], [True, True, False]])
    rows, image = flatten(Proposals(boxes, torch.zeros(2, 3), torch.zeros(2, 3, 4, dtype=torch.int64), valid))
    assert image.tolist() == [0, 1, 1]
    assert rows.tolist() == [boxes[0, 0].tolist(), boxes[1, 0].tolist(), boxes[1, 1].tolist()]
