"""Pascal VOC's XML is read by its own conventions, and files of tools that have others are recognised, told or refused."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headkd_ray.data.checked_split import CheckedSplit
from headkd_ray.data.checking import CheckOptions, checked
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.voc import VocReader
from headkd_ray.data.voc_xml import XmlError, parse_voc
from headkd_ray.errors import DataError
from headkd_ray.prepare import main
from headkd_ray.storage import Folder
from tests.data.coco_files import encoded, pixels
from tests.data.format_files import make_voc, voc_object, voc_xml, write_photo


def read(folder: str, photos: str | None = None, *, fix_boxes: bool = False, **options: object) -> CheckedSplit:
    reader = VocReader(Folder.open(folder), photos and Folder.open(photos), **options)  # type: ignore[arg-type]
    return checked([reader], CheckOptions(fix_boxes)).split


def test_objects_arrive(tmp_path: Path) -> None:
    """Coordinates are pixels, counted from 1, and the last one belongs to the box."""
    moth, ant = voc_object("moth", 1, 1, 40, 30), voc_object("ant", 3, 5, 3, 6)
    split = read(make_voc(tmp_path, [voc_xml(0, moth, ant), voc_xml(1), voc_xml(2, ant)]))
    assert split.classes == ("ant", "moth") and split.category_ids == (1, 2)
    assert split.bbox.tolist() == [[0, 0, 40, 30], [2, 4, 1, 2], [2, 4, 1, 2]] and split.label.tolist() == [1, 0, 0]
    assert split.images.names == ["0.jpg", "1.jpg", "2.jpg"] and np.diff(split.first).tolist() == [2, 0, 1]
    told, background = split.warnings
    assert told.startswith("coordinates are taken as Pascal VOC's own") and "--voc-pixels edges" in told
    assert background == "1 of 3 images are background, without objects"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 15), st.integers(1, 20), st.integers(1, 15)), min_size=1))
def test_a_box_has_as_many_pixels_as_it_names(tmp_path_factory: pytest.TempPathFactory, boxes: list[tuple[int, ...]]) -> None:
    objects = [voc_object("ant", x, y, x + width - 1, y + height - 1) for x, y, width, height in boxes]
    folder = make_voc(tmp_path_factory.mktemp("voc"), [voc_xml(0, *objects)])
    assert read(folder).bbox.tolist() == [[x - 1, y - 1, width, height] for x, y, width, height in boxes]


@pytest.mark.parametrize(
    ("corners", "why"), [((0, 3, 10, 8), "1 of 1 boxes start at 0"), ((1.5, 3, 10, 8), "1 of 1 have fractions")]
)
def test_coordinates_that_are_edges_are_recognised(corners: tuple[float, ...], why: str, tmp_path: Path) -> None:
    """So labelImg, CVAT, Label Studio and Roboflow write them."""
    folder = make_voc(tmp_path, [voc_xml(0, voc_object("ant", *corners))])
    split = read(folder)
    x, y, right, bottom = corners
    assert split.bbox.tolist() == [[x, y, right - x, bottom - y]]
    assert why in split.warnings[0] and "--voc-pixels inclusive" in split.warnings[0]
    whole = read(folder, pixels="inclusive")
    assert whole.bbox.tolist() == [[x - 1, y - 1, right - x + 1, bottom - y + 1]] and not whole.warnings


def test_difficult_objects_are_ignored_and_other_flags_told(tmp_path: Path) -> None:
    flags = [{"difficult": 1, "truncated": 0}, {"difficult": 0, "truncated": 1, "occluded": 1}, {"difficult": "Unspecified"}]
    cvat = "<attributes><attribute><name>rotation</name><value>30.0</value></attribute></attributes></object>"
    objects = [voc_object("ant", 2, 2, 9, 9, **each) for each in flags]
    objects[2] = objects[2].replace("</object>", cvat)
    split = read(make_voc(tmp_path, [voc_xml(0, *objects)]))
    assert split.crowd.tolist() == [True, False, False]
    assert [warning.split(";")[0].split(":")[0] for warning in split.warnings[1:]] == [
        "1 of 3 annotations are marked to be ignored",
        "'truncated' is set in 1 of 3 annotations",
        "'occluded' is set in 1 of 3 annotations",
        "'attributes.rotation' is set in 1 of 3 annotations",
    ]
    assert "(mark them <difficult>1</difficult> to leave them out)" in split.warnings[2]


ANT = voc_object("ant", 3, 3, 9, 9)
FAULTS = {
    "not XML": ("<annotation>", "1.xml: not XML"),
    "another XML": ("<svg/>", "1.xml: not Pascal VOC: the outermost element is <svg>"),
    "no box": (voc_xml(1, "<object><name>ant</name></object>"), "1.xml: object 1: <object> without a <bndbox>"),
    "no class": (voc_xml(1, ANT, ANT.replace("ant", " ")), "1.xml: object 2: <object> without a <name>"),
    "half a box": (voc_xml(1, ANT.replace("<xmax>9</xmax>", "")), "1.xml: object 1: <bndbox> must have finite numbers"),
    "box of text": (voc_xml(1, ANT.replace("9", "nan")), "<bndbox> must have finite numbers"),
    "flag": (voc_xml(1, voc_object("ant", 3, 3, 9, 9, difficult="maybe")), "object 1, 'maybe': <difficult> must be 0 or 1"),
    "outside": (
        voc_xml(1, voc_object("ant", 3, 3, 39, 9)),
        r"1.xml: object 1, bbox .2, 2, 37, 7. in image 2 .1.jpg, 24 x 36.: box leaves",
    ),
    "turned corners": (voc_xml(1, voc_object("ant", 9, 9, 3, 3)), "1.xml: object 1, .*without area"),
    "size": (voc_xml(1, ANT, size=(24, -1)), "1.xml: <width> and <height> must be the photo's pixels"),
    "no photo": (voc_xml(1, ANT), "x.xml, <filename> '1.jpg': no photo of this name"),
    "encoding": ("<?xml version='1.0' encoding='klingon'?>" + voc_xml(1, ANT), "1.xml: not XML"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_file(fault: str, tmp_path: Path) -> None:
    xml, message = FAULTS[fault]
    folder = make_voc(tmp_path, [voc_xml(0, ANT), xml])
    if fault == "no photo":
        (tmp_path / "Annotations" / "1.xml").rename(tmp_path / "Annotations" / "x.xml")
        (tmp_path / "JPEGImages" / "1.jpg").unlink()
    with pytest.raises(DataError, match=message) as caught:
        read(folder)
    assert len(caught.value.problems) == 1


LAUGHS = "".join(f'<!ENTITY l{k} "{f"&l{k - 1};" * 10 if k else "ha"}">' for k in range(10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"<!DOCTYPE annotation [{LAUGHS}]><annotation>&l9;</annotation>", "declares XML entities"),
        (
            f'<!DOCTYPE annotation [<!ENTITY big "{"x" * 10**5}">]><annotation>{"&big;" * 10**4}</annotation>',
            "declares XML entities",
        ),
        (
            '<!DOCTYPE annotation [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>',
            "declares XML entities",
        ),
        ('<!DOCTYPE annotation [<!ENTITY % e SYSTEM "http://localhost/x.dtd">%e;]><annotation/>', "declares XML entities"),
        ("<annotation>&unknown;</annotation>", "not XML"),
        ("<a>" * 10**5, "nested more than 50 deep"),
        ("<annotation>" + " " * 2**26, "larger than 64 MiB"),
    ],
    ids=["billion laughs", "quadratic", "file", "network", "unknown entity", "deep", "large"],
)
def test_xml_that_attacks_is_refused_at_once(content: str, message: str) -> None:
    data = content.encode()
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(XmlError, match=message):
        parse_voc(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7 and time.monotonic() - started < 5


def test_a_document_type_without_entities_is_harmless() -> None:
    assert (
        parse_voc(b'<!DOCTYPE annotation SYSTEM "voc.dtd"><annotation><filename>a.jpg</filename></annotation>').file_name
        == "a.jpg"
    )


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 300), st.integers(0, 10))
def test_damaged_xml_is_read_or_refused_but_never_crashes(noise: bytes, at: int, cut: int) -> None:
    sound = voc_xml(0, ANT, ANT).encode()
    with contextlib.suppress(XmlError):
        assert len(parse_voc(sound[:at] + noise + sound[at + cut :]).objects) <= 2


def test_a_photo_is_found_by_the_name_of_its_xml_or_by_the_name_in_it(tmp_path: Path) -> None:
    """Tools rename photos and forget the tag, or write the XML under another name, with folders or without a suffix."""
    names = ["0.jpg", "old.jpg", "C:\\photos\\2.jpg", ""]
    folder = make_voc(tmp_path, [voc_xml(k, ANT, file_name=name) for k, name in enumerate(names)])
    (tmp_path / "Annotations" / "2.xml").rename(tmp_path / "Annotations" / "two.xml")
    (tmp_path / "JPEGImages" / "3.jpg").rename(tmp_path / "JPEGImages" / "3.JPEG")
    write_photo(tmp_path / "JPEGImages" / "left.jpg", 5)
    split = read(folder)
    assert split.images.names == ["0.jpg", "1.jpg", "3.JPEG", "2.jpg"]
    renamed, left = split.warnings[:2]
    assert renamed.startswith("<filename> is not the photo of the XML file's own name") and "'1.jpg' for '1.xml'" in renamed
    assert left.startswith("1 photo is without an XML file and left out")


def test_xml_beside_the_photos_and_in_a_folder_apart(tmp_path: Path) -> None:
    folder = make_voc(tmp_path / "voc", [voc_xml(0, ANT), voc_xml(1, ANT)])
    apart = read(f"{folder}/Annotations", f"{folder}/JPEGImages")
    for photo in (tmp_path / "voc" / "JPEGImages").iterdir():
        photo.rename(tmp_path / "voc" / "Annotations" / photo.name)
    assert read(f"{folder}/Annotations").digest() == apart.digest()
    with pytest.raises(DataError, match="no XML files"):
        read(str(tmp_path / "voc" / "JPEGImages"))


def test_a_list_of_image_sets(tmp_path: Path) -> None:
    folder = make_voc(tmp_path, [voc_xml(k, ANT) for k in range(3)])
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2\n0\n")
    (lists / "ant_val.txt").write_text("2  1\n0 -1\n")
    (lists / "more.txt").write_text("2\n7\n")
    assert read(folder, split="val").images.names == ["2.jpg", "0.jpg"]
    with pytest.raises(DataError, match=r"ant_val.txt: lists the images of one class"):
        read(folder, split="ant_val")
    with pytest.raises(DataError, match=r"test.txt: no such list of images; found 'ant_val', 'more', 'val'"):
        read(folder, split="test")
    make_voc(tmp_path / "test", [voc_xml(0, ANT)])
    with pytest.raises(DataError, match=rf"found 'ant_val', 'more', 'val'; for the folder of that name give {folder}/test"):
        read(folder, split="test")
    with pytest.raises(DataError, match=r"7.xml: no such file; correct the list"):
        read(folder, split="more")


def test_classes_of_the_training_split_are_those_of_the_others(tmp_path: Path) -> None:
    objects = [voc_object(name, 3, 3, 9, 9) for name in ("moth", "ant")]
    train, val = (make_voc(tmp_path / name, [voc_xml(0, *objects[: 2 - k])]) for k, name in enumerate(("train", "val")))
    prepare_split(train, None, str(tmp_path / "out"))
    assert read(val).classes == ("moth",)
    shards = prepare_split(val, None, str(tmp_path / "val_out"), classes=str(tmp_path / "out"))
    assert shards.meta.classes == ("ant", "moth") and [s.labels.tolist() for s in shards.samples()] == [[1]]
    (tmp_path / "names.txt").write_text("moth\n")
    with pytest.raises(DataError, match=r"0.xml: object 2, 'ant': object of a class that is not in --classes"):
        prepare_split(train, None, str(tmp_path / "none"), classes=str(tmp_path / "names.txt"))


def test_sizes_that_are_missing_are_read_and_wrong_ones_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_voc(
        tmp_path, [voc_xml(0, ANT, size=(0, 0)), voc_xml(1, ANT).replace("<size>", "<sizes>").replace("</size>", "</sizes>")]
    )
    split = read(folder)
    assert split.images.sizes.tolist() == [[40, 30], [24, 36]]
    assert "2 of 2 images have no width and height, which were read from the files" in split.warnings
    (tmp_path / "JPEGImages" / "1.jpg").write_bytes(encoded(pixels(0, 48, 36)))
    (tmp_path / "Annotations" / "1.xml").write_text(voc_xml(1, ANT))
    with pytest.raises(SystemExit):
        main([folder, "--out", str(tmp_path / "out")])
    assert (
        "1.jpg (image 2), stored 48 x 36, XML 24 x 36: stored size differs from the XML; correct the XML"
        in capsys.readouterr().err
    )


def test_boxes_of_larger_images_are_recognised(tmp_path: Path) -> None:
    boxes = [voc_object("ant", 30 + k, 50 + k, 70 + k, 90 + k) for k in range(8)]
    with pytest.raises(DataError, match="they look like those of larger images"):
        read(make_voc(tmp_path, [voc_xml(0, *boxes)]))
