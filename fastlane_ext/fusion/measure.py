"""Whether the fused operation is faster than the library for one plain linear layer, found by measuring both."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import functional
from .._load import library
from .activations import outside_modes
from .linears import is_transposed, weight_and_bias

LEAST_RATIO = 1.05


Measure = Callable[[torch.Tensor, "torch.Tensor | None"], dict[str, float]]


def why_not_faster(linear: nn.Module, measure: Measure) -> tuple[str | None, dict[str, float] | None]:
    """None if the fused operation is at least 5 % faster for this layer, else why the layer is left to the library; and
    the times, if ``measure`` (`measured`) was called.
    """
    weight, bias = weight_and_bias(linear, is_transposed(linear))
    if type(weight) is FakeTensor:
        return "has no data to be measured with", None
    if weight.device.type != "cpu":
        return f"is on {weight.device}; plain linear layers are measured on CPUs only", None
    if library.is_disabled():
        return "cannot be measured while fused operations are disabled", None
    times = measure(weight, bias)
    ratio = times["library_ms"] / times["fused_ms"]
    if ratio >= LEAST_RATIO:
        return None, times
    speed = "faster" if ratio < 1 / LEAST_RATIO else "as fast"
    return f"the library is {speed} here: its time is {ratio:.2f} of the fused op's", times


_MEASURED_ROWS, _MEASUREMENTS = 128, 7
_measurements: dict[tuple[Any, ...], dict[str, float]] = {}
_measuring = threading.Lock()


def measured(weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, float]:
    """The least times of interleaved calls on 128 random rows, in milliseconds; measured once for each shape.
    ``stats()`` does not count these calls.
    """
    path = os.environ.get("FASTLANE_PATH")
    key = (weight.shape, weight.stride(), weight.dtype, bias is None, torch.get_num_threads(), path)
    with _measuring, torch.no_grad(), outside_modes():
        if key not in _measurements:
            x = torch.randn(_MEASURED_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(
                weight.dtype
            )
            calls: dict[str, Callable[[], torch.Tensor]] = {
                "library_ms": lambda: F.linear(x, weight, bias),
                "fused_ms": lambda: functional.linear_gelu_residual(x, weight, bias, activation="none"),
            }
            times: dict[str, list[float]] = {name: [] for name in calls}
            counted = library.count(False)
            try:
                for turn in range(_MEASUREMENTS + 1):
                    for name, call in calls.items():
                        start = time.perf_counter()
                        call()
                        if turn:
                            times[name].append(1e3 * (time.perf_counter() - start))
            finally:
                library.count(counted)
            _measurements[key] = {"rows": _MEASURED_ROWS, **{name: min(values) for name, values in times.items()}}
        return dict(_measurements[key])
