"""Classes of modules that `fuse` has fused: each a subclass of the module's own class, with another forward.

At every call the forward checks that all facts of the plan still hold, and runs the original forward if one does not. A
fused class has the original's name and module. Its instances are pickled as the original class and their state, so that
they can be saved and loaded like the original's instances.
"""

from __future__ import annotations

import abc
import contextlib
import copyreg
import functools
import threading
from typing import Any

import torch
from torch import nn

from .. import _facts, _register  # noqa: F401  (_register: the batching rules)
from .._disabled import is_disabled
from .._facts import lookup
from .._load import library
from .._plain import constant_while_traced, is_of_fx, is_plain_tensor, why_parameters_unfit, why_watched
from ..functional import record_fallback
from .changes import why_changed
from .execute import execute
from .known import known, original_class
from .linears import linear_class, weight_and_bias
from .plan import Plan, Unread, unread
from .read_plan import read_plan
from .trace import Refused

PLAN = "_fastlane_plan"
_UNREAD = unread()
_ARGUMENTS = "its arguments are not plain tensors, one for each input"


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
    plan = module.__dict__.get(PLAN, _UNREAD)  # another thread may unfuse the module meanwhile
    if type(plan) is Unread:
        try:
            plan = read_plan(module)
        except Refused as refused:
            plan = str(refused)
        if PLAN in module.__dict__:
            module.__dict__[PLAN] = plan
    return plan


def _is_traced() -> bool:
    """Whether a tracer is running now, so that nothing can be learned from code."""
    return torch.compiler.is_compiling() or is_of_fx(lookup(nn.Module, "__call__"))


def _container_forward(original: type[nn.Module]) -> Any:
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A new instance of this class (a slice of a Sequential, for one) has no plan: nobody fused it.
        plan = self.__dict__.get(PLAN)
        if plan is None or is_disabled() or (type(plan) is Unread and _is_traced()):
            return original.forward(self, *args, **kwargs)
        plan, compiling = plan_of(self), torch.compiler.is_compiling()
        if isinstance(plan, str):
            record_fallback(f"{original.__name__}: {plan}")
            return original.forward(self, *args, **kwargs)
        values = _arguments(plan, args, kwargs)
        reason: str | None
        if values is None:
            reason = _ARGUMENTS
        elif not compiling and library.is_as_planned(self, plan.checks):
            reason = None
        else:
            reason = why_changed(self, plan)
        if reason is None and values is not None:
            if not compiling:
                plan.calls.fused += 1
            return execute(self, plan, values)
        if not compiling:
            plan.calls.original += 1
            plan.calls.reason = str(reason)
        record_fallback(f"{original.__name__}: {reason}")
        return original.forward(self, *args, **kwargs)

    return forward


_OF_LINEARS = ("weight", "bias", "__getattr__", "__getattribute__")


@constant_while_traced
def _why_linear_changed(kind: type, original: type[nn.Module]) -> str | None:
    found = known(original)
    assert found is not None
    for name in _OF_LINEARS:
        if lookup(kind, name) is not lookup(original, name):
            return f"its class has another {name} now"
    return found.reason or _facts.why_changed(found.facts, is_of_fx)


def _linear_forward(original: type[nn.Module]) -> Any:
    transposed = original is not nn.Linear

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if PLAN not in self.__dict__ or is_disabled():
            return original.forward(self, *args, **kwargs)
        if len(args) != 1 or kwargs or not is_plain_tensor(args[0]):
            reason = "its argument is not one plain tensor"
        else:
            reason = (
                why_watched() or why_parameters_unfit(self, transposed) or _why_linear_changed(type(self), original)
            )
        if reason is None:
            parameters = weight_and_bias(self, transposed)
            return torch.ops.fastlane.linear_gelu_residual.default(args[0], *parameters, activation="none")
        record_fallback(f"{original.__name__}: {reason}")
        return original.forward(self, *args, **kwargs)

    return forward


class _Quiet:
    """Hides a fused class from the original's ``__init_subclass__``, which may enter classes into a registry."""

    def __init_subclass__(cls, **options: Any) -> None:
        if "_fastlane_class" not in cls.__dict__:
            super().__init_subclass__(**options)


_making = threading.Lock()


def why_no_class(kind: type[nn.Module]) -> str | None:
    """Why no fused class can be made of ``kind``, or None. Does not make the class."""
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
    """Why a module of a fused class does not run the forward that `fuse` gave it, or None."""
    kind = type(module)
    if "forward" in module.__dict__:
        return "has a forward of its own, which decides what runs"
    fused = getattr(kind, "_fastlane_class", None)
    if fused is not None and lookup(kind, "forward") is not fused._fastlane_forward:
        return "its fused class was given another forward, which decides what runs"
    return None


def fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``original`` whose instances run fused. Passes on any error from making the subclass."""
    original = original_class(original)
    with _making:
        # The original refers to its subclasses weakly; a list of ours would keep classes that a notebook has redefined.
        for kind in type.__subclasses__(original):
            if kind.__dict__.get("_fastlane_class") is kind:
                return kind
        return _make_class(original)


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
    metaclass: Any = type(original)
    made = metaclass(original.__name__, (_Quiet, original), namespace)
    made._fastlane_class = made  # in a subclass this attribute is inherited, and so is not the subclass itself
    return made


def _reduce(self: Any, protocol: Any) -> Any:
    """The pickle that the original class would make, with the fused class replaced by the original."""
    fused = type(self)._fastlane_class
    original = fused._fastlane_original
    if original in copyreg.dispatch_table:
        return copyreg.dispatch_table[original](self)
    make, arguments, *state = super(fused, self).__reduce_ex__(max(int(protocol), 2))
    if type(self) is fused and arguments and arguments[0] is fused:
        return (remake, (make, original, *arguments[1:]), *state)
    return (make, arguments, *state)


def remake(make: Any, original: type[nn.Module], *arguments: Any) -> nn.Module:
    """A new instance of the original's fused class; pickles call this function."""
    return make(fused_class(original), *arguments)


def _set_state(self: Any, state: Any) -> None:
    super(type(self)._fastlane_class, self).__setstate__(state)
    if type(self.__dict__.get(PLAN)) is Unread and not _is_traced():
        # At once, while no tracer or transform is on. A module that is not complete yet is read at the first call.
        with contextlib.suppress(Exception):
            self.__dict__[PLAN] = read_plan(self)
