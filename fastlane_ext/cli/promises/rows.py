"""A row of ``fastlane check``: one promise, and the errors of fused and eager."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fastlane_ext

Row = dict[str, Any]
"""``promise``, ``dtype``, ``activation``, ``what``, the error of ``fused``, the error of ``eager`` in the same place
(None where there is none), the ``limit`` on the fused error, the ``ratio`` of the errors, and ``ok``.
"""
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def row(
    promise: str,
    dtype: str,
    activation: str,
    what: str,
    fused: float,
    eager: float | None,
    limit: float,
    ok: bool,
) -> Row:
    return {
        "promise": promise,
        "dtype": dtype,
        "activation": activation,
        "what": what,
        "fused": fused,
        "eager": eager,
        "limit": limit,
        "ratio": None if eager is None else ratio(fused, eager),
        "ok": bool(ok),
    }


def ratio(fused: float, eager: float) -> float:
    """The fused error over eager's; 1 where both are exact."""
    if eager == 0:
        return 1.0 if fused == 0 else math.inf
    return fused / eager


def died(reason: str) -> Row:
    """A failed row in place of measurements that never came."""
    return {**row("runs to the end", "all", "all", "errors", 1, None, 0, False), "note": reason}


class Counter:
    """The fused layer with a count of its calls, with which ``stats()`` must agree in the end."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        self.calls += 1
        return fastlane_ext.linear_gelu_residual(*args, **options)
