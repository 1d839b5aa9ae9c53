"""predict with photos, videos, patterns and parts in an S3 store."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from headkd_ray import predict
from headkd_ray.deploy.predictor import load
from headkd_ray.predicting.part_files import unfinished
from headkd_ray.predicting.part_maker import PartMaker
from headkd_ray.predicting.part_plan import PartsRequest, make_plan
from headkd_ray.predicting.video import VideoWriter
from headkd_ray.storage import Folder
from tests.data.coco_files import encoded, pixels
from tests.s3 import uri
from tests.support import micro_teacher

pytest.importorskip("av")


def test_photos_and_a_video_on_s3(s3: str, tmp_path: Path) -> None:
    def place(path: str) -> str:
        return uri("bucket", s3, f"predicting/{path}")

    teacher = micro_teacher(tmp_path / "teacher", ("cat", "dog"), data={"eval_short_side": 64, "long_side": 96})
    for name in ("2025/a/x.jpg", "2026/a/x.jpg", "2026/b/x.jpg", "2026/b/notes.txt"):
        folder, own = Folder.of_file(place(name))
        folder.write(own, encoded(pixels(1, 90, 60), "JPEG"))
    with VideoWriter(Folder.open(place("2026/b")), "clip.mp4", Fraction(5)) as writer:
        for number in range(3):
            writer.write(torch.full((3, 48, 64), 50 * number, dtype=torch.uint8), number / 5)

    out = Folder.open(place("out"))
    assert predict.main([teacher, place("2026/**/*.*"), "--out", out.uri]) == 0
    content = json.loads(out.read("detections.json"))
    photos = [place("2026/a/x.jpg"), place("2026/b/x.jpg")]
    assert [image["file_name"] for image in content["images"]] == [
        photos[0],
        *(f"{place('2026/b/clip.mp4')}#{number}" for number in range(3)),
        photos[1],
    ]
    assert out.names() == ["0001_x.jpg", "0002_clip.mp4", "0005_x.jpg", "detections.json"]

    parts = Folder.open(place("parts"))
    request = PartsRequest(teacher, ({"id": 1, "name": "cat"},), "jsonl", 2)
    plan = make_plan(request, [place("202*/[ab]")], parts)
    assert (plan.images, plan.parts) == (3, 2) and unfinished(parts, 2, "jsonl") == [0, 1]
    maker = PartMaker(load(teacher, "cpu"), plan, parts, 4, 1)
    assert [maker.make(1), maker.make(0)] == [1, 2] and unfinished(parts, 2, "jsonl") == []
    rows = [json.loads(line) for number in (0, 1) for line in parts.read(f"part-{number:06d}.jsonl").splitlines()]
    assert [row["file_name"] for row in rows] == [place("2025/a/x.jpg"), *photos]
    assert make_plan(request, [place("202*/[ab]")], parts) == plan
