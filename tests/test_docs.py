"""The examples in the documentation run as they stand."""

import importlib.util
import re
from pathlib import Path

import pytest

import fastlane_ext as fl

ROOT = Path(__file__).resolve().parent.parent
DROP_IN = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8"), re.DOTALL)
WHOLE = [code for code in DROP_IN if "import torch" in code]
EXAMPLES = {"a model": "torch", "GPT-2": "transformers", "timm": "timm"}  # in their order, with what each needs


@pytest.mark.any_isa
@pytest.mark.parametrize("name", EXAMPLES)
def test_drop_in_examples(name, capsys):
    package = EXAMPLES[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, which is not installed")
    example = WHOLE[list(EXAMPLES).index(name)]
    assert f"import {package}" in example or f"from {package}" in example
    exec(compile(example, f"docs/drop-in.md: {name}", "exec"), {})
    fl.reset_stats()


def test_every_example_is_known():
    assert len(WHOLE) == len(EXAMPLES)


PAGES = [ROOT / "README.md", ROOT / "csrc" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.any_isa
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
