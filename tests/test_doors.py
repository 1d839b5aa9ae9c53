"""The commands train, evaluate and predict as a user starts them: what they refuse, and what they write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from headkd_ray import evaluate, predict, train
from headkd_ray.data.images import decode
from headkd_ray.data.prepare import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import load_checkpoint, save_detector
from headkd_ray.job import Job, load_job
from tests.support import MICRO_STUDENT, MICRO_TEACHER, micro_job

KEEN_STUDENT = {**MICRO_STUDENT, "head": {**MICRO_STUDENT["head"], "postprocess": {"score": 0.0, "max_detections": 20}}}
"""Detects something on every image, however little it has learnt."""
ONE_EPOCH = {"epochs": 1, "milestones": []}

Write = Callable[[Job], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a job file."""

    def write(job: Job) -> str:
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
        return str(path)

    return write


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], arguments: list[str]) -> str:
    """What a command says last when it refuses its input."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.rindex("error: ") :]


# --- train: what it refuses ---


def test_print_config_is_a_job_that_loads_to_the_same(
    tmp_path: Path, drawn_splits: dict[str, str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "runs"
    job = micro_job(storage, drawn_splits)
    assert train.main([write(job), "optim.lr=0.125", "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_job(printed) == job.model_copy(update={"optim": job.optim.model_copy(update={"lr": 0.125})})
    assert not storage.exists()


def _other_split(tmp_path: Path, classes: list[str], name: str = "other") -> str:
    """A prepared split of one image with boxes of other classes."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.jpg")
    coco = {
        "images": [{"id": 1, "file_name": f"{name}.jpg", "width": 64, "height": 64}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 32, 32], "area": 1024, "iscrowd": 0}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }
    (tmp_path / f"{name}.json").write_text(json.dumps(coco))
    prepare_split(str(tmp_path / f"{name}.json"), str(tmp_path), str(tmp_path / name))
    return str(tmp_path / name)


def _without_boxes(split: str, out: Path) -> str:
    """The same prepared split with an index that counts no boxes (as prepare would write it, if it did not refuse)."""
    shutil.copytree(split, out)
    table = pq.read_table(out / "index.parquet")
    column = table.schema.get_field_index("boxes")
    none = np.zeros(len(table), np.int32)
    pq.write_table(table.set_column(column, table.schema.field(column), [none]), out / "index.parquet")
    return str(out)


def _detector(folder: Path, kind: dict[str, Any], classes: tuple[str, ...], splits: dict[str, str]) -> str:
    """A checkpoint with random weights."""
    method = micro_job(folder, splits, student=kind)
    save_detector(folder, build_detector(method.student, len(classes)), classes)
    return str(folder)


def _taught_by(checkpoint: str) -> dict[str, Any]:
    return {"method": "head", "teacher": {"checkpoint": checkpoint}}


