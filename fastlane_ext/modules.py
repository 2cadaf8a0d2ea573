"""Layers on the fused kernels, with the parameters, names and initial values of the eager ones.

A layer calls one fused op. A child may have changed since the layer was built: it may have a hook or a
parametrization, or an adapter in its place. The layer then calls that child as a module, so that the child's
behaviour is kept, and ``fastlane_ext.stats()`` counts the fallback.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _activations, functional, reference
from ._activations import activate
from ._disabled import records_eager
from ._facts import of_class, of_function, of_item, why_changed
from ._load import library
from ._plain import (
    FORMULA,
    NETWORK,
    constant_while_traced,
    why_formula_changed,
    why_network_changed,
    why_not_plain_linear,
    why_odd_tensor,
)
from .functional import linear_gelu_residual, mlp_residual, record_fallback

__all__ = ["LinearGELUResidual", "ResidualMLP"]


def run_linear(child: nn.Linear, name: str, x: Tensor) -> Tensor:
    """``child(x)``, by the fused op where the op computes the same."""
    reason = why_network_changed() or why_odd_tensor(x) or why_not_plain_linear(child)
    if reason is None:
        return linear_gelu_residual(x, child.weight, child.bias, activation="none")
    record_fallback(f"{name} {reason}")
    return child(x)


_ACTIVATE = (
    *(of_item(vars(reference), name) for name in ("activate", "F")),
    *of_function(activate),
    *(of_item(vars(_activations), name) for name in activate.__code__.co_names if name in vars(_activations)),
)
_FUNCTIONS = (
    *(of_item(vars(reference), name) for name in ("linear_gelu_residual", "torch")),
    *of_function(reference.linear_gelu_residual),
    *of_function(reference.linear_gelu_concat),
)
_LAYER = (*FORMULA, *_ACTIVATE, *_FUNCTIONS)
"""What the functions of `fastlane_ext.reference` that compute a layer rest on."""
_OF_REFERENCE = (*of_class(reference.ResidualMLP, "forward"), *_ACTIVATE)
"""The eager MLP that the fused one stands for."""
_SHORTCUT = tuple(of_class(reference.LinearGELUResidual, "_shortcut"))


@constant_while_traced
def _why_reference_changed() -> str | None:
    return why_changed(_OF_REFERENCE)


@constant_while_traced
def _why_layer_changed() -> str | None:
    return why_changed((*_ACTIVATE, *_FUNCTIONS))


@constant_while_traced
def _why_shortcut_changed() -> str | None:
    return why_changed(_SHORTCUT)


def _checked(name: str) -> Any:
    """The fused function ``name``, or the eager one where a mode watches, torch's functions were replaced or a tensor
    is not a plain one.
    """
    fused, eager = getattr(functional, name), getattr(reference, name)

    def layer(*args: Any, **options: Any) -> Tensor:
        reason = why_formula_changed() or _why_layer_changed() or why_odd_tensor(*args)
        if reason is None:
            return fused(*args, **options)
        record_fallback(f"a layer {reason}")
        return eager(*args, **options)

    return layer


_checked_residual = _checked("linear_gelu_residual")


def _may_be_absent(residual: Any) -> bool:
    """Whether torch.fx traces with a stand-in for an argument that is None by default. Eager then adds what is given
    when the graph runs, and None is an error. The fused function would add nothing.
    """
    node = None if residual is None or isinstance(residual, Tensor) else getattr(residual, "node", None)
    return node is not None and node.op == "placeholder" and bool(node.args)


def _residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *, activation: str) -> Tensor:
    """``_checked_residual``; C++ makes the checks first, and runs the layer if it finds nothing special."""
    if not torch.compiler.is_compiling():
        y = library.run_plain_layer(_LAYER, x, weight, bias, residual, activation, False)
        if y is not None:
            return y
        if _may_be_absent(residual):
            record_fallback("a layer is traced by torch.fx with a residual that may be None")
            return reference.linear_gelu_residual(x, weight, bias, residual, activation=activation)
    return _checked_residual(x, weight, bias, residual, activation=activation)


def _why_not_fc2(fc2: Any, hidden: Tensor, x: Tensor) -> str | None:
    """None if ``x + fc2(hidden)`` may run fused, else why not. Before any are computed, x stands for them."""
    reason = why_network_changed() or why_not_plain_linear(fc2) or why_odd_tensor(hidden, x)
    # The stand-ins of torch.fx have no sizes.
    if reason is not None or not (isinstance(x, Tensor) and isinstance(hidden, Tensor)):
        return reason
    # Eager would broadcast or promote.
    is_like_x = hidden.dtype == x.dtype and (*hidden.shape[:-1], fc2.weight.shape[0]) == tuple(x.shape)
    return None if is_like_x else "gives another shape or dtype than x has"


class LinearGELUResidual(reference.LinearGELUResidual):
    __doc__ = reference.LinearGELUResidual.__doc__

    _linear_gelu_residual = staticmethod(_residual)
    _linear_gelu_concat = staticmethod(_checked("linear_gelu_concat"))

    def _shortcut(self, x: Tensor) -> Tensor | None:
        if self.shortcut == "projection" and self.projection is not None and _why_shortcut_changed() is None:
            return run_linear(self.projection, "projection", x)
        return super()._shortcut(x)


class ResidualMLP(reference.ResidualMLP):
    __doc__ = reference.ResidualMLP.__doc__

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            y = library.run_plain_residual_mlp(self, x)
            if y is not None:
                return y
        changed = _why_reference_changed()
        if changed is not None:
            record_fallback(changed)
        if changed is not None or records_eager():
            return super().forward(x)
        fc1, fc2 = self.fc1, self.fc2
        reason = why_network_changed() or why_not_plain_linear(fc1) or why_odd_tensor(x)
        if reason is None and _why_not_fc2(fc2, x, x) is None:
            return mlp_residual(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, x, activation=self.activation)
        if reason is None:
            hidden = linear_gelu_residual(x, fc1.weight, fc1.bias, activation=self.activation)
        else:
            record_fallback(f"fc1 {reason}")
            hidden = activate(fc1(x), self.activation)
        # The call of fc1 may have changed fc2, or whatever fc2's call rests on.
        reason2 = _why_not_fc2(fc2, hidden, x)
        if reason2 is None:
            return linear_gelu_residual(hidden, fc2.weight, fc2.bias, x, activation="none")
        record_fallback(f"fc2 {reason2}")
        return x + fc2(hidden)


_OWN_NAMES = ("fc1", "fc2", "activation", "__getattr__", "__getattribute__")
library.know_mlps(
    (*NETWORK, *_OF_REFERENCE, *of_class(reference.ResidualMLP, *_OWN_NAMES)), reference.ResidualMLP, _OWN_NAMES
)
