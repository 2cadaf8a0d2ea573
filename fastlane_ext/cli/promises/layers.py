"""A layer's errors against fp64, beside eager's own errors; and its bits for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlane_ext import reference
from fastlane_ext.bench.machine import torch_threads

from . import many_digits
from .rows import DTYPES, Counter, Row, row

OUTPUTS = ("y", "dx", "dW", "db", "dresidual")
HARD_RATIO = 2.0

# (rows, in, out, scale of the weight, shape of the residual: full or a row)
_SHAPES = (
    (64, 64, 64, 1.0, "full"),
    (37, 53, 29, 1.0, "row"),
    (5, 130, 17, 3.0, "full"),
    (257, 33, 65, 1.0, "full"),
    (96, 256, 48, 0.5, "row"),
    (1, 64, 64, 1.0, "full"),
)
# For float64, since its exact results take long.
_SMALL_SHAPES = (
    (8, 16, 8, 1.0, "full"),
    (7, 13, 9, 2.0, "row"),
    (5, 3, 17, 1.0, "full"),
    (40, 16, 8, 1.0, "full"),
)
# The largest error over few sums is luck; several draws of each shape make it meaningful.
_DRAWS = 4

Inputs = dict[str, Tensor]


def _inputs(shape: tuple[int, int, int, float, str], dtype: torch.dtype, seed: int) -> Inputs:
    rows, fan_in, fan_out, scale, residual = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return {
        "x": random(rows, fan_in).to(dtype),
        "weight": (random(fan_out, fan_in) * (scale * fan_in**-0.5)).to(dtype),
        "bias": random(fan_out).to(dtype),
        "residual": (random(rows, fan_out) if residual == "full" else random(fan_out)).to(dtype),
        "dy": random(rows, fan_out).to(dtype),
    }


def _run(layer: Callable[..., Tensor], inputs: Inputs, activation: str) -> list[Tensor]:
    # y and the gradients of x, W, b and the residual, in the order of OUTPUTS.
    leaves = [inputs[name].clone().requires_grad_() for name in ("x", "weight", "bias", "residual")]
    y = layer(*leaves, activation=activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs["dy"])]


def _exact(inputs: Inputs, activation: str) -> list[Tensor]:
    return _run(reference.linear_gelu_residual, {k: v.double() for k, v in inputs.items()}, activation)


def _error(got: Tensor, exact: Tensor) -> float:
    # Largest difference, relative to the largest exact value.
    scale = max(exact.abs().max().item(), 1e-300)
    error = (got.double() - exact).abs().max().item() / scale
    return error if error == error else math.inf


def accuracy(fused: Counter, dtype_name: str, activation: str) -> list[Row]:
    """Errors of fused and eager against fp64 (fp64 itself: against 40 digits), pooled over layers: five rows."""
    dtype = DTYPES[dtype_name]
    worst: dict[str, list[float]] = {name: [0.0, 0.0] for name in OUTPUTS}
    wide = dtype == torch.float64
    for seed, shape in enumerate((_SMALL_SHAPES if wide else _SHAPES) * _DRAWS):
        inputs = _inputs(shape, dtype, seed)
        exact: list[Any] = many_digits.results(inputs, activation) if wide else _exact(inputs, activation)
        measure: Callable[[Tensor, Any], float] = many_digits.error if wide else _error
        layers: tuple[Callable[..., Tensor], ...] = (fused, reference.linear_gelu_residual)
        for place, layer in enumerate(layers):
            for name, got, want in zip(OUTPUTS, _run(layer, inputs, activation), exact, strict=True):
                worst[name][place] = max(worst[name][place], measure(got, want))
    rows = []
    for name, (mine, eagers) in worst.items():
        limit = HARD_RATIO * eagers
        rows.append(row("error of a layer", dtype_name, activation, name, mine, eagers, limit, mine <= limit))
    return rows


def determinism(fused: Counter, dtype_name: str) -> list[Row]:
    """The number of results whose bits differ between 1, 2, 3 and 4 threads or between two runs: none may."""
    differing = 0
    with torch_threads(torch.get_num_threads()):
        for seed, shape in enumerate(((515, 129, 67, 1.0, "full"), (2048, 64, 64, 1.0, "full"))):
            inputs = _inputs(shape, DTYPES[dtype_name], seed)
            first: list[Tensor] | None = None
            for threads in (1, 1, 2, 3, 4):
                torch.set_num_threads(threads)
                got = _run(fused, inputs, "gelu")
                first = first or got
                differing += sum(not torch.equal(a, b) for a, b in zip(first, got, strict=True))
    found = row("same bits, 1 to 4 threads", dtype_name, "gelu", "differing", differing, None, 0, not differing)
    return [found]
