"""The command export: what it writes and proves, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import headkd_ray
from headkd_ray import evaluate, export
from headkd_ray.data.shards import ShardSet
from headkd_ray.deploy import entrants, latency, side_by_side
from headkd_ray.deploy.networks import Arrays, OnnxNetwork
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.errors import CheckpointError
from headkd_ray.job import FasterRCNNSpec, RetinaNetSpec
from tests.detectors.micro import liven
from tests.support import MICRO_STUDENT, MICRO_TEACHER, micro_teacher

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

VIEW = {"eval_short_side": 64, "long_side": 96, "pad": 32}


@pytest.fixture(scope="module")
def classes(drawn_splits: dict[str, str]) -> tuple[str, ...]:
    return ShardSet.open(drawn_splits["val"]).meta.classes


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, drawn_splits: dict[str, str], classes: tuple[str, ...]) -> str:
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(3)
    detector = build_detector(RetinaNetSpec.model_validate(MICRO_STUDENT), len(classes))
    liven(detector)
    category_ids = list(ShardSet.open(drawn_splits["val"]).meta.category_ids)
    save_detector(folder, detector, classes, {"data": VIEW, "category_ids": category_ids})
    return str(folder)


def run(*arguments: str) -> int:
    return export.main(list(arguments))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.rindex("error: ") :]


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, student: str, drawn_splits: dict[str, str], classes: tuple[str, ...]
) -> dict[str, Any]:
    """Return the report of an export to all targets, with its folder ``out`` and the ``teacher`` added."""
    folder = tmp_path_factory.mktemp("exported")
    teacher = micro_teacher(folder / "teacher", classes)
    out, report = folder / "out", folder / "report.json"
    arguments = ["--val", drawn_splits["val"], "--calibrate", drawn_splits["train"], "--calibration-images", "8"]
    arguments += ["--beside", teacher, "--out", str(out), "--json", str(report)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "MOST", 3)
        patch.setattr(entrants, "cores", lambda: 1)  # torch's threads spin where others want the cores
        assert run(student, "--to", "onnx", "onnx-int8", *arguments) == 0
    return {**json.loads(report.read_text()), "out": out, "teacher": teacher}


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two detectors have the same AP, and the same score thresholds to rounding."""
    scores = [[each or 0.0 for each in metrics["thresholds"].values()] for metrics in (one, other)]
    return {**one, "thresholds": None} == {**other, "thresholds": None} and scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_the_report_has_ap_size_and_latency_of_all(
    exported: dict[str, Any], student: str, drawn_splits: dict[str, str]
) -> None:
    rows = {row["name"]: row for row in exported["rows"]}
    assert list(rows) == [student, "model.onnx", "model-int8.onnx", exported["teacher"]]
    agreement = rows["model.onnx"]["agreement"]
    assert agreement["alone"] == 0 and agreement["detections"] > 100 and agreement["box"] < 0.1 and exported["images"] == 10
    assert [row["name"] for row in exported["rows"] if row["agreement"]] == ["model.onnx"]
    assert alike(rows["model.onnx"]["metrics"], rows[student]["metrics"])
    for row in exported["rows"]:
        assert row["metrics"]["images"] == 10
        assert all(0 < time["median"] <= time["p95"] for time in row["latency"].values()) and "1" in row["latency"]
    assert rows["model.onnx"]["bytes"] == (exported["out"] / "model.onnx").stat().st_size
    assert rows["model-int8.onnx"]["format"] == "ONNX int8"


def test_the_checkpoint_s_ap_is_evaluate_s(exported: dict[str, Any], student: str, drawn_splits: dict[str, str]) -> None:
    metrics = evaluate.evaluate_checkpoint(student, drawn_splits["val"], batch_size=1).as_dict()
    assert exported["rows"][0]["metrics"] == metrics


def test_int8_computes_in_8_bits(exported: dict[str, Any]) -> None:
    import onnx

    nodes = onnx.load(exported["out"] / "model-int8.onnx").graph.node
    weights = {node.input[1] for node in nodes if node.op_type == "Conv"}
    scaled = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    assert weights and weights <= scaled
    suppression = next(node for node in nodes if node.op_type == "NonMaxSuppression")
    assert not set(suppression.input) & scaled


def test_only_files_that_were_asked_for_are_written(exported: dict[str, Any]) -> None:
    assert sorted(file.name for file in exported["out"].iterdir()) == ["model-int8.onnx", "model.onnx"]


