"""Divide a split at random into parts for training, validation and test: by class, and without near-duplicates across parts."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.checked_split import CheckedSplit
from headkd_ray.data.class_lists import listed
from headkd_ray.data.near_duplicates import BANDS, Fingerprint, groups, near_groups
from headkd_ray.data.rng import key_permutation
from headkd_ray.errors import DataError

PARTS = ("train", "val", "test")
ROBOFLOW = r"^(.*)\.rf\.[0-9A-Za-z]+\.[^.]*$"
"""Names of Roboflow's augmented copies of a photo, which differ only after ``.rf.``."""
OFF = 0.02
"""Difference between a part's share and the wanted one from which it is told."""


def check_fractions(fractions: Sequence[float], group_by: str | None) -> None:
    """Raise DataError if the fractions are not those of two or three parts, or ``group_by`` is not a regular expression."""
    given = " ".join(f"{fraction:g}" for fraction in fractions)
    if len(fractions) not in (2, 3) or not all(0 < fraction < 1 for fraction in fractions):
        raise DataError(f"--split {given}: give two or three fractions between 0 and 1, for {', '.join(PARTS)}")
    if abs(sum(fractions) - 1) > 1e-6:
        raise DataError(f"--split {given}: the fractions add up to {sum(fractions):g}, not to 1")
    try:
        re.compile(group_by or "")
    except re.error as error:
        raise DataError(f"--group-by {group_by}: not a regular expression ({error})") from error


def divided(
    split: CheckedSplit,
    fractions: Sequence[float],
    fingerprints: Iterable[Fingerprint | None],
    *,
    group_by: str | None = None,
    seed: int = 0,
) -> dict[str, CheckedSplit]:
    """Return the parts by name. The same split, fractions, ``group_by`` and seed give the same parts.

    Args:
        fractions: of the images, for train, val and perhaps test.
        fingerprints: of each image, for near-duplicates; None = the image cannot be read.
        group_by: regular expression; images whose names it matches with the same text (of its first group) stay together.

    Raises:
        DataError: a part would be empty.
    """
    known = {row: found for row, found in enumerate(fingerprints) if found is not None}
    near, position = np.array([*known.values()], dtype=np.uint16).reshape(-1, BANDS), np.array([*known], dtype=np.int64)
    names = split.images.names
    count = len(names)
    by_name, by_look = groups(count, _same_name(names, group_by)), np.arange(count)
    by_look[position] = position[near_groups(near)]
    group = groups(count, np.concatenate([_connections(by_name), _connections(by_look)]))
    part_of = _assigned(_classes_of(split, group), _sizes(group), fractions, _order(names, group, seed))
    part = np.array([part_of[root] for root in group.tolist()])
    empty = [PARTS[number] for number in range(len(fractions)) if not (part == number).any()]
    if empty:
        raise DataError(
            f"--split: no images for {listed(empty)}: {count} images are in {len(part_of)} groups that stay together, "
            "which are too few or too large"
        )
    told = _told(split, fractions, part, by_name, by_look, seed)
    whole = replace(split, warnings=(*split.warnings, *told))
    return {PARTS[k]: whole.subset(np.flatnonzero(part == k)) for k in range(len(fractions))}


