"""Communication between the driver and its workers: log records go to the driver, requests to stop go to the workers, and
workers report errors that a restart would not cure.

It uses actors on the driver's node: an actor that died with a worker's node would break every restart of the run.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headkd_ray.errors import UserError

# Import nothing heavy here, because the process of the stop sign imports this module.


@contextmanager
def forwarded(run: str, tell: Callable[[dict[str, Any]], None]) -> Iterator[Queue]:
    """Yield a queue whose records a thread of this process passes to ``tell``; on leaving, it is emptied first."""
    queue = Queue(actor_options={"name": actor_name(run, "log"), **_here()})
    done = threading.Event()

    def pump() -> None:
        while not (done.is_set() and queue.empty()):
            try:
                tell(queue.get(timeout=0.5))
            except Empty:
                continue

    thread = threading.Thread(target=pump, name="headkd-log", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        done.set()
        thread.join(timeout=60)  # a page of the run may be in the making
        queue.shutdown()


class StopSign:
    """An actor with which the driver tells the workers to stop, and a worker tells restarted ones that retrying is useless.

    It also keeps where each rank writes its output, for when a rank cannot tell any more.
    """

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.hopeless: UserError | None = None
        self.output: dict[int, str] = {}

    async def wait(self) -> None:
        await self.up.wait()

    async def put_up(self) -> None:
        self.up.set()

    async def give_up(self, error: UserError) -> None:
        self.hopeless = error

    async def enter(self, rank: int, output: str) -> UserError | None:
        """Called by a worker that starts; returns why it should not."""
        self.output[rank] = output
        return self.hopeless

    async def outputs(self) -> dict[int, str]:
        return self.output


@contextmanager
def stop_sign(run: str, asked: Callable[[], bool]) -> Iterator[Any]:
    """Yield an actor whose ``wait`` returns in the workers soon after ``asked()`` becomes True in this process."""
    sign = ray.remote(StopSign).options(name=actor_name(run, "stop-sign"), **_here()).remote()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            if asked():
                sign.put_up.remote()
                return

    thread = threading.Thread(target=watch, name="headkd-stop", daemon=True)
    thread.start()
    try:
        yield sign
    finally:
        done.set()
        thread.join()
        ray.kill(sign)


def actor_name(*parts: str) -> str:
    """Return a name for an actor in Ray's lists and dashboard; its end makes it unique, as Ray requires."""
    return "-".join([*parts, uuid.uuid4().hex[:8]])


def _here() -> dict[str, Any]:
    """Return Ray options that place an actor on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}
