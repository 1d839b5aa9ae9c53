"""The Python API that docs/api.md describes."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import headkd_ray
from headkd_ray.data.synthetic import draw_dataset
from tests.support import micro_job

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = draw_dataset(tmp_path / "drawn", train=8, val=3)
    shutil.copy(drawn.train, "train.json")
    shutil.copy(drawn.val, "val.json")
    Path("photos").symlink_to(drawn.images)
    splits = {"train": "data/train", "val": "data/val"}
    job = micro_job(tmp_path / "runs", splits, optim={"epochs": 1, "milestones": []})
    Path("job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "docs/api.md", "exec"), {})
    said = capsys.readouterr().out
    assert re.search(r"^AP 0\.\d{3}$", said, re.MULTILINE)
    assert f"detections on {len(list(drawn.images.iterdir()))} images: found/detections.json" in said
    assert (tmp_path / "runs" / "mine" / "result.json").exists() and (tmp_path / "found" / "detections.json").exists()


def test_the_page_s_signatures_are_the_functions() -> None:
    table = re.findall(r"^\| `([\w.]+)\((.*?)\)` \|", PAGE, re.MULTILINE)
    assert len(table) == 9
    for name, arguments in table:
        function = headkd_ray
        for part in name.split("."):
            function = getattr(function, part)
        parameters = inspect.signature(function).parameters
        named = [re.split(r"=", each.strip())[0].lstrip("*") for each in arguments.split(",")]
        assert [each for each in named if each not in ("", "…")] == [*parameters][
            : len([n for n in named if n not in ("", "…")])
        ]
        for default in re.findall(r"(\w+)=([\w.]+)", arguments):
            assert str(parameters[default[0]].default) == default[1]


def test_the_import_is_cheap_and_commands_stay_modules() -> None:
    code = """
import sys, headkd_ray
assert "torch" not in sys.modules and "ray" not in sys.modules
assert headkd_ray.train is sys.modules["headkd_ray.train"] and callable(headkd_ray.train) and callable(headkd_ray.train.main)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(headkd_ray.predict) and callable(headkd_ray.predict.predict_parts)
    with pytest.raises(AttributeError, match="module 'headkd_ray' has no attribute 'nothing'"):
        _ = headkd_ray.nothing
