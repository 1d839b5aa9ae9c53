"""What annotations say beyond COCO's own keys: which are to be ignored, and what would be lost without a word.

Every exporter has keys of its own, directly in the annotation or in its ``attributes`` (CVAT, Datumaro) or ``extra``
(CrowdHuman). A few change what the box means for training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

NESTED = ("attributes", "extra")

IGNORE = "ignore"
CROWD = "crowd"
LEAVE_OUT = "(mark them 'ignore': 1 to leave them out)"
SCORE = f"they are trained on as if they were certain, whatever their score {LEAVE_OUT}"
ORDINARY = f"they are trained on as ordinary boxes {LEAVE_OUT}"
UPRIGHT = "'bbox' is used as it is, upright"

MEANINGS = {
    **dict.fromkeys(("ignore", "ignored", "isignore", "isignored"), IGNORE),
    **dict.fromkeys(("iscrowd", "isgroupof", "groupof"), CROWD),
    **dict.fromkeys(("difficult", "isdifficult", "truncated", "istruncated", "truncation"), ORDINARY),
    **dict.fromkeys(("occluded", "isoccluded", "occlusion", "outside", "hidden", "deleted", "isdeleted"), ORDINARY),
    **dict.fromkeys(("isdepiction", "isinside"), ORDINARY),
    **dict.fromkeys(("rotation", "angle", "theta", "rotationangle", "rbbox", "rbox", "rotatedbbox", "obb"), UPRIGHT),
    **dict.fromkeys(("score", "confidence"), SCORE),
}
"""Meaning of a key, spelled in small letters without ``_``, ``-`` and spaces."""


class FlagError(Exception):
    """The value of a key that is yes or no is neither."""

    def __init__(self, key: str, value: Any) -> None:
        super().__init__(key, value)
        self.key, self.value = key, value


@dataclass
class Flags:
    """Reads the keys of annotations one by one, and counts what is worth telling."""

    annotations: int = 0
    ignored: int = 0
    _meanings: dict[str, str | None] = field(default_factory=dict)
    """Of the keys met so far, as they are spelled."""
    _told: dict[tuple[str, str], int] = field(default_factory=dict)
    """Annotations by key and meaning."""

    def crowd(self, record: dict[str, Any]) -> bool:
        """Whether the annotation is a crowd, or to be ignored, which for training and evaluation is the same.

        Raises:
            FlagError: a flag is neither set nor unset.
        """
        self.annotations += 1
        ignored = crowd = False
        for name, value, meaning in self._meaningful(record):
            if meaning in (IGNORE, CROWD):
                flag = _flag(name, value)
                crowd |= flag and meaning == CROWD
                ignored |= flag and meaning == IGNORE
            elif (value not in (None, 1)) if meaning == SCORE else _says_something(value):
                self._told[name, meaning] = self._told.get((name, meaning), 0) + 1
        self.ignored += ignored
        return ignored or crowd

    def warnings(self) -> list[str]:
        """A line for each key whose meaning is lost, and one for the ignored annotations."""
        of = f"of {self.annotations} annotations"
        ignored = [
            f"{self.ignored} {of} are marked to be ignored: they are left out of training, and in evaluation a detection there "
            "is neither right nor wrong, as with a crowd"
        ]
        return (ignored if self.ignored else []) + [
            f"{name!r} is set in {count} {of}; {meaning}" for (name, meaning), count in self._told.items()
        ]

    def _meaningful(self, record: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
        """(key as the user sees it, value, meaning) of the keys with a meaning."""
        for key, value in record.items():
            if (meaning := self._meaning(key)) is not None:
                yield key, value, meaning
            elif key in NESTED and isinstance(value, dict):
                for name, inner in value.items():
                    if (meaning := self._meaning(name)) is not None:
                        yield f"{key}.{name}", inner, meaning

    def _meaning(self, key: str) -> str | None:
        if key not in self._meanings:
            self._meanings[key] = MEANINGS.get(key.lower().translate(_PLAIN))
        return self._meanings[key]


_PLAIN = {ord(mark): None for mark in "_- "}


def _flag(name: str, value: Any) -> bool:
    """Raises FlagError for what is neither yes nor no."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word is None or (isinstance(word, (str, bool, int, float)) and word in ("", "0", "false", "no", 0)):
        return False
    if isinstance(word, (str, bool, int, float)) and word in ("1", "true", "yes", 1):
        return True
    raise FlagError(name, value)


def _says_something(value: Any) -> bool:
    """Whether it is set, and to more than nothing: a rotation by 0 degrees is none."""
    if isinstance(value, (bool, int, float)):
        return not -1e-3 < value < 1e-3
    return bool(value) and str(value).strip().lower() not in ("", "0", "0.0", "false", "no", "none")
