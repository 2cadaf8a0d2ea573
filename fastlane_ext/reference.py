"""The same layers and networks in plain eager PyTorch: specification, test oracle and benchmark baseline.

Nothing here touches the compiled extension. The fused classes inherit their constructors from this file, so
that the parameters, their names and their initial values under a seed are the same.

Source of the formulas: GELU, Hendrycks & Gimpel, arXiv:1606.08415; identity and projection shortcuts, He et
al., arXiv:1512.03385; concatenation, Huang et al., arXiv:1608.06993.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._activations import ACTIVATIONS, activate, activation_module, check_activation
from ._arguments import (
    SHORTCUTS,
    bad,
    check_choice,
    check_flag,
    check_layer_sizes,
    check_size,
    check_stack,
    missing_projection,
    per_layer,
)
from ._plain import why_network_changed, why_not_plain

__all__ = [
    "ACTIVATIONS",
    "SHORTCUTS",
    "DeepNeuralNet",
    "ExampleDeepNeuralNetwork",
    "ImprovedResidualNetwork",
    "LinearGELUResidual",
    "ResidualMLP",
    "ResidualNetwork",
    "linear_gelu_concat",
    "linear_gelu_residual",
    "mlp_residual",
    "residual_stack",
]


def linear_gelu_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "gelu",
    recompute: bool = False,
) -> Tensor:
    """``act(x @ weight.T + bias) + residual``.

    ``x`` is ``(*, in)``, ``weight`` ``(out, in)``, ``bias`` ``(out,)``; ``residual`` broadcasts to the
    result, ``(*, out)``. ``activation`` is ``"gelu"`` (exact, erf), ``"gelu_tanh"``,
    ``"quick_gelu"`` or ``"none"``.
    ``recompute`` has no effect here; the fused function has the same parameter.

    Raises ValueError for an unknown ``activation``. PyTorch checks shapes and dtypes (RuntimeError).

    >>> import torch
    >>> linear_gelu_residual(torch.ones(2, 3), torch.zeros(4, 3), residual=torch.ones(4)).sum().item()
    8.0
    """
    y = activate(F.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


def linear_gelu_concat(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "gelu") -> Tensor:
    """``cat([x, act(x @ weight.T + bias)], -1)``: ``(*, in)`` becomes ``(*, in + out)``.

    Arguments and errors are as in `linear_gelu_residual`.

    >>> import torch
    >>> linear_gelu_concat(torch.ones(2, 3), torch.zeros(4, 3)).shape
    torch.Size([2, 7])
    """
    return torch.cat([x, linear_gelu_residual(x, weight, bias, activation=activation)], -1)


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
    """A network of layers, each ``act(x @ weight.T + bias)`` plus its shortcut, one after the other.

    ``x`` is ``(*, in)``. Each list holds one entry for each layer: weights and projections ``(out, in)``, biases
    ``(out,)``, None where a layer has none. The result is ``(*, out of the last layer)``.

    ``shortcut="identity"`` adds x where ``in == out``; ``"projection"`` adds a linear map of x where there is
    one, else x; ``"concat"`` puts x in front of each layer's output; ``"none"`` does nothing.

    ``recompute`` has no effect here; the fused function has the same parameter.

    Raises ValueError for an unknown ``shortcut`` or ``activation``, a list of the wrong length, a missing or
    an unused projection.

    >>> import torch
    >>> residual_stack(torch.ones(2, 3), [torch.zeros(3, 3)] * 2).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    has_projections = projections is not None or projection_biases is not None
    check_stack(x, weights, shortcut, has_projections=has_projections)
    check_activation(activation)
    biases = per_layer("biases", biases, len(weights))
    projections = per_layer("projections", projections, len(weights))
    projection_biases = per_layer("projection_biases", projection_biases, len(weights))
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if shortcut == "concat":
            x = linear_gelu_concat(x, weight, bias, activation=activation)
            continue
        square = weight.shape[0] == weight.shape[1]
        projection = projections[index] if shortcut == "projection" else None
        if shortcut == "projection" and projection is None and not square:
            raise missing_projection(index, weight.shape)
        residual = x if square and shortcut != "none" and projection is None else None
        y = linear_gelu_residual(x, weight, bias, residual, activation=activation)
        x = y if projection is None else y + F.linear(x, projection, projection_biases[index])
    return x


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
    """``residual + fc2(act(fc1(x)))``, the MLP of a transformer block; without ``residual`` nothing is added.

    ``x`` is ``(*, in)``, ``fc1_weight`` ``(hidden, in)``, ``fc2_weight`` ``(out, hidden)``, the result
    ``(*, out)``. Other arguments and errors are as in `linear_gelu_residual`.

    >>> import torch
    >>> mlp_residual(torch.ones(2, 3), torch.ones(5, 3), None, torch.zeros(3, 5), None).shape
    torch.Size([2, 3])
    """
    hidden = linear_gelu_residual(x, fc1_weight, fc1_bias, activation=activation)
    return linear_gelu_residual(hidden, fc2_weight, fc2_bias, residual, activation="none")


