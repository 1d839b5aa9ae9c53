"""Run a job on Ray Train, with one worker process per rank around ``engine.loop.fit``."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train as ray_train
from ray.exceptions import RayError
from ray.train import CheckpointConfig, CheckpointUploadMode, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from headkd_ray.cluster.batch_trials import largest_batch_size_of
from headkd_ray.cluster.connect import connected
from headkd_ray.cluster.data_actors import keep_data_actors_here
from headkd_ray.cluster.driver import forwarded, stop_sign
from headkd_ray.cluster.evaluation_task import start_evaluation
from headkd_ray.cluster.gauges import Gauges
from headkd_ray.cluster.listing import drop_unusable
from headkd_ray.cluster.lost_requests import REQUESTER, withdraw_former
from headkd_ray.cluster.ray_stream import decode_on_ray
from headkd_ray.cluster.resources import Resources, check_resources, has_pool
from headkd_ray.cluster.restarts import FAILURES, PreemptedError, was_preempted, with_restarts
from headkd_ray.cluster.shared_paths import check_shared
from headkd_ray.cluster.stop_requests import StopRequests
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.training_set import training_set
from headkd_ray.engine.checkpoint import SCORE, check
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.evaluation_queue import EvaluationQueue, ranked
from headkd_ray.engine.log import Record, Sink
from headkd_ray.engine.loop import data_fingerprints, fit
from headkd_ray.engine.run import finish, open_run, run_folder, run_log
from headkd_ray.engine.scratch import Scratch
from headkd_ray.engine.stop import stop_signals
from headkd_ray.engine.stored_detections import store_of
from headkd_ray.engine.streams import Streams
from headkd_ray.errors import (
    CacheError,
    CheckpointError,
    ClusterError,
    DataError,
    DeviceMemoryError,
    DiskError,
    StoppedError,
    TrainingError,
    UserError,
)
from headkd_ray.job import Job, PyramidDetectorSpec
from headkd_ray.storage import Folder


@contextmanager
def on_ray(job: Job) -> Iterator[tuple[Callable[[Job], int], Callable[[Job, Sink], Record]]]:
    """Connect to the job's cluster and yield the functions that find the largest batch size there, and that train there.

    The latter returns the result record, and its sink receives the log records in this process. It raises ClusterError if the
    workers fail more than cluster.max_failures times, or are preempted more than cluster.max_preemption_failures times, and
    TrainingError, CheckpointError, StoppedError, DataError, CacheError, DeviceMemoryError and DiskError as ``fit`` does.

    Raises:
        ClusterError: the cluster is missing or too small.
    """
    # This interval (2 s by default) also limits how soon a report is taken.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    with connected(job.cluster):
        resources = check_resources(job)
        keep_data_actors_here(pool=has_pool(job))
        yield partial(_largest_batch_size, resources=resources), partial(_train, resources=resources)


def _largest_batch_size(job: Job, resources: Resources) -> int:
    return largest_batch_size_of(with_absolute_paths(job), resources)


def _train(job: Job, tell: Sink, resources: Resources) -> Record:
    run = open_run(job)
    name, notes = job.run.name, Notes(tell)
    for problem in drop_unusable(run):
        notes(problem)
    with stop_signals() as asked_to_stop, stop_sign(name, asked_to_stop) as sign, forwarded(name, notes.record) as queue:
        driver = {"queue": queue, "stop": sign}
        try:
            result = with_restarts(lambda: _train_once(job, resources, driver), job.cluster, notes)
        except FAILURES as error:
            raise ClusterError(_given_up(job, error, sign)) from error
        outcome = result.return_value
        if "error" in outcome:
            raise outcome["error"]
    return finish(run, ranked(run) or _ranked_by_ray(result), outcome["last"], outcome["data"], tell)


def _ranked_by_ray(result: Result) -> list[Folder]:
    """Return a run's checkpoints, the best first."""
    ranking = sorted(result.best_checkpoints, key=lambda entry: entry[1][SCORE], reverse=True)
    return [Folder(each.filesystem, each.path, each.path) for each, _ in ranking]


