"""What the CUDA half computes on the host, compiled and run without a GPU or its toolkit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ptxas_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_support import find_compiler, find_cuda_home, find_cutlass  # noqa: E402

KERNELS = ROOT / "csrc" / "kernels" / "cuda"
NATIVE = ROOT / "tests" / "native"
# Those that launch kernels of our own.
SOURCES = sorted(path.relative_to(KERNELS).as_posix() for path in KERNELS.rglob("*.cu") if "<<<" in path.read_text())
pytestmark = [pytest.mark.any_isa, pytest.mark.slow]


def run_program(sources, folder, *flags):
    """Compile and run a program that prints what is not true."""
    if not KERNELS.is_dir() or shutil.which("c++") is None:
        pytest.skip("needs the source folder and a C++ compiler")
    compiler, _ = find_compiler()
    program = folder / "program"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'csrc'}", *flags]
    subprocess.run([*compiler.split(), *flags, *map(str, sources), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["geometry_test", "gelu_test", "hopper_test"])
def test_host_code(name, tmp_path):
    run_program([NATIVE / "cuda" / f"{name}.cpp"], tmp_path, "-std=c++17")


def test_the_ptx_machine(tmp_path):
    """The machine that runs PTX does what the manual says, each group of instructions."""
    machine = [path for path in sorted((NATIVE / "ptx").glob("*.cpp")) if path.name != "runtime.cpp"]
    tests = sorted((NATIVE / "ptx_test").glob("*.cpp"))
    run_program([*machine, *tests], tmp_path, "-std=c++20", "-frounding-math", f"-I{NATIVE}")


def toolkit_home():
    home = find_cuda_home()
    if home is None:
        pytest.skip("needs the CUDA toolkit")
    return Path(home)


@pytest.mark.parametrize("name", ["kernels_test", "narrow_test"])
def test_kernels_on_the_host(name, tmp_path):
    """Every line of the device code runs, with the toolkit's headers and without a GPU; see native/cuda/grid.h."""
    headers = toolkit_home() / "include"
    run_program(
        [NATIVE / "cuda" / f"{name}.cpp"], tmp_path, "-std=c++20", "-Wno-unknown-pragmas", "-isystem", str(headers)
    )


