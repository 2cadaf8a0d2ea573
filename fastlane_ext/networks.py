"""Networks of fused layers: the whole stack is one call of `residual_stack`.

The constructors are the eager networks' own, from `fastlane_ext.reference`. A layer may have changed since the
network was built: it may have a hook, an adapter or another activation. The network then calls that layer as a
module, so that the layer's behaviour is kept. The other layers stay fused, and ``fastlane_ext.stats()`` counts the
fallback.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from ._activations import MODULES, name_of_module
from ._disabled import records_eager
from ._facts import of_class, of_item, why_changed
from ._load import library
from ._plain import (
    NETWORK,
    constant_while_traced,
    why_network_changed,
    why_not_plain,
    why_not_plain_linear,
    why_odd_tensor,
)
from .functional import linear_gelu_concat, linear_gelu_residual, record_fallback, residual_stack
from .modules import run_linear

__all__ = ["DeepNeuralNet", "ExampleDeepNeuralNetwork", "ImprovedResidualNetwork", "ResidualNetwork"]

_RUN_LAYER = reference.ResidualNetwork._run_layer
_OF_REFERENCE = (
    *of_class(reference.ResidualNetwork, "forward", "_run_layer"),
    of_item(vars(reference), "torch"),
)
"""The eager network that the fused one stands for."""


def _plain_layer(layer: nn.Module) -> tuple[Tensor, Tensor | None, str] | str:
    """Weight, bias and activation if the fused op can stand in for ``layer``, else the reason why not."""
    reason = why_not_plain(layer, nn.Sequential)
    if reason is not None:
        return reason
    if len(layer._modules) != 2:
        return f"has {len(layer._modules)} children, not Linear and activation"
    linear: Any
    activation: Any
    linear, activation = layer._modules.values()
    reason = why_not_plain_linear(linear)
    if reason is not None:
        return f"has a child 0 that {reason}"
    name = name_of_module(activation)
    reason = why_not_plain(activation, nn.GELU if name is None else MODULES[name].kind)
    if reason is not None:
        return f"has a child 1 that {reason}"
    if name is None:
        return f"has a GELU with approximate={activation.approximate!r}"
    return linear.weight, linear.bias, name


@constant_while_traced
def _why_reference_changed() -> str | None:
    return why_changed(_OF_REFERENCE)


class _FusedForward(reference.ResidualNetwork):
    """The fused ``forward`` of every network here."""

    def forward(self, x: Tensor) -> Tensor:
        """``(*, layer_sizes[0])`` to ``(*, layer_sizes[-1])``, or, with concat, ``(*, sum(layer_sizes))``."""
        if records_eager():
            return super().forward(x)
        if not torch.compiler.is_compiling():
            y = library.run_plain_network(self, x)
            if y is not None:
                return y
        return self._forward_checked(x)

    def _why_eager(self) -> str | None:
        """Why the whole network is not the one that `residual_stack` computes, or None."""
        if "_run_layer" in self.__dict__ or type(self)._run_layer is not _RUN_LAYER:
            return "has a _run_layer of its own"
        if self.shortcut == "projection" and self.projections is None:
            return "has no projections"
        return _why_reference_changed()

    def _forward_checked(self, x: Tensor) -> Tensor:
        weights, biases, common = [], [], ""
        reason = self._why_eager()
        if reason is not None:
            record_fallback(f"{type(self).__name__} {reason}")
            return super().forward(x)
        # torch.jit.trace knows no lists with None in them. Its is_tracing is not in torch.jit's __all__.
        if (why_network_changed() or why_odd_tensor(x)) is not None or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return self._forward_by_layer(x)
        for layer in self.layers:
            plain = _plain_layer(layer)
            # The stack op takes one activation for all layers; a network whose layers differ is fused layer by layer.
            if isinstance(plain, str) or plain[2] != (common or plain[2]):
                return self._forward_by_layer(x)
            weight, bias, common = plain
            weights.append(weight)
            biases.append(bias)
        if not weights:
            return x
        projections: list[Tensor | None] | None = None
        projection_biases: list[Tensor | None] | None = None
        projection: Any
        if self.shortcut == "projection" and self.projections is not None:
            projections, projection_biases = [], []
            for index in range(len(weights)):
                projection = self.projections[index]
                if projection is not None and why_not_plain_linear(projection) is not None:
                    return self._forward_by_layer(x)
                if self._why_other_shapes(index, weights[index]) is not None:
                    return self._forward_by_layer(x)
                projections.append(None if projection is None else projection.weight)
                projection_biases.append(None if projection is None else projection.bias)
        return residual_stack(
            x,
            weights,
            biases,
            shortcut=self.shortcut,
            projections=projections,
            projection_biases=projection_biases,
            activation=common,
        )

    def _why_other_shapes(self, index: int, weight: Tensor) -> str | None:
        """Why the fused op cannot add this layer's shortcut, or None. Eager also adds a shortcut of another width than
        the layer's output, if the two broadcast.
        """
        if self.shortcut != "projection" or self.projections is None:
            return None
        if not isinstance(weight, Tensor):  # torch.fx's stand-ins have no sizes
            return None
        projection: Any = self.projections[index]
        width = weight.shape[1] if projection is None else projection.out_features
        return None if width == weight.shape[0] else "adds a shortcut of another width"

    def _forward_by_layer(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            # The call of the layer before may have changed anything.
            plain = why_network_changed() or _plain_layer(layer)
            if not isinstance(plain, str):
                plain = why_odd_tensor(x) or self._why_other_shapes(index, plain[0]) or plain
            if isinstance(plain, str):
                record_fallback(f"layers.{index} {plain}")
                x = self._run_layer(index, layer, x)
                continue
            weight, bias, activation = plain
            if self.shortcut == "concat":
                x = linear_gelu_concat(x, weight, bias, activation=activation)
                continue
            residual = None
            if self.shortcut == "projection" and self.projections is not None:
                projection: Any = self.projections[index]
                residual = x if projection is None else run_linear(projection, f"projections.{index}", x)
            elif self.shortcut == "identity" and weight.shape[0] == weight.shape[1]:
                residual = x
            x = linear_gelu_residual(x, weight, bias, residual, activation=activation)
        return x


class ResidualNetwork(_FusedForward):
    __doc__ = reference.ResidualNetwork.__doc__


class ExampleDeepNeuralNetwork(_FusedForward, reference.ExampleDeepNeuralNetwork):
    __doc__ = reference.ExampleDeepNeuralNetwork.__doc__


class ImprovedResidualNetwork(_FusedForward, reference.ImprovedResidualNetwork):
    __doc__ = reference.ImprovedResidualNetwork.__doc__


class DeepNeuralNet(_FusedForward, reference.DeepNeuralNet):
    __doc__ = reference.DeepNeuralNet.__doc__


_OWN_NAMES = ("layers", "projections", "shortcut", "_run_layer", "__getattr__", "__getattribute__")
_FACTS = (*NETWORK, *_OF_REFERENCE, *of_class(reference.ResidualNetwork, *_OWN_NAMES))
library.know_activations(tuple((name, m.kind, tuple(m.arguments.items())) for name, m in MODULES.items()))
library.know_networks(_FACTS, reference.ResidualNetwork, _OWN_NAMES)
