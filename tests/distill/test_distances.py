"""The Pearson distance of features: what it ignores, what it keeps, and that a job's key chooses it everywhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from headkd_ray.distill.distances import DISTANCES, adapted_distance, distance_of_counted, pearson
from tests.distill.test_pairs import model_of, step


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_twice_one_minus_the_correlation_over_channels() -> None:
    own, target = rows(6, 40), rows(6, 40, seed=1)
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(own, target, strict=True)])
    torch.testing.assert_close(pearson(own, target), (2 * (1 - correlation)).mean(), rtol=1e-4, atol=1e-5)


@given(scale=st.floats(0.1, 1000), offset=st.floats(-100, 100), seed=st.integers(0, 1000))
def test_scale_and_offset_of_a_row_do_not_matter(scale: float, offset: float, seed: int) -> None:
    target = rows(4, 32, seed=seed)
    assert pearson(scale * target + offset, target).item() == pytest.approx(0, abs=1e-4)
    assert pearson(-scale * target + offset, target).item() == pytest.approx(4, abs=1e-3)


def test_a_row_depends_on_itself_alone_and_a_place_of_a_map_is_a_row() -> None:
    own, target = rows(8, 16), rows(8, 16, seed=1)
    halves = [pearson(own[i : i + 4], target[i : i + 4]) for i in (0, 4)]
    torch.testing.assert_close(pearson(own, target), torch.stack(halves).mean())
    maps = [t.reshape(2, 2, 2, 16).movedim(-1, 1) for t in (own, target)]
    torch.testing.assert_close(pearson(*maps), pearson(own, target))


def test_dead_rows_no_rows_and_large_bfloat16_rows_are_finite() -> None:
    own = rows(3, 16).requires_grad_()
    dead = pearson(own, torch.zeros(3, 16))
    dead.backward()
    assert dead.item() == pytest.approx(1, abs=1e-3) and own.grad is not None and own.grad.isfinite().all()
    assert pearson(own[:0], torch.zeros(0, 16)).item() == 0
    large = (1e3 * rows(3, 16)).bfloat16()
    assert pearson(large, rows(3, 16)).dtype == torch.float32 and pearson(large, large).item() == 0


@pytest.mark.parametrize("name", DISTANCES)
def test_rows_that_do_not_count_are_as_good_as_absent(name: str) -> None:
    own, target, counted = rows(9, 16).requires_grad_(), rows(9, 16, seed=1), torch.arange(9) % 3 > 0
    target[0] = 1e6
    loss, expected = distance_of_counted(DISTANCES[name], own, target, counted), DISTANCES[name](own[counted], target[counted])
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(each, own)[0] for each in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][~counted].eq(0).all()
    assert distance_of_counted(DISTANCES[name], own, target, counted & False) == 0


def test_the_target_gets_no_gradient() -> None:
    own, target = rows(3, 16).requires_grad_(), rows(3, 16, seed=1).requires_grad_()
    pearson(own, target).backward()
    assert target.grad is None and own.grad is not None and own.grad.abs().sum() > 0


def test_levels_are_summed() -> None:
    own, target = [rows(1, 8, 4, 4), rows(1, 8, 2, 2)], [rows(1, 8, 4, 4, seed=1), rows(1, 8, 2, 2, seed=1)]
    each = torch.stack([pearson(o, t) for o, t in zip(own, target, strict=True)])
    torch.testing.assert_close(adapted_distance(pearson, nn.Identity(), own, target), each.sum())


@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn"])
def test_the_job_s_key_chooses_it_for_akd_and_ckd(student: str) -> None:
    """A teacher's features times 100 change the MSE ten thousandfold, and Pearson's distance not at all."""

    def losses(scale: float, distance: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = model_of(student, "cascade_rcnn", distance=distance)
        for term in model.terms:
            if hasattr(term, "distance"):
                compare = term.distance
                term.distance = lambda own, target, compare=compare: compare(own, scale * target)
        return {name: loss for name, loss in step(model).items() if "akd" in name or "ckd" in name}

    standard, scaled = losses(1.0, "pearson"), losses(100.0, "pearson")
    assert len(standard) >= 3
    for name, loss in standard.items():
        torch.testing.assert_close(scaled[name], loss, rtol=1e-3, atol=1e-4)
    standard, scaled = losses(1.0, "mse"), losses(100.0, "mse")
    assert all(scaled[name] > 100 * loss for name, loss in standard.items())
