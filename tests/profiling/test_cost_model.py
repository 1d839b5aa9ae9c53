"""The plan's arithmetic agrees with calculations by hand and with laws that hold whatever is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headkd_ray.profiling.cost_model import Costs, Machine, Prices, Work, cache_bytes, plan
from headkd_ray.soft_targets import TopLogits, ViewTargets
from headkd_ray.teacher.cache_codec import Codec

COSTS = Costs(
    image_seconds=0.02,
    student_seconds=0.3,
    teacher_seconds=0.1,
    update_seconds=0.01,
    eval_seconds=0.05,
    pixel_bytes=6e6,
    answer_bytes=4e6,
    parameters=20_000_000,
    busy_cpus=1,
)
WORK = Work(
    images=1000,
    val_images=100,
    batch=2,
    accumulate=1,
    epochs=12,
    evaluations=12,
    placement="inline",
    data_cpus=2,
    gpus=1,
    cpus=3,
    teachers=1,
    teacher_gpus=0,
    teacher_cpus=0,
    on_ray=True,
    views=12,
    distinct=1000,
)
GBIT10 = 1.25e9
"""10 Gbit/s in bytes per second."""
OWN = Machine(cpus=64, workers=1)
"""Machines with one worker each and CPUs to spare."""


def test_one_worker_by_hand() -> None:
    one = plan(WORK, COSTS, Prices(gpu_hour=2.0, cpu_hour=0.1), workers=1, bandwidth=GBIT10, machine=OWN)
    assert one.steps == 500 * 12 and one.reduce_bytes == one.pool_bytes == one.build_hours == 0
    assert one.step_seconds == pytest.approx(0.3 + 0.1 + 0.01)
    assert one.images_per_second == pytest.approx(2 / 0.41)
    hours = (6000 * 0.41 + 12 * 100 * 0.05) / 3600
    assert one.hours == one.gpu_hours == pytest.approx(hours) and one.cpu_hours == pytest.approx(3 * hours)
    assert one.money == pytest.approx(hours * 2.0 + 3 * hours * 0.1)
    assert one.bottleneck == "student"


def test_four_workers_by_hand() -> None:
    """Each has 250 images, 125 steps per epoch, and sends 2 x 3/4 of 80 MB per step: 0.096 s at 10 Gbit/s."""
    four = plan(WORK, COSTS, Prices(), workers=4, bandwidth=GBIT10, machine=OWN)
    assert four.steps == 125 * 12 and four.reduce_bytes == 120e6 and four.money == 0
    assert four.step_seconds == pytest.approx(0.41 + 0.096)
    assert four.images_per_second == pytest.approx(8 / 0.506)
    assert four.gpu_hours == pytest.approx(4 * (1500 * 0.506 + 12 * 25 * 0.05) / 3600)


def test_accumulated_gradients_are_sent_and_applied_once_a_step() -> None:
    four = plan(replace(WORK, accumulate=4), COSTS, Prices(), workers=2, bandwidth=GBIT10, machine=OWN)
    assert four.steps == 63 * 12, "250 micro-batches, made up to 252"
    assert four.step_seconds == pytest.approx(4 * 0.4 + 0.01 + 80e6 / GBIT10)


def test_a_pool_works_beside_the_student() -> None:
    pool = replace(WORK, placement="pool", teachers=2, teacher_gpus=0.5, teacher_cpus=1)
    found = plan(pool, COSTS, Prices(), workers=1, bandwidth=GBIT10, machine=OWN)
    assert found.step_seconds == pytest.approx(0.3 + 0.01) and found.pool_bytes == 10e6
    assert found.gpu_hours == pytest.approx(2 * found.hours), "one of the worker, two halves of the teachers"
    assert found.cpu_hours == pytest.approx(5 * found.hours)
    slow = plan(pool, replace(COSTS, teacher_seconds=0.9), Prices(), workers=1, bandwidth=GBIT10, machine=OWN)
    assert slow.step_seconds == pytest.approx(0.45 + 0.01) and slow.bottleneck == "teacher"


def test_a_cache_is_built_first_and_costs_no_step() -> None:
    """1000 images x 3 views take 0.05 s each, on 2 processes."""
    work = replace(WORK, placement="cache", views=3, teachers=2, teacher_gpus=1, teacher_cpus=1)
    found = plan(work, COSTS, Prices(), workers=4, bandwidth=GBIT10, machine=OWN)
    assert found.step_seconds == pytest.approx(0.31 + 0.096) and found.pool_bytes == 0
    assert found.build_hours == pytest.approx(3000 * 0.05 / 2 / 3600)
    assert found.gpu_hours == pytest.approx(4 * (found.hours - found.build_hours) + 2 * found.build_hours)


@pytest.mark.parametrize(
    ("changes", "bandwidth", "expected"),
    [
        ({}, GBIT10, "student"),
        ({"teacher_seconds": 0.31}, GBIT10, "teacher"),
        ({"image_seconds": 0.5}, GBIT10, "data"),
        ({}, GBIT10 / 10, "network"),
    ],
)
def test_the_bottleneck_is_named(changes: dict[str, Any], bandwidth: float, expected: str) -> None:
    assert plan(WORK, replace(COSTS, **changes), Prices(), workers=4, bandwidth=bandwidth, machine=OWN).bottleneck == expected


def test_traffic_to_the_pool_can_be_the_bottleneck() -> None:
    found = plan(replace(WORK, placement="pool"), COSTS, Prices(), workers=1, bandwidth=10e6, machine=OWN)
    assert found.bottleneck == "network" and found.step_seconds == pytest.approx(1.0 + 0.01)


def test_workers_share_the_cpus_of_their_machine() -> None:
    """A step of each takes 2 x 0.02 s of data, 0.4 of passes and 0.01 of update; Ray takes 0.2 CPUs for each."""
    found = plan(WORK, COSTS, Prices(), workers=2, bandwidth=1e12, machine=Machine(cpus=2, workers=2))
    assert found.step_seconds == pytest.approx(2 * 0.45 / 1.6) and found.bottleneck == "CPUs"
    apart = plan(WORK, COSTS, Prices(), workers=2, bandwidth=1e15, machine=Machine(cpus=2, workers=1))
    assert apart.step_seconds == pytest.approx(0.41) and apart.bottleneck == "student"
    threads = plan(WORK, replace(COSTS, busy_cpus=4), Prices(), workers=1, bandwidth=1e12, machine=Machine(cpus=2, workers=1))
    assert threads.step_seconds == pytest.approx((0.04 + 4 * 0.41) / 1.8)
    without_ray = plan(replace(WORK, on_ray=False), COSTS, Prices(), 1, 1e12, Machine(cpus=1, workers=1))
    assert without_ray.step_seconds == pytest.approx(0.45)


SECONDS = st.floats(1e-4, 10)
MEASURED = st.builds(
    Costs,
    image_seconds=SECONDS,
    student_seconds=SECONDS,
    teacher_seconds=st.just(0.0) | SECONDS,
    update_seconds=SECONDS,
    eval_seconds=SECONDS,
    pixel_bytes=st.floats(0, 1e8),
    answer_bytes=st.floats(0, 1e8),
    parameters=st.integers(1, 10**9),
    busy_cpus=st.integers(1, 64),
)
ASKED = st.builds(
    Work,
    images=st.integers(1, 10**6),
    val_images=st.integers(1, 10**5),
    batch=st.integers(1, 64),
    accumulate=st.integers(1, 8),
    epochs=st.integers(1, 50),
    evaluations=st.integers(1, 50),
    placement=st.sampled_from(["inline", "pool", "cache"]),
    data_cpus=st.floats(0.5, 32),
    gpus=st.sampled_from([0.0, 0.5, 1.0]),
    cpus=st.floats(1, 32),
    teachers=st.integers(1, 8),
    teacher_gpus=st.sampled_from([0.0, 0.5, 1.0]),
    teacher_cpus=st.floats(0, 8),
    on_ray=st.booleans(),
    views=st.integers(1, 50),
    distinct=st.integers(1, 10**6),
)


MACHINES = st.builds(Machine, cpus=st.integers(1, 256), workers=st.integers(1, 16))


@given(ASKED, MEASURED, st.integers(1, 256), st.floats(1e6, 1e11), MACHINES)
def test_laws(work: Work, costs: Costs, workers: int, bandwidth: float, machine: Machine) -> None:
    prices = Prices(1.5, 0.05)
    found = plan(work, costs, prices, workers, bandwidth, machine)
    alone = plan(work, costs, prices, 1, bandwidth, machine)
    assert found.step_seconds >= alone.step_seconds, "workers do not make a step faster"
    assert found.steps <= alone.steps, "but fewer"
    assert found.images_per_second <= workers * alone.images_per_second * (1 + 1e-9), "no more than linear"
    assert found.hours >= found.build_hours >= 0
    assert 0 <= found.reduce_bytes < 2 * 4 * costs.parameters
    wider = plan(work, costs, prices, workers, 2 * bandwidth, machine)
    assert wider.step_seconds <= found.step_seconds and wider.money <= found.money
    roomier = plan(work, costs, prices, workers, bandwidth, Machine(2 * machine.cpus, machine.workers))
    assert roomier.step_seconds <= found.step_seconds
    slower = plan(work, replace(costs, student_seconds=2 * costs.student_seconds), prices, workers, bandwidth, machine)
    assert slower.step_seconds >= found.step_seconds and slower.money >= found.money


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("logits", [0, 3])
def test_cache_bytes_are_what_the_codec_packs(dtype: Any, logits: int) -> None:
    budget, codec = 8, Codec(dtype, 2, 32, logits)
    view = ViewTargets(
        boxes=np.zeros((budget, 4), np.float32),
        truth=np.zeros(budget, bool),
        taps=np.random.default_rng(0).random((2, budget, 32), dtype=np.float32),
        top=TopLogits(np.zeros((budget, logits), np.float32), np.zeros((budget, logits), np.int64)),
    )
    parts = (view.boxes.tobytes(), view.truth.tobytes(), codec.pack(view, codec.scales([view])), *codec.pack_top(view.top))
    assert cache_bytes(3, 5, budget, codec) == 15 * sum(map(len, parts))
