"""The plan of a container: the steps of its forward, with fused operations where they can stand in.

A plan is a list of steps on numbered values. Children appear by name and are looked up at every call. A plan is copied
with its module, but not pickled: a loaded module's plan is read again, from the code that is there then.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple

from torch import nn

from .._facts import Facts, lookup, why_changed
from .._plain import constant_while_traced, is_of_fx


class Role(IntEnum):
    """The part of a child in a fused step; csrc/python/plan_call.cpp reads the numbers."""

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
"""Classes that do nothing to their input, or nothing in evaluation: these very classes, no subclass."""


@dataclass(frozen=True)
class Linear:
    """``transposed``: the weight is stored (in, out)."""

    name: str
    transposed: bool


@dataclass(frozen=True)
class Fused:
    """``values[target] = [fc2](act(fc1(values[source]))) [+ values[residual]]``. ``instead`` are eager's steps, for
    values that the fused operation does not take.
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
            parts.append({"gelu": "GELU", "gelu_tanh": "GELU(tanh)"}.get(self.activation, self.activation))
        if self.fc2:
            parts.append("Linear")
        return "→".join(parts) + ("+residual" if self.residual is not None else "")

    @property
    def children(self) -> int:
        """How many calls of children the step replaces."""
        return sum(isinstance(part, Call) for part in self.instead)

    @property
    def linears(self) -> tuple[str, ...]:
        return (self.fc1.name,) if self.fc2 is None else (self.fc1.name, self.fc2.name)

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.source,) if self.residual is None else (self.source, self.residual)


@dataclass(frozen=True)
class Call:
    """``values[target] = child(*values[sources])``. The forward looks this child up when ``looked_up`` children have
    been called, which may be long before it calls the child.
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
    """``values[target] = values[left] + values[right]``, or ``torch.add`` of the two."""

    left: int
    right: int
    target: int
    by_function: bool

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.left, self.right)


@dataclass
class Calls:
    """How often a module ran fused since `fuse`, how often its original forward ran, and the last reason for that."""

    fused: int = 0
    original: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """A forward with positional arguments named ``inputs``, in ``steps``. ``last_uses`` lists, for each step, the
    values that no later step reads. ``checks`` is what must still hold at a call; csrc/python/plan_call.cpp reads it.
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
    looked_up_early: frozenset[int] = field(init=False, compare=False)  # `Call.looked_up` of those with a call between
    key: int = field(init=False, compare=False)  # by which code that torch.compile traces names the plan
    checks: tuple[Any, ...] = field(init=False, compare=False)  # csrc/python/plan_call.cpp's ``CheckField``

    def __post_init__(self) -> None:
        checks = (self.facts, self.kind, self.lookups, self.names, self.order, self.constants, self.children)
        object.__setattr__(self, "checks", checks)
        object.__setattr__(self, "looked_up_early", _looked_up_early(self.steps))
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
        # Facts are about objects that the copy shares. A child's state may hold bound methods, which are copied.
        return replace(self, children=copy.deepcopy(self.children, memo), calls=Calls())

    def __copy__(self) -> Plan:
        return replace(self, calls=Calls())

    def __reduce__(self) -> tuple[Any, ...]:
        return unread, ()

    def __setstate__(self, state: object) -> None:
        """For plans that an earlier version pickled: they hold too little, and are read again."""
        object.__setattr__(self, "__class__", Unread)


_keys = itertools.count()
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


@constant_while_traced
def why_traced_class_changed(key: int, kind: type) -> str | None:
    """Asked once while torch.compile traces: facts are about code, and a graph does not notice later changes."""
    return why_class_changed(_plans[key], kind)


def why_class_changed(plan: Plan, kind: type) -> str | None:
    """Why modules of class ``kind`` may do something else than the plan, or None; looks at no instance."""
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
    """Stands for every plan in a pickle."""
    return _UNREAD


def _looked_up_early(steps: Iterable[Fused | Call | Add]) -> frozenset[int]:
    """The values of `Call.looked_up` of children that are looked up before other children are called."""
    parts = [part for step in steps for part in (step.instead if isinstance(step, Fused) else (step,))]
    calls = [part for part in parts if isinstance(part, Call)]
    return frozenset(part.looked_up for index, part in enumerate(calls) if part.looked_up < index)


def last_uses(steps: list[Fused | Call | Add], output: int) -> tuple[tuple[int, ...], ...]:
    """For each step, the values to release after it, which neither the output nor a later step needs."""
    found: list[tuple[int, ...]] = []
    needed = {output}
    for step in reversed(steps):
        used = {*step.reads, step.target}
        found.append(tuple(sorted(used - needed)))
        needed |= used
    return tuple(reversed(found))
