"""bench/scale.py: its parts run at any size, and docs/scale.md has the figures of the results file."""

from __future__ import annotations

from pathlib import Path

import pytest
import scale
import scale_parts
from evidence_tables import insert, read
from scale_parts import PARTS, SIZES, Size


def test_every_part_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", Size(600, 2500, 20, 40, 200))
    monkeypatch.setattr(scale_parts, "EPOCHS", 5)
    monkeypatch.setattr(scale_parts, "DATASET", 4)
    prepared, bare = tmp_path / "prepared", tmp_path / "bare"
    for folder in (prepared, bare):
        folder.mkdir()
    steps = {part: scale.measure(part, "tiny", prepared) for part in PARTS if part != "bare"}
    assert all(steps.values()) and all(record["peak_mb"] > 0 for records in steps.values() for record in records)
    assert scale.measure("bare", "tiny", bare) == []
    titles = [[record["step"] for record in scale.measure("order", "tiny", folder)] for folder in (prepared, bare)]
    assert titles[0] == titles[1], "planning needs no more than an index"
    table = scale.section([{**record, "date": "d"} for records in steps.values() for record in records])
    assert "tiny: 600 images, 2,500 boxes" in table and "resume in the middle of epoch 5" in table


def test_the_document_has_the_figures_of_the_file() -> None:
    text = scale.DOCUMENT.read_text()
    assert text == insert(text, scale.section(read(scale.RESULTS)), scale.BEGIN, scale.END), "run python bench/scale.py table"
