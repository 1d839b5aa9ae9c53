"""What the command tune refuses before a cluster starts; tests/tuning/test_search_on_ray.py covers what it does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from headkd_ray import tune
from headkd_ray.tuning.search_file import load_search
from headkd_ray.tuning.trial_records import SearchFolder
from tests.support import micro_job


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn_splits: dict[str, str]) -> str:
    """Return the name of a search file in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(yaml.safe_dump(micro_job(tmp_path, drawn_splits).model_dump(mode="json")))
    text = {"run": {"name": "s"}, "job": "job.yaml", "space": {"optim.lr": {"uniform": [0.01, 0.02]}}, "budget": {"trials": 2}}
    Path("search.yaml").write_text(yaml.safe_dump(text))
    return "search.yaml"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        tune.main(list(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_mistakes_of_the_file(search: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, search, "space.optim.lrr.uniform=[1, 2]", "budget.trials=0")
    assert "space.optim.lrr: unknown key; did you mean optim.lr?" in error and "budget.trials: 0 must be above 0" in error


def test_data_that_is_not_there_is_found_before_anything_is_written(search: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(capsys, search, "overrides.data.val=nowhere")
    assert not Path("runs").exists()


def test_a_search_is_started_once_and_resumed_after(search: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no search to resume; start it without --resume" in refused(capsys, search, "--resume")
    SearchFolder.open("runs/s").start(load_search(search))
    assert "is already a search: continue it (--resume), or choose another run.name" in refused(capsys, search)
    assert "space: the search runs/s was started with another" in refused(
        capsys, search, "space.optim.lr.uniform=[0.01, 0.03]", "--resume"
    )


def test_optuna_missing(search: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert 'needs Optuna: python -m pip install "headkd-ray[tune]"' in refused(capsys, search)
