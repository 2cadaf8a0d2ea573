"""The include rules of csrc/README.md, read from its table: every file keeps them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_isa

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
ROW = re.compile(r"^\| `([^`]+)` \|[^|]*\|([^|]*)\|$", re.MULTILINE)
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
# What a row calls by one name.
LIBRARIES = {
    "torch": ("ATen/", "c10/", "torch/"),
    "Python": ("pybind11/", "Python.h"),
    "CUDA": ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h"),
    "CUTLASS": ("cutlass/", "cute/"),
    "cpuid.h": ("cpuid.h",),
    "immintrin.h": ("immintrin.h",),
    "arm_neon.h": ("arm_neon.h",),
    "POSIX": ("sys/", "unistd.h"),
}


def sources():
    suffixes = {".h", ".cpp", ".cu", ".cuh"}
    return [path for path in sorted(CSRC.rglob("*")) if path.suffix in suffixes]


def rules():
    rows = {}
    for folder, allowed in ROW.findall((CSRC / "README.md").read_text()):
        rows[folder] = {name.strip(" `") for name in allowed.split(",") if name.strip()}
    return rows


def folder_of(path):
    return path.parent.relative_to(CSRC).as_posix()


def includes_of(path):
    """For each include: (whether the file is ours, the included name)."""
    for quote, name in INCLUDE.findall(path.read_text()):
        yield quote == '"' and (CSRC / name).is_file(), name


def library_of(name):
    """The table's name for the header's library; None for a header of the C++ standard library."""
    for library, starts in LIBRARIES.items():
        if name.startswith(starts):
            return library
    return None if re.fullmatch(r"[a-z_]+", name) else name


def test_every_folder_has_a_row():
    assert {folder_of(path) for path in sources()} == set(rules())


def test_files_include_what_their_folder_may():
    wrong, seen = [], 0
    for path in sources():
        allowed = rules()[folder_of(path)] | {folder_of(path)}
        for is_ours, name in includes_of(path):
            seen += 1
            wanted = Path(name).parent.as_posix() if is_ours else library_of(name)
            if wanted is not None and wanted not in allowed:
                wrong.append(f"{path.relative_to(CSRC)} includes {name}")
    assert seen > 200 and wrong == []


def test_no_file_includes_itself_by_way_of_others():
    edges = {path: [CSRC / name for is_ours, name in includes_of(path) if is_ours] for path in sources()}
    done, open_files = set(), []

    def visit(path):
        assert path not in open_files, [str(p.relative_to(CSRC)) for p in (*open_files, path)]
        if path in done:
            return
        open_files.append(path)
        for included in edges[path]:
            visit(included)
        done.add(open_files.pop())

    for path in edges:
        visit(path)
    assert len(done) == len(edges)


@pytest.mark.slow
def test_each_header_of_the_kernels_opens_alone(tmp_path):
    """Each header compiles as an editor reads it: without an ISA file around it, for the scalar set."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    headers = [path for path in (CSRC / "kernels").rglob("*.h") if "cuda/hopper" not in path.as_posix()]
    headers = [path for path in headers if not re.match("vec_(avx|neon)", path.name)]
    assert len(headers) > 25
    for header in headers:
        source = tmp_path / f"{header.stem}.cpp"
        source.write_text(f'#include "{header.relative_to(CSRC).as_posix()}"\n')
        command = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wno-unused-function", f"-I{CSRC}", str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and not result.stderr, f"{header.name}: {result.stderr[:500]}"
