"""Tests for a GPU: ``pytest -m gpu tests/gpu``.

With ``HEADKD_TEST_DEVICE=cpu`` set they are rehearsed on the CPU, except for those that use the fixture ``cuda``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device under test."""
    chosen = torch.device(os.environ.get("HEADKD_TEST_DEVICE", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU; HEADKD_TEST_DEVICE=cpu rehearses on the CPU")
    return torch.device("cuda", 0) if chosen.type == "cuda" else chosen


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """Return the device if it is a GPU; otherwise skip the test."""
    if device.type != "cuda":
        pytest.skip("only a GPU can show this")
    return device


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Switch TF32 off, so that a GPU's float32 can be compared with the CPU's."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
