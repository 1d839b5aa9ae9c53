"""What a student costs at inference."""

from __future__ import annotations

from pathlib import Path

import torch

from headkd_ray.detectors import build_detector
from headkd_ray.profiling.inference_cost import inference_cost
from tests.support import MICRO_STUDENT, micro_job


def test_a_wider_student_costs_more(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    wide = {**MICRO_STUDENT, "head": {**MICRO_STUDENT["head"], "convs": 3}}
    before = torch.get_rng_state()
    jobs = [micro_job(tmp_path, drawn_splits, student=student) for student in (MICRO_STUDENT, wide)]
    narrow, wider = (inference_cost(job) for job in jobs)
    assert torch.equal(torch.get_rng_state(), before), "a training's own draws do not depend on it"
    detector = build_detector(jobs[0].student, 8)
    assert round(narrow["params"] * 1e6) == sum(weight.numel() for weight in detector.parameters())
    assert all(0 < narrow[cost] for cost in ("params", "flops", "latency"))
    # Two more 3x3 convs of 16 channels in each of two towers, on 64x96 pixels' P3 to P7: 8x12 + 4x6 + 2x3 + 1x2 + 1x1 cells.
    cells = 96 + 24 + 6 + 2 + 1
    assert round((wider["flops"] - narrow["flops"]) * 1e9) == 2 * 2 * cells * 2 * 9 * 16 * 16
    assert round((wider["params"] - narrow["params"]) * 1e6) == 2 * 2 * (9 * 16 * 16 + 16)
