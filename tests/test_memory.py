"""Running out of memory ends in a message that names what to lower. tests/gpu covers the GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from headkd_ray.errors import DeviceMemoryError
from headkd_ray.memory import enough_memory
from tests.support import micro_job

TRAIN_WITH_LITTLE_MEMORY = """
import re, resource, sys
from pathlib import Path
import torch
import headkd_ray.engine.local, headkd_ray.engine.preflight
from headkd_ray.train import main
torch.set_num_threads(1)
now = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, (now + (700 << 20),) * 2)
sys.exit(main(sys.argv[1:]))
"""


def test_what_torch_cannot_allocate_is_told() -> None:
    raises = pytest.raises(DeviceMemoryError, match=r"^drawing: out of memory on this machine; draw less$")
    with raises, enough_memory("drawing", "draw less"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="must match"), enough_memory("adding", "add less"):
        torch.zeros(2) + torch.zeros(3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux does")
def test_a_run_that_does_not_fit_names_the_keys_and_their_values(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """The error is real: 16 images of 1500 pixels where 700 MB are left."""
    job = micro_job(tmp_path, drawn_splits, "large", data={"short_side": [1500, 1500], "long_side": 1600, "batch_size": 16})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    command = [sys.executable, "-c", TRAIN_WITH_LITTLE_MEMORY, str(tmp_path / "job.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (text,) = re.findall(r"^error: run large, training: out of memory on this machine; (.+)", done.stderr, re.MULTILINE)
    assert "lower data.batch_size (16) and raise optim.accumulate (1) as much" in text and "data.short_side (1500)" in text
