"""What the driver and its workers tell each other while a run goes: log records up, the wish to stop down, and why a restart
would not help.

Through actors on the driver's node: one that died with a worker's node would take every restart of the run with it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headkd_ray.errors import UserError

# Nothing heavy is imported here: the stop sign's process imports this module.


@contextmanager
def forwarded(tell: Callable[[dict[str, Any]], None]) -> Iterator[Queue]:
    """A queue whose records are passed to ``tell`` by a thread of this process; on leaving, the rest is passed first."""
    queue = Queue(actor_options=_here())
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
        thread.join(timeout=10)
        queue.shutdown()


class _StopSign:
    """An actor by which the driver tells the workers to stop, and a worker those after it that going on is of no use."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.hopeless: UserError | None = None

    async def wait(self) -> None:
        await self.up.wait()

    async def put_up(self) -> None:
        self.up.set()

    async def give_up(self, error: UserError) -> None:
        self.hopeless = error

    async def given_up(self) -> UserError | None:
        return self.hopeless


@contextmanager
def stop_sign(asked: Callable[[], bool]) -> Iterator[Any]:
    """A sign whose ``wait`` returns in the workers soon after ``asked()`` is True in this process."""
    sign = ray.remote(_StopSign).options(**_here()).remote()
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


def _here() -> dict[str, Any]:
    """Options of an actor on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}
