"""Evaluations that are made elsewhere while training goes on have the metrics of those in place, and none is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headkd_ray.data.shards import ShardSet
from headkd_ray.engine.checkpoint import LocalCheckpoints
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.evaluation_queue import DONE, WAITING, EvaluationQueue, Pending, Request, evaluate_waiting, ranked
from headkd_ray.engine.local import train_here
from headkd_ray.engine.loop import fit
from headkd_ray.engine.run import finish, open_run, run_folder, run_log
from headkd_ray.engine.stored_detections import BEST, LAST, stored_detections
from headkd_ray.engine.streams import Streams, decode_here
from headkd_ray.errors import DiskError, StoppedError
from headkd_ray.job import Job
from headkd_ray.storage import Folder
from tests.support import KEEN_STUDENT, assert_same_weights, micro_job, student_weights


def streams_of(job: Job, rank: int = 0, size: int = 1) -> Streams:
    distributed = Distributed(rank, size, torch.device("cpu"))
    return Streams(job, distributed, ShardSet.open(job.data.train), ShardSet.open(job.data.val), decode_here)


def train_with(
    job: Job, start: Callable[[Request], Pending], records: list[dict[str, Any]], stop_at: int | None = None
) -> dict[str, Any]:
    """Train as a single worker that does not evaluate, and return the result."""
    folder, streams = open_run(job), streams_of(job)
    polled = iter(range(1, 1000))
    with run_log(folder, job, records.append) as open_sink:
        last = fit(
            job,
            streams.distributed,
            streams,
            LocalCheckpoints(folder),
            open_sink,
            lambda: next(polled) == stop_at,
            queue=EvaluationQueue(job, start),
        )
    return finish(folder, ranked(folder), last, {}, lambda record: None)


def slowly(request: Request) -> Pending:
    """Make an evaluation that takes a few steps of the training."""
    polls = iter(range(1000))
    return lambda: evaluate_waiting(request, torch.device("cpu")) if next(polls) > 3 else None


def test_metrics_and_student_are_those_of_evaluation_in_place(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """The run is stopped while its first evaluation is outstanding, and resumes before that one ends."""
    sections: dict[str, Any] = {
        "student": KEEN_STUDENT,
        "eval": {"every_epochs": 1, "batch_size": 2},
        "optim": {"epochs": 3, "milestones": []},
        "log": {"report": True},
    }
    whole: list[dict[str, Any]] = []
    in_place = train_here(micro_job(tmp_path, drawn_splits, "in_place", **sections), whole.append)
    beside = micro_job(tmp_path, drawn_splits, "beside", **sections).replace({"eval.placement": "task"})
    run, records = run_folder(beside), list[dict[str, Any]]()
    with pytest.raises(StoppedError, match="at step 13 of 33"):
        train_with(beside, lambda request: lambda: None, records, stop_at=13)
    waiting = tmp_path / "beside" / WAITING / "step_00000011"
    assert waiting.is_dir() and not [each for each in records if "val" in each]
    weights = (waiting / "student" / "model.safetensors").read_bytes()
    (waiting / "student" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(DiskError, match=f"{waiting}: the student that waits here for its evaluation is damaged"):
        evaluate_waiting(Request(beside, 11, 1, 0.0), torch.device("cpu"))
    (waiting / "student" / "model.safetensors").write_bytes(weights)
    result = train_with(beside, slowly, records)

    scored = [(record["step"], record["val"]) for record in records if "val" in record]
    assert scored == [(record["step"], record["val"]) for record in whole if "val" in record]
    assert scored[-1][1]["AP"] > 0, "nothing was found, so that nothing was compared"
    assert [record["step"] for record in records if "losses" in record] == list(range(1, 34))
    assert (result["best"], result["last"]) == (in_place["best"], in_place["last"])
    assert_same_weights(student_weights(result), student_weights(in_place))
    cards = [json.loads((Path(each["student"]) / "model.json").read_text())["meta"] for each in (result, in_place)]
    assert {**cards[0], "run": None} == {**cards[1], "run": None} and cards[0]["metrics"] is not None
    for name in (LAST, BEST):
        assert stored_detections(run, name) == stored_detections(Folder.open(tmp_path / "in_place"), name)
    assert not list((tmp_path / "beside" / WAITING).iterdir()) and len(ranked(run)) == 2

    (tmp_path / "beside" / WAITING / "step_00000033").mkdir()  # as if killed between the log and its deletion
    queue = EvaluationQueue(beside, slowly)
    assert queue.resume(33, 1) == result["last"] and not queue.busy
    assert not list((tmp_path / "beside" / WAITING).iterdir()), "an evaluation would be in the log twice"
    assert queue.resume(10, 1) == {} and not list((tmp_path / "beside" / DONE).iterdir()), "steps to be trained again"


def test_the_batches_are_those_of_the_ranks_that_train(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    job = micro_job(tmp_path, drawn_splits, eval={"batch_size": 3})

    def batches(streams: Streams, shares: int | None) -> list[list[int]]:
        with streams.val(shares) as stream:
            return [batch.image_ids.tolist() for batch in stream]

    of_ranks = [batches(streams_of(job, rank, 2), None) for rank in range(2)]
    assert batches(streams_of(job), 2) == [*of_ranks[0], *of_ranks[1]] != batches(streams_of(job), None)