def _train_once(job: Job, resources: Resources, driver: dict[str, Any]) -> Result:
    """Run Ray Train until the training ends. Raises PreemptedError if it ended early because nodes are taken away."""
    trainer, run = _trainer(job, resources, driver), run_folder(job)
    withdraw_former(run, trainer)
    result = trainer.fit()
    run.delete(REQUESTER)
    if result.return_value.get("leaving"):
        raise PreemptedError(result.return_value["leaving"])
    return result


class Notes:
    """A sink that passes log records on, and adds notes of the driver at the log's current step."""

    def __init__(self, tell: Sink) -> None:
        self.tell = tell
        self.place = {"step": 0, "steps": None, "epoch": 0.0}

    def record(self, record: Record) -> None:
        if "val" not in record:  # else perhaps of a step that training has left behind
            self.place = {name: record[name] for name in self.place}
        self.tell(record)

    def __call__(self, text: str) -> None:
        self.tell({**self.place, "note": text})


class _Trainer(TorchTrainer):
    """A TorchTrainer that leaves our handler of Ctrl-C in place, which treats it like SIGTERM."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Do nothing, where Ray would install its own handler."""


def _trainer(job: Job, resources: Resources, driver: dict[str, Any]) -> TorchTrainer:
    storage = Folder.open(job.run.storage)
    return _Trainer(
        _worker,
        train_loop_config={"job": with_absolute_paths(job).model_dump(mode="json"), **driver},
        # Collectives other than those on gradients use CPU tensors.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            elastic_resize_monitor_interval_s=job.cluster.resize_seconds,
            use_gpu=resources.gpus_per_worker > 0,
            label_selector=job.cluster.labels or None,
            accelerator_type=job.cluster.accelerator_type,
            resources_per_worker={
                "CPU": resources.cpus_per_worker,
                **({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
            },
        ),
        run_config=RunConfig(
            name=job.run.name,
            storage_path=storage.path,
            storage_filesystem=storage.fs,
            failure_config=FailureConfig(
                # with_restarts counts all three. relax_collectives_on_preemption stays off: a worker on a drained node takes
                # part in the last step and the checkpoint, and if Ray no longer waited for it, ours would wait for ever.
                max_failures=0,
                controller_failure_limit=0,
                max_preemption_failures=0,
                **({"preemption_grace_s": grace} if (grace := job.cluster.preemption_grace_s) else {}),  # since Ray 2.60
            ),
            # Keep the two best by AP, as one may be damaged; Ray always keeps the latest too.
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute=SCORE, checkpoint_score_order="max"),
        ),
    )


