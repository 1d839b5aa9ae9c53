"""Make text for people: numbers of few digits; files' and addresses' text without terminal control characters and secrets."""

from __future__ import annotations

import re
import sys
from urllib.parse import unquote

MASK = "***"
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters except tab and newline, and those that change the writing direction."""
_HALVES = re.compile("[\ud800-\udfff]")
"""Surrogates, which stand for undecodable bytes and cannot be printed."""
_PASSWORD = r"(?P<head>\b[\w+.-]+://[^\s/:@?#\"]*)(?::|%3[aA])(?!\d+(?:/|$)){secret}(?P<at>@|%40)"
_PASSWORD_IN_TEXT = re.compile(_PASSWORD.format(secret=r"[^\s\"]*"))
_PASSWORD_IN_ADDRESS = re.compile(_PASSWORD.format(secret=r".*"), re.DOTALL)
_USER = re.compile(r"(?P<head>\b(?:https?|ftp)://)[^\s/:@?#\"]+(?P<at>@|%40)")
_PARAMETER = re.compile(r"(?P<name>[?&#][\w%.-]+)=(?P<value>[^&#\s'\"<>(){},;]*?)(?=[:.]*(?:[&#\s'\"<>(){},;]|$))")
_SECRET = re.compile(
    r"sig$|signature|token|secret|passw|pwd|credential|policy|api[_-]?key|access[_-]?key|^(?:key|auth|code|sas)$"
)
"""Secret parameters of signed addresses: X-Amz-Signature, X-Goog-Credential, sig (Azure), AWSAccessKeyId, access_token, ..."""


def rounded(value: float) -> str:
    """Return a number with two digits, from 10 on as a whole one: 0.0021, 1.5, 150."""
    return f"{value:.0f}" if abs(value) >= 9.95 else f"{value:.2g}"


def printable(text: str) -> str:
    """Return the text ``masked``, with every character that would control the terminal escaped."""
    escaped = _OBEYED.sub(_escape, text)
    return masked(_HALVES.sub(_escape, escaped))


def _escape(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def warn(text: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {printable(text)}", file=sys.stderr)


def masked(text: str) -> str:
    """Return the text with every password, signature and token in its addresses replaced by ``***``."""
    if "://" not in text:
        return text
    text = _PASSWORD_IN_TEXT.sub(rf"\g<head>:{MASK}\g<at>", text)
    return _PARAMETER.sub(_masked_parameter, _USER.sub(rf"\g<head>{MASK}\g<at>", text))


def _masked_parameter(found: re.Match[str]) -> str:
    secret = found["value"] and _SECRET.search(unquote(found["name"][1:]).lower())
    return f"{found['name']}={MASK}" if secret else found.group()


def without_password(address: str) -> str | None:
    """Return the address with its password replaced by ``***``, or None if it has no password."""
    found = _PASSWORD_IN_ADDRESS.match(address)
    return None if found is None else masked(f"{found['head']}:{MASK}{found['at']}{address[found.end() :]}")
