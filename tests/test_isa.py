"""The numeric tests once more, in a process of its own for every other instruction set this CPU can run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlane_ext as fl

HERE = Path(__file__).parent
FILES = [
    "test_fuzz.py",
    "test_gelu.py",
    "test_layer_accuracy.py",
    "test_layer_gradients.py",
    "test_layer_saved.py",
    "test_layer_hostile.py",
    "test_layer_process.py",
    "test_mlp.py",
    "test_stack.py",
]
FORCED = os.environ.get("FASTLANE_CPU_ISA")
ALL = fl.build_info()["supported_isas"]


def run_python(isa, code, *arguments):
    code = f"import sys, fastlane_ext as fl\nassert fl.cpu_isa() == {isa!r}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"FASTLANE_CPU_ISA": isa},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.any_isa
def test_the_best_one_runs_unless_another_is_forced():
    assert fl.cpu_isa() == (FORCED or ALL[0])
    assert set(ALL) <= set(fl.build_info()["compiled_isas"]) and "scalar" in ALL


@pytest.mark.slow
@pytest.mark.skipif(bool(FORCED), reason="this process itself runs a forced instruction set")
@pytest.mark.parametrize("isa", ALL[1:])
def test_numeric_tests(isa):
    arguments = [*(HERE / file for file in FILES), "-m", "not any_isa", "-p", "no:cacheprovider"]
    result = run_python(isa, "import pytest; sys.exit(pytest.main(sys.argv[1:]))", *arguments)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-6000:] + result.stderr[-2000:]


COMPUTE = f"""
import torch
sys.path.insert(0, {str(HERE)!r})
from oracle import DTYPES, make_case, run_fused
torch.save([run_fused(make_case((37,), 45, 51, dtype=dtype)) for dtype in DTYPES], sys.argv[1])
"""


@pytest.mark.slow
def test_all_sets_agree(tmp_path):
    """To rounding: a set whose own test is wrong in the same way as it is found out here."""
    results = {}
    for isa in ALL:
        result = run_python(isa, COMPUTE, tmp_path / isa)
        assert result.returncode == 0, result.stderr[-2000:]
        results[isa] = torch.load(tmp_path / isa)
    for isa in ALL[1:]:
        for one, other in zip(results[ALL[0]], results[isa], strict=True):
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, msg=lambda m, what=(isa, name): f"{what}: {m}")
