"""Which functions are straight lines, in whatever bytecode this Python compiles them to."""

import contextlib

import pytest

from fastlane_ext.fusion.bytecode import count_calls, why_not_straight

pytestmark = pytest.mark.any_isa


def chain(self, x):
    """A forward with a docstring."""
    x = self.a(x)
    x = self.b(x)
    return self.c(x)


def nested(self, x):
    return self.norm(self.drop(self.dense(x)) + x)


def with_an_option(self, x):
    return self.gelu(self.up(x), approximate="tanh")


def branch(self, x):
    if x:
        return x
    return self.a(x)


def conditional(self, x):
    return self.a(x) if x else x


def either(self, x):
    return self.a(x) or x


def compared(self, x):
    return 1 < x < 2


def asserted(self, x):
    assert x
    return x


def loop(self, x):
    for module in self:
        x = module(x)
    return x


def block(self, x):
    with self.context():
        return self.a(x)


def caught(self, x):
    try:
        return self.a(x)
    except ValueError:
        return x


def in_place(self, x):
    x += self.a(x)
    return x


def attribute(self, x):
    self.last = x
    return x


def item(self, x):
    x[0] = self.a(x)
    return x


def comprehension(self, x):
    return [module(x) for module in self]


def function_inside(self, x):
    return (lambda y: y)(x)


def generator(self, x):
    yield self.a(x)


def unpacked(self, x):
    x, y = self.a(x)
    return x


@contextlib.contextmanager
def decorated(self, x):
    yield x


@pytest.mark.parametrize(("function", "calls"), [(chain, 3), (nested, 3), (with_an_option, 2)])
def test_straight_lines(function, calls):
    assert why_not_straight(function) is None
    assert count_calls(function) == calls


@pytest.mark.parametrize(
    "function",
    [
        branch,
        conditional,
        either,
        compared,
        asserted,
        loop,
        block,
        caught,
        in_place,
        attribute,
        item,
        comprehension,
        function_inside,
        generator,
        unpacked,
        decorated,
        print,
    ],
    ids=lambda function: function.__name__,
)
def test_everything_else(function):
    assert why_not_straight(function)
