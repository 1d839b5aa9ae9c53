import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

from headkd_ray.detectors.ops import nms as module
from headkd_ray.detectors.ops.nms import grouped_nms, nms_mask, pack


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


COUNTS = [40, 0, 17, 1]


def tables(seed: int, whole: bool) -> torch.Tensor:
    """Return boxes (2, 58, 4), best first within each of COUNTS; ``whole`` coordinates make many IoUs equal a threshold."""
    boxes = torch.cat([scene(seed + image, sum(COUNTS), 1)[0] for image in (0, 1)]).view(2, -1, 4)
    boxes = boxes.round() if whole else boxes
    boxes[0, 3] = 0  # without area
    return boxes


@pytest.mark.parametrize("iou", [0.0, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("whole", [True, False])
def test_the_mask_is_each_group_s_own_nms(whole: bool, iou: float) -> None:
    for seed in range(0, 20, 2):
        boxes = tables(seed, whole)
        mask = nms_mask(boxes, COUNTS, iou)
        for own, kept in zip(boxes, mask, strict=True):
            for group, kept_of_group in zip(own.split(COUNTS), kept.split(COUNTS), strict=True):
                expected = nms(group, torch.arange(len(group), 0.0, -1), iou)
                assert kept_of_group.nonzero().squeeze(1).tolist() == expected.tolist()


def test_without_triton_the_gpu_keeps_the_same_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "headkd_ray.detectors.ops.nms_kernel", None)
    module._kernel.cache_clear()
    boxes = tables(3, whole=False)
    with pytest.warns(UserWarning, match=r"Triton cannot run the NMS kernel on cpu \(.+\). Training goes on"):
        mask = module._nms_mask_on_gpu(boxes, COUNTS, 0.5)
    assert torch.equal(mask, nms_mask(boxes, COUNTS, 0.5))
    module._kernel.cache_clear()


INTERPRETED = """
import sys, torch
from headkd_ray.detectors.ops.nms_kernel import greedy_nms
boxes, iou = torch.load(sys.argv[1])
torch.save(greedy_nms(boxes, iou), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("whole", "iou"), [(True, 0.6), (False, 0.7)])
def test_the_gpu_s_kernel_keeps_the_same_boxes(whole: bool, iou: float, tmp_path: Path) -> None:
    """It runs on the CPU, in Triton's interpreter, which has to be chosen before anything imports Triton."""
    pytest.importorskip("triton", reason="torch brings Triton on Linux alone")
    boxes = tables(5, whole)
    torch.save((boxes, iou), tmp_path / "boxes.pt")
    command = [sys.executable, "-c", INTERPRETED, tmp_path / "boxes.pt", tmp_path / "mask.pt"]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert torch.equal(torch.load(tmp_path / "mask.pt"), nms_mask(boxes, [boxes.shape[1]], iou))


@pytest.mark.slow
def test_the_gpu_s_kernel_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For GPUs that are in use, none of which is needed; IoUs are rounded as on the CPU, without fused multiply-adds."""
    pytest.importorskip("triton", reason="torch brings Triton on Linux alone")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from headkd_ray.detectors.ops.nms_kernel import OPTIONS, _greedy

    types = {"boxes": "*fp32", "keep": "*i8", "count": "i32", "iou": "fp32", "width": "constexpr"}
    for capability in (80, 90, 100):
        source = ASTSource(_greedy, types, {(4,): 2048})
        made = compiled(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8, **OPTIONS})
        assert len(made.asm["cubin"]) > 0
        assert "fma" not in made.asm["ptx"] and "div.rn" in made.asm["ptx"]
