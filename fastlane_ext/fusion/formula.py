"""The formula that an activation computes, found by calling the activation with a stand-in for its input.

A grid of values can tell formulas apart only if few formulas are possible. So an activation may only be a polynomial of
low degree in x and in one value of one function (GELU, erf, sigmoid, tanh, the normal distribution); the function's
argument is a polynomial of low degree in x. Two such formulas that agree on hundreds of points, from 1e-38 to 3e38,
agree between these points too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

_DEGREE = 4
_OF_ARGUMENT = 3
_CONSTANTS = (1e-3, 1e3)
"""How small and large a constant may be: a value that is multiplied by 1e4 on its way overflows in float16."""
_FUNCTIONS = ("gelu", "erf", "erfc", "sigmoid", "tanh", "ndtr", "special_erf", "special_erfc", "special_ndtr")


_names = itertools.count()


class NoFormula(Exception):
    """Why a function computes no such formula."""


def _constant(value: Any) -> float:
    if type(value) not in (int, float):
        raise NoFormula(f"computes with a {type(value).__name__}")
    if value != 0 and not _CONSTANTS[0] <= abs(value) <= _CONSTANTS[1]:
        raise NoFormula(f"computes with {value}")
    return float(value)


class Formula:
    """A value: its degree in x, and the function values that are in it (one, at most)."""

    def __init__(self, degree: int, functions: frozenset[int] = frozenset()) -> None:
        if degree > _DEGREE or len(functions) > 1:
            raise NoFormula("computes more than one function of its input, or high powers of it")
        self.degree, self.functions = degree, functions

    def _sum(self, other: Any) -> Formula:
        if isinstance(other, Formula):
            return Formula(max(self.degree, other.degree), self.functions | other.functions)
        _constant(other)
        return self

    def _product(self, other: Any) -> Formula:
        if not isinstance(other, Formula):
            _constant(other)
            return self
        if self.functions and other.functions:
            raise NoFormula("multiplies functions of its input")
        return Formula(self.degree + other.degree, self.functions | other.functions)

    def _quotient(self, other: Any) -> Formula:
        if isinstance(other, Formula) or _constant(other) == 0:
            raise NoFormula("divides by its input")
        return self

    def _power(self, exponent: Any) -> Formula:
        if type(exponent) not in (int, float) or exponent not in (0, 1, 2, 3, 4) or self.functions:
            raise NoFormula("raises to another power than 0 to 4")
        return Formula(self.degree * int(exponent))

    def _function(self) -> Formula:
        if self.functions or self.degree > _OF_ARGUMENT:
            raise NoFormula("computes more than one function of its input")
        return Formula(0, frozenset([next(_names)]))

    def _negative(self) -> Formula:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = _sum
    __mul__ = __rmul__ = _product
    __truediv__, __pow__, __neg__ = _quotient, _power, _negative
    add = sub = subtract = rsub = _sum
    mul = multiply = _product
    div = true_divide = _quotient
    pow, neg, negative = _power, _negative, _negative
    erf = erfc = sigmoid = tanh = _function

    def square(self) -> Formula:
        return self._power(2)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Formula:
        name = function.__name__
        first = args[0] if args else None
        if name in _FUNCTIONS and isinstance(first, Formula) and len(args) == 1:
            if kwargs and (name != "gelu" or kwargs.keys() - {"approximate"}):
                raise NoFormula(f"calls {name} with options")
            return first._function()
        if kwargs or name not in cls.__dict__:
            raise NoFormula(f"calls {name}")
        if not isinstance(first, Formula):
            # A constant before x, as in `torch.mul(0.5, x)`: the order does not matter in sums and products.
            if name not in ("add", "mul", "multiply") or len(args) != 2:
                raise NoFormula(f"calls {name} of a {type(first).__name__}")
            first, args = args[1], args[::-1]
        found = getattr(first, name)(*args[1:])
        return found if isinstance(found, Formula) else cls._refuse(name)

    @classmethod
    def _refuse(cls, name: str) -> Formula:
        raise NoFormula(f"calls {name}")


def why_no_formula(call: Callable[[Any], Any]) -> str | None:
    """None if ``call`` computes such a formula of its input, else a reason. Use it only for code that is known to be
    arithmetic and nothing else (reads.py): the code is run.
    """
    try:
        found = call(Formula(1))
    except NoFormula as reason:
        return str(reason)
    except Exception as error:
        return f"cannot be followed: {type(error).__name__}"
    if not isinstance(found, Formula) or not found.functions:
        return "computes no function of its input"
    return None
