"""Generate random numbers as a function of a key: the same key gives the same numbers in any process, on any machine.

Python's ``hash`` differs between processes and torch's global generator depends on what ran before, so neither can determine a
view or an epoch's order. Only BLAKE2 and Philox's raw stream are used: both are fixed by their specifications, while the
higher-level methods of ``numpy.random.Generator`` may change between NumPy versions.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def key_bits(*key: int | str) -> int:
    """Return 128 uniform bits determined by ``key``."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def key_integers(count: int, bound: int, *key: int | str) -> list[int]:
    """Return ``count`` integers in [0, bound), uniform to within 2^-64 of each other, determined by ``key``."""
    raw = np.random.Philox(key=key_bits(*key)).random_raw(count)
    return [(int(value) * bound) >> 64 for value in raw]


def key_fractions(count: int, *key: int | str) -> list[float]:
    """Return ``count`` numbers in [0, 1), multiples of 2^-32, determined by ``key``."""
    return [number / (1 << 32) for number in key_integers(count, 1 << 32, *key)]


def key_permutation(count: int, *key: int | str) -> NDArray[np.int64]:
    """Return a uniform permutation of range(count), int64 (count,), determined by ``key``."""
    raw = np.random.Philox(key=key_bits(*key)).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64)
