"""Training in this process, without Ray (``cluster.workers: 0``)."""

from __future__ import annotations

from headkd_ray.data.shards import ShardSet
from headkd_ray.data.training_set import training_set
from headkd_ray.engine.checkpoint import LocalCheckpoints
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.log import Record, Sink
from headkd_ray.engine.loop import data_fingerprints, fit
from headkd_ray.engine.run import finish, open_run, run_log
from headkd_ray.engine.stop import stop_signals
from headkd_ray.engine.stored_detections import store_of
from headkd_ray.engine.streams import Streams, decode_here
from headkd_ray.job import Job


def train_here(job: Job, tell: Sink) -> Record:
    """Run the job and return its result record; ``tell`` receives the log records. Raises what ``fit`` raises."""
    distributed = Distributed.here(job.cluster)
    streams = Streams(job, distributed, training_set(job), ShardSet.open(job.data.val), decode_here)
    folder = open_run(job)
    checkpoints = LocalCheckpoints(folder)

    with run_log(folder, job, tell) as open_sink, stop_signals() as asked_to_stop:
        store = store_of(job, folder, streams.val_set)
        last = fit(job, distributed, streams, checkpoints, open_sink, asked_to_stop, store, interrupted=asked_to_stop)
    ranking = [checkpoints.folder / name for name in checkpoints.ranking()]
    return finish(folder, ranking, last, data_fingerprints(streams), tell)
