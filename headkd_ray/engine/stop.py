"""Being asked to stop: SIGTERM, as ``ray job stop``, Kubernetes and Slurm send it, means finish the step and keep it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NOTICE = b"SIGTERM: stopping after this step, with a checkpoint; another SIGTERM ends the run at once\n"


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGTERM only makes the function that this gives return True; a second one does what it did before.

    In a thread that is not the main one, which cannot take signals, the function always returns False.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def take(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, before)
        os.write(2, NOTICE)  # print is not safe here: the signal may come while it prints

    before = signal.signal(signal.SIGTERM, take)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
