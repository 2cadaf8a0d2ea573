"""No operation reads or writes one element beyond its operands, its results or its work memory."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from support.subprocesses import support_program

import fastlane_ext as fl

pytestmark = pytest.mark.any_isa  # they name it themselves

SUPPORT = Path(__file__).parent / "support"
ISAS = fl.build_info()["supported_isas"]


@pytest.fixture(scope="module")
def guarded_malloc(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("needs a C compiler for tests/support/guarded_malloc.c")
    library = tmp_path_factory.mktemp("guarded") / "guarded_malloc.so"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", library, SUPPORT / "guarded_malloc.c", "-ldl", "-lpthread"],
        check=True,
    )
    return str(library)


def run_guarded(*arguments, preload, isa=ISAS[0]):
    variables = {"LD_PRELOAD": preload, "FASTLANE_CPU_ISA": isa, "FASTLANE_PATH": "fused"}
    command, environment = support_program("guarded", *arguments, **variables)
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["operand", "result"])
def test_an_access_beyond_is_seen(what, guarded_malloc):
    result = run_guarded("overrun", what, preload=guarded_malloc)
    assert result.stdout.split() == ["within"]
    assert result.returncode == -signal.SIGSEGV and "Segmentation fault" in result.stderr


def assert_no_access_beyond(isa, step, preload):
    result = run_guarded(step, preload=preload, isa=isa)
    assert result.returncode == 0, result.stderr[-3000:]
    counts = dict(line.split() for line in result.stdout.splitlines())
    assert len(counts) == 4 and all(int(count) >= 900 // step for count in counts.values())


@pytest.mark.slow
def test_no_access_beyond(guarded_malloc):
    assert_no_access_beyond(fl.cpu_isa(), 17, guarded_malloc)


@pytest.mark.thorough
@pytest.mark.parametrize("isa", ISAS)
def test_no_access_beyond_in_any_call(isa, guarded_malloc):
    assert_no_access_beyond(isa, 1, guarded_malloc)
