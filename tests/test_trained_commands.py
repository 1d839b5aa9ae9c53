"""What the commands evaluate, predict and train make of a trained student, as a user runs them."""

from __future__ import annotations

import io
import json
import shutil
import sys
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from headkd_ray import evaluate, predict, train
from headkd_ray.data.images import decode
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors.weights import load_checkpoint
from headkd_ray.storage import Folder
from tests.support import MICRO_STUDENT, micro_job, other_split, refused

KEEN_STUDENT = {**MICRO_STUDENT, "head": {**MICRO_STUDENT["head"], "postprocess": {"score": 0.0, "max_detections": 20}}}
"""A student that detects something on every image, however little it has learnt."""
ONE_EPOCH = {"epochs": 1, "milestones": []}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, drawn_splits: dict[str, str]) -> dict[str, Any]:
    """Return the result of a run whose AP is neither 0 nor 100, with ``splits`` added.

    The student learns hardly anything in one epoch, so the ground truth is chosen to suit it: half of what it detects.
    """
    folder = tmp_path_factory.mktemp("trained")
    first = train.train(micro_job(folder, drawn_splits, "first", student=KEEN_STUDENT, optim=ONE_EPOCH), lambda record: None)
    drawn = Path(drawn_splits["val"]).parent
    assert evaluate.main([first["student"], drawn_splits["val"], "--out", str(folder / "found.json")]) == 0
    coco = json.loads((drawn / "val.json").read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    found = json.loads((folder / "found.json").read_text())
    coco["annotations"] = [
        {**entry, "id": i, "area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0}
        for i, entry in enumerate(found[::2], start=1)
        if min(entry["bbox"][2:]) >= 1 and entry["bbox"][2] <= sizes[entry["image_id"]][0]
    ]
    (folder / "val.json").write_text(json.dumps(coco))
    prepare_split(str(folder / "val.json"), str(drawn / "images"), str(folder / "val"))
    splits = {**drawn_splits, "val": str(folder / "val")}
    result = train.train(micro_job(folder, splits, "second", student=KEEN_STUDENT, optim=ONE_EPOCH), lambda record: None)
    assert 0 < result["best"]["AP"] < 100
    return {**result, "splits": splits}


def test_a_student_that_starts_from_a_checkpoint_begins_with_its_ap(trained: dict[str, Any], tmp_path: Path) -> None:
    """With steps too small to change a weight, and all norms in eval mode, the run ends with the AP that it began with."""
    backbone = {**MICRO_STUDENT["backbone"], "frozen_stages": 1, "norm_eval": True}
    student = {**KEEN_STUDENT, "backbone": backbone, "checkpoint": trained["student"]}
    records: list[dict] = []
    job = micro_job(tmp_path, trained["splits"], student=student, optim={**ONE_EPOCH, "lr": 1e-20, "weight_decay": 0.0})
    result = train.train(job, records.append)
    classes = ShardSet.open(trained["splits"]["train"]).meta.classes
    assert records[0]["note"] == (
        f"the student starts from {trained['student']} (headkd_ray); its outputs for {len(classes)} of {len(classes)} classes "
        f"are taken: {', '.join(map(repr, classes))}"
    )
    assert {**result["best"], "step": None} == {**trained["best"], "step": None}
    mine, theirs = (load_checkpoint(place).detector.state_dict() for place in (result["student"], trained["student"]))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_evaluate_gives_the_ap_that_training_reported(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val, out = trained["splits"]["val"], tmp_path / "made" / "detections.json"
    metrics = evaluate.evaluate_checkpoint(trained["student"], val, out=str(out)).as_dict()
    assert metrics == {key: trained["best"][key] for key in metrics}
    found = json.loads(out.read_text())
    shards = ShardSet.open(val)
    assert {entry["image_id"] for entry in found} == set(shards.index.image_id.tolist())
    assert {entry["category_id"] for entry in found} <= set(shards.meta.category_ids) and 0 not in shards.meta.category_ids
    page = tmp_path / "pages" / "student.html"
    assert evaluate.main([trained["student"], val, "--report", str(page)]) == 0
    assert page.read_text().endswith("</html>\n")
    assert f"{metrics['AP']:.1f}" in capsys.readouterr().out


def test_a_validation_split_that_lists_fewer_classes_in_another_order(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluation and training match classes by name, and report those that do not count."""
    splits = trained["splits"]
    coco = ShardSet.open(splits["val"]).ground_truth()
    *listed, gone = coco["categories"]
    renamed = {category["id"]: 1000 - k for k, category in enumerate(listed)}
    coco["categories"] = [{"id": renamed[category["id"]], "name": category["name"]} for category in listed]
    coco["annotations"] = [
        {**annotation, "category_id": renamed[annotation["category_id"]]}
        for annotation in coco["annotations"]
        if annotation["category_id"] in renamed
    ]
    (tmp_path / "fewer.json").write_text(json.dumps(coco))
    fewer = str(tmp_path / "fewer")
    prepare_split(str(tmp_path / "fewer.json"), str(Path(splits["train"]).parent / "images"), fewer)
    expected = {name: value for name, value in trained["best"]["per_class"].items() if name != gone["name"]}

    capsys.readouterr()
    assert evaluate.main([trained["student"], fewer]) == 0
    text = f"of the {len(listed) + 1} classes of {trained['student']}; detections of the others do not count: {gone['name']!r}"
    assert f"warning: {fewer} lists {len(listed)} {text}" in capsys.readouterr().err
    assert evaluate.evaluate_checkpoint(trained["student"], fewer, batch_size=8).as_dict()["per_class"] == expected

    records: list[dict[str, Any]] = []
    job = micro_job(tmp_path, {**splits, "val": fewer}, student=KEEN_STUDENT, optim=ONE_EPOCH)
    assert train.train(job, records.append)["best"]["per_class"] == expected
    assert f"warning: data.val ({fewer}) lists {len(listed)} of" in records[0]["note"]


def test_evaluate_counts_as_many_detections_as_asked_for(trained: dict[str, Any], tmp_path: Path) -> None:
    """The student itself keeps 20 per image."""
    out, counts = tmp_path / "found.json", {}
    for most in (None, 150):
        evaluate.evaluate_checkpoint(trained["student"], trained["splits"]["val"], 8, str(out), max_detections=most)
        counts[most] = Counter(entry["image_id"] for entry in json.loads(out.read_text()))
    assert max(counts[None].values()) == 20 and max(counts[150].values()) > 20


def test_evaluate_refuses_other_classes_and_unwritable_output_before_the_work(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = other_split(tmp_path, ["cat", "dog"])
    assert "Class lists disagree" in refused(capsys, evaluate.main, [trained["student"], other])
    (tmp_path / "file").touch()
    message = refused(
        capsys, evaluate.main, [trained["student"], trained["splits"]["val"], "--out", str(tmp_path / "file" / "x.json")]
    )
    assert f"{tmp_path}/file: not writable" in message
    assert "no such folder" in refused(capsys, evaluate.main, [str(tmp_path / "gone"), trained["splits"]["val"]])
    with pytest.raises(SystemExit):
        evaluate.main([trained["student"], other, "--batch-size", "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_checkpoint_on_remote_storage(drawn_splits: dict[str, str], trained: dict[str, Any]) -> None:
    """A run on a filesystem that is not local gives the same student, which can be evaluated in place."""
    job = micro_job(
        Path("unused"), trained["splits"], "far", run={"storage": "memory://bucket/runs"}, student=KEEN_STUDENT, optim=ONE_EPOCH
    )
    result = train.train(job, lambda record: None)
    assert result["student"] == "memory://bucket/runs/far/student"
    assert result["best"] == trained["best"]
    metrics = evaluate.evaluate_checkpoint(result["student"], trained["splits"]["val"], batch_size=8)
    assert metrics.AP == trained["best"]["AP"]
    again: list[dict[str, Any]] = []
    assert train.train(job, again.append) == result and not again


@pytest.fixture
def photos(tmp_path: Path, drawn_splits: dict[str, str]) -> Path:
    """Return the same drawn image as JPEG, PNG and WebP, a file that is no image, and a truncated JPEG."""
    folder = tmp_path / "photos"
    folder.mkdir()
    source = sorted((Path(drawn_splits["val"]).parent / "images").glob("val_*.jpg"))[0]
    shutil.copy(source, folder / "a.jpg")
    image = Image.open(source)
    image.save(folder / "b.png")
    image.crop((0, 0, 120, 90)).save(folder / "c.webp", lossless=True)
    (folder / "notes.txt").write_text("not an image, and not asked for")
    (folder / "d_cut.jpeg").write_bytes(source.read_bytes()[:2000])
    return folder


def test_predict_folder_with_a_truncated_file(
    trained: dict[str, Any], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found"
    with pytest.raises(SystemExit) as caught:
        predict.main([trained["student"], str(photos), "--out", str(out), "--score", "0"])
    assert caught.value.code == 2
    said = capsys.readouterr()
    headline, line = said.err[said.err.rindex("error: ") :].splitlines()
    assert headline == f"error: 1 of 4 images could not be read (the others are in {out}):"
    assert line.startswith(f"  - {photos}/d_cut.jpeg: cannot be decoded")
    assert f"{photos}: files that are not named as JPEG, PNG, WebP, BMP or TIFF are left out (1 .txt)" in said.err
    assert f"detections on 3 images: {out}/detections.json" in said.out
    assert sorted(path.name for path in out.iterdir()) == ["0001_a.jpg", "0002_b.jpg", "0003_c.jpg", "detections.json"]

    result = json.loads((out / "detections.json").read_text())
    assert [Path(image["file_name"]).name for image in result["images"]] == ["a.jpg", "b.png", "c.webp"]
    (problem,) = result["problems"]
    assert problem["file_name"] == f"{photos}/d_cut.jpeg" and "cannot be decoded" in problem["problem"]
    meta = ShardSet.open(trained["splits"]["val"]).meta
    assert [(category["id"], category["name"]) for category in result["categories"]] == list(
        zip(meta.category_ids, meta.classes, strict=True)
    )
    assert len({entry["id"] for entry in result["annotations"]}) == len(result["annotations"])
    for image in result["images"]:
        height, width = decode(Path(image["file_name"]).read_bytes()).shape[1:]
        assert (image["height"], image["width"]) == (height, width)
        found = [entry for entry in result["annotations"] if entry["image_id"] == image["id"]]
        assert found and all(entry["category_id"] in meta.category_ids for entry in found)
        for entry in found:
            x, y, w, h = entry["bbox"]
            assert 0 <= x and 0 <= y and x + w <= width + 1e-3 and y + h <= height + 1e-3
            assert entry["area"] == pytest.approx(w * h) and 0 <= entry["score"] <= 1
    by_image = [[e["bbox"] for e in result["annotations"] if e["image_id"] == image_id] for image_id in (1, 2)]
    assert by_image[0] == by_image[1], "PNG of the same pixels, other boxes"


def test_predict_nested_folders_and_a_list_on_standard_input(
    trained: dict[str, Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is the input's, equal names do not collide, and no image or picture of an earlier call is taken twice."""
    monkeypatch.chdir(tmp_path)
    source = photos / "a.jpg"
    names = ["in/b/x.jpg", "in/a/x.JPG", "in/a/b/x.jpg", "in/.cache/x.jpg", "one #1.jpg", "in/" + "é" * 120 + ".jpg"]
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, name)
    nested = ["in/a/b/x.jpg", "in/a/x.JPG", "in/b/x.jpg", names[-1]]

    def found(*arguments: str, listed: str = "") -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.encode())))
        assert predict.main([trained["student"], *arguments, "--score", "1.1"]) == 0
        images = json.loads(Path(arguments[-1], "detections.json").read_text())["images"]
        assert [image["id"] for image in images] == list(range(1, len(images) + 1))
        pictures = sorted(path.name for path in Path(arguments[-1]).glob("*.jpg"))
        stems = [Path(image["file_name"]).stem[:60] for image in images]
        assert pictures == [f"{number:04d}_{stem}.jpg" for number, stem in enumerate(stems, start=1)]
        return [image["file_name"] for image in images]

    assert found("in", "--out", "in/found") == nested
    assert found("in/", "--out", "in/found") == nested
    listed = f"in/b/x.jpg\r\none #1.jpg\n\nin/a\n{tmp_path}/one #1.jpg\n"
    assert found("in/a/x.JPG", "-", "--out", "listed", listed=listed) == [
        "in/a/x.JPG",
        "in/b/x.jpg",
        "one #1.jpg",
        "in/a/b/x.jpg",
    ]


