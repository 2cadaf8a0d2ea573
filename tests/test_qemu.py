"""Other CPUs, emulated: the right instruction set is chosen, and no instruction is illegal."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastlane_ext

pytestmark = [pytest.mark.any_isa, pytest.mark.thorough]

ROOT = Path(__file__).resolve().parent.parent
# qemu's names. Sandy Bridge has AVX without FMA and AVX2; qemu 7 emulates nothing of AVX-512.
CPUS = {"Nehalem": ["scalar"], "SandyBridge": ["scalar"], "Haswell": ["avx2", "scalar"]}
# Some cases of each function of the kernel table (tests/native/cpu/sweep.cpp), behind the large fixed sizes.
CASES = [(first + 60, first + 84) for first in (0, 2704, 3508, 6212, 7016, 7820, 8624, 11328, 12132, 12936)]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The kernels' own test program, without sanitizers, which qemu cannot run."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    for tool in ("qemu-x86_64", compiler):
        if tool is None or shutil.which(tool) is None:
            pytest.skip("needs a C++ compiler and qemu-x86_64; install g++ and qemu-user")
    program = tmp_path_factory.mktemp("sweep") / "sweep"
    sources = [*ROOT.glob("csrc/kernels/cpu/**/*.cpp"), *ROOT.glob("tests/native/cpu/*.cpp")]
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-w", f"-I{ROOT / 'csrc'}"]
        + [*sources, "-o", program],
        check=True,
    )
    return program


USE = """
import torch, fastlane_ext as fl
x, w = torch.randn(5, 8), torch.randn(8, 8, requires_grad=True)
y = fl.linear_gelu_residual(x, w, None, x)
y.sum().backward()
torch.testing.assert_close(y, torch.nn.functional.gelu(x @ w.t()) + x)
print(fl.cpu_isa(), *fl.build_info()["supported_isas"])
"""


@pytest.mark.parametrize("cpu", ["Nehalem", "Haswell"])
def test_the_package_is_imported_and_used(cpu):
    """With the installed torch, importing and using the package needs no instruction that the CPU lacks."""
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("needs qemu-x86_64; install qemu-user")
    ours = ("FASTLANE_CPU_ISA", "FASTLANE_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    # qemu starts the interpreter itself, not the link to it by which a virtual environment is recognised.
    paths = os.pathsep.join([str(Path(fastlane_ext.__file__).parent.parent), *filter(None, sys.path)])
    result = subprocess.run(
        ["qemu-x86_64", "-cpu", cpu, os.path.realpath(sys.executable), "-c", USE],
        env=environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    best = CPUS[cpu][0]
    assert result.stdout.split() == ["none" if best == "scalar" else best, *CPUS[cpu]]


def run(sweep, cpu, *arguments, **environment):
    environment = {name: value for name, value in os.environ.items() if name != "FASTLANE_CPU_ISA"} | environment
    result = subprocess.run(
        ["qemu-x86_64", "-cpu", cpu, sweep, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("cpu", CPUS)
def test_the_best_set_that_the_cpu_has_is_chosen_and_runs(cpu, sweep):
    best = CPUS[cpu][0]
    assert run(sweep, cpu, "--isas").split() == CPUS[cpu]
    for begin, end in CASES:
        # qemu 7 faults where vmaskmovps leaves out an element beyond a page: there the 16-bit cases only, two of four.
        parts = [(n, n + 2) for n in range(begin + 2, end, 4)] if best == "avx2" else [(begin, end)]
        for first, last in parts:
            assert run(sweep, cpu, first, last).startswith(f"{best}: {last - first} cases")


def test_a_set_that_the_cpu_lacks_is_illegal_there(sweep, tmp_path):
    """This shows that the emulated CPU refuses the instructions that a real one would refuse."""
    source, program = tmp_path / "avx2.cpp", tmp_path / "avx2"
    source.write_text(
        "#include <immintrin.h>\n"
        '__attribute__((target("avx2"))) int main(int n, char**) {\n'
        "  return _mm256_extract_epi32(_mm256_add_epi32(_mm256_set1_epi32(n), _mm256_set1_epi32(-n)), 0);\n"
        "}\n"
    )
    subprocess.run([os.environ.get("CXX", "c++"), "-O0", source, "-o", program], check=True)
    codes = [subprocess.run(["qemu-x86_64", "-cpu", cpu, program], capture_output=True).returncode for cpu in CPUS]
    assert codes[0] != 0 and codes[-1] == 0
