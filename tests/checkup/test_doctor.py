"""The doctor finds what is wrong with real files, says how to mend it, and keeps nothing."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageEnhance

from headkd_ray import doctor
from headkd_ray.checkup.all_checks import CHECKS, as_json, exit_code, run_check
from headkd_ray.checkup.box_statistics import SAME, same_places
from headkd_ray.checkup.findings import Finding
from headkd_ray.checkup.machine_findings import check_cluster
from headkd_ray.checkup.size_findings import best_ious
from headkd_ray.checkup.subject import CheckOptions, Subject
from headkd_ray.checkup.training_findings import check_learning_rate
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.sample import Annotations
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.synthetic import draw_dataset
from headkd_ray.data.views import train_view, view_size
from headkd_ray.detectors.ops.anchors import Anchors
from headkd_ray.detectors.ops.boxes import pairwise_iou
from headkd_ray.job import Job, RetinaHeadSpec
from headkd_ray.profiling.step_trial import largest_batch
from tests.report.test_detector_page import Page
from tests.support import micro_job, micro_teacher


def _write(path: Path, job: Job) -> str:
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return str(path)


def _box(image: dict[str, Any], category: int, box: list[float], ids: list[int]) -> dict[str, Any]:
    ids[0] += 1
    area = box[2] * box[3]
    return {"id": ids[0], "image_id": image["id"], "category_id": category, "bbox": box, "area": area, "iscrowd": 0}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return prepared splits of drawn images with faults that ``prepare`` accepts."""
    folder = tmp_path_factory.mktemp("faulty")
    drawn = draw_dataset(folder / "drawn", train=30, val=8)
    train, val = (json.loads(path.read_text()) for path in (drawn.train, drawn.val))
    images, ids = train["images"], [10**9]
    classes = [category["id"] for category in train["categories"]]
    first = {annotation["image_id"]: annotation for annotation in reversed(train["annotations"])}
    own = [first[image["id"]] for image in images]
    more = [_box(images[0], own[0]["category_id"], [20.0, 30.0, 2.0, 1.5], ids)]
    more.append(_box(images[1], own[1]["category_id"], [0, 0, images[1]["width"], images[1]["height"]], ids))
    more.append(_box(images[2], own[2]["category_id"], own[2]["bbox"], ids))
    more.append(_box(images[3], next(each for each in classes if each != own[3]["category_id"]), own[3]["bbox"], ids))
    empty = {image["id"] for image in images[4:12]}
    lonely, unseen = classes[2], classes[3]  # without a box in train, and in val
    train["annotations"] = [
        each for each in [*train["annotations"], *more] if each["image_id"] not in empty and each["category_id"] != lonely
    ]
    val["annotations"] = [each for each in val["annotations"] if each["category_id"] != unseen]
    for number, image in enumerate(images[12:15]):
        source = Image.open(drawn.images / image["file_name"])
        ImageEnhance.Brightness(source).enhance(1.05).save(drawn.images / f"again_{number}.jpg", quality=60)
        source.resize((100, 100)).save(drawn.images / f"leak_{number}.jpg", quality=70)
        train["images"].append({**image, "id": 5000 + number, "file_name": f"again_{number}.jpg"})
        val["images"].append({"id": 6000 + number, "file_name": f"leak_{number}.jpg", "width": 100, "height": 100})
        for content in (train, val):
            content["annotations"].append(_box(content["images"][-1], classes[0], [10, 10, 40, 40], ids))
    splits = {}
    for name, content in {"train": train, "val": val}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
        prepare_split(str(folder / f"{name}.json"), str(drawn.images), str(folder / name), row_group=8)
        splits[name] = str(folder / name)
    return splits


