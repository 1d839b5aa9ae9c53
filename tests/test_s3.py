"""Whole runs with everything on S3: a real server, real requests, a real kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load

from headkd_ray import analyze, cache, evaluate, predict, prepare, tune
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.synthetic import draw_dataset
from headkd_ray.job import Job
from headkd_ray.storage import Folder
from headkd_ray.train import main, train
from headkd_ray.tuning.trial_records import SearchFolder
from tests.s3 import EXPIRED, Answer, Proxy, moto_server, nobody, uri
from tests.support import assert_same_weights, micro_job, micro_teacher, student_weights
from tests.tuning.test_analysis import searched
from tests.tuning.test_search_file import JOB


@pytest.fixture(scope="module")
def splits(s3: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return prepared splits on S3, of images on S3."""
    folder = tmp_path_factory.mktemp("drawn")
    drawn = draw_dataset(folder, train=24, val=6)
    images = Folder.open(uri("bucket", s3, "photos"))
    images.copy_from(Folder.open(drawn.images))
    prepared = {}
    for name, coco in (("train", drawn.train), ("val", drawn.val)):
        Folder.open(uri("bucket", s3, "coco")).write(f"{name}.json", Path(coco).read_bytes())
        prepared[name] = uri("bucket", s3, f"data/{name}")
        arguments = [uri("bucket", s3, f"coco/{name}.json"), images.uri, "--out", prepared[name]]
        assert prepare.main([*arguments, "--shard-images", "8", "--row-group", "4"]) == 0
    return prepared


@pytest.fixture
def proxy(s3: str) -> Iterator[Proxy]:
    with Proxy(f"http://{s3}") as proxy:
        yield proxy


def job_on(netloc: str, splits: dict[str, str], name: str, **sections: Any) -> Job:
    """Return a job whose run is on the store at ``netloc``."""
    job = micro_job(Path("unused"), splits, name, **sections)
    return job.replace({"run.storage": uri("bucket", netloc, "runs")})


def write(job: Job, folder: Path) -> str:
    file = folder / f"{job.run.name}.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return str(file)


