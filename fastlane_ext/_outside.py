"""What a function reads beside its arguments, so that its values are known to stay what they were found to be."""

from __future__ import annotations

import builtins
import dis
import functools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ._straight_line import why_not_straight

_READS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_CHOICES = ("COMPARE_OP", "CONTAINS_OP", "IS_OP", "UNARY_NOT", "SUBSCR", "SLICE")
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.ModuleType, type)
CONSTANTS = (bool, int, float, str, type(None))
_TRUSTED = ("math", "torch", "_operator")
"""Whose constants nobody assigns and whose functions keep no state of a model's."""
_TRUSTED_BUILTINS = (abs, bool, float, int, max, min, pow, round)
_ABSENT = object()


class Read(NamedTuple):
    """A global, a builtin or a variable of an enclosing function; ``name`` is dotted where it was found in a module, a
    class or a function. ``kept``: in a local variable, through which anything of it may be read.
    """

    name: str
    value: Any
    module: str = ""
    kept: bool = False


def _is_trusted(module: str) -> bool:
    return module.partition(".")[0] in _TRUSTED


def reads_of(function: types.FunctionType) -> Iterator[Read]:
    """Everything that the function's own code reads from outside."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    found: Read | None = None
    for instruction in dis.get_instructions(function):
        name = instruction.argval
        if instruction.opname == "EXTENDED_ARG":
            continue
        if found is not None:
            if instruction.opname in _ATTRIBUTES and isinstance(found.value, _CODE):
                found = Read(f"{found.name}.{name}", getattr(found.value, name, _ABSENT), _module_of(found.value))
                continue
            yield found._replace(kept=instruction.opname.startswith("STORE_"))
            found = None
        if instruction.opname not in _READS:
            continue
        if "DEREF" not in instruction.opname:
            found = Read(name, function.__globals__.get(name, getattr(builtins, name, _ABSENT)))
        elif name in cells:
            found = Read(name, _contents(cells[name]))


def _module_of(value: Any) -> str:
    return value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def why_not_fixed(function: types.FunctionType) -> str | None:
    """None if the function reads code from outside, and no data but constants of math and torch; else what it reads."""
    for read in reads_of(function):
        is_code = isinstance(read.value, _CODE) and not isinstance(read.value, types.ModuleType) and not read.kept
        if not is_code and not _is_trusted(read.module):
            return f"reads {read.name}, which may change"
    return None


def why_not_closed(value: Any, owner: nn.Module, seen: tuple[Any, ...] = ()) -> str | None:
    """None if what ``value`` computes depends on its arguments and on ``owner``'s own attributes alone, whatever
    Python functions it calls; else what it does beside that.
    """
    name = getattr(value, "__name__", repr(value))
    if value in seen:
        return f"calls {name} in a circle"
    if isinstance(value, functools.partial):
        if not all(isinstance(v, CONSTANTS) for v in (*value.args, *value.keywords.values())):
            return "keeps more than constants for a call"
        return why_not_closed(value.func, owner, seen)
    if isinstance(value, types.MethodType):
        own = isinstance(value.__self__, type(owner))
        return why_not_closed(value.__func__, owner, seen) if own else f"uses {name}"
    if value in _TRUSTED_BUILTINS or _is_trusted(_module_of(value)):
        return None
    if isinstance(value, types.FunctionType):
        return _why_code_not_closed(value, owner, (*seen, value))
    return f"uses {name}"


def _why_code_not_closed(function: types.FunctionType, owner: nn.Module, seen: tuple[Any, ...]) -> str | None:
    reason = why_not_straight(function) or why_not_fixed(function)
    if reason is None and (function.__defaults__ or function.__kwdefaults__):
        reason = "has default arguments"
    if reason is not None:
        return reason
    called = [read.value for read in reads_of(function) if isinstance(read.value, _CODE)]
    for instruction in dis.get_instructions(function):
        # A form may be chosen without a branch, by an index.
        if any(part in instruction.opname for part in _CHOICES) or instruction.argrepr == "[]":
            return "chooses by a value"
        if instruction.opname in _ATTRIBUTES and instruction.argval not in vars(owner):
            value = _of_its_classes(type(owner), instruction.argval)
            if value is not _ABSENT:
                called.append(value.__func__ if isinstance(value, staticmethod) else value)
    return next(filter(None, (why_not_closed(value, owner, seen) for value in called)), None)


def _of_its_classes(kind: type, name: str) -> Any:
    """What the classes derived from nn.Module say of an attribute."""
    for base in kind.__mro__:
        if base in (nn.Module, object):
            break
        if name in vars(base):
            return vars(base)[name]
    return _ABSENT
