"""Recognise another library's file as one of a kind of detector by the keys of its tensors."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A description of how another library's files hold one kind of detector, and what follows from their tensors.

    Exactly one kind recognises a file; regular expressions match from the beginning of a key.
    """

    has: str
    """Some key of every file of this kind matches this regular expression."""
    lacks: str | None = None
    """No key of a file of this kind matches this one; None = any may."""

    def recognises(self, keys: Collection[str]) -> bool:
        """Return whether a state dict with these ``keys``, in the library's spelling, is of this kind."""

        def some_match(pattern: str) -> bool:
            return any(re.match(pattern, key) for key in keys)

        return some_match(self.has) and not (self.lacks is not None and some_match(self.lacks))
