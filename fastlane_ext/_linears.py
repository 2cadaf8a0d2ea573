"""The linear layers that `fuse` knows: ``nn.Linear`` and transformers' ``Conv1D``, whose weight is stored (in, out)."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ._plain import PLAIN_TENSORS, original_class

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _conv1d() -> type[nn.Module] | None:
    # A model with such layers has imported it; nobody else shall.
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def class_name(kind: type) -> str:
    """The class's name, with its module unless that is torch.nn: an adapter may be called Linear too."""
    return kind.__name__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__name__}"


def linear_class(kind: type) -> type[nn.Module] | None:
    """``nn.Linear`` or ``Conv1D`` if ``kind`` is exactly one of them, fused or not."""
    kind = original_class(kind)
    return kind if kind is nn.Linear or (kind is _conv1d() and kind is not None) else None


def is_linear(module: nn.Module | None) -> bool:
    return linear_class(type(module)) is not None


def weight_and_bias(module: nn.Module, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """The parameters of such a layer, the weight as ``(out_features, in_features)``."""
    parameters = module._parameters
    weight = parameters["weight"]
    return (weight.t() if transposed else weight), parameters["bias"]


def why_parameters_unfit(linear: nn.Module) -> str | None:
    """None if the kernels take the layer's parameters, else why not."""
    for name in ("weight", "bias"):
        tensor = linear._parameters.get(name)
        if name in linear.__dict__:
            return f"has an attribute in place of its {name}"
        if tensor is None and name == "bias":
            continue
        if type(tensor) not in PLAIN_TENSORS:
            return f"has a {name} that is no plain parameter"
        if tensor.layout is not torch.strided or tensor.is_nested:
            return f"has a {name} of layout {tensor.layout}"
        if tensor.dtype not in _KERNEL_DTYPES:
            return f"has a {name} of {tensor.dtype}"
    weight, bias = linear._parameters["weight"], linear._parameters.get("bias")
    out_features = weight.shape[0 if linear_class(type(linear)) is nn.Linear else -1] if weight.dim() == 2 else None
    if out_features is None or (bias is not None and bias.shape != (out_features,)):
        # F.linear takes a weight of one dimension, and broadcasts a bias.
        return "has parameters of other shapes than a linear layer's"
    return None
