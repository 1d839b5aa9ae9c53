"""Slow down the scheduling loop of Ray Data, which is a thread of the train worker.

While the loop waits for training to take batches it spins (Ray 2.60). That occupies a core and, worse, the GIL, for which every
torch call of the training thread must then wait. ``bench/stream_wait.py`` measures the former.

Import nothing heavy here: Ray sends the callback with every task, so each process that reads or decodes images imports this.
"""

from __future__ import annotations

import time

from ray.data import DataContext

try:
    from ray.data._internal.execution.execution_callback import ExecutionCallback
except ImportError:  # Ray has no public way to slow its loop down; without this one, training is only slower
    ExecutionCallback = object

STEP_SECONDS = 0.02
"""Minimum time between steps of the loop, in seconds."""


class _Unhurried(ExecutionCallback):
    def __init__(self) -> None:
        self.last = time.monotonic()

    def on_execution_step(self, executor: object) -> None:
        time.sleep(max(0.0, self.last + STEP_SECONDS - time.monotonic()))
        self.last = time.monotonic()


def slow_down(context: DataContext) -> None:
    """Let the loops of this context's executions wait between their steps, if this version of Ray allows it."""
    if ExecutionCallback is not object and hasattr(context, "custom_execution_callback_classes"):
        context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _Unhurried]
