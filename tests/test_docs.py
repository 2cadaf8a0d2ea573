"""The examples in the documentation run as they stand."""

import importlib.util
import re
from pathlib import Path

import pytest

import fastlane_ext as fl

ROOT = Path(__file__).resolve().parent.parent
DROP_IN = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8"), re.DOTALL)
EXAMPLES = {"GPT-2": "transformers", "timm": "timm"}


@pytest.mark.any_isa
@pytest.mark.parametrize(("name", "package"), EXAMPLES.items())
def test_drop_in_examples(name, package, capsys):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, which is not installed")
    (example,) = (code for code in DROP_IN if f"import {package}" in code or f"from {package}" in code)
    exec(compile(example, f"docs/drop-in.md: {name}", "exec"), {})
    fl.reset_stats()


def test_every_example_is_known():
    whole = [code for code in DROP_IN if "import torch" in code]
    assert len(whole) == len(EXAMPLES)
