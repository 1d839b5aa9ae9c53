"""YOLO data sets are read as Ultralytics reads them, and what it would drop silently is told or refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from headkd_ray.data.checked_split import CheckedSplit
from headkd_ray.data.checking import CheckOptions, checked
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.problems import Problems
from headkd_ray.data.yolo import YoloReader, label_path
from headkd_ray.data.yolo_labels import Labels
from headkd_ray.errors import DataError
from headkd_ray.prepare import main
from tests.data.coco_files import encoded, oriented, pixels
from tests.data.format_files import make_yolo, write_photo

BOX = "0 0.5 0.5 0.25 0.5\n"


def read(yaml: str, split: str | None = "train", **options: object) -> CheckedSplit:
    return checked([YoloReader(yaml, split, joined=True)], CheckOptions(**options)).split  # type: ignore[arg-type]


def test_boxes_arrive_in_pixels(tmp_path: Path) -> None:
    """In photo 0, of 40 x 30 pixels, in photo 1, of 24 x 36, and in none."""
    split = read(make_yolo(tmp_path, ["1 0.5 0.5 0.25 0.5\n0\t.25   0.5 0.5 1\r\n", "\ufeff1.0 0.5 0.25 1 5e-1", ""]))
    assert split.bbox.tolist() == [[15, 7.5, 10, 15], [0, 0, 20, 30], [0, 0, 24, 18]]
    assert split.area.tolist() == [150, 600, 432] and split.label.tolist() == [1, 0, 1] and not split.crowd.any()
    assert split.images.names == ["0.jpg", "1.jpg", "2.jpg"] and split.images.sizes.tolist() == [[40, 30], [24, 36], [32, 32]]
    assert split.classes == ("ant", "bee") and split.category_ids == (0, 1) and np.diff(split.first).tolist() == [2, 1, 0]


NUMBERS = st.floats(0, 1, width=32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=3, max_size=6), NUMBERS, NUMBERS)
def test_a_box_of_a_line_is_around_its_centre_and_that_of_a_polygon_around_its_points(
    points: list[tuple[float, float]], width: float, height: float
) -> None:
    x, y = points[0]
    lines = f"0 {x!r} {y!r} {width!r} {height!r}\n1 " + " ".join(f"{a!r} {b!r}" for a, b in points)
    (_, _, box), (number, category, around) = Labels(2, None, Problems()).read(lines.encode(), "labels.txt")
    assert np.allclose([box[0] + box[2] / 2, box[1] + box[3] / 2, *box[2:]], [x, y, width, height], atol=1e-12)
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    assert (number, category) == (2, 1) and np.allclose(around, [*low, *(high - low)], atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="0123456789.,-+eE \t\r\n\x00naif", max_size=60) | st.binary(max_size=30))
def test_whatever_stands_in_a_label_file_is_read_or_refused_but_never_crashes(content: str | bytes) -> None:
    problems, data = Problems(), content if isinstance(content, bytes) else content.encode()
    found = list(Labels(3, None, problems).read(data, "labels.txt"))
    assert all(category in (0, 1, 2) and np.isfinite(box).all() for _, category, box in found)
    assert found or problems or not data.strip(b"\xef\xbb\xbf").strip() or not data.decode().split()


FAULTS = {
    "0 0,5 0,5 0,2 0,2": "0.txt: line 1, '0 0,5 0,5 0,2 0,2': columns are separated by spaces and decimals by a point",
    "0,0.5,0.5,0.2,0.2": "columns are separated by spaces",
    "ant 0.5 0.5 0.2 0.2": "line 1, 'ant 0.5 0.5 0.2 0.2': a line must hold finite numbers: class, centre x",
    "0 0.5 nan 0.2 0.2": "finite numbers",
    BOX + "2 0.5 0.5 0.2 0.2": "0.txt: line 2, class 2: class number without a name",
    "-1 0.5 0.5 0.2 0.2": "class -1: class number",
    "0.5 0.5 0.5 0.2 0.2": "class 0.5: class number",
    "0 0.5 0.5 0.2": "line 1, 4 columns: a line must have 5 columns",
    "0 0.5 0.5 0.2 0.2 45": "line 1, 6 columns: a line must have 5",
    "0 0.9 0.5 0.4 0.2": r"0.txt: line 1, bbox .* in image 1 \(0.jpg, 40 x 30\): box leaves the image .*--fix-boxes",
    "0 0.5 0.5 0 0.2": "without area",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_is_named_with_its_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=FAULTS[text]) as caught:
        read(make_yolo(tmp_path, [text, BOX, BOX]))
    assert len(caught.value.problems) == 1


def test_a_label_file_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0.txt, .*not a text file in UTF-8"):
        read(make_yolo(tmp_path, [BOX.encode("utf-16"), BOX]))


def test_what_is_read_otherwise_than_it_is_written_is_told_with_its_count(tmp_path: Path) -> None:
    polygon, oriented_box = "0 0.2 0.2 0.6 0.2 0.4 0.8\n", "1 0.2 0.2 0.6 0.2 0.6 0.8 0.2 0.8\n"
    pose, pose_of_four = (
        BOX.strip() + " 0.4 0.4 2 0.5 0.5 0 0.6 0.6 1\n",
        BOX.strip() + " 0.4 0.4 2 0.5 0.5 0 0.6 0.6 1 0.5 0.5 2\n",
    )
    yaml = make_yolo(tmp_path, [polygon + oriented_box, pose + pose_of_four, BOX.strip() + " 0.9\n", BOX + BOX, "\n", None])
    (tmp_path / "labels" / "train" / "stray.txt").write_text(BOX)
    (tmp_path / "images" / "train" / "notes.doc").write_text("")
    split = read(yaml)
    assert len(split.label) == 6 and [round(v, 6) for v in split.bbox[0].tolist()] == [8, 6, 16, 18]
    assert [warning.replace(str(tmp_path), "") for warning in split.warnings] == [
        "/images/train: files that are not named as images are left out (1 .doc)",
        "1 label file is without an image of the same name, for example /labels/train/stray.txt",
        "2 of 6 images are background, without objects (empty label files: 1, images without one: 1)",
        "2 of 7 lines hold a polygon (a segment or an oriented box), of which the upright box around it is used",
        "2 of 7 lines hold a pose, of which the box is used",
        "1 of 7 lines hold a confidence, as predictions have; they are trained on as if they were certain",
        "1 of 7 lines are the same as another line of their file, and left out",
    ]


def test_kpt_shape_says_which_lines_are_poses(tmp_path: Path) -> None:
    line = BOX.strip() + " 0.9 0.9 0.1 0.1\n"  # two points without visibility, or a polygon of four
    yaml = "train: images/train\nnames: [ant]\nkpt_shape: [2, 2]\n"
    assert read(make_yolo(tmp_path, [line], yaml=yaml)).bbox.tolist() == [[15, 7.5, 10, 15]]


FORMS = {
    "pixels": (lambda x, y, w, h: (40 * x, 30 * y, 40 * w, 30 * h), r"60 of 60 boxes are not in fractions .* look like pixels"),
    "corners": (
        lambda x, y, w, h: (x - w / 2, y - h / 2, x + w / 2, y + h / 2),
        r"fit as corners \[x1, y1, x2, y2\]; write them as",
    ),
    "left upper corner": (
        lambda x, y, w, h: (x - w / 2, y - h / 2, w, h),
        r"fit as \[x, y, width, height\]; write them as \[centre x",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_boxes_in_another_form_are_recognised(form: str, tmp_path: Path) -> None:
    rewrite, message = FORMS[form]
    random = np.random.default_rng(0)
    sides = random.uniform(0.3, 0.6, (60, 2))
    centres = random.uniform(sides / 2, 1 - sides / 2)
    lines = [f"0 {x:.4f} {y:.4f} {w:.4f} {h:.4f}\n" for (x, y), (w, h) in zip(centres, sides, strict=True)]
    assert len(read(make_yolo(tmp_path / "right", ["".join(lines)])).label) == 60
    wrong = ["0 " + " ".join(f"{value:.4f}" for value in rewrite(*map(float, line.split()[1:]))) for line in lines]
    with pytest.raises(DataError, match=message) as caught:
        read(make_yolo(tmp_path / "wrong", ["\n".join(wrong)]))
    assert len(caught.value.problems) == 1


YAMLS = {
    "train: images/train\nnames: [ant, ant]": "names: 'ant' stands there twice",
    "train: images/train\nnames: [ant]\nnc: 2": "nc: 2, but 'names' has 1 classes",
    "train: images/train\nnames: {0: ant, 2: bee}": "names: 2 classes must be numbered 0 to 1; found '0', '2'",
    "train: images/train": "names: must list the names",
    "names: [ant]": "no split; name the folders",
    "train: {a: b}\nnames: [ant]": "train: must be a folder of images",
    "train: images/train\ntrain: x\nnames: [ant]": "the key 'train' is written twice",
    "train: [": "not a data.yaml",
    "text": "it has no keys train",
    "train: images/none\nnames: [ant]": r"train: images/none: no such folder or list of images \(looked for .*/images/none\)",
    "val: images/train\nnames: [ant]": "has no split 'train'; it has val",
    "train: &a [*a]\nnames: [ant]": "an alias contains itself",
}


@pytest.mark.parametrize("yaml", YAMLS)
def test_a_fault_of_data_yaml(yaml: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"data.yaml: (.|\n)*{YAMLS[yaml]}"):
        read(make_yolo(tmp_path, [BOX], yaml=yaml))


def test_class_names_are_text_however_they_are_written(tmp_path: Path) -> None:
    yaml = "train: images/train\nnames:\n  1: no\n  0: 07\n  2: 'a b '\nnc: 3\ndownload: |\n  echo " + "x" * 5000
    assert read(make_yolo(tmp_path, [BOX], yaml=yaml)).classes == ("07", "no", "a b")


PLACES = {
    "path of another machine": "path: /content/none\ntrain: images/train",
    "Windows": "path: C:\\data\ntrain: images\\train",
    "Ultralytics' datasets folder": "path: set\ntrain: images/train",
    "Roboflow": "train: ../images/train",
    "whole": "path: {folder}\ntrain: {folder}/images/train",
    "list of folders": "train: [images/train]",
    "text file": "train: list.txt",
}


@pytest.mark.parametrize("place", PLACES)
def test_images_are_found_where_data_yaml_means_them(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    yaml = make_yolo(folder, [BOX, BOX], yaml=PLACES[place].format(folder=folder) + "\nnames: [ant]\n")
    (folder / "list.txt").write_text("./images/train/0.jpg\n./images/train/1.jpg\n")
    split = read(yaml)
    assert split.images.names == ["0.jpg", "1.jpg"]
    moved = place in ("path of another machine", "Windows", "Ultralytics' datasets folder", "Roboflow")
    assert [warning.endswith("/set/images/train") for warning in split.warnings] == [True] * moved


LISTED = {
    "CVAT": "data/images/train/{}.jpg",
    "Windows": "C:\\me\\set\\images\\train\\{}.jpg",
    "another machine": "/content/set/images/train/{}.jpg",
    "another letter case": "images/train/{}.JPG",
}


@pytest.mark.parametrize("line", LISTED)
def test_lines_of_a_list_that_lead_elsewhere_are_looked_for(line: str, tmp_path: Path) -> None:
    yaml = make_yolo(tmp_path, [BOX, None, BOX], yaml="train: train.txt\nnames: [ant]\n")
    (tmp_path / "train.txt").write_text("\r\n".join(LISTED[line].format(number) for number in range(3)))
    split = read(yaml)
    assert split.images.names == ["0.jpg", "1.jpg", "2.jpg"] and np.diff(split.first).tolist() == [1, 0, 1]
    given = LISTED[line].format(0).replace("\\", "/")
    told = (
        f"3 of 3 images are not where {tmp_path}/train.txt says; they were found, for example '{given}' -> 'images/train/0.jpg'"
    )
    assert split.warnings[0] == told


def test_a_list_of_which_no_image_is_there(tmp_path: Path) -> None:
    yaml = make_yolo(tmp_path, [BOX], yaml="train: train.txt\nnames: [ant]\n")
    (tmp_path / "train.txt").write_text("images/train/7.jpg\nimages/train/8.jpg")
    with pytest.raises(DataError, match=r"train.txt: none of the 2 images that it lists is there, for example 'images/train/7"):
        read(yaml)


def test_class_names_without_a_data_yaml(tmp_path: Path) -> None:
    """Label Studio writes classes.txt beside images and labels, labelImg all into one folder, and CVAT (YOLO 1.1) a list."""
    expected = read(make_yolo(tmp_path / "set", [BOX, "1 0.5 0.5 0.5 0.5", None]))
    folder = tmp_path / "set"
    (folder / "data.yaml").unlink()
    (folder / "classes.txt").write_text("\ufeffant\r\nbee\r\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"or a folder in Pascal VOC's format; there are such in it: '{folder}'"):
        prepare_split(str(tmp_path), None, str(tmp_path / "out"))
    assert prepare_split(str(folder), None, str(tmp_path / "out")).meta.classes == ("ant", "bee")
    beside = tmp_path / "beside"
    shutil.copytree(folder / "images" / "train", beside)
    shutil.copytree(folder / "labels" / "train", beside, dirs_exist_ok=True)
    shutil.copy(folder / "classes.txt", beside)
    cvat = tmp_path / "cvat"
    shutil.copytree(beside, cvat / "obj_train_data", ignore=shutil.ignore_patterns("classes.txt"))
    shutil.copy(folder / "classes.txt", cvat / "obj.names")
    (cvat / "valid.txt").write_text("".join(f"data/obj_train_data/{number}.jpg\n" for number in range(3)))
    for names, split in ((folder / "classes.txt", "train"), (beside / "classes.txt", None), (cvat / "obj.names", "valid")):
        found = read(str(names), split)
        assert found.bbox.tolist() == expected.bbox.tolist() and found.classes == expected.classes
    (folder / "classes.txt").write_text("ant\nant\n")
    with pytest.raises(DataError, match=r"classes.txt: names: 'ant' stands there twice"):
        read(str(folder / "classes.txt"))


def test_lists_of_one_folder_do_not_call_each_other_s_labels_stray(tmp_path: Path) -> None:
    yaml = make_yolo(tmp_path, [BOX, BOX, BOX], yaml="train: train.txt\nval: val.txt\nnames: [ant]\n")
    (tmp_path / "train.txt").write_text("images/train/0.jpg\r\nimages/train/1.jpg\r\n")
    (tmp_path / "val.txt").write_text("\ufeffimages/train/2.jpg", encoding="utf-8")
    assert [read(yaml, name).images.names for name in ("train", "val")] == [["0.jpg", "1.jpg"], ["2.jpg"]]
    assert read(yaml).warnings == read(yaml, "val").warnings == ()


def test_the_last_folder_images_is_where_labels_are_beside(tmp_path: Path) -> None:
    assert label_path("data/images/x/images/a/1.tar.jpg") == "data/images/x/labels/a/1.tar.txt"
    assert label_path("/images/1.jpg") == "/labels/1.txt" and label_path("images/1.jpg") == "labels/1.txt"
    assert label_path("photos/1.jpg") == "photos/1.txt"


def test_labels_beside_the_photos_and_no_labels_at_all(tmp_path: Path) -> None:
    yaml = make_yolo(tmp_path, [BOX, BOX])
    shutil.rmtree(tmp_path / "labels")
    with pytest.raises(
        DataError, match=r"none of the 2 images has a label file: that of .*/images/train/0.jpg would be .*/labels/train/0.txt"
    ):
        read(yaml)
    for number in (0, 1):
        (tmp_path / "images" / "train" / f"{number}.txt").write_text(BOX)
    split = read(yaml)
    assert len(split.label) == 2 and "the label files are beside the images" in split.warnings[0]


def test_several_splits_and_photos_of_one_folder_or_two(tmp_path: Path) -> None:
    yaml = make_yolo(tmp_path, [BOX], yaml="train: images/train\nvalid: images/val\ntest: images/test\nnames: [ant]")
    write_photo(tmp_path / "images" / "val" / "0.jpg", 4)
    (tmp_path / "labels" / "val").mkdir()
    (tmp_path / "labels" / "val" / "0.txt").write_text(BOX)
    split = read(yaml, None)
    assert split.images.names == ["train/0.jpg", "val/0.jpg"] and "the split test is left out" in split.warnings[0]
    assert read(yaml, "val").images.names == read(yaml, "valid").images.names == ["0.jpg"]
    with pytest.raises(DataError, match=r"has the splits train, val, test; choose one with --split NAME, or divide"):
        prepare_split(yaml, None, str(tmp_path / "out"))


def test_a_file_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    yaml = make_yolo(tmp_path, [BOX, BOX])
    folder = bytes(tmp_path / "images" / "train")
    os.rename(folder + b"/0.jpg", folder + b"/caf\xe9.jpg")
    with pytest.raises(DataError, match=r"caf\\udce9.jpg: file name that is not UTF-8; rename the file"):
        read(yaml)


def test_damaged_photos_and_labels_are_told_together(tmp_path: Path) -> None:
    yaml = make_yolo(tmp_path, [BOX, "0 1 2", BOX])
    (tmp_path / "images" / "train" / "0.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "images" / "train" / "2.jpg").rename(tmp_path / "images" / "train" / "2.heic")
    (tmp_path / "images" / "train" / "2.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    with pytest.raises(DataError) as caught:
        read(yaml)
    assert [problem.split("train/")[1][:5] for problem in caught.value.problems] == ["1.txt", "0.jpg", "2.hei"]


def test_boxes_are_of_the_upright_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of photos that are turned by 90 degrees, and by 180, which no size shows."""
    yaml = make_yolo(tmp_path, ["0 0.25 0.25 0.5 0.5", "0 0.25 0.25 0.5 0.5"])
    photos = [tmp_path / "images" / "train" / f"{number}.jpg" for number in (0, 1)]
    for number, orientation in enumerate((6, 3)):
        photos[number].write_bytes(oriented(pixels(number, 40, 30), orientation))
    assert main([yaml, "--split", "train", "--out", str(tmp_path / "out"), "--write-coco", str(tmp_path / "coco.json")]) == 0
    assert "2 images are turned upright (annotation tools show photos upright" in capsys.readouterr().err
    shards = prepare_split(yaml, None, str(tmp_path / "out"), split="train")
    for sample in shards.samples():
        shown = ImageOps.exif_transpose(Image.open(photos[sample.image_id - 1]))
        assert torch.equal(sample.pixels(), torch.from_numpy(np.array(shown)).permute(2, 0, 1))
        assert sample.size == (shown.height, shown.width) and sample.boxes.tolist() == [
            [0, 0, shown.width / 2, shown.height / 2]
        ]
    stored = read(yaml, exif="ignore")
    assert stored.images.sizes.tolist() == [[40, 30], [40, 30]]


