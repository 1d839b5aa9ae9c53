"""``ray job submit --working-dir .`` uploads little and no secrets, checked with Ray's own packaging code."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECRETS = [
    ".env",
    ".env.production",
    "jobs/.env",
    "prod.env",
    ".netrc",
    ".aws/credentials",
    ".ssh/id_ed25519",
    ".ray/auth_token",
    ".kube/config",
    ".config/gcloud/application_default_credentials.json",
    "id_rsa",
    "jobs/id_rsa.pub",
    "ray-autoscaler_us-east-1.pem",
    "headkd_ray/server.key",
    "bucket_credentials.csv",
    "secrets.yaml",
    ".s3cfg",
    ".boto",
    ".mc/config.json",
    "jobs/rclone.conf",
    ".huggingface/token",
    ".kaggle/kaggle.json",
    "service-account-headkd.json",
    "infra/terraform.tfstate",
    "wallet.keystore",
    ".vault-token",
]
BULK = [
    "runs/head_r18/student/model.safetensors",
    "data/coco/train/00000.parquet",
    "checkpoints/teacher.pth",
    ".venv/bin/python",
    ".cache/uv/wheel",
    ".mypy_cache/3.10/cache.json",
    "headkd_ray/__pycache__/train.cpython-312.pyc",
    "driver.log",
]
OWN = ["mine/model.py", "mine/credentials.py", "jobs/mine.yaml", "environment.yaml", "keys.txt"]
"""Files that a user may add and means to upload."""


def uploaded(folder: Path, out: Path) -> dict[str, int]:
    """Return the files of the package that Ray makes of a working directory, with their sizes."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = out / "package.zip"
    package.unlink(missing_ok=True)  # Ray would reuse an existing one
    create_package(str(folder), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(package) as archive:
        return {entry.filename: entry.compress_size for entry in archive.infolist() if not entry.is_dir()}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the files that are in git, or would be."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    folder = tmp_path / "checkout"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_a_fresh_checkout_is_small_and_whole(checkout: Path, tmp_path: Path) -> None:
    files = uploaded(checkout, tmp_path)
    assert sum(files.values()) < 5e6, sorted(files.items(), key=lambda item: -item[1])[:5]
    package = {str(file.relative_to(checkout)) for file in (checkout / "headkd_ray").rglob("*.py")}
    jobs = {str(file.relative_to(checkout)) for file in (checkout / "jobs").rglob("*.yaml")}
    assert len(package) > 50 and len(jobs) > 10
    assert files.keys() >= package | jobs | {"pyproject.toml", "requirements.lock", "setup.sh"}
    assert not [name for name in files if name.startswith(("tests/", "docs/", ".git/", ".ci/"))]


def test_secrets_and_outputs_stay_here(checkout: Path, tmp_path: Path) -> None:
    before = uploaded(checkout, tmp_path)
    for name in SECRETS + BULK + OWN:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("planted")
    added = uploaded(checkout, tmp_path).keys() - before.keys()
    assert added == set(OWN)
