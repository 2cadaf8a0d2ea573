"""What the CUDA half computes on the host, compiled and run without a GPU or its toolkit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_support import find_compiler  # noqa: E402

pytestmark = pytest.mark.any_isa


@pytest.mark.parametrize("name", ["geometry_test", "gelu_test"])
def test_host_code(name, tmp_path):
    if not (ROOT / "csrc").is_dir() or shutil.which("c++") is None:
        pytest.skip("needs the source folder and a C++ compiler")
    compiler, _ = find_compiler()
    program = tmp_path / name
    source = ROOT / "tests" / "cuda_host" / f"{name}.cpp"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*compiler.split(), *flags, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


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
    assert [row["mode"] for row in rows] == ["forward", "forward+backward"] * 3
    for row in rows:
        assert row["difference_from_eager"] < 1e-5 and set(row["over_fused"]) >= {"eager"}
        assert sum(row["path"].values()) > 0
