"""Checks of Python-level arguments; all messages have one form. csrc/ops/checks/checks.h checks tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

SHORTCUTS = ("identity", "projection", "concat", "none")


def bad(argument: str, got: object, expected: str, remedy: str, error: type[Exception] = ValueError) -> Exception:
    """An error for a refused argument: its name, the value it got, the value expected, and a remedy."""
    return error(f"{argument}: got {got}, expected {expected}; {remedy}")


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        error = ValueError if isinstance(value, str) else TypeError
        expected = "one of " + ", ".join(map(repr, choices))
        raise bad(argument, repr(value), expected, "pass one of these", error)


def check_flag(argument: str, value: object) -> bool:
    # A non-empty string is true: somebody who passes "none" must not switch shortcuts on.
    if not isinstance(value, (bool, int)):
        raise bad(argument, repr(value), "True or False", "pass one of these", TypeError)
    return bool(value)


def check_size(argument: str, value: Any) -> int:
    remedy = "give the number of features"
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise bad(argument, f"{value!r} ({type(value).__name__})", "an int", remedy, TypeError)
    if value < 0:
        raise bad(argument, value, "an int >= 0", remedy)
    return operator.index(value)


def check_layer_sizes(argument: str, value: Any) -> list[int]:
    got, expected = f"{value!r} ({type(value).__name__})", "a sequence of at least two ints"
    remedy = "list the input size, then the size of every layer, as in [64, 64, 10]"
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise bad(argument, got, expected, remedy, TypeError)
    if len(value) < 2:
        raise bad(argument, got, expected, remedy)
    return [check_size(f"{argument}[{index}]", size) for index, size in enumerate(value)]


def check_seed(argument: str, value: Any) -> int:
    remedy = "torch.manual_seed takes 64 bits"
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise bad(argument, f"{value!r} ({type(value).__name__})", "an int", remedy, TypeError)
    if not -(2**63) <= operator.index(value) < 2**64:
        raise bad(argument, shortened(value), "an int from -2**63 to 2**64 - 1", remedy)
    return operator.index(value)


def shortened(value: object) -> str:
    """``repr`` for a message of one line; a long one loses its middle."""
    # An int of thousands of digits has no repr at all.
    text = f"an int of {value.bit_length()} bits" if isinstance(value, int) and abs(value) >= 10**40 else repr(value)
    return text if len(text) <= 60 else f"{text[:30]}...{text[-10:]}"


def per_layer(argument: str, values: Sequence[Tensor | None] | None, layers: int) -> Sequence[Tensor | None]:
    if values is not None and len(values) != layers:
        remedy = "use None for a layer that has none"
        raise bad(argument, f"{len(values)} entries", f"{layers}, one a layer", remedy)
    return [None] * layers if values is None else values


def overrides_torch(kind: type) -> bool:
    return hasattr(kind, "__torch_function__")


def check_tensor(argument: str, value: object, *, optional: bool = False) -> None:
    """Raise TypeError if ``value`` is not a tensor; torch itself would not name the argument."""
    # torch.fx's proxies, among others, stand in for tensors through __torch_function__.
    if not isinstance(value, Tensor) and not (optional and value is None) and not overrides_torch(type(value)):
        expected = "a tensor or None" if optional else "a tensor"
        raise bad(argument, f"a {type(value).__name__}", expected, "convert it with torch.as_tensor", TypeError)


def check_list(argument: str, values: object) -> None:
    """Check that ``values`` is None or a list of tensors and Nones; the operator checks the length."""
    if values is None:
        return
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        expected = "a list with a tensor or None a layer"
        raise bad(argument, f"a {type(values).__name__}", expected, "pass a list, or None", TypeError)
    for index, value in enumerate(values):
        check_tensor(f"{argument}[{index}]", value, optional=True)


def check_stack(x: object, weights: object, shortcut: str, *, has_projections: bool) -> None:
    """Check a stack's arguments as far as Python can; the operator checks the tensors' dtypes and shapes."""
    check_tensor("x", x)
    if not isinstance(weights, Sequence) or isinstance(weights, (str, bytes)) or not weights:
        got = "an empty list" if isinstance(weights, Sequence) else f"a {type(weights).__name__}"
        raise bad("weights", got, "a list of at least one tensor", "list one (out, in) tensor a layer", TypeError)
    for index, weight in enumerate(weights):
        check_tensor(f"weights[{index}]", weight)
    check_choice("shortcut", shortcut, SHORTCUTS)
    if shortcut != "projection" and has_projections:
        raise bad("projections", "tensors", f"None with shortcut={shortcut!r}", 'use shortcut="projection"')


def missing_projection(index: int, shape: Sequence[int]) -> Exception:
    expected = f"a weight of shape {tuple(shape)}"
    return bad(f"projections[{index}]", None, expected, "pass one wherever in and out differ")
