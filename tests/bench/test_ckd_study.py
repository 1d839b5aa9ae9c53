"""The study of CKD: variants are valid jobs, measuring does not touch the training, and tables say what was measured."""

import copy
from collections.abc import Iterator

import ckd_study
import pytest
import torch
from common_states import common_share
from evidence_plan import Bench, plan

from headkd_ray.data.shards import ShardSet
from headkd_ray.distill import build_training_model
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.step import build_learner
from headkd_ray.engine.streams import Streams, decode_here


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_every_variant_is_a_valid_job(micro: Bench) -> None:
    jobs = {name: plan(micro, v.row, 0).job.replace(v.keys) for name, v in ckd_study.VARIANTS.items()}
    assert len({job.model_dump_json() for job in jobs.values()}) == len(jobs) - 2, "two differ in the adapters' rate alone"


@pytest.mark.parametrize("row", ["baseline", "tf_head", "tf_head_pearson"])
def test_a_measurement_leaves_the_model_as_it_was(micro: Bench, row: str) -> None:
    job = plan(micro, row, 0).job.replace({"data.batch_size": 2, "distill.warmup_steps": 0})
    shards = ShardSet.open(job.data.train)
    model = build_training_model(job, len(shards.meta.classes), None, steps_per_epoch=10).train()
    before = copy.deepcopy(model.state_dict())
    with Streams(job, Distributed.here(job.cluster), shards, shards, decode_here).train(0) as batches:
        found = ckd_study.measure(model, next(batches), 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    names = {"detection"} | ({"assistant", "fcos_ckd", "rcnn_ckd"} if row != "baseline" else set())
    assert found["losses"].keys() == found["tap"].keys() == found["backbone"].keys() == names
    for place in ("tap", "backbone"):
        assert found[place]["detection"]["cosine"] == pytest.approx(1, abs=1e-3) and found[place]["detection"]["norm"] > 0
        assert all(abs(each["cosine"] or 0) < 1.001 for each in found[place].values())
    if row != "baseline":
        assert found["tap"]["assistant"]["norm"] == 0, "the assistant's own losses reach the student's pyramid, not its head"
        assert found["tap"]["rcnn_ckd"]["norm"] > 0 and 0 <= found["anchor_background"] <= 1
        assert found["targets"].keys() == {"fcos", "rcnn"}


def test_adapters_can_have_a_rate_of_their_own(micro: Bench) -> None:
    job = plan(micro, "tf_head", 0).job
    model = build_training_model(job, 8, None, steps_per_epoch=10)
    learner = build_learner(job, model, torch.device("cpu"), 8, 10)
    ckd_study.adapters_apart(learner, 0.1, lambda step: (step + 1) / 100)
    for _ in range(3):
        learner.optimizer.step()
        learner.scheduler.step()
    rest, adapters = learner.optimizer.param_groups
    assert adapters["lr"] == pytest.approx(rest["lr"] * 0.1) and rest["lr"] == pytest.approx(job.optim.lr * 0.04)
    assert {id(p) for p in adapters["params"]} == {id(p) for term in model.terms for p in term.parameters()}
    assert len(rest["params"]) + len(adapters["params"]) == len([p for p in model.parameters() if p.requires_grad])


def test_the_tables_give_shares_of_the_detection_loss_s_gradient() -> None:
    def measured(step: int, norm: float) -> dict[str, object]:
        grads = {"detection": {"norm": 2.0, "cosine": 1.0}, "ckd": {"norm": norm, "cosine": -0.5}}
        return {"step": step, "losses": {"detection": 1.0, "ckd": 3.0}, "tap": grads, "backbone": grads, "targets": {}}

    at = [measured(99, 2.0), measured(199, 4.0), measured(299, 8.0)]
    text = ckd_study.tables([{"variant": "head", "seed": 0, "val_AP": 21.25, "at": at}])
    assert "| head | 21.2 |" in text
    assert "| ckd | first third | 3.00 | 1.00 | -0.50 | 1.00 | -0.50 |" in text
    assert "| ckd | last third | 3.00 | 4.00 | -0.50 | 4.00 | -0.50 |" in text


def test_what_rows_have_in_common_is_measured() -> None:
    apart, same = torch.randn(400, 64), torch.randn(1, 64).expand(400, 64)
    assert common_share(apart) < 0.02 and common_share(same) == pytest.approx(1, abs=1e-3)
    assert 0.3 < common_share(apart + same) < 0.7