def _same_name(names: Sequence[str], group_by: str | None) -> NDArray[np.int64]:
    """Return pairs of images that belong together by their names, int64 (m, 2)."""
    pattern = re.compile(group_by or ROBOFLOW)
    first: dict[str, int] = {}
    pairs = []
    for row, name in enumerate(names):
        found = pattern.search(name)
        if found is not None:
            key = found.group(1 if pattern.groups else 0) or ""
            pairs.append((first.setdefault(key, row), row))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _connections(root: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.stack([root, np.arange(len(root))], axis=1)


def _sizes(group: NDArray[np.int64]) -> dict[int, int]:
    return dict(Counter(group.tolist()))


def _classes_of(split: CheckedSplit, group: NDArray[np.int64]) -> dict[int, Counter[int]]:
    """Return by group the number of its images that show each class."""
    image = np.repeat(np.arange(len(split.images)), np.diff(split.first))
    shown = np.unique(np.stack([image, split.label], axis=1), axis=0) if len(image) else np.zeros((0, 2), dtype=np.int64)
    found: dict[int, Counter[int]] = defaultdict(Counter)
    for root, label in zip(group[shown[:, 0]].tolist(), shown[:, 1].tolist(), strict=True):
        found[root][label] += 1
    return found


def _order(names: Sequence[str], group: NDArray[np.int64], seed: int) -> list[int]:
    """Return the groups in a random order that depends on the seed and the file names alone."""
    first: dict[int, str] = {}
    for root, name in zip(group.tolist(), names, strict=True):
        first[root] = min(name, first.get(root, name))
    roots = sorted(first, key=first.__getitem__)
    return [roots[k] for k in key_permutation(len(roots), "divide", seed).tolist()]


def _assigned(
    classes: dict[int, Counter[int]], sizes: dict[int, int], fractions: Sequence[float], order: Sequence[int]
) -> dict[int, int]:
    """Return the part of each group, by iterative stratification (Sechidis et al. 2011): the rarest class first, each of its
    groups where most images of that class are still wanted."""
    wanted = [fraction * sum(sizes.values()) for fraction in fractions]
    total = Counter[int]()
    holders: dict[int, list[int]] = defaultdict(list)
    for root in order:
        total.update(classes.get(root, {}))
        for label in classes.get(root, ()):
            holders[label].append(root)
    wanted_of = {label: [fraction * count for fraction in fractions] for label, count in total.items()}
    part_of: dict[int, int] = {}

    def assign(root: int, wish: Callable[[int], tuple[float, ...]]) -> None:
        part = max(range(len(fractions)), key=lambda k: (*wish(k), -k))
        part_of[root] = part
        wanted[part] -= sizes[root]
        for label, count in classes.get(root, {}).items():
            wanted_of[label][part] -= count
            total[label] -= count

    left = set(total)
    while left:
        label = min(left, key=lambda each: (total[each], each))
        left.discard(label)
        # Large groups first, while there is room for them; the sort is stable, so that equal ones stay in random order.
        for root in sorted(holders[label], key=lambda each: -sizes[each]):
            if root not in part_of:
                assign(root, lambda k, label=label: (wanted_of[label][k], wanted[k]))  # type: ignore[misc]
    for root in sorted(order, key=lambda each: -sizes[each]):
        if root not in part_of:
            assign(root, lambda k: (wanted[k],))
    return part_of


def _told(
    split: CheckedSplit,
    fractions: Sequence[float],
    part: NDArray[np.int64],
    by_name: NDArray[np.int64],
    by_look: NDArray[np.int64],
    seed: int,
) -> list[str]:
    """Return what the user should know about the division, one sentence each."""
    counts = [int((part == k).sum()) for k in range(len(fractions))]
    shares = ", ".join(f"{PARTS[k]} {count}" for k, count in enumerate(counts))
    lines = [f"{len(part)} images were divided by class (seed {seed}): {shares}"]
    for root, why in ((by_look, "near-duplicates"), (by_name, "images that belong together by their names")):
        sizes = [size for size in _sizes(root).values() if size > 1]
        if sizes:
            lines.append(f"{sum(sizes)} {why}, in {len(sizes)} groups of up to {max(sizes)}, stay together in one part")
    off = [PARTS[k] for k, count in enumerate(counts) if abs(count / len(part) - fractions[k]) > OFF + 1 / len(part)]
    if off:
        lines.append(f"{' and '.join(off)}: not as large as wanted, because groups stay together or classes are rare")
    image = np.repeat(part, np.diff(split.first))
    for k in range(len(fractions)):
        boxes = np.bincount(split.label[image == k], minlength=len(split.classes)).tolist()
        lacking = [name for name, count in zip(split.classes, boxes, strict=True) if not count]
        if lacking and len(lacking) < len(split.classes):
            lines.append(f"{PARTS[k]} has no box of {listed(lacking)}, which have too few images or stay together")
    return lines
