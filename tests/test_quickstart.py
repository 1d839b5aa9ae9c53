"""The quickstart with micro jobs, in this process: own photos from two folders, and any place for the results."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from headkd_ray import quickstart
from headkd_ray.data.shards import ShardSet
from headkd_ray.report.draw import TILE
from headkd_ray.storage import Folder
from tests.data.format_files import yolo_of_coco
from tests.s3 import uri
from tests.support import MICRO_TEACHER, micro_job

JOBS: dict[str, dict[str, Any]] = {
    "teacher": {"student": MICRO_TEACHER},
    "baseline": {},
    "head": {"method": "head", "teacher": {"checkpoint": "not yet"}},
}


@pytest.fixture
def own(tmp_path: Path, drawn_splits: dict[str, str]) -> list[str]:
    """Return arguments: training and validation images in two folders under the same names, and micro jobs."""
    drawn = Path(drawn_splits["val"]).parent
    for name in ("train", "val"):
        coco = json.loads((drawn / f"{name}.json").read_text())
        coco["images"] = coco["images"][:4]
        kept = {image["id"] for image in coco["images"]}
        coco["annotations"] = [entry for entry in coco["annotations"] if entry["image_id"] in kept]
        (tmp_path / name).mkdir()
        for number, image in enumerate(coco["images"]):
            (tmp_path / name / f"{number}.jpg").write_bytes((drawn / "images" / image["file_name"]).read_bytes())
            image["file_name"] = f"{number}.jpg"
        (tmp_path / f"{name}.json").write_text(json.dumps(coco))
    (tmp_path / "jobs").mkdir()
    for name, sections in JOBS.items():
        optim, evaluation = {"epochs": 1, "milestones": []}, {"every_epochs": 1}
        job = micro_job(Path("unused"), {"train": "-", "val": "-"}, name, optim=optim, eval=evaluation, **sections)
        (tmp_path / "jobs" / f"{name}.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    places = {"train": "train.json", "val": "val.json", "images": "train", "val-images": "val", "jobs": "jobs"}
    return [argument for name, place in places.items() for argument in (f"--{name}", str(tmp_path / place))]


@pytest.mark.parametrize("place", ["exp: new #2", "memory://quick/runs", pytest.param("s3", marks=pytest.mark.slow)])
def test_own_photos_in_two_folders_and_any_place_for_the_results(
    place: str,
    own: list[str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if place.startswith("memory"):  # and the other format
        splits = {name: (tmp_path / f"{name}.json", tmp_path / name) for name in ("train", "val")}
        own = ["--train", yolo_of_coco(tmp_path / "yolo", splits), *own[-2:]]
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    out = uri("bucket", request.getfixturevalue("s3"), "quick") if place == "s3" else place
    folder = Folder.open(out)
    # The teacher, of another kind, could not have this key.
    assert quickstart.main([*own, "--out", out, "student.head.convs=2"]) == 0
    said = capsys.readouterr().out
    assert "AP by class (%)" in said and f"picture of detections: {folder.named('detections.png')}" in said
    assert f"head checkpoint: {(folder / 'head' / 'student').address}" in said
    cards = [json.loads((folder / run / "student").read("model.json")) for run in ("baseline", "head")]
    assert [card["spec"]["head"]["convs"] for card in cards] == [2, 2]
    assert (folder / "head" / "student").has("model.safetensors")
    shards = ShardSet.open((folder / "data" / "val").uri)
    assert (shards.meta.images, len(shards.meta.classes)) == (4, 8) and shards.meta.boxes > 0
    picture = np.asarray(Image.open(io.BytesIO(folder.read("detections.png"))))
    assert picture.shape[0] > 4 * TILE and picture.shape[1] > 4 * TILE
    assert {path.name for path in tmp_path.iterdir()} - before <= {place}


def test_what_is_wrong_with_a_job_is_told_before_the_data_is_prepared(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        quickstart.main([*own, "--out", str(tmp_path / "out"), "optim.epoch=2"])
    assert caught.value.code == 2 and not (tmp_path / "out").exists()
    assert "optim.epoch: unknown key; did you mean optim.epochs?" in capsys.readouterr().err


def test_a_teacher_of_one_s_own_is_not_ignored(own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        quickstart.main([*own, "--out", str(tmp_path / "out"), "teacher.checkpoint=mine.pth"])
    assert caught.value.code == 2 and not (tmp_path / "out").exists()
    assert "error: teacher.checkpoint: the quickstart trains its own teacher; for another use" in capsys.readouterr().err


def test_validation_images_alone_are_no_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quickstart.main(["--val-images", "photos"])
    assert "your own photos need --train, --val and --images together" in capsys.readouterr().err
