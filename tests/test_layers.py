"""The layers of the Python half: docs/how-it-works.md lists them, and every import statement must follow them."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_isa

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastlane_ext"
PAGE = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")


def layers():
    """The files and folders of each row of the table, from the ground up."""
    table = PAGE.split("| layer | files |")[1].split("\n\n")[0].splitlines()[2:]
    return [re.findall(r"`([\w/]+)`", row.split("|")[2]) for row in table]


def module_names():
    """Each file's path by its name below the package, as in "fusion.plan"; a package goes by its own name."""
    names = {}
    for path in (*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")):  # a stub stands for the compiled module
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"] = path
    return names


MODULES = module_names()


def imported(name, source=None):
    """The files of the package that a file's import statements name, anywhere in the file."""
    path = MODULES[name]
    found = set()
    for node in ast.walk(ast.parse(source or path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = path.parent.relative_to(PACKAGE.parent).parts
            # One dot is the file's own folder, each further dot the folder above.
            above = folder[: len(folder) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
            targets = [target if below(target) in MODULES else base for target in targets]
        else:
            continue
        found |= {below(target) for target in targets if target.partition(".")[0] == PACKAGE.name}
    return found


def below(target):
    return target.removeprefix(PACKAGE.name).removeprefix(".") or "__init__"


def layer_of(name):
    matching = [i for i, files in enumerate(layers()) if name in files or f"{name.partition('.')[0]}/" in files]
    assert len(matching) == 1, f"{name} is in {len(matching)} rows of the table"
    return matching[0]


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("fusion.plan", "from .. import _facts, functional", {"_facts", "functional"}),
        ("fusion.plan", "from .known import known", {"fusion.known"}),
        ("fusion", "from .report import Site\nfrom .._load import library", {"fusion.report", "_load"}),
        ("cli.commands.info", "import fastlane_ext\nfrom ..output import table", {"__init__", "cli.output"}),
        ("cli.arguments", "def f():\n    from .commands import gradients", {"cli.commands.gradients"}),
        ("bench.suites", "import torch\nfrom fastlane_ext import fuse, reference", {"__init__", "reference"}),
        ("functional", "from . import _flops\nimport fastlane_ext.bench.machine", {"_flops", "bench.machine"}),
    ],
)
def test_import_statements_are_read(name, source, expected):
    assert imported(name, source) == expected


def test_every_row_names_files_that_are_there():
    for file in sum(layers(), []):
        assert (PACKAGE / file).is_dir() if file.endswith("/") else file in MODULES, file


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name):
    upwards = sorted(target for target in imported(name) if layer_of(target) > layer_of(name))
    assert upwards == []


def test_there_is_no_circle():
    graphlib.TopologicalSorter({name: imported(name) for name in MODULES}).prepare()


def test_every_folder_is_packaged():
    packages = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    listed = set(re.findall(r'"([\w.]+)"', packages.group(1)))
    assert listed == {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}


def test_helpers_of_tests_import_no_test():
    for path in (ROOT / "tests" / "support").glob("*.py"):
        assert not re.search(r"^\s*(?:from|import) (?:test_|conftest)", path.read_text(), re.MULTILINE), path.name