def start(job_file: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen([sys.executable, "-m", "headkd_ray.train", job_file], env=environment)


def weights_on(address: str) -> dict[str, torch.Tensor]:
    return load(Folder.open(address).read("model.safetensors"))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_teacher_cache_run_and_student_are_on_s3(s3: str, splits: dict[str, str], tmp_path: Path) -> None:
    """A cache is built on S3 and used for training; the student equals that of the same run on the local disk."""
    teacher = micro_teacher(tmp_path / "teacher", ShardSet.open(splits["train"]).meta.classes)
    Folder.open(uri("bucket", s3, "teachers/micro")).copy_from(Folder.open(teacher))
    job = job_on(
        s3,
        splits,
        "cached",
        method="head",
        teacher={"checkpoint": uri("bucket", s3, "teachers/micro"), "placement": "cache"},
        distill={"rois": "teacher", "roi_budget": 16},
        data={"views": 1},
    )
    assert cache.main(["build", write(job, tmp_path)]) == 0
    result = train(job, lambda record: None)
    assert result["student"] == uri("bucket", s3, "runs/cached/student")
    here = job.replace({"run.storage": str(tmp_path)})
    assert_same_weights(weights_on(result["student"]), student_weights(train(here, lambda record: None)))
    out = uri("bucket", s3, "found/detections.json")
    assert evaluate.main([result["student"], splits["val"], "--out", out]) == 0
    assert isinstance(json.loads(Folder.open(uri("bucket", s3, "found")).read("detections.json")), list)
    assert predict.main([result["student"], uri("bucket", s3, "photos"), "--out", uri("bucket", s3, "photos/found")]) == 0
    pictures = Folder.open(uri("bucket", s3, "photos/found"))
    assert len(pictures.names()) == 31 and len(json.loads(pictures.read("detections.json"))["images"]) == 30
    assert train(job, lambda record: pytest.fail("it had ended")) == result


@pytest.mark.slow
def test_kill_9_in_the_middle_of_an_upload(proxy: Proxy, splits: dict[str, str], tmp_path: Path) -> None:
    """The half-written checkpoint is not chosen: the run resumes from the previous one and ends like an undisturbed one."""
    job = job_on(proxy.netloc, splits, "killed", checkpoint={"every_steps": 2})
    here = job.replace({"run.storage": str(tmp_path)})
    expected = train(here, lambda record: None)
    run = Folder.open(job.run.storage) / "killed"
    uploading, ended = threading.Event(), threading.Event()

    def stall(method: str, path: str) -> Answer | None:
        if "step_00000004/training_state.pt" in path and method == "PUT" and not ended.is_set():
            uploading.set()
            ended.wait(60)
            return 500, b""
        return None

    proxy.refuse = stall
    process = start(write(job, tmp_path))
    assert uploading.wait(120), "no second checkpoint"
    half = run / "checkpoints" / "step_00000004" / "student"
    deadline = time.monotonic() + 60
    while not half.names() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    ended.set()
    assert half.names(), "part of the checkpoint is there"
    assert [entry["name"] for entry in json.loads((run / "checkpoints").read("checkpoints.json"))] == ["step_00000002"]

    result = train(job, lambda record: None)
    assert_same_weights(weights_on(result["student"]), student_weights(expected))
    assert result["last"] == expected["last"] and result["best"] == expected["best"]
    records = [json.loads(line) for line in run.read("log.jsonl").splitlines()]
    steps = [record["step"] for record in records if "losses" in record]
    assert steps == list(range(1, steps[-1] + 1)), "a step is missing from the log, or there twice"


@pytest.mark.slow
def test_a_search_on_s3_is_found_and_analyzed_there(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = SearchFolder(Folder.open(uri("bucket", s3, "searches")) / "s")
    searched(folder)
    assert analyze.main([folder.folder.uri]) == 0
    assert "best: trial" in capsys.readouterr().out
    assert {"index.html", "best.yaml"} <= {*(folder.folder / "analysis").names()}
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(yaml.safe_dump(JOB))
    text = {"run": {"name": "s"}, "job": "job.yaml", "space": {"optim.lr": {"uniform": [0.01, 0.02]}}, "budget": {"trials": 2}}
    Path("search.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(SystemExit):
        tune.main(["search.yaml", f"run.storage={uri('bucket', s3, 'searches')}"])
    assert f"{folder.folder.uri} is already a search" in capsys.readouterr().err


def test_the_log_is_not_uploaded_with_every_record(proxy: Proxy, splits: dict[str, str]) -> None:
    train(job_on(proxy.netloc, splits, "logged"), lambda record: None)
    uploads = [path for method, path in proxy.seen if method == "POST" and path.endswith("logged/log.jsonl?uploads")]
    assert 1 <= len(uploads) <= 4, "2 epochs, an evaluation and the end; 13 records"


@pytest.mark.slow
def test_credentials_that_expire_during_a_run(
    proxy: Proxy, splits: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is one clear error, and with new credentials the same command resumes."""
    job_file = write(job_on(proxy.netloc, splits, "expired"), tmp_path)
    over = threading.Event()

    def expire(method: str, path: str) -> Answer | None:
        if "step_00000012/" in path:
            over.set()
        return EXPIRED if over.is_set() else None

    proxy.refuse = expire
    message = refused([job_file], capsys)
    assert over.is_set(), "it was not the second checkpoint that failed"
    assert message.count("error: ") == 1 and "runs/expired" in message
    assert "the credentials have expired; sign in again" in message and "AWS Error" not in message
    proxy.refuse = lambda method, path: None
    assert main([job_file]) == 0
    assert "step 7/12" in capsys.readouterr().out


def test_wrong_credentials_are_one_clear_error_before_anything_starts(
    drawn_splits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server checks them: an unknown key, a wrong secret, a user without rights."""
    import boto3

    # moto does not check credentials in the first requests, which set it up.
    with moto_server(tmp_path, {**nobody(), "INITIAL_NO_AUTH_ACTION_COUNT": "3"}) as url, Proxy(url) as proxy:
        for name, value in nobody().items():
            monkeypatch.setenv(name, value)
        boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="bucket")
        iam = boto3.client("iam", endpoint_url=url, region_name="us-east-1")
        iam.create_user(UserName="somebody")
        key = iam.create_access_key(UserName="somebody")["AccessKey"]
        job = write(job_on(proxy.netloc, drawn_splits, "refused"), tmp_path)
        cases = {
            ("nobody", "nothing"): "unknown access key; set AWS_ACCESS_KEY_ID",
            (key["AccessKeyId"], "nothing"): "the secret key does not belong to this access key; set",
            (key["AccessKeyId"], key["SecretAccessKey"]): "access denied: ",
        }
        for (access, secret), expected in cases.items():
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
            proxy.seen.clear()
            message = refused([job], capsys)
            assert message.startswith("error: run.storage: s3://bucket/runs/refused?") and expected in message, message
            assert len(message.splitlines()) == 1 and "AWS Error" not in message
            assert len(proxy.seen) < 3, "it was tried again"


def test_other_mistakes_in_the_address(
    s3: str, drawn_splits: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write(micro_job(tmp_path, drawn_splits), tmp_path)
    query = f"endpoint_override={s3}&scheme=http"
    cases = {
        f"s3://nosuchbucket/runs?{query}": "there is no such bucket; create it, or correct the URI",
        f"s3://bucket/runs?{query}&regoin=x": "Unexpected query parameter in S3 URI: 'regoin'; correct the URI",
        "s3://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http": "cannot be reached; check the network",
        f"s3://nobody:nothing@bucket/runs?{query}": "has a password in it, which would be written into job.json",
    }
    for storage, expected in cases.items():
        message = refused([job, f"run.storage={storage}"], capsys)
        assert message.startswith("error: run.storage: s3://") and expected in message, message
        assert len(message.splitlines()) == 1 and "nothing@" not in message


@pytest.mark.slow
def test_a_run_on_ray_train(s3: str, splits: dict[str, str], tmp_path: Path) -> None:
    """Checkpoints, log and student of Ray Train's workers are on S3, and the same command finds that the run has ended."""
    job = job_on(s3, splits, "on_ray", cluster={"workers": 1, "cpus_per_worker": 1, "data_cpus": 1})
    run = Folder.open(job.run.storage) / "on_ray"
    assert start(write(job, tmp_path)).wait() == 0
    result = json.loads(run.read("result.json"))
    here = job.replace(
        {
            "run.storage": str(tmp_path),
            "cluster.workers": 0,
        }
    )
    assert_same_weights(weights_on(result["student"]), student_weights(train(here, lambda record: None)))
    records = [json.loads(line) for line in run.read("log.jsonl").splitlines()]
    assert [record["step"] for record in records if "losses" in record] == list(range(1, 13))
    assert start(write(job, tmp_path)).wait() == 0


@pytest.mark.slow
def test_a_search_on_ray_tune(s3: str, splits: dict[str, str], tmp_path: Path) -> None:
    """Its trials, their runs and its analysis are on S3, and it can be resumed from there."""
    job = job_on(s3, splits, "base", eval={"every_epochs": 1}, cluster={"workers": 0, "address": "local"})
    search = {"run": {"name": "search", "storage": job.run.storage}, "job": write(job, tmp_path)}
    search |= {"space": {"optim.lr": {"choice": [0.01, 0.02]}}, "searcher": {"kind": "grid"}, "budget": {"trials": 1}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "headkd_ray.tune", str(tmp_path / "search.yaml")]
    folder = SearchFolder.open(uri("bucket", s3, "runs/search"))
    for count, further in ((1, []), (2, ["--resume", "budget.trials=2"])):
        done = subprocess.run([*command, *further], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert [trial.state for trial in folder.trials()] == ["finished"] * count
    assert "trial 0  " not in done.stdout.split("search: 2 trials")[0], "an ended trial ran again"
    assert all(weights_on(trial.results["0"]["student"]) for trial in folder.trials())
    assert analyze.main([folder.folder.uri]) == 0
    assert (folder.folder / "analysis").has("index.html") and not folder.folder.has("tune")
