"""The evidence's tables are its results file's."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import evidence
import pytest
from evidence_tables import BEGIN, END, METRICS, by_tier, document_section, insert, matched, read, readme_section, shown
from hypothesis import given
from hypothesis import strategies as st

from headkd_ray.errors import DataError

ROOT = Path(__file__).parents[2]

ORDER = {
    "micro": {
        "teacher": (),
        "baseline": (),
        "head": ("baseline", "akd", "unmade"),
        "akd": ("baseline",),
        "unmade": ("baseline",),
    }
}


def made_up(row: str, seed: int, ap: float, **others: Any) -> dict[str, Any]:
    record = {"tier": "micro", "row": row, "seed": seed, **dict.fromkeys(METRICS, ap), "val_AP": ap, "images": 100}
    record |= {"seconds": 90.0, "parameters": 5, "lr": 0.01, "searched": True, "job": "j", "matched": "m"}
    record |= {"revision": "abc", "torch": "2", "torchvision": "3", "timm": "4", "machine": "a CPU", "threads": 1}
    return {**record, "date": "2026-01-01", **others}


MADE_UP = [
    made_up("baseline", 0, 10.0),
    made_up("baseline", 1, 12.0),
    made_up("head", 1, 99.0, job="old"),
    made_up("head", 0, 14.0, job="new", lr=0.02, searched=False),
    made_up("head", 1, 18.0, job="new", lr=0.02, searched=False, revision="def", APl=None),
    made_up("head", 2, 22.0, job="new", lr=0.02, searched=False, APl=None),
    made_up("akd", 1, 11.0, matched="another schedule"),
    made_up("teacher", 0, 30.0),
    made_up("stranger", 0, 1.0),
]


def test_tables_of_a_made_up_file():
    lines = readme_section(MADE_UP, ORDER).splitlines()
    assert lines[0] == "Tier micro, a CPU, 1 thread:"
    assert lines[2:7] == [
        "| row | seeds | AP | difference to its baseline |",
        "| --- | ---: | ---: | ---: |",
        "| `baseline` | 2 | 11.0 ± 1.4 |  |",
        "| `akd` | 1 | 11.0 | – |",  # not of the same schedule
        "| `head` | 3 | 18.0 ± 4.0 | +5.0 ± 1.4 (n = 2) |",
    ]
    full = document_section(MADE_UP, ORDER)
    assert "| `head` | 3 | 18.0 ± 4.0 | +5.0 ± 1.4 (n = 2) to `baseline`<br>– to `akd` |" in full
    assert "| 18.0 ± 4.0 | 18.0 ± 4.0 | 18.0 ± 4.0 | 14.0 | 18.0 ± 4.0 | 1.5 ± 0.0 |" in full
    assert "| `head` | 5 | 100 | 0.02 (not searched) | a CPU | abc; def | 2, 3, 4 | 2026-01-01 |" in full
    assert "| `teacher` | 1 | 30.0 |" in full and "| `stranger` | 1 | 1.0 |" in full
    assert "unmade" not in full and "99" not in full


def test_no_results_is_said():
    assert "no figures yet" in readme_section([], ORDER) and "no figures yet" in document_section([], ORDER)


def test_a_repeated_seed_counts_once_the_last_one():
    rows = by_tier([made_up("baseline", 0, 10.0), made_up("baseline", 0, 20.0)], ORDER)["micro"]
    assert [record["AP"] for record in rows["baseline"].values()] == [20.0]


some_aps = st.dictionaries(st.integers(0, 9), st.floats(0, 100), max_size=6)


@given(some_aps, some_aps)
def test_differences_are_paired_by_seed(ours: dict[int, float], theirs: dict[int, float]):
    records = [made_up("baseline", seed, ap) for seed, ap in theirs.items()]
    records += [made_up("head", seed, ap) for seed, ap in ours.items()]
    rows = {"head": {}, **by_tier(records, ORDER).get("micro", {})}
    both = sorted(ours.keys() & theirs.keys())
    found = matched(rows, "head", "baseline")
    assert found == [ours[seed] - theirs[seed] for seed in both]
    text = shown(found, "+")
    if len(both) > 1:
        mean, sd = text.replace("−", "-").split(" ± ")
        assert float(mean) == pytest.approx(statistics.fmean(found), abs=0.051)
        assert float(sd) == pytest.approx(statistics.stdev(found), abs=0.051)
    else:
        assert "±" not in text
        assert (text == "–") == (not both)


def test_insert_replaces_what_is_between_the_markers():
    text = f"before\n{BEGIN}\n\nold\n\n{END}\nafter\n"
    assert insert(text, "new") == text.replace("old", "new")
    assert insert(insert(text, "new"), "old") == text
    with pytest.raises(DataError, match="markers"):
        insert("nothing", "new")


def test_a_broken_line_is_named(tmp_path: Path):
    (tmp_path / "results.jsonl").write_text('{"row": "head"}\n{"row": "he')
    with pytest.raises(DataError, match=r"results\.jsonl:2"):
        read(tmp_path / "results.jsonl")


def test_committed_tables_are_fresh():
    records = read(ROOT / "docs" / "results.jsonl")
    for file, section in (("README.md", readme_section), ("docs/results.md", document_section)):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert text == insert(text, section(records, evidence.order())), "run python bench/evidence.py table"
