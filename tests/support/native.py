"""Programs of tests/native: compiled, linked and run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from build_support import find_compiler, find_cuda_home  # noqa: E402

KERNELS = ROOT / "csrc" / "kernels" / "cuda"
NATIVE = ROOT / "tests" / "native"


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


def toolkit_home():
    home = find_cuda_home()
    if home is None:
        pytest.skip("needs the CUDA toolkit")
    return Path(home)


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
    outputs = [run.communicate(timeout=1800)[0] for run in runs]  # only ends what hangs
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0, output
        assert re.match(r"[1-9]\d* launches", output)
    return texts
