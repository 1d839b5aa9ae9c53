import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import load_checkpoint, load_detector, save_detector
from headkd_ray.errors import CheckpointError
from headkd_ray.job import DetectorSpec
from tests.detectors.micro import batch, cascade_spec, faster_rcnn_spec, fcos_spec, liven, reppoints_spec, retinanet_spec

CLASSES = ("ant", "bee", "wasp")


@pytest.mark.parametrize(
    "spec", [retinanet_spec(), fcos_spec(), reppoints_spec(), faster_rcnn_spec(), cascade_spec(average="scores")]
)
def test_a_saved_detector_comes_back_as_it_was(spec: DetectorSpec, tmp_path: Path) -> None:
    detector = build_detector(spec, 3).eval()
    liven(detector)
    save_detector(tmp_path / "student", detector, CLASSES, {"method": "head", "sizes": [64, 96]})
    assert sorted(p.name for p in (tmp_path / "student").iterdir()) == ["model.json", "model.safetensors"]
    loaded = load_checkpoint(tmp_path / "student")
    assert (loaded.classes, loaded.source, loaded.meta) == (CLASSES, "headkd_ray", {"method": "head", "sizes": [64, 96]})
    assert loaded.detector.spec == spec
    data = batch()
    for mine, theirs in zip(
        loaded.detector.eval()(data["images"], data["sizes"]), detector(data["images"], data["sizes"]), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert load_checkpoint(tmp_path / "student" / "model.safetensors").detector.spec == spec


def test_loading_needs_no_initial_backbone_weights(tmp_path: Path) -> None:
    spec = retinanet_spec()
    detector = build_detector(spec, 3)
    detector.spec = spec.replace({"backbone.weights": "/gone/resnet.pth"})
    save_detector(tmp_path, detector, CLASSES)
    assert load_detector(tmp_path).detector.num_classes == 3


def test_class_names_must_be_as_many_as_outputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 class names for a detector with 3"):
        save_detector(tmp_path, build_detector(retinanet_spec(), 3), ["a", "b"])


def test_tensors_that_do_not_fit_the_spec_are_all_listed(tmp_path: Path) -> None:
    save_detector(tmp_path, build_detector(retinanet_spec(), 3), CLASSES)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["head.cls_out.bias"]
    tensors |= {"assistant.fcs.0.weight": torch.zeros(2), "head.box_out.bias": torch.zeros(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_detector(tmp_path)
    assert caught.value.problems == [
        "missing: head.cls_out.bias",
        "unexpected: assistant.fcs.0.weight",
        "shape of head.box_out.bias: 4 in the file, 36 in the model",
    ]
    assert str(tmp_path) in str(caught.value)


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder or file"):
        load_checkpoint(tmp_path / "nowhere")
    save_detector(tmp_path / "run" / "student", build_detector(retinanet_spec(), 3), CLASSES)
    with pytest.raises(CheckpointError, match=r"no checkpoint here .*did you mean .*run/student\?"):
        load_checkpoint(tmp_path / "run")
    card = tmp_path / "run" / "student" / "model.json"
    content = json.loads(card.read_text())
    for text, message in (
        ("{", "not JSON"),
        ("[]", "not a checkpoint card"),
        (json.dumps(content | {"format": 99}), "format 99"),
        (json.dumps(content | {"classes": "ant"}), "classes: "),
        (json.dumps(content | {"spec": {"kind": "yolo"}}), "spec"),
    ):
        card.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "run" / "student")
    card.write_text(json.dumps(content))
    (tmp_path / "run" / "student" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a readable weight file"):
        load_checkpoint(tmp_path / "run" / "student")
