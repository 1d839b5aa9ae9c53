"""Check the values of Ray's label selectors, by which a job chooses the nodes of its processes."""

from __future__ import annotations

import re

_VALUE = "[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = re.compile(rf"!?(?:{_VALUE}|in\({_VALUE}(?:, ?{_VALUE})*\))")


def check_label(text: str) -> str:
    """Return a label selector's value if it is one; raises ValueError if not."""
    if _SELECTOR.fullmatch(text) is None:
        raise ValueError(
            f"{text!r} does not select labels; it must be a label's value (letters, digits, dots, dashes and underscores), or "
            "!value, in(one, other) or !in(one, other)"
        )
    return text
