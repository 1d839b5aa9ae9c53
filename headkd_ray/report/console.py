"""Progress of a run on standard output: a line for each log record and, in a terminal, a progress bar."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from headkd_ray.report.terminal import Terminal


class RunConsole:
    """A context manager that receives a run's log records (see ``engine.log``) and prints them."""

    def __init__(self, name: str, console: Console | None = None) -> None:
        self.console = console or Terminal(soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.name = name
        self.place = "before its first step"
        self.task = self.progress.add_task(name, total=None)

    def __enter__(self) -> RunConsole:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        if kind is KeyboardInterrupt:
            self.note(f"ended at once, {self.place}; the same command resumes from the last checkpoint")

    def note(self, text: str) -> None:
        """Print a sentence about the run."""
        self.console.print(f"{self.name}  {text}", markup=False)

    def __call__(self, record: dict[str, Any]) -> None:
        if "val" not in record:  # else perhaps of a step that training has left behind
            self.progress.update(self.task, completed=record["step"], total=record["steps"])
            self.place = f"after step {record['step']} of {record['steps']}"
        self.note(record["note"] if "note" in record else line(record))


def line(record: dict[str, Any]) -> str:
    """Return the line for a record."""
    head = f"step {record['step']}/{record['steps']}  epoch {record['epoch']:.4g}"
    if "val" in record:
        metrics = {name: value for name, value in record["val"].items() if name.startswith("AP")}
        return f"{head}  val  " + "  ".join(f"{name} {number(value)}" for name, value in metrics.items())
    losses = dict(record["losses"])
    total = losses.pop("total")
    parts = " ".join(f"{name.removeprefix('loss_')} {value:.3g}" for name, value in losses.items())
    return (
        f"{head}  loss {total:.4g} ({parts})  lr {record['lr']:.3g}  {record['images_per_second']:.1f} images/s  "
        f"data wait {record['data_wait']:.0%}  {record['memory_mib']:.0f} MiB"
    )


def number(value: float | None) -> str:
    """Format a metric in percent, or a dash if it cannot be computed."""
    return "–" if value is None else f"{value:.1f}"
