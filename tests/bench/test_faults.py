"""The table of faults counts only true survivals, and the page shows what is recorded."""

from __future__ import annotations

from typing import Any

from evidence_tables import insert, read
from faults import BEGIN, DOCUMENT, END, RESULTS, STEPS, seconds_lost, section, seeds_until

HIT = {"fault": "worker", "step": 13, "back": 10, "seconds": 20.4}
RUN: dict[str, Any] = {"hits": [HIT], "left": [], "same": True, "ray": "2.60.0", "torch": "2.15.0", "date": "2026-11-23"}


def row(*records: dict[str, Any]) -> str:
    (line,) = [line for line in section(records).splitlines() if line.startswith("| a train worker |")]
    return line


def test_a_run_that_ends_otherwise_has_not_survived() -> None:
    assert row(RUN) == "| a train worker | 1 | 1 | 3 (3 to 3) | 20 (20 to 20) |"
    twice = {**RUN, "hits": [HIT, {**HIT, "back": 13, "seconds": None}]}
    assert row(twice) == "| a train worker | 2 | 2 | 2 (0 to 3) | 20 (20 to 20) |"
    for changed in ({"same": False}, {"left": ["TeacherActor"]}, {"error": "hung"}):
        assert row(RUN, {**RUN, **changed}) == "| a train worker | 2 | 1 | 3 (3 to 3) | 20 (20 to 20) |"


def test_seconds_lost_are_those_that_another_epoch_did_not_take() -> None:
    seen = [0.5 * step + 30 * (step > 13) for step in range(3 * STEPS)]
    assert seconds_lost(seen, 13) == seconds_lost(seen, 12) == 30 and seconds_lost(seen, 14) == 0
    assert seconds_lost(seen, 3 * STEPS - 2) is None, "nobody knows"


def test_new_seeds_until_there_are_enough_faults() -> None:
    records = [{**RUN, "seed": seed} for seed in (0, 1, 7)]
    assert seeds_until(13, records, ["worker", "data", "driver"]) == range(8, 12)
    assert not seeds_until(3, records, ["worker"]) and seeds_until(2, [], ["worker"]) == range(2)


def test_the_page_shows_what_is_recorded() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert insert(text, section(read(RESULTS)), BEGIN, END) == text
