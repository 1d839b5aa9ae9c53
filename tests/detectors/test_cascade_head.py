"""The cascade agrees with plain loops in float64 written from the paper alone: refine, match, weigh, average."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from headkd_ray.detectors import CascadeHead, GroundTruth, Proposals, RoIs, StageOutput
from headkd_ray.detectors.cascade_rcnn import refine
from headkd_ray.detectors.ops.rois import sample_rois
from headkd_ray.job import CascadeHeadSpec

STRIDES = (8, 16, 32, 64)
CLASSES = 3
SIZES = torch.tensor([[200, 256], [256, 180]])
IOUS = (0.5, 0.6, 0.7)
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
ALL = {"size": 999, "positive_fraction": 1.0}

Box = list[float]


def cascade(**keys: Any) -> CascadeHead:
    """Return a head that moves boxes by a good part of their sides and has a clear favourite class for each RoI."""
    torch.manual_seed(1)
    head = CascadeHead(CascadeHeadSpec.model_validate({"fc_channels": 12, "pool": 3, **keys}), 4, CLASSES, STRIDES)
    with torch.no_grad():
        for stage in head.stages:
            stage.box_out.weight.normal_(0, 0.6)
            stage.cls_out.weight.normal_(0, 1.5)
    return head


def drawn() -> tuple[list[Tensor], GroundTruth, Proposals]:
    """Return the pyramid of two images, the second with one object of three, and proposals around objects and elsewhere."""
    torch.manual_seed(0)
    features = [torch.randn(2, 4, 256 // s, 256 // s) for s in STRIDES]
    corner = torch.rand(2, 3, 2) * 100
    boxes = torch.cat([corner, corner + 30 + torch.rand(2, 3, 2) * 50], dim=2)
    truth = GroundTruth.of(boxes, torch.tensor([[0, 2, 1], [1, -1, -1]]), SIZES)
    near = boxes.repeat(1, 8, 1) + torch.randn(2, 24, 4) * 5
    corner = torch.rand(2, 12, 2) * 120
    far = torch.cat([corner, corner + 4 + torch.rand(2, 12, 2) * 60], dim=2)
    proposed = torch.cat([near, far], dim=1)
    cells = torch.arange(2 * 36 * 4).reshape(2, 36, 4)
    valid = torch.ones(2, 36, dtype=torch.bool)
    valid[1, 30:] = False
    return features, truth, Proposals(proposed, torch.ones(2, 36), cells.masked_fill(~valid.unsqueeze(-1), -1), valid)


def outputs_of(head: CascadeHead, seed: int = 0) -> tuple[list[StageOutput], list[Tensor], GroundTruth]:
    features, truth, proposals = drawn()
    generator = torch.Generator().manual_seed(seed)
    rois = sample_rois(proposals, truth, head.stages[0].spec, CLASSES, generator)
    return head.stage_outputs(features, rois, truth, generator), features, truth


def overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0.0) * max(height, 0.0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def shifted(box: Box, deltas: Box, stds: tuple[float, ...], size: Box) -> Box:
    """Return ``box`` moved by ``deltas`` and clipped to an image of ``size`` (h, w)."""
    w, h = box[2] - box[0], box[3] - box[1]
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas, stds, strict=True))
    x, y = box[0] + w / 2 + dx * w, box[1] + h / 2 + dy * h
    limit = math.log(1000 / 16)
    w, h = w * math.exp(min(max(dw, -limit), limit)), h * math.exp(min(max(dh, -limit), limit))
    return [min(max(side, 0.0), size[(i + 1) % 2]) for i, side in enumerate((x - w / 2, y - h / 2, x + w / 2, y + h / 2))]


def wanted_deltas(box: Box, target: Box, stds: tuple[float, ...]) -> Box:
    w, h, tw, th = box[2] - box[0], box[3] - box[1], target[2] - target[0], target[3] - target[1]
    shift = ((target[0] + tw / 2 - box[0] - w / 2) / w, (target[1] + th / 2 - box[1] - h / 2) / h)
    return [d / std for d, std in zip((*shift, math.log(tw / w), math.log(th / h)), stds, strict=True)]


def next_rois(output: StageOutput, stage: int, agnostic: bool, truth: GroundTruth) -> list[dict[str, Any]]:
    """Return what the stage after ``stage`` must see if all are sampled, row by row and image by image."""
    rois, rows = output.rois, []
    for i in range(2):
        objects = [
            (box, label) for box, label in zip(truth.boxes[i].tolist(), truth.labels[i].tolist(), strict=True) if label >= 0
        ]
        pool = [
            {"image": i, "box": box, "cell": [-1, -1, -1, g], "label": label, "target": box}
            for g, (box, label) in enumerate(objects)
        ]
        for n in range(len(rois.boxes)):
            if int(rois.image[n]) != i or int(rois.cells[n, 0]) < 0:
                continue
            label = int(rois.labels[n])
            if label == CLASSES:
                label = max(range(CLASSES), key=output.outputs.logits[n].tolist().__getitem__)
            deltas = output.outputs.deltas[n, 0 if agnostic else label].tolist()
            box = shifted(rois.boxes[n].tolist(), deltas, STDS[stage], SIZES[i].tolist())
            ious = [overlap(box, target) for target, _ in objects]
            best = max(range(len(ious)), key=ious.__getitem__)
            row = {"image": i, "box": box, "cell": rois.cells[n].tolist(), "label": CLASSES, "target": box}
            if ious[best] >= IOUS[stage + 1]:
                row |= {"label": objects[best][1], "target": objects[best][0]}
            pool.append(row)
        rows += [row for row in pool if row["label"] < CLASSES] + [row for row in pool if row["label"] == CLASSES]
    return rows


@pytest.mark.parametrize("agnostic", [True, False])
def test_each_stage_sees_what_the_one_before_refined(agnostic: bool) -> None:
    head = cascade(class_agnostic=agnostic, sampler=ALL)
    outputs, features, truth = outputs_of(head)
    assert len(outputs) == len(head.stages) == 3
    moves, matches = [], []
    for stage in range(2):
        rois, rows = outputs[stage + 1].rois, next_rois(outputs[stage], stage, agnostic, truth)
        assert rois.image.tolist() == [row["image"] for row in rows]
        assert rois.cells.tolist() == [row["cell"] for row in rows]
        assert rois.labels.tolist() == [row["label"] for row in rows]
        torch.testing.assert_close(
            rois.boxes.double(), torch.tensor([row["box"] for row in rows]).double(), rtol=1e-5, atol=1e-3
        )
        wanted = torch.tensor([row["target"] for row in rows]).double()
        torch.testing.assert_close(rois.targets.double(), wanted, rtol=1e-5, atol=1e-3)
        assert rois.from_proposal.sum() == outputs[0].rois.from_proposal.sum() == 66, "all but the 4 objects survive"
        assert (~rois.from_proposal).sum() == 4
        before = {
            tuple(cell): box for cell, box in zip(outputs[stage].rois.cells.tolist(), outputs[stage].rois.boxes, strict=True)
        }
        kept = rois.from_proposal
        old = torch.stack([before[tuple(cell)] for cell in rois.cells[kept].tolist()])
        moves.append((rois.boxes[kept] - old).abs().mean())
        matches.append((rois.from_proposal & (rois.labels < CLASSES)).sum())
    assert min(moves) > 0.5 and min(matches) > 0, "the test would not see a cascade that stands still"
    for stage, output in zip(head.stages, outputs, strict=True):
        outputs = stage(features, output.rois.boxes, output.rois.image)
        torch.testing.assert_close(outputs.logits, output.outputs.logits)
        torch.testing.assert_close(outputs.deltas, output.outputs.deltas)


@pytest.mark.parametrize("agnostic", [True, False])
def test_losses_in_float64(agnostic: bool) -> None:
    head = cascade(class_agnostic=agnostic, sampler={"size": 24, "positive_fraction": 0.5})
    outputs, _, _ = outputs_of(head)
    losses = {name: loss.item() for name, loss in head.losses(outputs).items()}
    assert list(losses) == ["s0_cls", "s0_box", "s1_cls", "s1_box", "s2_cls", "s2_box"]
    for stage, (output, weight) in enumerate(zip(outputs, (1.0, 0.5, 0.25), strict=True)):
        cls, box, count = 0.0, 0.0, len(output.rois.labels)
        assert 40 < count <= 48
        for n, label in enumerate(output.rois.labels.tolist()):
            cls -= float(output.outputs.logits[n].detach().double().log_softmax(0)[label])
            if label == CLASSES:
                continue
            wanted = wanted_deltas(output.rois.boxes[n].tolist(), output.rois.targets[n].tolist(), STDS[stage])
            for said, d in zip(output.outputs.deltas[n, 0 if agnostic else label].tolist(), wanted, strict=True):
                off = abs(said - d)
                box += 0.5 * off * off if off < 1 else off - 0.5
        assert losses[f"s{stage}_cls"] == pytest.approx(weight * cls / count, rel=1e-5)
        assert losses[f"s{stage}_box"] == pytest.approx(weight * box / count, rel=1e-4)
        assert box > 0


@pytest.mark.parametrize("average", ["logits", "scores"])
@pytest.mark.parametrize("agnostic", [True, False])
def test_detections_by_hand(agnostic: bool, average: str) -> None:
    head = cascade(class_agnostic=agnostic, average=average, postprocess={"score": 0.15, "max_detections": 12}).eval()
    features, _, proposals = drawn()
    image, row = proposals.valid.nonzero(as_tuple=True)
    start = proposals.boxes[image, row]
    found = head.detect(features, start, image, SIZES)

    # Follow each stage: its scores for the boxes so far, and where its likeliest class moves them.
    boxes, logits = start.tolist(), []
    for stage, part in enumerate(head.stages):
        outputs = part(features, torch.tensor(boxes), image)
        logits.append(outputs.logits.double())
        deltas = outputs.deltas.tolist()
        if stage < 2:
            best = [0 if agnostic else max(range(CLASSES), key=said.__getitem__) for said in outputs.logits.tolist()]
            boxes = [shifted(box, deltas[n][best[n]], STDS[stage], SIZES[image[n]].tolist()) for n, box in enumerate(boxes)]
    if average == "logits":
        scores = (sum(logits) / 3).softmax(1).tolist()  # type: ignore[union-attr]
    else:
        scores = (sum(said.softmax(1) for said in logits) / 3).tolist()  # type: ignore[union-attr]
    for i in range(2):
        kept = []
        for c in range(CLASSES):
            rows = [n for n in range(len(boxes)) if image[n] == i and scores[n][c] > 0.15]
            last = [shifted(boxes[n], deltas[n][0 if agnostic else c], STDS[2], SIZES[i].tolist()) for n in rows]
            own = torch.tensor([scores[n][c] for n in rows], dtype=torch.float64)
            survivors = nms(torch.tensor(last, dtype=torch.float64).reshape(-1, 4), own, 0.5).tolist()
            kept += [(float(own[k]), c, last[k]) for k in survivors]
        kept = sorted(kept, key=lambda entry: -entry[0])[:12]
        real = found.labels[i] >= 0
        assert len(kept) > 6 and found.labels[i][real].tolist() == [c for _, c, _ in kept]
        torch.testing.assert_close(found.scores[i][real], torch.tensor([s for s, _, _ in kept]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.boxes[i][real], torch.tensor([b for _, _, b in kept]), rtol=1e-4, atol=1e-2)


def test_the_two_averages_differ() -> None:
    features, _, proposals = drawn()
    image, row = proposals.valid.nonzero(as_tuple=True)
    best = [
        cascade(average=average).detect(features, proposals.boxes[image, row], image, SIZES).scores[:, 0]
        for average in ("logits", "scores")
    ]
    assert not torch.isclose(*best).any()


def test_the_generator_decides_what_every_stage_samples() -> None:
    head = cascade(sampler={"size": 10, "positive_fraction": 0.5})
    one, again, other = (outputs_of(head, seed)[0] for seed in (1, 1, 2))
    for stage in range(3):
        assert torch.equal(one[stage].rois.boxes, again[stage].rois.boxes)
        assert torch.equal(one[stage].outputs.logits, again[stage].outputs.logits)
        assert one[stage].rois.cells.tolist() != other[stage].rois.cells.tolist()


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def rois_of(boxes: Tensor, image: Tensor) -> RoIs:
    """Return background RoIs, each from a cell of its own."""
    count = len(boxes)
    cells = torch.arange(4 * count).reshape(count, 4)
    return RoIs(boxes, image, cells, torch.full((count,), CLASSES), boxes, torch.ones(count))


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("rois", [True, False])
def test_no_rois_and_no_objects_give_finite_losses_and_gradients_everywhere(rois: bool, objects: bool) -> None:
    head = cascade()
    features, truth, proposals = drawn()
    features = [f.requires_grad_() for f in features]
    if not objects:
        truth = GroundTruth.of(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), SIZES)
    # The second image has no RoI either way.
    given = rois_of(proposals.boxes[0], torch.zeros(36, dtype=torch.int64))
    if not rois:
        given = RoIs(*(field[:0] for field in given))
    outputs = head.stage_outputs(features, given, truth)
    assert [len(output.rois.labels) for output in outputs] == [36 * rois, *[36 * rois + 4 * objects] * 2]
    losses = head.losses(outputs)
    total(losses).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (*features, *head.parameters()))
    if not rois and not objects:
        assert total(losses) == 0
    found = head.detect(features, given.boxes, given.image, SIZES)
    assert (found.labels[1] == -1).all() and (found.labels[0] >= 0).any() == rois


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_rois_moved_off_the_image_have_finite_losses_and_gradients(beta: float) -> None:
    head = cascade(box_beta=beta, sampler=ALL)
    with torch.no_grad():
        head.stages[0].box_out.weight.zero_()
        head.stages[0].box_out.bias[0] = 1000.0  # moves boxes to the right
    outputs, _, _ = outputs_of(head)
    moved = outputs[1].rois.boxes[outputs[1].rois.from_proposal]
    assert (moved[:, 0] == moved[:, 2]).all()
    total(head.losses(outputs)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_gradients_reach_every_stage_and_pass_between_none() -> None:
    head = cascade()
    outputs, _, _ = outputs_of(head)
    assert not any(output.rois.boxes.requires_grad for output in outputs)
    losses = head.losses(outputs)
    for i in range(3):
        own = losses[f"s{i}_cls"] + losses[f"s{i}_box"]
        for j, stage in enumerate(head.stages):
            gradients = torch.autograd.grad(own, list(stage.parameters()), retain_graph=True, allow_unused=True)
            assert all((gradient is not None and (gradient != 0).any()) == (i == j) for gradient in gradients)


def test_refined_rois_keep_their_cells_and_have_no_ground_truth_among_them() -> None:
    head = cascade()
    outputs, _, _ = outputs_of(head)
    rois = outputs[0].rois
    found = refine(head.stages[0], outputs[0], SIZES)
    for i in range(2):
        mine = rois.from_proposal & (rois.image == i)
        assert found.cells[i][found.valid[i]].tolist() == rois.cells[mine].tolist()
        assert (found.cells[i][~found.valid[i]] == -1).all()
    assert int(found.valid.sum()) == int(rois.from_proposal.sum()) < len(rois.boxes)


def test_the_official_cascade_is_the_default() -> None:
    spec = CascadeHeadSpec()
    assert [(s.positive_iou, s.stds) for s in spec.stages] == list(zip(IOUS, STDS, strict=True))
    assert spec.weights == (1, 0.5, 0.25)
    for stage in spec.stages:
        assert (stage.class_agnostic, stage.box_beta, stage.fcs, stage.fc_channels) == (True, 1.0, 2, 1024)
        assert (stage.sampler.size, stage.sampler.positive_fraction) == (512, 0.25)
