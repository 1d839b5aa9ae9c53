"""A prediction in parts, without Ray: what is written, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from headkd_ray.deploy.predictor import load
from headkd_ray.errors import DataError, StorageError
from headkd_ray.predicting.part_files import Format, problems_in, unfinished
from headkd_ray.predicting.part_maker import PartMaker
from headkd_ray.predicting.part_plan import PartsRequest, Plan, make_plan
from headkd_ray.storage import Folder
from tests.data.coco_files import encoded, pixels
from tests.support import micro_teacher


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a detector and seven photos, the third of which is none."""
    folder: Path = tmp_path_factory.mktemp("given")
    micro_teacher(folder / "teacher", ("cat", "dog"), data={"eval_short_side": 64, "long_side": 96})
    (folder / "photos").mkdir()
    for number in range(7):
        (folder / "photos" / f"{number}.jpg").write_bytes(encoded(pixels(number, 90 - number % 2, 60), "JPEG"))
    (folder / "photos" / "2.jpg").write_bytes(b"nonsense")
    return folder


def planned(given: Path, out: Path, places: str = "photos", output: Format = "jsonl", part_images: int = 3) -> Plan:
    request = PartsRequest(str(given / "teacher"), ({"id": 1, "name": "cat"},), output, part_images)
    Folder.open(out).create()
    return make_plan(request, [str(given / places)], Folder.open(out))


def made(given: Path, out: Path, output: Format = "jsonl", parts: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    """Make parts, and return the rows of all that are there."""
    maker = PartMaker(load(given / "teacher", "cpu"), planned(given, out, output=output), Folder.open(out), 2, 2)
    for number in parts:
        maker.make(number)
    files = sorted(out.glob(f"part-*[0-9].{output}"))
    if output == "parquet":
        return [row for file in files for row in pq.read_table(file).to_pylist()]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_row_for_each_image_in_order(given: Path, tmp_path: Path) -> None:
    rows = made(given, tmp_path)
    assert [row["image_id"] for row in rows] == list(range(1, 8))
    assert [row["file_name"] for row in rows] == [f"{given}/photos/{number}.jpg" for number in range(7)]
    assert [row["problem"] is None for row in rows] == [number != 2 for number in range(7)]
    predictor = load(given / "teacher", "cpu")
    for row in rows:
        if row["problem"] is not None:
            assert "not a JPEG" in row["problem"] and not row["detections"] and row["height"] is None
            continue
        (alone,) = predictor(row["file_name"])
        assert (row["height"], row["width"]) == alone.size and len(row["detections"]) == len(alone) > 0
        for found, wanted in zip(row["detections"], alone.to_coco(), strict=True):
            assert found["category_id"] == wanted["category_id"] and found["score"] == pytest.approx(wanted["score"], abs=1e-5)
            assert found["bbox"] == pytest.approx(wanted["bbox"], abs=1e-3)
    assert problems_in(Folder.open(tmp_path), 3) == [f"{given}/photos/2.jpg: {rows[2]['problem']}"]


def test_parquet_has_the_same_rows(given: Path, tmp_path: Path) -> None:
    lines, table = made(given, tmp_path / "jsonl"), made(given, tmp_path / "parquet", "parquet")
    for row, same in zip(lines, table, strict=True):
        assert {**row, "detections": []} == {**same, "detections": []}
        for found, wanted in zip(same["detections"], row["detections"], strict=True):
            assert found["bbox"] == pytest.approx(wanted["bbox"]) and found["score"] == pytest.approx(wanted["score"])


def test_what_is_finished_is_not_done_again(given: Path, tmp_path: Path) -> None:
    out = Folder.open(tmp_path)
    made(given, tmp_path, parts=(1,))
    assert unfinished(out, 3, "jsonl") == [0, 2]
    (tmp_path / "part-000002.jsonl.tmp").write_text("what a killed process leaves behind")
    made(given, tmp_path, parts=(0,))
    assert unfinished(out, 3, "jsonl") == [2] and unfinished(out, 3, "jsonl", retry=True) == [0, 2]


def test_the_list_of_images_is_made_once(given: Path, tmp_path: Path) -> None:
    plan = planned(given, tmp_path)
    assert (plan.images, plan.parts) == (7, 3)
    new = given / "photos" / "0_new.jpg"
    new.touch()
    try:
        assert planned(given, tmp_path) == plan
    finally:
        new.unlink()


def test_a_part_that_is_tried_again(given: Path, tmp_path: Path) -> None:
    made(given, tmp_path)
    broken, before = given / "photos" / "2.jpg", (given / "photos" / "2.jpg").read_bytes()
    broken.write_bytes(encoded(pixels(2, 90, 60), "JPEG"))
    try:
        rows = made(given, tmp_path, parts=(0,))
    finally:
        broken.write_bytes(before)
    assert not problems_in(Folder.open(tmp_path), 3) and all(row["problem"] is None for row in rows)


def test_another_prediction_s_folder_is_refused(given: Path, tmp_path: Path) -> None:
    planned(given, tmp_path)
    for options, reason in (
        ({"output": "parquet", "part_images": 2}, "with --format jsonl, with --part-images 3"),
        ({"places": "photos/*.jpg"}, "of other images"),
    ):
        with pytest.raises(DataError, match=rf"holds another prediction \({reason}\); choose another --out"):
            planned(given, tmp_path, **options)
    request = PartsRequest(micro_teacher(given / "other", ("cat", "dog"), seed=4), ({"id": 1, "name": "cat"},), "jsonl", 3)
    with pytest.raises(DataError, match=rf"holds another prediction \(of {given}/teacher\)"):
        make_plan(request, [str(given / "photos")], Folder.open(tmp_path))
    (tmp_path / "prediction.json").write_text("{")
    with pytest.raises(DataError, match=r"prediction\.json: is damaged"):
        planned(given, tmp_path)


def test_a_store_that_has_a_problem_is_not_taken_for_bad_images(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Folder, name: str) -> bytes:
        if name.endswith(".jpg"):
            raise StorageError("s3://bucket: the storage service has a problem; try again later")
        return Path(folder.at(name)).read_bytes()

    monkeypatch.setattr(Folder, "read", refuse)
    with pytest.raises(StorageError, match=r"0.jpg: cannot be read \(s3://bucket: the storage service has a problem"):
        made(given, tmp_path, parts=(0,))
    assert not list(tmp_path.glob("part-*"))
