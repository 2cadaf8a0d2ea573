"""Files that commands write: a bad path is refused before any work is done, and a file is written whole."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastlane_ext import plots
from fastlane_ext._arguments import shortened
from fastlane_ext._files import write_whole
from fastlane_ext._json import to_json

from .errors import CommandError


def write_json(result: Mapping[str, Any], path: str) -> None:
    """Write ``result`` as one JSON document to a file, whole or not at all, or to stdout for ``"-"``."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8") if path == "-" else "utf-8"
    text = to_json(result, ascii_only=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        # JSON has its own escapes; any other replacement of a character would change the value.
        text = to_json(result)
    if path == "-":
        print(text)
        return
    with cannot_write("--json", path):
        write_whole(path, f"{text}\n".encode())


@contextmanager
def cannot_write(option: str, path: str) -> Iterator[None]:
    """Turn errors inside, while ``path`` is written, into a CommandError that names ``option``."""
    try:
        yield
    except ImportError as error:
        raise CommandError(str(error)) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CommandError(f"{option}: cannot write {path}: {reason}") from error


def writable(option: str, path: str | None) -> None:
    """Raise CommandError for a path that cannot be written, before minutes of work rather than after."""
    if path is None or path == "-":
        return
    try:
        folder = Path(path).absolute().parent
        if not folder.is_dir():
            raise CommandError(f"{option}: got {path}, but the folder {folder} does not exist; make it first")
        if Path(path).is_dir():
            raise CommandError(f"{option}: got {shortened(path)}, which is a folder; give a file's name")
        place = path if os.path.exists(path) else folder
    except OSError as error:
        raise CommandError(f"{option}: cannot write {shortened(path)}: {error.strerror}") from error
    if not os.access(place, os.W_OK):
        raise CommandError(f"{option}: cannot write {path}: no permission to write to {place}")


def picture(option: str, path: str | None) -> None:
    """`writable` for a picture; also raises CommandError without matplotlib, or for a format that it does not write."""
    if path is None:
        return
    writable(option, path)
    try:
        plots.picture_format(path)
    except ImportError as error:
        raise CommandError(str(error)) from error
    except ValueError as error:
        raise CommandError(f"{option}: {str(error).removeprefix('path: ')}") from error
