"""Facts about classes, functions and globals, and whether the facts are still true.

A fused operation stands in for code that somebody may replace later: a class's forward, ``F.linear``, the code inside a
function object, a global that a function reads. A conclusion from code is kept with the facts that it rests on. Before
each use all these facts are checked again: by csrc/python/facts.cpp, which answers yes or no in a few nanoseconds for
each fact, and by `why_changed` here, which names the first fact that is no longer true.
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

    A dict holds its items, a class the attributes that Python finds along its ``__mro__``, a cell its contents. A
    function holds the tuple of its code, its defaults and its keyword defaults, under any name.
    """

    holder: dict[str, Any] | type | types.FunctionType | types.CellType
    name: str
    value: Any


Facts = tuple[Fact, ...]


def lookup(kind: type, name: str) -> Any:
    """The class attribute that Python finds under ``name``, before any descriptor acts; ABSENT if there is none."""
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
    """Facts: the class's attribute under each name now, and its code if the attribute is a function."""
    for name in names:
        value = lookup(kind, name)
        yield Fact(kind, name, value)
        yield from of_function(value)


def of_item(holder: dict[str, Any], name: str) -> Fact:
    return Fact(holder, name, holder.get(name, ABSENT))


def of_function(value: Any) -> Iterator[Fact]:
    """A fact: the function's code now. Nothing if ``value`` is not a Python function."""
    if isinstance(value, types.FunctionType):
        fact = Fact(value, "", None)
        yield fact._replace(value=_now(fact))


def collected(facts: Iterable[Fact]) -> Facts:
    """Each fact once, in their order. Facts that contradict each other all stay, so that no call satisfies them."""
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
    """Whether all facts are still true; csrc/python/facts.cpp computes the same faster."""
    return all(_is_same(_now(fact), fact.value) for fact in facts)


hold: Callable[[Facts], bool] = hold_slowly
"""Replaced by the compiled extension's function when that is loaded; `fastlane_ext.reference` works without it."""


def why_changed(facts: Facts, allowed: Callable[[Any], bool] = lambda now: False) -> str | None:
    """None if each fact is still true or its new value is ``allowed``; else the first change, in words."""
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
    """Whether the function was written in that module under that name; a wrapper that only claims so was not.

    A function of a compiled extension has no source; its own record of module and name counts instead.
    """
    code = getattr(function, "__code__", None)
    if isinstance(function, types.FunctionType) and isinstance(code, types.CodeType):
        path = os.path.join(*module.split("."))
        file = os.path.normpath(code.co_filename)
        return code.co_name == name and file.endswith((path + ".py", os.path.join(path, "__init__.py")))
    if isinstance(function, types.BuiltinFunctionType):
        return function.__name__ == name and (function.__module__ or type(function.__self__).__module__) == module
    return False
