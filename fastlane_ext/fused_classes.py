"""Classes of modules that `fuse` has fused: each a subclass of the module's own class, with another forward.

At every call the forward looks whether all that the plan rests on still holds, and runs the original forward where it
does not. A fused class calls itself by the original's name and module, and its instances are pickled as the original
class and their state, so that they travel as the original's would.
"""

from __future__ import annotations

import abc
import contextlib
import copyreg
import functools
import threading
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _facts, _register  # noqa: F401  (_register: the batching rules)
from ._activations import is_same
from ._disabled import is_disabled
from ._facts import ABSENT, lookup
from ._load import library
from ._plain import (
    class_name,
    constant_while_traced,
    is_of_fx,
    is_plain_tensor,
    known,
    linear_class,
    original_class,
    weight_and_bias,
    why_parameters_unfit,
    why_touched,
    why_watched,
)
from ._plan import (
    Call,
    Child,
    Fused,
    Gelu,
    Plan,
    Refused,
    Role,
    Unread,
    read_plan,
    why_class_changed,
    why_traced_class_changed,
)
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
        if not is_same(own.get(name, ABSENT), value):
            return f"has another {name} now: {own.get(name)!r}"
    return None


def why_changed(module: nn.Module, plan: Plan, *, ignore_dropout: bool = False) -> str | None:
    """Why the plan is no longer true of the module, or None.

    csrc/plan_call.cpp's ``is_as_planned`` asks the same faster, but gives no reason, and where it says no this decides:
    a linear layer that `fuse` took by itself since is still one.
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
    # A graph has the call for nothing, and torch.compile guards on it.
    if type(child) is not nn.Dropout or (child.training and child.p != 0) or torch.compiler.is_compiling():
        return False
    dropout = known(nn.Dropout)
    return why_touched(child) is None and dropout.reason is None and _facts.hold(dropout.facts)


def _call(child: nn.Module, values: list[Any], sources: tuple[int, ...]) -> Any:
    inputs = [values[source] for source in sources]
    return inputs[0] if _is_inactive_dropout(child) else child(*inputs)


class _Lookup:
    """Finds children as the original forward does: at the moment when its code names them, not when it calls them.
    A child that is called may put another one in the place of a third.
    """

    def __init__(self, module: nn.Module, has_calls: bool) -> None:
        self.module = module
        self.has_calls = has_calls  # fused steps alone change nothing
        self.before: list[tuple[dict[str, Any], dict[str, Any]]] = []  # each call of a child

    def called(self, times: int = 1) -> None:
        """To be told before children are called."""
        if not self.has_calls:
            return
        own = self.module.__dict__
        self.before += [(own.copy(), own["_modules"].copy())] * times

    def child(self, step: Call) -> Any:
        if step.looked_up >= len(self.before):
            return getattr(self.module, step.name)
        own, children = self.before[step.looked_up]
        return own[step.name] if step.name in own else children[step.name]

    def is_unchanged(self) -> bool:
        return not self.before or all(
            children == self.module._modules for _, children in (self.before[0], self.before[-1])
        )


def _run_instead(lookup: _Lookup, step: Fused, values: list[Any]) -> None:
    """The step as eager takes it."""
    for part in step.instead:
        if type(part) is Call:
            child = lookup.child(part)
            lookup.called()
            values[part.target] = child(*(values[source] for source in part.sources))
        elif type(part) is Gelu:
            values[part.target] = F.gelu(values[part.source], approximate=part.approximate)
        else:
            values[part.target] = values[part.left] + values[part.right]
    for part in step.instead[:-1]:
        values[part.target] = None


def _why_not_here(lookup: _Lookup, plan: Plan, step: Fused, values: list[Any], is_checked: bool) -> str | None:
    """Why this step cannot run fused, though the call could: what the children before it gave, or did to the others."""
    if not all(is_plain_tensor(values[read]) for read in step.reads):
        return "a child gave something else than a plain tensor"
    if is_checked:
        return None
    if not lookup.is_unchanged():
        return "a child replaced another one"
    if not torch.compiler.is_compiling() and library.is_as_planned(lookup.module, plan.checks):
        return None
    return why_changed(lookup.module, plan)


def _execute(module: nn.Module, plan: Plan, values: list[Any]) -> Any:
    values += [None] * (plan.values - len(values))
    is_checked, lookup = True, _Lookup(module, plan.has_calls)
    for step, last_used in zip(plan.steps, plan.last_uses, strict=True):
        kind = type(step)
        if kind is Fused:
            reason = _why_not_here(lookup, plan, step, values, is_checked)
            if reason is None:
                is_checked = True
                lookup.called(step.children)
                values[step.target] = _run_fused(module._modules, step, values)
            else:
                record_fallback(f"{plan.kind.__name__}: {reason}")
                _run_instead(lookup, step, values)
        elif kind is Call:
            child = lookup.child(step)
            lookup.called()
            values[step.target] = _call(child, values, step.sources)
            is_checked = False
        else:
            values[step.target] = values[step.left] + values[step.right]
        for value in last_used:
            values[value] = None
    return values[plan.output]


def _arguments(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    values = list(args)
    if kwargs:
        rest = plan.inputs[len(args) :]
        if len(rest) != len(kwargs) or any(name not in kwargs for name in rest):
            return None
        values += [kwargs[name] for name in rest]
    return values if len(values) == len(plan.inputs) and all(map(is_plain_tensor, values)) else None


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


def _is_traced() -> bool:
    """Whether code is traced just now, so that nothing can be learned from it."""
    return torch.compiler.is_compiling() or is_of_fx(lookup(nn.Module, "__call__"))


def _container_forward(original: type[nn.Module]) -> Any:
    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        # Who makes a new instance of this class (a slice of a Sequential, for one) makes one that nobody fused.
        plan = self.__dict__.get(PLAN)
        if plan is None or is_disabled() or (type(plan) is Unread and _is_traced()):
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
            return _execute(self, plan, values)
        if not compiling:
            plan.calls.original += 1
            plan.calls.reason = reason
        record_fallback(f"{original.__name__}: {reason}")
        return original.forward(self, *args, **kwargs)

    return forward


_OF_LINEARS = ("weight", "bias", "__getattr__", "__getattribute__")


def _why_linear_changed(kind: type, original: type[nn.Module]) -> str | None:
    found = known(original)
    for name in _OF_LINEARS:
        if lookup(kind, name) is not lookup(original, name):
            return f"its class has another {name} now"
    return found.reason or _facts.why_changed(found.facts, is_of_fx)


_why_traced_linear_changed = constant_while_traced(_why_linear_changed)


def _linear_forward(original: type[nn.Module]) -> Any:
    transposed = original is not nn.Linear

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        if PLAN not in self.__dict__ or is_disabled():
            return original.forward(self, *args, **kwargs)
        if len(args) != 1 or kwargs or not is_plain_tensor(args[0]):
            reason = "its argument is not one plain tensor"
        else:
            compiling = torch.compiler.is_compiling()
            reason = why_watched() or why_parameters_unfit(self)
            if reason is None:
                ask = _why_traced_linear_changed if compiling else _why_linear_changed
                reason = ask(type(self), original)
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
    """Why no fused class can be made of ``kind``, or None. Makes none."""
    kind = original_class(kind)
    if type(kind) not in (type, abc.ABCMeta):
        return f"its class has a metaclass, {type(kind).__name__}"
    if issubclass(kind, torch.fx.GraphModule):
        return "is a GraphModule, whose class is its own and is made anew by recompile()"
    if kind in copyreg.dispatch_table:
        return "its class has a reducer in copyreg"
    for name in ("__reduce_ex__", "__reduce__"):
        if lookup(kind, name) is not lookup(nn.Module, name):
            return f"its class has a {name} of its own"
    return None


def why_forward_replaced(module: nn.Module) -> str | None:
    """Why another forward than the one that `fuse` gave runs in a module of a fused class, or None."""
    kind = type(module)
    if "forward" in module.__dict__:
        return "has a forward of its own, which decides what runs"
    fused = getattr(kind, "_fastlane_class", None)
    if fused is not None and lookup(kind, "forward") is not fused._fastlane_forward:
        return "its fused class was given another forward, which decides what runs"
    return None


def fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``original`` whose instances run fused; whatever making a subclass raises is raised."""
    original = original_class(original)
    with _making:
        if original not in _classes:
            _classes[original] = _make_class(original)
        return _classes[original]


