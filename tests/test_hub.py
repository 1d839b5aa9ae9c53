"""Checkpoints on the Hugging Face Hub: pushed and read back through the real huggingface_hub and a server on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants

from headkd_ray import evaluate, predict, push, train
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.detectors.weights.fetch import fetch_detector
from headkd_ray.errors import UserError
from headkd_ray.job import Job, load_job
from headkd_ray.report.model_card import model_card
from headkd_ray.storage import Folder
from tests.detectors.micro import transformers_spec
from tests.hub import READ, WRITE, Hub, serve
from tests.support import MICRO_TEACHER, edit, micro_job, micro_teacher

ONE_EPOCH = {"epochs": 1, "milestones": []}
FILES = ["README.md", "model.json", "model.safetensors"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Yield a hub that huggingface_hub uses in this test, with an empty cache and a token with write access."""
    with serve() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITE)
        yield served


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, drawn_splits: dict[str, str]) -> Path:
    """Return the folder of a finished run of one epoch."""
    storage = tmp_path_factory.mktemp("runs")
    job = micro_job(storage, drawn_splits, "taught", student=MICRO_TEACHER, optim=ONE_EPOCH, eval={"every_epochs": 1})
    (storage / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    assert train.main([str(storage / "job.yaml")]) == 0
    return storage / "taught"


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *arguments: str) -> str:
    """Return the message of a command that refuses its input."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_pushed_student_is_a_checkpoint_for_every_command(
    hub: Hub, run: Path, drawn_splits: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push.main([str(run / "student"), "me/tiny", "--license", "mit", "--private"]) == 0
    assert f"{hub.url}/me/tiny/commit/{hub.sha('me/tiny', 1)}" in capsys.readouterr().out
    assert sorted(hub.files("me/tiny")) == FILES and hub.private == {"me/tiny"}
    for name in FILES[1:]:
        assert hub.files("me/tiny")[name] == (run / "student" / name).read_bytes()

    own, pushed = tmp_path / "own.json", tmp_path / "pushed.json"
    assert evaluate.main([str(run / "student"), drawn_splits["val"], "--out", str(own)]) == 0
    assert evaluate.main(["hf://me/tiny", drawn_splits["val"], "--out", str(pushed)]) == 0
    assert own.read_bytes() == pushed.read_bytes()
    image = next((Path(drawn_splits["val"]).parent / "images").glob("*.jpg"))
    assert predict.main([f"hf://me/tiny@{hub.sha('me/tiny', 1)}", str(image), "--out", str(tmp_path / "found")]) == 0
    taught = {"method": "akd", "teacher": {"checkpoint": "hf://me/tiny@main"}}
    for sections in (taught, {"student": {**MICRO_TEACHER, "checkpoint": "hf://me/tiny"}}):
        job = micro_job(tmp_path, drawn_splits, f"run{len(sections)}", optim=ONE_EPOCH, eval={"every_epochs": 1}, **sections)
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
        assert train.main([str(tmp_path / "job.yaml")]) == 0
    gone = ["run.name=gone", "student.checkpoint=hf://me/gone", "teacher.checkpoint=hf://me/gone", "method=akd"]
    said = refused(capsys, train.main, str(tmp_path / "job.yaml"), *gone)
    assert "teacher.checkpoint: hf://me/gone: no such model repository" in said


def test_the_card_tells_what_the_run_was(hub: Hub, run: Path, drawn_splits: dict[str, str], tmp_path: Path) -> None:
    card = push.repository_files(str(run / "student"), "me/tiny", "mit")["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "headkd_ray",
        "pipeline_tag": "object-detection",
        "tags": ["headkd_ray", "object-detection", "faster_rcnn"],
        "license": "mit",
    }
    result = json.loads((run / "result.json").read_text())
    best, classes = result["best"], ShardSet.open(drawn_splits["train"]).meta.classes
    assert f"| {best['AP']:.1f} | {best['AP50']:.1f} | {best['AP75']:.1f} |" in text
    for name in classes:
        assert f"\n| {name} | {best['per_class'][name]:.1f} |\n" in text
    assert ", ".join(classes) in text and f"fingerprint of data.val: {result['data']['data.val']}\n" in text
    assert "python -m headkd_ray.predict hf://me/tiny photos --out found" in text
    job = text.partition("```yaml\n")[2].partition("\n```")[0]
    (tmp_path / "job.yaml").write_text(job)
    assert load_job(tmp_path / "job.yaml") == Job.model_validate(json.loads((run / "job.json").read_text()))
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    assert push.repository_files(str(checkpoint / "student"), "me/tiny", "mit")["README.md"].decode() == card


def test_a_copy_of_a_checkpoint_has_a_card_without_job(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, out = tmp_path / "copy", tmp_path / "card"
    Folder.open(copy).copy_from(Folder.open(run / "student"))
    assert push.main([str(copy), "me/tiny", "--to-folder", str(out)]) == 0
    assert "names no licence" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == FILES
    card = (out / "README.md").read_text()
    assert "\n## Results\n" in card and "Job file" not in card and "fingerprint" not in card
    assert push.main([str(copy), "me/tiny", "--to-folder", str(out)]) == 0  # the same again changes nothing
    edit(out / "README.md", "## Results", "## My results")
    said = refused(capsys, push.main, str(copy), "me/tiny", "--to-folder", str(out))
    assert said.startswith(f"error: {out}/README.md: is there with other content")
    assert "## My results" in (out / "README.md").read_text()


def test_names_in_a_card_cannot_be_markdown_or_html() -> None:
    model = {
        "classes": ["a|b", "<img src=x>", "*c*", "two\nlines"],
        "spec": {"kind": "fcos", "backbone": {"name": "resnet18"}},
        "meta": {"method": "tf_head", "metrics": {"AP": None, "per_class": {"a|b": 1}}},
    }
    job = {"run": {"name": "```\n<b>"}, "data": {"train": "s3://bucket/x?X-Amz-Signature=abc"}}
    card = model_card("me/tiny", model, job)
    assert "\n\na\\|b, &lt;img src=x&gt;, \\*c\\*, two lines\n\n" in card and "\n| a\\|b | 1.0 |\n" in card
    assert "\n````yaml\n" in card and "abc" not in card
    assert "by the method tf\\_head; see [HEAD" in card and "| – | – |" in card and "knowledge-distillation" in card


def test_a_second_push_replaces_the_files_and_a_commit_still_names_the_first(
    hub: Hub, run: Path, drawn_splits: dict[str, str], tmp_path: Path
) -> None:
    other = micro_teacher(tmp_path / "other", ["cat"])
    for checkpoint in (str(run / "student"), other):
        assert push.main([checkpoint, "me/tiny"]) == 0
    first = f"hf://me/tiny@{hub.sha('me/tiny', 1)}"
    assert fetch_detector("hf://me/tiny").classes == ("cat",)
    assert fetch_detector(first).classes == ShardSet.open(drawn_splits["train"]).meta.classes
    one, same = fetch_detector(first).detector.state_dict(), fetch_detector(str(run / "student")).detector.state_dict()
    assert all(torch.equal(one[name], same[name]) for name in same)


def test_only_the_checkpoint_s_files_are_fetched(hub: Hub, tmp_path: Path) -> None:
    checkpoint = Path(micro_teacher(tmp_path / "teacher", ["cat"]))
    files = {name: (checkpoint / name).read_bytes() for name in FILES[1:]}
    hub.put("me/tiny", {**files, "modeling.py": b"raise SystemExit('run')", "pytorch_model.bin": b"", "sub/model.json": b"{}"})
    assert fetch_detector("hf://me/tiny").classes == ("cat",)
    fetched = {path.rpartition("/resolve/")[2].partition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == set(FILES[1:])
    assert {path.name for path in (tmp_path / "cache").glob("*/snapshots/*/*")} == set(FILES[1:])


def test_a_detector_of_transformers_is_pushed_and_fetched_as_the_hub_has_it(hub: Hub, tmp_path: Path) -> None:
    """A pushed checkpoint has the files that transformers reads, and a repository without our model.json is a detector, too."""
    torch.manual_seed(0)
    detector = build_detector(transformers_spec(), 2)
    save_detector(tmp_path, detector, ("ant", "bee"))
    files = push.repository_files(str(tmp_path), "me/detr")
    assert sorted(files) == ["README.md", "config.json", "model.json", "model.safetensors", "preprocessor_config.json"]
    assert "An object detector: `rt_detr` of `transformers`, for 2 classes." in files["README.md"].decode()
    assert 'pip install "headkd-ray[hub,teachers]"' in files["README.md"].decode()
    hub.put("their/detr", {name: content for name, content in files.items() if name != "model.json"})
    loaded = fetch_detector("hf://their/detr")
    assert (loaded.source, loaded.classes) == ("transformers", ("ant", "bee"))
    for name, tensor in detector.state_dict().items():
        assert torch.equal(loaded.detector.state_dict()[name], tensor)


def test_cached_files_serve_without_a_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Path(micro_teacher(tmp_path / "teacher", ["cat"]))
    hub.put("me/tiny", {name: (checkpoint / name).read_bytes() for name in FILES[1:]})
    assert fetch_detector("hf://me/tiny").classes == ("cat",)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch_detector("hf://me/tiny").classes == ("cat",)
    with pytest.raises(
        UserError, match=r"^hf://me/other: http://127\.0\.0\.1:9 cannot be reached, and the files are not in the"
    ):
        fetch_detector("hf://me/other")


@pytest.mark.parametrize(
    ("address", "token", "message"),
    [
        ("hf://tiny", WRITE, "hf://tiny: is not the address of a model repository; write hf://owner/name, or "),
        ("hf://me/tiny/student", WRITE, "hf://me/tiny/student: is not the address of a model repository"),
        (
            "hf://me/none",
            WRITE,
            "hf://me/none: no such model repository on {url}, or it is private; correct the address, or log in",
        ),
        ("hf://me/secret", None, "hf://me/secret: no such model repository on {url}, or it is private"),
        ("hf://me/empty@v2", WRITE, "hf://me/empty@v2: the repository has no branch, tag or commit 'v2'"),
        (
            "hf://me/empty",
            READ,
            "hf://me/empty: is not a checkpoint of headkd_ray; the repository has no model.json and no model.safetensors",
        ),
        ("hf://me/damaged", WRITE, "hf://me/damaged/model.json: not JSON: "),
    ],
)
def test_what_cannot_be_fetched_is_told_in_a_sentence(
    address: str, token: str | None, message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("me/empty", {"README.md": b"nothing here"})
    hub.put("me/secret", {})
    hub.put("me/damaged", {"model.json": b"{", "model.safetensors": b""})
    hub.private.add("me/secret")
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as caught:
        fetch_detector(address)
    assert str(caught.value).startswith(message.format(url=hub.url))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "pushing a checkpoint needs a token with write access: log in (hf auth login), or set HF_TOKEN"),
        (READ, "hf://me/tiny: {url} refuses (status 403: You don't have the rights to create a model); the token lacks"),
        ("hf_old", "hf://me/tiny: {url} refuses (status 401: Invalid token); the token is not valid: log in"),
    ],
)
def test_a_push_without_access_is_told_in_a_sentence(
    token: str | None, message: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    checkpoint = micro_teacher(tmp_path / "teacher", ["cat"])
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    said = refused(capsys, push.main, checkpoint, "me/tiny", "--license", "mit")
    assert said.startswith("error: " + message.format(url=hub.url))
    assert not hub.commits


def test_a_push_without_network_is_told_in_a_sentence(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = refused(capsys, push.main, micro_teacher(tmp_path / "teacher", ["cat"]), "me/tiny")
    assert said.startswith("error: hf://me/tiny: http://127.0.0.1:9 cannot be used (ConnectError: ")
    assert said.endswith("; check the network")


def test_nothing_meant_to_be_private_goes_into_a_public_repository(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.put("me/tiny", {})
    said = refused(capsys, push.main, micro_teacher(tmp_path / "teacher", ["cat"]), "me/tiny", "--private")
    assert said.startswith("error: hf://me/tiny: is a public repository already; make it private first")
    assert hub.files("me/tiny") == {}


def test_what_is_no_checkpoint_of_ours_is_not_pushed(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Path(micro_teacher(tmp_path / "teacher", ["cat"]))
    said = refused(capsys, push.main, str(checkpoint / "model.safetensors"), "me/tiny")
    assert "model.safetensors and model.json missing; only a checkpoint of headkd_ray can be pushed" in said
    edit(checkpoint / "model.json", '"cat"', "")
    assert "classes: Tuple should have at least 1 item" in refused(capsys, push.main, str(checkpoint), "me/tiny")
    assert "me: is not the name of a repository; write owner/name" in refused(capsys, push.main, str(checkpoint), "me")
    assert not hub.commits


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Path(micro_teacher(tmp_path / "teacher", ["cat"]))
    hub.put("me/tiny", {name: (checkpoint / name).read_bytes() for name in FILES[1:]})
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=r"^hf://me/tiny: the cache .*/file cannot be written \(.*\); set HF_HOME to another folder$"
    ):
        fetch_detector("hf://me/tiny")


def test_without_huggingface_hub_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'^hf://me/tiny needs huggingface_hub .* pip install "headkd-ray\[hub\]"$'):
        fetch_detector("hf://me/tiny")
