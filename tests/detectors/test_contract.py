"""Every kind in the registry keeps the contract of ``detectors/base.py``; the same tests run over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headkd_ray.detectors import (
    KINDS,
    DenseDetector,
    DenseHead,
    Detector,
    PyramidDetector,
    RoIHead,
    TwoStageDetector,
    build_detector,
    head_class,
    weigh_classes,
)
from headkd_ray.detectors.ops.matching import gather_rows
from headkd_ray.detectors.ops.proposals import flatten_cells
from headkd_ray.detectors.weights import load_detector, save_detector
from headkd_ray.job import SPECS as JOB_SPECS
from tests.detectors.micro import ALL_SPECS, SPECS, batch, liven, truth_of

CLASSES = 3
NAMES = [kind.spec.model_fields["kind"].default for kind in KINDS]
PYRAMID, DENSE = (
    [name for name, kind in zip(NAMES, KINDS, strict=True) if issubclass(kind.detector, family)]
    for family in (PyramidDetector, DenseDetector)
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def detector_of(name: str) -> Detector:
    torch.manual_seed(0)
    detector = build_detector(ALL_SPECS[name](), CLASSES)
    liven(detector)
    return detector


def pyramid(detector: Detector) -> list[Tensor]:
    data = batch()
    assert isinstance(detector, PyramidDetector)
    with torch.no_grad():
        return detector.features(detector.normalise(data["images"], data["sizes"]))


def head_of(name: str) -> tuple[DenseHead[Any], list[Tensor]]:
    detector = detector_of(name).eval()
    assert isinstance(detector, DenseDetector)
    return detector.head, pyramid(detector)


def test_the_registry_and_the_job_file_know_the_same_kinds() -> None:
    assert NAMES == list(JOB_SPECS) and set(NAMES) == set(ALL_SPECS) and set(PYRAMID) == set(SPECS)
    for name, kind in zip(NAMES, KINDS, strict=True):
        detector = detector_of(name)
        assert type(detector) is kind.detector and JOB_SPECS[name] is kind.spec
        if kind.head_spec is None:
            assert name not in PYRAMID
            continue
        assert isinstance(detector, DenseDetector | TwoStageDetector) and issubclass(kind.detector, type(detector))
        assert type(detector.detection_head) is head_class(detector.detection_head.spec) is kind.detector.head_class
        assert type(detector.detection_head.spec) is kind.head_spec


@pytest.mark.parametrize("name", PYRAMID)
def test_a_pyramid_has_the_strides_that_it_states(name: str) -> None:
    detector = detector_of(name)
    assert isinstance(detector, PyramidDetector)
    for level, stride in zip(pyramid(detector), detector.strides, strict=True):
        assert level.shape == (3, detector.spec.neck.channels, -(-64 // stride), -(-96 // stride))


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_head_answers_for_every_cell_and_its_taps_are_what_distillation_reads(name: str) -> None:
    head, features = head_of(name)
    outputs, alone = head(features), head.taps(features)
    assert len(outputs.taps) == len(alone) == len(head.tap_channels) and head.lead_channels == head.tap_channels[0]
    per_cell = head.anchors.per_cell
    for level, feature in enumerate(features):
        shape = feature.shape[-2:]
        assert outputs.logits[level].shape == (3, per_cell * CLASSES, *shape)
        assert head.box_maps(outputs)[level].shape == (3, per_cell * 4, *shape)
        for tap, again, width in zip(outputs.taps, alone, head.tap_channels, strict=True):
            assert tap[level].shape == (3, width, *shape) and (tap[level] >= 0).all()
            assert torch.equal(tap[level], again[level])


@pytest.mark.parametrize("name", DENSE)
def test_a_proposal_is_the_box_of_its_cell(name: str) -> None:
    """Level, y, x and anchor of each proposal lead back to its clipped box and to the score of its likeliest class."""
    head, features = head_of(name)
    sizes = batch()["sizes"]
    with torch.no_grad():
        outputs = head(features)
        proposals = head.proposals(outputs, sizes)
        maps, logits = (flatten_cells(m, n) for m, n in ((head.box_maps(outputs), 4), (outputs.logits, CLASSES)))
        grid = head.anchors.grid(outputs.logits)
    assert proposals.valid.any(1).all() and proposals.boxes.dtype == torch.float32 and proposals.cells.dtype == torch.int64
    assert (proposals.cells[~proposals.valid] == -1).all() and (proposals.scores.diff() <= 0).all()
    levels, first = set(), 0
    for level, (count, (_, width)) in enumerate(zip(grid.counts, grid.shapes, strict=True)):
        own = proposals.valid & (proposals.cells[..., 0] == level)
        _, y, x, anchor = proposals.cells.unbind(-1)
        index = ((y * width + x) * head.anchors.per_cell + anchor).masked_fill(~own, 0)
        boxes = head.boxes_at(maps[level], index, grid.boxes[first : first + count])
        limit = sizes.flip(1).repeat(1, 2)[:, None].float()
        torch.testing.assert_close(proposals.boxes[own], torch.minimum(boxes.clamp(min=0), limit)[own])
        torch.testing.assert_close(proposals.scores[own], gather_rows(logits[level], index).amax(-1).sigmoid()[own])
        levels |= {level} if own.any() else set()
        first += count
    assert len(levels) >= 2


@pytest.mark.parametrize("name", DENSE)
def test_nearest_cells_are_cells_of_the_pyramid(name: str) -> None:
    head, features = head_of(name)
    outputs = head(features)
    generator = torch.Generator().manual_seed(0)
    corner, sides = torch.rand(200, 2, generator=generator) * 80, 2 ** (1 + 10 * torch.rand(200, 1, generator=generator))
    boxes = torch.cat([corner, corner + sides], dim=1)
    cells = head.nearest_cells(outputs, boxes)
    shapes = torch.tensor([(len(features), *f.shape[-2:], head.anchors.per_cell) for f in features])
    assert cells.shape == (200, 4) and cells.dtype == torch.int64 and len(cells[:, 0].unique()) >= 3
    assert (cells >= 0).all() and (cells < shapes[cells[:, 0]]).all()
    assert head.nearest_cells(outputs, boxes[:0]).shape == (0, 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_scalars_on_the_detector_s_device_and_reach_every_parameter(name: str, device: str) -> None:
    detector = detector_of(name).to(device).train()
    data = {key: value.to(device) for key, value in batch().items()}
    for objects in (True, False):
        if not objects:
            data |= {"boxes": data["boxes"][:, :0], "labels": data["labels"][:, :0]}
        x = detector.normalise(data["images"], data["sizes"])
        losses = detector.supervised(x, truth_of(data), torch.Generator(device).manual_seed(0))
        assert all(name.startswith("loss_") and loss.shape == () for name, loss in losses.items())
        assert {(loss.dtype, loss.device.type) for loss in losses.values()} == {(torch.float32, device)}
        detector.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        free = [(n, p) for n, p in detector.named_parameters() if p.requires_grad]
        assert free and [n for n, p in free if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_head_keeps_to_its_device(name: str) -> None:
    """On the meta device a tensor left on the CPU is an error."""
    head, features = head_of(name)
    head.to("meta")
    data = {key: value.to("meta") for key, value in batch().items()}
    losses = head.losses(head([feature.to("meta") for feature in features]), truth_of(data))
    assert {loss.device.type for loss in losses.values()} == {"meta"}


@pytest.mark.parametrize("name", [name for name in PYRAMID if name not in DENSE])
def test_each_stage_of_a_roi_head_has_the_taps_that_it_states(name: str) -> None:
    detector = detector_of(name)
    assert isinstance(detector, TwoStageDetector)
    head = detector.detection_head
    assert isinstance(head, RoIHead)
    features, boxes, image = pyramid(detector), torch.rand(5, 4).cumsum(1) * 20, torch.zeros(5, dtype=torch.int64)
    taps = [tap for stage in head.stages for tap in stage(features, boxes, image).taps]
    assert [tap.shape for tap in taps] == [(5, width) for width in head.tap_channels]
    assert head.lead_channels == head.stages[0].fc_widths[-1]


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_the_generator(name: str) -> None:
    """The default generator is neither read nor changed, so that a golden file's samples can be drawn again."""
    detector, data = detector_of(name).train(), batch()
    x = detector.normalise(data["images"], data["sizes"])
    losses = []
    for default in (1, 2):
        torch.manual_seed(default)
        before = torch.get_rng_state()
        losses.append(detector.supervised(x, truth_of(data), torch.Generator().manual_seed(0)))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


