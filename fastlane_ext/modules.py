"""Layers on the fused kernels, with the parameters, names and initial values of the eager ones.

A layer calls one fused op. Where a child has become something else than what the layer was built with (a
hook, a parametrization, an adapter in its place), that child is called as a module, so that its behaviour is
kept, and ``fastlane_ext.stats()`` counts the fallback.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as _nn_module

from . import reference
from .functional import linear_gelu_concat, linear_gelu_residual, mlp_residual, record_fallback
from .reference import _activate, _why_not_plain

__all__ = ["LinearGELUResidual", "ResidualMLP"]


def _under_global_hooks() -> str | None:
    """The reason to call every child as a module, if a hook was registered for all modules."""
    if (
        _nn_module._global_forward_hooks
        or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks
        or _nn_module._global_backward_pre_hooks
    ):
        return "is under a hook registered for all modules"
    return None


def _why_not_plain_linear(module: nn.Module) -> str | None:
    """None if calling ``module`` is just ``F.linear`` on its parameters, else the reason why it is not."""
    return _under_global_hooks() or _why_not_plain(module, nn.Linear)


def _linear(child: nn.Module, name: str, x: Tensor) -> Tensor:
    """``child(x)``, through the fused op where that is all the same."""
    reason = _why_not_plain_linear(child)
    if reason is None:
        return linear_gelu_residual(x, child.weight, child.bias, activation="none")
    record_fallback(f"{name} {reason}")
    return child(x)


class LinearGELUResidual(reference.LinearGELUResidual):
    __doc__ = reference.LinearGELUResidual.__doc__

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(*, in_features)`` to ``(*, out_features)``, or ``(*, in + out)`` with ``shortcut="concat"``.

        ``residual``, if given, is added in place of the shortcut's own addend; with ``"concat"`` it is a
        ValueError.
        """
        if self.shortcut == "concat":
            self._refuse(residual)
            return linear_gelu_concat(x, self.weight, self.bias, activation=self.activation)
        if residual is None:
            residual = self._shortcut(x)
        return linear_gelu_residual(x, self.weight, self.bias, residual, activation=self.activation)

    def _shortcut(self, x: Tensor) -> Tensor | None:
        if self.shortcut == "projection" and self.projection is not None:
            return _linear(self.projection, "projection", x)
        return super()._shortcut(x)


class ResidualMLP(reference.ResidualMLP):
    __doc__ = reference.ResidualMLP.__doc__

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        reason1, reason2 = _why_not_plain_linear(fc1), _why_not_plain_linear(fc2)
        if reason1 is None and reason2 is None:
            return mlp_residual(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, x, activation=self.activation)
        if reason1 is None:
            hidden = linear_gelu_residual(x, fc1.weight, fc1.bias, activation=self.activation)
        else:
            record_fallback(f"fc1 {reason1}")
            hidden = _activate(fc1(x), self.activation)
        if reason2 is None:
            return linear_gelu_residual(hidden, fc2.weight, fc2.bias, x, activation="none")
        record_fallback(f"fc2 {reason2}")
        return x + fc2(hidden)