def _make_class(original: type[nn.Module]) -> type[nn.Module]:
    forward = (_linear_forward if linear_class(original) else _container_forward)(original)
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_fastlane_original": original,
        "_fastlane_class": None,
        "_get_name": lambda self: f"{original.__name__}[fused]" if PLAN in self.__dict__ else original.__name__,
        "__reduce_ex__": _reduce,
        "__setstate__": _set_state,
        "forward": forward,
        "_fastlane_forward": staticmethod(forward),
    }
    if "__firstlineno__" in original.__dict__:  # Python 3.13's inspect.getsource looks for it
        namespace["__firstlineno__"] = original.__dict__["__firstlineno__"]
    made = type(original)(original.__name__, (_Quiet, original), namespace)
    made._fastlane_class = made  # a subclass of it inherits another class's name here
    return made


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """What a module of its class would be pickled as, with the original class in place of this one."""
    fused = type(self)._fastlane_class
    original = fused._fastlane_original
    if original in copyreg.dispatch_table:
        return copyreg.dispatch_table[original](self)
    make, arguments, *state = super(fused, self).__reduce_ex__(max(int(protocol), 2))
    if type(self) is fused and arguments and arguments[0] is fused:
        return (_remake, (make, original, *arguments[1:]), *state)
    return (make, arguments, *state)


def _remake(make: Any, original: type[nn.Module], *arguments: Any) -> nn.Module:
    return make(fused_class(original), *arguments)


def _set_state(self: nn.Module, state: Any) -> None:
    super(type(self)._fastlane_class, self).__setstate__(state)
    if type(self.__dict__.get(PLAN)) is Unread and not _is_traced():
        # At once, while no tracer or transform is on. What is not complete yet is read at the first call.
        with contextlib.suppress(Exception):
            self.__dict__[PLAN] = read_plan(self)
