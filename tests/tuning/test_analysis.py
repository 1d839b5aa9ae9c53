"""The table, the frame, importances, figures, the page and the best job of a search, made from its files."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
from PIL import Image
from rich.console import Console

from headkd_ray import analyze
from headkd_ray.errors import JobError
from headkd_ray.job import load_job
from headkd_ray.report.plots import png, svg
from headkd_ray.tuning.analysis.figures import figures, pareto_front
from headkd_ray.tuning.analysis.importance import importances
from headkd_ray.tuning.analysis.page import page
from headkd_ray.tuning.analysis.progress import line
from headkd_ray.tuning.analysis.table import print_trials, ranked, short_names
from headkd_ray.tuning.search_spec import SearchSpec
from headkd_ray.tuning.space import Search
from headkd_ray.tuning.trial_records import SearchFolder, Trial
from tests.tuning.test_search_file import JOB

SPACE = {
    "optim.lr": {"loguniform": [1e-3, 1e-1]},
    "distill.assistants.fcos.ckd_weight": {"uniform": [0, 4]},
    "distill.assistants.rcnn.ckd_weight": {"uniform": [0, 4]},
    "optim.optimizer": {"choice": ["sgd", "adamw"]},
    "optim.momentum": {"uniform": [0.5, 0.99], "when": {"optim.optimizer": "sgd"}},
    "distill.ckd_epochs": {"choice": [4, 8, None]},
}


def searched(folder: SearchFolder, **sections: Any) -> tuple[Search, list[Trial]]:
    """Write a search into ``folder`` and return its trials.

    There are 16 finished trials, whose AP is 10 minus the distance of fcos.ckd_weight from 2, one that was stopped, one that
    failed, and one that has not ended.
    """
    sections = {"seeds": [0, 1], "objective": {"cost": "params"}, **sections}
    search = Search(SearchSpec.model_validate({"run": {"name": "s"}, "job": "base.yaml", "space": SPACE, **sections}), JOB)
    trials = []
    for number in range(19):
        weight = number * 7 % 16 / 4
        values = {
            "optim.lr": 0.001 * 10 ** (number * 5 % 16 / 8),
            "distill.assistants.fcos.ckd_weight": weight,
            "distill.assistants.rcnn.ckd_weight": number * 11 % 16 / 4,
            "optim.optimizer": "adamw" if number % 2 else "sgd",
            "distill.ckd_epochs": (4, 8, None)[number % 3],
            **({} if number % 2 else {"optim.momentum": 0.9}),
        }
        score = 10 - abs(weight - 2)
        trial = Trial(number, values, started=1e9 + number)
        result = {
            **dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm"), score),
            "APl": None,
            "step": 5,
            "student": f"runs/{number}",
        }
        if number == 16:
            trial = trial.with_end("stopped", curve=[(1, 1.5), (2, None)])
        elif number == 17:
            trial = trial.with_end("failed", cause="step 3: not finite: <b>{'loss': nan}</b>")
        elif number < 16:
            results = {"0": result, "1": {**result, "AP": score + 1}}
            trial = trial.with_end("finished", results=results, curve=[(1, score / 2), (2, score)], cost={"params": weight + 1})
        trials.append(trial if trial.ended is None else replace(trial, ended=trial.started + 60))
    folder.start(search)
    for trial in trials:
        folder.write(trial)
    return search, trials


@pytest.fixture
def folder(tmp_path: Path) -> SearchFolder:
    return SearchFolder.open(str(tmp_path / "s"))


def test_the_frame_has_a_row_a_trial(folder: SearchFolder) -> None:
    searched(folder)
    frame = analyze.load(str(folder.folder.path))
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 19
    best = frame.loc[frame["AP"].idxmax()]
    assert best["AP"] == pytest.approx(10.5) and best["AP_std"] == pytest.approx(0.5**0.5)
    assert best["distill.assistants.fcos.ckd_weight"] == 2.0 and best["minutes"] == pytest.approx(1)
    assert frame["optim.momentum"].isna().sum() == 9
    assert frame["APl"].isna().all()
    assert set(frame["distill.ckd_epochs"]) == {"4", "8", "null"}
    assert frame.set_index("trial").loc[16, "best_seen"] == 1.5
    assert frame.set_index("trial").loc[17, "cause"].startswith("step 3")


def test_csv_and_parquet(folder: SearchFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    searched(folder)
    files = {"csv": tmp_path / "t.csv", "parquet": tmp_path / "new" / "t.parquet"}
    assert analyze.main([folder.folder.path, "--csv", str(files["csv"]), "--parquet", str(files["parquet"])]) == 0
    assert pandas.read_parquet(files["parquet"])["AP"].tolist() == pytest.approx(
        pandas.read_csv(files["csv"])["AP"], nan_ok=True
    )


def test_the_table_is_best_first_and_whole_in_a_pipe(folder: SearchFolder) -> None:
    search, trials = searched(folder)
    order = ranked(search, trials)
    assert [trial.state for trial in order[-3:]] == ["stopped", "running", "failed"]
    assert [trial.mean("AP") for trial in order[:16]] == sorted((trial.mean("AP") for trial in trials[:16]), reverse=True)
    out = io.StringIO()
    print_trials(Console(file=out), search, trials)
    text = out.getvalue()
    assert "…" not in text and "10.5 ± 0.7" in text and "(1.5)" in text


def test_names_are_as_short_as_they_can_be() -> None:
    assert list(short_names(list(SPACE)).values()) == [
        *("lr", "fcos.ckd_weight", "rcnn.ckd_weight", "optimizer", "momentum", "ckd_epochs")
    ]


def test_importance_finds_the_key_that_matters(folder: SearchFolder) -> None:
    pytest.importorskip("sklearn")
    search, trials = searched(folder)
    shares, note = importances(search, trials)
    assert max(shares, key=lambda key: shares[key]) == "distill.assistants.fcos.ckd_weight"
    assert math.isclose(sum(shares.values()), 1, rel_tol=1e-6)
    assert note == "fANOVA over 16 finished trials. Left out, because not all of these have them: optim.momentum."
    assert importances(search, trials[:3]) == ({}, "3 trials have finished; importances need at least 8, so 5 more.")


def test_importance_without_a_difference_says_so(folder: SearchFolder) -> None:
    pytest.importorskip("sklearn")
    search, trials = searched(folder)
    alike = [replace(trial, results=trials[0].results) for trial in trials]
    shares, note = importances(search, alike)
    assert not any(shares.values()) and note


def test_the_pareto_front_is_what_none_beats(folder: SearchFolder) -> None:
    search, trials = searched(folder)
    front = pareto_front(search, trials)
    points = [(trial.cost["params"], trial.mean("AP")) for trial in front]
    assert points == [(1 + weight, 8.5 + weight) for weight in (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)]


def test_figures_are_pictures(folder: SearchFolder) -> None:
    search, trials = searched(folder)
    drawn = figures(search, trials, {"optim.lr": 0.7, "distill.ckd_epochs": 0.3}, "")
    assert list(drawn) == ["history", "curves", "parallel", "importance", "slices", "pareto"]
    for figure in drawn.values():
        assert min(Image.open(io.BytesIO(png(figure))).size) > 150
        text = svg(figure)
        assert text.startswith("<svg") and "currentColor" in text and "http://" not in re.sub(r'xmlns[^"]*"[^"]*"', "", text)


def test_a_figure_of_hundreds_of_trials_is_as_quick_as_one_of_few(folder: SearchFolder) -> None:
    """What takes the time is the number of things to draw; numbers of that many trials would hide each other, too."""
    search, trials = searched(folder)
    many = [replace(trials[number % 16], number=number, started=1e9 + number) for number in range(400)]
    few, lots = (
        {name: len(figure.findobj()) for name, figure in figures(search, some, {}, "").items()} for some in (trials[:16], many)
    )
    assert few.keys() == lots.keys() and all(lots[name] <= few[name] + 20 for name in few), (few, lots)


def test_without_importances_the_page_says_what_they_need(folder: SearchFolder) -> None:
    search, trials = searched(folder)
    drawn = figures(search, trials[:3], *importances(search, trials[:3]))
    assert "3 trials have finished; importances need at least 8, so 5 more." in svg(drawn["importance"])


def test_optuna_reads_a_search(folder: SearchFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As optuna-dashboard does: a study with all trials, their states, values and times."""
    optuna = pytest.importorskip("optuna")
    _, trials = searched(folder)
    odd = replace(trials[0], values={**trials[0].values, "optim.lr": 0.5})  # the base job's, outside the space
    folder.write(odd)
    file = tmp_path / "new/search.db"
    assert analyze.main([folder.folder.path, "--optuna", str(file)]) == 0
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{file}")
    states = {"finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL", "running": "RUNNING"}
    assert [trial.state.name for trial in study.trials] == [states[trial.state] for trial in trials]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [trial.values for trial in study.trials[:16]] == [[own.mean("AP"), own.cost["params"]] for own in trials[:16]]
    assert (
        study.trials[1].params["distill.ckd_epochs"] == "8"
        and study.trials[1].params["optim.lr"] == trials[1].values["optim.lr"]
    )
    assert study.trials[0].params == {} and study.trials[0].user_attrs["values"]["optim.lr"] == 0.5
    assert study.trials[17].user_attrs["cause"].startswith("step 3")
    assert study.trials[3].duration.total_seconds() == 60
    assert study.trials[2].intermediate_values == {int(epoch): value for epoch, value in trials[2].curve}
    assert {trial.number for trial in study.best_trials} and len(optuna.get_all_study_names(f"sqlite:///{file}")) == 1


