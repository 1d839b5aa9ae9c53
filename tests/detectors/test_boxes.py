import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from headkd_ray.detectors.ops.boxes import clip, decode, encode, exceeds, pairwise_iou

ROI_STDS = (0.1, 0.1, 0.2, 0.2)
sides = st.floats(1, 500)
corners = st.floats(-100, 1000)


@st.composite
def boxes(draw: st.DrawFn) -> list[float]:
    x, y, w, h = draw(corners), draw(corners), draw(sides), draw(sides)
    return [x, y, x + w, y + h]


def iou_by_hand(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (both - width * height)


@given(st.lists(boxes(), min_size=1, max_size=4), st.lists(boxes(), min_size=1, max_size=4))
def test_iou_is_the_textbook_formula(first: list[list[float]], second: list[list[float]]) -> None:
    iou = pairwise_iou(torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64))
    expected = torch.tensor([[iou_by_hand(a, b) for b in second] for a in first], dtype=torch.float64)
    torch.testing.assert_close(iou, expected, rtol=1e-9, atol=1e-12)
    assert (iou >= 0).all()
    assert (iou <= 1 + 1e-9).all()


@given(boxes())
def test_a_box_overlaps_itself_fully_and_an_empty_one_not_at_all(box: list[float]) -> None:
    mine = torch.tensor([box], dtype=torch.float64)
    empty = torch.tensor([[box[0], box[1], box[0], box[1]]], dtype=torch.float64)
    torch.testing.assert_close(pairwise_iou(mine, mine), torch.ones(1, 1, dtype=torch.float64))
    assert pairwise_iou(mine, empty).item() == 0
    assert pairwise_iou(empty, empty).item() == 0


def test_iou_broadcasts_over_images() -> None:
    torch.manual_seed(0)
    anchors = torch.rand(5, 4).cumsum(1)
    truth = torch.rand(3, 2, 4).cumsum(2)
    batched = pairwise_iou(anchors, truth)
    assert batched.shape == (3, 5, 2)
    for i in range(3):
        torch.testing.assert_close(batched[i], pairwise_iou(anchors, truth[i]))


@given(boxes(), boxes(), st.sampled_from([(1.0, 1.0, 1.0, 1.0), ROI_STDS]))
def test_decode_undoes_encode(box: list[float], reference: list[float], stds: tuple[float, float, float, float]) -> None:
    sizes = [(box[2] - box[0]) / (reference[2] - reference[0]), (box[3] - box[1]) / (reference[3] - reference[1])]
    if any(abs(math.log(s)) > math.log(1000 / 16) for s in sizes):
        return  # beyond what decode allows
    target, source = (torch.tensor([b], dtype=torch.float64) for b in (box, reference))
    torch.testing.assert_close(decode(encode(target, source, stds), source, stds), target, rtol=1e-9, atol=1e-6)


def test_encode_is_the_paper_formula() -> None:
    deltas = encode(torch.tensor([[10.0, 20, 50, 100]]), torch.tensor([[0.0, 0, 20, 40]]), ROI_STDS)
    expected = [(30 - 10) / 20 / 0.1, (60 - 20) / 40 / 0.1, math.log(40 / 20) / 0.2, math.log(80 / 40) / 0.2]
    torch.testing.assert_close(deltas, torch.tensor([expected]))


def test_decode_clamps_growth_always_and_shrinking_on_request() -> None:
    reference, deltas = torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([[0.0, 0, 9, -9]])
    clamped = decode(deltas, reference)
    torch.testing.assert_close(clamped[0, 2:] - clamped[0, :2], torch.tensor([1000.0, 16 * 16 / 1000]))
    free = decode(deltas, reference, clamp_shrink=False)
    torch.testing.assert_close(free[0, 3] - free[0, 1], torch.tensor(16 * math.exp(-9)), rtol=1e-2, atol=1e-6)


def test_clip_cuts_each_image_to_its_own_size() -> None:
    boxes = torch.tensor([[-5.0, -5, 200, 200]]).expand(2, 1, 4)
    clipped = clip(boxes, torch.tensor([[50, 100], [80, 30]]))
    assert clipped.tolist() == [[[0, 0, 100, 50]], [[0, 0, 30, 80]]]


def test_exceeds_is_strict() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 5], [0, 0, 1, 5], [0, 0, 2, 5]])
    assert exceeds(boxes, 0.0).tolist() == [False, True, True]
    assert exceeds(boxes, 1.0).tolist() == [False, False, True]
    assert exceeds(boxes, None).all()