def test_predict_writes_what_can_be_written(
    trained: dict[str, Any], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "0001_a.jpg").mkdir(parents=True)  # blocks the name of a picture
    message = refused(
        capsys,
        predict.main,
        [trained["student"], *(str(photos / name) for name in ("a.jpg", "b.png")), "--out", f"{tmp_path}/out"],
    )
    headline, line = message.splitlines()
    assert headline == f"error: 1 picture could not be written (all detections are in {tmp_path}/out/detections.json):"
    assert line == f"  - {tmp_path}/out/0001_a.jpg: cannot be written (Is a directory)"
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())["images"]) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001_a.jpg", "0002_b.jpg", "detections.json"]


@pytest.mark.parametrize("place", ["memory", "file"])
def test_predict_from_anywhere_to_anywhere(
    place: str, trained: dict[str, Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    root = f"memory://{uuid.uuid4()}" if place == "memory" else f"file://{tmp_path}/far"
    (Folder.open(root) / "in" / "deep").create()
    (Folder.open(root) / "in" / "deep").write("a.jpg", (photos / "a.jpg").read_bytes())
    for given in ("in", "in/deep/a.jpg"):
        assert predict.main([trained["student"], f"{root}/{given}", "--out", f"{root}/out/{given}"]) == 0
        out = Folder.open(f"{root}/out/{given}")
        assert out.names() == ["0001_a.jpg", "detections.json"]
        (image,) = json.loads(out.read("detections.json"))["images"]
        assert image["file_name"] == f"{root}/in/deep/a.jpg"
    assert [path.name for path in sorted(tmp_path.iterdir()) if path not in before] == (["far"] if place == "file" else [])


def test_predict_draws_boxes_of_at_least_the_score(trained: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    def drawn(score: str) -> tuple[torch.Tensor, torch.Tensor]:
        out = tmp_path / f"at_{score}"
        assert predict.main([trained["student"], str(photos / "a.jpg"), "--out", str(out), "--score", score]) == 0
        given, shown = (decode(path.read_bytes()).float() for path in (photos / "a.jpg", out / "0001_a.jpg"))
        assert given.shape == shown.shape
        return given, shown

    given, nothing = drawn("1.1")
    assert (given - nothing).abs().mean() < 5, "re-encoding alone changes little"
    given, boxes = drawn("0")
    assert ((given - boxes).abs().amax(0) > 100).float().mean() > 0.01


def test_predict_refuses(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    student, out = trained["student"], str(tmp_path / "out")
    assert "no .bmp, .jpeg, .jpg, .png, .tif, .tiff, .webp files" in refused(
        capsys, predict.main, [student, str(tmp_path / "empty"), "--out", out]
    )
    message = refused(capsys, predict.main, [student, str(tmp_path), "--out", str(tmp_path)])
    assert f"{tmp_path}: holds the images and is also --out" in message
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "standard input: no .bmp, .jpeg" in refused(capsys, predict.main, [student, "-", "--out", out])
    message = refused(capsys, predict.main, [student, str(tmp_path / "gone.jpg"), "--out", out])
    assert "gone.jpg: cannot be read (No such file or directory)" in message
    message = refused(capsys, predict.main, [student, str(tmp_path / "file"), "--out", str(tmp_path / "file" / "x")])
    assert "not writable" in message
    message = refused(capsys, predict.main, [str(tmp_path / "empty"), str(tmp_path / "file"), "--out", out])
    assert "no checkpoint here" in message


def test_student_names_what_it_is(trained: dict[str, Any]) -> None:
    loaded = load_checkpoint(trained["student"])
    meta = ShardSet.open(trained["splits"]["train"]).meta
    assert loaded.classes == meta.classes and loaded.meta["category_ids"] == list(meta.category_ids)
    assert loaded.meta["method"] == "supervised" and loaded.meta["data"] == {"eval_short_side": 64, "long_side": 96, "pad": 32}
    assert {"headkd_ray", "torch", "torchvision", "timm"} <= loaded.meta["versions"].keys()
