"""The batches of a job that this process trains and evaluates on; a function decides whether threads or Ray tasks decode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from itertools import chain

import torch

from headkd_ray.data.batch import Batch
from headkd_ray.data.batch_stream import BatchMaker, TargetReader, local_stream
from headkd_ray.data.epoch_order import Window, eval_windows, interleaved, steps_per_epoch, train_windows
from headkd_ray.data.repeats import sampling_of
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.training_set import TrainingSet
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.scoring import scoring_of_job
from headkd_ray.job import Job
from headkd_ray.teacher.cache_recipe import view_seed

Decode = Callable[[ShardSet, Iterable[Window], BatchMaker], AbstractContextManager[Iterator[Batch]]]


def decode_here(shards: ShardSet, windows: Iterable[Window], maker: BatchMaker) -> AbstractContextManager[Iterator[Batch]]:
    """Decode the batches with threads of this process."""
    return closing(local_stream(shards, windows, maker))


class Streams:
    """The training and validation batches of one process.

    The order of training images is planned for a fixed number of ranks, the maximum of cluster.workers. If there are fewer
    processes, each runs several ranks in turn, so that order, steps and global batch do not depend on their number.
    """

    def __init__(self, job: Job, distributed: Distributed, train: ShardSet, val: ShardSet, decode: Decode) -> None:
        self.job, self.distributed, self.train_set, self.val_set, self.decode = job, distributed, train, val, decode
        self.sampling = sampling_of(train, job.data)
        self.notes = train.notes if isinstance(train, TrainingSet) else ()
        """Sentences for the log about what is trained on."""
        self.ranks_in_all = max(1, job.cluster.most_workers)
        self.ranks = distributed.ranks_of(self.ranks_in_all)
        """The ranks that this process runs; their batches of a step come in this order."""
        self.micro_batches_per_epoch = steps_per_epoch(
            self.sampling.images, job.data.batch_size, self.ranks_in_all, job.optim.accumulate
        )
        """Micro-batches per epoch, the same for every epoch and rank; a multiple of optim.accumulate."""
        self.scoring = scoring_of_job(job, train, val)
        """How the student's detections on the validation images are scored."""

    def train(self, first: int, cache: TargetReader | None = None) -> AbstractContextManager[Iterator[Batch]]:
        """Return the batches of all epochs from micro-batch ``first`` on, with soft targets from ``cache`` if it is given."""
        windows = [
            train_windows(
                self.train_set.index,
                self.sampling.rows,
                seed=self.job.run.seed,
                rank=rank,
                world_size=self.ranks_in_all,
                batch_size=self.job.data.batch_size,
                window=self.job.data.shuffle_window,
                epochs=self.job.optim.epochs,
                accumulate=self.job.optim.accumulate,
                start_step=first,
                draws=self.sampling.repeats,
            )
            for rank in self.ranks
        ]
        return self.decode(
            self.train_set, interleaved(windows), BatchMaker(self.job.data, view_seed(self.job), train=True, cache=cache)
        )

    def val(self, shares: int | None = None) -> AbstractContextManager[Iterator[Batch]]:
        """Return this process's share of the validation images, each once.

        ``shares``: return all images, as the batches into which that many processes divide them (padding depends on those).
        """
        places = [(rank, shares) for rank in range(shares)] if shares else [(self.distributed.rank, self.distributed.size)]
        windows = (
            eval_windows(self.val_set.index, rank=rank, world_size=size, batch_size=self.job.eval.batch_size)
            for rank, size in places
        )
        maker = BatchMaker(self.job.data, self.job.run.seed, train=False)
        return self.decode(self.val_set, chain.from_iterable(windows), maker)


def in_order(batches: Iterator[Batch], first: int, ranks: int) -> Iterator[Batch]:
    """Yield ``batches``, and check that they are those of micro-batch ``first`` and all after it, ``ranks`` of each."""
    for number, batch in enumerate(batches):
        assert batch.step == first + number // ranks, "the stream lost its place"
        yield batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on ``device``; on a GPU the next one is copied while the current one is used."""
    if device.type == "cpu":
        yield from batches
        return
    copies, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copies):
            coming = batch.pin().to(device)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(copies)
        coming.record_stream(torch.cuda.current_stream(device))
        ahead = coming
    if ahead is not None:
        yield ahead
