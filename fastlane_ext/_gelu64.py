"""GELU and its derivative in fp64, exact far into the tails: the measure for fused results."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gelu64(x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """GELU of ``x`` (fp64), its derivative, and the size of the derivative's terms, which nearly cancel in the tail."""
    if activation == "gelu":
        gate = 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
        slope = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    else:
        c, k = math.sqrt(2 / math.pi), 0.044715
        inner = 2 * c * (x + k * x**3)
        gate = torch.sigmoid(inner)
        slope = gate * torch.sigmoid(-inner) * 2 * c * (1 + 3 * k * x * x)
    tilt = torch.where(slope == 0, torch.zeros_like(x), x * slope)
    return torch.where(gate == 0, torch.zeros_like(x), x * gate), gate + tilt, gate + tilt.abs()
