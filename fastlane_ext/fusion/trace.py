"""A container's forward, run once with stand-ins for the container and its inputs.

No child is called, and nothing is changed: calls of children on stand-ins are recorded, and so are sums and F.gelu.
Only straight lines are followed (bytecode.py), and each of their calls has to be recorded. So the record shows
everything that the forward does: it has no branch, no context such as ``torch.no_grad()``, nothing in place, no helper.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from .._facts import ABSENT, Fact, comes_from, lookup, of_class
from .._plain import GELU, SUMS, is_of_fx
from .activations import form_of_function
from .bytecode import count_calls, why_not_straight
from .known import known, original_class
from .reads import CONSTANTS, Read, reads_of, why_not_fixed


class Refused(Exception):
    """Why a forward cannot be followed."""


@dataclass(eq=False)
class Node:
    """A value: an input, a call of a child, ``F.gelu`` of a value, or a sum of two."""

    kind: str  # "input", "call", "gelu", "add"
    name: str = ""  # the input's, the child's, GELU's form, or "torch.add" for a sum that is no "+"
    arguments: tuple[Node, ...] = ()
    looked_up: int = 0  # how many children had been called when this child was looked up
    users: list[Node] = field(default_factory=list)


@dataclass
class Record:
    """The nodes in the order in which they were computed; ``output`` is one of them."""

    nodes: list[Node] = field(default_factory=list)
    output: Node | None = None
    calls: int = 0
    children_called: int = 0
    constants: dict[str, Any] = field(default_factory=dict)  # attributes of the container that it read
    facts: list[Fact] = field(default_factory=list)  # what all that rests on

    def add(self, kind: str, name: str = "", arguments: tuple[Node, ...] = ()) -> Node:
        node = Node(kind, name, arguments)
        for argument in arguments:
            argument.users.append(node)
        self.nodes.append(node)
        return node


class _Value:
    """Stands for a tensor. Operations that are not recorded are refused."""

    def __init__(self, record: Record, node: Node) -> None:
        self._record, self._node = record, node

    def __add__(self, other: object) -> _Value:
        if not isinstance(other, _Value):
            raise Refused(f"its forward adds a {type(other).__name__}")
        return _Value(self._record, self._record.add("add", arguments=(self._node, other._node)))

    __radd__ = __add__

    @classmethod
    def __torch_function__(
        cls, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> _Value:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        if len(args) == 1 and isinstance(first, _Value) and all(isinstance(v, str) for v in kwargs.values()):
            form = form_of_function(function, kwargs)
            if form is not None:
                first._record.calls += 1
                return cls(first._record, first._record.add("gelu", form, (first._node,)))
        if function is torch.add and len(args) == 2 and not kwargs and all(isinstance(v, _Value) for v in args):
            first._record.calls += 1
            nodes = tuple(value._node for value in args)
            return cls(first._record, first._record.add("add", "torch.add", nodes))
        raise Refused(f"its forward also computes {getattr(function, '__name__', function)}")

    def __getattr__(self, name: str) -> Any:
        raise Refused(f"its forward also uses {name!r} of a tensor")


def _refuse(name: str) -> Callable[..., Any]:
    def method(self: _Value, *_: Any) -> Any:
        raise Refused(f"its forward also computes {name.strip('_')}")

    return method


for _name in dir(operator):
    if _name.startswith("__") and callable(getattr(operator, _name)) and _name not in dir(_Value):
        setattr(_Value, _name, _refuse(_name))
for _name in ("__rmul__", "__rsub__", "__rtruediv__", "__rmatmul__", "__rpow__", "__bool__", "__len__", "__iter__"):
    setattr(_Value, _name, _refuse(_name))


class _Container:
    """Stands for the container: its children can be called and its constants read, and nothing else. A name that the
    class defines is refused, since Python would find it before a child of that name.
    """

    def __init__(self, record: Record, module: nn.Module) -> None:
        self.__dict__.update(_record=record, _module=module)

    def __getattr__(self, name: str) -> Any:
        record, module = self._record, self._module
        kind, own = original_class(type(module)), module.__dict__
        if lookup(kind, name) is not ABSENT:
            raise Refused(f"its forward also uses self.{name}, which its class defines")
        record.facts += of_class(kind, name)
        if type(own.get(name, ABSENT)) in (bool, int, float, str):
            return record.constants.setdefault(name, own[name])
        if name in own or module._modules.get(name) is None:
            raise Refused(f"its forward also uses self.{name}")

        looked_up = record.children_called

        def call(*args: Any, **kwargs: Any) -> _Value:
            if kwargs or not args or not all(isinstance(value, _Value) for value in args):
                raise Refused(f"its forward calls self.{name} with something else than tensors")
            record.calls += 1
            node = record.add("call", name, tuple(value._node for value in args))
            node.looked_up = looked_up
            record.children_called += 1
            return _Value(record, node)

        return call


def _why_other_lookup(kind: type) -> str | None:
    """Why a container of this class may find other attributes than nn.Module would, or None."""
    found = lookup(kind, "__getattr__")
    if not is_of_fx(found) and not comes_from(found, nn_module.__name__, "__getattr__"):
        return "its class has a __getattr__ of its own"
    if lookup(kind, "__getattribute__") is not object.__getattribute__:
        return "its class has a __getattribute__ of its own"
    return None


def _follow_sequential(module: nn.Module, record: Record) -> None:
    node = record.add("input", "input")
    for name, child in module._modules.items():
        if child is None:
            raise Refused("a child of it is None")
        node = record.add("call", name, (node,))
        node.looked_up = record.children_called
        record.children_called += 1
    record.output = node


def is_sequential(module: nn.Module) -> bool:
    """Whether the module's forward is nn.Sequential's, which calls the children in their order."""
    kind = original_class(type(module))
    return all(lookup(kind, name) is lookup(nn.Sequential, name) for name in ("forward", "__iter__"))


def follow(module: nn.Module) -> Record:
    """The record of what the forward of the module's class does with its positional arguments. Raises Refused, with the
    reason, if a record cannot show everything that the forward does.
    """
    kind = original_class(type(module))
    record, forward = Record(), lookup(kind, "forward")
    other = _why_other_lookup(kind)
    if hasattr(kind, "_fastlane_original"):
        other = "its class derives from a fused one; derive it from the original"
    if other is not None:
        raise Refused(other)
    record.facts += of_class(kind, "forward", "__getattr__", "__getattribute__")
    record.facts += SUMS
    if is_sequential(module):
        sequential = known(nn.Sequential)
        assert sequential is not None
        if sequential.reason is not None:
            raise Refused(f"its class {sequential.reason}")
        record.facts += (*sequential.facts, *of_class(kind, "__iter__"))
        _follow_sequential(module, record)
        return record
    reason = why_not_straight(forward) or why_not_fixed(forward, record.facts)
    if reason is not None:
        raise Refused(f"its forward {reason}")
    inputs = []
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise Refused("its forward takes any number of arguments")
        # An argument with a default keeps its default: a call that passes the argument runs the original forward.
        if parameter.default is parameter.empty:
            inputs.append(_Value(record, record.add("input", parameter.name)))
        elif not isinstance(parameter.default, CONSTANTS):
            raise Refused(f"its forward has a default of {parameter.name} that may change")
    reason = _why_calls_others(forward)
    if reason is not None:
        raise Refused(f"its forward {reason}")
    try:
        result = forward(_Container(record, module), *inputs)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"its forward cannot be followed: {type(error).__name__}: {error}") from error
    if not isinstance(result, _Value):
        raise Refused("its forward returns something else than one tensor")
    if record.calls != count_calls(forward):
        raise Refused("its forward calls something beside its children")
    record.output = result._node
    return record


def _why_calls_others(forward: types.FunctionType) -> str | None:
    """Why the forward reads other code than torch's own ``gelu`` and ``add``, or None: following the forward would run
    such code.
    """
    for read in reads_of(forward):
        if not isinstance(read, Read) or not callable(read.value):
            continue
        if read.value is not GELU and not comes_from(read.value, "torch", "add"):
            return f"also calls {read.name}"
    return None
