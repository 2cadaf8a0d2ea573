"""The layer's formulas, written a second time: numpy, explicit derivatives, one precision higher."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import torch
from torch import Tensor

from support.cases import IN_X, Case


def as_numpy(t: Tensor) -> np.ndarray:
    return t.detach().double().cpu().numpy()


def normal_cdf(z: np.ndarray) -> np.ndarray:
    """Φ in double. Where z has more digits, a first-order step accounts for them; the step is exact to 1e-32."""
    high = z.astype(np.float64)
    cdf = 0.5 * torch.special.erfc(torch.from_numpy(-high * math.sqrt(0.5))).numpy()
    return cdf + (z - high) * np.exp(-0.5 * high * high) / math.sqrt(2 * math.pi)


def gelu_parts(z: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """(c, b) with GELU = z c and GELU′ = c + b: Φ and zφ, or their counterparts in the other forms."""
    if activation == "gelu":
        return normal_cdf(z), z * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if activation == "quick_gelu":
        inner, slope = 1.702 * z, 1.702
    else:
        assert activation == "gelu_tanh", activation
        inner = 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
        slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
    small = np.exp(-np.abs(inner)) / (1 + np.exp(-np.abs(inner)))
    large = 1 / (1 + np.exp(-np.abs(inner)))
    sigmoid, complement = np.where(z < 0, small, large), np.where(z < 0, large, small)
    return sigmoid, z * sigmoid * complement * slope


def activation_and_slope(z: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    if activation == "none":
        return z, np.ones_like(z)
    c, b = gelu_parts(z, activation)
    return z * c, c + b


def activation_in_many_digits(z, activation: str):
    """The activation of an mpmath number, as an independent check of the formulas above."""
    if activation == "none":
        return z
    if activation == "gelu":
        return z * mpmath.erfc(-z / mpmath.sqrt(2)) / 2
    if activation == "quick_gelu":
        return z / (1 + mpmath.exp(-mpmath.mpf("1.702") * z))
    assert activation == "gelu_tanh", activation
    u = mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3)
    return z / (1 + mpmath.exp(-2 * u))


def run_oracle(case: Case, real=None) -> dict[str, np.ndarray]:
    """The results in float64. For a case in float64 the products are summed in long double."""
    real = real or (np.longdouble if case.x.dtype == torch.float64 else np.float64)
    k, n = case.weight.shape[1], case.weight.shape[0]
    x, weight, dy = (as_numpy(t).astype(real, copy=False) for t in (case.x, case.weight, case.grad))
    rows = math.prod(x.shape[:-1])
    x_rows, dy_rows = x.reshape(rows, k), dy.reshape(rows, dy.shape[-1])
    z = x_rows @ weight.T
    if case.bias is not None:
        z = z + as_numpy(case.bias).astype(real)
    y, slope = activation_and_slope(z, case.activation)
    dz = dy_rows[:, -n or dy_rows.shape[1] :] * slope
    result = {"dweight": dz.T @ x_rows, "dx": (dz @ weight).reshape(x.shape)}
    if case.bias is not None:
        result["dbias"] = dz.sum(0)
    if case.concat:
        result["dx"] = result["dx"] + dy[..., :k]
        y = np.concatenate([x_rows, y], 1)
    y = y.reshape(dy.shape)
    if case.residual_of:
        # Which elements the residual has, and where their gradients go, is torch's own indexing, in float64.
        source = case.x if case.residual in IN_X else case.residual_data
        source = source.detach().double().requires_grad_()
        residual = case.residual_of(source, source)
        y = y + as_numpy(residual)
        (d_source,) = torch.autograd.grad(residual.expand(dy.shape), source, case.grad.double())
        if case.residual in IN_X:
            result["dx"] = result["dx"] + as_numpy(d_source)
        else:
            result["dresidual"] = as_numpy(d_source)
    return result | {"y": y}