def with_absolute_paths(job: Job, start: str = "") -> Job:
    """Make the job's paths absolute, because workers run in a folder of Ray's, where the driver's relative paths are invalid.

    ``start``: the driver's current folder, if this process is not the driver.
    """

    def absolute(path: str) -> str:
        return path if "://" in path else str((Path(start) / Path(path).expanduser()).absolute())

    paths = {"run.storage": job.run.storage, "data.train": job.data.train, "data.val": job.data.val}
    if job.data.unlabelled is not None:
        paths["data.unlabelled"] = job.data.unlabelled
    if job.student.checkpoint is not None:
        paths["student.checkpoint"] = job.student.checkpoint
    if isinstance(job.student, PyramidDetectorSpec) and Path(job.student.backbone.weights).suffix:  # a file, not none or timm
        paths["student.backbone.weights"] = job.student.backbone.weights
    if job.teacher is not None:
        key, place = job.teacher.source
        paths[key] = place
        if job.teacher.cache.path is not None:
            paths["teacher.cache.path"] = job.teacher.cache.path
    return job.replace({key: absolute(path) for key, path in paths.items()})


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run one rank.

    Errors that a restart would only meet again are returned instead of raised: at once if all ranks meet them alike, otherwise
    after the restart that ends the other ranks.
    """
    stop, context = config["stop"], ray_train.get_context()
    if (error := ray.get(stop.enter.remote(context.get_world_rank(), _output()))) is not None:
        return {"error": error}
    job = Job.model_validate(config["job"])
    try:
        check_shared(job, ray.util.get_node_ip_address())
    except ClusterError as error:
        ray.get(stop.give_up.remote(error))
        raise
    torch.set_num_threads(job.cluster.threads_per_worker or max(1, int(job.cluster.cpus_per_worker)))
    distributed = Distributed(context.get_world_rank(), context.get_world_size(), get_device())
    teacher_job = job if job.teacher is not None and job.teacher.placement == "pool" else None
    sets = training_set(job), ShardSet.open(job.data.val)
    streams = Streams(job, distributed, *sets, decode_on_ray(job.cluster, teacher_job, job.run.name))

    with run_log(run_folder(job), job, config["queue"].put) as open_sink:
        requests, gauges = StopRequests(stop, distributed), Gauges(job, distributed.rank)
        try:
            store = store_of(job, run_folder(job), streams.val_set)
            beside = job.eval.placement == "task" and distributed.rank == 0
            queue = EvaluationQueue(job, start_evaluation) if beside else None
            last = fit(
                job,
                distributed,
                streams,
                RayCheckpoints(),
                open_sink,
                requests,
                store,
                gauges,
                requests.within_evaluation,
                queue,
            )
            return {"last": last, "data": data_fingerprints(streams)}
        except StoppedError as error:
            leaving = requests.leaving()  # all ranks are here
            return {"leaving": leaving} if leaving and not requests.asked else {"error": error}
        except (TrainingError, CheckpointError) as error:
            return {"error": error}
        except (DataError, CacheError, DeviceMemoryError, DiskError) as error:
            ray.get(stop.give_up.remote(error))
            raise


class RayCheckpoints:
    """A checkpoint store that uses ``ray.train.report``: uploads run in the background, and Ray lists only complete ones."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.scratch = Scratch()
        atexit.register(self.scratch.close)  # only after the last upload

    def draft(self) -> Path:
        return self.scratch.folder()

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        checkpoint = ray_train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            try:
                check(Folder.open(folder), called=checkpoint.path)
            except CheckpointError as error:
                raise CheckpointError([f"{line}; run the same command again to skip it" for line in error.problems]) from error
            yield Path(folder)

    def report(self, name: str, metrics: dict[str, Any], folder: Path | None) -> None:
        ray_train.report(
            metrics,
            checkpoint=None if folder is None else ray_train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,  # deletes ``folder`` when it is uploaded
        )


def _output() -> str:
    """Return where Ray keeps what this process prints."""
    context = ray.get_runtime_context()
    logs = Path(context.get_temp_dir(), context.get_session_name(), "logs")
    return f"{logs}/worker-{context.get_worker_id()}-*.err on {ray.util.get_node_ip_address()}"


def _given_up(job: Job, error: BaseException, sign: Any) -> str:
    """Return why training cannot go on, and where the failed workers' output is, if the driver's stop sign can still tell."""
    outputs: dict[int, str] = {}
    with suppress(RayError):
        outputs = ray.get(sign.outputs.remote(), timeout=10)
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    key = "max_preemption_failures" if was_preempted(error) else "max_failures"
    cause = f"{_cause(list(failures.values()) or [error])} (cluster.{key}: {getattr(job.cluster, key)})"
    seen = [f"rank {rank}: {outputs[rank]}" for rank in sorted(failures) if rank in outputs]
    return f"training failed for good: {cause}" + (f"; what the worker printed: {', '.join(seen[:3])}" if seen else "")


def _cause(failures: list[BaseException]) -> str:
    """Return a worker's UserError in full if there is one, else the last line of the first worker's error."""
    raised = (getattr(failure, "_base_exc", failure) for failure in failures)  # Ray wraps what the worker raised
    mistake = next((failure for failure in raised if isinstance(failure, UserError)), None)
    return str(mistake) if mistake is not None else str(failures[0]).strip().splitlines()[-1]
