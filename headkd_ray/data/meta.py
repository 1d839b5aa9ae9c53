"""Read and write meta.json, which describes a prepared split and lists its files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from headkd_ray.data.images import FULL_RANGE, Reading
from headkd_ray.errors import DataError

VERSION = 2
FORMAT = "headkd_ray shards"
AGAIN = "prepare the split again, with --overwrite"
SHOWN = 5
"""Limit of the problems that one message lists."""
SHARD_NAME = re.compile(r"shard-[0-9]{5,9}\.parquet")

Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Value = Annotated[int, Field(ge=0, le=65535)]
Name = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class ShardFile:
    """A shard file, as meta.json lists it."""

    name: str
    images: Positive
    bytes: Count
    sha256: str


@dataclass(frozen=True)
class Meta:
    """The content of meta.json."""

    classes: tuple[Name, ...]
    """Class names; the position is the contiguous label. None in a split that was prepared without labels."""
    category_ids: tuple[Annotated[int, Field(ge=-(2**63), lt=2**63)], ...]
    """COCO category id of each label: as in the source, with gaps."""
    images: Positive
    boxes: Count
    """Number of boxes that are not crowds."""
    crowds: Count
    row_group: Positive
    """Images per row group (fewer at the end of a shard)."""
    shards: tuple[ShardFile, ...]
    fingerprint: str
    """SHA-256 of the annotations, of how they were laid out and of how the images are read."""
    fixes: tuple[str, ...] = ()
    """What --fix-boxes changed, one line each."""
    upright: bool = False
    """Apply EXIF orientation where the images' sizes do not show whether it should be."""
    value_range: tuple[Value, Value] | None = None
    """The values of 16-bit images that become 0 and 255; None if there are no such images."""
    warnings: tuple[str, ...] = ()
    """What the user should know about the annotations and images, one line each."""
    photos: str = field(default="", compare=False)
    """SHA-256 of the image files' sizes and modification times, which reveals a replaced file."""

    @property
    def reading(self) -> Reading:
        """How the images become pixels."""
        return Reading(self.upright, self.value_range or FULL_RANGE)

    def to_json(self) -> bytes:
        """Return the file's content."""
        return (json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, name: str) -> Meta:
        """Parse the file's content; errors call the file ``name``. Raises DataError naming every key that is wrong."""
        try:
            fields = json.loads(content)
            kind, version = fields["format"], fields["version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{name}: not written by headkd_ray.prepare ({error!r}); {AGAIN}") from error
        if kind != FORMAT or not isinstance(version, int) or version > VERSION:
            raise DataError(f"{name}: format {kind!r} version {version!r}; this headkd_ray reads up to {VERSION}, upgrade it")
        try:
            meta = _META.validate_json(content, strict=True)
        except ValidationError as error:
            wrong = sentences(error)
        else:
            wrong = list(_contradictions(meta))
        if wrong:
            raise DataError(f"{name}: damaged ({'; '.join(wrong[:SHOWN])}); {AGAIN}")
        return meta


def check_same_range(ranges: Mapping[str, tuple[int, int] | None]) -> None:
    """Raise DataError if the 16-bit images of different splits are read with different value ranges.

    Args:
        ranges: ``Meta.value_range`` by split; None, for a split without such images, is compatible with any.
    """
    known = {place: found for place, found in ranges.items() if found is not None}
    if len(set(known.values())) > 1:
        found = ", ".join(f"{place} from {low} to {high}" for place, (low, high) in known.items())
        raise DataError(f"16-bit images are read with different ranges: {found}; prepare all splits with the same --range")


_META = TypeAdapter(Meta)


def sentences(error: ValidationError) -> list[str]:
    """Return pydantic's errors about a file, each as ``key.of.the.value: what is wrong``."""
    found = [(problem["loc"], problem["msg"]) for problem in error.errors(include_url=False, include_input=False)]
    return [": ".join(filter(None, (".".join(map(str, loc)), text[:1].lower() + text[1:]))) for loc, text in found]


def _contradictions(meta: Meta) -> Iterator[str]:
    if not meta.shards:
        yield "shards: empty"
    for number, shard in enumerate(meta.shards):
        if not SHARD_NAME.fullmatch(shard.name):
            yield f"shards.{number}.name: {shard.name!r} is not a shard's name"
    for key, values in {
        "shards": [shard.name for shard in meta.shards],
        "classes": meta.classes,
        "category_ids": meta.category_ids,
    }.items():
        if len(set(values)) != len(values):
            yield f"{key}: has duplicates"
    if len(meta.classes) != len(meta.category_ids) or (meta.boxes and not meta.classes):
        yield f"{len(meta.classes)} classes, {len(meta.category_ids)} category_ids"
    inside = sum(shard.images for shard in meta.shards)
    if inside != meta.images:
        yield f"images: {meta.images}, but the shards hold {inside}"
    if meta.value_range is not None and meta.value_range[0] >= meta.value_range[1]:
        yield "value_range: must ascend"
