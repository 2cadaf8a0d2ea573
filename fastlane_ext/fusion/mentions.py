"""Whether a module's code mentions a GELU or a linear layer, anywhere: for the report of `fuse`.

Nothing is fused because of these findings. The report lists places where a fused operation seems to belong, with the
reason why none runs.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._facts import ABSENT, lookup
from .activations import form_of_module
from .known import known, original_class
from .linears import is_linear

_OF_GELU = frozenset({"erf", "erfc", "ndtr", "cdf"})
_CONSTANTS = (0.044715, 0.7978845608)  # of the tanh form, and √(2/π) as many write it
_PRODUCTS = frozenset({"linear", "addmm", "baddbmm", "matmul", "mm", "bmm", "einsum", "tensordot"})
_DEPTH = 3


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _own_functions(kind: type) -> Iterator[types.FunctionType]:
    """The class's forward, the methods of the class that the forward's code names, the methods that these name, and so
    on, without nn.Module's own. Other methods do not count: code that initialises weights says nothing of the forward.
    """
    names, seen = ["forward", "__call__"], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        found = lookup(kind, name)
        function = getattr(found, "__func__", found)
        is_of_torch = name != "forward" and hasattr(nn.Module, name) and found is lookup(nn.Module, name)
        if isinstance(function, types.FunctionType) and not is_of_torch and function is not nn.Module.forward:
            yield function
            names += [word for code in _codes(inner(function).__code__) for word in code.co_names]


def _says_gelu(name: object) -> bool:
    return isinstance(name, str) and "gelu" in name.lower()


def _function_mentions_gelu(function: types.FunctionType, depth: int) -> bool:
    for code in _codes(inner(function).__code__):
        names = {*code.co_names, *code.co_freevars}
        if names & _OF_GELU or any(map(_says_gelu, names)):
            return True
        for constant in code.co_consts:
            if _says_gelu(constant) and " " not in constant:
                return True
            if isinstance(constant, float) and any(abs(constant - c) < 1e-7 for c in _CONSTANTS):
                return True
        if any(_value_mentions_gelu(function.__globals__.get(name), depth) for name in code.co_names):
            return True
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return any(_value_mentions_gelu(value, depth) for value in cells)


def inner(function: types.FunctionType) -> types.FunctionType:
    """The function inside a decorator that keeps ``__wrapped__``, or ``function`` itself."""
    found = getattr(function, "__wrapped__", function)
    return found if isinstance(found, types.FunctionType) else function


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _value_mentions_gelu(value: Any, depth: int) -> bool:
    """Whether a function, class or object that code reads is a GELU, by its name or by its own code."""
    if value is None or isinstance(value, types.ModuleType) or depth <= 0:
        return False
    if isinstance(value, functools.partial):
        return _value_mentions_gelu(value.func, depth - 1)
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        function: Any = getattr(value, "__func__", value)
        if _says_gelu(function.__name__):
            return True
        is_own = isinstance(function, types.FunctionType) and not function.__module__.startswith("torch.")
        return is_own and _function_mentions_gelu(function, depth - 1)
    kind = value if isinstance(value, type) else type(value)
    if kind.__module__.partition(".")[0] in ("torch", "builtins"):
        return kind is nn.GELU
    if _says_gelu(kind.__name__):
        return True
    if isinstance(value, type) and not issubclass(value, torch.autograd.Function):
        return False
    return any(_function_mentions_gelu(function, depth - 1) for function in _own_functions(kind))


def _descendants(module: nn.Module) -> Iterator[nn.Module]:
    """The children, with those inside lists, dicts and sequences of modules in place of the containers."""
    for child in module._modules.values():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or type(child) is nn.Sequential:
            yield from _descendants(child)
        elif child is not None:
            yield child


def looks_linear(child: nn.Module) -> bool:
    """Whether a child is a linear layer or stands in for one, as adapters and quantised layers do."""
    if is_linear(child) or isinstance(child, nn.Linear) or "in_features" in vars(child):
        return True
    return lookup(type(child), "in_features") is not ABSENT


def has_linear(module: nn.Module) -> bool:
    """Whether the module's forward could call a linear layer: a child, or a product in its own code."""
    if any(map(looks_linear, _descendants(module))):
        return True
    functions = _own_functions(original_class(type(module)))
    return any(_has_product(code) for function in functions for code in _codes(inner(function).__code__))


def _has_product(code: types.CodeType) -> bool:
    if not _PRODUCTS.isdisjoint(code.co_names):
        return True
    return any(i.opname == "BINARY_MATRIX_MULTIPLY" or i.argrepr == "@" for i in dis.get_instructions(code))


def says_gelu(value: Any) -> bool:
    """Whether a child, function, class or object is a GELU by its name or its code, or computes one."""
    if _value_mentions_gelu(value, _DEPTH):
        return True
    return isinstance(value, nn.Module) and form_of_module(value) is not None


def _attributes(module: nn.Module) -> Iterator[Any]:
    """Callable values that the module keeps beside its children, also in plain lists and dicts."""
    for name, value in vars(module).items():
        if name.startswith("_") and hasattr(nn.Module(), name):
            continue
        values = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
        yield from (v for v in values if callable(v))


def mentions_gelu(module: nn.Module) -> bool:
    """Whether the module's own forward could compute a GELU: by a child, an attribute, or its code."""
    kind = original_class(type(module))
    if known(kind) is not None:
        return any(says_gelu(child) for child in module._modules.values() if child is not None)
    for value in (*_descendants(module), *_attributes(module)):
        if isinstance(value, nn.Module) and (value._modules or looks_linear(value)):
            if has_linear(value):
                continue  # a block of its own
            if mentions_gelu(value):
                return True
        elif says_gelu(value):
            return True
    return any(_function_mentions_gelu(function, _DEPTH) for function in _own_functions(kind))
