"""Whether eager operations run instead of fused ones, in calls and in graphs that are being traced."""

from __future__ import annotations

import os

import torch

from ._load import library

_BY_VARIABLE = os.environ.get("FASTLANE_DISABLE") == "1"


def is_disabled() -> bool:
    """Whether this thread is inside `disabled`, or FASTLANE_DISABLE is set.

    While a graph is traced, the answer of `records_eager`.
    """
    if torch.compiler.is_compiling():
        return records_eager()
    return _BY_VARIABLE or (library.any_disabled and library.is_disabled())


def records_eager() -> bool:
    """Whether a graph is being traced that has to hold eager operations: for ONNX, or while any thread is disabled.

    One graph serves all threads. torch.compile traces again when the answer changes.
    """
    if not torch.compiler.is_compiling():
        return False
    return _BY_VARIABLE or library.any_disabled or torch.onnx.is_in_onnx_export()
