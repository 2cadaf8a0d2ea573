"""Classes of modules that `fuse` has fused: each a subclass of the module's own class, with another forward.

At every call the forward looks whether all that the plan rests on still holds, and runs the original forward where it
does not. A fused class calls itself by the original's name and module, and its instances are pickled as the original
class and their state, so that they travel as the original's would.
"""

from __future__ import annotations

import abc
import functools
import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from . import _facts, _register  # noqa: F401  (_register: the batching rules)
from ._disabled import is_disabled
from ._facts import ABSENT, lookup
from ._load import library
from ._plain import (
    PLAIN_TENSORS,
    class_name,
    is_of_fx,
    known,
    linear_class,
    original_class,
    weight_and_bias,
    why_parameters_unfit,
    why_touched,
    why_watched,
)
from ._plan import Call, Child, Fused, Plan, Refused, Role, Unread, read_plan, why_traced_facts_changed
from .functional import record_fallback

PLAN = "_fastlane_plan"
_ACTIVE = "is active"
_ARGUMENTS = "its arguments are not plain tensors, one for each input"


def _why_child_changed(child: nn.Module | None, found: Child) -> str | None:
    kind = type(child)
    is_linear = found.role in (Role.LINEAR, Role.TRANSPOSED_LINEAR)
    if kind is not found.kind and not (is_linear and linear_class(kind) is found.kind):
        return f"is a {class_name(kind)}, not a{' plain' if is_linear else ''} {class_name(found.kind)}"
    reason = why_touched(child)
    if reason is None and is_linear:
        reason = why_parameters_unfit(child)
    own = child.__dict__
    for name, value in found.state:
        if reason is None and (name not in own or own[name] != value):
            reason = f"has another {name} now: {own.get(name)!r}"
    for name in found.of_class:
        if reason is None and name in own:
            reason = f"has a {name} of its own"
    if reason is None and kind is nn.Dropout and child.training and child.p != 0:
        reason = _ACTIVE
    return reason


def _why_structure_changed(module: nn.Module, plan: Plan) -> str | None:
    own, children = module.__dict__, module._modules
    if type(children) not in (dict, OrderedDict):
        return f"keeps its children in a {type(children).__name__}"
    if plan.order is not None and tuple(children) != plan.order:
        return "its children are others now"
    for name in plan.names:
        if name in own:
            return f"has an attribute in place of its child {name}"
        if name not in children:
            return f"has no child {name} any more"
    for name, value in plan.constants:
        if own.get(name, ABSENT) != value:
            return f"has another {name} now: {own.get(name)!r}"
    return None


def why_changed(module: nn.Module, plan: Plan, *, ignore_dropout: bool = False) -> str | None:
    """Why the plan is no longer true of the module, or None.

    csrc/plan_call.cpp's ``is_as_planned`` asks the same faster, but gives no reason, and where it says no this decides:
    a linear layer that `fuse` took by itself since is still one.
    """
    reason = why_watched() or _why_structure_changed(module, plan)
    if reason is not None:
        return reason
    compiling = torch.compiler.is_compiling()
    changed = why_traced_facts_changed(plan.key) if compiling else _facts.why_changed(plan.facts, is_of_fx)
    if changed is not None:
        return changed
    for found in plan.children:
        reason = _why_child_changed(module._modules.get(found.name), found)
        if reason is not None and not (ignore_dropout and reason is _ACTIVE):
            return f"{found.name} {reason}"
    return None


def _run_fused(children: dict[str, nn.Module], step: Fused, values: list[Any]) -> Tensor:
    x, residual, late = values[step.source], None, None
    parameters = weight_and_bias(children[step.fc1.name], step.fc1.transposed)
    op = torch.ops.fastlane.linear_gelu_residual.default
    if step.fc2 is not None:
        parameters += weight_and_bias(children[step.fc2.name], step.fc2.transposed)
        op = torch.ops.fastlane.mlp_residual.default
    if step.residual is not None:
        residual = values[step.residual]
        # What eager broadcasts or promotes further than the kernels do is added afterwards.
        if residual.dtype != x.dtype or residual.shape != (*x.shape[:-1], parameters[-2].shape[0]):
            residual, late = None, residual
    y = op(x, *parameters, residual, activation=step.activation)
    return y if late is None else y + late


def _is_inactive_dropout(child: nn.Module) -> bool:
    if type(child) is not nn.Dropout or (child.training and child.p != 0) or why_touched(child) is not None:
        return False
    dropout = known(nn.Dropout)
    return torch.compiler.is_compiling() or not (dropout.reason or not _facts.hold(dropout.facts))


def _call(child: nn.Module, values: list[Any], sources: tuple[int, ...]) -> Any:
    inputs = [values[source] for source in sources]
    return inputs[0] if _is_inactive_dropout(child) else child(*inputs)


def _execute(children: dict[str, nn.Module], plan: Plan, values: list[Any]) -> Any:
    values += [None] * (plan.values - len(values))
    for step, last_used in zip(plan.steps, plan.last_uses, strict=True):
        kind = type(step)
        if kind is Fused:
            values[step.target] = _run_fused(children, step, values)
        elif kind is Call:
            values[step.target] = _call(children[step.name], values, step.sources)
        else:
            values[step.target] = values[step.left] + values[step.right]
        for value in last_used:
            values[value] = None
    return values[plan.output]


