"""``headkd_ray.load``: what it opens, what it can be called on, what it returns."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import headkd_ray
from headkd_ray import export, predict
from headkd_ray.deploy.detections import ImageDetections
from headkd_ray.errors import CheckpointError, DataError, ExportError
from tests.data.coco_files import encoded, oriented, pixels
from tests.support import micro_teacher

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a checkpoint and the ONNX file that was exported from it."""
    folder = tmp_path_factory.mktemp("files")
    checkpoint = micro_teacher(folder / "student", ("a", "b"))
    card = folder / "student" / "model.json"
    content = json.loads(card.read_text())
    meta = {"data": {"eval_short_side": 64, "long_side": 96}, "category_ids": [7, 3]}
    card.write_text(json.dumps({**content, "meta": meta}))
    assert export.main([checkpoint, "--to", "onnx", "--no-check", "--out", str(folder)]) == 0
    return {"checkpoint": checkpoint, "onnx": str(folder / "model.onnx")}


@pytest.mark.parametrize("which", ["checkpoint", "onnx"])
def test_every_kind_of_picture_gives_the_same(which: str, files: dict[str, str], tmp_path: Path) -> None:
    picture = pixels(5, 90, 60)
    (tmp_path / "photo.png").write_bytes(encoded(picture, "PNG"))
    (tmp_path / "turned.png").write_bytes(oriented(picture.transpose(Image.Transpose.ROTATE_90), 6, "PNG"))
    array = np.asarray(picture)
    predictor = headkd_ray.load(files[which])
    with Image.open(tmp_path / "turned.png") as turned:
        several = predictor(
            [
                str(tmp_path / "photo.png"),
                tmp_path / "turned.png",
                picture,
                turned,
                array,
                torch.from_numpy(array.copy()).permute(2, 0, 1),
            ]
        )
    assert len(several) == 6 and len(several[0]) > 0
    for found in several[1:]:
        np.testing.assert_array_equal(found.boxes, several[0].boxes)
    (single,) = predictor(picture)
    np.testing.assert_array_equal(single.scores, several[0].scores)
    assert single.size == (60, 90) and single.boxes.max() <= 90 and single.classes == ("a", "b")


def test_the_file_is_the_checkpoint(files: dict[str, str]) -> None:
    one, other = (headkd_ray.load(path)(pixels(5, 90, 60))[0] for path in files.values())
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
    np.testing.assert_array_equal(one.labels, other.labels)


def test_predict_takes_exported_files(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(pixels(5, 90, 60), "PNG"))
    found = {}
    for which, path in files.items():
        assert predict.main([path, str(tmp_path / "photo.png"), "--out", str(tmp_path / which)]) == 0
        found[which] = json.loads((tmp_path / which / "detections.json").read_text())
    one, other = found.values()
    assert len(one["annotations"]) == len(other["annotations"]) > 0
    assert one["categories"] == other["categories"] == [{"id": 7, "name": "a"}, {"id": 3, "name": "b"}]
    for mine, theirs in zip(one["annotations"], other["annotations"], strict=True):
        assert mine["category_id"] == theirs["category_id"]
        assert mine["bbox"] == pytest.approx(theirs["bbox"], abs=1e-2)


def some_detections() -> ImageDetections:
    boxes = np.array([[1, 2, 4, 6], [0, 0, 5, 5]], np.float32)
    return ImageDetections(boxes, np.array([0.75, 0.25], np.float32), np.array([1, 0]), ("a", "b"), (7, 3), (10, 20))


def test_detections_as_coco() -> None:
    found = some_detections()
    assert found.names == ["b", "a"] and len(found.above(0.5)) == 1
    assert found.to_coco(9) == [
        {"image_id": 9, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.75},
        {"image_id": 9, "category_id": 7, "bbox": [0, 0, 5, 5], "score": 0.25},
    ]
    assert [entry["category_id"] for entry in found.to_coco(9, [1, None])] == [1]


def test_detections_for_supervision() -> None:
    supervision = pytest.importorskip("supervision")
    found = some_detections().to_supervision()
    assert isinstance(found, supervision.Detections)
    np.testing.assert_array_equal(found.xyxy, some_detections().boxes)
    assert found.class_id.tolist() == [1, 0] and found.data["class_name"].tolist() == ["b", "a"]
    none = dataclasses.replace(
        some_detections(), boxes=np.zeros((0, 4), np.float32), scores=np.zeros(0), labels=np.zeros(0, int)
    )
    assert len(none.to_supervision()) == 0


def test_supervision_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ExportError, match=r"to_supervision\(\) needs the package supervision.*headkd-ray\[supervision\]"):
        some_detections().to_supervision()


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (np.zeros((4, 5), np.uint8), "image 0: is a ndarray of uint8 with shape (4, 5); give a path"),
        (np.zeros((4, 5, 3), np.float32), "image 0: is a ndarray of float32 with shape (4, 5, 3); give"),
        (torch.zeros(3, 4, 5), "image 0: is a Tensor of torch.float32 with shape (3, 4, 5); give"),
        (np.zeros((0, 5, 3), np.uint8), "image 0: is a ndarray of uint8 with shape (0, 5, 3); give"),
        ([Image.new("RGB", (8, 8)), 7], "image 1: is a int; give a path"),
        ("gone.jpg", "gone.jpg: cannot be read (No such file or directory)"),
    ],
)
def test_what_is_no_picture(picture: object, said: str, files: dict[str, str]) -> None:
    with pytest.raises(DataError) as error:
        headkd_ray.load(files["checkpoint"])(picture)  # type: ignore[arg-type]
    assert str(error.value).startswith(said)


def test_a_file_that_is_no_picture(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(DataError, match=r"page\.jpg: cannot be read \(not a JPEG, PNG, WebP, BMP or TIFF but an HTML"):
        headkd_ray.load(files["checkpoint"])(tmp_path / "page.jpg")


def test_files_that_are_no_detectors(files: dict[str, str], tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            headkd_ray.load(path)
        return str(error.value)

    assert message(tmp_path / "gone.onnx") == f"{tmp_path}/gone.onnx: cannot be read (No such file or directory)"
    (tmp_path / "text.onnx").write_text("no model")
    assert message(tmp_path / "text.onnx").startswith(f"{tmp_path}/text.onnx: ONNX Runtime cannot read this file (")
    model = onnx.load(files["onnx"])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    assert message(tmp_path / "foreign.onnx").endswith(
        "foreign.onnx: headkd export did not write this file: its metadata does not describe a detector"
    )
    onnx.helper.set_model_props(model, {"headkd_ray": '"9"', "format": "2", "classes": "7"})
    onnx.save(model, tmp_path / "newer.onnx")
    assert "newer.onnx: its metadata does not describe a detector; export it again:" in message(tmp_path / "newer.onnx")


def test_importing_the_package_is_cheap() -> None:
    command = "import sys, headkd_ray; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
