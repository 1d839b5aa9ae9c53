"""The page on what a detector gets right and wrong."""

from __future__ import annotations

import base64
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from headkd_ray.data.shards import ShardSet
from headkd_ray.diagnosis.detector_diagnosis import diagnose
from headkd_ray.diagnosis.error_types import KINDS
from headkd_ray.diagnosis.overlaps import overlaps
from headkd_ray.engine.coco_metrics import coco_metrics
from headkd_ray.errors import UserError
from headkd_ray.pictures import mistakes
from headkd_ray.report.detector_page import detector_page


class Page(HTMLParser):
    """The tables of a page, and the elements that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag not in ("meta", "img", "path", "use", "rect"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            continue

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(text)


def findings(shards: ShardSet) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the split's ground truth with odd class names, and results: one object is missed, one found as another class."""
    truth = shards.ground_truth()
    truth["categories"] = [{**each, "name": f"<b>{each['name']}</b> $x$"} for each in truth["categories"]]
    results = [
        {"image_id": each["image_id"], "category_id": each["category_id"], "bbox": each["bbox"], "score": 0.5}
        for each in truth["annotations"][1:]
    ]
    other = next(each["id"] for each in truth["categories"] if each["id"] != results[0]["category_id"])
    results[0] = {**results[0], "category_id": other}
    return truth, results


def test_the_page_shows_each_mistake(drawn_splits: dict[str, str], tmp_path: Path) -> None:
    shards = ShardSet.open(drawn_splits["val"])
    truth, results = findings(shards)
    diagnosis = diagnose(overlaps(truth, results))
    metrics = coco_metrics(truth, results, [image["id"] for image in truth["images"]]).as_dict()
    named = diagnose(overlaps(shards.ground_truth(), results))
    pictures = list(mistakes(shards, (named, results)))
    text = detector_page("A <detector>", "of a split & more", metrics, diagnosis, pictures)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text), "it needs nothing from the network"
    assert "<b>" not in text and "A &lt;detector&gt;" in text
    page = Page(text)
    assert page.open == []
    counts = {row[0]: row[3:] for row in page.rows if row[1] == KINDS.get(row[0])}
    assert [counts[kind][0] for kind in ("class", "missed", "background", "location")] == ["1", "1", "0", "0"]
    assert all(int(times) == sum(map(int, by_size)) for times, *by_size in counts.values())
    assert [row[2] for row in page.rows if len(row) == 3 and row[0].startswith("<b>")] == ["1"], "the classes confused"
    classes = [row for row in page.rows if len(row) == 7 and row[0].startswith("<b>")]
    assert len(classes) == len(truth["categories"]) and {row[4] for row in classes} <= {"0.500", "–"}

    places = {truth["annotations"][0]["image_id"], results[0]["image_id"]}
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    assert {caption.split(": ")[0] for caption, _ in pictures} == {f"{names[each]} (image {each})" for each in places}
    (tmp_path / "picture.jpg").write_bytes(base64.b64decode(re.findall(r"data:image/jpeg;base64,([^\"]+)", text)[0]))
    with Image.open(tmp_path / "picture.jpg") as picture:
        assert picture.width > 2 * 384 - 1, "two images side by side"


def test_a_detector_that_finds_nothing_and_a_split_without_objects(drawn_splits: dict[str, str]) -> None:
    truth, results = findings(ShardSet.open(drawn_splits["val"]))
    images = [image["id"] for image in truth["images"]]
    for ground_truth, found in ((truth, []), ({**truth, "annotations": []}, results), ({**truth, "annotations": []}, [])):
        metrics = coco_metrics(ground_truth, found, images).as_dict()
        assert "</html>" in detector_page("title", "summary", metrics, diagnose(overlaps(ground_truth, found)), [])


def test_without_matplotlib_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch, drawn_splits: dict[str, str]) -> None:
    from headkd_ray.evaluate import evaluate_checkpoint

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r'figures need matplotlib: python -m pip install "headkd-ray\[report\]"'):
        evaluate_checkpoint("nowhere", drawn_splits["val"], report="page.html")
