"""Everything that a function reads beside its arguments; its results stay the same only as long as this does."""

from __future__ import annotations

import builtins
import dis
import functools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._facts import ABSENT, Fact, comes_from, contents, lookup, of_class, of_function, of_item
from .bytecode import why_not_straight

_READS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_CHOICES = ("SUBSCR", "SLICE")
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.ModuleType, type)
CONSTANTS = (bool, int, float, str, type(None))
_TRUSTED = ("math", "torch")
"""Modules whose constants nobody assigns."""
_ARITHMETIC = frozenset(
    "add div erf erfc gelu mul multiply ndtr neg negative pow rsub sigmoid "  # noqa: SIM905
    "sqrt square sub subtract tanh true_divide".split()
)
"""Functions and methods that an activation may call: their values and slopes depend on their arguments only."""
_OPERATORS = tuple(
    f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv", "div", "pow") for side in ("", "r")
) + ("__neg__",)
_TRUSTED_BUILTINS = (abs, float, int, pow)


class Read(NamedTuple):
    """A global, a builtin or a variable of an enclosing function. ``name`` is dotted for an attribute of a module, a
    class or a function. ``kept``: the code keeps the value in a local variable, and may read any attribute from there.
    ``facts`` lead to the value.
    """

    name: str
    value: Any
    facts: tuple[Fact, ...]
    module: str = ""
    kept: bool = False


class Attribute(NamedTuple):
    """The name of an attribute of anything but a `Read`: of an argument or of a result."""

    name: str


def _is_trusted(module: str) -> bool:
    return module.partition(".")[0] in _TRUSTED


def _attribute(found: Read, name: str) -> Read:
    value = found.value
    if isinstance(value, type):
        fact = Fact(value, name, lookup(value, name))
    else:
        # A module's __getattr__ may answer otherwise next time, so that a name missing in its dict counts as absent.
        fact = of_item(vars(value) if hasattr(value, "__dict__") else {}, name)
    module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
    return Read(f"{found.name}.{name}", fact.value, (*found.facts, fact), module)


def _global(function: types.FunctionType, name: str) -> Read:
    fact = of_item(function.__globals__, name)
    if fact.value is not ABSENT:
        return Read(name, fact.value, (fact,))
    builtin = of_item(vars(builtins), name)
    return Read(name, builtin.value, (fact, builtin))


def reads_of(function: types.FunctionType) -> Iterator[Read | Attribute]:
    """Everything that the function's own code reads from outside, and the names of all other attributes."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    found: Read | None = None
    for instruction in dis.get_instructions(function):
        name = instruction.argval
        if instruction.opname == "EXTENDED_ARG":
            continue
        if found is not None:
            if instruction.opname in _ATTRIBUTES and isinstance(found.value, _CODE):
                found = _attribute(found, name)
                continue
            yield found._replace(kept=instruction.opname.startswith("STORE_"))
            found = None
        if instruction.opname in _ATTRIBUTES:
            yield Attribute(name)
        elif instruction.opname in _READS:
            if "DEREF" not in instruction.opname:
                found = _global(function, name)
            elif name in cells:
                value = contents(cells[name])
                found = Read(name, value, (Fact(cells[name], name, value),))


def why_not_fixed(function: types.FunctionType, facts: list[Fact]) -> str | None:
    """None if the function reads only code from outside, and no data but constants of math and torch; else a reason.
    Adds to ``facts`` how each of them was found.
    """
    for read in reads_of(function):
        if isinstance(read, Attribute):
            continue
        is_code = isinstance(read.value, _CODE) and not isinstance(read.value, types.ModuleType) and not read.kept
        if not is_code and not (_is_trusted(read.module) and isinstance(read.value, CONSTANTS)):
            return f"reads {read.name}, which may change"
        facts += read.facts
    facts += of_function(function)
    return None


def _is_arithmetic(value: Any) -> bool:
    """Whether torch or math defined this function, and its values and slopes follow from its arguments alone."""
    if not isinstance(value, types.BuiltinFunctionType):
        return False
    name = value.__name__
    if name.removeprefix("special_") not in _ARITHMETIC:
        return False
    return any(comes_from(value, module, name) for module in ("torch", "torch._C._nn", "torch._C._special", "math"))


class Evidence:
    """The basis of a conclusion from code: facts, and names that an instance's own dict must not hold."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self.of_class: set[str] = set()


def why_not_closed(value: Any, owner: nn.Module, evidence: Evidence, seen: tuple[Any, ...] = ()) -> str | None:
    """None if ``value``, with all Python functions that it calls, computes arithmetic of its arguments and of
    ``owner``'s own attributes, and nothing else; else a reason.
    """
    name = getattr(value, "__name__", repr(value))
    if any(value is other for other in seen):
        return f"calls {name} in a circle"
    if isinstance(value, functools.partial):
        if type(value) is not functools.partial or not all(
            type(v) in CONSTANTS for v in (*value.args, *value.keywords.values())
        ):
            return "keeps more than constants for a call"
        return why_not_closed(value.func, owner, evidence, seen)
    if isinstance(value, types.MethodType):
        if value.__self__ is not owner:
            return f"uses {name}"
        return why_not_closed(value.__func__, owner, evidence, seen)
    if any(value is trusted for trusted in _TRUSTED_BUILTINS) or _is_arithmetic(value):
        return None
    if isinstance(value, types.FunctionType):
        return _why_code_not_closed(value, owner, evidence, (*seen, value))
    return f"uses {name}"


def _why_code_not_closed(
    function: types.FunctionType, owner: nn.Module, evidence: Evidence, seen: tuple[Any, ...]
) -> str | None:
    reason = why_not_straight(function) or why_not_fixed(function, evidence.facts)
    evidence.facts += of_class(Tensor, *_OPERATORS)
    if reason is None and (function.__defaults__ or function.__kwdefaults__):
        reason = "has default arguments"
    if reason is not None:
        return reason
    for instruction in dis.get_instructions(function):
        # An index can choose between two formulas without a branch.
        if any(part in instruction.opname for part in _CHOICES) or instruction.argrepr == "[]":
            return "chooses by a value"
    called = []
    for read in reads_of(function):
        if isinstance(read, Attribute):
            value = _method(read.name, owner, evidence)
            if value is ABSENT:
                return f"uses {read.name}"
            called += [] if value is None else [value]
        elif isinstance(read.value, _CODE):
            called.append(read.value)
    return next(filter(None, (why_not_closed(value, owner, evidence, seen) for value in called)), None)


def _method(name: str, owner: nn.Module, evidence: Evidence) -> Any:
    """The method of the owner's class that the code means by ``name``; None for an attribute of the owner's own or for
    a tensor's arithmetic; ABSENT if ``name`` may mean anything.
    """
    if name in _ARITHMETIC:
        evidence.facts += of_class(Tensor, name)
        return None if name not in vars(owner) and lookup(type(owner), name) is ABSENT else ABSENT
    if hasattr(Tensor, name):
        return ABSENT
    evidence.facts += of_class(type(owner), name)
    if name in vars(owner):
        return None
    found = lookup(type(owner), name)
    if found is ABSENT or hasattr(nn.Module, name):
        return ABSENT
    evidence.of_class.add(name)
    return found.__func__ if isinstance(found, staticmethod) else found
