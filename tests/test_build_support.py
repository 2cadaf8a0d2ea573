"""The build's decisions and its refusals, without compiling anything."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_support import (  # noqa: E402
    MINIMUM_TORCH,
    BuildError,
    check_version,
    cuda_architectures,
    decide_cuda,
    decide_hopper,
    find_compiler,
    find_cuda_home,
    find_cutlass,
    is_clang,
    join,
    parse_nvcc_top,
)

READY = {
    "requested": None,
    "torch_cuda": "13.0",
    "toolkit_home": "/toolkit",
    "toolkit_version": "13.0",
    "has_sources": True,
}


def test_cuda_is_built_where_torch_and_toolkit_fit():
    decision = decide_cuda(**READY)
    assert decision.build
    assert "13.0" in decision.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"torch_cuda": None}, "CPU build"),
        ({"toolkit_home": None}, "no nvcc was found"),
        ({"toolkit_version": "12.8"}, "is 12.8; install toolkit 13.x"),
        ({"toolkit_version": None}, "of unknown version"),
        ({"has_sources": False}, "no CUDA sources"),
    ],
)
def test_each_obstacle_is_named_and_refuses_a_forced_build(change, reason):
    decision = decide_cuda(**(READY | change))
    assert not decision.build
    assert reason in decision.reason
    with pytest.raises(BuildError, match="^FASTLANE_CUDA=1: ") as error:
        decide_cuda(**(READY | change | {"requested": "1"}))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_environment_overrides():
    assert not decide_cuda(**(READY | {"requested": "0"})).build
    assert decide_cuda(**(READY | {"requested": "1"})).build
    with pytest.raises(BuildError, match="FASTLANE_CUDA: got 'yes', expected 0 or 1"):
        decide_cuda(**(READY | {"requested": "yes"}))


def test_cuda_architectures():
    assert cuda_architectures("8.0;9.0a+PTX") == ["8.0", "9.0a+PTX"]
    assert cuda_architectures("8.0 12.0f") == ["8.0", "12.0f"]
    assert cuda_architectures(None) == cuda_architectures(" ") == ["7.5", "8.0+PTX", "9.0a"]
    for wrong in ("7.0", "sm_90", "Hopper", "9", "8.0,9.0"):
        with pytest.raises(BuildError, match="^TORCH_CUDA_ARCH_LIST: got '.*', expected compute capabilities"):
            cuda_architectures(wrong)
    with pytest.raises(BuildError, match="^TORCH_CUDA_ARCH_LIST: got '7.5[+]PTX', expected [+]PTX at 8.0 or newer"):
        cuda_architectures("7.5+PTX;9.0a")


@pytest.mark.parametrize(
    ("architectures", "cutlass", "include", "reason"),
    [
        (["8.0", "9.0a+PTX"], "/headers", "/headers", "compiled for 9.0a"),
        (["9.0a"], None, None, "pip install --no-deps nvidia-cutlass"),
        (["8.0", "9.0+PTX"], "/headers", None, "9.0a is not among the architectures 8.0;9.0+PTX"),
        ([], "/headers", None, "no CUDA kernels"),
    ],
)
def test_hopper_kernels_need_the_architecture_and_the_headers(architectures, cutlass, include, reason):
    decision = decide_hopper(architectures=architectures, cutlass=cutlass)
    assert decision.include == include
    assert reason in decision.reason


def test_cutlass_is_where_the_environment_says(tmp_path):
    with pytest.raises(BuildError, match="^FASTLANE_CUTLASS: got '.*', expected a folder with cutlass/cutlass.h"):
        find_cutlass({"FASTLANE_CUTLASS": str(tmp_path)})
    (tmp_path / "cutlass").mkdir()
    (tmp_path / "cutlass" / "cutlass.h").touch()
    assert find_cutlass({"FASTLANE_CUTLASS": str(tmp_path)}) == str(tmp_path.resolve())


def test_toolkit_root_is_asked_of_nvcc_itself(tmp_path):
    """nvcc on PATH may be a wrapper script: its own folder is not the toolkit's."""
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\necho '#$ TOP=/opt/toolkit/bin/..' >&2\n")
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"}
    assert find_cuda_home(environment) == "/opt/toolkit"
    assert find_cuda_home({"PATH": str(tmp_path)}) is None
    assert find_cuda_home({"PATH": "", "CUDA_HOME": str(tmp_path)}) == str(tmp_path)
    assert parse_nvcc_top("nothing of the kind") is None


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130", "3.0.0a0+git1234"])
def test_supported_torch(version):
    check_version("torch", version, MINIMUM_TORCH)


