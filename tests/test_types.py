"""The stub of the compiled module lists all its names; mypy, in `make lint`, checks the package against the stub."""

import ast
import re
from pathlib import Path

import pytest

import fastlane_ext
from fastlane_ext import _C

pytestmark = pytest.mark.any_isa

STUB = ast.parse((Path(fastlane_ext.__file__).parent / "_C.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}


def test_the_stub_names_what_the_compiled_module_has():
    variables = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)}
    assert FUNCTIONS.keys() | variables == {name for name in dir(_C) if not name.startswith("__")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stub_has_the_arguments_of_the_compiled_function(name):
    signature = getattr(_C, name).__doc__.partition("\n")[0]
    stub = FUNCTIONS[name].args
    assert len(re.findall(r"\barg\d+: ", signature)) == len(stub.posonlyargs)
    assert not stub.args and not stub.kwonlyargs, "pybind11 knows no names for them"
