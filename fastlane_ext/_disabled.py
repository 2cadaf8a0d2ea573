"""Whether eager operations run instead of fused ones, also for what is being traced."""

from __future__ import annotations

import os

import torch

from ._load import library

_BY_VARIABLE = os.environ.get("FASTLANE_DISABLE") == "1"


def is_disabled() -> bool:
    """Whether this thread is inside `disabled`, or FASTLANE_DISABLE is set.

    While torch.compile or torch.export traces, whether any thread is inside: one graph serves all of them, and
    torch.compile traces anew when the answer changes.
    """
    if not (library.any_disabled or _BY_VARIABLE):
        return False
    return _BY_VARIABLE or torch.compiler.is_compiling() or library.is_disabled()


def records_eager() -> bool:
    """Whether a graph is being traced that shall hold eager operations."""
    return is_disabled() and torch.compiler.is_compiling()
