"""The site that `make docs` builds.

The source folder is the repository, so that each link leads where it leads in a repository browser: from
docs/learn.md to ../README.md, from there to csrc/README.md. README.md is the first page.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import fastlane_ext

project = "fastlane_ext"
author = "the fastlane_ext authors"
release = version = fastlane_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/*.md",
    "csrc/README.md",
    "docs/*.md",
    "docs/api/*.rst",
    "examples/README.md",
    "tests/README.md",
]
exclude_patterns = [".*", "build", "dist", "demo-output", "fastlane_ext", "*.egg-info"]
templates_path = ["_templates"]

# A heading's link, as repository browsers make it.
myst_heading_anchors = 3

# A name in single backticks of a docstring links to that name's entry, or is a warning.
default_role = "py:obj"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
# Other projects' names are no links: the site is built without a network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|collections|typing|os|io|contextlib)\..*"),
    ("py:.*", r"Tensor|TextIO|Callable|Any|Loss"),
]

html_theme = "furo"
html_title = f"fastlane_ext {release}"
html_copy_source = False
html_show_copyright = False
html_additional_pages = {"index": "index.html"}
html_static_path = ["_static"]
html_css_files = ["tables.css"]
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

NAVIGATION = {
    "Learn": ["learn"],
    "Use": ["drop-in", "environment", "deployment", "limits", "api/index"],
    "Judge": ["performance", "accuracy", "promises"],
    "Contribute": ["how-it-works"],
}
"""The left column: pages of docs/ under their captions. Pages of other folders follow their caption's."""
ELSEWHERE = {
    "Judge": ["benchmarks/README", "benchmarks/RESULTS*", "benchmarks/NOTES"],
    "Contribute": ["csrc/README", "CONTRIBUTING", "tests/README", "examples/README", "SECURITY", "CHANGELOG"],
}


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Append the navigation to the first page: a repository browser would show it as code."""
    if name == root_doc:
        for caption, pages in NAVIGATION.items():
            paths = [f"docs/{page}" for page in pages] + ELSEWHERE.get(caption, [])
            lines = ["```{toctree}", ":hidden:", ":glob:", f":caption: {caption}", "", *paths, "```"]
            source[0] += "\n" + "\n".join(lines) + "\n"


def find_public_name(
    app: Sphinx, environment: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """The entry of a name that a docstring of another module mentions, as `fuse` in the report's."""
    if node.get("refdomain") != "py" or node.get("reftype") != "obj":
        return None
    node["py:module"], node["py:class"], node["refspecific"] = "fastlane_ext", None, True
    domain = environment.get_domain("py")
    return domain.resolve_xref(environment, node["refdoc"], app.builder, "obj", node["reftarget"], node, content)


def keep_absolute_values(app: Sphinx, what: str, name: str, described: Any, options: Any, lines: list[str]) -> None:
    """|g| in a docstring is an absolute value; reStructuredText would look for a substitution of that name."""
    lines[:] = [re.sub(r"(``.*?``)|\|(\w+)\|", lambda m: m[1] or rf"\|{m[2]}\|", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", keep_absolute_values)
    app.connect("missing-reference", find_public_name)
    app.connect("source-read", add_navigation)
