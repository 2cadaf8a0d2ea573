"""The fused operations as functions. Every one is differentiable, also twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _flops, _register, reference  # noqa: F401  (_flops, _register: what torch asks of an operator)
from ._arguments import ACTIVATIONS, check_choice, check_list, check_stack, check_tensor
from ._disabled import records_eager
from ._load import library


def linear_gelu_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "gelu",
    recompute: bool = False,
) -> Tensor:
    """``act(x Wᵀ + b) + residual`` in one pass over memory.

    Args:
        x: ``(..., in_features)``, any leading sizes, any strides; float32, float64, bfloat16 or float16.
        weight: ``(out_features, in_features)`` like ``nn.Linear``'s, of x's dtype and device.
        bias: ``(out_features,)`` or None.
        residual: broadcasts to the output's shape, or None. Where it is x itself, backward adds its gradient
            inside the product that computes x's.
        activation: ``"gelu"`` (exact, with erf), ``"gelu_tanh"`` or ``"none"``; the formulas are those of
            Hendrycks and Gimpel, arXiv:1606.08415.
        recompute: keep x alone for backward and compute the pre-activation a second time there.

    Returns:
        ``(..., out_features)``, contiguous, x's dtype; 16-bit dtypes are accumulated in float32 and
        rounded once.

    Raises:
        RuntimeError: a dtype, device, layout or shape does not fit; the message names the argument.
        TypeError: an argument is no tensor.
        ValueError: unknown activation.

    >>> x, weight, bias = torch.randn(8, 64), torch.randn(64, 64) / 8, torch.zeros(64)
    >>> linear_gelu_residual(x, weight, bias, residual=x).shape
    torch.Size([8, 64])
    """
    if not torch.compiler.is_compiling():
        y = library.run_plain_layer(None, x, weight, bias, residual, activation, recompute)
        if y is not None:
            return y
    check_tensor("x", x)
    check_tensor("weight", weight)
    check_tensor("bias", bias, optional=True)
    check_tensor("residual", residual, optional=True)
    if not isinstance(activation, str):
        check_choice("activation", activation, ACTIVATIONS)
    if records_eager():
        return reference.linear_gelu_residual(x, weight, bias, residual, activation=activation)
    return torch.ops.fastlane.linear_gelu_residual.default(
        x, weight, bias, residual, activation=activation, recompute=recompute
    )


def linear_gelu_concat(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "gelu") -> Tensor:
    """``cat([x, act(x Wᵀ + b)], -1)``; the kernel writes the activated part into its slice.

    Shapes, dtypes and errors as in `linear_gelu_residual`; the output is
    ``(..., in_features + out_features)``.

    >>> linear_gelu_concat(torch.randn(8, 64), torch.randn(32, 64)).shape
    torch.Size([8, 96])
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    check_tensor("bias", bias, optional=True)
    if not isinstance(activation, str):
        check_choice("activation", activation, ACTIVATIONS)
    if records_eager():
        return reference.linear_gelu_concat(x, weight, bias, activation=activation)
    return torch.ops.fastlane.linear_gelu_concat.default(x, weight, bias, activation=activation)


