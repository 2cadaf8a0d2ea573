"""Errors in one line on stderr: the user's mistakes, missing extras, streams that cannot be written."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from types import ModuleType
from typing import TextIO


class CommandError(Exception):
    """A user's mistake or a missing extra: one line on stderr, exit status 2."""


def need(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency. Raises CommandError, naming the extra to install, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(module.partition(".")[0], module.partition(".")[0])
        raise CommandError(f'{purpose} needs {package}: pip install "fastlane_ext[{extra}]"') from error


def complain(message: str) -> None:
    """Write one line to stderr, whatever is in ``message``; a closed or full stderr is ignored."""
    if sys.stderr is None:
        return
    try:
        print(" ".join(message.splitlines()), file=sys.stderr, flush=True)
    except OSError:
        abandon(sys.stderr)


def abandon(stream: TextIO | None) -> None:
    """Keep the interpreter from flushing into a stream at exit."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]
