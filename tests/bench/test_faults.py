"""The table of faults counts only true survivals, and the page shows what is recorded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from evidence_tables import insert, read
from fault_commands import ElasticTraining, Inputs, Training
from fault_kinds import FAULTS
from fault_table import section
from faults import BEGIN, DOCUMENT, END, RESULTS, drawn, seconds_lost, seeds_until

HIT = {"fault": "worker", "step": 13, "repeated": 3, "seconds": 20.4}
RUN: dict[str, Any] = {"command": "training", "hits": [HIT], "left": [], "same": True}
RUN |= {"ray": "2.60.0", "torch": "2.15.0", "date": "2026-11-23", "revision": "abc"}


def row(*records: dict[str, Any]) -> str:
    (line,) = [line for line in section(records).splitlines() if line.startswith("| training | a train worker |")]
    return line.removeprefix("| training | a train worker ")


def test_a_run_that_ends_otherwise_has_not_survived() -> None:
    assert row(RUN) == "| 1 | 1 | 3 (3 to 3) | 20 (20 to 20) |"
    twice = {**RUN, "hits": [HIT, {**HIT, "repeated": 0, "seconds": None}]}
    assert row(twice) == "| 2 | 2 | 2 (0 to 3) | 20 (20 to 20) |"
    for changed in ({"same": False}, {"left": ["TeacherActor"]}, {"error": "hung"}):
        assert row(RUN, {**RUN, **changed}) == "| 2 | 1 | 3 (3 to 3) | 20 (20 to 20) |"
    assert "with 2 faults, survived" in section([RUN, {**RUN, "command": "s3"}])


def test_seconds_lost_are_the_pause_that_other_epochs_did_not_make() -> None:
    seen = [0.5 * step + 30 * (step > 13) for step in range(60)]
    assert seconds_lost(seen, 20, 13, 20) == 30 and seconds_lost(seen, 13, 12, 20) == 0
    assert seconds_lost(seen, 20, 11, 20) == 30, "a drained node is left some steps later"
    assert seconds_lost(seen, 19, 14, 20) == 0, "the next fault has a pause of its own"
    assert seconds_lost(seen[:16], 15, 13, 20) is None, "nobody knows"


def test_new_seeds_until_there_are_enough_faults(tmp_path: Path) -> None:
    results = tmp_path / "faults.jsonl"
    results.write_text("".join(json.dumps({**RUN, "seed": seed}) + "\n" for seed in (0, 7)))
    seeds = []
    for seed in seeds_until(5, results):
        seeds.append(seed)
        with results.open("a") as file:
            file.write(json.dumps({**RUN, "seed": seed, "hits": [HIT, HIT]}) + "\n")
    assert seeds == [8, 9] and not list(seeds_until(6, results))


def test_a_hundred_faults_are_of_all_kinds() -> None:
    plan = [drawn(seed) for seed in range(35)]
    found = Counter((command, fault) for command, faults in plan for fault in faults)
    assert found.total() >= 90 and set(found) == {(command, fault) for command, kinds in FAULTS.items() for fault in kinds}


def test_a_skipped_batch_shows_in_the_losses() -> None:
    expected = {"losses": [[step, 1 / step] for step in range(1, 9)]}
    rounded = {"losses": [[step, 1.001 / step] for step in range(1, 9)]}
    skipped = {"losses": [[step, 1 / (step + (step > 5))] for step in range(1, 9)]}
    twice = {"losses": sorted([*expected["losses"], [3, 1 / 3]])}
    assert [ElasticTraining.equals(found, expected) for found in (expected, rounded, skipped, twice)] == [
        True,
        True,
        False,
        False,
    ]


def test_repeated_steps_are_seen_in_what_the_command_prints(tmp_path: Path) -> None:
    command = Training(Inputs(tmp_path, "unused"), "head")
    assert list(command.positions()) == []
    with command.output.open("w") as output:
        for step in (12, 13, 11):
            print(
                f"head  step {step}/80  epoch 0.6  loss 2 (cls 2)  lr 0.1  8.1 images/s  data wait 0%", file=output, flush=True
            )
            if step == 12:
                assert list(command.positions()) == [11, 12]
        print("head  step 20/80  epoch 1  val  AP 0.1\nhead  step 14/1", end="", file=output)
    assert list(command.positions()) == [12, 13, 10, 11]


def test_the_page_shows_what_is_recorded() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert insert(text, section(read(RESULTS)), BEGIN, END) == text
