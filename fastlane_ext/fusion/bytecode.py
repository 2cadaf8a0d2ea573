"""Whether a function is a straight line of calls and sums, so that one symbolic run shows everything it does."""

from __future__ import annotations

import dis
import types

# Parts of opcodes' names, which all Python versions share, and their meaning in a message.
_REFUSED = {
    "WITH": "has a with block",
    "INPLACE_": "changes something in place",
    "JUMP": "decides or repeats something",
    "FOR_ITER": "repeats something",
    "SETUP_FINALLY": "has a try block",
    "STORE_ATTR": "sets an attribute",
    "STORE_SUBSCR": "sets an item",
    "STORE_GLOBAL": "sets a global",
    "STORE_DEREF": "sets a variable of another function",
    "DELETE_": "deletes something",
    "YIELD": "is a generator",
    "RETURN_GENERATOR": "is a generator",
    "RAISE": "raises something",
    "IMPORT": "imports something",
    "MAKE_FUNCTION": "makes a function",
    "COMPARE_OP": "compares something",
    "CONTAINS_OP": "compares something",
    "IS_OP": "compares something",
    "UNARY_NOT": "compares something",
    "UNPACK": "unpacks something",
}
_CALLS = ("CALL", "CALL_FUNCTION", "CALL_METHOD", "CALL_KW", "CALL_FUNCTION_KW", "CALL_FUNCTION_EX")


def why_not_straight(function: object) -> str | None:
    """None if ``function`` is a plain Python function without branches, loops, blocks, decorators, and assignments to
    anything but its own variables; else a reason.
    """
    if not isinstance(function, types.FunctionType):
        return "is no plain function"
    if hasattr(function, "__wrapped__"):
        return "is decorated"
    instructions = list(dis.get_instructions(function))
    names = [i.opname if i.opname != "BINARY_OP" or not i.argrepr.endswith("=") else "INPLACE_" for i in instructions]
    # A branch is a branch whatever it compares, in every Python's bytecode.
    return next((reason for part, reason in _REFUSED.items() if any(part in name for name in names)), None)


def count_calls(function: types.FunctionType) -> int:
    """How many calls a straight function makes."""
    return sum(instruction.opname in _CALLS for instruction in dis.get_instructions(function))
