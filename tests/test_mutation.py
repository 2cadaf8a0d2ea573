"""`make mutants` takes minutes; that its mutants still fit the sources shows at once."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "mutation"))

from mutants import MUTANTS  # noqa: E402

pytestmark = pytest.mark.any_isa


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_sources(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.text) == 1
    assert "MUTANT" in mutant.broken and (ROOT / "tests" / mutant.near).is_file()
