import json
import resource
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import load_checkpoint, load_detector, save_detector
from headkd_ray.detectors.weights.fetch import fetch_detector
from headkd_ray.errors import CheckpointError
from headkd_ray.job import DetectorSpec
from headkd_ray.storage import Folder
from tests.detectors.micro import (
    batch,
    cascade_spec,
    faster_rcnn_spec,
    fcos_spec,
    gfl_spec,
    liven,
    reppoints_spec,
    retinanet_spec,
)

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


@pytest.mark.parametrize("spec", [fcos_spec, gfl_spec, reppoints_spec])
@pytest.mark.parametrize("biased", [True, False])
def test_a_card_from_before_a_key_means_what_its_tensors_tell(spec: Any, biased: bool, tmp_path: Path) -> None:
    """Tower convs had a bias beside a norm before there was ``conv_bias``."""
    detector = build_detector(spec(conv_bias=biased), 3)
    save_detector(tmp_path, detector, CLASSES)
    card = json.loads((tmp_path / "model.json").read_text())
    del card["spec"]["head"]["conv_bias"]
    (tmp_path / "model.json").write_text(json.dumps(card))
    loaded = load_detector(tmp_path).detector
    assert loaded.spec == detector.spec
    assert all(map(torch.equal, loaded.state_dict().values(), detector.state_dict().values()))


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


def test_changed_bytes_are_not_used(tmp_path: Path) -> None:
    """This happens when a disk or a copy fails and the rest is filled up: the tensors' shapes still fit."""
    save_detector(tmp_path, build_detector(retinanet_spec(), 3), CLASSES)
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-300:-100] = bytes(200)
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not the file that was saved with model\.json"):
        load_detector(tmp_path)
    card = json.loads((tmp_path / "model.json").read_text())
    del card["sha256"]  # as headkd_ray wrote it before it recorded the checksum
    (tmp_path / "model.json").write_text(json.dumps(card))
    load_detector(tmp_path)


HOSTILE: dict[str, tuple[Any, str]] = {
    "ids": ({"meta": {"category_ids": [1, 2]}}, r"meta\.category_ids: \[1, 2\] is not a list of 3 different whole numbers"),
    "same ids": ({"meta": {"category_ids": [1, 2, 2]}}, r"meta\.category_ids: .* not a list of 3 different"),
    "id text": ({"meta": {"category_ids": [1, 2, "3"]}}, r"meta\.category_ids: .* not a list of 3 different"),
    "sizes": ({"meta": {"data": {"pad": -1}}}, r"meta\.data: \{'pad': -1\} is not how images are shown: pad: "),
    "no sizes": ({"meta": {"data": 3}}, r"meta\.data: 3 is not how images are shown"),
    "twice": ({"classes": ["ant", "ant", "bee"]}, "classes: 'ant' is there more than once"),
    "no classes": ({"classes": []}, "classes: "),
    "million classes": ({"classes": [str(i) for i in range(1_000_000)]}, "cls_out.bias: 27 in the file, 9000000 in the model"),
    "convs": ({"spec": {"head": {"convs": 10**7}}}, r"head\.convs: .* less than or equal to 100"),
    "wide": ({"spec": {"head": {"channels": 16384}, "neck": {"channels": 16384}}}, "16384x16384x3x3 in the model"),
    "layers": ({"spec": {"backbone": {"kwargs": {"layers": [10**7] * 4}}}}, r"kwargs\.layers: .* whole number from 1 to 256"),
    "reader": ({"spec": {"backbone": {"kwargs": {"checkpoint_path": "x.pth"}}}}, r"kwargs\.checkpoint_path: is set by"),
    "timm": (
        {"spec": {"backbone": {"kwargs": {"norm_layer": "nope"}}}},
        r"model\.json: spec\.backbone\.kwargs\.norm_layer: timm",
    ),
    "digits": ("1" * 5000, "not JSON"),
    "nesting": ("[" * 100_000, "nested too deeply"),
    "pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a Git LFS pointer"),
    "bytes": (b"\xff\xfe{", "not JSON"),
}
"""Change to model.json, or its whole replacement, and the message."""


def merged(old: Any, new: Any) -> Any:
    """Return ``old`` with the values of ``new``, key by key."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {key: merged(old.get(key), new[key]) if key in new else old[key] for key in {**old, **new}}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_card_is_refused_before_anything_of_its_size_is_made(case: str, tmp_path: Path) -> None:
    change, expected = HOSTILE[case]
    save_detector(tmp_path, build_detector(retinanet_spec(), 3), CLASSES)
    card = tmp_path / "model.json"
    if isinstance(change, dict):
        change = json.dumps(merged(json.loads(card.read_text()), change))
    card.write_bytes(change if isinstance(change, bytes) else change.encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024, "KiB; the network of 'wide' takes GiB"


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


def test_a_remote_checkpoint_s_problems_name_its_own_place(tmp_path: Path) -> None:
    """Also in the headline over several problems: the temporary copy is gone when the user reads it."""
    save_detector(tmp_path / "student", build_detector(retinanet_spec(), 3), CLASSES)
    card = tmp_path / "student" / "model.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "classes": [], "more": 1}))
    far = Folder.open(f"memory://{uuid.uuid4()}/student")
    far.copy_from(Folder.open(tmp_path / "student"))
    with pytest.raises(CheckpointError) as caught:
        fetch_detector(far.uri)
    assert caught.value.headline == f"{far.uri}/model.json: not a checkpoint card" and len(caught.value.problems) == 2
