"""Text for people: columns, units, and what a stream can encode.

An ASCII terminal gets "us" and "->", not a traceback.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["aligned", "for_stream", "seconds", "size", "tolerant"]

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
        # A byte of a file name that is not text is written out unchanged.
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _spell(character), error.start + 1


codecs.register_error(_HANDLER, _replace)


@contextlib.contextmanager
def tolerant(stream: Any) -> Iterator[None]:
    """Inside, ``stream`` spells in ASCII what it cannot encode, unless PYTHONIOENCODING asks for something else."""
    errors = getattr(stream, "errors", None)
    if errors not in ("strict", "surrogateescape", "backslashreplace") or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        # Reconfiguring flushes, and a flush fails on a full disk; the earlier write has raised already.
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors=errors)


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """One line for each row, columns as wide as their longest cell; the first ``left`` are aligned left, others right.

    >>> aligned([["name", "size"], ["x", "10"]], left=1)
    ['name  size', 'x       10']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def seconds(value: float) -> str:
    """A time for people: ``1.23 ms``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(value: int) -> str:
    """A number of bytes for people: ``1.5 MiB``."""
    if value >= 1 << 80:
        return f"2^{value.bit_length() - 1} B"
    for unit, shift in (("EiB", 60), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 1 << shift:
            return f"{value / (1 << shift):.3g} {unit}"
    return f"{value} B"
