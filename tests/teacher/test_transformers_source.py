"""A detector of transformers as a teacher: which RoIs it gives, with which features, and that preprocessing spoils nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("transformers")

from headkd_ray import cache
from headkd_ray.data.batch import Batch, idle_batch
from headkd_ray.data.batch_stream import BatchMaker
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors.hf_models import HFModel, decoder_states, read_hf_model
from headkd_ray.engine.preflight import preflight
from headkd_ray.errors import UserError
from headkd_ray.job import Job
from headkd_ray.teacher.loading import load_teacher
from headkd_ray.teacher.transformers_source import TransformersSource
from headkd_ray.train import train
from tests.detectors.hf_micro import KINDS, hf_folder
from tests.support import micro_job
from tests.teacher.micro import batch_of, example, examples

NAMES = ("b", "unknown", "a")
"""The teacher's classes; the data's are a, b, c."""
QUERIES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("teacher"), "rt_detr_v2", NAMES)


@pytest.fixture(scope="module")
def model(folder: Path) -> HFModel:
    return read_hf_model(str(folder))


@pytest.fixture(scope="module")
def source(model: HFModel) -> TransformersSource:
    return source_of(model)


def source_of(model: HFModel, budget: int = QUERIES, truth_iou: float = 0.5) -> TransformersSource:
    return TransformersSource(model, NAMES, ("a", "b", "c"), budget, (2, 3), truth_iou)


def without_boxes(batch: Batch) -> Batch:
    return replace(batch, boxes=torch.zeros_like(batch.boxes), labels=torch.full_like(batch.labels, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_those_of_the_processor_s_own_pipeline(kind: str, drawn_splits: dict[str, str], tmp_path: Path) -> None:
    """Views of several sizes, resized, flipped and padded to one batch, give what the model and its processor give of each."""
    job = micro_job(tmp_path, drawn_splits)
    maker = BatchMaker(job.data, seed=0, train=True)
    samples = ShardSet.open(drawn_splits["train"]).read_group(0, 0, range(4))
    views = [maker.example(sample, 1, maker.view(sample.image_id, 1)) for sample in samples]
    assert len({view.image.shape for view in views}) > 1
    batch = without_boxes(batch_of(*views))
    model = read_hf_model(str(hf_folder(tmp_path / kind, kind, NAMES)))
    source = source_of(model)
    targets, logits, classes = source.with_logits(batch, source.num_logits)
    answered = model.probabilities(source._run(batch).logits).amax(-1)
    for row, view in enumerate(views):
        image = Image.fromarray(view.image.transpose(1, 2, 0))
        inputs = model.processor(images=image, return_tensors="pt")
        with torch.no_grad():
            output = model.module(**inputs)
        (found,) = model.processor.post_process_object_detection(output, threshold=0.0, target_sizes=[view.image.shape[1:]])
        if model.softmax:  # its scores are of queries, in their order
            torch.testing.assert_close(answered[row], found["scores"], rtol=1e-5, atol=1e-6)
        best = found["scores"].argsort(descending=True)[:10]
        for score, label, box in zip(*(found[name][best] for name in ("scores", "labels", "boxes")), strict=True):
            height, width = view.image.shape[1:]
            box = box.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
            distance, roi = (targets.boxes[row] - box).abs().amax(-1).min(0)
            assert distance < 1e-3
            if NAMES[label] == "unknown":
                continue
            own = logits[row, roi][classes[row, roi] == ("a", "b", "c").index(NAMES[label])]
            if not model.softmax:
                torch.testing.assert_close(own.sigmoid(), score[None], rtol=1e-4, atol=1e-6)


def test_features_are_the_hidden_states_of_the_chosen_layers(source: TransformersSource) -> None:
    view = example(0, 64, 90, 0)
    targets = source(batch_of(view))
    answer = decoder_states(source.model.module, **source.model.inputs([torch.from_numpy(view.image)]))
    assert source.layers == 2 and source.width == 32 and targets.taps.shape == (1, 2, QUERIES, 32)
    count = int(targets.valid.sum())  # queries whose boxes have an area within the view
    boxes = source._boxes(answer.boxes, torch.tensor([[64, 90]]))[0]
    usable = (boxes[:, 2:] > boxes[:, :2]).all(1)
    assert count == int(usable.sum())
    torch.testing.assert_close(targets.boxes[0, :count], boxes[usable])
    torch.testing.assert_close(targets.taps[0, :, :count], answer.states[1:, 0, usable])
    assert not targets.truth.any() and not targets.taps[~targets.valid.unsqueeze(1).expand(-1, 2, -1)].any()


def test_the_budget_goes_to_ground_truth_and_then_to_the_surest_queries(model: HFModel) -> None:
    view = example(0, 64, 90, 3)
    every = source_of(model, truth_iou=0.0)(batch_of(view))
    answer = decoder_states(model.module, **model.inputs([torch.from_numpy(view.image)]))
    sureness = answer.logits.sigmoid().amax(-1)[0]
    for budget, truth in ((6, 3), (4, 2), (1, 1)):
        some = source_of(model, budget, truth_iou=0.0)(batch_of(view))
        assert some.truth.sum() == truth and some.valid.sum() == budget
        assert torch.equal(some.boxes[0, :truth], torch.from_numpy(view.boxes[:truth]))
        assert torch.equal(some.taps[0, :, :truth], every.taps[0, :, :truth])
        surest = sureness.topk(budget - truth).indices.sort().values
        expected = source_of(model)._boxes(answer.boxes, torch.tensor([[64, 90]]))[0, surest]
        torch.testing.assert_close(some.boxes[0, truth:], expected)


def test_a_ground_truth_box_has_the_state_of_the_query_that_overlaps_it_most_or_is_left_out(model: HFModel) -> None:
    view = example(0, 64, 90, 0)
    queries = source_of(model)(batch_of(view))
    near = queries.boxes[0, 4] + torch.tensor([0.2, 0.0, 0.0, 0.2])
    nowhere = torch.tensor([88.0, 62.0, 90.0, 64.0])  # a corner that no query of this teacher is at
    labelled = replace(view, boxes=torch.stack([nowhere, near]).numpy(), labels=np.array([0, 1]))
    targets = source_of(model)(batch_of(labelled))
    assert targets.truth[0].tolist() == [True] + [False] * (QUERIES - 1)
    assert torch.equal(targets.boxes[0, 0], near)
    assert torch.equal(targets.taps[0, :, 0], queries.taps[0, :, 4])
    strict = source_of(model, truth_iou=0.999)(batch_of(labelled))
    assert not strict.truth.any() and torch.equal(strict.boxes, queries.boxes)


def test_company_order_and_padding_do_not_matter(source: TransformersSource) -> None:
    views = examples()
    together, backwards = source(batch_of(*views)), source(batch_of(*views[::-1]))
    for number, view in enumerate(views):
        alone = source(batch_of(view))
        for other, row in ((together, number), (backwards, len(views) - 1 - number)):
            assert torch.equal(other.valid[row], alone.valid[0]) and torch.equal(other.truth[row], alone.truth[0])
            torch.testing.assert_close(other.boxes[row], alone.boxes[0], rtol=0, atol=1e-3)
            torch.testing.assert_close(other.taps[row], alone.taps[0], rtol=1e-4, atol=1e-4)
    idle = source(idle_batch(0, 64, 32))
    assert not idle.valid.any() and idle.taps.shape == (1, 2, QUERIES, 32)


def test_logits_are_those_of_classes_that_the_data_has(source: TransformersSource) -> None:
    batch = batch_of(example(0, 64, 90, 0))
    targets, logits, classes = source.with_logits(batch, 2)
    assert source.num_logits == 2 and set(classes[targets.valid].flatten().tolist()) == {0, 1}
    assert (logits[..., 0] >= logits[..., 1]).all()
    boxes = targets.boxes[0, targets.valid[0]]
    taps, again, same = source.answers_at(batch, boxes, 2)
    for one, other in ((taps, targets.taps[0]), (again, logits[0]), (same, classes[0])):
        own = other[:, targets.valid[0]] if other.dim() > 2 else other[targets.valid[0]]
        assert torch.equal(one, own)


def job_with(tmp_path: Path, splits: dict[str, str], folder: Path, **teacher: Any) -> Job:
    return micro_job(
        tmp_path,
        splits,
        method="head",
        teacher={"kind": "transformers", "checkpoint": str(folder), "cache": {"path": str(tmp_path / "cache")}, **teacher},
        distill={
            "rois": "teacher",
            "roi_budget": 12,
            "copy_head": False,
            "distance": "pearson",
            "assistant": {"fc_channels": 16, "pool": 3, "sampler": {"size": 16}},
        },
        data={"views": 1},
        optim={"epochs": 1, "milestones": []},
    )


def test_a_user_s_own_folder_teaches_from_a_cache_of_8_bits(
    tmp_path: Path, drawn_splits: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Build, verify, train: the user's path, end to end."""
    classes = ShardSet.open(drawn_splits["train"]).meta.classes
    folder = hf_folder(tmp_path / "teacher", "rt_detr_v2", ("N/A", *classes[:2]))
    job = job_with(tmp_path, drawn_splits, folder, placement="cache")
    job = job.replace({"teacher.cache.dtype": "int8", "teacher.cache.logits": 1})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    assert cache.main(["build", str(tmp_path / "job.yaml")]) == 0
    assert cache.main(["verify", str(tmp_path / "job.yaml"), "--sample", "5"]) == 0
    out = capsys.readouterr().out
    assert "the same in 5 of 5 views" in out and "cosine of the features: mean 0.999" in out
    assert "class of the largest logit: the same for 100.00%" in out
    records: list[dict[str, Any]] = []
    train(job, records.append)
    (note,) = [record["note"] for record in records if "note" in record]
    assert note.startswith("teacher: a rt_detr_v2 of transformers with 20 queries; hidden states of decoder layers 2, 3 of 3")
    assert f"it knows 2 of {len(classes)} classes" in note
    losses = [record["losses"] for record in records if "losses" in record]
    assert all(each["loss_akd_1"] > 0 and each["loss_akd_2"] > 0 and each["loss_ckd"] > 0 for each in losses[1:])
    with pytest.raises(UserError, match=r"teacher\.layers: the cache was built with"):
        preflight(job.replace({"teacher.layers": [1, 3], "run.name": "other"}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"teacher.layers": [1, 4]}, r"teacher.layers: \[1, 4\], but the teacher has 3 decoder layers"),
        ({"teacher.layers": [3]}, "distill.assistant.fcs: the assistant has 2 fully connected layers, the teacher 1"),
        ({"distill.assistant.fcs": 4}, "distill.assistant.fcs: 4 fully connected layers would be compared"),
        ({"teacher.classes": ["cat"]}, "teacher.classes: names 1 classes, but .* has 3 outputs for classes"),
        (
            {"teacher.classes": ["x", "y", "z"]},
            r"only in data.train .*; only in teacher .*: 'x', 'y', 'z'; it must know at least",
        ),
        ({"teacher.checkpoint": "nowhere"}, "teacher.checkpoint: nowhere: no such folder"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_starts(
    tmp_path: Path, drawn_splits: dict[str, str], folder: Path, keys: dict[str, Any], message: str
) -> None:
    names = [*ShardSet.open(drawn_splits["train"]).meta.classes[:2], "zebra"]
    job = job_with(tmp_path, drawn_splits, folder, classes=names)
    with pytest.raises(UserError, match=message):
        preflight(job.replace(keys))
    assert not (tmp_path / "run").exists()


def test_unnamed_outputs_need_names(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    folder = hf_folder(tmp_path / "teacher", "rt_detr_v2", ("LABEL_0", "LABEL_1"))
    job = job_with(tmp_path, drawn_splits, folder)
    with pytest.raises(UserError, match=r"does not name its 2 classes; list them in order in teacher\.classes"):
        load_teacher(job, ("a",))