def test_what_was_read_is_the_same_as_coco_json(tmp_path: Path) -> None:
    """The folder that holds the split accepts the JSON as the same split."""
    photos = str(tmp_path / "set" / "images" / "train")
    yaml = make_yolo(tmp_path / "set", [BOX + "1 0.3 0.3 0.123 0.2", "", None])
    first = prepare_split(yaml, None, str(tmp_path / "out"), split="train", write_coco=str(tmp_path / "new" / "coco.json"))
    again = prepare_split(str(tmp_path / "new" / "coco.json"), photos, str(tmp_path / "out"))
    assert again.meta == first.meta and again.ground_truth() == first.ground_truth()


def test_tiff_and_bmp_photos_are_packed_as_they_are(tmp_path: Path) -> None:
    yaml = make_yolo(tmp_path, [BOX, BOX])
    for number, (kind, suffix) in enumerate((("TIFF", "tif"), ("BMP", "bmp"))):
        photo = tmp_path / "images" / "train" / f"{number}.jpg"
        photo.write_bytes(encoded(pixels(number, 40, 30), kind))
        photo.rename(photo.with_suffix(f".{suffix}"))
    for sample in prepare_split(yaml, None, str(tmp_path / "out"), split="train").samples():
        assert torch.equal(sample.pixels(), torch.from_numpy(np.array(pixels(sample.image_id - 1, 40, 30))).permute(2, 0, 1))


def test_on_a_remote_filesystem(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    local = read(make_yolo(tmp_path / "set", [BOX, None]))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "set"), "/yolo/set", recursive=True)
    try:
        remote = read("memory://yolo/set/data.yaml")
        assert remote.digest() == local.digest() and remote.warnings == local.warnings
    finally:
        memory.rm("/yolo", recursive=True)
