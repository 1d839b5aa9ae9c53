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


def test_frozen_parameters_stay_out_of_the_optimizer() -> None:
    free, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer, scheduler = build_optimizer(OptimSpec(warmup_steps=0), [free, frozen], 16, 10)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    for _ in range(80):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_fused_update_is_that_of_the_loop_over_parameters(optimizer: str) -> None:
    """A fused kernel reads the memory of weight, gradient and moments in parallel, so their layouts must be alike."""
    spec = OptimSpec.model_validate({"optimizer": optimizer, "warmup_steps": 0, "weight_decay": 0.1})
    fused, looped = ([torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.Conv2d(6, 2, 1)] for _ in range(2))
    for one, other in zip(fused, looped, strict=True):
        one.to(memory_format=torch.channels_last)
        other.load_state_dict(one.state_dict())
    steppers = [build_optimizer(spec, (p for m in each for p in m.parameters()), 16, 10)[0] for each in (fused, looped)]
    steppers[1].param_groups[0] |= {"fused": False, "foreach": False}
    x = torch.randn(2, 4, 8, 8)  # not channels-last, as after an operator that does not keep the layout
    for _ in range(3):
        for each, stepper in zip((fused, looped), steppers, strict=True):
            stepper.zero_grad()
            each[1](each[0](x).contiguous().relu()).square().mean().backward()
            stepper.step()
    for one, other in zip(steppers[0].param_groups[0]["params"], steppers[1].param_groups[0]["params"], strict=True):
        assert one.grad.stride() == one.stride()
        torch.testing.assert_close(one, other)


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
