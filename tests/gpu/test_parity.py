"""The official code's own numbers are reproduced on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headkd_ray.golden.file import Golden
from headkd_ray.golden.quantities import check
from headkd_ray.golden.replay import replay

pytestmark = pytest.mark.gpu
FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
BF16 = 3e-2
"""Largest relative error of a loss in bfloat16, which has 8 bits of mantissa; the largest on the CPU is 1.3e-2."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_quantity_of_a_golden_file_holds(file: Path, device: torch.device) -> None:
    """The tolerances are those on the CPU: 1e-4 for values and losses, 1e-3 for gradient norms."""
    golden = Golden.open(file)
    rows = list(check(golden, replay(golden, device)))
    assert len(rows) > 10
    assert [f"{row.name}: {row.relative:.1e} {row.note}" for row in rows if not row.passed] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_losses_of_a_golden_file_hold_in_bf16(file: Path, device: torch.device) -> None:
    golden = Golden.open(file)
    run = replay(golden, device, precision="bf16")
    wanted = golden.scalars("losses_json")
    errors = {name: abs(loss / wanted[name] - 1) for name, loss in run.losses.items()}
    assert len(errors) > 3
    assert {name: error for name, error in errors.items() if not error <= BF16} == {}
