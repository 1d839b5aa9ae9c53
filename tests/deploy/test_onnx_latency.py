"""What the ONNX file of a checkpoint takes, as a search weighs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from headkd_ray.data.shards import ShardSet
from headkd_ray.deploy.onnx_latency import onnx_latency
from tests.support import micro_teacher


def test_the_onnx_file_of_a_checkpoint_is_timed(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    checkpoint = micro_teacher(tmp_path, ShardSet.open(drawn_splits["val"]).meta.classes)
    assert 0.1 < onnx_latency(checkpoint, drawn_splits["val"]) < 10_000
    assert {path.name for path in tmp_path.iterdir()} <= {"model.json", "model.safetensors"}, "nothing is left behind"
