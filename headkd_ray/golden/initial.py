"""Comparison of initial weights, which are random on both sides, by what they have in common: mean, deviation and extremes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from headkd_ray.golden.tolerances import Row, failure

SIGMAS = 6.0
"""Largest difference of two random draws' means and deviations, in standard deviations of that difference."""
EXTREMES = 2.0
"""Largest ratio of the greatest magnitudes of two random draws."""
ENOUGH = 32
"""Number of elements from which greatest magnitudes are compared."""
EXACT = 1e-6
"""Largest difference of values that are not random."""


def compare_initial(wanted: Mapping[str, Sequence[float]], ours: Mapping[str, Tensor], copied: Sequence[str]) -> Row:
    """Compare our initial parameters with ``wanted`` {name: mean, standard deviation, greatest magnitude} of the official ones.

    The ``copied`` ones, of an assistant that starts as a copy of the teacher's head, were not drawn at random and are left out.
    """
    name = f"initial weights ({len(wanted)})"
    problems, worst, depthwise = [], 0.0, 0
    for key in (key for key in wanted if key not in copied):
        if key not in ours:
            problems.append(f"only golden: {key}")
            continue
        tensor = ours[key].double()
        error = max(_errors(wanted[key], tensor))
        if error > 1 and _is_depthwise(tensor):
            depthwise += 1
            error = max(_errors(wanted[key], tensor / len(tensor) ** 0.5))
        worst = max(worst, error)
        if not error <= 1:
            problems.append(key)
    if problems:
        return failure(name, f"{len(problems)} differ: {', '.join(problems[:4])}")
    left_out = sum(key in copied for key in wanted)
    notes = [f"{left_out} copied ones left out"] if left_out else []
    notes += [f"{depthwise} depthwise convs start larger than mmdet's, by the root of their width"] if depthwise else []
    return Row(name, worst, worst, 1.0, True, "; ".join(notes))


def _is_depthwise(weight: Tensor) -> bool:
    """Return whether it is a depthwise conv's, whose fan-out mmdet counts without its groups where there is no pretraining."""
    return weight.dim() == 4 and weight.shape[1] == 1 and weight.shape[0] > 1


def _errors(wanted: Sequence[float], ours: Tensor) -> Iterator[float]:
    """Yield the differences of mean, deviation and greatest magnitude, each in units of what is allowed."""
    mean, deviation, greatest = wanted
    own_mean, own_deviation, count = float(ours.mean()), float(ours.std(correction=0)), ours.numel()
    deviation = 0.0 if count == 1 else deviation  # an estimate from one number would be NaN
    own_greatest = float(ours.abs().max())
    if min(deviation, own_deviation) <= EXACT:  # constant on one side at least
        yield from (abs(a - b) / EXACT for a, b in ((mean, own_mean), (deviation, own_deviation), (greatest, own_greatest)))
        return
    yield abs(mean - own_mean) / (SIGMAS * (deviation**2 + own_deviation**2) ** 0.5 / count**0.5)
    yield abs(deviation - own_deviation) / (SIGMAS * max(deviation, own_deviation) / count**0.5)
    if count >= ENOUGH:
        yield max(greatest / own_greatest, own_greatest / greatest) / EXTREMES


def compare_frozen(wanted: Sequence[str], ours: Sequence[str]) -> Row:
    """Compare the names of the parameters that are not trained."""
    name, differing = f"frozen parameters ({len(wanted)})", sorted(set(wanted) ^ set(ours))
    if differing:
        return failure(name, f"{len(differing)} are frozen on one side only: {', '.join(differing[:4])}")
    return Row(name, 0.0, 0.0, 0.0, True)
