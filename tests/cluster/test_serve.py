"""The Ray Serve example is started and asked."""

from __future__ import annotations

import importlib.util
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import headkd_ray
from tests.data.coco_files import encoded, pixels
from tests.support import micro_teacher

pytest.importorskip("ray.serve", exc_type=ImportError)
EXAMPLE = Path(__file__).parents[2] / "cluster" / "serve.py"
PORT = 8764


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("headkd_serve_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "headkd_serve_example", module)
    spec.loader.exec_module(module)
    import cloudpickle

    cloudpickle.register_pickle_by_value(module)  # the replica cannot import it by this name
    return module


def post(body: bytes) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{PORT}/", data=body), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_the_example_answers_with_what_load_detects(ray_cluster: None, example: ModuleType, tmp_path: Path) -> None:
    from ray import serve

    teacher = micro_teacher(tmp_path / "teacher", ("cat", "dog"), data={"eval_short_side": 64, "long_side": 96})
    photo = encoded(pixels(5, 90, 60), "PNG")
    (tmp_path / "photo.png").write_bytes(photo)
    (wanted,) = headkd_ray.load(teacher, "cpu")(str(tmp_path / "photo.png"))
    wanted = wanted.above(0.2)
    serve.start(http_options={"port": PORT})
    try:
        serve.run(example.app({"checkpoint": teacher, "score": "0.2"}))
        status, answer = post(photo)
        assert status == 200 and (answer["height"], answer["width"]) == (60, 90)
        assert [each["class"] for each in answer["detections"]] == wanted.names != []
        assert [each["score"] for each in answer["detections"]] == pytest.approx(wanted.scores.tolist())
        for each, box in zip(answer["detections"], wanted.boxes.tolist(), strict=True):
            assert each["box"] == pytest.approx(box, abs=1e-3)
        assert post(b"nonsense") == (400, {"error": "the image cannot be read: not a JPEG, PNG, WebP, BMP or TIFF"})
    finally:
        serve.shutdown()