def test_an_openvino_model_is_proved_and_loaded(
    tmp_path: Path,
    student: str,
    drawn_splits: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(latency, "MOST", 3)
    monkeypatch.setattr(entrants, "cores", lambda: 1)
    arguments = ["--to", "openvino", "--val", drawn_splits["val"], "--images", "3", "--out", str(tmp_path)]
    assert run(student, *arguments, "--beside", student) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^model\.xml: (\d+) of \1 detections are the checkpoint's, boxes within ", printed, re.MULTILINE)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    pixels = next(iter(ShardSet.open(drawn_splits["val"]).samples(1))).pixels()
    one, other = (headkd_ray.load(path)(pixels)[0] for path in (student, tmp_path / "model.xml"))
    assert len(one) > 0 and one.classes == other.classes and one.category_ids == other.category_ids
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
    (tmp_path / "model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"model\.bin: cannot be read \(No such file or directory\)"):
        headkd_ray.load(tmp_path / "model.xml")
    (tmp_path / "model.bin").touch()
    (tmp_path / "model.xml").write_text("<net/>")
    with pytest.raises(CheckpointError, match=r"model\.xml: OpenVINO cannot read this model"):
        headkd_ray.load(tmp_path / "model.xml")


def test_a_checkpoint_that_detects_nothing_proves_nothing(
    tmp_path: Path, drawn_splits: dict[str, str], classes: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(latency, "MOST", 3)
    monkeypatch.setattr(entrants, "cores", lambda: 1)
    untrained = build_detector(RetinaNetSpec.model_validate(MICRO_STUDENT), len(classes))
    save_detector(tmp_path / "untrained", untrained, classes, {"data": VIEW})
    arguments = ["--to", "onnx", "--val", drawn_splits["val"], "--images", "2", "--out", str(tmp_path / "out")]
    assert run(str(tmp_path / "untrained"), *arguments) == 0
    warning = capsys.readouterr().err
    assert "warning: model.onnx: nothing is proved, because the checkpoint detects nothing with a score above 0.05" in warning


def test_a_file_that_detects_something_else_is_not_written(
    tmp_path: Path,
    student: str,
    drawn_splits: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = OnnxNetwork.__call__

    def wrong(self: OnnxNetwork, batch: Any) -> Arrays:
        found = right(self, batch)
        return found._replace(boxes=found.boxes + np.float32(0.2))

    monkeypatch.setattr(OnnxNetwork, "__call__", wrong)
    message = refused(capsys, student, "--to", "onnx", "--val", drawn_splits["val"], "--out", str(tmp_path / "out"))
    assert (
        message.startswith("error: model.onnx: not written, because ")
        and "detections are not the checkpoint's: only " in message
    )
    assert not (tmp_path / "out").exists()


def test_a_raw_file_is_compared_by_its_outputs(
    tmp_path: Path,
    student: str,
    drawn_splits: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [
        student,
        "--to",
        "onnx",
        "--raw",
        "--val",
        drawn_splits["val"],
        "--images",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert run(*arguments) == 0
    with pytest.raises(CheckpointError, match=r"model\.onnx: was exported with --raw"):
        headkd_ray.load(tmp_path / "out" / "model.onnx")
    (tmp_path / "out" / "model.onnx").unlink()
    right = side_by_side.graph_inputs
    monkeypatch.setattr(side_by_side, "graph_inputs", lambda batch: {**right(batch), "sizes": batch.sizes.numpy() - 8})
    capsys.readouterr()
    message = refused(capsys, *arguments)
    assert "model.onnx: not written, because its outputs differ from the checkpoint's by " in message
    assert not list((tmp_path / "out").iterdir())


def test_without_a_check_nothing_is_run(tmp_path: Path, student: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxNetwork, "run", None)
    assert run(student, "--to", "onnx", "--no-check", "--size", "64", "96", "--out", str(tmp_path)) == 0
    assert headkd_ray.load(tmp_path / "model.onnx").description.size == (64, 96)


# --- what it refuses ---


def test_contradictions_are_told_together(tmp_path: Path, student: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    message = refused(capsys, student, "--to", "onnx-int8", "--no-check", "--beside", student, "--out", out)
    assert "--to onnx-int8 needs --calibrate" in message and "--beside and --images belong to the check" in message
    message = refused(capsys, student, "--to", "onnx", "--no-check", "--calibrate", "data", "--out", out)
    assert "--calibrate is for --to onnx-int8 alone" in message
    assert "--size: 70 is not a multiple of 32" in refused(
        capsys, student, "--to", "onnx", "--no-check", "--size", "70", "96", "--out", out
    )
    assert not (tmp_path / "out").exists()


def test_an_unknown_target(tmp_path: Path, student: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, student, "--to", "tensorrt", "--no-check", "--out", str(tmp_path))
    assert "tensorrt" in message and "onnx-int8" in message


@pytest.mark.parametrize(
    ("target", "package"), [("onnx", "onnx"), ("onnx", "onnxruntime"), ("openvino", "openvino")], ids=lambda name: name
)
def test_a_missing_package_names_its_extra(
    target: str, package: str, tmp_path: Path, student: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(capsys, student, "--to", target, "--no-check", "--out", str(tmp_path / "out"))
    assert message == (
        f"error: --to {target} needs the package {package}, which is not installed: "
        f'python -m pip install "headkd-ray[{target}]"\n'
    )
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(tmp_path: Path, classes: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    detector = build_detector(FasterRCNNSpec.model_validate(MICRO_TEACHER), len(classes))
    save_detector(tmp_path / "broken", detector, classes)
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["rpn.cls_out.bias"][0] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors")
    card = json.loads((tmp_path / "broken" / "model.json").read_text())
    (tmp_path / "broken" / "model.json").write_text(json.dumps({**card, "sha256": None}))
    message = refused(capsys, str(tmp_path / "broken"), "--to", "onnx", "--no-check", "--out", str(tmp_path / "out"))
    assert "rpn.cls_out.bias: 1 of 3 values are NaN or infinite" in message
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path, student: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    message = refused(capsys, student, "--to", "onnx", "--no-check", "--out", str(tmp_path / "file" / "out"))
    assert f"{tmp_path}/file/out: not writable" in message
    assert (tmp_path / "file").read_text() == "kept"
