import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

from headkd_ray.detectors.ops import nms as module
from headkd_ray.detectors.ops.nms import grouped_nms, pack


def scene(seed: int, count: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 40], dim=1)
    return boxes, torch.rand(count, generator=generator), torch.randint(0, groups, (count,), generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 80), st.integers(1, 6))
def test_each_group_is_its_own_nms(seed: int, count: int, groups: int) -> None:
    boxes, scores, group = scene(seed, count, groups)
    kept = grouped_nms(boxes, scores, group, 0.5)
    expected = []
    for g in range(groups):
        own = (group == g).nonzero().squeeze(1)
        expected += own[nms(boxes[own], scores[own], 0.5)].tolist()
    assert sorted(kept.tolist()) == sorted(expected)
    assert (scores[kept].diff() <= 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 400))
def test_shared_calls_as_on_a_gpu_keep_the_same_boxes(seed: int, count: int) -> None:
    boxes, scores, group = scene(seed, count, 200)
    order = group.argsort(stable=True)
    shared = module._nms_call(boxes[order] + 1000, scores[order], group[order], 0.5, single=False)
    assert sorted(order[shared].tolist()) == sorted(grouped_nms(boxes + 1000, scores, group, 0.5).tolist())


def test_calls_are_merged_up_to_the_budget_and_never_split() -> None:
    assert module._call_sizes([3, 0, 4, 9, 2, 2], budget=7) == [7, 9, 4]
    assert module._call_sizes([3, 0, 4], budget=1) == [3, 4]


def test_pack_keeps_the_order_within_each_image() -> None:
    image = torch.tensor([2, 0, 2, 2, 0])
    values = torch.tensor([10.0, 20, 30, 40, 50])
    valid, tables = pack(image, 3, 2, {"value": (values, -1), "pair": (torch.stack([image, image], dim=1), 7)})
    assert valid.tolist() == [[True, True], [False, False], [True, True]]
    assert tables["value"].tolist() == [[20, 50], [-1, -1], [10, 30]]
    assert tables["pair"][1].tolist() == [[7, 7], [7, 7]]


def test_pack_of_nothing() -> None:
    valid, tables = pack(torch.zeros(0, dtype=torch.int64), 2, 5, {"box": (torch.zeros(0, 4), 0)})
    assert valid.shape == (2, 0)
    assert tables["box"].shape == (2, 0, 4)
