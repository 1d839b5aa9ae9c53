"""A file of torch.export: it detects what the checkpoint detects, needs torch alone, and one with code in it is not read."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headkd_ray
from headkd_ray import export
from headkd_ray.data.shards import ShardSet
from headkd_ray.deploy import entrants, latency
from headkd_ray.deploy.agreement import Agreement
from headkd_ray.deploy.graph import RawGraph
from headkd_ray.deploy.networks import TorchFileNetwork, TorchNetwork, graph_inputs
from headkd_ray.deploy.predictor import Predictor
from headkd_ray.deploy.torch_file import torch_bytes
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.errors import CheckpointError
from headkd_ray.job import RetinaNetSpec
from tests.deploy.test_export import alike
from tests.deploy.test_onnx_file import VARIANTS, description_of, detector_of, photo
from tests.detectors.micro import batch, liven
from tests.support import MICRO_STUDENT


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, drawn_splits: dict[str, str]) -> Path:
    """Export a student with an input of fixed size, which is quick, and return the folder of ``model.pt2`` and ``student``."""
    folder = tmp_path_factory.mktemp("exported")
    meta = ShardSet.open(drawn_splits["val"]).meta
    torch.manual_seed(3)
    detector = build_detector(RetinaNetSpec.model_validate(MICRO_STUDENT), len(meta.classes))
    liven(detector)
    view = {"eval_short_side": 64, "long_side": 96, "pad": 32}
    save_detector(folder / "student", detector, meta.classes, {"data": view, "category_ids": list(meta.category_ids)})
    arguments = ["--size", "64", "96", "--val", drawn_splits["val"], "--images", "3", "--json", str(folder / "report.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "MOST", 3)
        patch.setattr(entrants, "cores", lambda: 1)
        assert export.main([str(folder / "student"), "--to", "torch-export", "--out", str(folder), *arguments]) == 0
    return folder


def test_the_file_is_proved(written: Path) -> None:
    checkpoint, file = json.loads((written / "report.json").read_text())["rows"]
    assert file["name"] == "model.pt2" and file["format"] == "torch.export"
    assert file["agreement"]["alone"] == 0 and file["agreement"]["detections"] > 30
    assert alike(file["metrics"], checkpoint["metrics"]) and file["latency"]["1"]["median"] > 0
    assert file["bytes"] == (written / "model.pt2").stat().st_size
    assert {path.name for path in written.iterdir()} == {"student", "model.pt2", "report.json"}


def test_it_is_loaded_like_a_checkpoint(written: Path, drawn_splits: dict[str, str]) -> None:
    file, checkpoint = (headkd_ray.load(written / name) for name in ("model.pt2", "student"))
    assert file.description == checkpoint.description.model_copy(update={"size": (64, 96)})
    samples = [sample.pixels() for sample in ShardSet.open(drawn_splits["val"]).samples(4)]
    shown = [Predictor(checkpoint.network, file.description).batch(pixels) for pixels in samples]
    for pixels, same in zip(samples, shown, strict=True):
        (wanted,), (found,) = checkpoint.detect_batch(same), file(pixels)
        assert len(found) == len(wanted) > 0 and found.names == wanted.names
        np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-2)
    joined = {name: np.concatenate([graph_inputs(each)[name] for each in shown]) for name in graph_inputs(shown[0])}
    boxes, _, _ = file.network._run(joined)  # type: ignore[attr-defined]
    assert boxes.shape[0] == 4, "the batch is not variable"


def test_it_needs_torch_and_torchvision_alone_and_tells_nothing_of_this_machine(written: Path) -> None:
    with zipfile.ZipFile(written / "model.pt2") as archive:
        graph = archive.read("archive/models/model.json").decode()
    used = {target.split(".")[2] for target in re.findall(r'"target": "(torch\.ops[^"]*)"', graph)}
    assert used == {"aten", "torchvision"}
    assert "headkd_ray" not in graph and ".py" not in graph


Change = Callable[[dict[str, bytes], Path], None]


def _graph(old: str, new: str) -> Change:
    def change(parts: dict[str, bytes], mark: Path) -> None:
        text = parts["models/model.json"].decode()
        assert re.search(old, text)
        parts["models/model.json"] = re.sub(old, lambda match: new.replace("MARK", str(mark)), text, count=1).encode()

    return change


class Bomb:
    """An object that makes a folder when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.mark,)


def _pickled(mark: Path) -> bytes:
    file = io.BytesIO()
    torch.save(({"x": Bomb(mark)}, {}), file)
    return file.getvalue()


def _weight(parts: dict[str, bytes], mark: Path) -> None:
    name = "data/weights/model_weights_config.json"
    parts["data/weights/weight_0"] = _pickled(mark)
    parts[name] = parts[name].replace(b'"use_pickle": false', b'"use_pickle": true', 1)


def _constant(parts: dict[str, bytes], mark: Path) -> None:
    name = "data/constants/model_constants_config.json"
    parts["data/constants/opaque_obj_0"] = pickle.dumps(Bomb(mark))
    parts[name] = re.sub(rb'"path_name": "[^"]*"', b'"path_name": "opaque_obj_0"', parts[name], count=1)


