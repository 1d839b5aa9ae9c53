from collections.abc import Callable

import pytest
import torch

from headkd_ray.data.batch import Batch


@pytest.fixture
def batch_of() -> Callable[[int], Batch]:
    """Return a function that makes blank batches of a given number of images."""

    def make(count: int) -> Batch:
        return Batch(
            images=torch.zeros(count, 3, 32, 32, dtype=torch.uint8),
            sizes=torch.full((count, 2), 32),
            boxes=torch.zeros(count, 1, 4),
            labels=torch.full((count, 1), -1),
            weights=torch.ones(count, 1),
            background=torch.ones(count, dtype=torch.bool),
            image_ids=torch.arange(count),
            original_sizes=torch.full((count, 2), 32),
            views=torch.full((count,), -1),
            step=0,
        )

    return make
