"""The checks before a run change nothing, and recognise a run that was started with other keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from headkd_ray.data.shards import ShardSet
from headkd_ray.data.views import extreme_sizes
from headkd_ray.detectors import GroundTruth, build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.engine.preflight import preflight
from headkd_ray.engine.run import open_run
from headkd_ray.errors import UserError
from tests.support import MICRO_STUDENT, MICRO_TEACHER, micro_job


def test_a_sound_job_passes_and_nothing_is_changed(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    (tmp_path / "old").mkdir()
    before = torch.get_rng_state()
    preflight(micro_job(tmp_path / "old" / "new", drawn_splits))
    assert torch.equal(torch.get_rng_state(), before), "the run's first random numbers would depend on the check"
    assert not list((tmp_path / "old").iterdir())


def test_the_teacher_is_checked_although_the_data_is_missing(tmp_path: Path) -> None:
    splits = {"train": str(tmp_path / "no1"), "val": str(tmp_path / "no2")}
    spec = micro_job(tmp_path, splits, student=MICRO_TEACHER).student
    save_detector(tmp_path / "teacher", build_detector(spec, 2), ("cat", "dog"))
    job = micro_job(tmp_path / "runs", splits, method="fitnet", teacher={"checkpoint": str(tmp_path / "teacher")})
    with pytest.raises(UserError) as caught:
        preflight(job)
    assert len(caught.value.problems) == 3
    assert "needs a retinanet teacher, but this one is a faster_rcnn" in caught.value.problems[2]


def test_a_student_that_timm_does_not_know_is_refused(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    job = micro_job(tmp_path, drawn_splits)
    job = job.replace({"student.backbone.name": "resnet10tt"})
    with pytest.raises(UserError, match="resnet10tt"):
        preflight(job)


def test_a_run_of_this_name_was_started_with_other_keys(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """What a run learns is fixed when it starts; where it runs and what it logs is not. All differences are named."""
    open_run(micro_job(tmp_path, drawn_splits))
    preflight(
        micro_job(tmp_path, drawn_splits, log={"every_steps": 7}, checkpoint={"every_steps": 3}, cluster={"data_cpus": 2})
    )
    with pytest.raises(UserError) as caught:
        preflight(micro_job(tmp_path, drawn_splits, optim={"lr": 0.5}, run={"seed": 1}))
    first, second = caught.value.problems
    assert first.startswith(f"optim.lr: the run {tmp_path}/run was started with 0.01, now 0.5") and "another run.name" in first
    assert second.startswith("run.seed: ")


def test_a_run_of_an_older_version_lacks_newer_keys(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """Newer keys count with their defaults; a key that no longer exists is reported."""
    job = micro_job(tmp_path, drawn_splits)
    file = tmp_path / "run" / "job.json"
    open_run(job)
    keys = json.loads(file.read_text())
    del keys["distill"]["fitnet_levels"]
    file.write_text(json.dumps(keys))
    preflight(job)
    with pytest.raises(UserError, match=r"distill\.fitnet_levels: the run .* was started with 5, now 3"):
        preflight(micro_job(tmp_path, drawn_splits, distill={"fitnet_levels": 3}))
    file.write_text(json.dumps({**keys, "distill": {**keys["distill"], "gone": 7}}))
    with pytest.raises(UserError, match=r"distill\.gone: the run .* was started with 7, now None"):
        preflight(job)


def test_another_kind_of_student_under_the_same_name(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    open_run(micro_job(tmp_path, drawn_splits))
    with pytest.raises(UserError, match=r"student\.kind: .*'retinanet', now 'faster_rcnn'"):
        preflight(micro_job(tmp_path, drawn_splits, student=MICRO_TEACHER))


def test_without_ray_and_with_it_are_not_the_same_run(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """Each keeps its checkpoints in its own way, so the other would not find them and would start over."""
    open_run(micro_job(tmp_path, drawn_splits))
    with pytest.raises(UserError, match=r"cluster\.workers: the run .* was started with 0, now 2"):
        preflight(micro_job(tmp_path, drawn_splits, cluster={"workers": 2}))
    ended = {"best": {}, "last": {}, "student": "student"}
    (tmp_path / "run" / "result.json").write_text(json.dumps(ended))  # nothing is left to resume
    preflight(micro_job(tmp_path, drawn_splits, cluster={"workers": 2}))


def test_splits_whose_16_bit_images_are_read_differently(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    splits = {}
    for (name, split), high in zip(drawn_splits.items(), (4095, 65535), strict=True):
        splits[name] = shutil.copytree(split, tmp_path / name)
        meta = json.loads((splits[name] / "meta.json").read_text())
        (splits[name] / "meta.json").write_text(json.dumps({**meta, "value_range": [0, high]}))
    with pytest.raises(UserError, match=r"data\.train .* from 0 to 4095, data\.val .* from 0 to 65535; prepare all"):
        preflight(micro_job(tmp_path / "runs", {name: str(split) for name, split in splits.items()}))


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        (
            {"name": "swin_tiny_patch4_window7_224", "kwargs": {"depths": [1] * 4}},
            r"student\.backbone\.name: swin.* cannot take .* px .*; set student\.backbone\.kwargs\.strict_img_size: false$",
        ),
        ({"name": "gcvit_xxtiny"}, r"set student\.backbone\.kwargs\.img_size: \[96, 96\] and data\.pad: 96$"),
        ({"name": "efficientformer_l1"}, r"student\.backbone\.name: efficientformer_l1 cannot take .*; set data\.pad: 224$"),
        (
            {"kwargs": {"channels": [8, 8, 16, 16, 32]}},
            r"student\.backbone\.kwargs\.channels: resnet10t reads 4 of these 5 values",
        ),
        (
            {"kwargs": {"norm_layer": "nope", "stem_width": 4}},
            r"student\.backbone\.kwargs\.norm_layer: timm cannot build resnet10t with 'nope'",
        ),
        ({"kwargs": {"channels": [8, 8]}}, r"student\.backbone\.kwargs\.channels: timm cannot build resnet10t with \[8, 8\]"),
    ],
)
def test_a_backbone_that_would_fail_in_the_first_step(
    backbone: dict[str, Any], told: str, tmp_path: Path, drawn_splits: dict[str, str]
) -> None:
    """The backbone is tried on the smallest and the largest views; another test tries the remedy."""
    section = {"name": "resnet10t", "frozen_stages": 0, "norm_eval": False, **backbone}
    with pytest.raises(UserError, match=told):
        preflight(micro_job(tmp_path, drawn_splits, student={**MICRO_STUDENT, "backbone": section}))


@pytest.mark.parametrize(
    ("name", "kwargs", "data"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": [1] * 4, "strict_img_size": False}, {}),
        ("gcvit_xxtiny", {"img_size": [96, 96]}, {"pad": 96}),
    ],
)
def test_the_remedies_for_fixed_sizes_train(
    name: str, kwargs: dict[str, Any], data: dict[str, Any], tmp_path: Path, drawn_splits: dict[str, str]
) -> None:
    section = {"name": name, "kwargs": kwargs, "frozen_stages": 0, "norm_eval": False}
    job = micro_job(tmp_path, drawn_splits, student={**MICRO_STUDENT, "backbone": section}, data=data)
    preflight(job)
    torch.manual_seed(0)
    student = build_detector(job.student, 2)
    shown = extreme_sizes(
        job.data, *(getattr(ShardSet.open(drawn_splits["train"]).index, side) for side in ("height", "width"))
    )
    for height, width in shown:
        x = torch.zeros(1, 3, height, width)
        truth = GroundTruth.of(torch.ones(1, 1, 4) * 8, torch.tensor([[-1]]), torch.tensor([[height, width]]))
        losses = student.losses(student.features(x), truth)
        assert all(torch.isfinite(loss) for loss in losses.values())
