"""Layouts: the same values, arranged otherwise in memory. Memory between the elements holds NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _nan(shape, like: Tensor) -> Tensor:
    return torch.full(shape, math.nan, dtype=like.dtype, device=like.device)


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t.clone()


def _stepped(t: Tensor) -> Tensor:
    view = _nan([2 * size for size in t.shape], t)[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


def _padded(t: Tensor) -> Tensor:
    view = _nan([size + 3 for size in t.shape], t)[tuple(slice(1, size + 1) for size in t.shape)]
    return view.copy_(t)


def _misaligned(t: Tensor) -> Tensor:
    return _nan([t.numel() + 1], t)[1:].view(t.shape).copy_(t)


def _permuted(t: Tensor) -> Tensor:
    dims = list(range(t.dim()))[::-1]
    return t.permute(dims).contiguous().permute(dims)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": _transposed,
    "stepped": _stepped,
    "padded": _padded,
    "misaligned": _misaligned,
    "permuted": _permuted,
}


def _overlapping(t: Tensor) -> Tensor:
    """Each row is the one before it, moved by one element: all strides 1."""
    if t.dim() == 0 or t.numel() == 0:
        return t
    buffer = torch.cat([t.flatten(), t.flatten()])
    return buffer.as_strided(t.shape, [1] * t.dim())


# These change the values: memory that is its own neighbour cannot hold arbitrary ones.
SHARING_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded_rows": lambda t: t[:1].expand(t.shape),
    "expanded_columns": lambda t: t[..., :1].expand(t.shape),
    "scalar": lambda t: t.flatten()[:1].reshape([1] * t.dim()).expand(t.shape) if t.numel() else t,
    "overlapping": _overlapping,
}
ALL_LAYOUTS = LAYOUTS | SHARING_LAYOUTS
