"""What the CUDA half computes on the host, compiled and run without a GPU or its toolkit."""

import subprocess

import pytest
from support import ptxas_report
from support.native import KERNELS, NATIVE, ROOT, run_program, run_ptx, toolkit_home

# Those that launch kernels of our own.
SOURCES = sorted(path.relative_to(KERNELS).as_posix() for path in KERNELS.rglob("*.cu") if "<<<" in path.read_text())
pytestmark = [pytest.mark.any_isa, pytest.mark.slow]


@pytest.mark.parametrize("name", ["geometry_test", "gelu_test", "hopper_test"])
def test_host_code(name, tmp_path):
    run_program([NATIVE / "cuda" / f"{name}.cpp"], tmp_path, "-std=c++17")


def test_the_ptx_machine(tmp_path):
    """The machine that runs PTX does what the manual says, each group of instructions."""
    machine = [path for path in sorted((NATIVE / "ptx").glob("*.cpp")) if path.name != "runtime.cpp"]
    tests = sorted((NATIVE / "ptx_test").glob("*.cpp"))
    run_program([*machine, *tests], tmp_path, "-std=c++20", "-frounding-math", f"-I{NATIVE}")


@pytest.mark.parametrize("name", ["kernels_test", "narrow_test"])
def test_kernels_on_the_host(name, tmp_path):
    """Every line of the device code runs, with the toolkit's headers and without a GPU; see native/cuda/grid.h."""
    headers = toolkit_home() / "include"
    run_program(
        [NATIVE / "cuda" / f"{name}.cpp"], tmp_path, "-std=c++20", "-Wno-unknown-pragmas", "-isystem", str(headers)
    )


@pytest.mark.longest
def test_launches_on_the_host(tmp_path):
    """Our own kernels as nvcc makes them, with what their launchers give them; see native/ptx."""
    run_ptx("launches_test", tmp_path, [KERNELS / name for name in SOURCES], ["80", "90a"], [[]])


@pytest.mark.thorough  # `make cuda-build` asks the same of every kernel, for 8.0 and 9.0a
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_compile_without_spills(source, tmp_path):
    """What ptxas says of every kernel: no spilled register. The Hopper kernels: test_cuda_build.py."""
    architectures = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("75", "80", "90a")]
    command = [str(toolkit_home() / "bin" / "nvcc"), "-O3", "-DNDEBUG", "-Xptxas=-v", *architectures]
    command += [f"-I{ROOT / 'csrc'}", "-c", str(KERNELS / source), "-o", str(tmp_path / "kernels.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-2000:]
    assert ptxas_report.problems(report) == []


def test_the_ptxas_report_names_what_is_wrong():
    entry = "ptxas info    : Compiling entry function 'f' for 'sm_90a'\n"
    kernel = entry + "    0 bytes stack frame, {} bytes spill stores, 0 bytes spill loads\n"
    assert ptxas_report.problems(kernel.format(0) * 2) == []
    assert ptxas_report.problems(kernel.format(0) + kernel.format(8)) == ["spills 8 + 0 bytes: f (sm_90a)"]
    assert len(ptxas_report.problems(kernel.format(0) + "ptxas info : (C7510) Potential Performance Loss: wgmma")) == 1
    assert "no kernel in the log" in ptxas_report.problems("")[0]
