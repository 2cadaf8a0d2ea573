"""The folder layout's promises, and a source distribution that builds and runs on its own."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fastlane_ext

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"


def test_intrinsics_live_in_the_vector_headers_only():
    intrinsic = re.compile(r"\b(_mm(256|512)?_\w+|v\w+_[sufp]\d\d)\(")
    found = {path.name for path in KERNELS.rglob("*") if path.is_file() and intrinsic.search(path.read_text())}
    assert found == {"vec_avx2.h", "vec_avx512.h", "vec_avx512_bf16.h", "vec_neon.h"}


def test_there_is_one_operator_library():
    definitions = [p.name for p in (ROOT / "csrc").rglob("*.cpp") if re.search(r"TORCH_LIBRARY\(", p.read_text())]
    assert definitions == ["schema.cpp"]


def test_no_flag_ties_the_build_to_this_machine_or_changes_floating_point():
    flags = (ROOT / "setup.py").read_text()
    for forbidden in ("-march", "-mavx", "-ffast-math", "-Ofast", "-std="):
        assert forbidden not in flags


@pytest.mark.parametrize(
    "isa", [isa for isa in ("avx2", "avx512", "avx512_bf16") if isa in fastlane_ext.build_info()["compiled_isas"]]
)
def test_an_isa_file_exports_one_symbol(isa):
    """A weak AVX symbol could be picked by the linker for code that runs on an older CPU."""
    built = [*(ROOT / "build").glob(f"temp*/csrc/kernels/cpu/isa/{isa}.o")]
    if not built or shutil.which("nm") is None:
        pytest.skip("needs nm, and what a build in the source folder leaves: pip install --no-build-isolation -e .")
    assembled = max(built, key=lambda path: path.stat().st_mtime)
    listing = subprocess.run(["nm", "-C", "--defined-only", assembled], capture_output=True, text=True, check=True)
    exported = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    exported = [(kind, name) for _, kind, name in exported if kind not in "tbrdn" and "DW.ref" not in name]
    assert exported == [("T", f"fastlane::{isa}_kernels()")]


def test_wide_registers_stay_in_local_functions_of_the_library():
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    library = fastlane_ext._load.library.__file__
    exported = set(
        subprocess.run(
            ["nm", "-D", "--defined-only", "--format=just-symbols", library],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
    )
    disassembly = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    ).stdout
    users, function = set(), ""
    for line in disassembly.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        elif "%ymm" in line or "%zmm" in line:
            users.add(function)
    assert users, "the AVX kernels are missing from the library"
    assert not users & exported


def build_sdist(folder):
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_the_source_distribution_is_complete(tmp_path):
    archive = build_sdist(tmp_path)
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    tracked = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "fastlane_ext")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".cpp", ".h", ".py", ".pyi", ".typed"}
    }
    assert tracked <= names
    assert {"LICENSE", "README.md", "build_support.py", "setup.py", "pyproject.toml"} <= names


@pytest.mark.slow
@pytest.mark.thorough  # `make cuda-build` builds and tests a source distribution too
def test_the_source_distribution_builds_installs_and_runs(tmp_path):
    archive = build_sdist(tmp_path)
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
        + ["--target", str(target), str(archive)],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"FASTLANE_CUDA": "0"},  # whose kernels take many minutes, and `make cuda-build` compiles them
    )
    assert {"py.typed", "_C.pyi"} <= {path.name for path in (target / "fastlane_ext").iterdir()}
    program = (
        "import json, torch, fastlane_ext as fe\n"
        "x, w = torch.randn(5, 8), torch.randn(8, 8, requires_grad=True)\n"
        "fe.linear_gelu_residual(x, w, None, x).sum().backward()\n"
        "print(json.dumps([fe.__file__, fe.build_info()['torch_version'], fe.stats()['fused']]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    file, torch_version, fused = json.loads(run.stdout)
    assert Path(file).is_relative_to(target)
    assert torch_version == fastlane_ext.build_info()["torch_version"]
    assert fused == {"forward": 1, "backward": 1}
