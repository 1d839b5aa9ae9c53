"""Interpret the keys of annotations beyond COCO's own: which annotations to ignore, and which meanings would be lost silently.

Every exporter has its own keys, directly in the annotation or in its ``attributes`` (CVAT, Datumaro) or ``extra``
(CrowdHuman). A few of them change what the box means for training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

NESTED = ("attributes", "extra")

IGNORE = "ignore"
CROWD = "crowd"
LEAVE_OUT = "(mark them {marked} to leave them out)"
SCORE = f"they are trained on as if they were certain, whatever their score {LEAVE_OUT}"
ORDINARY = f"they are trained on as ordinary boxes {LEAVE_OUT}"
UPRIGHT = "'bbox' is used as it is, without rotation"

MEANINGS = {
    **dict.fromkeys(("ignore", "ignored", "isignore", "isignored"), IGNORE),
    **dict.fromkeys(("iscrowd", "isgroupof", "groupof"), CROWD),
    **dict.fromkeys(("difficult", "isdifficult", "truncated", "istruncated", "truncation"), ORDINARY),
    **dict.fromkeys(("occluded", "isoccluded", "occlusion", "outside", "hidden", "deleted", "isdeleted"), ORDINARY),
    **dict.fromkeys(("isdepiction", "isinside"), ORDINARY),
    **dict.fromkeys(("rotation", "angle", "theta", "rotationangle", "rbbox", "rbox", "rotatedbbox", "obb"), UPRIGHT),
    **dict.fromkeys(("score", "confidence"), SCORE),
}
"""Meaning of a key, which is spelled in lower case without ``_``, ``-`` and spaces."""


FEW_CROWDS, MANY_CROWDS = 10, 0.1
"""Number of crowds, and share of the annotations, above which they are told; COCO has 1 %."""
MASKS = "CVAT marks each mask that is painted with a brush so: if they are single objects, set their 'iscrowd' to 0"


class FlagError(Exception):
    """The value of a yes-or-no key is neither yes nor no."""

    def __init__(self, key: str, value: Any) -> None:
        super().__init__(key, value)
        self.key, self.value = key, value


@dataclass
class Flags:
    """Reads the keys of annotations one by one, and counts what the user should know about."""

    marked: str = "'ignore': 1"
    """How the source marks an annotation that is to be ignored."""
    difficult_is_ignored: bool = False
    """Whether difficult objects are to be ignored, as in Pascal VOC's own evaluation."""
    annotations: int = 0
    ignored: int = 0
    crowds: int = 0
    _meanings: dict[str, str | None] = field(default_factory=dict)
    """Meanings of the keys met so far, by their spelling in the file."""
    _told: dict[tuple[str, str], int] = field(default_factory=dict)
    """Numbers of annotations by key and meaning, for the warnings."""

    def crowd(self, record: dict[str, Any]) -> bool:
        """Return whether the annotation is a crowd or to be ignored, which training and evaluation treat alike.

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
        self.crowds += crowd
        return ignored or crowd

    def warnings(self) -> list[str]:
        """Return a line for each key whose meaning is lost, one for the ignored annotations and one for many crowds."""
        of = f"of {self.annotations} annotations"
        ignored = [
            f"{self.ignored} {of} are marked to be ignored: they are left out of training, and in evaluation a detection there "
            "counts as neither right nor wrong, as for a crowd"
        ]
        crowds = [f"{self.crowds} {of} are crowds, which are left out of training; {MASKS}"]
        many = self.crowds > max(FEW_CROWDS, MANY_CROWDS * self.annotations)
        return (
            (ignored if self.ignored else [])
            + (crowds if many else [])
            + [
                f"{name!r} is set in {count} {of}; {meaning.format(marked=self.marked)}"
                for (name, meaning), count in self._told.items()
            ]
        )

    def _meaningful(self, record: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
        """Yield (key as the user sees it, value, meaning) of the keys with a known meaning."""
        for key, value in record.items():
            if (meaning := self._meaning(key)) is not None:
                yield key, value, meaning
            elif key in NESTED and isinstance(value, dict):
                for name, inner in value.items():
                    if (meaning := self._meaning(name)) is not None:
                        yield f"{key}.{name}", inner, meaning

    def _meaning(self, key: str) -> str | None:
        if key not in self._meanings:
            name = key.lower().translate(_PLAIN)
            ignored = self.difficult_is_ignored and name == "difficult"
            self._meanings[key] = IGNORE if ignored else MEANINGS.get(name)
        return self._meanings[key]


_PLAIN = {ord(mark): None for mark in "_- "}


def _flag(name: str, value: Any) -> bool:
    """Return a yes-or-no value as bool. Raises FlagError for any other value."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word is None or (isinstance(word, (str, bool, int, float)) and word in ("", "0", "false", "no", "unspecified", 0)):
        return False
    if isinstance(word, (str, bool, int, float)) and word in ("1", "true", "yes", 1):
        return True
    raise FlagError(name, value)


def _says_something(value: Any) -> bool:
    """Return whether the value is set and has an effect: a rotation by 0 degrees has none."""
    if isinstance(value, (bool, int, float)):
        return not -1e-3 < value < 1e-3
    return bool(value) and str(value).strip().lower() not in ("", "0", "0.0", "false", "no", "none", "unspecified")
