"""Tables and log lines as text."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from headkd_ray.report.console import RunConsole, line
from headkd_ray.report.tables import class_table, headline_table, print_metrics


def metrics(ap: float | None, small: float | None, **per_class: float | None) -> dict[str, Any]:
    return {"AP": ap, "AP50": 60.0, "AP75": 40.0, "APs": small, "APm": 30.0, "APl": 50.0, "per_class": per_class, "images": 2}


RUNS = {
    "baseline": metrics(30.04, None, cat=20.0, dog=None, emu=5.0),
    "copy_only": metrics(31.0, 1.0, cat=21.0, dog=1.0, emu=4.0),
    "head": metrics(33.96, 2.25, cat=24.25, dog=9.0, emu=None),
}


def cells(table: Table) -> list[list[str]]:
    """Return heading and rows."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def test_headline_has_a_dash_where_nothing_can_be_computed() -> None:
    assert cells(headline_table(RUNS)) == [
        ["run", "AP", "AP50", "AP75", "APs", "APm", "APl"],
        ["baseline", "30.0", "60.0", "40.0", "–", "30.0", "50.0"],
        ["copy_only", "31.0", "60.0", "40.0", "1.0", "30.0", "50.0"],
        ["head", "34.0", "60.0", "40.0", "2.2", "30.0", "50.0"],
    ]


def test_class_table_ends_with_the_last_run_s_gain_over_the_first() -> None:
    assert cells(class_table(RUNS)) == [
        ["class", "baseline", "copy_only", "head", "head − baseline"],
        ["cat", "20.0", "21.0", "24.2", "+4.2"],
        ["dog", "–", "1.0", "9.0", "–"],
        ["emu", "5.0", "4.0", "–", "–"],
    ]
    loss = {"baseline": metrics(1, 1, cat=20.0), "head": metrics(1, 1, cat=18.5)}
    assert cells(class_table(loss))[1][-1] == "-1.5"


def test_one_run_has_no_gain() -> None:
    assert cells(class_table({"head": RUNS["head"]}))[0] == ["class", "head"]


def test_print_metrics_keeps_odd_class_names_as_they_are() -> None:
    """Square brackets are markup to rich."""
    out = io.StringIO()
    print_metrics({"run [bold]": metrics(1.0, None, **{"[red]cup[/]": 3.0})}, Console(file=out, width=120))
    assert "[red]cup[/]" in out.getvalue() and "run [bold]" in out.getvalue() and "–" in out.getvalue()


STEP = {
    "step": 50,
    "steps": 200,
    "epoch": 0.25,
    "lr": 0.01,
    "losses": {"loss_cls": 1.0, "loss_akd_1": 0.5, "total": 1.5},
    "images_per_second": 12.34,
    "data_wait": 0.071,
    "memory_mib": 812.4,
}
VAL = {"step": 200, "steps": 200, "epoch": 1, "val": metrics(33.96, None, cat=1.0)}


def test_log_line_of_a_step_window() -> None:
    assert line(STEP) == ("step 50/200  epoch 0.25  loss 1.5 (cls 1 akd_1 0.5)  lr 0.01  12.3 images/s  data wait 7%  812 MiB")
    assert STEP["losses"]["total"] == 1.5, "the record itself stays whole"  # type: ignore[index]


def test_log_line_of_an_evaluation() -> None:
    assert line(VAL) == "step 200/200  epoch 1  val  AP 34.0  AP50 60.0  AP75 40.0  APs –  APm 30.0  APl 50.0"


@pytest.mark.parametrize("terminal", [False, True])
def test_run_console_prints_a_line_a_record(terminal: bool) -> None:
    out = io.StringIO()
    with RunConsole("head [x]", Console(file=out, force_terminal=terminal, width=200, highlight=False, soft_wrap=True)) as run:
        run(STEP)
        run(VAL)
    text = out.getvalue()
    assert f"head [x]  {line(STEP)}" in text and f"head [x]  {line(VAL)}" in text
