"""An exported graph detects what the detector detects, for every kind and for sizes that it was not traced with."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headkd_ray.deploy.agreement import Agreement
from headkd_ray.deploy.description import Description, describe
from headkd_ray.deploy.exported import as_openvino
from headkd_ray.deploy.graph import DetectionGraph, RawGraph
from headkd_ray.deploy.networks import OnnxNetwork, TorchNetwork, graph_inputs
from headkd_ray.deploy.onnx_file import onnx_bytes
from headkd_ray.deploy.predictor import Predictor
from headkd_ray.deploy.static_nms import Suppress, survivors, survivors_by_torchvision
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.build import AnyDetector
from headkd_ray.detectors.weights import LoadedDetector
from headkd_ray.engine.inference import batch_of
from headkd_ray.errors import ExportError
from tests.detectors.micro import SPECS, batch, liven

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

CLASSES = ("a", "b", "c")
CPU = torch.device("cpu")
VARIANTS: dict[str, Any] = {
    **{kind: SPECS[kind]() for kind in SPECS},
    "fcos, centerness in the score's root": SPECS["fcos"](score="sqrt", norm_on_bbox=True),
    "faster_rcnn of torchvision": SPECS["faster_rcnn"](aligned=False, sampling_ratio=2, postprocess={"min_size": 2.0}),
    "cascade_rcnn, averaged logits": SPECS["cascade_rcnn"](average="logits"),
}


def detector_of(variant: str) -> AnyDetector:
    torch.manual_seed(0)
    detector = build_detector(VARIANTS[variant], len(CLASSES))
    liven(detector)
    return detector.eval()


def description_of(detector: AnyDetector, **changes: Any) -> Description:
    loaded = LoadedDetector(detector, CLASSES, "test", {"data": {"eval_short_side": 96, "long_side": 160, "pad": 32}})
    return describe(loaded, "test").model_copy(update=changes)


@functools.cache
def file_of(variant: str, **changes: Any) -> OnnxNetwork:
    detector = detector_of(variant)
    return OnnxNetwork(onnx_bytes(detector, description_of(detector, **changes)), "model.onnx")


def photo(height: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("suppress", [survivors, survivors_by_torchvision], ids=["onnx", "torch-export"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_graph_detects_what_the_detector_detects(variant: str, suppress: Suppress) -> None:
    """A batch with padding, and an image in it without objects, in PyTorch."""
    data, detector = batch(), detector_of(variant)
    with torch.no_grad():
        wanted = detector(data["images"], data["sizes"])
        found = DetectionGraph(detector, suppress)(data["images"].permute(0, 2, 3, 1), data["sizes"], 2 * data["sizes"])
    count = wanted.scores.shape[1]
    assert (wanted.labels >= 0).sum() > 20
    assert (found.labels[:, count:] == -1).all() and (found.scores[:, count:] == 0).all()
    torch.testing.assert_close(found.scores[:, :count], wanted.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.labels[:, :count], wanted.labels)
    torch.testing.assert_close(found.boxes[:, :count], 2 * wanted.boxes, rtol=0, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_detects_what_the_detector_detects(variant: str) -> None:
    """Images of many sizes, from one cell on the coarsest level to a dozen, landscape and portrait."""
    detector = detector_of(variant)
    description = description_of(detector)
    file = file_of(variant)
    assert file.description == description
    ours, theirs = Predictor(TorchNetwork(detector, CPU), description), Predictor(file, file.description)
    agreement = Agreement()
    for number, (height, width) in enumerate([(40, 60), (300, 90), (20, 200), (96, 96)]):
        pixels = photo(height, width, number)
        agreement.add(ours.detect(pixels), theirs.detect(pixels), number)
    assert agreement.detections > 30
    assert agreement.holds, agreement
    assert agreement.box < 0.01 and agreement.score < 1e-5


@pytest.mark.parametrize("kind", ["faster_rcnn", pytest.param("reppoints", marks=pytest.mark.slow)])
def test_openvino_reads_the_same_file(kind: str) -> None:
    pytest.importorskip("openvino")
    detector = detector_of(kind)
    description = description_of(detector)
    model = as_openvino(onnx_bytes(detector, description), description).open()
    assert model.description == description
    ours, theirs = Predictor(TorchNetwork(detector, CPU), description), Predictor(model, model.description)
    agreement = Agreement()
    for number, (height, width) in enumerate([(40, 60), (300, 90)]):
        pixels = photo(height, width, number)
        agreement.add(ours.detect(pixels), theirs.detect(pixels), number)
    assert agreement.detections > 30 and agreement.holds, agreement


def test_a_batch_of_different_sizes() -> None:
    data, detector = batch(), detector_of("retinanet")
    file = file_of("retinanet")
    inputs = {
        "images": data["images"].permute(0, 2, 3, 1).contiguous(),
        "sizes": data["sizes"],
        "original_sizes": data["sizes"],
    }
    boxes, scores, labels = file._session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        wanted = detector(data["images"], data["sizes"])
    torch.testing.assert_close(torch.from_numpy(scores), wanted.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(labels), wanted.labels)
    torch.testing.assert_close(torch.from_numpy(boxes), wanted.boxes, rtol=0, atol=1e-2)


def test_what_lies_in_the_padding_is_not_read() -> None:
    file = file_of("retinanet")
    shown = batch_of(photo(50, 90), file.description.view)
    noisy = shown.images.clone()
    height, width = shown.sizes[0].tolist()
    assert (height, width) != tuple(noisy.shape[2:])
    noisy[:, :, height:], noisy[:, :, :, width:] = 255, 255
    plain = file(shown)
    for one, other in zip(plain, file(replace(shown, images=noisy)), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("height_width", [(30, 90), (300, 90)])
def test_a_fixed_size_takes_every_image(height_width: tuple[int, int]) -> None:
    detector = detector_of("fcos")
    description = description_of(detector, size=(96, 128))
    file = file_of("fcos", size=(96, 128))
    assert [axis for each in file._session.get_inputs()[:1] for axis in each.shape] == ["batch", 96, 128, 3]
    ours, theirs = Predictor(TorchNetwork(detector, CPU), description), Predictor(file, file.description)
    agreement, pixels = Agreement(), photo(*height_width)
    assert theirs.batch(pixels).images.shape == (1, 3, 96, 128)
    agreement.add(ours.detect(pixels), theirs.detect(pixels), 0)
    assert agreement.detections and agreement.holds, agreement


@pytest.mark.parametrize("kind", ["fcos", "faster_rcnn"])
def test_raw_outputs_are_the_head_s(kind: str) -> None:
    detector = detector_of(kind)
    file = file_of(kind, outputs="raw")
    shown = batch_of(photo(50, 90), file.description.view)
    given = graph_inputs(shown)
    with torch.no_grad():
        wanted = RawGraph(detector)(torch.from_numpy(given["images"]), torch.from_numpy(given["sizes"]))
    names = [each.name for each in file._session.get_outputs()]
    assert names == list(wanted)
    assert names == (
        ["boxes", "scores"]
        if kind == "faster_rcnn"
        else [f"{m}_{n}" for m in ("logits", "distances", "centerness") for n in range(5)]
    )
    for tensor, output in zip(wanted.values(), file.run(shown), strict=True):
        torch.testing.assert_close(torch.from_numpy(output), tensor, rtol=1e-3, atol=1e-3)


def test_the_metadata_says_how_to_use_the_file() -> None:
    """Whoever reads it needs nothing but JSON."""
    detector, file = detector_of("gfl"), file_of("gfl")
    entries = {name: json.loads(value) for name, value in file._session.get_modelmeta().custom_metadata_map.items()}
    assert entries["classes"] == list(CLASSES) and entries["category_ids"] == [1, 2, 3]
    assert (entries["short_side"], entries["long_side"], entries["pad"], entries["size"]) == (96, 160, 32, None)
    assert entries["mean"] == list(detector.spec.pixels.mean) and entries["score"] == detector.spec.head.postprocess.score
    assert entries["kind"] == "gfl" and entries["outputs"] == "detections" and entries["precision"] == "float32"


def test_an_input_that_the_file_cannot_take() -> None:
    file = file_of("fcos", size=(96, 128))
    with pytest.raises(ExportError) as error:
        file(batch_of(photo(50, 90), file.description.view))
    said = str(error.value)
    assert said.startswith("model.onnx: cannot be run on an input of 96 x 160 pixels (")
    assert said.endswith("); export it with a fixed input, --size H W") and "\n" not in said
