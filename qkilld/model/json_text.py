"""Decode untrusted JSON. The depth is limited, and every error is a ValueError."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn

MAX_DEPTH: Final = 64
"""The maximum depth of nested arrays and objects. QEMU allows 1024; block graphs need about 20."""

# A string without an end matches up to the end of the text, so that a long text with many quotes is
# not searched again from each quote.
_BRACKET: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?|([\[{])|([\]}])', re.DOTALL)


def decode_json(text: str | bytes) -> Any:
    """Decode a JSON text; bytes must be UTF-8.

    Raises ValueError if the text is not JSON, is deeper than MAX_DEPTH, or has NaN or Infinity.
    """
    if isinstance(text, bytes):
        text = text.decode()
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _check_depth(text)
    return json.loads(text, parse_constant=_refuse)


def _check_depth(text: str) -> None:
    depth = 0
    for match in _BRACKET.finditer(text):
        if match[1]:
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"JSON nested more than {MAX_DEPTH} deep")
        elif match[2]:
            depth -= 1


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
