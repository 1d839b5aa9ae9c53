"""bench/step.py: steps are measured in turns, and their ratios to the plain detector stand first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import step
from gpu_recipes import recipe


def test_steps_are_compared_with_the_plain_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    small = ["--tiny", "--side", "64", "--rounds", "2", "--threads", "1", "--json", str(figures)]
    assert step.main([*small, "--only", "RetinaNet R18, alone;HEAD inline"]) == 0
    plain, head = json.loads(figures.read_text())["rows"]
    assert [plain[name] for name in step.RATIOS] == [1.0] * 3
    assert head["times_plain"] == head["ms"] / plain["ms"] and head["times_plain_operations"] > 1.5
    assert head["step_mib"] > 0 and head["rounds"] == 2 and set(head["parts_ms"]) == {"forward", "backward", "update"}
    shown = capsys.readouterr().out
    assert "round 3 of 3" in shown and f"{head['times_plain']:.2f}" in shown and "x operations" in shown


def test_a_step_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--only", "RetinaNet R18, alone;HAED inline"])
    assert (
        "['HAED inline'] are not among: RetinaNet R18, alone; torchvision RetinaNet R18; HEAD inline" in capsys.readouterr().err
    )


@pytest.mark.parametrize("case", step.CASES, ids=lambda case: case.name)
def test_every_job_loads_at_full_size_with_random_weights(case: step.Case) -> None:
    """Rehearsals measure micro jobs alone, and these have other keys."""
    assert recipe(case.job, *case.keys, tiny=False).student.backbone.weights == "none"
