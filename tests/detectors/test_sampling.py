import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headkd_ray.detectors.ops.sampling import sample
from headkd_ray.job import SamplerSpec


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 30), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_sizes_order_and_membership(seed: int, count: int, size: int, fraction: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (2, count), generator=generator)  # 0 ignored, 1 positive, 2 negative
    drawn = sample(kind == 1, kind == 2, SamplerSpec(size=size, positive_fraction=fraction), generator)
    for i in range(2):
        picked = drawn.picked[i][drawn.valid[i]].tolist()
        positives = [p for p in picked if kind[i, p] == 1]
        negatives = [p for p in picked if kind[i, p] == 2]
        expected = min(int((kind[i] == 1).sum()), int(size * fraction))
        assert len(positives) == expected
        assert len(negatives) == min(int((kind[i] == 2).sum()), size - expected)
        assert picked == sorted(positives) + sorted(negatives)
        assert len(set(picked)) == len(picked)
        assert not drawn.valid[i][len(picked) :].any()


def test_one_seed_one_sample_and_every_candidate_has_its_chance() -> None:
    positive, negative = torch.zeros(1, 50, dtype=torch.bool), torch.ones(1, 50, dtype=torch.bool)
    positive[0, :20], negative[0, :20] = True, False
    spec = SamplerSpec(size=10, positive_fraction=0.5)
    first, again = (sample(positive, negative, spec, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.picked, again.picked)
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(50)
    for _ in range(400):
        seen[sample(positive, negative, spec, generator).picked[0]] += 1
    assert (seen[:20] / 400 - 5 / 20).abs().max() < 0.1
    assert (seen[20:] / 400 - 5 / 30).abs().max() < 0.1


def test_no_randomness_when_all_fit() -> None:
    positive = torch.tensor([[False, True, False, True]])
    drawn = sample(positive, ~positive, SamplerSpec(size=100, positive_fraction=0.25), torch.Generator().manual_seed(1))
    assert drawn.picked[0][drawn.valid[0]].tolist() == [1, 3, 0, 2]


def test_nothing_to_sample() -> None:
    none = torch.zeros(2, 0, dtype=torch.bool)
    drawn = sample(none, none, SamplerSpec())
    assert not drawn.valid.any()


def test_tickets_replace_the_random_numbers() -> None:
    positive = torch.tensor([[True, True, True, False, False, False, False]] * 2)
    ticket = torch.tensor([[0.1, 0.9, 0.5, 0.2, 0.8, 0.0, 0.7], [0.9, 0.2, 0.0, 0.6, 0.1, 0.5, 0.3]], dtype=torch.float64)
    before = torch.get_rng_state()
    drawn = sample(positive, ~positive, SamplerSpec(size=4, positive_fraction=0.5), ticket=ticket)
    assert drawn.picked.tolist() == [[1, 2, 4, 6], [0, 1, 3, 5]] and drawn.valid.all()
    assert torch.equal(torch.get_rng_state(), before)
