"""What a container's forward computes, as far as the fused operations can stand in for it.

Read from the forward's record (_trace.py); nothing is concluded from a class's name. A plan is a list of steps on
numbered values; children appear by name, and are looked up at every call. A plan is copied with the module. It is not
pickled: whoever loads the module reads the plan again, from the code that is there then.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple

from torch import nn

from ._activations import Activation, read_activation
from ._facts import Facts, collected, lookup, why_changed
from ._plain import constant_while_traced, is_linear, is_of_fx, known, linear_class, original_class
from ._trace import Node, Refused, follow, is_sequential

__all__ = ["Add", "Call", "Child", "Fused", "Plan", "Refused", "Role", "other_activation", "read_plan", "unread"]


class Role(IntEnum):
    """What a child does in a fused step; csrc/plan_call.cpp reads the numbers."""

    LINEAR = 0
    TRANSPOSED_LINEAR = 1
    ACTIVATION = 2
    DROPOUT = 3


class Child(NamedTuple):
    """A child as the plan found it: its class, an activation's attributes, and names that the child's own dict must
    not hold. A tuple, which C++ reads.
    """

    name: str
    role: int
    kind: type
    state: tuple[tuple[str, Any], ...] = ()
    of_class: tuple[str, ...] = ()


DROPOUTS = (nn.Dropout, nn.Identity)
"""What does nothing to its input, or nothing in evaluation: these very classes, no subclass."""


@dataclass(frozen=True)
class Linear:
    """``transposed``: the weight is stored (in, out)."""

    name: str
    transposed: bool


@dataclass(frozen=True)
class Fused:
    """``values[target] = [fc2](act(fc1(values[source]))) [+ values[residual]]``; ``instead`` are the steps that eager
    takes, for values that the fused operation does not.
    """

    source: int
    target: int
    instead: tuple[Call | Gelu | Add, ...]
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
    def children(self) -> int:
        """How many children the step stands for."""
        return sum(isinstance(part, Call) for part in self.instead)

    @property
    def linears(self) -> tuple[str, ...]:
        return (self.fc1.name,) if self.fc2 is None else (self.fc1.name, self.fc2.name)

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.source,) if self.residual is None else (self.source, self.residual)


@dataclass(frozen=True)
class Call:
    """``values[target] = child(*values[sources])``; the forward looks the child up when ``looked_up`` children of it
    have been called, which may be long before.
    """

    name: str
    sources: tuple[int, ...]
    target: int
    looked_up: int

    @property
    def reads(self) -> tuple[int, ...]:
        return self.sources


@dataclass(frozen=True)
class Gelu:
    """``values[target] = F.gelu(values[source], approximate=approximate)``."""

    source: int
    target: int
    approximate: str


@dataclass(frozen=True)
class Add:
    """``values[target] = values[left] + values[right]``."""

    left: int
    right: int
    target: int

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.left, self.right)


@dataclass
class Calls:
    """How often a module ran fused since `fuse`, how often it ran its original forward, and why the last time."""

    fused: int = 0
    original: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """A forward of ``inputs`` positional arguments, by name, in ``steps``; ``last_uses`` are the values that no later
    step reads. The rest is what must still hold at a call: csrc/plan_call.cpp reads it.
    """

    kind: type  # the container's class
    inputs: tuple[str, ...]
    steps: tuple[Fused | Call | Add, ...]
    last_uses: tuple[tuple[int, ...], ...]
    output: int
    values: int
    facts: Facts
    names: tuple[str, ...]  # of children and constants: they have to be found where nn.Module keeps them
    children: tuple[Child, ...]  # of all fused steps
    order: tuple[str, ...] | None = None  # of a Sequential, whose children's names are its forward
    constants: tuple[tuple[str, Any], ...] = ()  # attributes of the container that its forward reads
    calls: Calls = field(default_factory=Calls, compare=False)
    has_calls: bool = field(init=False, compare=False)  # of children outside the fused steps
    key: int = field(init=False, compare=False)  # by which code that torch.compile traces names the plan
    checks: tuple[Any, ...] = field(init=False, compare=False)  # csrc/plan_call.cpp's ``CheckField``

    def __post_init__(self) -> None:
        checks = (self.facts, self.kind, self.lookups, self.names, self.order, self.constants, self.children)
        object.__setattr__(self, "checks", checks)
        object.__setattr__(self, "has_calls", any(isinstance(step, Call) for step in self.steps))
        object.__setattr__(self, "key", next(_keys))
        _plans[self.key] = self

    @property
    def lookups(self) -> tuple[str, ...]:
        """Names that a class derived from ``kind`` must not define anew."""
        return (*self.names, *(name for name, _ in self.constants), "__getattr__", "__getattribute__")

    @property
    def fused(self) -> tuple[Fused, ...]:
        return tuple(step for step in self.steps if isinstance(step, Fused))

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        # Facts are about objects that no copy has of its own. A child's state may be: its bound methods.
        return replace(self, children=copy.deepcopy(self.children, memo), calls=Calls())

    def __copy__(self) -> Plan:
        return replace(self, calls=Calls())

    def __reduce__(self) -> tuple[Any, ...]:
        return unread, ()


_keys = itertools.count()
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


@constant_while_traced
def why_traced_class_changed(key: int, kind: type) -> str | None:
    """Asked once while torch.compile traces: facts are about code, and what changes later no graph notices."""
    return why_class_changed(_plans[key], kind)


def why_class_changed(plan: Plan, kind: type) -> str | None:
    """Why a module of class ``kind`` may do something else than the plan, whatever the instance is; or None."""
    if kind is not plan.kind:
        for name in plan.lookups:
            if lookup(kind, name) is not lookup(plan.kind, name):
                return f"its class has another {name} now"
    return why_changed(plan.facts, is_of_fx)


class Unread:
    """Stands for the plan of a module that was pickled, until the plan is read again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return unread, ()