def _is_plain(value: Any) -> bool:
    return type(value) in PLAIN_TENSORS and value.layout is torch.strided and not value.is_nested


def _arguments(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    values = list(args)
    if kwargs:
        rest = plan.inputs[len(args) :]
        if len(rest) != len(kwargs) or any(name not in kwargs for name in rest):
            return None
        values += [kwargs[name] for name in rest]
    return values if len(values) == len(plan.inputs) and all(map(_is_plain, values)) else None


def plan_of(module: nn.Module) -> Plan | str:
    """The module's plan, read again if the module was pickled; a reason if it has none any more."""
    plan = module.__dict__[PLAN]
    if type(plan) is Unread:
        try:
            plan = read_plan(module)
        except Refused as refused:
            plan = str(refused)
        module.__dict__[PLAN] = plan
    return plan


def _container_forward(original: type[nn.Module]) -> Any:
    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        # Who makes a new instance of this class (a slice of a Sequential, for one) makes one that nobody fused.
        if PLAN not in self.__dict__ or is_disabled():
            return original.forward(self, *args, **kwargs)
        plan, compiling = plan_of(self), torch.compiler.is_compiling()
        if type(plan) is str:
            record_fallback(f"{original.__name__}: {plan}")
            return original.forward(self, *args, **kwargs)
        values = _arguments(plan, args, kwargs)
        if values is None:
            reason = _ARGUMENTS
        elif not compiling and library.is_as_planned(self, plan.checks):
            reason = None
        else:
            reason = why_changed(self, plan)
        if reason is None:
            if not compiling:
                plan.calls.fused += 1
            return _execute(self._modules, plan, values)
        if not compiling:
            plan.calls.original += 1
            plan.calls.reason = reason
        record_fallback(f"{original.__name__}: {reason}")
        return original.forward(self, *args, **kwargs)

    return forward


def _linear_forward(original: type[nn.Module]) -> Any:
    transposed, facts = original is not nn.Linear, known(original).facts

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        if PLAN not in self.__dict__ or is_disabled():
            return original.forward(self, *args, **kwargs)
        if len(args) != 1 or kwargs or not _is_plain(args[0]):
            reason = "its argument is not one plain tensor"
        else:
            reason = why_watched() or why_parameters_unfit(self)
            if reason is None and not torch.compiler.is_compiling():
                reason = _facts.why_changed(facts, is_of_fx)
        if reason is None:
            parameters = weight_and_bias(self, transposed)
            return torch.ops.fastlane.linear_gelu_residual.default(args[0], *parameters, activation="none")
        record_fallback(f"{original.__name__}: {reason}")
        return original.forward(self, *args, **kwargs)

    return forward


class _Quiet:
    """Keeps a fused class from the original's ``__init_subclass__``, which may enter classes into a registry."""

    def __init_subclass__(cls, **options: Any) -> None:
        if "_fastlane_class" not in cls.__dict__:
            super().__init_subclass__(**options)


_classes: dict[type[nn.Module], type[nn.Module]] = {}
_making = threading.Lock()


def why_no_class(kind: type[nn.Module]) -> str | None:
    """Why no fused class can be made of ``kind``, or None."""
    kind = original_class(kind)
    if type(kind) not in (type, abc.ABCMeta):
        return f"its class has a metaclass, {type(kind).__name__}"
    if issubclass(kind, torch.fx.GraphModule):
        return "is a GraphModule, whose class is its own and is made anew by recompile()"
    for name in ("__reduce_ex__", "__reduce__"):
        if lookup(kind, name) is not lookup(nn.Module, name):
            return f"its class has a {name} of its own"
    try:
        object.__setattr__(object.__new__(kind), "__class__", fused_class(kind))
    except Exception as error:
        return f"its class takes no subclass: {type(error).__name__}: {error}"
    return None


def fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``original`` whose instances run fused; whatever making a subclass raises is raised."""
    original = original_class(original)
    with _making:
        if original not in _classes:
            _classes[original] = _make_class(original)
        return _classes[original]


def _make_class(original: type[nn.Module]) -> type[nn.Module]:
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_fastlane_original": original,
        "_fastlane_class": None,
        "_get_name": lambda self: f"{original.__name__}[fused]" if PLAN in self.__dict__ else original.__name__,
        "__reduce_ex__": _reduce,
        "forward": (_linear_forward if linear_class(original) else _container_forward)(original),
    }
    if "__firstlineno__" in original.__dict__:  # Python 3.13's inspect.getsource looks for it
        namespace["__firstlineno__"] = original.__dict__["__firstlineno__"]
    made = type(original)(original.__name__, (_Quiet, original), namespace)
    made._fastlane_class = made  # a subclass of it inherits another class's name here
    return made


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """What a module of its class would be pickled as, with the original class in place of this one."""
    original = type(self)._fastlane_original
    make, arguments, *state = super(type(self)._fastlane_class, self).__reduce_ex__(max(int(protocol), 2))
    if type(self) is type(self)._fastlane_class and arguments and arguments[0] is type(self):
        return (_remake, (make, original, *arguments[1:]), *state)
    return (make, arguments, *state)


def _remake(make: Any, original: type[nn.Module], *arguments: Any) -> nn.Module:
    return make(fused_class(original), *arguments)