def test_the_page_is_one_file_and_escapes_what_it_shows(folder: SearchFolder) -> None:
    searched(folder)
    assert analyze.main([folder.folder.path]) == 0
    out = Path(folder.folder.path) / "analysis"
    text = (out / "index.html").read_text()
    assert "&lt;b&gt;" in text and "<b>{" not in text
    assert not re.findall(r'(?:src|href)="(?!#)', text.replace("xlink:href", "")), "nothing is fetched"
    assert "prefers-color-scheme" in text or "light dark" in text
    assert text.count("<svg") == len(list(out.glob("*.png"))) >= 5
    assert "16 finished, 1 stopped, 1 failed, 1 running" in text


def test_nothing_in_a_file_becomes_html_or_a_formula(folder: SearchFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """A trial's file that does not fit is left out of page, table and figures; the others are shown as they are."""
    values = {"optim.lr": {"loguniform": [1e-3, 1e-1]}, "data.train": {"choice": ["$\\frac{$", "<i>$x_1$</i>", "[red]\x1b[2J"]}}
    _, trials = searched(folder, space={**SPACE, **values})
    for trial in trials:
        folder.write(replace(trial, values={**trial.values, "data.train": values["data.train"]["choice"][trial.number % 3]}))
    name = "0003.json"
    content = (folder.folder / "trials").read(name).decode()
    (folder.folder / "trials").write(name, content.replace('"finished"', '"<img src=x onerror=alert(1)>"').encode())
    assert analyze.main([folder.folder.path]) == 0
    shown = capsys.readouterr()
    assert f"trials/{name}: state: Input should be" in shown.err and "Trial 3 is left out" in shown.err
    assert "[red]" in shown.out and "\x1b" not in shown.out + shown.err
    text = (Path(folder.folder.path) / "analysis/index.html").read_text()
    assert "<img" not in text and "<i>" not in text and "&lt;i&gt;$x_1$&lt;/i&gt;" in text
    assert "15 finished" in text


def test_everything_that_is_put_into_the_page_is_escaped(folder: SearchFolder) -> None:
    """This includes text that no readable file could contain."""
    search, trials = searched(folder)
    odd: Any = "<img src=x>"
    text = page(
        search, [replace(trial, number=odd, state="failed", cause=odd) for trial in trials[:1]], {"importance": "<svg/>"}, odd
    )
    assert "<img" not in text and text.count("&lt;img") >= 3


def test_the_best_trial_s_job_is_a_complete_job_file(folder: SearchFolder) -> None:
    search, _ = searched(folder)
    analyze.main([folder.folder.path])
    best = load_job(Path(folder.folder.path) / "analysis/best.yaml")
    assert best.distill.assistants.fcos is not None and best.distill.assistants.fcos.ckd_weight == 2.0
    assert best.run.name == "s_trial8" and best.run.storage == search.base.run.storage
    assert best.replace({name: getattr(search.base, name) for name in ("run", "distill", "optim")}) == search.base


def test_a_search_that_has_just_begun_can_be_looked_at(folder: SearchFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first trial is in the middle of an epoch, and a log line is being written."""
    _, trials = searched(folder)
    for number in range(1, 19):
        (folder.folder / "trials").delete(f"{number:04d}.json")
    folder.write(Trial(0, trials[0].values, started=1e9))
    run = folder.runs / folder.run_name(folder.trial(0), 0)
    run.create()
    run.write("log.jsonl", b'{"step": 5, "epoch": 1, "val": {"AP": 4.5}}\n{"step": 6, "lo')
    assert analyze.main([folder.folder.path]) == 0
    assert "(4.5)" in capsys.readouterr().out
    assert {path.name for path in (Path(folder.folder.path) / "analysis").iterdir()} == {
        "index.html",
        "curves.png",
        "importance.png",
    }


def test_remote_searches_are_read_and_written_there() -> None:
    folder = SearchFolder.open("memory://bucket/search")
    searched(folder)
    assert analyze.main(["memory://bucket/search"]) == 0
    assert (folder.folder / "analysis").has("index.html") and (folder.folder / "analysis").has("best.yaml")
    assert len(analyze.load("memory://bucket/search")) == 19


def test_a_folder_without_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(JobError):
        analyze.load(str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        analyze.main([str(tmp_path)])
    assert ended.value.code == 2
    assert "no search here" in capsys.readouterr().err and not (tmp_path / "analysis").exists()


def test_a_line_for_each_event(folder: SearchFolder) -> None:
    search, trials = searched(folder)
    copier = replace(trials[18], copies=[{"from": 3, "epoch": 1, "values": {}}])
    assert [
        line({"trial": trials[18]}, search).split("  ")[:2],
        line({"trial": trials[18], "epoch": 2, "value": 4.25}, search),
        line({"trial": copier, "epoch": 3, "value": 5.0}, search),
        line({"trial": trials[0]}, search),
        line({"trial": trials[16]}, search),
        line({"trial": trials[17]}, search),
    ] == [
        ["trial 18", "optim.lr=0.01778"],
        "trial 18  epoch 2  AP 4.2",
        "trial 18  epoch 3  AP 5.0  (copied trial 3)",
        "trial 0  finished  AP 8.5 (mean of 2 seeds)  params 1",
        "trial 16  stopped by none",
        "trial 17  failed: step 3: not finite: <b>{'loss': nan}</b>",
    ]
