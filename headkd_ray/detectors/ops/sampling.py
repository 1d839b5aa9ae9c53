"""Random sampling of positives and negatives (mmdet's RandomSampler) for a whole batch at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headkd_ray.job import SamplerSpec


class Sample(NamedTuple):
    """The sampled candidates of each image: positives by index, then negatives by index, then padding."""

    picked: Tensor
    """(B, S) int64 indices of the candidates; 0 in the padding."""
    valid: Tensor
    """(B, S) bool, False = padding."""


@torch.no_grad()
def sample(
    positive: Tensor,
    negative: Tensor,
    spec: SamplerSpec,
    generator: torch.Generator | None = None,
    ticket: Tensor | None = None,
) -> Sample:
    """Draw up to ``spec.size`` candidates per image from the masks ``positive`` and ``negative`` (B, N).

    Positives fill at most ``positive_fraction`` of the size; negatives fill the rest. If all candidates fit, all are taken and
    the result does not depend on ``generator`` (on the masks' device; None = torch's default). ``ticket`` (B, N) in [0, 1)
    replaces the random numbers; the highest are drawn.
    """
    batch, count = positive.shape
    if ticket is None:
        ticket = torch.rand(batch, count, device=positive.device, generator=generator)
    rank = torch.arange(min(spec.size, count), device=positive.device)

    quota = min(int(spec.size * spec.positive_fraction), count)
    drawn, chosen = ticket.masked_fill(~positive, -1.0).topk(quota, dim=1)
    is_positive = drawn >= 0

    drawn, chosen_negative = ticket.masked_fill(~negative, -1.0).topk(len(rank), dim=1)
    room = spec.size - is_positive.sum(1, keepdim=True)
    is_negative = (drawn >= 0) & (rank < room)

    # One sort key puts positives first, each side by index, padding last.
    key = torch.cat([chosen, chosen_negative + count], dim=1)
    key = key.masked_fill(~torch.cat([is_positive, is_negative], dim=1), 2 * count).sort(dim=1).values[:, : len(rank)]
    valid = key < 2 * count
    return Sample((key % max(count, 1)).masked_fill(~valid, 0), valid)
