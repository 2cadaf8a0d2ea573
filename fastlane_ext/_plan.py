"""What a container's forward computes, as far as the fused operations can stand in for it.

The forward is traced with torch.fx, its direct children being leaves, and the graph is read: nothing is
concluded from a class's name. The result is a list of steps on numbered values, plain data that is pickled
and copied with the module; children appear by name, and are looked up at every call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ._activations import form_of_module, form_of_values
from ._linears import is_linear, linear_class


class Role(IntEnum):
    """What a child does in a fused step; csrc/plan_call.cpp reads the numbers."""

    LINEAR = 0
    ACTIVATION = 1
    DROPOUT = 2


class Child(NamedTuple):
    """A child as the plan found it: its class, and of a GELU ``approximate``. A tuple, which C++ reads."""

    name: str
    role: int
    kind: type
    approximate: str | None = None


@dataclass(frozen=True)
class Linear:
    """``transposed``: the weight is stored (in, out)."""

    name: str
    transposed: bool


@dataclass(frozen=True)
class Fused:
    """``values[target] = [fc2](act(fc1(values[source]))) [+ values[residual]]``."""

    source: int
    target: int
    fc1: Linear
    activation: str = "none"
    fc2: Linear | None = None
    residual: int | None = None

    @property
    def pattern(self) -> str:
        parts = ["Linear"]
        if self.activation != "none":
            parts.append("GELU" if self.activation == "gelu" else "GELU(tanh)")
        if self.fc2:
            parts.append("Linear")
        return "→".join(parts) + ("+residual" if self.residual is not None else "")

    @property
    def linears(self) -> tuple[str, ...]:
        return (self.fc1.name,) if self.fc2 is None else (self.fc1.name, self.fc2.name)


@dataclass(frozen=True)
class Call:
    """``values[target] = child(*values[sources])``."""

    name: str
    sources: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class Add:
    left: int
    right: int
    target: int


@dataclass(frozen=True)
class Plan:
    """A forward of ``inputs`` positional arguments, by name, in ``steps``."""

    inputs: tuple[str, ...]
    steps: tuple[Fused | Call | Add, ...]
    output: int
    values: int
    children: tuple[Child, ...]  # of all fused steps

    @property
    def fused(self) -> tuple[Fused, ...]:
        return tuple(step for step in self.steps if isinstance(step, Fused))


class Refused(Exception):
    """Why a forward has no plan."""


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module) -> fx.Graph:
    graphs = []
    training = module.training
    try:
        # What a forward decides by `self.training` is frozen by a trace: it must decide the same both ways.
        for mode in (True, False):
            module.training = mode
            graphs.append(_ChildrenAreLeaves().trace(module))
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refused(f"its forward cannot be traced: {text}") from error
    finally:
        module.training = training
    if str(graphs[0]) != str(graphs[1]):
        raise Refused("its forward does one thing in training and another in evaluation")
    return graphs[0]


_ADDITIONS = (operator.add, operator.iadd, torch.add)


class _Reader:
    """Reads one graph. Nodes that a fused step absorbs get no value of their own."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module = module
        self.nodes = list(graph.nodes)
        self.absorbed: set[fx.Node] = set()
        self.values: dict[fx.Node, int] = {}
        self.inputs: list[str] = []
        self.steps: list[Fused | Call | Add] = []
        self.children: list[Child] = []

    def plan(self) -> Plan:
        output = None
        for node in self.nodes:
            if node in self.absorbed:
                continue
            if node.op == "placeholder":
                if node.args:
                    if node.users:
                        raise Refused(f"its forward has a default for {node.target!r}")
                    continue
                if node.target.startswith("*"):
                    raise Refused("its forward takes any number of arguments")
                self.inputs.append(node.target)
                self._new_value(node)
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise Refused("its forward returns something else than one tensor")
                output = self.values[node.args[0]]
            else:
                self._read(node)
        if output is None:
            raise Refused("its forward returns nothing")
        return Plan(tuple(self.inputs), tuple(self.steps), output, len(self.values), tuple(self.children))

    def _new_value(self, node: fx.Node) -> int:
        return self.values.setdefault(node, len(self.values))

    def _read(self, node: fx.Node) -> None:
        child = self._child(node)
        if child is not None and is_linear(child) and self._is_unary(node):
            fused = self._fused_from(node)
            if fused is not None:
                self.steps.append(fused)
                return
        if child is not None and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args):
            sources = tuple(self.values[arg] for arg in node.args)
            self.steps.append(Call(node.target, sources, self._new_value(node)))
        elif self._is_addition(node):
            left, right = (self.values[arg] for arg in node.args)
            self.steps.append(Add(left, right, self._new_value(node)))
        else:
            what = getattr(node.target, "__name__", node.target)
            raise Refused(f"its forward also computes {what}")

    def _child(self, node: fx.Node) -> nn.Module | None:
        # Grandchildren are reached through children that may be exchanged: only direct ones are followed.
        return self.module._modules.get(node.target) if node.op == "call_module" else None

    @staticmethod
    def _is_unary(node: fx.Node) -> bool:
        return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)

    @staticmethod
    def _is_addition(node: fx.Node) -> bool:
        return (
            node.op == "call_function"
            and node.target in _ADDITIONS
            and len(node.args) == 2
            and not node.kwargs
            and all(isinstance(arg, fx.Node) for arg in node.args)
        )

    def _activation(self, node: fx.Node) -> str | None:
        child = self._child(node)
        if child is not None and self._is_unary(node):
            return form_of_module(child)
        if node.op == "call_function" and node.target is F.gelu and len(node.args) == 1:
            options = dict(node.kwargs)
            if not any(isinstance(value, fx.Node) for value in options.values()):
                return form_of_values(lambda x: F.gelu(x, **options))
        return None

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _precedes_gelu(self, linear: fx.Node) -> bool:
        # Such a layer is better fused with its own activation.
        user = self._only_user(linear)
        return user is not None and self._activation(user) is not None

    def _skip_dropouts(self, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
        """Dropouts and identities that follow ``node`` and alone use each other's results; who uses the last."""
        passed: list[fx.Node] = []
        user = self._only_user(node)
        while user is not None and isinstance(self._child(user), (nn.Dropout, nn.Identity)) and self._is_unary(user):
            passed.append(user)
            user = self._only_user(user)
        return passed, user

    def _linear(self, node: fx.Node) -> Linear:
        return Linear(node.target, linear_class(type(self._child(node))) is not nn.Linear)

    def _fused_from(self, linear: fx.Node) -> Fused | None:
        nodes, fc2, activation, residual = [linear], None, None, None
        user = self._only_user(linear)
        if user is not None:
            activation = self._activation(user)
        if activation is not None:
            nodes.append(user)
            passed, user = self._skip_dropouts(user)
            child = self._child(user) if user is not None else None
            if child is not None and is_linear(child) and self._is_unary(user) and not self._precedes_gelu(user):
                fc2 = user
                nodes += [*passed, user]
        if activation is None or fc2 is not None:
            passed, user = self._skip_dropouts(nodes[-1])
            if user is not None and self._is_addition(user):
                value = (passed or nodes)[-1]
                other = user.args[1] if user.args[0] is value else user.args[0]
                if other is not value and other in self.values:
                    residual = self.values[other]
                    nodes += [*passed, user]
        if activation is None and residual is None:
            return None
        self.absorbed.update(nodes)
        self._remember(nodes)
        return Fused(
            self.values[linear.args[0]],
            self._new_value(nodes[-1]),
            self._linear(linear),
            activation or "none",
            None if fc2 is None else self._linear(fc2),
            residual,
        )

    def _remember(self, nodes: list[fx.Node]) -> None:
        for node in nodes:
            child = self._child(node)
            if child is None:
                continue
            kind = type(child)
            if is_linear(child):
                role = Role.LINEAR
            elif isinstance(child, (nn.Dropout, nn.Identity)):
                role = Role.DROPOUT
            else:
                role = Role.ACTIVATION
            approximate = child.approximate if kind is nn.GELU else None
            self.children.append(Child(node.target, int(role), kind, approximate))


def other_activation(module: nn.Module, plan: Plan) -> str | None:
    """The name of a child, no GELU, that stands between two linear layers as one would."""
    children = module._modules
    calls = {step.target: step for step in plan.steps if isinstance(step, Call)}

    def called_before(step: Call) -> Call | None:
        return calls.get(step.sources[0]) if len(step.sources) == 1 else None

    for step in calls.values():
        before = called_before(step) if is_linear(children[step.name]) else None
        while before is not None and isinstance(children[before.name], (nn.Dropout, nn.Identity)):
            before = called_before(before)
        first = called_before(before) if before is not None else None
        if first is not None and is_linear(children[first.name]) and _may_activate(children[before.name]):
            return before.name
    return None


def _may_activate(module: nn.Module) -> bool:
    has_state = module._parameters or module._buffers or module._modules
    return not has_state or type(module).__module__ == nn.PReLU.__module__


def read_plan(module: nn.Module) -> Plan:
    """The plan of ``module``'s forward. Refused, with the reason, where it has none."""
    return _Reader(module, _trace(module)).plan()


def gelu_children(module: nn.Module) -> Iterable[str]:
    """Names of the GELUs that a forward of ``module`` could call: children, and F.gelu kept as an attribute."""
    for name, child in module._modules.items():
        if child is not None and form_of_module(child):
            yield name
    for name, value in vars(module).items():
        if value is F.gelu:
            yield name
