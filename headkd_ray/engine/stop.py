"""Graceful stopping: on SIGTERM (sent by ``ray job stop``, Kubernetes and Slurm) or Ctrl-C, finish the step and save it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from headkd_ray.errors import StoppedError

SIGNALS = {signal.SIGTERM: b"SIGTERM", signal.SIGINT: b"Ctrl-C"}
NOTICE = b": stopping after this step, with a checkpoint; repeat it to end the run at once\n"


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True once SIGTERM or Ctrl-C has arrived; the next such signal acts as before.

    A StoppedError that leaves the context is given the signal's number. Only the main thread can handle signals; in any other
    thread the function always returns False.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def take(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        restore()
        os.write(2, SIGNALS[signal.Signals(number)] + NOTICE)  # print is not safe here: the signal may come while it prints

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, take) for number in SIGNALS}
    try:
        yield lambda: bool(asked)
    except StoppedError as stopped:
        stopped.signal = asked[0] if asked else stopped.signal
        raise
    finally:
        restore()
