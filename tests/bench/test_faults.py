"""The table of faults: what counts as survived, and that the page shows what is recorded."""

from __future__ import annotations

from typing import Any

from evidence_tables import insert, read
from faults import BEGIN, DOCUMENT, END, RESULTS, section

MADE_WITH = {"job": "j", "ray": "2.60.0", "torch": "2.15.0", "date": "2026-11-23"}
CALM: dict[str, Any] = {"fault": "none", "run": 0, "steps": 6, "weights": "w", "left": [], "seen": [0, 5, 6, 7, 8, 9, 10]}


def hurt(run: int, **changed: Any) -> dict[str, Any]:
    """A record of a worker that was killed at step 3 of 6, went back to step 2, and lost 20 seconds."""
    record = {**CALM, "fault": "worker", "run": run, "hit": 3, "back": 2, "seen": [0, 5, 6, 7, 28, 29, 30]}
    return {**record, **changed, **MADE_WITH}


def rows(*records: dict[str, Any]) -> list[str]:
    return [line for line in section([{**CALM, **MADE_WITH}, *records]).splitlines() if line.startswith("| a train worker |")]


def test_a_run_that_ends_otherwise_has_not_survived() -> None:
    assert rows(hurt(0)) == ["| a train worker | 1 | 1 | 1 (1–1) | 20 (20–20) |"]
    for changed in ({"weights": "v"}, {"steps": None}, {"left": ["Holder"]}, {"error": "hung"}):
        assert rows(hurt(0), hurt(1, **changed)) == ["| a train worker | 2 | 1 | 1 (1–1) | 20 (20–20) |"]


def test_only_runs_of_the_same_job_are_compared() -> None:
    assert not rows({**hurt(0), "job": "other"})


def test_the_page_shows_what_is_recorded() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert insert(text, section(read(RESULTS)), BEGIN, END) == text
