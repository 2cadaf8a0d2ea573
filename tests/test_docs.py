"""The documentation: its examples run, its figures are measured, its links lead somewhere, and the site builds."""

import importlib.util
import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import fastlane_ext as fl
from fastlane_ext import experiments

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import summary  # noqa: E402


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def examples(page):
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


WHOLE = [code for code in examples("docs/drop-in.md") if "import torch" in code]
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


@pytest.mark.any_isa
@pytest.mark.parametrize(("page", "shows"), {"README.md": "1 of 1 sites fused", "docs/learn.md": "ratio"}.items())
def test_short_examples(page, shows, capsys):
    (example,) = examples(page)
    exec(compile(example, page, "exec"), {})
    assert shows in capsys.readouterr().out
    fl.reset_stats()


def test_the_lesson_shows_the_published_table():
    rows = re.findall(r"^\| (\d) \| (\S+) \| (\S+) \| (\d+) \|$", text_of("docs/learn.md"), re.MULTILINE)
    reports = experiments.run("published").reports
    without, with_shortcuts = (
        [row.mean_abs for row in reports[f"{key} shortcuts"].rows if "weight" in row.name]
        for key in ("without", "with")
    )
    assert rows == [
        (str(layer), f"{a:.4e}", f"{b:.4e}", f"{b / a:.0f}")
        for layer, (a, b) in enumerate(zip(without, with_shortcuts, strict=True))
    ]


def test_the_first_page_shows_the_results():
    """`make report` wrote its rows and sentences, from the files in benchmarks/results."""
    assert f"{summary.START}\n\n{summary.text()}\n{summary.END}" in text_of("README.md")
    assert len(text_of("README.md").splitlines()) <= 130


PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(
        path
        for folder in ("docs", "benchmarks", "csrc", "examples", "tests")
        for path in sorted((ROOT / folder).glob("*.md"))
    ),
]


@pytest.mark.any_isa
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


class Page(HTMLParser):
    """The links and the anchors of one page of the site."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name == "id":
                self.anchors.add(value)


def build_site(folder):
    """The site, by the command of `make docs`, which fails on a warning."""
    (command,) = re.findall(r"^docs:.*\n\t\$\(BIN\)/python (-m sphinx .*)$", text_of("Makefile"), re.MULTILINE)
    options = command.replace("build/doctrees", str(folder / "doctrees")).replace("build/docs", str(folder / "html"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(fl.__file__).parents[1]), *sys.path])}
    result = subprocess.run(
        [sys.executable, *options.split()], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "html"


def dead_links(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else {parts.fragment}
            if not target.exists() or (parts.fragment and not {parts.fragment, unquote(parts.fragment)} & anchors):
                yield path.relative_to(site).as_posix(), link


@pytest.mark.slow
def test_the_site_has_every_page_and_public_name_and_no_dead_link(tmp_path):
    for package in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, which is not installed: pip install 'fastlane_ext[docs]'")
    site = build_site(tmp_path)
    assert list(dead_links(site)) == []
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "csrc" / "README.md"]
    assert [page for page in pages if not (site / page.relative_to(ROOT)).with_suffix(".html").exists()] == []
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    described = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    names = {f"fastlane_ext.{name}" for name in fl.__all__}
    names |= {f"fastlane_ext.experiments.{name}" for name in experiments.__all__}
    assert names - described == set()