def run_ptx(name, folder, kernels, architectures, argument_lists, *flags):
    """Link native/cuda/NAME.cpp and native/ptx with a file that includes `kernels`; run it with each architecture's
    PTX and each arguments. Returns the PTX files.
    """
    home = toolkit_home()
    source = folder / "kernels.cu"
    source.write_text("".join(f'#include "{path}"\n' for path in kernels))
    nvcc = [
        str(home / "bin" / "nvcc"),
        "-O3",
        "-DNDEBUG",
        "--expt-relaxed-constexpr",
        "-std=c++20",
        f"-I{ROOT / 'csrc'}",
    ]
    nvcc += [*flags, "--keep", "--keep-dir", str(folder)]
    nvcc += [f"-gencode=arch=compute_{architecture},code=compute_{architecture}" for architecture in architectures]
    command = [*nvcc, "-c", str(source), "-o", str(folder / "kernels.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    for file in folder.iterdir():  # nvcc keeps hundreds of megabytes
        if file.name != "kernels.o" and file.suffix != ".ptx":
            file.unlink()
    texts = sorted(folder.glob("*.ptx"))
    assert len(texts) == len(architectures)
    compiler = [*find_compiler()[0].split(), "-O2", "-std=c++20", "-frounding-math", "-Wall", "-Wextra", "-Werror"]
    compiler += ["-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", f"-I{NATIVE}", "-isystem", str(home / "include")]
    sources = [NATIVE / "cuda" / f"{name}.cpp", *sorted((NATIVE / "ptx").glob("*.cpp"))]
    program = folder / name
    subprocess.run([*compiler, *map(str, sources), str(folder / "kernels.o"), "-o", str(program)], check=True)
    commands = [[str(program), *arguments, str(text)] for text in texts for arguments in argument_lists]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [run.communicate()[0] for run in runs]
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0, output
        assert re.match(r"[1-9]\d* launches", output)
    return texts


def test_launches_on_the_host(tmp_path):
    """Our own kernels as nvcc makes them, with what their launchers give them; see native/ptx."""
    run_ptx("launches_test", tmp_path, [KERNELS / name for name in SOURCES], ["80", "90a"], [[]])


def test_hopper_kernels_on_the_host(tmp_path):
    """Kernels of CUTLASS's templates, launched by its host code. One file, since reading the headers takes longest."""
    cutlass = find_cutlass()
    if cutlass is None:
        pytest.skip("needs CUTLASS: pip install --no-deps nvidia-cutlass==4.2.0.0")
    kernels = [
        *sorted(KERNELS.glob("hopper/*.cu")),
        KERNELS / "hopper/hopper.cpp",
        KERNELS / "elementwise/preactivation_grad.cu",
    ]
    runs = [["bf16"], ["f16"], ["f32"]]
    (kept,) = run_ptx("hopper_kernels_test", tmp_path, kernels, ["90a"], runs, f"-I{cutlass}")
    # And what it would say of kernels that lack a fence.
    text, fence = kept.read_text(), "fence.proxy.async.shared::cta;"
    assert fence in text
    (tmp_path / "unfenced.ptx").write_text(text.replace(fence, ""))
    command = [str(tmp_path / "hopper_kernels_test"), "f32", str(tmp_path / "unfenced.ptx")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "without a fence.proxy.async since" in result.stdout


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


def test_the_gpu_benchmark_runs_without_a_gpu(tmp_path):
    """The script, its contestants and its JSON fit together; its times are not checked."""
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


def run_gpu_script(folder, *steps, seconds="60", hopper_status="0"):
    """benchmarks/gpu.sh with programs that only print their arguments."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "python").write_text(
        """#!/bin/sh
case "$*" in
*get_device_capability*) echo 9.0 ;;
*"info --json"*) echo '"hopper": true' ;;
*"-m hopper"*) echo "37 skipped"; exit $HOPPER_STATUS ;;
*) echo "$FASTLANE_PATH $*: 1 passed" ;;
esac
"""
    )
    (programs / "compute-sanitizer").write_text('#!/bin/sh\necho "sanitizer $FASTLANE_PATH $*: 1 passed"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": str(programs / "python"),
        "GPU_SECONDS": seconds,
        "HOPPER_STATUS": hopper_status,
    }
    return subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), "results", *steps],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def read_summary(folder):
    lines = (folder / "results" / "summary.txt").read_text().splitlines()
    return {name: verdict.split(",")[0] for name, verdict in (line.split(": ") for line in lines)}


def test_the_gpu_script_runs_every_step_and_tells_which_failed(tmp_path):
    result = run_gpu_script(tmp_path, hopper_status="3")
    assert result.returncode == 1, result.stderr
    summary = read_summary(tmp_path)
    sanitizers = {f"{tool}{kind}" for tool in ("memcheck", "racecheck", "initcheck") for kind in ("", "-hopper")}
    passed = {"build", "tests", "library-tests", "benchmark", "benchmark-compile", *sanitizers}
    assert summary == {**dict.fromkeys(passed, "passed"), "hopper-tests": "failed with status 3"}
    log = (tmp_path / "results" / "gpu.log").read_text()
    assert all(f"== {name}\n" in log for name in summary)
    assert "library -m pytest" in log and "sanitizer fused --tool racecheck" in log


def test_the_gpu_script_runs_the_steps_it_was_asked_for(tmp_path):
    assert run_gpu_script(tmp_path, "tests", "memcheck").returncode == 0
    assert read_summary(tmp_path) == dict.fromkeys(["build", "tests", "memcheck"], "passed")
    wrong = run_gpu_script(tmp_path, "test")
    assert wrong.returncode == 2 and wrong.stdout.startswith("STEP: got 'test', expected one of: tests hopper-tests")


def test_the_gpu_script_does_not_pass_what_was_skipped(tmp_path):
    assert run_gpu_script(tmp_path, "tests", "hopper-tests").returncode == 1
    assert read_summary(tmp_path)["hopper-tests"] == "failed with status 5"


def test_the_gpu_script_refuses_what_it_cannot_do(tmp_path):
    wrong = run_gpu_script(tmp_path, seconds="8m")
    assert wrong.returncode == 2 and "GPU_SECONDS: got '8m', expected whole seconds" in wrong.stdout
    (tmp_path / "results").touch()  # where a folder should be
    assert run_gpu_script(tmp_path).returncode not in (0, 2)


def test_the_gpu_script_ends_in_time(tmp_path):
    assert run_gpu_script(tmp_path, seconds="0").returncode == 1
    assert read_summary(tmp_path) == {"build": "no time left"}