@pytest.mark.parametrize("version", ["2.10.1", "1.13.1", "unknown"])
def test_old_torch_is_refused(version):
    with pytest.raises(BuildError, match="expected 2.11 or newer; install it with"):
        check_version("torch", version, MINIMUM_TORCH)


def test_missing_compiler_is_named():
    with pytest.raises(BuildError, match=r"'no-such-compiler' was not found; install g\+\+"):
        find_compiler({"CXX": "no-such-compiler", "PATH": os.environ["PATH"]})


@pytest.mark.parametrize("macro", ["__clang__", "__GNUC__"])
def test_a_compiler_made_from_clang_is_known_by_its_macros(macro, tmp_path):
    compiler = tmp_path / "icpx"
    compiler.write_text(f'#!/bin/sh\n[ "$1 $2 $3 $4" = "-dM -E -x c++" ] && echo "#define {macro} 1"\n')
    compiler.chmod(0o755)
    assert is_clang(f"{compiler}") == (macro == "__clang__")


def run_setup(tmp_path, **environment):
    """`setup.py egg_info` in a folder of its own, so that a test can see that a refusal leaves nothing behind."""
    for name in ("setup.py", "build_support.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    before = set(tmp_path.iterdir())
    result = subprocess.run(
        [sys.executable, "setup.py", "egg_info"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert {p for p in tmp_path.iterdir() if p.name != "__pycache__"} == before
    return result.stderr.strip().splitlines()


def stub_torch(tmp_path, source):
    package = tmp_path / "stubs" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    return str(package.parent)


@pytest.mark.parametrize(
    ("torch_source", "environment", "message"),
    [
        ("raise ImportError('absent')", {}, "fastlane_ext: torch: not found"),
        ("__version__ = '2.9.0'", {}, "fastlane_ext: torch: got 2.9.0, expected 2.11 or newer"),
        (None, {"CXX": "no-such-compiler"}, "fastlane_ext: C++ compiler: 'no-such-compiler' was not found"),
        (None, {"FASTLANE_CUDA": "1"}, "fastlane_ext: FASTLANE_CUDA=1: "),
        (None, {"FASTLANE_CUDA": "2"}, "fastlane_ext: FASTLANE_CUDA: got '2'"),
    ],
)
def test_setup_refuses_in_one_line(tmp_path, torch_source, environment, message):
    if torch_source is not None:
        environment = environment | {"PYTHONPATH": stub_torch(tmp_path, torch_source)}
    lines = run_setup(tmp_path, **environment)
    assert lines[-1].startswith(message)
    assert not any("Traceback" in line for line in lines)


def test_load_explains_a_mismatch_and_a_missing_build(tmp_path):
    from fastlane_ext._load import check_torch, read_build_record

    with pytest.raises(ImportError, match="built for torch 2.11.0, but torch 2.13.0 is running; reinstall"):
        check_torch("2.11.0", "2.13.0")
    with pytest.raises(
        ImportError,
        match="no compiled extension in .*; if this is the source folder, leave it .* or build in it with: pip",
    ):
        read_build_record(tmp_path)


def test_each_source_is_compiled_once():
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.c*") if path.is_file())
    groups, alone = join(sources)
    assert sorted([*alone, *(member for members in groups.values() for member in members)]) == sources
    assert set(groups) == {"python", "autograd", "dense", "operators"}
    kernels_and_cuda = {s for s in sources if s.startswith("csrc/kernels/")}
    assert set(alone) == kernels_and_cuda | {"csrc/ops/backend/cuda.cpp", "csrc/ops/backend/cuda_stack.cpp"}
