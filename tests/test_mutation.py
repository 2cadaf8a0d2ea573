"""`make mutants` takes half an hour; this quick test checks that its mutants still fit the sources."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS / "mutation"))

from mutants import MUTANTS  # noqa: E402
from run import PYTHON_IMPORT, mutated_sources  # noqa: E402

pytestmark = pytest.mark.any_isa


def test_every_mutant_fits_the_sources():
    texts = mutated_sources()
    for number, mutant in enumerate(MUTANTS, start=1):
        assert mutant.switch(number) in texts[mutant.file]
        if mutant.file.endswith(".py"):
            compile(texts[mutant.file], mutant.file, "exec")
            assert texts[mutant.file].count(PYTHON_IMPORT) == 1
        assert (TESTS / mutant.near).is_file()
