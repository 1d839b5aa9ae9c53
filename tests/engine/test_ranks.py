"""Two processes train one student together, and what each rank sees alone does not show in the result."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from headkd_ray.data.batch import idle_batch
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import build_detector
from headkd_ray.distill import build_training_model
from headkd_ray.engine.checkpoint import Checkpoints, LocalCheckpoints
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.evaluation import InterruptedEvaluationError, evaluate
from headkd_ray.engine.log import JsonLines, Sink
from headkd_ray.engine.loop import fit
from headkd_ray.engine.run import finish, open_run, run_folder
from headkd_ray.engine.scoring import Scoring
from headkd_ray.engine.step import build_learner, train_step
from headkd_ray.engine.streams import Streams, decode_here
from headkd_ray.errors import StoppedError
from headkd_ray.evaluate import evaluate_checkpoint
from headkd_ray.job import Job
from tests.detectors.micro import BACKBONE, batch, fcos_spec, whole
from tests.engine.ranks import on_ranks
from tests.support import KEEN_STUDENT, micro_job, student_weights

CLASSES = 3


class Nowhere:
    """Checkpoints for ranks that keep none."""

    latest = LocalCheckpoints.latest
    entries: tuple[()] = ()
    notes: tuple[()] = ()

    def report(self, name: str, metrics: dict[str, Any], folder: Path | None) -> None:
        assert folder is None


def fit_on(distributed: Distributed, job: Job, stop_at: int | None = None) -> dict[str, Any] | None:
    """Run ``train_here`` on several ranks and return the result of rank 0.

    With ``stop_at`` only the last rank is asked to stop, at that step, and the result is None.
    """
    folder = run_folder(job)
    if distributed.rank == 0:
        open_run(job)
    if distributed.size > 1:
        dist.barrier()
    streams = Streams(job, distributed, ShardSet.open(job.data.train), ShardSet.open(job.data.val), decode_here)

    def open_sink(resumed_step: int) -> Sink:
        return JsonLines(Path(folder.path) / "log.jsonl", resumed_step)

    checkpoints: Checkpoints = LocalCheckpoints(folder) if distributed.rank == 0 else Nowhere()
    counter = iter(range(1, 1000))
    try:
        last = fit(
            job,
            distributed,
            streams,
            checkpoints,
            open_sink,
            lambda: next(counter) == stop_at and distributed.rank == distributed.size - 1,
        )
    except StoppedError:
        return None
    if not isinstance(checkpoints, LocalCheckpoints):
        return None
    return finish(folder, [checkpoints.folder / name for name in checkpoints.ranking()], last, {}, lambda record: None)


def fit_twice(distributed: Distributed, first: Job, second: Job, kind: str) -> Any:
    """Train, make a validation split of what the student detects in ``kind``, and train again with it."""
    result = fit_on(distributed, first)
    if result is not None:
        out = Path(kind)
        evaluate_checkpoint(result["student"], first.data.val, batch_size=1, out=str(out / "found.json"))
        truth = ShardSet.open(first.data.val).ground_truth()
        truth["images"] = truth["images"][:9]  # odd, so that the ranks' shares differ
        ids = {image["id"] for image in truth["images"]}
        found = [entry for entry in json.loads((out / "found.json").read_text())[::2] if entry["image_id"] in ids]
        truth["annotations"] = [
            {**entry, "id": i, "area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0}
            for i, entry in enumerate(found, start=1)
            if min(entry["bbox"][2:]) > 1
        ]
        (out / "kind.json").write_text(json.dumps(truth))
        prepare_split(str(out / "kind.json"), str(Path(first.data.val).parent / "images"), second.data.val)
    dist.barrier()
    return fit_on(distributed, second)


@pytest.mark.slow
def test_the_reported_ap_is_that_of_the_exported_student(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """Two processes report the AP that one finds.

    BatchNorm's statistics differ between ranks when an epoch ends; evaluation is shared over the ranks, the export is rank 0's.
    """
    optim = {"epochs": 1, "milestones": [], "ema": 0.5}
    keys: dict[str, Any] = {"student": KEEN_STUDENT, "eval": {"batch_size": 1}, "cluster": {"workers": 2}}
    jobs = [
        micro_job(tmp_path, {**drawn_splits, "val": val}, name, optim=optim, **keys)
        for name, val in (("first", drawn_splits["val"]), ("second", str(tmp_path / "kind")))
    ]
    result, _ = on_ranks(2, fit_twice, *jobs, str(tmp_path))
    metrics = evaluate_checkpoint(result["student"], str(tmp_path / "kind"), batch_size=1).as_dict()
    assert 0 < metrics["AP"] < 100 and metrics["images"] == 9
    assert metrics == {key: result["last"][key] for key in metrics}


def step_on(distributed: Distributed, job: Job, images: list[int], share: float = 1.0) -> dict[str, torch.Tensor]:
    """Take a step on ``images`` of the drawn batch, shared among the ranks, and return the student's new weights."""
    torch.manual_seed(0)
    model = build_training_model(job, CLASSES, None, steps_per_epoch=10)
    learner = build_learner(job, model, distributed.device, len(images), steps_per_epoch=10)
    learner.ddp = DistributedDataParallel(model) if distributed.size > 1 else None
    mine = images[distributed.rank :: distributed.size]
    mine_or_idle = whole({name: tensor[mine] for name, tensor in batch().items()}) if mine else idle_batch(0, 64, 32)
    train_step(learner, job, iter([mine_or_idle]), share=share)
    return {name: tensor.clone() for name, tensor in model.student.state_dict().items()}


