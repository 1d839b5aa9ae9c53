import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headkd_ray.detectors import GroundTruth
from headkd_ray.detectors.ops.boxes import pairwise_iou
from headkd_ray.detectors.ops.matching import IGNORED, NEGATIVE, gather_rows, match

SIZES = torch.tensor([[64, 96], [64, 96]])
"""Image sizes, which matching does not read."""


def one_by_one(iou: torch.Tensor, positive: float, negative: float, low_quality: float | None, valid: list[bool]) -> list[int]:
    """Apply the assigner's rules to one box and one ground-truth box at a time; ``iou`` is (N, G), and G may be 0."""
    boxes, truths = iou.shape
    result = [IGNORED] * boxes
    for n in range(boxes):
        if not valid[n]:
            continue
        best = max((float(iou[n, g]), -g) for g in range(truths)) if truths else (-1.0, 0)
        if best[0] < negative:
            result[n] = NEGATIVE
        if truths and best[0] >= positive:
            result[n] = -best[1]
    if low_quality is not None:
        for g in range(truths):
            candidates = [float(iou[n, g]) for n in range(boxes) if valid[n]]
            if candidates and max(candidates) >= low_quality:
                for n in range(boxes):
                    if valid[n] and float(iou[n, g]) == max(candidates):
                        result[n] = g
    return result


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.lists(st.integers(0, 4), min_size=1, max_size=3), st.booleans())
def test_a_batch_is_matched_like_one_by_one(seed: int, boxes: int, truths: list[int], low_quality: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        corner = torch.randint(0, 6, (*shape, 2), generator=generator).float()  # a coarse lattice, so that IoUs tie
        return torch.cat([corner, corner + torch.randint(1, 5, (*shape, 2), generator=generator)], dim=-1)

    batch, most = len(truths), max(truths)
    anchors, truth_boxes = draw(boxes), draw(batch, most)
    labels = torch.tensor([[0] * n + [-1] * (most - n) for n in truths]).reshape(batch, most)
    valid = torch.rand(batch, boxes, generator=generator) < 0.8
    low = 0.3 if low_quality else None
    ours = match(anchors, GroundTruth.of(truth_boxes, labels, SIZES), 0.5, 0.4, low, valid)
    for i, n in enumerate(truths):
        iou = pairwise_iou(anchors, truth_boxes[i, :n])
        assert ours[i].tolist() == one_by_one(iou, 0.5, 0.4, low, valid[i].tolist())


def test_the_last_truth_wins_a_contested_low_quality_match() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    truth = GroundTruth.of(torch.tensor([[[0.0, 0, 2, 2], [0, 0, 3, 3]]]), torch.tensor([[5, 6]]), SIZES[:1])
    assert match(anchors, truth, 0.5, 0.4, 0.0).tolist() == [[1]]
    assert match(anchors, truth, 0.5, 0.4, None).tolist() == [[NEGATIVE]]


def test_a_batch_without_truth_is_all_background() -> None:
    truth = GroundTruth.of(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), SIZES)
    matched = match(torch.tensor([[0.0, 0, 4, 4]]), truth, 0.5, 0.4, 0.0)
    assert matched.tolist() == [[NEGATIVE], [NEGATIVE]]


def test_gather_rows_reads_row_0_for_negatives() -> None:
    table = torch.arange(12).reshape(2, 3, 2)
    rows = gather_rows(table, torch.tensor([[2, -1], [0, 1]]))
    assert rows.tolist() == [[[4, 5], [0, 1]], [[6, 7], [8, 9]]]
    assert gather_rows(table[..., 0], torch.tensor([[1], [-2]])).tolist() == [[2], [6]]
