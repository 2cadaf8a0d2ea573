"""Text for streams that cannot encode all of it: an ASCII terminal gets "us" and "->", not a traceback."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["for_stream", "tolerant"]

_HANDLER = "fastlane_ascii"
_SPELLED = {
    "µ": "u",  # micro sign
    "μ": "u",  # Greek mu
    "→": "->",
    "←": "<-",
    "×": "x",
    "·": "*",
    "±": "+/-",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "≤": "<=",
    "≥": ">=",
    "≠": "!=",
    "≈": "~",
    "∞": "inf",
    "∂": "d",
    "Φ": "Phi",
    "φ": "phi",
    "′": "'",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "ᵀ": "^T",
    "²": "^2",
    "³": "^3",
    "\N{NO-BREAK SPACE}": " ",
}


def _spell(character: str) -> str:
    return _SPELLED.get(character) or character.encode("ascii", "backslashreplace").decode("ascii")


def for_stream(text: str, stream: Any) -> str:
    """``text`` with what ``stream`` cannot encode spelled in ASCII; unchanged for a stream without an encoding.

    >>> import io
    >>> for_stream("x Wᵀ → 3 µs", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    'x W^T -> 3 us'
    """
    encoding = getattr(stream, "encoding", None)
    if not isinstance(encoding, str):
        return text
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(character if _encodes(character, encoding) else _spell(character) for character in text)
    except LookupError:
        pass
    return text


def _encodes(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        # A byte of a file's name that is no text: it goes out as it came in.
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _spell(character), error.start + 1


codecs.register_error(_HANDLER, _replace)


@contextlib.contextmanager
def tolerant(stream: Any) -> Iterator[None]:
    """Inside, ``stream`` spells what it cannot encode, unless its user has chosen another way (PYTHONIOENCODING)."""
    errors = getattr(stream, "errors", None)
    if errors not in ("strict", "surrogateescape", "backslashreplace") or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        # Reconfiguring flushes, which a full disk refuses; whoever wrote has been told.
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors=errors)
