"""Join the checked parts of a data set to one split: one numbering, one class list, one folder of images."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.checked_split import CheckedSplit, Images
from headkd_ray.data.part import Part
from headkd_ray.errors import DataError
from headkd_ray.storage import Folder, folder_at

Integers = NDArray[np.int64]


def joined(parts: Sequence[Part], names: list[str], fixes: tuple[str, ...]) -> CheckedSplit:
    """Return the split of all parts, which have been checked. Their columns are used up.

    Ids stay as they are unless two parts use one for different things; then all are numbered anew.

    Args:
        names: the images' paths relative to the folder that all parts share.
        fixes: what --fix-boxes changed.
    """
    warnings = list(chain.from_iterable(part.warnings for part in parts))
    categories, told = _categories(parts)
    image_ids, annotation_ids = [part.images.ids for part in parts], [part.annotations.id for part in parts]
    image_of = [_positions(part.images.ids, part.annotations.release("image")) for part in parts]
    offsets = np.cumsum([0, *map(len, image_ids)])
    row = _joined([place + start for place, start in zip(image_of, offsets[:-1].tolist(), strict=True)])
    del image_of
    ids, renumbered = _ids(image_ids)
    own_ids, annotations_renumbered = _ids(annotation_ids)
    for what, anew in {"category": told, "image": renumbered, "annotation": annotations_renumbered}.items():
        if anew:
            warnings.append(f"{len(parts)} sources use the same {what} ids for different things: all are numbered anew, from 1")
    sizes = np.concatenate([part.images.sizes for part in parts])
    order = np.argsort(ids, kind="stable")
    images = Images(ids, names, sizes).take(order.tolist())
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    row = rank[row]
    _tell_shared(images, warnings)
    label_of = {id_: label for label, id_ in enumerate(sorted(categories))}
    label = _joined([_labels(part, categories, label_of) for part in parts])
    by_image = np.lexsort((own_ids, row))
    counts = np.bincount(row, minlength=len(images))
    del row, rank
    kinds = {part.written_in for part in parts}
    return CheckedSplit(
        images=images,
        category_ids=tuple(sorted(categories)),
        classes=tuple(categories[id_] for id_ in sorted(categories)),
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        annotation_id=_reordered(own_ids, by_image),
        label=_reordered(label, by_image),
        **{name: _reordered(_column(parts, name), by_image) for name in ("bbox", "area", "crowd")},
        fixes=fixes,
        warnings=tuple(warnings),
        upright=all(part.upright for part in parts),
        written_in=kinds.pop() if len(kinds) == 1 else "annotations",
    )


def _column(parts: Sequence[Part], name: str) -> NDArray[Any]:
    return _joined([part.annotations.release(name) for part in parts])


def _reordered(column: NDArray[Any], order: Integers) -> NDArray[Any]:
    """Put the rows of a column, (n,) or (n, m), into an order, in place: a copy of one number a row at a time."""
    for numbers in column.T if column.ndim > 1 else [column]:
        numbers[:] = numbers[order]
    return column


def _joined(pieces: list[NDArray[Any]]) -> NDArray[Any]:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _positions(ids: Integers, wanted: Integers) -> Integers:
    """Return where in ``ids``, which hold each of them once, the wanted ones are."""
    order = np.argsort(ids)
    return order[np.searchsorted(ids[order], wanted)]


def _ids(groups: list[Integers]) -> tuple[Integers, bool]:
    """Return the ids of all groups; numbered anew, from 1, if two groups share one, and whether that is so."""
    ids = _joined(groups)
    if len(groups) == 1 or len(np.unique(ids)) == len(ids):
        return ids, False
    starts = np.cumsum([0, *map(len, groups)])[:-1].tolist()
    ranks = [np.argsort(np.argsort(group)) + 1 + start for group, start in zip(groups, starts, strict=True)]
    return np.concatenate(ranks).astype(np.int64), True


def _categories(parts: Sequence[Part]) -> tuple[dict[int, str], bool]:
    """Return the classes of all parts, united by name, by category id, and whether they were numbered anew."""
    pairs = {pair for part in parts for pair in part.categories.items()}
    names = list(dict.fromkeys(name for part in parts for _, name in sorted(part.categories.items())))
    if len(pairs) == len(names) == len({id_ for id_, _ in pairs}):
        return dict(pairs), False
    return dict(enumerate(names, start=1)), True


def _labels(part: Part, categories: dict[int, str], label_of: dict[int, int]) -> NDArray[np.int32]:
    """Return the contiguous label of each annotation of a part."""
    by_name = {name: label_of[id_] for id_, name in categories.items()}
    own = sorted(part.categories)
    labels = np.array([by_name[part.categories[id_]] for id_ in own], dtype=np.int32)
    return labels[np.searchsorted(np.array(own, dtype=np.int64), part.annotations.release("category"))]


def _tell_shared(images: Images, warnings: list[str]) -> None:
    shared = sum(count for count in Counter(images.names).values() if count > 1)
    if shared:
        warnings.append(
            f"{shared} of {len(images)} images share their file with another one, and each has only its own annotations; "
            "if they are the same photo, merge them"
        )


def common_folder(parts: Sequence[Part]) -> tuple[Folder | None, list[str]]:
    """Return the folder that all parts' images are in, and their paths relative to it.

    Raises:
        DataError: the parts' folders are on different filesystems.
    """
    folders = [part.folder for part in parts if part.folder is not None]
    if len({folder.path for folder in folders}) < 2:
        return (folders[0] if folders else None), [name for part in parts for name in part.images.names]
    if any(not folder.fs.equals(folders[0].fs) for folder in folders):
        raise DataError(f"{', '.join(folder.uri for folder in folders)}: are on different filesystems; copy all images to one")
    path = posixpath.commonpath([folder.path for folder in folders])
    common, names = folder_at(folders[0], path), []
    for part, folder in zip(parts, folders, strict=True):
        inside = posixpath.relpath(folder.path, path)
        names += [posixpath.join(inside, name) if inside != "." else name for name in part.images.names]
    return common, names


def hint(parts: Sequence[Part], folder: Folder | None, name: str) -> str:
    """Return ``; did you mean …?`` for the name of an image in the common folder that is not there."""
    for part in parts:
        if part.folder is not None and part.names is not None and folder is not None:
            inside = posixpath.relpath(part.folder.path, folder.path)
            if inside == ".":
                return part.names.hint(name)
            if name.startswith(f"{inside}/"):
                return part.names.hint(name[len(inside) + 1 :])
    return ""
