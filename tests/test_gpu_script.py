"""benchmarks/gpu.sh and gpu_bench.py, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.any_isa, pytest.mark.slow]


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
