"""Pseudo labels count by their weight, and images about which nothing is known change no loss of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headkd_ray.detectors import GroundTruth, PyramidDetector, build_detector
from headkd_ray.detectors.base import Losses
from headkd_ray.detectors.ops.matching import IGNORED, NEGATIVE, match, row_weights
from tests.detectors.micro import SPECS, batch, liven

KINDS = sorted(SPECS)
KNOWN, UNKNOWN = True, False


def sampled_whole(kind: str) -> Any:
    """Return the micro spec of a kind that samples nothing."""
    spec = SPECS[kind]()
    keys = {"faster_rcnn": ("rpn.sampler", "roi.sampler"), "cascade_rcnn": ("rpn.sampler", "roi.sampler")}.get(kind, ())
    return spec.replace({f"{key}.size": 5000 for key in keys} | {f"{key}.positive_fraction": 1.0 for key in keys})


@pytest.fixture(scope="module", params=KINDS)
def losses_of(request: pytest.FixtureRequest) -> Callable[[GroundTruth], Losses]:
    """Return a function that computes a detector's losses on the features of the drawn batch, as many as there is truth."""
    torch.manual_seed(0)
    detector = build_detector(sampled_whole(request.param), 3)
    liven(detector)
    assert isinstance(detector, PyramidDetector)
    data = batch()
    with torch.no_grad():
        features = detector.eval().features(detector.normalise(data["images"], data["sizes"]))
    detector.train().requires_grad_(False)
    return lambda truth: detector.losses([level[: len(truth.labels)] for level in features], truth)


def truth_of(count: int, weights: Tensor | None = None, background: list[bool] | None = None) -> GroundTruth:
    data = batch()
    boxes, labels, sizes = (data[name][:count] for name in ("boxes", "labels", "sizes"))
    return GroundTruth.of(boxes, labels, sizes, weights, None if background is None else torch.tensor(background))


def test_unlabelled_images_change_no_loss_of_the_others(losses_of: Callable[[GroundTruth], Losses]) -> None:
    """Neither their background nor their number counts: the third image has no box, and is no negative example."""
    alone, beside = losses_of(truth_of(2)), losses_of(truth_of(3, background=[KNOWN, KNOWN, UNKNOWN]))
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-6)
    labelled = losses_of(truth_of(3))
    assert any(not torch.allclose(labelled[name], alone[name]) for name in alone), "a labelled one is"


def test_images_of_which_nothing_is_known_give_no_loss(losses_of: Callable[[GroundTruth], Losses]) -> None:
    data = batch()
    nothing = GroundTruth.of(data["boxes"] * 0, data["labels"] * 0 - 1, data["sizes"], None, torch.zeros(3, dtype=torch.bool))
    ignored = truth_of(3, torch.zeros(3, 2), [UNKNOWN] * 3)
    for truth in (nothing, ignored):
        assert {float(loss) for loss in losses_of(truth).values()} == {0.0}


def test_losses_are_proportional_to_the_weight_of_a_pseudo_label(losses_of: Callable[[GroundTruth], Losses]) -> None:
    """The divisors count boxes, whatever their weights are: what is less sure teaches less."""
    whole = losses_of(truth_of(2, torch.ones(2, 2), [UNKNOWN] * 2))
    quarter = losses_of(truth_of(2, torch.full((2, 2), 0.25), [UNKNOWN] * 2))
    torch.testing.assert_close(quarter, {name: loss * 0.25 for name, loss in whole.items()}, rtol=1e-5, atol=1e-7)
    assert all(float(loss) > 0 for loss in whole.values())


def test_what_an_ignored_box_covers_is_not_background() -> None:
    """Nor does it take what is left over: a box that matches it only as its best one stays what it is."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30]]])
    anchors = torch.tensor([[0.0, 0, 10, 9], [20, 20, 30, 29], [20, 20, 30, 23], [50, 50, 60, 60]])
    truth = GroundTruth.of(boxes, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[64, 64]]), torch.tensor([[0.6, 0.0]]))
    matched = match(anchors, truth, 0.5, 0.4, 0.0)
    assert matched.tolist() == [[0, IGNORED, NEGATIVE, NEGATIVE]]
    assert row_weights(matched, truth).tolist() == [[pytest.approx(0.6), 0, 1, 1]]
    unknown = truth._replace(background=torch.tensor([False]))
    assert match(anchors, unknown, 0.5, 0.4, 0.0).tolist() == [[0, IGNORED, IGNORED, IGNORED]]
    assert match(anchors[2:], truth, 0.5, 0.4, 0.1).tolist() == [[NEGATIVE, NEGATIVE]]
    both = truth._replace(weights=torch.ones(1, 2))
    assert match(anchors[2:], both, 0.5, 0.4, 0.1).tolist() == [[1, NEGATIVE]]
