"""MLflow and W&B are told what a run does, by their real clients; a resumed run goes on in the same run of the tracker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headkd_ray.errors import TrackerError, UserError
from headkd_ray.job import Job
from headkd_ray.trackers import of_job
from headkd_ray.train import train
from tests.support import micro_job


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let MLflow write a database and W&B files, all in a folder of this test."""
    pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for name, value in {
        "MLFLOW_TRACKING_URI": address,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_ERROR_REPORTING": "false",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)  # artifacts of a database lie beside it
    return address


def job_of(folder: Path, splits: dict[str, str], **log: Any) -> Job:
    log = {"every_steps": 2, "tensorboard": False, "report": None, **log}
    return micro_job(folder, splits, log=log, eval={"every_epochs": 1, "batch_size": 8})


def test_both_are_told_everything_and_a_resumed_run_goes_on(
    tmp_path: Path, drawn_splits: dict[str, str], services: str
) -> None:
    job = job_of(tmp_path, drawn_splits, mlflow="photos", wandb="photos")

    def interrupted(record: dict[str, Any]) -> None:
        if record["step"] > 12:
            raise RuntimeError("the machine is taken away")

    with pytest.raises(RuntimeError, match="taken away"):
        train(job, interrupted)
    from mlflow import MlflowClient

    client = MlflowClient(services)
    (experiment,) = [each for each in client.search_experiments() if each.name == "photos"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    result = train(job, lambda record: None)

    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == job.run.name
    assert run.data.params["optim.epochs"] == "2" and run.data.params["data.train"] == job.data.train
    assert run.data.params["optim.milestones"] == "[1]" and run.data.params["teacher"] == "null"
    assert run.data.tags["torch"] and run.data.tags["run folder"] == str(tmp_path / "run")
    history = client.get_metric_history(run.info.run_id, "losses/total")
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    told = {record["step"]: record["losses"]["total"] for record in steps if "losses" in record}
    assert {metric.step: metric.value for metric in history} == pytest.approx(told)
    assert run.data.metrics["best/AP"] == pytest.approx(result["best"]["AP"])
    classes = [name for name in run.data.metrics if name.startswith("val/per_class/")]
    assert len(classes) == 8 and "val/AP50" in run.data.metrics
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"student", "samples", "detections.png"}
    samples = [file.path for file in client.list_artifacts(run.info.run_id, "samples")]
    assert f"samples/step_{result['last']['step']:08d}.jpg" in samples
    assert {file.path for file in client.list_artifacts(run.info.run_id, "student")} >= {
        "student/model.json",
        "student/model.safetensors",
    }

    sessions = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2 and len({folder.name.rpartition("-")[2] for folder in sessions}) == 1, "one run, twice begun"
    written = [entry for folder in sessions for entry in wandb_history(folder)]
    assert {entry["step"]: entry["losses/total"] for entry in written if "losses/total" in entry} == pytest.approx(told)
    assert any(key.startswith("samples") for entry in written for key in entry)
    assert any(key.startswith("detections") for entry in written for key in entry) and any(
        "val/AP" in entry for entry in written
    )


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """Return what an offline run of W&B has logged. Its file is a LevelDB log of protobuf records, after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    content, place, parts, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # too little for a header: the rest of a block is padding
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            if record.HasField("history"):
                found.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    return found


def test_a_missing_client_is_told_with_all_other_problems(
    tmp_path: Path, drawn_splits: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_job, "find_spec", lambda name: None)
    job = job_of(tmp_path, {**drawn_splits, "val": str(tmp_path / "nowhere")}, mlflow="a", wandb="b")
    with pytest.raises(UserError) as caught:
        train(job, lambda record: None)
    text = str(caught.value)
    assert "log.mlflow: needs the package mlflow, which is not installed: pip install 'headkd-ray[mlflow]'" in text
    assert "log.wandb" in text and "nowhere" in text


def test_a_server_that_does_not_answer_is_told_before_the_run(
    tmp_path: Path, drawn_splits: dict[str, str], services: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackerError, match=r"log\.mlflow: photos: .*127\.0\.0\.1"):
        train(job_of(tmp_path, drawn_splits, mlflow="photos"), lambda record: None)
    assert not (tmp_path / "run" / "job.json").exists()


def test_trackers_that_are_open_are_closed_if_another_cannot_be_opened(
    tmp_path: Path, drawn_splits: dict[str, str], services: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trackers.json").write_text("[")
    job = job_of(tmp_path, drawn_splits, mlflow="photos", wandb="a/b")  # no project may have such a name
    with pytest.raises(TrackerError, match=r"trackers\.json: .*delete it"):
        train(job, lambda record: None)
    (tmp_path / "run" / "trackers.json").unlink()
    with pytest.raises(TrackerError, match=r"log\.wandb: a/b: "):
        train(job, lambda record: None)
    from mlflow import MlflowClient

    client = MlflowClient(services)
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments() if each.name == "photos"])
    assert run.info.status == "FAILED"


def test_a_tracker_that_fails_on_the_way_is_told_once_and_training_goes_on(
    tmp_path: Path, drawn_splits: dict[str, str], services: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[dict[str, Any]] = []

    def tell(record: dict[str, Any]) -> None:
        records.append(record)
        if record["step"] == 2 and "losses" in record:  # from here on the server refuses everything
            from mlflow import MlflowClient

            client = MlflowClient(services)
            (run,) = client.search_runs([each.experiment_id for each in client.search_experiments() if each.name == "photos"])
            client.delete_run(run.info.run_id)

    result = train(job_of(tmp_path, drawn_splits, mlflow="photos"), tell)
    notes = [record["note"] for record in records if "note" in record]
    assert len(notes) == 1 and notes[0].startswith("log.mlflow: failed, and is told no more in this process: ")
    assert result["best"]["AP"] is not None


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("val/per_class/bell pepper", "val/per_class/bell pepper"),
        ("a(b)", "a-28-b-29-"),
        ("Zwölf", "Zw-f6-lf"),
        ("狗", "-72d7-"),
    ],
)
def test_class_names_become_names_that_mlflow_takes(name: str, written: str) -> None:
    pytest.importorskip("mlflow")
    from headkd_ray.trackers.mlflow_tracker import mlflow_name

    assert mlflow_name(name) == written
