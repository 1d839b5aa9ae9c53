"""All HTML pages, opened in headless Chromium: they hold together by themselves, at the width of a screen and of a phone.

The browser is the program that HEADKD_CHROMIUM names, or one on PATH; without one, these tests are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headkd_ray import analyze, compare, evaluate
from headkd_ray.train import train
from tests.browser import NAMES, VARIABLE, Browser, browser, chromium
from tests.checkup.test_doctor import examined as examined  # the command's output for data with faults, a fixture
from tests.checkup.test_doctor import faulty as faulty
from tests.support import micro_job
from tests.tuning.test_analysis import folder as folder  # a search's files, a fixture
from tests.tuning.test_analysis import searched

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip(f"no browser: set {VARIABLE}, or put one of {', '.join(NAMES)} on PATH")
    with browser(program, tmp_path_factory.mktemp("profile")) as running:
        yield running


def check(opened: Browser, page: Path, pictures: bool | None) -> None:
    """Open a page wide and narrow, in light and dark mode; nothing in it may fail, ask for anything or stick out."""
    for width, dark in ((1000, False), (400, True)):
        seen = opened.open(page, width, dark)
        assert seen.errors == [] and seen.requests == []
        layout = seen.layout
        assert layout["broken"] == 0 and pictures in (None, layout["images"] > 0)
        assert layout["overflow"] <= 0 and layout["wide"] == [], f"{page.name} at {width}"


def test_the_pages_of_runs(opened: Browser, tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    runs = []
    for name, rate in (("slow", 0.01), ("fast", 0.03)):
        report = name == "slow"
        log = {"report": report, "every_steps": 5}
        job = micro_job(tmp_path, drawn_splits, name, optim={"epochs": 1, "milestones": [], "lr": rate}, log=log)
        runs.append(train(job)["student"])
    folders = [str(Path(student).parent) for student in runs]
    assert compare.main([*folders, "--out", str(tmp_path / "compared")]) == 0
    assert evaluate.main([runs[0], drawn_splits["val"], "--report", str(tmp_path / "student.html")]) == 0
    check(opened, tmp_path / "slow" / "report.html", pictures=True)
    check(opened, tmp_path / "student.html", pictures=True)
    check(opened, tmp_path / "compared" / "compare.html", pictures=None)


def test_the_page_of_the_doctor(opened: Browser, examined: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "doctor.html"
    page.write_text(examined["page"])
    check(opened, page, pictures=True)


def test_the_page_of_a_search(opened: Browser, folder: object) -> None:
    searched(folder)  # type: ignore[arg-type]
    place = Path(folder.folder.path)  # type: ignore[attr-defined]
    assert analyze.main([str(place)]) == 0
    check(opened, place / "analysis" / "index.html", pictures=False)


def test_what_is_wrong_with_a_page_is_seen(opened: Browser, tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        "<!doctype html><body><img src='data:image/jpeg;base64,AAAA'><div style='width: 3000px'>wide</div>"
        "<script src='http://127.0.0.1:9/x.js'></script><script>console.log('said'); nothing()</script>"
    )
    seen = opened.open(page)
    assert any("said" in each for each in seen.errors) and any("nothing is not defined" in each for each in seen.errors)
    assert seen.requests == ["http://127.0.0.1:9/x.js"]
    assert seen.layout["broken"] == 1 and seen.layout["overflow"] > 1000 and seen.layout["wide"] == ["DIV wide"]
