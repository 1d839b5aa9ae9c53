"""Every fault of a COCO JSON is reported, all at once, with file, record and remedy."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headkd_ray.data.box_forms import misread
from headkd_ray.data.coco import read_coco
from headkd_ray.errors import DataError
from tests.data.coco_files import CocoFiles, make_coco, spread_boxes

Spoil = Callable[[dict[str, Any]], Any]


def set_bbox(*bbox: float) -> Spoil:
    return lambda data: data["annotations"][0].update(bbox=list(bbox))


FAULTS: dict[str, tuple[Spoil, str]] = {
    "duplicate image id": (lambda d: d["images"].append(d["images"][0]), "image 500 .*duplicate image id"),
    "duplicate annotation id": (lambda d: d["annotations"][1].update(id=1000), "annotation 1000: duplicate annotation id"),
    "unknown image": (lambda d: d["annotations"][0].update(image_id=9), "annotation 1000, image_id 9: .*unknown image"),
    "unknown category": (lambda d: d["annotations"][0].update(category_id=8), "category_id 8: .*unknown category"),
    "duplicate category id": (lambda d: d["categories"].append({"id": 7, "name": "new"}), "category 7 .*duplicate category id"),
    "duplicate category name": (lambda d: d["categories"].append({"id": 8, "name": "ant"}), "duplicate category name"),
    "no categories": (lambda d: d["categories"].clear(), "no categories"),
    "no width": (lambda d: d["images"][0].pop("width"), "image 500, None x 30: 'width' and 'height'"),
    "no size": (
        lambda d: (d["images"][0].pop("width"), d["images"][0].pop("height")),
        "image 500 .0.jpg. has none: 'width' and",
    ),
    "no file name": (lambda d: d["images"][0].pop("file_name"), "image 500, file_name None"),
    "absolute file name": (lambda d: d["images"][0].update(file_name="/etc/x.jpg"), "relative to IMAGES_DIR"),
    "file name that leaves": (lambda d: d["images"][0].update(file_name="a/../../x.jpg"), "a/../../x.jpg.*stays in it"),
    "file name that is no text": (lambda d: d["images"][0].update(file_name="caf\udce9.jpg"), "valid Unicode"),
    "class name that is no text": (lambda d: d["categories"][0].update(name="\ud800"), "category 90: .*valid Unicode"),
    "image without id": (
        lambda d: d["images"].append({**d["images"][0], "id": "abc"}),
        "image 'abc': image record without an integer 'id'",
    ),
    "annotation without id": (lambda d: d["annotations"][0].pop("id"), "annotation at position 0: .*without an integer 'id'"),
    "annotations of faulty image": (lambda d: d["images"][0].update(height=0), "image 500, 40 x 0: 'width' and 'height'"),
    "not a record": (lambda d: d["annotations"].append(3), "annotation at position .*without an integer 'id'"),
    "zero width": (set_bbox(3, 3, 0, 5), "annotation 1000, bbox .*without area.*--fix-boxes"),
    "negative height": (set_bbox(3, 3, 5, -4), "without area"),
    "wholly outside": (set_bbox(50, 3, 5, 4), "without area inside its image"),
    "reaches outside": (set_bbox(30, 3, 11.5, 4), "image 500 .0.jpg, 40 x 30.: box leaves the image by more than 1 px"),
    "starts outside": (set_bbox(-2, 3, 6, 4), "leaves the image"),
    "three numbers": (set_bbox(1, 2, 3), "'bbox' must be four finite numbers"),
    "not a number": (set_bbox(float("nan"), 2, 3, 4), "'bbox' must be four finite numbers"),
    "negative area": (lambda d: d["annotations"][0].update(area=-3), "'area' must be"),
    "integer beyond float": (set_bbox(3, 3, 10**400, 5), "annotation 1000, bbox .3, 3, 1000.*four finite numbers"),
    "largest float": (set_bbox(1e308, 1, 1e308, 5), "annotation 1000, bbox .*without area"),
    "area beyond float": (lambda d: d["annotations"][0].update(area=10**400), "annotation 1000, area 1000.*'area' must be"),
    "area above the image's": (lambda d: d["annotations"][0].update(area=1e300), "area 1e.300: 'area' must be"),
    "half an id": (lambda d: d["categories"].append({"id": 7.5, "name": "fly"}), "category 7.5: .*integer 'id'"),
    "ignore flag": (lambda d: d["annotations"][0].update(ignore="maybe"), "annotation 1000, ignore 'maybe': .*must be 0 or 1"),
    "all to be ignored": (lambda d: [a.update(ignore=1) for a in d["annotations"]], "no usable boxes"),
    "crowd flag": (lambda d: d["annotations"][0].update(iscrowd=2), "'iscrowd' must be 0 or 1"),
    "no images": (lambda d: (d["images"].clear(), d["annotations"].clear()), "no images"),
    "no boxes": (lambda d: d["annotations"].clear(), "no usable boxes"),
    "crowds only": (lambda d: [a.update(iscrowd=1) for a in d["annotations"]], "no usable boxes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_record(fault: str, tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    spoil, message = FAULTS[fault]
    spoil(files.data)
    files.save()
    with pytest.raises(DataError, match=message) as caught:
        read_coco(files.json)
    assert len(caught.value.problems) == 1
    assert files.json in caught.value.problems[0]


def test_all_faults_at_once_and_long_lists_are_cut(tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=200)
    for annotation in files.data["annotations"]:
        annotation["category_id"] = 5
    files.data["images"][1]["id"] = 500
    files.data["annotations"][0]["bbox"] = [1, 1, 0, 0]
    with pytest.raises(DataError) as caught:
        read_coco(files.save().json)
    text = str(caught.value)
    assert "duplicate image id" in text and "unknown image" in text and "without area" in text
    assert text.count("unknown category") == 21
    assert f"… and {len(files.data['annotations']) - 20} more ({len(files.data['annotations'])} in all)" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[1, 2]", "not a COCO file: holds a list"),
        ('{"images": [], "annotations": {}}', "no list 'annotations', 'categories'"),
        ('{"version": 1}', "found: version"),
        ("\x00\xff", "not JSON"),
        ('{"images": [{"id": 1,', "not JSON"),
        (
            '{"images": [], "annotations": [], "categories": [], "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "nested too deeply",
        ),
        ('{"images": [{"id": ' + "1" * 5000 + "}]}", "a number with thousands of digits"),
        ('{"images": [], "annotations": [], "annotations": [], "categories": []}', "has the key 'annotations' twice"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
)
def test_a_file_that_is_not_coco(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        read_coco(str(path))


@pytest.mark.parametrize("key", ["bbox", "id", "attributes"])
def test_a_value_that_is_nested_almost_as_deeply_as_can_be_read(key: str, tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=2)
    files.data["annotations"][0][key] = "HERE"
    nested = '{"attributes": ' * 800 + "1" + "}" * 800
    Path(files.json).write_text(json.dumps(files.data).replace('"HERE"', nested))
    with contextlib.suppress(DataError):
        read_coco(files.json)
        assert key == "attributes", "accepted"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json: no such file"):
        read_coco(str(tmp_path / "none.json"))


def test_slack_at_the_border_is_accepted_and_clipped_for_training_only(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    set_bbox(-0.5, 10, 41.25, 8)(files.data)
    split = read_coco(files.save().json)
    image = [record.id for record in split.images].index(500)
    assert [0, 10, 40, 18] in split.boxes(image).tolist()
    assert [-0.5, 10.0, 41.25, 8.0] in [annotation["bbox"] for annotation in split.ground_truth()["annotations"]]


def test_fix_boxes_clips_drops_and_tells(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    count = len(files.data["annotations"])
    set_bbox(30, 3, 30, 4)(files.data)
    files.data["annotations"][1]["bbox"] = [3, 3, 0, 5]
    split = read_coco(files.save().json, fix_boxes=True)
    assert len(split.label) == count - 1
    assert len(split.fixes) == 2
    assert "annotation 1000" in split.fixes[0] and "clipped to [30.0, 3.0, 10.0, 4.0]" in split.fixes[0]
    assert "annotation 999" in split.fixes[1] and "dropped" in split.fixes[1]
    fixed = next(annotation for annotation in split.ground_truth()["annotations"] if annotation["id"] == 1000)
    assert fixed["bbox"] == [30, 3, 10, 4] and fixed["area"] == 40


def test_labels_are_contiguous_in_the_order_of_category_ids(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    split = read_coco(files.json)
    assert split.category_ids == (7, 31, 90) and split.classes == ("ant", "moth", "zebra")
    written = {annotation["id"]: annotation["category_id"] for annotation in split.ground_truth()["annotations"]}
    assert written == {annotation["id"]: annotation["category_id"] for annotation in files.data["annotations"]}
    assert [split.category_ids[label] for label in split.label] == [written[int(i)] for i in split.annotation_id]


def test_order_in_the_json_does_not_matter(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    one = read_coco(files.json)
    for records in (files.data["images"], files.data["annotations"], files.data["categories"]):
        records.reverse()
    assert read_coco(files.save().json).digest() == one.digest()
    files.data["annotations"][0]["area"] += 1
    assert read_coco(files.save().json).digest() != one.digest()


def test_area_and_crowd_may_be_left_out(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    for annotation in files.data["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    split = read_coco(files.save().json)
    assert not split.crowd.any() and split.area.tolist() == pytest.approx([82.0] * len(split.area))
    assert json.dumps(split.ground_truth())


def test_ids_may_be_written_as_floats(tmp_path: Path) -> None:
    """Pandas writes them so for a column that had a gap."""
    files = make_coco(tmp_path)
    expected = read_coco(files.json)
    for records in (files.data["images"], files.data["annotations"], files.data["categories"]):
        for record in records:
            record.update({key: float(value) for key, value in record.items() if key == "id" or key.endswith("_id")})
    assert read_coco(files.save().json).digest() == expected.digest()


IGNORING: dict[str, dict[str, Any]] = {
    "mmdet, CrowdHuman's own": {"ignore": 1},
    "CrowdHuman": {"extra": {"ignore": 1, "box_id": 3}},
    "CVAT": {"attributes": {"Ignore": True, "occluded": False}},
    "OpenImages": {"IsGroupOf": 1},
    "Datumaro": {"attributes": {"is_crowd": "true"}},
}


@pytest.mark.parametrize("exporter", IGNORING)
def test_what_is_to_be_ignored_leaves_training_and_is_a_crowd_in_evaluation(exporter: str, tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    files.data["annotations"][1].update(IGNORING[exporter])
    ids = {a["id"] for a in files.data["annotations"] if a["iscrowd"]} | {999}
    split = read_coco(files.save().json)
    assert {int(i) for i in split.annotation_id[split.crowd]} == ids
    assert {a["id"] for a in split.ground_truth()["annotations"] if a["iscrowd"]} == ids
    ignored = [warning for warning in split.warnings if warning.startswith("1 of 15 annotations are marked to be ignored")]
    assert len(ignored) == (exporter not in ("OpenImages", "Datumaro"))


def test_many_crowds_are_told_and_crowds_alone_are_refused_with_their_likely_cause(tmp_path: Path) -> None:
    """CVAT writes masks painted with a brush as crowds: every one would be missing in training, and be background there."""
    files = make_coco(tmp_path, images=60)
    spread_boxes(files.data)
    for k, annotation in enumerate(files.data["annotations"]):
        annotation.update(iscrowd=int(k % 4 == 0), segmentation={"counts": [0, 3], "size": [24, 32]})
    (warning,) = read_coco(files.save().json).warnings
    assert warning == (
        "19 of 75 annotations are crowds, which are left out of training; CVAT marks each mask that is painted with a brush "
        "so: if they are single objects, set their 'iscrowd' to 0"
    )
    for annotation in files.data["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(DataError, match=r"no usable boxes: .* \(CVAT marks each mask .*, set their 'iscrowd' to 0\)"):
        read_coco(files.save().json)


def test_keys_whose_meaning_is_lost_are_told_once_with_their_count(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    for k, annotation in enumerate(files.data["annotations"]):
        annotation.update(
            ignore=0, difficult=k % 3 == 0, score=1, attributes={"rotation": 0.0 if k else 30.0, "occluded": False, "id": 7}
        )
    difficult, rotation = read_coco(files.save().json).warnings
    assert difficult.startswith("'difficult' is set in 5 of 15 annotations; they are trained on as ordinary boxes")
    assert rotation == "'attributes.rotation' is set in 1 of 15 annotations; 'bbox' is used as it is, without rotation"


def test_a_category_above_others_that_no_annotation_uses_is_no_class(tmp_path: Path) -> None:
    """Roboflow's first category is the project's name; a class that has the same name is not a duplicate."""
    files = make_coco(tmp_path)
    expected = read_coco(files.json)
    for category in files.data["categories"]:
        category["supercategory"] = "ant"
    files.data["categories"].insert(0, {"id": 0, "name": "ant", "supercategory": "none"})
    split = read_coco(files.save().json)
    assert split.digest() == expected.digest()
    assert split.warnings == ("category 0 ('ant') is not a class: no annotation uses it and others are below it",)
    files.data["annotations"][0]["category_id"] = 0
    files.data["categories"][0]["name"] = files.data["categories"][1]["supercategory"] = "insects"
    assert "insects" in read_coco(files.save().json).classes, "it is used"


def test_a_category_that_marks_what_to_ignore_is_told(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    files.data["categories"][0]["name"] = "ignored regions"  # VisDrone
    (warning,) = read_coco(files.save().json).warnings
    assert warning.startswith("'ignored regions' will be learnt like any other class")


def _rewritten(files: CocoFiles, form: Any, fractions: bool = False) -> CocoFiles:
    """Write boxes as ``form`` (4, 4) @ [x, y, width, height], with ``fractions`` in units of the image's size."""
    images = {image["id"]: image for image in files.data["images"]}
    for annotation in files.data["annotations"]:
        image = images[annotation["image_id"]]
        box = np.array(annotation["bbox"]) / ([image["width"], image["height"]] * 2 if fractions else 1)
        annotation["bbox"] = (np.array(form) @ box).round(4).tolist()
    return files.save()


