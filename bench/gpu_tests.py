"""The part "tests" of ``bench/gpu.sh``: run the tests marked gpu and record each as it ends."""

from __future__ import annotations

import os
import sys

import pytest
from gpu_results import Results, setting
from revision import ROOT


class Notes:
    """A pytest plugin that records the outcome of each test."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:  # set-up and tear-down are recorded only if they skip or fail
            return
        name = report.nodeid.removeprefix("tests/gpu/")
        row = {"test": name, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            row["error"] = report.longreprtext[-3000:]
        self.results.add(row)


def main() -> int:
    """Run the tests and return pytest's exit code."""
    place = setting()
    os.environ["HEADKD_TEST_DEVICE"] = place.device.type
    notes = Notes(Results("tests", place))
    options = ["-q", "-m", "gpu", "--no-header", "--tb=short", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    if place.tiny:
        options += ["-k", "not test_steps or supervised or retinanet-faster_rcnn"]
    return pytest.main(["--rootdir", str(ROOT), *options], plugins=[notes])


if __name__ == "__main__":
    sys.exit(main())
