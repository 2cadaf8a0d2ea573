"""The fused operations as functions. Every one is differentiable, also twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _flops, _register, reference  # noqa: F401  (_flops, _register: what torch asks of an operator)
from ._activations import check_activation
from ._arguments import check_list, check_stack, check_tensor
from ._disabled import records_eager
from ._load import library
from .packed import PackedWeight, is_packed, weight_data, weights_data


def linear_gelu_residual(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "gelu",
    recompute: bool = False,
) -> Tensor:
    """``act(x Wᵀ + b) + residual`` in one pass over memory.

    Args:
        x: ``(..., in_features)``, any leading sizes, any strides; float32, float64, bfloat16 or float16.
        weight: ``(out_features, in_features)`` like ``nn.Linear``'s, of x's dtype and device; or, where nothing needs a
            gradient, a copy that `pack_weight` made.
        bias: ``(out_features,)`` or None.
        residual: broadcasts to the output's shape; None adds nothing. If residual is x itself, backward adds the
            shortcut's gradient inside the product that computes x's gradient.
        activation: ``"gelu"`` (exact, with erf), ``"gelu_tanh"``, ``"quick_gelu"`` (x σ(1.702 x)) or ``"none"``.
            Formulas: Hendrycks and Gimpel, arXiv:1606.08415.
        recompute: keep no pre-activation for backward; backward computes the pre-activation again.

    Returns:
        ``(..., out_features)``, contiguous, in x's dtype. 16-bit dtypes are accumulated in float32 and rounded once.

    Raises:
        RuntimeError: a dtype, device, layout or shape does not fit; the message names the argument.
        TypeError: an argument is not a tensor.
        ValueError: unknown activation.

    >>> x, weight, bias = torch.randn(8, 64), torch.randn(64, 64) / 8, torch.zeros(64)
    >>> linear_gelu_residual(x, weight, bias, residual=x).shape
    torch.Size([8, 64])
    """
    plain = weight_data(weight)
    if not torch.compiler.is_compiling():
        y = library.run_plain_layer(None, x, plain, bias, residual, activation, recompute)
        if y is not None:
            return y
    check_tensor("x", x)
    check_tensor("weight", plain)
    check_tensor("bias", bias, optional=True)
    check_tensor("residual", residual, optional=True)
    if not isinstance(activation, str):
        check_activation(activation)
    if records_eager() and not is_packed(plain):
        return reference.linear_gelu_residual(x, plain, bias, residual, activation=activation)
    return torch.ops.fastlane.linear_gelu_residual.default(
        x, plain, bias, residual, activation=activation, recompute=recompute
    )


def linear_gelu_concat(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, *, activation: str = "gelu"
) -> Tensor:
    """``cat([x, act(x Wᵀ + b)], -1)``; the kernel writes the activated part into its slice of the output.

    Shapes, dtypes and errors are as in `linear_gelu_residual`. The output is ``(..., in_features + out_features)``.

    >>> linear_gelu_concat(torch.randn(8, 64), torch.randn(32, 64)).shape
    torch.Size([8, 96])
    """
    plain = weight_data(weight)
    check_tensor("x", x)
    check_tensor("weight", plain)
    check_tensor("bias", bias, optional=True)
    if not isinstance(activation, str):
        check_activation(activation)
    if records_eager() and not is_packed(plain):
        return reference.linear_gelu_concat(x, plain, bias, activation=activation)
    return torch.ops.fastlane.linear_gelu_concat.default(x, plain, bias, activation=activation)


def residual_stack(
    x: Tensor,
    weights: Sequence[Tensor | PackedWeight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    shortcut: str = "identity",
    projections: Sequence[Tensor | PackedWeight | None] | None = None,
    projection_biases: Sequence[Tensor | None] | None = None,
    activation: str = "gelu",
    recompute: bool = False,
) -> Tensor:
    """A network of residual layers as one operation; each layer joins ``act(h Wᵀ + b)`` with a shortcut of its input h.

    Forward and backward are one autograd node. If the layers are narrow enough for their weights to stay in cache,
    a block of rows goes through all layers there; wider layers run one after the other.

    For backward the operation keeps x and every layer's pre-activation (for narrow layers on a GPU, every layer's
    output), half of what eager keeps. On a CPU, narrow layers with more than 32 MiB of pre-activations keep only x, and
    backward computes the pre-activations again in cache. (If `cpu_isa` is ``"none"``, the operation keeps what eager
    keeps.)

    Eager keeps every layer's input; this backward reads other tensors instead. Do not change these tensors between
    forward and backward:

    * x, if the gradient of a weight or projection is needed and shortcuts lead from x to that layer's input;
    * a projection and its bias, if the gradient of a later layer's weight or projection is needed;
    * x, every weight, bias and projection on a GPU, and wherever the pre-activations are computed again.

    Args:
        x: ``(..., in_features)``.
        weights: one ``(out, in)`` tensor for each layer. ``in`` is the output width of the layer before, or, with
            ``shortcut="concat"``, the sum of all widths so far.
        biases: one ``(out,)`` tensor or None for each layer, or None for no bias at all.
        shortcut: ``"identity"`` adds h where ``in == out`` and nothing elsewhere; ``"projection"`` adds h
            where ``in == out`` and ``h Pᵀ + p`` elsewhere; ``"concat"`` returns ``cat([h, layer(h)], -1)``;
            ``"none"`` does nothing.
        projections: for ``"projection"``, one ``(out, in)`` tensor or None for each layer; a tensor is needed where
            ``in != out``.
        projection_biases: one ``(out,)`` tensor or None for each layer.
        activation: as in `linear_gelu_residual`.
        recompute: never keep pre-activations; backward computes them again from x and the parameters.

    Returns:
        ``(..., out_features of the last layer)``; with ``"concat"``, the sum of all widths.

    Raises:
        ValueError: unknown shortcut or activation, lists of different length, a missing or unused projection.
        TypeError: an argument is not a tensor, or not a list of tensors.
        RuntimeError: a dtype, device or shape does not fit.

    >>> weights = [torch.randn(64, 64) / 8 for _ in range(4)]
    >>> residual_stack(torch.randn(2, 10, 64), weights).shape
    torch.Size([2, 10, 64])
    """
    plain, plain_projections = weights_data(weights), weights_data(projections)
    has_projections = projections is not None or projection_biases is not None
    check_stack(x, plain, shortcut, has_projections=has_projections)
    check_activation(activation)
    for name, tensors in (
        ("biases", biases),
        ("projections", plain_projections),
        ("projection_biases", projection_biases),
    ):
        check_list(name, tensors)
    if records_eager() and not any(map(is_packed, (*plain, *(plain_projections or ())))):
        return reference.residual_stack(
            x,
            plain,
            biases,
            shortcut=shortcut,
            projections=plain_projections,
            projection_biases=projection_biases,
            activation=activation,
        )
    # AOTInductor hands an empty list of optional tensors on as None.
    absent = [None] * len(weights) if torch.compiler.is_compiling() else []
    return torch.ops.fastlane.residual_stack.default(
        x,
        plain,
        biases or absent,
        plain_projections or absent,
        projection_biases or absent,
        shortcut=shortcut,
        activation=activation,
        recompute=recompute,
    )


def mlp_residual(
    x: Tensor,
    fc1_weight: Tensor | PackedWeight,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor | PackedWeight,
    fc2_bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    activation: str = "gelu",
    recompute: bool = False,
) -> Tensor:
    """``residual + fc2(act(fc1(x)))``, the transformer block's MLP, as one operation.

    For backward the operation keeps x and fc1's output. Backward computes the activated output again where fc2's
    weight gradient needs it. (If `cpu_isa` is ``"none"``, the operation keeps what eager keeps.)

    Args:
        x: ``(..., in_features)``, any leading sizes, any strides; float32, float64, bfloat16 or float16.
        fc1_weight, fc1_bias: ``(hidden, in_features)`` and ``(hidden,)`` or None. Any strides. Pass a weight stored
            ``(in, out)``, as transformers' ``Conv1D`` stores its weight, as ``weight.t()``: the kernels read the
            weight in place, and its gradient is laid out the same way.
        fc2_weight, fc2_bias: ``(out_features, hidden)`` and ``(out_features,)`` or None.
        residual: broadcasts to ``(..., out_features)``; None adds nothing.
        activation, recompute: as in `linear_gelu_residual`.

    Returns:
        ``(..., out_features)``, contiguous, in x's dtype. In 16-bit dtypes the hidden activations are rounded, as
        eager rounds them.

    Raises:
        RuntimeError, TypeError, ValueError: as `linear_gelu_residual` does.

    >>> x = torch.randn(10, 64)
    >>> mlp_residual(x, torch.randn(256, 64), None, torch.randn(64, 256), None, residual=x).shape
    torch.Size([10, 64])
    """
    fc1, fc2 = weight_data(fc1_weight), weight_data(fc2_weight)
    if not torch.compiler.is_compiling():
        y = library.run_plain_mlp(x, fc1, fc1_bias, fc2, fc2_bias, residual, activation, recompute)
        if y is not None:
            return y
    check_tensor("x", x)
    check_tensor("fc1_weight", fc1)
    check_tensor("fc1_bias", fc1_bias, optional=True)
    check_tensor("fc2_weight", fc2)
    check_tensor("fc2_bias", fc2_bias, optional=True)
    check_tensor("residual", residual, optional=True)
    if not isinstance(activation, str):
        check_activation(activation)
    if records_eager() and not (is_packed(fc1) or is_packed(fc2)):
        return reference.mlp_residual(x, fc1, fc1_bias, fc2, fc2_bias, residual, activation=activation)
    return torch.ops.fastlane.mlp_residual.default(
        x, fc1, fc1_bias, fc2, fc2_bias, residual, activation=activation, recompute=recompute
    )


def record_fallback(reason: str) -> None:
    """Count a module's call that leaves the fused path; raises RuntimeError under FASTLANE_STRICT=1.

    Does nothing while torch.compile traces: a graph has no place for a counter.
    """
    if not torch.compiler.is_compiling():
        library.leave_fused_path(reason)