def _inputs(parts: dict[str, bytes], mark: Path) -> None:
    parts["data/sample_inputs/model.pt"] = _pickled(mark)


def _library(parts: dict[str, bytes], mark: Path) -> None:
    parts["data/aotinductor/model/model.so"] = b"code"


STRANGERS: dict[str, tuple[Change, str]] = {
    "a weight": (_weight, "a pickle"),
    "a constant": (_constant, "a part 'data/constants/opaque_obj_0'"),
    "example inputs": (_inputs, "pickled example inputs"),
    "a library": (_library, "a part 'data/aotinductor/model/model.so'"),
    "any function": (_graph(r"torch\.ops\.aten\.conv2d\.default", "torch.hub.load"), "target 'torch.hub.load'"),
    "a method": (_graph(r"torch\.ops\.aten\.conv2d\.default", "_operator.methodcaller"), "target '_operator.methodcaller'"),
    "a file": (_graph(r"torch\.ops\.aten\.conv2d\.default", "torch.ops.aten.from_file.default"), "target 'torch.ops.aten.from"),
    "a guard": (
        _graph(r'"guards_code": \[\]', "\"guards_code\": [\"__import__('os').mkdir('MARK')\"]"),
        "guards_code with code",
    ),
    "a size": (_graph(r'"expr_str": "[^"]*"', "\"expr_str\": \"__import__('os').mkdir('MARK')\""), "expr_str "),
    "a name": (_graph(r'"name": "images"', "\"name\": \"images=open('MARK', 'w')\""), 'name "images=open('),
    "a container": (_graph(r"builtins\.dict", "collections.defaultdict"), "a container 'collections.defaultdict'"),
    "a note": (_graph(r'"metadata": \{\}', '"metadata": {"source_fn_stack": "a,torch.hub.load"}'), "metadata "),
}
"""What torch.export.load would run, call or import, and what the error says of it."""


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_file_with_code_in_it_is_not_read(kind: str, written: Path, tmp_path: Path) -> None:
    change, said = STRANGERS[kind]
    with zipfile.ZipFile(written / "model.pt2") as archive:
        parts = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    change(parts, tmp_path / "it ran")
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        for name, content in parts.items():
            archive.writestr(f"archive/{name}", content)
    with pytest.raises(CheckpointError) as error:
        headkd_ray.load(tmp_path / "model.pt2")
    assert str(error.value).startswith(f"{tmp_path}/model.pt2: headkd export did not write this file: it has {said}")
    assert not (tmp_path / "it ran").exists()


def test_a_damaged_file(written: Path, tmp_path: Path) -> None:
    content = (written / "model.pt2").read_bytes()
    for wrong in (content[:-100], b"", b"text"):
        (tmp_path / "model.pt2").write_bytes(wrong)
        with pytest.raises(CheckpointError, match=r"model\.pt2: is not a file of torch\.export, or is damaged; export"):
            headkd_ray.load(tmp_path / "model.pt2")


def file_of(variant: str, **changes: Any) -> TorchFileNetwork:
    detector = detector_of(variant)
    return TorchFileNetwork(torch_bytes(detector, description_of(detector, **changes)), "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_of_variable_size_detects_what_the_detector_detects(variant: str) -> None:
    """As in ``test_onnx_file``: maps of one cell to a dozen; and a batch of several."""
    detector, file = detector_of(variant), file_of(variant)
    assert file.description == description_of(detector)
    ours, theirs = Predictor(TorchNetwork(detector, torch.device("cpu")), file.description), Predictor(file, file.description)
    agreement = Agreement()
    for number, (height, width) in enumerate([(40, 60), (300, 90), (20, 200), (96, 96)]):
        pixels = photo(height, width, number)
        agreement.add(ours.detect(pixels), theirs.detect(pixels), number)
    assert agreement.detections > 30 and agreement.holds, agreement
    assert agreement.box < 0.01 and agreement.score < 1e-5
    data = batch()
    given = {"images": data["images"].permute(0, 2, 3, 1).contiguous(), "sizes": data["sizes"], "original_sizes": data["sizes"]}
    boxes, scores, labels = (torch.from_numpy(each) for each in file._run({name: each.numpy() for name, each in given.items()}))
    with torch.no_grad():
        wanted = detector(data["images"], data["sizes"])
    count = wanted.scores.shape[1]
    torch.testing.assert_close(scores[:, :count], wanted.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(labels[:, :count], wanted.labels)
    torch.testing.assert_close(boxes[:, :count], wanted.boxes, rtol=0, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fcos", "faster_rcnn"])
def test_raw_outputs_are_the_head_s(kind: str) -> None:
    file = file_of(kind, outputs="raw")
    shown = Predictor(file, file.description).batch(photo(50, 90))
    given = graph_inputs(shown)
    with torch.no_grad():
        wanted = RawGraph(detector_of(kind))(torch.from_numpy(given["images"]), torch.from_numpy(given["sizes"]))
    for tensor, output in zip(wanted.values(), file.run(shown), strict=True):
        torch.testing.assert_close(torch.from_numpy(output), tensor, rtol=1e-3, atol=1e-3)