def _missing_split(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    return {"data": {"train": str(tmp_path / "nowhere")}}, [
        f"{tmp_path}/nowhere: the data set is missing or empty",
        "headkd_ray.prepare",
    ]


def _unprepared_folder(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"")
    return {"data": {"val": str(tmp_path / "photos")}}, [f"{tmp_path}/photos: the data set is not completely prepared"]


def _other_classes_in_val(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    return {"data": {"val": _other_split(tmp_path, ["cat", "dog"])}}, ["Class lists disagree", "data.val", "'cat', 'dog'"]


def _empty_training_split(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    return {"data": {"train": _without_boxes(splits["train"], tmp_path / "empty")}}, ["/empty: no image has a box to train on"]


def _teacher_of_other_classes(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    teacher = _detector(tmp_path / "teacher", MICRO_TEACHER, ("cat", "dog"), splits)
    return _taught_by(teacher), [
        f"teacher ({teacher}) has 2 classes",
        "'cat', 'dog'",
        "must know at least one class of the data",
    ]


def _teacher_of_the_wrong_kind(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    classes = ShardSet.open(splits["train"]).meta.classes
    teacher = _detector(tmp_path / "teacher", MICRO_TEACHER, classes, splits)
    return {**_taught_by(teacher), "method": "fitnet"}, ["needs a retinanet teacher", "faster_rcnn"]


def _teacher_of_another_architecture(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """model.json of one detector, model.safetensors of another."""
    classes = ShardSet.open(splits["train"]).meta.classes
    teacher = _detector(tmp_path / "teacher", MICRO_TEACHER, classes, splits)
    _detector(tmp_path / "other", MICRO_STUDENT, classes, splits)
    shutil.copy(tmp_path / "other" / "model.safetensors", teacher)
    return _taught_by(teacher), ["roi.fcs.0.weight", "head."]


def _missing_teacher(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    return _taught_by(str(tmp_path / "gone")), [f"{tmp_path}/gone: no such folder or file"]


def _folder_that_is_no_checkpoint(tmp_path: Path, splits: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    _detector(tmp_path / "run" / "student", MICRO_TEACHER, ("cat",), splits)
    return _taught_by(str(tmp_path / "run")), [f"{tmp_path}/run: no checkpoint here", f"did you mean {tmp_path}/run/student"]


@pytest.mark.parametrize(
    "case",
    [
        _missing_split,
        _unprepared_folder,
        _other_classes_in_val,
        _empty_training_split,
        _teacher_of_other_classes,
        _teacher_of_the_wrong_kind,
        _teacher_of_another_architecture,
        _missing_teacher,
        _folder_that_is_no_checkpoint,
    ],
    ids=lambda case: case.__name__.strip("_"),
)
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_input_is_refused_before_anything_starts_or_is_written(
    case: Callable[[Path, dict[str, str]], tuple[dict[str, Any], list[str]]],
    workers: int,
    tmp_path: Path,
    drawn_splits: dict[str, str],
    write: Write,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "headkd_ray.cluster.train", None)  # importing it would be too late an error
    sections, causes = case(tmp_path, drawn_splits)
    storage = tmp_path / "runs"
    message = refused(capsys, train.main, [write(micro_job(storage, drawn_splits, **sections, cluster={"workers": workers}))])
    assert all(cause in message for cause in causes), message
    assert not storage.exists()


def test_storage_that_cannot_be_written(
    tmp_path: Path, drawn_splits: dict[str, str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    job = micro_job(tmp_path / "file" / "runs", drawn_splits)
    message = refused(capsys, train.main, [write(job)])
    assert f"run.storage: {tmp_path}/file/runs/run: not writable" in message
    assert (tmp_path / "file").read_text() == "kept"
    message = refused(capsys, train.main, [write(job), "run.storage=nosuch://bucket/runs"])
    assert "nosuch://bucket/runs: no filesystem for this URI" in message


def test_all_problems_are_reported_at_once(
    tmp_path: Path, drawn_splits: dict[str, str], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    job = micro_job(
        tmp_path / "file", {"train": str(tmp_path / "no1"), "val": str(tmp_path / "no2")}, **_taught_by(str(tmp_path / "no3"))
    )
    message = refused(capsys, train.main, [write(job)])
    assert message.startswith("error: run run cannot start:\n")
    assert all(cause in message for cause in ("/no1: ", "/no2: ", "/no3: ", "run.storage: ")), message
    assert len(message.strip().splitlines()) == 5


def test_exit_code_and_last_words_of_the_process(tmp_path: Path, drawn_splits: dict[str, str], write: Write) -> None:
    job = write(micro_job(tmp_path / "runs", {**drawn_splits, "val": str(tmp_path / "nowhere")}))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-m", "headkd_ray.train", job], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/nowhere: the data set is missing")
    assert "Traceback" not in done.stderr


# --- a trained student: evaluate and predict ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, drawn_splits: dict[str, str]) -> dict[str, Any]:
    """Result of a run whose AP is neither 0 nor 100, ``splits`` added.

    The student hardly learns anything in one epoch, so the ground truth is made to suit it: half of what it detects.
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


def test_evaluate_gives_the_ap_that_training_reported(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val, out = trained["splits"]["val"], tmp_path / "made" / "detections.json"
    metrics = evaluate.evaluate_checkpoint(trained["student"], val, batch_size=8, out=str(out)).as_dict()
    assert metrics == {key: trained["best"][key] for key in metrics}
    found = json.loads(out.read_text())
    shards = ShardSet.open(val)
    assert {entry["image_id"] for entry in found} == set(shards.index.image_id.tolist())
    assert {entry["category_id"] for entry in found} <= set(shards.meta.category_ids) and 0 not in shards.meta.category_ids
    assert evaluate.main([trained["student"], val, "--batch-size", "8"]) == 0
    assert f"{metrics['AP']:.1f}" in capsys.readouterr().out


def test_evaluate_refuses_other_classes_and_unwritable_output_before_the_work(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = _other_split(tmp_path, ["cat", "dog"])
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
    """The whole run on a filesystem that is not this machine's: same student, and it can be evaluated where it is."""
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
    """The same drawn image as JPEG, PNG and WebP, a file that is no image, and a JPEG that is cut off."""
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
    message = refused(capsys, predict.main, [trained["student"], str(photos), "--out", str(out), "--score", "0"])
    assert "1 of 4 images could not be read" in message and "d_cut.jpeg: cannot be decoded" in message.splitlines()[-1]
    assert sorted(path.name for path in out.iterdir()) == ["0001_a.jpg", "0002_b.jpg", "0003_c.jpg", "detections.json"]

    result = json.loads((out / "detections.json").read_text())
    assert [Path(image["file_name"]).name for image in result["images"]] == ["a.jpg", "b.png", "c.webp"]
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


def test_predict_refuses(trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    student, out = trained["student"], str(tmp_path / "out")
    assert "no .jpeg, .jpg, .png, .webp files" in refused(
        capsys, predict.main, [student, str(tmp_path / "empty"), "--out", out]
    )
    assert "gone.jpg: cannot be read" in refused(capsys, predict.main, [student, str(tmp_path / "gone.jpg"), "--out", out])
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
