"""Formulas for torch.utils.flop_counter: 2·M·N·K for each product that a call computes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._load import library

Shape = Sequence[int]


def _rows(x: Shape) -> int:
    return prod(x[:-1])


# A packed weight has a second size of its own, so the inputs are counted on the other operand.
def _linear(x: Shape, weight: Shape) -> int:
    return 2 * _rows(x) * weight[0] * x[-1]


def _layer(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _linear(x, weight)


def _layer_backward(
    grad: Shape,
    z: Shape | None = None,
    x: Shape | None = None,
    weight: Shape | None = None,
    *_: Any,
    activation: str,
    output_mask: Sequence[bool],
    **__: Any,
) -> int:
    needs_x, needs_weight, _needs_bias = output_mask
    again = z is None and activation != "none" and any(output_mask)
    # Without x and weight there is no product, so that any number will do.
    in_features = x[-1] if x is not None else weight[1] if weight is not None else 0
    return (needs_x + needs_weight + again) * 2 * _rows(grad) * grad[-1] * in_features


def _mlp(x: Shape, fc1_weight: Shape, fc1_bias: Shape | None, fc2_weight: Shape, *_: Any, **__: Any) -> int:
    return _linear(x, fc1_weight) + 2 * _rows(x) * fc2_weight[0] * fc1_weight[0]


def _mlp_backward(
    grad: Shape,
    z: Shape | None = None,
    x: Shape | None = None,
    fc1_weight: Shape | None = None,
    fc1_bias: Shape | None = None,
    fc2_weight: Shape | None = None,
    *_: Any,
    activation: str,
    output_mask: Sequence[bool],
    **__: Any,
) -> int:
    needs_x, needs_fc1_weight, needs_fc1_bias, needs_fc2_weight, _needs_fc2_bias = output_mask
    needs_dz = needs_x or needs_fc1_weight or needs_fc1_bias
    again = z is None and (needs_fc2_weight or (needs_dz and activation != "none"))
    in_features = x[-1] if x is not None else fc1_weight[1] if fc1_weight is not None else 0
    hidden = z[-1] if z is not None else fc2_weight[1] if fc2_weight is not None else fc1_weight[0] if fc1_weight else 0
    of_fc1 = (needs_x + needs_fc1_weight + again) * in_features
    of_fc2 = (needs_dz + needs_fc2_weight) * grad[-1]
    return 2 * _rows(grad) * hidden * (of_fc1 + of_fc2)


def _stack(
    x: Shape,
    weights: Sequence[Shape],
    biases: Any,
    projections: Sequence[Shape | None],
    *_: Any,
    shortcut: str = "identity",
    **__: Any,
) -> int:
    total, in_features = 0, x[-1]
    for weight, projection in zip(weights, projections or [None] * len(weights), strict=True):
        products = 1 if projection is None else 2
        total += 2 * _rows(x) * products * in_features * weight[0]
        in_features = in_features + weight[0] if shortcut == "concat" else weight[0]
    return total


def _stack_backward(
    grad: Shape,
    x: Shape | None,
    weights: Sequence[Shape | None],
    biases: Any,
    projections: Sequence[Shape | None],
    projection_biases: Any,
    z: Shape | None = None,
    *,
    features: Sequence[int],
    shortcut: str,
    activation: str,
    needed: Sequence[int],
    **_: Any,
) -> int:
    projects = [shape is not None for shape in projections] or [False] * len(weights)
    products = library.stack_backward_products(features, projects, shortcut, activation, z is not None, needed)
    total, in_features = 0, features[0]
    for count, out_features in zip(products, features[1:], strict=True):
        total += 2 * _rows(grad) * count * in_features * out_features
        in_features = in_features + out_features if shortcut == "concat" else out_features
    return total


_OPERATORS = torch.ops.fastlane
register_flop_formula([_OPERATORS.linear_gelu_residual, _OPERATORS.linear_gelu_concat, _OPERATORS.linear_gelu_forward])(
    _layer
)
register_flop_formula(_OPERATORS.linear_gelu_backward)(_layer_backward)
register_flop_formula([_OPERATORS.mlp_residual, _OPERATORS.mlp_forward])(_mlp)
register_flop_formula(_OPERATORS.mlp_backward)(_mlp_backward)
register_flop_formula([_OPERATORS.residual_stack, _OPERATORS.residual_stack_forward])(_stack)
register_flop_formula(_OPERATORS.residual_stack_backward)(_stack_backward)
