"""Fixtures of the whole session: a small Ray cluster and a small drawn data set. Ray reads its environment when imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.update(
    RAY_AUTH_MODE="disabled",  # otherwise Ray writes a token into the user's home
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",  # as in a cluster that a run starts for itself (cluster.connect.OWN_CLUSTER)
    RAY_idle_worker_killing_time_threshold_ms="600000",
    OMP_NUM_THREADS="1",
)
os.environ.pop("RAY_ADDRESS", None)
TESTS = Path(__file__).parent
USE_RAY = (TESTS / "cluster", TESTS / "tuning")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process of pytest-xdist, and all that use Ray: its runs join a cluster that is there."""
    for item in items:
        group = "ray" if any(folder in item.path.parents for folder in USE_RAY) else str(item.path.relative_to(TESTS))
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session", autouse=True)
def _heed_ctrl_c() -> None:
    """Restore Python's handler of SIGINT, which a shell ignores for what it starts in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Start Ray on this machine with 4 logical CPUs, without GPU and dashboard."""
    ray = pytest.importorskip("ray")
    last = 3
    for attempt in range(1, last + 1):
        try:
            ray.init(
                "local", num_cpus=4, num_gpus=0, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False
            )
            break
        except Exception:  # on a busy machine Ray's agents miss their limit of 15 s
            if attempt == last:
                raise
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def drawn_splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return prepared splits of a few drawn images: {"train": folder of 42 images, "val": folder of 10}."""
    from headkd_ray.data.packing import prepare_split
    from headkd_ray.data.synthetic import draw_dataset

    folder: Path = tmp_path_factory.mktemp("drawn")
    drawn = draw_dataset(folder, train=42, val=10)
    splits = {"train": (drawn.train, folder / "train"), "val": (drawn.val, folder / "val")}
    for coco_json, out in splits.values():
        prepare_split(str(coco_json), str(drawn.images), str(out), shard_images=16, row_group=4)
    return {name: str(out) for name, (_, out) in splits.items()}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of this checkout and return a folder with its content, as pip installs it."""
    built, site = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(built)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield host:port of an S3 server with a bucket "bucket"; this process and its children have its credentials."""
    boto3 = pytest.importorskip("boto3")
    from tests.s3 import moto_server, nobody

    with pytest.MonkeyPatch.context() as patch, moto_server(tmp_path_factory.mktemp("moto"), nobody()) as url:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in nobody().items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="bucket")
        yield url.removeprefix("http://")