class LinearGELUResidual(nn.Module):
    """One layer, ``act(x @ weight.T + bias)`` with a shortcut.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: whether the layer and its projection have a bias.
        shortcut: ``"identity"``, ``"projection"``, ``"concat"`` or ``"none"``, as in `residual_stack`.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"quick_gelu"`` or ``"none"``.
        device, dtype: the parameters' device and dtype, as in ``nn.Linear``.

    Attributes:
        weight: ``(out_features, in_features)``, with the initial values of an ``nn.Linear``.
        bias: ``(out_features,)`` or None.
        projection: an ``nn.Linear(in_features, out_features)`` if ``shortcut="projection"`` and the sizes differ,
            else None.

    Raises:
        TypeError, ValueError: one line naming the argument, its value and the expected one.

    >>> import torch
    >>> LinearGELUResidual(3, 4, shortcut="concat")(torch.zeros(2, 3)).shape
    torch.Size([2, 7])
    """

    weight: Tensor
    bias: Tensor | None
    _linear_gelu_residual: Callable[..., Tensor] = staticmethod(linear_gelu_residual)
    _linear_gelu_concat: Callable[..., Tensor] = staticmethod(linear_gelu_concat)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        shortcut: str = "identity",
        activation: str = "gelu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("shortcut", shortcut, SHORTCUTS)
        check_activation(activation)
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        self.shortcut = shortcut
        self.activation = activation
        # Parameters taken from an nn.Linear have its initial values under any seed, in later versions of torch too.
        linear = nn.Linear(self.in_features, self.out_features, bias, device=device, dtype=dtype)
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.projection: nn.Linear | None = None
        if shortcut == "projection" and self.in_features != self.out_features:
            self.projection = nn.Linear(self.in_features, self.out_features, bias, device=device, dtype=dtype)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, shortcut: str = "identity", activation: str = "gelu"
    ) -> LinearGELUResidual:
        """A layer that shares ``linear``'s Parameter objects; training either trains both.

        A projection, where the shortcut needs one, is new and has ``linear``'s device and dtype.

        Raises:
            TypeError: ``linear`` is not exactly an ``nn.Linear`` with ordinary parameters, or hooks run in its calls.
                The new layer would lose that behaviour.

        >>> linear = nn.Linear(3, 3)
        >>> LinearGELUResidual.from_linear(linear).weight is linear.weight
        True
        """
        reason = why_not_plain(linear, nn.Linear) or why_network_changed()
        if reason is None and "weight" not in linear._parameters:
            reason = "has a computed weight"
        if reason is not None:
            expected = "an nn.Linear with ordinary parameters and no hooks"
            remedy = "remove hooks and parametrizations first"
            raise bad("linear", f"a module that {reason}", expected, remedy, TypeError)
        options: dict[str, Any] = {"shortcut": shortcut, "activation": activation}
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias, device="meta", **options)
        layer.weight, layer.bias = linear.weight, linear.bias
        if layer.projection is not None:
            like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
            layer.projection = nn.Linear(linear.in_features, linear.out_features, bias, **like)
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Draw new initial values for ``weight`` and ``bias``; the projection has a ``reset_parameters`` of its own."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(*, in_features)`` to ``(*, out_features)``, or ``(*, in + out)`` with ``shortcut="concat"``.

        ``residual``, if given, is added in place of the shortcut. With ``"concat"`` a residual raises ValueError.
        """
        if self.shortcut == "concat":
            self._refuse(residual)
            return self._linear_gelu_concat(x, self.weight, self.bias, activation=self.activation)
        if residual is None:
            residual = self._shortcut(x)
        return self._linear_gelu_residual(x, self.weight, self.bias, residual, activation=self.activation)

    def _shortcut(self, x: Tensor) -> Tensor | None:
        if self.shortcut == "projection" and self.projection is not None:
            return self.projection(x)
        return x if self.shortcut != "none" and self.in_features == self.out_features else None

    def _refuse(self, residual: Tensor | None) -> None:
        if residual is not None:
            raise bad("residual", "a tensor", 'None with shortcut="concat"', 'use shortcut="none" to add it')

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, shortcut={self.shortcut!r}, activation={self.activation!r}"
        )


class ResidualMLP(nn.Module):
    """``x + fc2(act(fc1(x)))`` on ``(*, dim)``.

    Args:
        dim: size of the last dimension of input and output.
        hidden_dim: size between the two linear maps.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"quick_gelu"`` or ``"none"``.
        bias: whether the two linear maps have a bias.

    Raises:
        TypeError, ValueError: one line naming the argument, its value and the expected one.

    >>> import torch
    >>> ResidualMLP(3, 12)(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self, dim: int, hidden_dim: int, *, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        check_activation(activation)
        dim, hidden_dim = check_size("dim", dim), check_size("hidden_dim", hidden_dim)
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden_dim, bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(activate(self.fc1(x), self.activation))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class ResidualNetwork(nn.Module):
    """A stack of ``Sequential(Linear, activation)`` layers with shortcuts.

    Args:
        layer_sizes: input size, then the output size of every layer: ``[64, 64, 10]`` makes two layers.
        shortcut: ``"identity"``, ``"projection"``, ``"concat"`` or ``"none"``, as in `residual_stack`.
            With ``"concat"`` a layer reads the sum of all widths before it.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"quick_gelu"`` or ``"none"``.
        bias: whether the linear maps have a bias.

    Attributes:
        layers: ``nn.ModuleList``; parameters ``layers.{i}.0.weight`` and ``layers.{i}.0.bias``.
        projections: with ``shortcut="projection"`` an ``nn.ModuleList`` that holds an ``nn.Linear`` where a layer's
            sizes differ and None elsewhere; with other shortcuts None.

    Raises:
        TypeError, ValueError: one line naming the argument, its value and the expected one.

    >>> import torch
    >>> ResidualNetwork([3, 3, 5], shortcut="projection")(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    projections: nn.ModuleList | None
    _sizes_argument = "layer_sizes"

    def __init__(
        self,
        layer_sizes: Sequence[int],
        *,
        shortcut: str = "identity",
        activation: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        sizes = check_layer_sizes(self._sizes_argument, layer_sizes)
        check_choice("shortcut", shortcut, SHORTCUTS)
        check_activation(activation)
        self.shortcut = shortcut
        layers, projections = [], []
        for index, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            width = sum(sizes[: index + 1]) if shortcut == "concat" else fan_in
            # Order matters: under a seed, each Linear draws its values before its projection does.
            layers.append(nn.Sequential(nn.Linear(width, fan_out, bias), activation_module(activation)))
            projected = shortcut == "projection" and fan_in != fan_out
            projections.append(nn.Linear(fan_in, fan_out, bias) if projected else None)
        self.layers = nn.ModuleList(layers)
        self.projections = nn.ModuleList(projections) if shortcut == "projection" else None  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``(*, layer_sizes[0])`` to ``(*, layer_sizes[-1])``, or, with ``"concat"``, ``(*, sum(layer_sizes))``."""
        for index, layer in enumerate(self.layers):
            x = self._run_layer(index, layer, x)
        return x

    @property
    def use_shortcut(self) -> bool:
        """Whether there are shortcuts; fixed when the network is made."""
        return self.shortcut != "none"

    def _run_layer(self, index: int, layer: nn.Module, x: Tensor) -> Tensor:
        y = layer(x)
        if self.shortcut == "concat":
            return torch.cat([x, y], -1)
        if self.shortcut == "projection" and self.projections is not None:
            projection = self.projections[index]
            return y + (x if projection is None else projection(x))
        return y + x if self.shortcut == "identity" and x.shape == y.shape else y

    def extra_repr(self) -> str:
        return f"shortcut={self.shortcut!r}"


class ExampleDeepNeuralNetwork(ResidualNetwork):
    """Any number of layers; each adds its input if ``use_shortcut`` and the shapes are equal.

    ``layer_sizes`` and ``activation`` are as in `ResidualNetwork`. The published gradient table uses ``"gelu_tanh"``.

    >>> import torch
    >>> ExampleDeepNeuralNetwork([3, 3, 1])(torch.zeros(2, 3)).shape
    torch.Size([2, 1])
    """

    def __init__(self, layer_sizes: Sequence[int], use_shortcut: bool = True, activation: str = "gelu") -> None:
        shortcut = "identity" if check_flag("use_shortcut", use_shortcut) else "none"
        super().__init__(layer_sizes, shortcut=shortcut, activation=activation)


class ImprovedResidualNetwork(ResidualNetwork):
    """With shortcuts on, every layer adds its input, through a learned ``nn.Linear`` where the sizes differ.

    ``layer_sizes`` and ``activation`` are as in `ResidualNetwork`. ``projections`` is always an ``nn.ModuleList`` with
    one entry for each layer: None where the layer has no projection.

    >>> sorted(ImprovedResidualNetwork([3, 3, 1]).state_dict())[-2:]
    ['projections.1.bias', 'projections.1.weight']
    """

    def __init__(self, layer_sizes: Sequence[int], use_shortcut: bool = True, activation: str = "gelu") -> None:
        shortcut = "projection" if check_flag("use_shortcut", use_shortcut) else "none"
        super().__init__(layer_sizes, shortcut=shortcut, activation=activation)
        if self.projections is None:
            self.projections = nn.ModuleList([None] * len(self.layers))  # type: ignore[list-item]


class DeepNeuralNet(ResidualNetwork):
    """Inputs of any rank; each layer adds its input if ``use_skip_connection`` and the shapes are equal.

    ``layer_size`` lists the sizes, as ``layer_sizes`` of `ResidualNetwork` does. ``activation="none"`` reproduces a
    notebook in which the GELU never took effect.

    >>> import torch
    >>> DeepNeuralNet(True, [25, 25, 43, 43, 54, 54])(torch.zeros(2, 3, 25)).shape
    torch.Size([2, 3, 54])
    """

    _sizes_argument = "layer_size"

    def __init__(self, use_skip_connection: bool, layer_size: Sequence[int], activation: str = "gelu_tanh") -> None:
        shortcut = "identity" if check_flag("use_skip_connection", use_skip_connection) else "none"
        super().__init__(layer_size, shortcut=shortcut, activation=activation)

    use_skip_connection = ResidualNetwork.use_shortcut
