"""The operators in ATen's, for runtimes that have no kernels of ours: `torch.onnx.export` reads torch's table.

`torch.compile` and AOTInductor do not: there the fused operators stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import register_decomposition

from . import reference

_OPERATORS = torch.ops.fastlane


@register_decomposition(_OPERATORS.linear_gelu_residual.default)
def _residual(x, weight, bias=None, residual=None, *, activation="gelu", recompute=False):
    return reference.linear_gelu_residual(x, weight, bias, residual, activation=activation)


@register_decomposition(_OPERATORS.linear_gelu_concat.default)
def _concat(x, weight, bias=None, *, activation="gelu"):
    return reference.linear_gelu_concat(x, weight, bias, activation=activation)


@register_decomposition(_OPERATORS.linear_gelu_forward.default)
def _layer_forward(x, weight, bias=None, residual=None, *, activation, concat):
    z = F.linear(x, weight, bias)
    y = reference.activate(z, activation)
    if concat:
        return torch.cat([x, y], -1), z
    return (y + 0 if y is z else y) if residual is None else y + residual, z


@register_decomposition(_OPERATORS.mlp_residual.default)
def _mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual=None, *, activation="gelu", recompute=False):
    hidden = reference.linear_gelu_residual(x, fc1_weight, fc1_bias, activation=activation)
    return reference.linear_gelu_residual(hidden, fc2_weight, fc2_bias, residual, activation="none")


@register_decomposition(_OPERATORS.mlp_forward.default)
def _mlp_forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias=None, residual=None, *, activation):
    z = F.linear(x, fc1_weight, fc1_bias)
    hidden = reference.activate(z, activation)
    return reference.linear_gelu_residual(hidden, fc2_weight, fc2_bias, residual, activation="none"), z


def _run_stack(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    projections: Sequence[Tensor | None],
    projection_biases: Sequence[Tensor | None],
    shortcut: str,
    activation: str,
) -> tuple[Tensor, list[Tensor]]:
    none, zs = [None] * len(weights), []
    lists = (weights, biases or none, projections or none, projection_biases or none)
    for weight, bias, projection, projection_bias in zip(*lists, strict=True):
        zs.append(F.linear(x, weight, bias))
        y = reference.activate(zs[-1], activation)
        if shortcut == "concat":
            y = torch.cat([x, y], -1)
        elif projection is not None:
            y = y + F.linear(x, projection, projection_bias)
        elif shortcut != "none" and weight.shape[0] == weight.shape[1]:
            y = y + x
        x = y
    return x, zs


@register_decomposition(_OPERATORS.residual_stack.default)
def _stack(
    x, weights, biases, projections, projection_biases, *, shortcut="identity", activation="gelu", recompute=False
):
    return _run_stack(x, weights, biases, projections, projection_biases, shortcut, activation)[0]


@register_decomposition(_OPERATORS.residual_stack_forward.default)
def _stack_forward(x, weights, biases, projections, projection_biases, *, shortcut, activation):
    y, zs = _run_stack(x, weights, biases, projections, projection_biases, shortcut, activation)
    return y, torch.cat([z.reshape(-1) for z in zs])
