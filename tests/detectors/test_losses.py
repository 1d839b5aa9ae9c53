import pytest
import torch
from torch import Tensor

from headkd_ray.detectors.ops.losses import (
    binary_cross_entropy_sum,
    cross_entropy_mean,
    focal_loss_sum,
    l1_sum,
    mean_squared_error,
    quality_focal_loss_sum,
)


def focal_by_definition(logits: Tensor, labels: Tensor, counted: Tensor, alpha: float, gamma: float) -> Tensor:
    """Compute FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t) entry by entry with one-hot targets, in float64."""
    probability = logits.double().sigmoid()
    target = torch.zeros_like(probability)
    for row in (labels >= 0).nonzero().tolist():
        target[(*row, int(labels[tuple(row)]))] = 1
    p_t = torch.where(target == 1, probability, 1 - probability)
    alpha_t = torch.where(target == 1, alpha, 1 - alpha)
    return (-alpha_t * (1 - p_t) ** gamma * p_t.log() * counted.unsqueeze(-1)).sum()


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.25, 1.5), (0.6, 0.0)])
def test_focal_loss_and_its_gradient(alpha: float, gamma: float) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(2, 7, 4) * 3).requires_grad_()
    labels = torch.randint(-1, 4, (2, 7))
    counted = torch.rand(2, 7) < 0.7
    loss = focal_loss_sum(logits, labels, counted, alpha, gamma)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    expected = focal_by_definition(exact, labels, counted, alpha, gamma)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
    assert (gradient[~counted] == 0).all()


def test_class_weights_multiply_what_each_row_costs() -> None:
    """Weights of 1 change no bit of the losses; others give the weighted sum of what the rows cost one by one."""
    torch.manual_seed(2)
    logits, quality, counted = torch.randn(2, 40, 4) * 3, torch.rand(2, 40), torch.rand(2, 40) < 0.8
    labels, weights = torch.randint(-1, 4, (2, 40)), torch.tensor([0.3, 2.0, 0.0, 5.0, 1.0])
    rows, roi_labels = torch.randn(80, 5), torch.randint(-1, 5, (80,))

    def focal(which: Tensor, weights: Tensor | None = None) -> Tensor:
        return focal_loss_sum(logits, labels, which, 0.25, 2.0, weights)

    def of_quality(which: Tensor, weights: Tensor | None = None) -> Tensor:
        return quality_focal_loss_sum(logits, labels, quality, which, 2.0, weights)

    for loss in (focal, of_quality):
        assert torch.equal(loss(counted, torch.ones(5)), loss(counted))
        parts = [float(loss(counted & (labels == label))) * float(weights[label]) for label in range(-1, 4)]
        assert float(loss(counted, weights)) == pytest.approx(sum(parts), rel=1e-5)
    whole = (roi_labels >= 0).float()
    alike = cross_entropy_mean(rows, roi_labels, whole, torch.ones(5))
    assert torch.equal(alike, cross_entropy_mean(rows, roi_labels, whole))
    known = roi_labels >= 0
    each = -rows.log_softmax(1)[known, roi_labels[known]] * weights[roi_labels[known]]
    torch.testing.assert_close(cross_entropy_mean(rows, roi_labels, whole, weights), each.mean())


def test_focal_loss_survives_extreme_logits() -> None:
    logits = torch.tensor([[[100.0, -100.0]]], requires_grad=True)
    loss = focal_loss_sum(logits, torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bool), 0.25, 2.0)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(0.75 * 100 + 0.25 * 100))
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_sums_over_nothing_are_zero_with_zero_gradients() -> None:
    logits = torch.randn(2, 3, 4, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    total = focal_loss_sum(logits, torch.full((2, 3), -1), nothing, 0.25, 2.0)
    total = total + l1_sum(logits, torch.full((2, 3, 4), float("inf")), nothing)
    total = total + l1_sum(logits, torch.full((2, 3, 4), float("inf")), nothing, beta=1.0)
    total = total + binary_cross_entropy_sum(logits[..., 0], nothing, nothing)
    empty = logits.reshape(-1, 4)[:0]
    total = (
        total + mean_squared_error(empty, empty) + cross_entropy_mean(empty, torch.zeros(0, dtype=torch.int64), nothing[0, :0])
    )
    total.backward()
    assert total.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_plain_formulas() -> None:
    torch.manual_seed(1)
    ours, theirs = torch.randn(5, 4), torch.randn(5, 4)
    counted = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(l1_sum(ours, theirs, counted), (ours - theirs)[counted].abs().sum())
    smooth = [d * d / 1.4 if d < 0.7 else d - 0.35 for d in (ours - theirs)[counted].abs().flatten().tolist()]
    assert {d < 0.35 for d in smooth} == {True, False}, "both sides of beta"
    assert float(l1_sum(ours, theirs, counted, beta=0.7)) == pytest.approx(sum(smooth), rel=1e-5)
    torch.testing.assert_close(mean_squared_error(ours, theirs), ((ours - theirs) ** 2).mean())
    probability = ours[:, 0].sigmoid()
    expected = -torch.where(counted, probability.log(), (1 - probability).log())[1:].sum()
    rows = torch.tensor([False, True, True, True, True])
    torch.testing.assert_close(binary_cross_entropy_sum(ours[:, 0], counted, rows), expected)
    labels = torch.tensor([0, 1, 2, 3, 3])
    expected = -ours.log_softmax(1)[torch.arange(5), labels].mean()
    torch.testing.assert_close(cross_entropy_mean(ours, labels, torch.ones(5)), expected)


def test_targets_carry_no_gradient_and_half_precision_is_raised() -> None:
    ours, theirs = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    loss = mean_squared_error(ours, theirs)
    loss.backward()
    assert loss.dtype == torch.float32
    assert theirs.grad is None
