"""Soft targets of a batch are made from those of its views, and split again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from headkd_ray.data.batch import Batch, collate
from headkd_ray.soft_targets import SoftTargets, ViewTargets, stack
from tests.teacher.files import BUDGET, LAYERS, WIDTH, drawn
from tests.teacher.micro import PAD, examples

COUNTS = (BUDGET, 2, 0)


@pytest.fixture
def views() -> list[ViewTargets]:
    return [drawn(count, seed=count) for count in COUNTS]


def assert_holds(targets: SoftTargets, views: list[ViewTargets]) -> None:
    assert targets.valid.sum(1).tolist() == [len(view.boxes) for view in views]
    for row, view in enumerate(views):
        kept = targets.valid[row]
        own = targets.boxes[row][kept], targets.truth[row][kept], targets.taps[row][:, kept]
        for one, other in zip(own, (view.boxes, view.truth, view.taps), strict=True):
            assert one.numpy().dtype == other.dtype and np.array_equal(one, other)


def test_stack_pads_to_the_budget(views: list[ViewTargets]) -> None:
    targets = stack(views, BUDGET)
    assert targets.boxes.shape == (3, BUDGET, 4) and targets.taps.shape == (3, LAYERS, BUDGET, WIDTH)
    assert_holds(targets, views)
    assert not any(t[~targets.valid].any() for t in (targets.boxes, targets.truth, targets.taps.transpose(1, 2)))
    assert not any(tensor.any() for tensor in stack(views[2:], BUDGET))


def test_a_batch_has_targets_if_all_its_views_have(views: list[ViewTargets]) -> None:
    some = [replace(example, targets=view) for example, view in zip(examples(), views, strict=False)]
    batch = collate(some, step=0, pad=PAD, budget=BUDGET)
    assert batch.targets is not None
    assert_holds(batch.targets, views)
    moved: Batch = batch.to("meta")
    assert moved.targets is not None and {tensor.device.type for tensor in moved.targets} == {"meta"}
    assert collate([*some, examples()[3]], step=0, pad=PAD, budget=BUDGET).targets is None
    assert collate(examples(), step=0, pad=PAD).to("cpu").targets is None


def test_map_reaches_every_tensor(views: list[ViewTargets]) -> None:
    targets = stack(views, BUDGET)
    assert all(torch.equal(one[:2], other) for one, other in zip(targets, targets.map(lambda t: t[:2]), strict=True))
