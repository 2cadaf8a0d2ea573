"""Which classes of modules `fuse` knows: torch's plain ones and transformers' ``Conv1D``, fused or not."""

from __future__ import annotations

import sys

from torch import nn

from .._plain import KNOWN, Known, know

_conv1ds: dict[type[nn.Module], Known] = {}


def original_class(kind: type) -> type:
    """The class that a class made by `fuse` stands for, or ``kind`` itself."""
    return getattr(kind, "_fastlane_original", kind) if getattr(kind, "_fastlane_class", None) is kind else kind


def conv1d() -> type[nn.Module] | None:
    """transformers' ``Conv1D``, or None. A model with such layers has imported transformers; this function does not."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def known(kind: type) -> Known | None:
    """The ``Known`` of ``kind`` if it is one of torch's plain classes or transformers' ``Conv1D``, else None."""
    if kind in KNOWN:
        return KNOWN[kind]
    if kind not in _conv1ds and kind is conv1d():
        _conv1ds[kind] = know(kind, "transformers.pytorch_utils", (("torch", "addmm", "torch"),))
    return _conv1ds.get(kind)
