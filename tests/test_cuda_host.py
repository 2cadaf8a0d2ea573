"""What the CUDA half computes on the host, compiled and run without a GPU or its toolkit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ptxas_report
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_support import find_compiler, find_cuda_home  # noqa: E402

KERNELS = ROOT / "csrc" / "kernels" / "cuda"
# Those that launch kernels of our own.
SOURCES = sorted(path.name for path in KERNELS.glob("*.cu") if "<<<" in path.read_text())
pytestmark = [pytest.mark.any_isa, pytest.mark.slow]


def run_program(name, folder, *flags):
    """Compile and run one of cuda_host's programs, each of which prints what is not true."""
    if not KERNELS.is_dir() or shutil.which("c++") is None:
        pytest.skip("needs the source folder and a C++ compiler")
    compiler, _ = find_compiler()
    program, source = folder / name, ROOT / "tests" / "cuda_host" / f"{name}.cpp"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'csrc'}", *flags]
    subprocess.run([*compiler.split(), *flags, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["geometry_test", "gelu_test", "hopper_test"])
def test_host_code(name, tmp_path):
    run_program(name, tmp_path, "-std=c++17")


def toolkit_home():
    home = find_cuda_home()
    if home is None:
        pytest.skip("needs the CUDA toolkit")
    return Path(home)


@pytest.mark.parametrize("name", ["kernels_test", "narrow_test"])
def test_kernels_on_the_host(name, tmp_path):
    """Every line of the device code runs, with the toolkit's headers and without a GPU; see cuda_host/grid.h."""
    headers = toolkit_home() / "include"
    run_program(name, tmp_path, "-std=c++20", "-Wno-unknown-pragmas", "-isystem", str(headers))


@pytest.mark.parametrize("source", SOURCES)
def test_kernels_compile_without_spills(source, tmp_path):
    """What ptxas says of every kernel: no spilled register. The Hopper kernels: test_cuda_build.py."""
    architectures = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("75", "80", "90a")]
    command = [str(toolkit_home() / "bin" / "nvcc"), "-O3", "-DNDEBUG", "-Xptxas=-v", *architectures]
    command += ["-c", str(KERNELS / source), "-o", str(tmp_path / "kernels.o")]
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


def test_the_gpu_benchmark_runs_without_a_gpu(tmp_path):
    """Not its times, but that the script, its contestants and its JSON hold together."""
    result = tmp_path / "gpu.json"
    script = ROOT / "benchmarks" / "gpu_bench.py"
    options = [
        "--device",
        "cpu",
        "--quick",
        "--rounds",
        "3",
        "--no-compile",
        "--dtype",
        "float32",
        "--json",
        str(result),
    ]
    subprocess.run([sys.executable, str(script), *options], check=True, capture_output=True)
    rows = json.loads(result.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["forward", "forward+backward"] * 4
    for row in rows:
        assert row["difference_from_eager"] < 1e-5 and set(row["over_fused"]) >= {"eager"}
        for direction in row["mode"].split("+"):
            assert sum(path[direction] for path in row["path"].values()) > 0
