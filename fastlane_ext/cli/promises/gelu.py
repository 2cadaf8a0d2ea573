"""GELU and its derivative alone, over all values of 16 bits and many of 32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastlane_ext import reference
from fastlane_ext._activations import in_float64

from .rows import DTYPES, Counter, Row, row


def _through_layer(layer: Callable[..., Tensor], x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    # GELU and its derivative from a layer with one input, one output, weight 1, no bias.
    leaf = x.unsqueeze(1).requires_grad_()
    y = layer(leaf, torch.ones(1, 1, dtype=x.dtype), activation=activation)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach().squeeze(1), dx.squeeze(1)


def _dense_float32() -> Tensor:
    # Every 1,024th bit pattern of either sign up to 10, and a million evenly spaced values.
    ten = torch.tensor(10.0).view(torch.int32).item()
    patterns = torch.arange(0, int(ten) + 1, 1024, dtype=torch.int32).view(torch.float32)
    return torch.cat([patterns, -patterns, torch.linspace(-10, 10, 1_000_001)])


def scalar_float32(fused: Counter, activation: str) -> list[Row]:
    """Relative error of GELU over fp32 in [-10, 10], and error of GELU' relative to Φ(x) + |x|φ(x): at most 1e-5."""
    x = _dense_float32()
    value, slope, slope_size = in_float64(x.double(), activation)
    smallest = torch.finfo(torch.float32).smallest_normal
    errors = []
    for layer in (fused, reference.linear_gelu_residual):
        y, dx = _through_layer(layer, x, activation)
        # Below the smallest normal number a relative error has no meaning; half an ulp is allowed there.
        off = ((y.double() - value).abs() / value.abs().clamp_min(smallest)).max().item()
        off_slope = ((dx.double() - slope).abs() / slope_size.clamp_min(smallest)).max().item()
        errors.append([e if e == e else math.inf for e in (off, off_slope)])
    return [
        row("GELU on [-10, 10]", "float32", activation, what, mine, eagers, 1e-5, mine <= 1e-5)
        for what, mine, eagers in zip(("value", "derivative"), *errors, strict=True)
    ]


def _ulps(got: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp_min(info.smallest_normal))[1] - 1
    ulp = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    error = ((got.double() - exact).abs() / ulp).max().item()
    return error if error == error else math.inf


def scalar_half(fused: Counter, dtype_name: str, activation: str) -> list[Row]:
    """GELU and GELU' at all 65,536 values of a 16-bit type, in units in the last place: at most one.

    NaN must stay NaN; at +infinity the values are infinity and 1, at -infinity 0 and 0.
    """
    dtype = DTYPES[dtype_name]
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = torch.isfinite(x)
    value, slope, _ = in_float64(x.double(), activation)
    errors = []
    for layer in (fused, reference.linear_gelu_residual):
        results = _through_layer(layer, x, activation)
        pair = []
        for got, exact, at_infinity in zip(results, (value, slope), (math.inf, 1.0), strict=True):
            special = (
                bool(got[x.isnan()].isnan().all())
                and bool((got[x == math.inf] == at_infinity).all())
                and bool((got[x == -math.inf] == 0).all())
            )
            pair.append(_ulps(got[finite], exact[finite], dtype) if special else math.inf)
        errors.append(pair)
    return [
        row("all 65,536 values, in ulp", dtype_name, activation, what, mine, eagers, 1.0, mine <= 1.0)
        for what, mine, eagers in zip(("value", "derivative"), *errors, strict=True)
    ]
