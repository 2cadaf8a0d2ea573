"""What was found of classes, functions and globals, and whether it still is so.

A fused operation stands in for code that somebody may replace later: a class's forward, ``F.linear``, the code inside a
function object, a global that a function reads. Whoever concludes something from code writes down the facts that the
conclusion rests on. Before each use all of them are looked at again: by `why_changed` here, which names the first that
is no longer true, and by csrc/python/facts.cpp, which answers yes or no in a few nanoseconds a fact.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()
"""Stands for the value of a name that is not there."""


class Fact(NamedTuple):
    """``holder`` has this very object under ``name``.

    A dict holds its items, a class what Python finds along its ``__mro__``, a cell its contents. A function holds the
    tuple of its code, its defaults and its keyword defaults, whatever the name.
    """

    holder: dict[str, Any] | type | types.FunctionType | types.CellType
    name: str
    value: Any


Facts = tuple[Fact, ...]


def lookup(kind: type, name: str) -> Any:
    """What Python finds of a class's attribute, before any descriptor acts; ABSENT if there is none."""
    for base in kind.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return ABSENT


def _now(fact: Fact) -> Any:
    holder, name, _ = fact
    if isinstance(holder, type):
        return lookup(holder, name)
    if isinstance(holder, types.FunctionType):
        return (holder.__code__, holder.__defaults__, holder.__kwdefaults__)
    if isinstance(holder, types.CellType):
        return contents(holder)
    return holder.get(name, ABSENT)


def contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def of_class(kind: type, *names: str) -> Iterator[Fact]:
    """What the class has under each name now, and the code of what is a function."""
    for name in names:
        value = lookup(kind, name)
        yield Fact(kind, name, value)
        yield from of_function(value)


def of_item(holder: dict[str, Any], name: str) -> Fact:
    return Fact(holder, name, holder.get(name, ABSENT))


def of_function(value: Any) -> Iterator[Fact]:
    """The function's code now; nothing for what is no Python function."""
    if isinstance(value, types.FunctionType):
        fact = Fact(value, "", None)
        yield fact._replace(value=_now(fact))


def collected(facts: Iterable[Fact]) -> Facts:
    """Each fact once, in their order. Two that contradict each other both stay: no call satisfies them."""
    seen: dict[tuple[int, str, tuple[int, ...]], Fact] = {}
    for fact in facts:
        values = fact.value if type(fact.value) is tuple else (fact.value,)
        seen.setdefault((id(fact.holder), fact.name, tuple(map(id, values))), fact)
    return tuple(seen.values())


def _is_same(now: Any, value: Any) -> bool:
    if type(value) is tuple:
        return type(now) is tuple and len(now) == len(value) and all(a is b for a, b in zip(now, value, strict=True))
    return now is value


def hold_slowly(facts: Facts) -> bool:
    """Whether all of them still are true: what csrc/python/facts.cpp tells faster."""
    return all(_is_same(_now(fact), fact.value) for fact in facts)


hold: Callable[[Facts], bool] = hold_slowly
"""The compiled extension's, as soon as it is loaded; `fastlane_ext.reference` does without."""


def why_changed(facts: Facts, allowed: Callable[[Any], bool] = lambda now: False) -> str | None:
    """None if all of them still are true, or what is there now is ``allowed``; else what is another now."""
    if hold(facts):
        return None
    for fact in facts:
        now = _now(fact)
        if not _is_same(now, fact.value) and not allowed(now):
            return _describe(fact)
    return None


def _describe(fact: Fact) -> str:
    holder, name, _ = fact
    if isinstance(holder, type):
        return f"{holder.__name__} has another {name} now"
    if isinstance(holder, types.FunctionType):
        return f"{holder.__qualname__} has other code now"
    if isinstance(holder, types.CellType):
        return f"a variable that its code reads, {name}, is another now"
    return f"{holder.get('__name__', 'its')}.{name} is another now"


def comes_from(function: object, module: str, name: str) -> bool:
    """Whether the function was written in that module under that name, and is no wrapper that only says so.

    What a compiled extension defines has no source; there its own record of the module and the name counts.
    """
    code = getattr(function, "__code__", None)
    if isinstance(function, types.FunctionType) and isinstance(code, types.CodeType):
        path = os.path.join(*module.split("."))
        file = os.path.normpath(code.co_filename)
        return code.co_name == name and file.endswith((path + ".py", os.path.join(path, "__init__.py")))
    if isinstance(function, types.BuiltinFunctionType):
        return function.__name__ == name and (function.__module__ or type(function.__self__).__module__) == module
    return False
