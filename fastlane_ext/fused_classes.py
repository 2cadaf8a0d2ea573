"""Classes of modules that `fuse` has fused: each a subclass of the module's own class, with another forward.

They are made when they are first asked for, also by pickle: a class is found under a name that says where its
original is. At every call the forward looks whether the children still are what the plan was read from, and runs
the original forward where they are not.
"""

from __future__ import annotations

import functools
import importlib
import threading
from typing import Any

import torch
from torch import Tensor, nn

from . import _register  # noqa: F401  (registers the batching rules)
from ._linears import class_name, linear_class, weight_and_bias, why_parameters_unfit
from ._load import library
from ._plain import PLAIN_TENSORS, original_class, under_global_hooks
from ._plan import Call, Child, Fused, Plan, Role
from .functional import record_fallback

PLAN = "_fastlane_plan"
_ACTIVE = "is active"


def _why_touched(module: nn.Module) -> str | None:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    return "has a forward of its own" if "forward" in module.__dict__ else None


def _why_changed(child: nn.Module | None, found: Child) -> str | None:
    kind = type(child)
    is_same_linear = found.role == Role.LINEAR and linear_class(kind) is linear_class(found.kind)
    if kind is not found.kind and not is_same_linear:
        return f"is a {class_name(kind)}, not a{' plain' if found.role == Role.LINEAR else ''} {class_name(found.kind)}"
    if kind is found.kind and kind.forward is not found.forward:
        return f"is a {class_name(kind)}, whose class has another forward now"
    if kind.__call__ is not nn.Module.__call__:
        return f"is a {class_name(kind)}, whose class has a __call__ of its own"
    reason = _why_touched(child)
    if reason is None and found.role == Role.LINEAR:
        reason = why_parameters_unfit(child)
    for name, value in found.state:
        if reason is None and (name not in child.__dict__ or child.__dict__[name] != value):
            reason = f"has another {name} now: {child.__dict__.get(name)!r}"
    if reason is None and kind is nn.Dropout and child.training and child.p != 0:
        reason = _ACTIVE
    return reason


def why_changed(module: nn.Module, plan: Plan, *, ignore_dropout: bool = False) -> str | None:
    """Why the plan is no longer true of the module's children, or None.

    csrc/plan_call.cpp's ``is_unchanged`` asks the same faster, but gives no reason, and where it says no this decides:
    a linear layer that `fuse` took by itself since is still one.
    """
    reason = under_global_hooks()
    if reason is not None:
        return reason
    if plan.order is not None and tuple(module._modules) != plan.order:
        return "its children are others now"
    for name, value in plan.constants:
        if module.__dict__.get(name) != value:
            return f"has another {name} now: {module.__dict__.get(name)!r}"
    for found in plan.children:
        reason = _why_changed(module._modules.get(found.name), found)
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
    return type(child) is nn.Dropout and not (child.training and child.p != 0) and _why_touched(child) is None


def _execute(children: dict[str, nn.Module], plan: Plan, arguments: tuple[Any, ...]) -> Any:
    values = [*arguments, *[None] * (plan.values - len(arguments))]
    for step in plan.steps:
        kind = type(step)
        if kind is Fused:
            values[step.target] = _run_fused(children, step, values)
        elif kind is Call:
            child = children[step.name]
            inputs = [values[source] for source in step.sources]
            values[step.target] = inputs[0] if _is_inactive_dropout(child) else child(*inputs)
        else:
            values[step.target] = values[step.left] + values[step.right]
    return values[plan.output]


def _is_plain(value: Any) -> bool:
    return type(value) in PLAIN_TENSORS and value.layout is torch.strided and not value.is_nested


def _arguments(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], compiling: bool) -> tuple[Any, ...] | None:
    if kwargs:
        rest = plan.inputs[len(args) :]
        if len(rest) != len(kwargs) or any(name not in kwargs for name in rest):
            return None
        args = (*args, *(kwargs[name] for name in rest))
    if len(args) != len(plan.inputs):
        return None
    return args if compiling or all(map(_is_plain, args)) else None


def _container_forward(original: type[nn.Module]):
    eager, defaults = original.forward, original.forward.__defaults__
    iteration = getattr(original, "__iter__", None)  # is what a Sequential's forward follows

    @functools.wraps(eager)
    def forward(self, *args, **kwargs):
        # Who makes a new instance of this class (a slice of a Sequential, for one) makes one that nobody fused.
        plan, compiling = self.__dict__.get(PLAN), torch.compiler.is_compiling()
        if plan is None or (not compiling and library.is_disabled()):
            return original.forward(self, *args, **kwargs)
        children = self._modules
        arguments = _arguments(plan, args, kwargs, compiling)
        if arguments is None:
            reason = "its arguments are not plain tensors, one for each input"
        elif original.forward is not eager or eager.__defaults__ is not defaults:
            reason = "its class has another forward now"
        elif getattr(original, "__iter__", None) is not iteration:
            reason = "its class has another __iter__ now"
        elif not compiling and not plan.constants and library.is_unchanged(children, plan.order, plan.children):
            reason = None
        else:
            reason = why_changed(self, plan)
        if reason is None:
            return _execute(children, plan, arguments)
        record_fallback(f"{original.__name__}: {reason}")
        return original.forward(self, *args, **kwargs)

    return forward


def _linear_forward(original: type[nn.Module]):
    eager, transposed = original.forward, original is not nn.Linear

    @functools.wraps(eager)
    def forward(self, *args, **kwargs):
        compiling = torch.compiler.is_compiling()
        if not compiling and library.is_disabled():
            return original.forward(self, *args, **kwargs)
        if len(args) != 1 or kwargs or not (compiling or _is_plain(args[0])):
            reason = "its argument is not one plain tensor"
        elif original.forward is not eager:
            reason = "its class has another forward now"
        else:
            reason = why_parameters_unfit(self)
        if reason is None:
            parameters = weight_and_bias(self, transposed)
            return torch.ops.fastlane.linear_gelu_residual.default(args[0], *parameters, activation="none")
        record_fallback(f"{original.__name__}: {reason}")
        return original.forward(self, *args, **kwargs)

    return forward


_SEPARATOR = "|"


_classes: dict[type[nn.Module], type[nn.Module]] = {}
_making = threading.Lock()


def fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``original`` whose instances run fused; whatever making a subclass raises is raised."""
    original = original_class(original)
    with _making:
        if original not in _classes:
            _classes[original] = _make_class(original)
        return _classes[original]


def _make_class(original: type[nn.Module]) -> type[nn.Module]:
    if "<locals>" in original.__qualname__:
        name = original.__qualname__
    else:
        name = f"{original.__module__}{_SEPARATOR}{original.__qualname__}".replace(".", ":")
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": original.__doc__,
        "_fastlane_original": original,
        "_get_name": lambda self: f"{original.__name__}[fused]" if PLAN in self.__dict__ else original.__name__,
        "forward": (_linear_forward if linear_class(original) else _container_forward)(original),
    }
    return type(original)(original.__name__, (original,), namespace)


def __getattr__(name: str) -> type[nn.Module]:
    module, separator, qualname = name.partition(_SEPARATOR)
    if not separator:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = importlib.import_module(module.replace(":", "."))
    for part in qualname.split(":"):
        found = getattr(found, part)
    return fused_class(found)
