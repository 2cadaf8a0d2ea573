"""The linear layers that `fuse` takes: ``nn.Linear`` and transformers' ``Conv1D``, whose weight is stored (in, out)."""

from __future__ import annotations

from torch import Tensor, nn

from .._plain import parameter_of
from .known import conv1d, original_class


def linear_class(kind: type) -> type[nn.Module] | None:
    """``nn.Linear`` or ``Conv1D`` if ``kind`` is exactly one of them, fused or not."""
    kind = original_class(kind)
    return kind if kind is nn.Linear or (kind is conv1d() and kind is not None) else None


def is_linear(module: nn.Module | None) -> bool:
    return linear_class(type(module)) is not None


def is_transposed(linear: nn.Module | None) -> bool:
    """Whether this linear layer's weight is stored (in, out)."""
    return linear_class(type(linear)) is not nn.Linear


def weight_and_bias(linear: nn.Module, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """The parameters of a linear layer, the weight as ``(out_features, in_features)``."""
    weight = parameter_of(linear, "weight")
    return (weight.t() if transposed else weight), parameter_of(linear, "bias")