def steps_on(distributed: Distributed, job: Job) -> list[dict[str, torch.Tensor]]:
    """Return the weights after a step on two images, and after one on the first alone, which leaves the second rank idle."""
    return [step_on(distributed, job, [0, 1]), step_on(distributed, job, [0], share=1.0 if distributed.size > 1 else 0.5)]


def given_up_on(distributed: Distributed, job: Job) -> list[bool]:
    """Return whether an evaluation of an image per rank is given up if the last rank, or none, is interrupted."""
    detector = build_detector(job.student, CLASSES)
    images = [replace(idle_batch(0, 64, 32), image_ids=torch.tensor([distributed.rank]), idle=False)]
    ids = range(1, CLASSES + 1)
    truth: dict[str, Any] = {
        "images": [{"id": rank, "height": 64, "width": 64} for rank in range(distributed.size)],
        "annotations": [],
        "categories": [{"id": id_, "name": str(id_)} for id_ in ids],
    }
    found = []
    for last_is in (True, False):
        interrupted = last_is and distributed.rank == distributed.size - 1
        try:
            evaluate(detector, images, distributed, truth, Scoring(tuple(ids), 100, ()), interrupted=partial(bool, interrupted))
            found.append(False)
        except InterruptedEvaluationError:
            found.append(True)
    return found


Measured = tuple[list[dict[str, torch.Tensor]], list[bool]]


def measured_on(distributed: Distributed, job: Job) -> Measured:
    return steps_on(distributed, job), given_up_on(distributed, job)


@pytest.fixture(scope="module")
def frozen_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Return a job whose BatchNorm layers do not change, as statistics of a batch would differ between ranks."""
    frozen = {"backbone": {**BACKBONE, "norm_eval": True}}
    return micro_job(
        tmp_path_factory.mktemp("job"),
        {"train": "none", "val": "none"},
        student={**fcos_spec().model_dump(), **frozen},
        optim={"lr": 0.1, "warmup_steps": 0, "clip_norm": None, "milestones": []},
    )


@pytest.fixture(scope="module")
def two_ranks(frozen_job: Job) -> list[Measured]:
    """Return what two ranks find; they take seconds to start."""
    return on_ranks(2, measured_on, frozen_job)


def test_an_evaluation_that_one_rank_gives_up_is_given_up_by_all(two_ranks: list[Measured]) -> None:
    assert [given_up for _, given_up in two_ranks] == [[True, False]] * 2


def test_a_step_of_two_workers_is_that_of_one_with_all_images(frozen_job: Job, two_ranks: list[Measured]) -> None:
    """FCOS's normalisers are means over the workers; the images have two objects and one. An idle worker does not count."""
    alone = steps_on(Distributed.alone(use_gpu=False), frozen_job)
    for rank, _ in two_ranks:
        for weights, expected in zip(rank, alone, strict=True):
            for name, tensor in weights.items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_workers_in_the_same_steps(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """Three ranks are run by one process, and then first by two and later by one.

    Only the order of additions differs, and BatchNorm's statistics, which are those of the first process.
    """
    keys: dict[str, Any] = {"data": {"batch_size": 2}, "optim": {"epochs": 2, "milestones": [], "accumulate": 2}}
    whole = micro_job(tmp_path, drawn_splits, "whole", **keys, cluster={"workers": 3})
    elastic = micro_job(tmp_path, drawn_splits, "elastic", **keys, cluster={"workers": [1, 3]})
    alone = Distributed.alone(use_gpu=False)
    expected = fit_on(alone, whole)
    assert on_ranks(2, fit_on, elastic, 3) == [None, None], "not stopped in the middle of an epoch"
    result = fit_on(alone, elastic)
    assert expected is not None and result is not None
    one, other = student_weights(expected), student_weights(result)
    for name in one:
        if "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)
    records = [json.loads(line) for line in (tmp_path / "elastic" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "losses" in r] == list(range(1, 9))
    assert [r["workers"] for r in records if "losses" in r] == [2] * 3 + [1] * 5