_UNREAD = Unread()


def unread() -> Unread:
    """What a plan is pickled as."""
    return _UNREAD


def _last_uses(steps: list[Fused | Call | Add], output: int) -> tuple[tuple[int, ...], ...]:
    """For each step, the values to let go of after it: none that the output or a later step needs."""
    found: list[tuple[int, ...]] = []
    needed = {output}
    for step in reversed(steps):
        used = {*step.reads, step.target}
        found.append(tuple(sorted(used - needed)))
        needed |= used
    return tuple(reversed(found))


class _Reader:
    """Reads one record. Nodes that a fused step absorbs get no value of their own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.record = follow(module)
        self.absorbed: set[Node] = set()
        self.values: dict[Node, int] = {}
        self.positions = {node: position for position, node in enumerate(self.record.nodes)}
        self.steps: list[Fused | Call | Add] = []
        self.children: list[Child] = []
        self.facts = list(self.record.facts)
        self.activations: dict[str, Activation | str] = {}

    def plan(self) -> Plan:
        for node in self.record.nodes:
            if node not in self.absorbed:
                self._read(node)
        inputs = tuple(node.name for node in self.record.nodes if node.kind == "input")
        called = (node.name for node in self.record.nodes if node.kind == "call")
        output = self.values[self.record.output]
        return Plan(
            original_class(type(self.module)),
            inputs,
            tuple(self.steps),
            _last_uses(self.steps, output),
            output,
            len(self.values),
            collected(self.facts),
            tuple(dict.fromkeys(called)),
            tuple(self.children),
            tuple(self.module._modules) if is_sequential(self.module) else None,
            tuple(self.record.constants.items()),
        )

    def _new_value(self, node: Node) -> int:
        return self.values.setdefault(node, len(self.values))

    def _read(self, node: Node) -> None:
        if node.kind == "input":
            self._new_value(node)
            return
        if is_linear(self._child(node)) and len(node.arguments) == 1:
            fused = self._fused_from(node)
            if fused is not None:
                self.steps.append(fused)
                return
        step = self._step(node)
        if isinstance(step, Gelu):
            raise Refused("its forward computes a GELU of what is no linear layer")
        self.steps.append(step)

    def _step(self, node: Node) -> Call | Gelu | Add:
        sources = tuple(self.values[argument] for argument in node.arguments)
        if node.kind == "call":
            return Call(node.name, sources, self._new_value(node), node.looked_up)
        if node.kind == "add":
            return Add(*sources, self._new_value(node))
        return Gelu(*sources, self._new_value(node), "tanh" if node.name == "gelu_tanh" else "none")

    def _child(self, node: Node) -> nn.Module | None:
        return self.module._modules.get(node.name) if node.kind == "call" else None

    def _activation(self, node: Node) -> str | None:
        if len(node.arguments) != 1:
            return None
        if node.kind == "gelu":
            return node.name
        found = self._read_activation(node)
        return found.form if isinstance(found, Activation) else None

    def _read_activation(self, node: Node) -> Activation | str:
        child = self._child(node)
        if child is None:
            return "is no child"
        if node.name not in self.activations:
            self.activations[node.name] = read_activation(child)
        return self.activations[node.name]

    def _only_user(self, node: Node) -> Node | None:
        if len(node.users) != 1 or node is self.record.output:
            return None
        (user,) = node.users
        between = self.record.nodes[self.positions[node] + 1 : self.positions[user]]
        # A child called meanwhile may change in place what a fused step would read too early.
        return None if any(other.kind == "call" for other in between) else user

    def _precedes_gelu(self, linear: Node) -> bool:
        # Such a layer is better fused with its own activation.
        user = self._only_user(linear)
        return user is not None and self._activation(user) is not None

    def _skip_dropouts(self, node: Node) -> tuple[list[Node], Node | None]:
        """Dropouts and identities that follow ``node`` and alone use each other's results; who uses the last."""
        passed: list[Node] = []
        user = self._only_user(node)
        while user is not None and type(self._child(user)) in DROPOUTS:
            passed.append(user)
            user = self._only_user(user)
        return passed, user

    def _linear(self, node: Node) -> Linear:
        return Linear(node.name, linear_class(type(self._child(node))) is not nn.Linear)

    def _fused_from(self, linear: Node) -> Fused | None:
        nodes, fc2, activation, residual = [linear], None, None, None
        user = self._only_user(linear)
        if user is not None:
            activation = self._activation(user)
        if activation is not None:
            nodes.append(user)
            passed, user = self._skip_dropouts(user)
            if user is not None and is_linear(self._child(user)) and not self._precedes_gelu(user):
                fc2 = user
                nodes += [*passed, user]
        if activation is None or fc2 is not None:
            passed, user = self._skip_dropouts(nodes[-1])
            if user is not None and user.kind == "add":
                value = (passed or nodes)[-1]
                other = user.arguments[1] if user.arguments[0] is value else user.arguments[0]
                if other in self.values:
                    residual = self.values[other]
                    nodes += [*passed, user]
        if activation is None and residual is None:
            return None
        self.absorbed.update(nodes)
        self._remember(nodes)
        instead = tuple(self._step(node) for node in nodes)
        return Fused(
            self.values[linear.arguments[0]],
            self._new_value(nodes[-1]),
            instead,
            self._linear(linear),
            activation or "none",
            None if fc2 is None else self._linear(fc2),
            residual,
        )

    def _remember(self, nodes: list[Node]) -> None:
        for node in nodes:
            child = self._child(node)
            if child is None:
                continue
            kind = type(child)
            if is_linear(child):
                original = linear_class(kind)
                role = Role.LINEAR if original is nn.Linear else Role.TRANSPOSED_LINEAR
                found, facts = Child(node.name, int(role), original), known(original).facts
            elif kind in DROPOUTS:
                found, facts = Child(node.name, int(Role.DROPOUT), kind), known(kind).facts
            else:
                activation = self._read_activation(node)
                found = Child(node.name, int(Role.ACTIVATION), kind, activation.state, activation.of_class)
                facts = activation.facts
            self.children.append(found)
            self.facts += facts


def other_activation(module: nn.Module, plan: Plan) -> str | None:
    """The name of a child, no GELU, that stands between two linear layers as one would."""
    children = module._modules
    calls = {step.target: step for step in plan.steps if isinstance(step, Call)}

    def called_before(step: Call) -> Call | None:
        return calls.get(step.sources[0]) if len(step.sources) == 1 else None

    for step in calls.values():
        before = called_before(step) if is_linear(children[step.name]) else None
        while before is not None and type(children[before.name]) in DROPOUTS:
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
    return _Reader(module).plan()
