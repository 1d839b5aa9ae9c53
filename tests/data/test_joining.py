"""Several sources become one split: ids, classes and folders are united, and sizes that are not written are read."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from PIL import Image

from headkd_ray.data.packing import prepare_split
from headkd_ray.errors import DataError
from headkd_ray.prepare import main
from tests.data.coco_files import CATEGORIES, CocoFiles, exif_photo, make_coco
from tests.data.format_files import make_voc, make_yolo, voc_object, voc_xml


def two(tmp_path: Path) -> tuple[CocoFiles, CocoFiles]:
    return make_coco(tmp_path / "a", images=4), make_coco(tmp_path / "b", images=6)


def boxes_by_file(json_path: Path | str) -> dict[str, list[tuple]]:
    data = json.loads(Path(json_path).read_text())
    names = {category["id"]: category["name"] for category in data["categories"]}
    files = {image["id"]: image["file_name"] for image in data["images"]}
    found: dict[str, list[tuple]] = {name: [] for name in files.values()}
    for a in data["annotations"]:
        found[files[a["image_id"]]].append((names[a["category_id"]], *a["bbox"], a["area"], a["iscrowd"]))
    return {name: sorted(boxes) for name, boxes in found.items()}


def test_jsons_with_the_same_ids_are_numbered_anew_and_classes_united_by_name(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    other.data["categories"] = [{"id": 90, "name": "ant"}, {"id": 7, "name": "wasp"}, {"id": 31, "name": "moth"}]
    other.save()
    merged = tmp_path / "merged.json"
    shards = prepare_split([one.json, other.json], [one.images, other.images], str(tmp_path / "out"), write_coco=str(merged))
    assert shards.meta.classes == ("ant", "moth", "zebra", "wasp") and shards.meta.category_ids == (1, 2, 3, 4)
    expected = {f"a/images/{name}": boxes for name, boxes in boxes_by_file(one.json).items()}
    expected |= {f"b/images/{name}": boxes for name, boxes in boxes_by_file(other.json).items()}
    assert boxes_by_file(merged) == expected
    assert [warning for warning in shards.meta.warnings if "numbered anew" in warning] == [
        f"2 sources use the same {what} ids for different things: all are numbered anew, from 1"
        for what in ("category", "image", "annotation")
    ]
    again = prepare_split(str(merged), str(tmp_path), str(tmp_path / "out"))
    assert again.meta.fingerprint == shards.meta.fingerprint, "the JSON that was written is the same split"


def test_ids_that_are_different_stay(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    for image in other.data["images"]:
        image["id"] += 10_000
    for annotation in other.data["annotations"]:
        annotation["id"] += 10_000
        annotation["image_id"] += 10_000
    other.save()
    shards = prepare_split([one.json, other.json], [one.images, other.images], str(tmp_path / "out"))
    assert not shards.meta.warnings and shards.meta.category_ids == tuple(sorted(c["id"] for c in CATEGORIES))
    assert set(shards.index.image_id.tolist()) == {image["id"] for files in (one, other) for image in files.data["images"]}


def test_one_folder_for_several_jsons_and_a_photo_in_two_of_them(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    second = copy.deepcopy(files.data)
    second["images"] = second["images"][:2]
    second["annotations"] = [a for a in second["annotations"] if a["image_id"] in (500, 493)]
    (tmp_path / "second.json").write_text(json.dumps(second))
    shards = prepare_split([files.json, str(tmp_path / "second.json")], files.images, files.out)
    assert shards.meta.images == 14
    (shared,) = [warning for warning in shards.meta.warnings if "share their file" in warning]
    assert shared.startswith("4 of 14 images share their file with another one")


def test_sources_of_different_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_coco(tmp_path / "coco", images=3)
    yaml = make_yolo(tmp_path / "yolo", ["0 0.5 0.5 0.5 0.5", ""])
    voc = make_voc(tmp_path / "voc", [voc_xml(0, voc_object("bee", 2, 2, 9, 9))])
    out = str(tmp_path / "out")
    assert main([yaml, voc, "--out", out, "--write-coco", f"{out}.json"]) == 0
    assert set(boxes_by_file(f"{out}.json")) == {"yolo/images/train/0.jpg", "yolo/images/train/1.jpg", "voc/JPEGImages/0.jpg"}
    assert "3 images, 2 boxes, 2 classes" in capsys.readouterr().out
    assert prepare_split(f"{out}.json", str(tmp_path), out).meta.images == 3
    with pytest.raises(DataError, match=r"data.yaml: names the folders of its images itself"):
        prepare_split([files.json, yaml], files.images, f"{out}2")


def test_all_sources_faults_are_told_at_once_with_the_names_of_their_files(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    one.data["annotations"][0]["bbox"] = [3, 3, 0, 5]
    other.data["images"][1]["file_name"] = "../x.jpg"
    with pytest.raises(DataError) as caught:
        prepare_split([one.save().json, other.save().json], [one.images, other.images], str(tmp_path / "out"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [one.json, other.json]
    assert str(caught.value).startswith("the annotations cannot be used:")


def test_a_missing_photo_of_one_source_has_a_hint(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    other.data["images"][1]["file_name"] = "else/1.png"
    with pytest.raises(DataError, match=r"b/images/else/1.png \(image \d+; did you mean 'deep/1.png'\?\): no such file"):
        prepare_split([one.json, other.save().json], [one.images, other.images], str(tmp_path / "out"))


def test_sizes_that_are_not_written_are_those_of_the_upright_files(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    for number, orientation in ((0, 6), (3, 3)):
        exif_photo(files, number, orientation)
    expected = [Image.open(Path(files.images) / image["file_name"]).size for image in files.data["images"]]
    expected[0] = expected[0][::-1]
    for number, image in enumerate(files.data["images"]):
        del image["width"], image["height"]
        if number % 2:
            image.update(width=None, height=None)
    shards = prepare_split(files.save().json, files.images, files.out)
    truth = {image["id"]: (image["width"], image["height"]) for image in shards.ground_truth()["images"]}
    assert [truth[image["id"]] for image in files.data["images"]] == expected and shards.meta.upright
    assert shards.meta.warnings == (
        "12 of 12 images have no width and height, which were read from the files",
        "EXIF orientation: 2 images are turned upright (annotation tools show photos upright; prepare with --exif ignore if "
        "yours did not)",
    )
    stored = prepare_split(files.json, files.images, f"{files.out}2", exif="ignore")
    assert not stored.meta.upright and {
        (i["width"], i["height"]) for i in stored.ground_truth()["images"] if i["id"] == 500
    } == {(40, 30)}


def test_photos_without_a_size_that_cannot_be_read_are_told_with_the_json_s_other_faults(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    for image in files.data["images"]:
        del image["width"], image["height"]
    (Path(files.images) / "0.jpg").unlink()
    (Path(files.images) / "deep" / "1.png").write_bytes(b"GIF89a")
    files.data["annotations"][-1]["category_id"] = 8
    with pytest.raises(DataError) as caught:
        prepare_split(files.save().json, files.images, files.out)
    missing, other, category = sorted(caught.value.problems, key=len)
    assert "0.jpg (image 500): no such file" in missing and "but a GIF" in category and "unknown category" in other


def test_places_that_are_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_coco(tmp_path)
    for places, message in {
        (files.json,): "annotations.json: give the folder of its images, too",
        (files.images,): "is a folder without data.yaml, _annotations.coco.json or XML files",
        (str(tmp_path / "none"), files.images): "none: no such file; check the path of the COCO JSON",
        (str(tmp_path / "none.yaml"),): "none.yaml: no such file; check the path of the data.yaml",
    }.items():
        with pytest.raises(SystemExit):
            main([*places, "--out", files.out])
        assert message in capsys.readouterr().err


def test_a_folder_of_roboflow_s_coco_export(tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=3)
    (Path(files.images) / "_annotations.coco.json").write_text(Path(files.json).read_text())
    assert prepare_split(files.images, None, files.out).meta.images == 3
