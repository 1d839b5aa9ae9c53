import pytest
import torch

from headkd_ray.engine.optim import build_optimizer, lr_factor, peak_lr, retune
from headkd_ray.job import OptimSpec


def test_paper_schedule() -> None:
    """Linear warm-up over 500 steps from x0.001, then x0.1 after epochs 8 and 11."""
    spec, epoch = OptimSpec(), 7330  # 117266 images / 16
    assert peak_lr(spec, 16) == pytest.approx(0.01)
    assert lr_factor(spec, 0, epoch) == pytest.approx(0.001)
    assert lr_factor(spec, 250, epoch) == pytest.approx(0.001 + 0.999 / 2)
    assert lr_factor(spec, 500, epoch) == 1
    assert lr_factor(spec, 8 * epoch - 1, epoch) == 1
    assert lr_factor(spec, 8 * epoch, epoch) == pytest.approx(0.1)
    assert lr_factor(spec, 11 * epoch, epoch) == pytest.approx(0.01)


def test_lr_scales_with_the_global_batch() -> None:
    assert peak_lr(OptimSpec(), 4) == pytest.approx(0.0025)
    assert peak_lr(OptimSpec(lr_batch=None), 4) == 0.01


@pytest.mark.parametrize("warmup", [0, 7])
def test_cosine_is_that_of_torch_after_warm_up(warmup: int) -> None:
    spec = OptimSpec(schedule="cosine", warmup_steps=warmup, warmup_ratio=0.1, final_ratio=0.05, epochs=5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50 - warmup, eta_min=0.05)
    for step in range(50):
        if step < warmup:
            assert lr_factor(spec, step, 10) == pytest.approx(0.1 + 0.9 * step / warmup)
            continue
        assert lr_factor(spec, step, 10) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert lr_factor(spec, 50, 10) == pytest.approx(0.05)


def test_one_cycle_is_that_of_torch() -> None:
    """Torch counts steps from 1 to the last, at which its rate is the final one."""
    spec = OptimSpec(schedule="one_cycle", warmup_steps=14, warmup_ratio=1 / 25, final_ratio=1e-3, epochs=5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    shape = {"pct_start": 15 / 51, "div_factor": 25, "final_div_factor": 40, "cycle_momentum": False}
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=51, **shape)
    for step in range(51):
        assert lr_factor(spec, step, 10) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 50:
            reference.step()


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_warm_up_of_the_whole_training_never_falls(schedule: str) -> None:
    spec = OptimSpec(schedule=schedule, warmup_steps=20, epochs=2)
    factors = [lr_factor(spec, step, 10) for step in range(21)]
    assert factors == sorted(factors) and factors[-1] == 1


def test_adamw_with_betas_and_no_decay_of_norms_and_biases() -> None:
    """A step without gradients shrinks what decays, and nothing else."""
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.GroupNorm(1, 2))
    for parameter in module.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    spec = OptimSpec(optimizer="adamw", lr=0.1, betas=(0.8, 0.95), weight_decay=0.5, norm_decay=False, warmup_steps=0)
    optimizer, _ = build_optimizer(spec, module.parameters(), 16, 10)
    assert all(group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)
    optimizer.step()
    values = {name: parameter.unique().item() for name, parameter in module.named_parameters()}
    assert values == {"0.weight": pytest.approx(0.95), "0.bias": 1, "1.weight": 1, "1.bias": 1}


def test_frozen_parameters_stay_out_of_the_optimizer() -> None:
    free, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer, scheduler = build_optimizer(OptimSpec(warmup_steps=0), [free, frozen], 16, 10)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    for _ in range(80):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_backbone_may_have_a_rate_of_its_own(optimizer: str) -> None:
    """It follows the same schedule, and a state that is retuned keeps the two apart."""
    body, head = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    spec = OptimSpec(optimizer=optimizer, lr=0.02, lr_batch=None, backbone_lr_factor=0.1, warmup_steps=4, warmup_ratio=0.5)
    stepper, scheduler = build_optimizer(spec, [body, head], 16, 10, [body])
    rates = [{id(p): group["lr"] for group in stepper.param_groups for p in group["params"]}]
    for _ in range(80):
        stepper.step()
        scheduler.step()
    rates.append({id(p): group["lr"] for group in stepper.param_groups for p in group["params"]})
    assert [rate[id(head)] for rate in rates] == pytest.approx([0.01, 0.002])
    assert [rate[id(body)] for rate in rates] == pytest.approx([0.001, 0.0002])

    state = {"step": 80, "optimizer": stepper.state_dict(), "scheduler": scheduler.state_dict()}
    after = spec.replace({"lr": 0.05, "backbone_lr_factor": 0.5})
    retune(state, after, 16, 10)
    stepper, scheduler = build_optimizer(after, [body, head], 16, 10, [body])
    stepper.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    assert [group["lr"] for group in stepper.param_groups] == pytest.approx([0.005, 0.0025])
    for _ in range(30):
        stepper.step()
        scheduler.step()
    assert [group["lr"] for group in stepper.param_groups] == pytest.approx([0.0005, 0.00025]), "the second milestone"


def test_a_retuned_state_goes_on_with_the_other_job_s_values() -> None:
    """Momentum buffers stay, and the schedule continues at the same step."""
    weight = torch.nn.Parameter(torch.ones(2))
    before = OptimSpec(lr=0.02, lr_batch=None, warmup_steps=0, milestones=(2,), epochs=4)
    after = before.replace({"lr": 0.05, "momentum": 0.5, "weight_decay": 0.01})
    optimizer, scheduler = build_optimizer(before, [weight], 16, 10)
    for _ in range(15):
        weight.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    state = {"step": 15, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    buffers = optimizer.state[weight]["momentum_buffer"].clone()
    retune(state, after, 16, 10)

    optimizer, scheduler = build_optimizer(after, [weight], 16, 10)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.5, 0.01)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], buffers)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert group["lr"] == pytest.approx(0.005), "the milestone, five steps on"


def test_a_retuned_state_keeps_its_groups() -> None:
    weights = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    before = OptimSpec(optimizer="adamw", norm_decay=False, weight_decay=0.1)
    after = before.replace({"betas": (0.5, 0.9), "weight_decay": 0.2, "lr": 0.004, "warmup_steps": 0})
    optimizer, scheduler = build_optimizer(before, weights, 16, 10)
    state = {"step": 0, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    retune(state, after, 16, 10)
    optimizer.load_state_dict(state["optimizer"])
    assert [(g["weight_decay"], g["betas"], g["lr"]) for g in optimizer.param_groups] == [
        (0.2, (0.5, 0.9), 0.004),
        (0.0, (0.5, 0.9), 0.004),
    ]
