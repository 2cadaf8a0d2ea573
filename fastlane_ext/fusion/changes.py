"""Whether a fused module is still the same as when its plan was read, and why not."""

from __future__ import annotations

import torch
from torch import nn

from .._facts import ABSENT
from .._plain import PLAIN_DICTS, class_name, why_parameters_unfit, why_touched, why_watched
from .activations import is_same
from .linears import linear_class
from .plan import Child, Plan, Role, why_class_changed, why_traced_class_changed

_ACTIVE = "is active"


def _why_child_changed(child: nn.Module | None, found: Child) -> str | None:
    kind = type(child)
    is_linear = found.role in (Role.LINEAR, Role.TRANSPOSED_LINEAR)
    if kind is not found.kind and not (is_linear and linear_class(kind) is found.kind):
        return f"is a {class_name(kind)}, not a{' plain' if is_linear else ''} {class_name(found.kind)}"
    assert child is not None
    reason = why_touched(child)
    if reason is None and is_linear:
        reason = why_parameters_unfit(child, found.role == Role.TRANSPOSED_LINEAR)
    own = child.__dict__
    for name, value in found.state:
        if reason is None and not is_same(own.get(name, ABSENT), value):
            reason = f"has another {name} now: {own.get(name)!r}"
    for name in found.of_class:
        if reason is None and name in own:
            reason = f"has a {name} of its own"
    if reason is None and kind is nn.Dropout and child.training and child.p != 0:
        reason = _ACTIVE
    return reason


def _why_structure_changed(module: nn.Module, plan: Plan) -> str | None:
    own, children = module.__dict__, module._modules
    if type(children) not in PLAIN_DICTS:
        return f"keeps its children in a {type(children).__name__}"
    # torch.compile guards on the order of a dict's keys() but not on the order of the dict itself.
    if plan.order is not None and tuple(children.keys()) != plan.order:
        return "its children are others now"
    for name in plan.names:
        if name in own or name in module._parameters or name in module._buffers:
            return f"has something in place of its child {name}"
        if name not in children:
            return f"has no child {name} any more"
    for name, value in plan.constants:
        if not is_same(own.get(name, ABSENT), value):
            return f"has another {name} now: {own.get(name)!r}"
    return None


def why_changed(module: nn.Module, plan: Plan, *, ignore_dropout: bool = False) -> str | None:
    """Why the plan is no longer true of the module, or None.

    csrc/python/plan_call.cpp's ``is_as_planned`` checks the same faster, without a reason. Where it says no, this
    function decides: a linear layer whose class `fuse` has changed since is still a linear layer here.
    """
    reason = why_watched() or _why_structure_changed(module, plan)
    if reason is None:
        compiling = torch.compiler.is_compiling()
        kind = type(module)
        reason = why_traced_class_changed(plan.key, kind) if compiling else why_class_changed(plan, kind)
    if reason is not None:
        return reason
    for found in plan.children:
        reason = _why_child_changed(module._modules.get(found.name), found)
        if reason is not None and not (ignore_dropout and reason is _ACTIVE):
            return f"{found.name} {reason}"
    return None