def residual_stack(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    shortcut: str = "identity",
    projections: Sequence[Tensor | None] | None = None,
    projection_biases: Sequence[Tensor | None] | None = None,
    activation: str = "gelu",
    recompute: bool = False,
) -> Tensor:
    """A network of residual layers, each ``act(h Wᵀ + b)`` joined with its shortcut of h, as one operation.

    Forward and backward are one autograd node. Where the layers are narrow enough for their weights to stay in
    cache, a block of rows goes through all of them there; wider layers run one after the other. For backward it
    keeps x and every layer's pre-activation, half of what eager keeps; of narrow layers beyond 32 MiB of
    pre-activations x alone, and computes them again in cache. (Where `cpu_isa` is ``"none"``, what eager keeps.)

    Backward reads some tensors again that eager's does not, since eager keeps every layer's input; between forward
    and backward they must not change. These are x, if the gradient of a weight or projection is needed and
    shortcuts lead from x to that layer's input; and a projection with its bias, if that of a later layer's weight
    or projection is. Where the pre-activations are computed again, which on a GPU is always so, backward reads
    x, every weight, bias and projection.

    Args:
        x: ``(..., in_features)``.
        weights: one ``(out, in)`` tensor a layer; ``in`` is the previous layer's output width, with
            ``shortcut="concat"`` the sum of all widths so far.
        biases: one ``(out,)`` tensor or None a layer, or None for no bias at all.
        shortcut: ``"identity"`` adds h where ``in == out`` and nothing elsewhere; ``"projection"`` adds h
            where ``in == out`` and ``h Pᵀ + p`` elsewhere; ``"concat"`` returns ``cat([h, layer(h)], -1)``;
            ``"none"`` does nothing.
        projections: for ``"projection"``, one ``(out, in)`` tensor or None a layer; needed where
            ``in != out``.
        projection_biases: one ``(out,)`` tensor or None a layer.
        activation: as in `linear_gelu_residual`.
        recompute: never keep pre-activations for backward; compute them there again from x and the parameters.

    Returns:
        ``(..., out_features of the last layer)``; with ``"concat"``, the sum of all widths.

    Raises:
        ValueError: unknown shortcut or activation, lists of different length, a missing or unused projection.
        TypeError: an argument is no tensor, or no list of tensors.
        RuntimeError: a dtype, device or shape does not fit.

    >>> weights = [torch.randn(64, 64) / 8 for _ in range(4)]
    >>> residual_stack(torch.randn(2, 10, 64), weights).shape
    torch.Size([2, 10, 64])
    """
    has_projections = projections is not None or projection_biases is not None
    check_stack(x, weights, shortcut, activation, has_projections=has_projections)
    for name, tensors in (("biases", biases), ("projections", projections), ("projection_biases", projection_biases)):
        check_list(name, tensors)
    if records_eager():
        return reference.residual_stack(
            x,
            weights,
            biases,
            shortcut=shortcut,
            projections=projections,
            projection_biases=projection_biases,
            activation=activation,
        )
    # AOTInductor hands an empty list of optional tensors on as None.
    absent = [None] * len(weights) if torch.compiler.is_compiling() else []
    return torch.ops.fastlane.residual_stack.default(
        x,
        weights,
        biases or absent,
        projections or absent,
        projection_biases or absent,
        shortcut=shortcut,
        activation=activation,
        recompute=recompute,
    )


def mlp_residual(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    activation: str = "gelu",
    recompute: bool = False,
) -> Tensor:
    """``residual + fc2(act(fc1(x)))``, the transformer block's MLP, as one operation.

    For backward it keeps x and fc1's output; the activated one is computed again where fc2's weight gradient
    needs it. (Where `cpu_isa` is ``"none"``, what eager keeps.)

    Args:
        x: ``(..., in_features)``, any leading sizes, any strides; float32, float64, bfloat16 or float16.
        fc1_weight, fc1_bias: ``(hidden, in_features)`` and ``(hidden,)`` or None. Any strides: a weight that is
            stored ``(in, out)``, as transformers' ``Conv1D`` does, is passed as ``weight.t()``, is read where it
            lies, and its gradient lies the same way.
        fc2_weight, fc2_bias: ``(out_features, hidden)`` and ``(out_features,)`` or None.
        residual: broadcasts to ``(..., out_features)``, or None to add nothing.
        activation, recompute: as in `linear_gelu_residual`.

    Returns:
        ``(..., out_features)``, contiguous, x's dtype. In 16-bit dtypes the hidden activations are rounded, as
        eager rounds them.

    Raises:
        RuntimeError, TypeError, ValueError: as `linear_gelu_residual` does.

    >>> x = torch.randn(10, 64)
    >>> mlp_residual(x, torch.randn(256, 64), None, torch.randn(64, 256), None, residual=x).shape
    torch.Size([10, 64])
    """
    if not torch.compiler.is_compiling():
        y = library.run_plain_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation, recompute)
        if y is not None:
            return y
    check_tensor("x", x)
    check_tensor("fc1_weight", fc1_weight)
    check_tensor("fc1_bias", fc1_bias, optional=True)
    check_tensor("fc2_weight", fc2_weight)
    check_tensor("fc2_bias", fc2_bias, optional=True)
    check_tensor("residual", residual, optional=True)
    if not isinstance(activation, str):
        check_choice("activation", activation, ACTIVATIONS)
    if records_eager():
        return reference.mlp_residual(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation=activation)
    return torch.ops.fastlane.mlp_residual.default(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation=activation, recompute=recompute
    )


def record_fallback(reason: str) -> None:
    """Count a module's call that leaves the fused path; RuntimeError under FASTLANE_STRICT=1.

    Not while torch.compile traces: a graph has no place for a counter.
    """
    if not torch.compiler.is_compiling():
        library.leave_fused_path(reason)
