"""optim.compile: the same losses, the same checkpoints, and one clear error where torch.compile cannot work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from headkd_ray.engine.compiling import COMPILED, Compilations, compile_modules
from headkd_ray.engine.loop import restore, save
from headkd_ray.engine.step import build_learner
from headkd_ray.errors import TrainingError
from headkd_ray.train import train
from tests.gpu.models import model_of, step
from tests.support import micro_job


def test_a_missing_compiler_is_told_before_training(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(TrainingError) as caught:
        train(micro_job(tmp_path, drawn_splits, optim={"compile": "default"}))
    (problem,) = caught.value.problems
    assert problem.startswith("optim.compile: torch.compile does not work on this machine (InvalidCxxCompiler: No working C++")
    assert problem.endswith("or set optim.compile=null")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow  # C++ compilers take minutes
def test_a_compiled_step_is_that_of_the_same_modules_uncompiled(tmp_path: Path) -> None:
    plain, compiled = (model_of("head", "retinanet", "faster_rcnn") for _ in range(2))
    job = micro_job(tmp_path, {"train": "none", "val": "none"})
    cpu = torch.device("cpu")
    learners = [build_learner(job, model, cpu, 2, 10) for model in (plain, compiled)]
    told = Compilations()
    compile_modules(compiled, "default")
    assert sum(isinstance(module, COMPILED) for module in compiled.modules()) == 3
    expected, found = step(plain, cpu), step(compiled, cpu)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (plain, compiled)]
    assert (gradients[1] - gradients[0]).norm() <= 1e-3 * gradients[0].norm()
    note = told.note(1)
    assert note is not None and re.fullmatch(r"torch.compile made (\d+) graphs by step 1, \1 in all; that slowed .*", note)
    step(compiled, cpu)
    assert told.note(2) is None, "nothing was compiled again"

    save(learners[1], tmp_path, {})
    learners[0].step = -1
    restore(learners[0], tmp_path, {})  # a run goes on without torch.compile
    assert learners[0].step == 0
    for name, tensor in compiled.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name