XYWH = np.eye(4)
CORNERS = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
CENTRES = [[1, 0, 0.5, 0], [0, 1, 0, 0.5], [0, 0, 1, 0], [0, 0, 0, 1]]
FORMS: dict[str, tuple[Any, bool, str]] = {
    "fractions": (XYWH, True, r"38 of 38 boxes .*fractions of its size \(0 to 1\); write"),
    "YOLO": (CENTRES, True, r"fractions .*as \[centre x, centre y, width, height\]"),
    "corner fractions": (CORNERS, True, r"fractions .*as corners \[x1, y1, x2, y2\]"),
    "corners": (CORNERS, False, r"of 38 boxes leave .*while 38 fit as corners \[x1, y1, x2, y2\]"),
    "centres": (CENTRES, False, r"while 38 fit as \[centre x, centre y, width, height\]"),
    "y first": (XYWH[[1, 0, 3, 2]], False, r"while 38 fit as \[y, x, height, width\]"),
    "larger images": (2 * XYWH, False, r"reach to 1.\d\d times .*those of larger images"),
}


@pytest.mark.parametrize("fix_boxes", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_boxes_in_another_form_are_recognised_and_not_mended_one_by_one(form: str, fix_boxes: bool, tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=30)
    spread_boxes(files.data)
    assert read_coco(files.save().json).warnings == ()
    matrix, fractions, message = FORMS[form]
    with pytest.raises(DataError, match=message) as caught:
        read_coco(_rewritten(files, matrix, fractions).json, fix_boxes=fix_boxes)
    assert len(caught.value.problems) == 1 and "--fix-boxes" not in str(caught.value)


def test_a_few_bad_boxes_are_not_another_form(tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=30)
    spread_boxes(files.data)
    for annotation in files.data["annotations"][:3]:
        annotation["bbox"] = [20, 20, 39, 39]
    with pytest.raises(DataError, match=r"box leaves the image .*--fix-boxes") as caught:
        read_coco(files.save().json)
    assert len(caught.value.problems) == 3


def test_sound_splits_are_not_taken_for_another_form() -> None:
    """This holds for any number, size and place of boxes, and if a few reach over the border."""
    random = np.random.default_rng(0)
    for _ in range(300):
        sizes = random.integers(60, 2000, (int(random.integers(1, 150)), 2)).astype(float)
        box = np.maximum(2, sizes * random.uniform(0.01, 0.9) * random.uniform(0.3, 1, sizes.shape))
        corner = random.uniform(0, 1, sizes.shape) * (sizes - box)
        over = random.random(len(sizes)) < 0.03
        corner[over, 0] = (sizes - box)[over, 0] + random.uniform(2, 20, over.sum())
        assert misread(np.concatenate([corner, box], axis=1), sizes, slack=1) is None


def test_boxes_that_reach_over_a_part_of_every_image_are_told(tmp_path: Path) -> None:
    files = make_coco(tmp_path, images=60)
    spread_boxes(files.data)
    for annotation in files.data["annotations"]:
        annotation["iscrowd"] = 0
    assert read_coco(files.save().json).warnings == ()
    (warning,) = read_coco(_rewritten(files, XYWH / 3).json).warnings
    assert warning.startswith("no box of 75 reaches beyond 33% of its image's width or height")


def test_images_that_share_a_file_are_told(tmp_path: Path) -> None:
    """This happens when two exports of the same photos are joined: each image lacks the other's boxes."""
    files = make_coco(tmp_path)
    for image in files.data["images"][3:6]:
        image["file_name"] = files.data["images"][0]["file_name"]
    (warning,) = read_coco(files.save().json).warnings
    assert warning.startswith("4 of 12 images share their file with another one")


def test_areas_of_zero_are_told(tmp_path: Path) -> None:
    files = make_coco(tmp_path)
    for annotation in files.data["annotations"][:4]:
        annotation["area"] = 0
    (warning,) = read_coco(files.save().json).warnings
    assert warning.startswith("4 of 15 annotations have area 0")


SCALARS = st.none() | st.booleans() | st.integers(-3, 600) | st.integers() | st.just(2**70) | st.floats() | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> CocoFiles:
    return make_coco(tmp_path_factory.mktemp("sound"), images=5)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_whatever_stands_in_the_json_is_read_or_refused_but_never_crashes(sound: CocoFiles, data: st.DataObject) -> None:
    content = copy.deepcopy(sound.data)
    place: Any = content
    while True:  # walk down to a random node and replace it
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(VALUES)
            break
        place = place[key]
    spoilt = CocoFiles(sound.folder, content).save()
    for fix_boxes in (False, True):
        with contextlib.suppress(DataError):
            split = read_coco(spoilt.json, fix_boxes=fix_boxes)
            boxes = np.concatenate([split.boxes(i) for i in range(len(split.images))])
            assert (boxes[:, 2:] > boxes[:, :2]).all() and len(split.classes)
            json.dumps(split.ground_truth(), allow_nan=False)
