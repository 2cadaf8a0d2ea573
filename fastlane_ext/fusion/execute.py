"""One call of a fused module: the steps of its plan, each value kept until its last user has run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _facts
from .._load import library
from .._plain import is_plain_tensor, why_touched
from ..functional import linear_gelu_residual, mlp_residual, record_fallback
from .changes import why_changed
from .known import known
from .linears import weight_and_bias
from .plan import Add, Call, Fused, Gelu, Plan


def _run_fused(children: dict[str, Any], step: Fused, values: list[Any]) -> Tensor:
    x, residual, late = values[step.source], None, None
    parameters: tuple[Any, ...] = weight_and_bias(children[step.fc1.name], step.fc1.transposed)
    call: Callable[..., Tensor] = linear_gelu_residual
    if step.fc2 is not None:
        parameters += weight_and_bias(children[step.fc2.name], step.fc2.transposed)
        call = mlp_residual
    if step.residual is not None:
        residual = values[step.residual]
        # Eager broadcasts and promotes further than the kernels do; such a residual is added afterwards.
        if residual.dtype != x.dtype or residual.shape != (*x.shape[:-1], parameters[-2].shape[0]):
            residual, late = None, residual
    y = call(x, *parameters, residual, activation=step.activation)
    return y if late is None else y + late


def _is_inactive_dropout(child: nn.Module) -> bool:
    # In a traced graph the call costs nothing, and torch.compile guards on it.
    if type(child) is not nn.Dropout or (child.training and child.p != 0) or torch.compiler.is_compiling():
        return False
    dropout = known(nn.Dropout)
    assert dropout is not None
    return why_touched(child) is None and dropout.reason is None and _facts.hold(dropout.facts)


def _call(child: nn.Module, values: list[Any], sources: tuple[int, ...]) -> Any:
    inputs = [values[source] for source in sources]
    return inputs[0] if _is_inactive_dropout(child) else child(*inputs)


class _Lookup:
    """Finds children as the original forward does: when its code names them, not when it calls them. A child that is
    called may replace another child.
    """

    def __init__(self, module: nn.Module, early: frozenset[int]) -> None:
        self.module = module
        self.early = early  # Plan.looked_up_early
        self.calls = 0
        self.before: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

    def called(self, times: int = 1) -> None:
        """Call this before children are called."""
        for _ in range(times):
            if self.calls in self.early:
                own = self.module.__dict__
                self.before[self.calls] = (own.copy(), own["_modules"].copy())
            self.calls += 1

    def child(self, step: Call) -> Any:
        if step.looked_up not in self.before:
            return getattr(self.module, step.name)
        own, children = self.before[step.looked_up]
        return own[step.name] if step.name in own else children[step.name]

    def is_unchanged(self) -> bool:
        return all(children == self.module._modules for _, children in self.before.values())


def _sum(step: Add, values: list[Any]) -> Any:
    left, right = values[step.left], values[step.right]
    return torch.add(left, right) if step.by_function else left + right


def _run_instead(lookup: _Lookup, step: Fused, values: list[Any]) -> None:
    """Run the step as eager does."""
    for part in step.instead:
        if isinstance(part, Call):
            child = lookup.child(part)
            lookup.called()
            values[part.target] = child(*(values[source] for source in part.sources))
        elif isinstance(part, Gelu):
            values[part.target] = F.gelu(values[part.source], approximate=part.approximate)
        else:
            values[part.target] = _sum(part, values)
    for part in step.instead[:-1]:
        values[part.target] = None


def _why_not_here(lookup: _Lookup, plan: Plan, step: Fused, values: list[Any], is_checked: bool) -> str | None:
    """Why this step cannot run fused, or None: an earlier child returned an odd value or changed another child."""
    if not all(is_plain_tensor(values[read]) for read in step.reads):
        return "a child gave something else than a plain tensor"
    if is_checked:
        return None
    if not lookup.is_unchanged():
        return "a child replaced another one"
    if not torch.compiler.is_compiling() and library.is_as_planned(lookup.module, plan.checks):
        return None
    return why_changed(lookup.module, plan)


def execute(module: nn.Module, plan: Plan, values: list[Any]) -> Any:
    values += [None] * (plan.values - len(values))
    is_checked, lookup = True, _Lookup(module, plan.looked_up_early)
    for step, last_used in zip(plan.steps, plan.last_uses, strict=True):
        if isinstance(step, Fused):
            reason = _why_not_here(lookup, plan, step, values, is_checked)
            if reason is None:
                is_checked = True
                lookup.called(step.children)
                values[step.target] = _run_fused(module._modules, step, values)
            else:
                record_fallback(f"{plan.kind.__name__}: {reason}")
                _run_instead(lookup, step, values)
        elif isinstance(step, Call):
            child = lookup.child(step)
            lookup.called()
            values[step.target] = _call(child, values, step.sources)
            is_checked = False
        else:
            values[step.target] = _sum(step, values)
        for value in last_used:
            values[value] = None
    return values[plan.output]