@pytest.mark.parametrize("name", PYRAMID)
def test_class_weights_reach_the_classification_loss_alone_and_no_checkpoint(name: str) -> None:
    detector, data = detector_of(name).train(), batch()
    x, truth, tensors = detector.normalise(data["images"], data["sizes"]), truth_of(data), set(detector.state_dict())

    def losses(*weights: float) -> dict[str, Tensor]:
        if weights:
            weigh_classes(detector, weights)
        return detector.supervised(x, truth, torch.Generator().manual_seed(0))

    plain, ones, other = losses(), losses(1, 1, 1), losses(0.5, 2, 3)
    assert all(torch.equal(plain[name], ones[name]) for name in plain)
    changed = {name for name in plain if not torch.equal(plain[name], other[name])}
    assert changed == {name for name in plain if name.endswith("_cls") and "rpn" not in name}
    assert set(detector.state_dict()) == tensors


@pytest.mark.parametrize("name", NAMES)
def test_detections_keep_the_rules_and_lie_in_their_images(name: str) -> None:
    detector, data = detector_of(name).eval(), batch()
    found = detector(data["images"], data["sizes"])
    real = found.labels >= 0
    assert real.any(1).all() and (found.scores[real] > detector.rules.score).all() and (found.scores[~real] == 0).all()
    assert real.sum(1).max() <= detector.rules.max_detections and (found.scores.diff() <= 0).all()
    assert (found.boxes >= 0).all() and (found.boxes <= data["sizes"].flip(1).repeat(1, 2)[:, None]).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_backbone_can_be_told_apart(name: str) -> None:
    detector = detector_of(name)
    own, whole = {id(p) for p in detector.backbone_parameters()}, [id(p) for p in detector.parameters()]
    assert 0 < len(own) < len(whole) and own < set(whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_round_trip_detects_the_same(name: str, tmp_path: Path) -> None:
    detector, data = detector_of(name).eval(), batch()
    save_detector(tmp_path, detector, [f"class {i}" for i in range(CLASSES)])
    loaded = load_detector(tmp_path).detector.eval()
    assert loaded.spec == detector.spec
    for one, other in zip(detector(data["images"], data["sizes"]), loaded(data["images"], data["sizes"]), strict=True):
        assert torch.equal(one, other)
