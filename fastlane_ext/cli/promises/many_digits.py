"""A layer and its gradients with 40 digits, to measure float64. mpmath is exact and slow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def _activation(z: Any, activation: str) -> tuple[Any, Any]:
    # (act(z), act'(z)) in mpmath numbers.
    from mpmath import mp

    if activation == "none":
        return z, mp.mpf(1)
    if activation == "gelu":
        cdf = mp.erfc(-z / mp.sqrt(2)) / 2
        return z * cdf, cdf + z * mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)
    c, k = mp.sqrt(2 / mp.pi), mp.mpf(0.044715)
    gate = 1 / (1 + mp.exp(-2 * c * (z + k * z**3)))
    return z * gate, gate + z * gate * (1 - gate) * 2 * c * (1 + 3 * k * z * z)


def results(inputs: dict[str, Tensor], activation: str) -> list[list[list[Any]]]:
    """y and the gradients of x, W, b and the residual, as nested lists of mpmath numbers."""
    from mpmath import mp, mpf

    with mp.workdps(40):
        x, weight, dy = ([[mpf(v) for v in row] for row in inputs[n].tolist()] for n in ("x", "weight", "dy"))
        bias = [mpf(v) for v in inputs["bias"].tolist()]
        full = inputs["residual"].dim() == 2
        residual = inputs["residual"].tolist() if full else [inputs["residual"].tolist()] * len(x)
        y, dz = [], []
        for i, row in enumerate(x):
            z = [mp.fdot(row, weight[n]) + bias[n] for n in range(len(weight))]
            pairs = [_activation(value, activation) for value in z]
            y.append([value + mpf(residual[i][n]) for n, (value, _) in enumerate(pairs)])
            dz.append([dy[i][n] * slope for n, (_, slope) in enumerate(pairs)])
        dz_columns, dy_columns = list(zip(*dz, strict=True)), list(zip(*dy, strict=True))
        x_columns, weight_columns = list(zip(*x, strict=True)), list(zip(*weight, strict=True))
        dx = [[mp.fdot(row, column) for column in weight_columns] for row in dz]
        dweight = [[mp.fdot(column, other) for other in x_columns] for column in dz_columns]
        db = [[mp.fsum(column) for column in dz_columns]]
        dresidual = dy if full else [[mp.fsum(column) for column in dy_columns]]
        return [y, dx, dweight, db, dresidual]


def error(got: Tensor, exact: list[list[Any]]) -> float:
    """The largest difference, relative to the largest exact value."""
    from mpmath import mp, mpf

    if not torch.isfinite(got).all():
        return math.inf
    with mp.workdps(40):
        rows = got.reshape(len(exact), -1).tolist()
        scale = max(abs(value) for row in exact for value in row)
        pairs = [(mpf(a), b) for mine, other in zip(rows, exact, strict=True) for a, b in zip(mine, other, strict=True)]
        return float(max(abs(a - b) for a, b in pairs) / max(scale, mpf("1e-300")))