@pytest.fixture(scope="module")
def examined(faulty: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the command on the faulty data: {"code", "json", "page", "runs"}."""
    folder = tmp_path_factory.mktemp("examined")
    job = micro_job(folder / "runs", faulty, optim={"epochs": 20, "milestones": []})
    out = StringIO()
    with redirect_stdout(out):
        code = doctor.main(
            [_write(folder / "job.yaml", job), "--json", "--html", str(folder / "page.html"), "--skip", "storage"]
        )
    page = (folder / "page.html").read_text()
    return {"code": code, "json": json.loads(out.getvalue()), "page": page, "runs": folder / "runs"}


def _found(examined: dict[str, Any], check: str) -> dict[str, Any]:
    (found,) = [each for each in examined["json"]["findings"] if each["check"] == check]
    return dict(found)


def test_the_faults_of_the_data_are_found(examined: dict[str, Any], faulty: dict[str, str]) -> None:
    assert examined["code"] == 1 and examined["json"]["verdict"] == "red"
    assert examined["json"].keys() == {"run", "verdict", "findings"}
    assert all([*each] == ["check", "level", "found", "mend", "figures", "examples"] for each in examined["json"]["findings"])
    levels = {each["check"]: each["level"] for each in examined["json"]["findings"]}
    assert list(levels) == list(CHECKS)
    assert levels["job"] == levels["files"] == levels["steps"] == levels["reading"] == "green"
    assert levels["teacher"] == levels["cache"] == levels["storage"] == levels["cluster"] == "skipped"
    for check in ("tiny boxes", "whole-image boxes", "double boxes", "boxes of two classes"):
        found = _found(examined, check)
        assert (found["level"], found["figures"]["train"]["count"], found["figures"]["val"]["count"]) == ("yellow", 1, 0)
        assert found["mend"] and len(found["examples"]) == 1
    tiny = _found(examined, "tiny boxes")["examples"][0]
    assert tiny["boxes"] == [pytest.approx([20, 30, 22, 31.5])] and tiny["split"] == "train"
    assert tiny["file_name"] == "train_00000.jpg" and tiny["caption"].endswith("2 x 2 px")
    assert f"{tiny['caption']} (train_00000.jpg)" in examined["page"]
    assert len(_found(examined, "boxes of two classes")["examples"][0]["classes"]) == 2
    empty = _found(examined, "images without boxes")
    assert empty["figures"]["train"]["count"] >= 8 and "training leaves them out" in empty["found"]
    classes = ShardSet.open(faulty["train"]).meta.classes
    told = _found(examined, "classes")
    assert told["level"] == "red" and told["figures"]["train"][classes[2]] == {"boxes": 0, "images": 0}
    assert f"in val, without a box in train: {classes[2]!r}" in told["found"]
    assert (
        f"in train, without a box in val: {classes[3]!r}" in told["found"] and "fewer than 20 boxes in train" in told["found"]
    )


def test_copies_and_leaks_are_found(examined: dict[str, Any]) -> None:
    copies, leaks = _found(examined, "near-duplicates"), _found(examined, "leaks")
    assert copies["figures"] == {"looked_at": 33, "images": 33, "repeated": 3, "groups": 3} and copies["level"] == "yellow"
    pairs = [{each["file_name"], each["beside"]["file_name"]} for each in copies["examples"]]
    assert {"again_0.jpg", "train_00012.jpg"} in pairs
    assert leaks["level"] == "red" and leaks["figures"]["leaking"] == 3 and "prepare --split" in leaks["mend"]
    assert {each["file_name"] for each in leaks["examples"]} == {f"leak_{number}.jpg" for number in range(3)}


def test_a_sample_says_how_many_were_looked_at(faulty: dict[str, str], tmp_path: Path) -> None:
    subject = Subject(micro_job(tmp_path, faulty), CheckOptions(images=5))
    found = CHECKS["leaks"](subject)
    assert found.figures["looked_at"] == {"train": 5, "val": 5}
    assert "5 of 33 of train looked at (--images) and 5 of 11 of val looked at (--images)" in found.found


def test_the_page_has_the_pictures_and_needs_nothing_else(examined: dict[str, Any]) -> None:
    text = examined["page"]
    rows = {row[1]: row[2:] for row in Page(text).rows if len(row) > 2}
    drawn = sum(len(each["examples"]) for each in examined["json"]["findings"])
    assert text.count("data:image/jpeg;base64,") == drawn > 10
    assert "http" not in text.replace("http://www.w3.org/", "") and text.count("<svg") == 4
    for each in examined["json"]["findings"]:
        assert rows[each["check"]][:1] == [each["found"]] and (each["mend"] is None or rows[each["check"]][1] == each["mend"])
    assert not examined["runs"].exists(), "nothing is left behind"


def test_sound_data_and_a_poor_teacher(
    drawn_splits: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With RoIs of the teacher: its classes, its AP beside the baseline's, the size of a cache, and a step with it."""
    classes = ShardSet.open(drawn_splits["train"]).meta.classes
    renamed = (classes[0].upper(), *classes[1:])
    teacher, baseline = (micro_teacher(tmp_path / name, renamed, seed) for name, seed in (("teacher", 3), ("baseline", 4)))
    job = micro_job(
        tmp_path / "runs",
        drawn_splits,
        method="head",
        teacher={"checkpoint": teacher},
        distill={"rois": "teacher", "roi_budget": 8, "warmup_steps": 50, "copy_head": False},
    )
    arguments = [_write(tmp_path / "job.yaml", job), "optim.accumulate=2", "--set", "optim.epochs=12", "--baseline", baseline]
    skip = ["--skip", "leaks", "near-duplicates"]
    assert doctor.main([*arguments, "--val-images", "4", "--json", *skip]) == 1
    found = {each["check"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert found["leaks"] == {**found["leaks"], "level": "skipped", "found": "left out (--skip)"}
    assert found["class lists"]["level"] == "yellow" and f"({'the teacher'}'s {renamed[0]!r})" in found["class lists"]["mend"]
    assert found["teacher"]["level"] == "red" and found["teacher"]["figures"].keys() == {
        "images",
        "least_ap",
        "ap",
        "baseline_ap",
    }
    assert "on 4 of 10 images of val (--val-images), below 20 (--least-ap); the baseline has" in found["teacher"]["found"]
    cache = found["cache"]["figures"]
    assert cache["bytes"] == 42 * 12 * 8 * (16 + 1 + 2 * 16 * 2) and cache["views"] == 12 and cache["built_bytes"] == 0
    assert found["storage"]["level"] == "green" and found["storage"]["figures"]["checkpoint_bytes"] > 1000
    steps = found["steps"]["figures"]
    assert (steps["height"], steps["images"], len(steps["losses"])) == (96, 4, 4)
    assert all(map(np.isfinite, steps["losses"][-1].values())) and "loss_assist_cls" in steps["losses"][-1]
    assert 0 < steps["peak_bytes"] < steps["memory_bytes"]
    assert found["cluster"]["level"] == "skipped" and "needs no Ray" in found["cluster"]["found"]
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_a_job_that_cannot_start_is_examined_all_the_same(
    drawn_splits: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = micro_job(tmp_path / "runs", {**drawn_splits, "val": str(tmp_path / "nowhere")})
    skip = ["--skip", "storage", "near-duplicates"]
    assert doctor.main([_write(tmp_path / "job.yaml", job), *skip]) == 2
    lines = capsys.readouterr().out.splitlines()
    told = {columns[1]: line for line in lines if len(columns := re.split("  +", line)) == 3}
    assert told.keys() == CHECKS.keys()
    assert told["job"].startswith("red ") and f"{tmp_path}/nowhere: the data set is missing" in told["job"]
    assert told["classes"].startswith("yellow ") and "8 classes with" in told["classes"]
    assert told["leaks"].startswith("not looked at ") and f"not possible: {tmp_path}/nowhere" in told["leaks"]
    assert any(line.startswith("job: Mend these first") for line in lines) and "1 red" in lines[-1]

    page = tmp_path / "page.html"
    without = [str(tmp_path / "job.yaml"), f"data.train={tmp_path}/gone", "--html", str(page), *skip]
    assert doctor.main(without) == 2
    said = capsys.readouterr().out
    assert said.endswith(f"page: {page}\n") and "neither data.train nor data.val can be opened" in said
    assert f"{tmp_path}/gone: the data set is missing" in page.read_text()


def test_what_is_wrong_with_the_command_is_told_first(
    drawn_splits: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = _write(tmp_path / "job.yaml", micro_job(tmp_path / "runs", drawn_splits))
    (tmp_path / "file").touch()
    for arguments, message in {
        ("--skip", "leak"): "--skip leak: there is no such check; they are job, files, images",
        ("--html", f"{tmp_path}/file/page.html"): "file: not writable",
        ("optim.lrr=1",): "optim.lrr: unknown key",
    }.items():
        with pytest.raises(SystemExit) as exit_:
            doctor.main([job, *arguments])
        assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_damaged_shard_is_red_and_named(drawn_splits: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(drawn_splits["train"], tmp_path / "train")
    shard = tmp_path / "train" / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    subject = Subject(micro_job(tmp_path, {**drawn_splits, "train": str(tmp_path / "train")}), CheckOptions())
    found = CHECKS["files"](subject)
    assert found.level == "red" and f"{shard}: cannot be read" in found.found and "prepare the split again" in str(found.mend)
    findings = [run_check(name, subject) for name in ("files", "near-duplicates")]
    assert exit_code(findings) == 1
    skipped = next(finding for finding in findings if finding.check == "near-duplicates")
    assert skipped.level == "skipped" and str(shard) in skipped.found
    assert json.dumps(as_json(findings, subject))


def test_learning_rate_and_warm_ups_are_seen_against_the_run(drawn_splits: dict[str, str], tmp_path: Path) -> None:
    def found(**optim: Any) -> Finding:
        changes = {"lr": 0.01, "lr_batch": 16, "warmup_steps": 4, "epochs": 10, "milestones": [8], **optim}
        return check_learning_rate(Subject(micro_job(tmp_path, drawn_splits, optim=changes), CheckOptions()))

    assert found().level == "green" and found().figures == {"lr": 0.0025, "global_batch": 4, "factor": 0.25, "steps": 110}
    assert found(lr_batch=64).level == "yellow", "a sixteenth of the batch that it is meant for"
    assert found(lr_batch=None).figures["factor"] == pytest.approx(4), "times the paper's 0.01 at 16 images"
    assert found(lr_batch=None, optimizer="adamw").figures["factor"] is None
    assert [found(warmup_steps=steps).level for steps in (55, 56, 110)] == ["green", "yellow", "red"]


def test_the_largest_batch_is_as_large_as_any(faulty: dict[str, str], tmp_path: Path) -> None:
    job = micro_job(tmp_path, faulty)
    shards = ShardSet.open(faulty["train"])
    sizes = [
        view_size(height, width, train_view(1, number, 0, job.data))
        for height, width in zip(shards.index.height.tolist(), shards.index.width.tolist(), strict=True)
        for number in range(20)
    ]
    batch = largest_batch(job, shards)
    assert batch.images.shape[0] == 4 and batch.boxes.shape[1] == shards.index.boxes.max()
    assert (batch.sizes.amax(0) >= torch.tensor(sizes).amax(0)).all()
    alone = largest_batch(job.replace({"data.batch_size": 1}), shards).sizes[0]
    assert int(alone.prod()) >= max(height * width for height, width in sizes)


def test_boxes_at_the_same_place_are_those_of_a_comparison_of_all() -> None:
    random = np.random.default_rng(0)
    corner, size = random.uniform(0, 50, (60, 2)), random.uniform(5, 30, (60, 2))
    boxes = np.concatenate([corner, corner + size], axis=1).repeat(3, axis=0) + random.normal(0, 0.4, (180, 4))
    found = Annotations(np.sort(random.integers(0, 6, 180)), np.zeros(180, np.int64), boxes.astype(np.float32))
    iou = pairwise_iou(torch.from_numpy(found.boxes), torch.from_numpy(found.boxes))
    expected = {
        pair for pair in combinations(range(180), 2) if iou[pair] >= SAME and found.rows[pair[0]] == found.rows[pair[1]]
    }
    assert {tuple(sorted(pair)) for pair in zip(*map(np.ndarray.tolist, same_places(found)), strict=True)} == expected
    assert len(expected) > 5


def test_boxes_without_an_anchor_are_those_of_the_whole_grid() -> None:
    anchors, random = Anchors(RetinaHeadSpec().anchors, (8, 16, 32, 64, 128)), np.random.default_rng(0)
    corner = torch.from_numpy(random.uniform(0, 100, (200, 2))).float()
    boxes = torch.cat([corner, (corner + torch.from_numpy(random.uniform(3, 60, (200, 2)))).clamp(max=120).float()], dim=1)
    grid = anchors.grid([torch.zeros(1, 1, -(-128 // stride), -(-128 // stride)) for stride in anchors.strides])
    expected = pairwise_iou(boxes, grid.boxes).amax(1)
    torch.testing.assert_close(best_ious(anchors, boxes, torch.full((200, 2), 120.0)), expected)


def test_small_views_lose_boxes_and_anchors(drawn_splits: dict[str, str], tmp_path: Path) -> None:
    def found(side: int) -> list[Finding]:
        data = {"short_side": [side, side], "long_side": side, "eval_short_side": side}
        subject = Subject(micro_job(tmp_path, drawn_splits, data=data), CheckOptions())
        return [CHECKS[name](subject) for name in ("vanishing boxes", "anchors")]

    assert [each.level for each in found(512)] == ["green", "green"]
    vanishing, anchors = found(8)
    assert (vanishing.level, anchors.level) == ("red", "yellow")
    assert "data.short_side, now [8, 8]" in str(vanishing.mend) and "student.head.anchors" in str(anchors.mend)


def test_the_cluster_that_is_named_is_asked(
    ray_cluster: None, drawn_splits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(**cluster: Any) -> Finding:
        return check_cluster(Subject(micro_job(tmp_path, drawn_splits, cluster=cluster), CheckOptions()))

    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert found(workers=8).level == "skipped" and "the job requests 16 CPUs for 8 workers" in found(workers=8).found
    assert found(workers=2, address="auto").level == "green"
    refused = found(workers=8, address="auto")
    assert refused.level == "red" and "16 CPUs requested, the cluster has 4" in refused.found
