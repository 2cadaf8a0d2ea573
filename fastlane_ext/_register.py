"""Batching rules for torch.vmap. Everything else is registered in C++ (csrc/ops)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._activations import activate
from ._load import library


def _batch_first(tensor: Tensor, dim: int | None) -> Tensor:
    return tensor if dim is None else tensor.movedim(dim, 0)


def _aligned(tensor: Tensor, dim: int | None, rank: int) -> Tensor:
    """Batch dimension first, then ones, so that it broadcasts against `rank` logical dimensions."""
    if dim is None:
        return tensor
    tensor = tensor.movedim(dim, 0)
    return tensor.reshape(tensor.shape[0], *[1] * (rank - tensor.dim() + 1), *tensor.shape[1:])


def _logical_rank(x: Tensor, x_dim: int | None) -> int:
    rank = x.dim() - (x_dim is not None)
    if rank == 0:
        raise RuntimeError("x is 0-D under vmap, expected (..., in_features); add a dimension with x.reshape(1)")
    return rank


def _batched_layer(
    in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """act(x Wᵀ + b) where weight or bias differs between examples; no fused kernel computes this."""
    library.leave_fused_path("vmap over weight or bias")
    x_dim, weight_dim, bias_dim = in_dims
    rank = _logical_rank(x, x_dim)
    x = _batch_first(x, x_dim)
    weight = _batch_first(weight, weight_dim)
    if rank == 1:
        z = torch.einsum("...k,...nk->...n", x, weight)
    else:
        if weight_dim is not None:
            weight = _aligned(weight, 0, rank)
        z = torch.matmul(x, weight.mT)
    if bias is not None:
        z = z + _aligned(bias, bias_dim, rank)
    return activate(z, activation)


def _vmap_residual(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "gelu",
    recompute: bool = False,
) -> tuple[Tensor, int]:
    x_dim, weight_dim, bias_dim, residual_dim = (*in_dims, None, None)[:4]
    rank = _logical_rank(x, x_dim)
    if weight_dim is None and bias_dim is None:
        if x_dim is None and residual_dim is not None:
            x, x_dim = x.expand(info.batch_size, *x.shape), 0
        x = _batch_first(x, x_dim)
        if residual is not None:
            residual = _aligned(residual, residual_dim, rank)
        y = torch.ops.fastlane.linear_gelu_residual(
            x, weight, bias, residual, activation=activation, recompute=recompute
        )
        return y, 0
    y = _batched_layer((x_dim, weight_dim, bias_dim), x, weight, bias, activation)
    if residual is not None:
        y = y + _aligned(residual, residual_dim, rank)
    return y, 0


def _vmap_mlp(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    activation: str = "gelu",
    recompute: bool = False,
) -> tuple[Tensor, int]:
    x_dim, *parameter_dims, residual_dim = (*in_dims, None)[:6]
    if all(dim is None for dim in parameter_dims):
        rank = _logical_rank(x, x_dim)
        if x_dim is None:
            x, x_dim = x.expand(info.batch_size, *x.shape), 0
        if residual is not None:
            residual = _aligned(residual, residual_dim, rank)
        options = {"activation": activation, "recompute": recompute}
        parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        return torch.ops.fastlane.mlp_residual(_batch_first(x, x_dim), *parameters, residual, **options), 0
    # Layer by layer, so that the rule for one layer decides for each of the two.
    fc1_dims, fc2_dims = parameter_dims[:2], parameter_dims[2:]
    if all(dim is None for dim in (x_dim, *fc1_dims)):
        hidden = torch.ops.fastlane.linear_gelu_residual(x, fc1_weight, fc1_bias, activation=activation)
        dim = None
    else:
        hidden, dim = _vmap_residual(
            info, (x_dim, *fc1_dims, None), x, fc1_weight, fc1_bias, None, activation=activation, recompute=recompute
        )
    return _vmap_residual(
        info, (dim, *fc2_dims, residual_dim), hidden, fc2_weight, fc2_bias, residual, activation="none"
    )


def _vmap_concat(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "gelu",
) -> tuple[Tensor, int]:
    x_dim, weight_dim, bias_dim = (*in_dims, None)[:3]
    _logical_rank(x, x_dim)
    if weight_dim is None and bias_dim is None:
        x = _batch_first(x, x_dim)
        return torch.ops.fastlane.linear_gelu_concat(x, weight, bias, activation=activation), 0
    activated = _batched_layer((x_dim, weight_dim, bias_dim), x, weight, bias, activation)
    x = _batch_first(x, x_dim).expand(*activated.shape[:-1], x.shape[-1] if x_dim != x.dim() - 1 else -1)
    return torch.cat([x, activated], -1), 0


def _is_square(weight: Tensor, dim: int | None) -> bool:
    rows, columns = _batch_first(weight, dim).shape[-2:]
    return rows == columns


def _vmap_stack(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    projections: Sequence[Tensor | None],
    projection_biases: Sequence[Tensor | None],
    *,
    shortcut: str = "identity",
    activation: str = "gelu",
    **rest: Any,
) -> tuple[Tensor, int | None]:
    x_dim, *parameter_dims = in_dims
    lists = (weights, biases, projections, projection_biases)
    if all(dim is None for dims in parameter_dims for dim in (dims or ())):
        _logical_rank(x, x_dim)
        options = {"shortcut": shortcut, "activation": activation, **rest}
        return torch.ops.fastlane.residual_stack(_batch_first(x, x_dim), *lists, **options), 0
    # Layer by layer, so that the rules for one layer decide for each.
    none = [None] * len(weights)
    tensors = zip(*(values or none for values in lists), strict=True)
    dims = zip(*(dims or none for dims in parameter_dims), strict=True)
    for (weight, bias, projection, projection_bias), (w_dim, b_dim, p_dim, pb_dim) in zip(tensors, dims, strict=True):
        if shortcut == "concat":
            x, x_dim = _vmap_concat(info, (x_dim, w_dim, b_dim), x, weight, bias, activation=activation)
            continue
        residual, residual_dim = None, None
        if projection is not None:
            dims_of_projection = (x_dim, p_dim, pb_dim, None)
            residual, residual_dim = _vmap_residual(
                info, dims_of_projection, x, projection, projection_bias, activation="none"
            )
        elif shortcut != "none" and _is_square(weight, w_dim):
            residual, residual_dim = x, x_dim
        x, x_dim = _vmap_residual(
            info, (x_dim, w_dim, b_dim, residual_dim), x, weight, bias, residual, activation=activation
        )
    return x, x_dim


def _vmap_stack_backward(
    info: Any,
    in_dims: tuple[Any, ...],
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    projections: Sequence[Tensor | None],
    projection_biases: Sequence[Tensor | None],
    z: Tensor | None = None,
    *,
    needed: Sequence[int],
    **options: Any,
) -> tuple[list[Tensor], list[int]]:
    """One example after the other. torch falls back to the same by itself, but not for operators that return a list."""
    arguments = (grad, x, weights, biases, projections, projection_biases, z)[: len(in_dims)]

    def example(value: Any, dim: Any, index: int) -> Any:
        if isinstance(value, (list, tuple)):
            return [example(entry, d, index) for entry, d in zip(value, dim or [None] * len(value), strict=True)]
        return value if dim is None or value is None else value.select(dim, index)

    results = [
        torch.ops.fastlane.residual_stack_backward(
            *(example(value, dim, index) for value, dim in zip(arguments, in_dims, strict=True)),
            needed=needed,
            **options,
        )
        for index in range(info.batch_size)
    ]
    return [torch.stack(gradients) for gradients in zip(*results, strict=True)], [0] * len(needed)


torch.library.register_vmap("fastlane::linear_gelu_residual", _vmap_residual)
torch.library.register_vmap("fastlane::mlp_residual", _vmap_mlp)
torch.library.register_vmap("fastlane::residual_stack_backward", _vmap_stack_backward)
torch.library.register_vmap("fastlane::residual_stack", _vmap_stack)
torch.library.register_vmap("fastlane::linear_gelu_concat", _vmap_concat)
