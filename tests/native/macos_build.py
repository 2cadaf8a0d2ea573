"""Compiles the package for macOS on 64-bit Arm and links it with torch's build for macOS: `make macos-build`.

    python tests/native/macos_build.py FOLDER

FOLDER holds the unpacked wheel of torch. The compiler is clang as ``ziglang`` brings it, with macOS's headers and stubs
of its libraries. Nothing runs here. The exit status is 1 if a file does not compile, or if the extension asks for a
name that neither torch, nor its OpenMP runtime, nor macOS has; Python's own names come with the interpreter.
"""

import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from build_support import joined_sources, relative_sources  # noqa: E402

CXX = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos.14.0"]
LIBRARIES = ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lomp"]
# As setup.py has them for clang.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-g0", "-Wall", "-Wno-psabi"]
DEFINES = ["-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H", '-DFASTLANE_CUDA_REASON="no CUDA on macOS"']


def compile_sources(torch: Path, objects: Path) -> list[str]:
    """Compiles every source, and returns the object files."""
    headers = [torch / "include", torch / "include/torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
    includes = ["-Icsrc", *(f"-isystem{path}" for path in headers)]

    def compile_one(source: str) -> str:
        target = objects / (source.replace("/", "_") + ".o")
        subprocess.run([*CXX, *FLAGS, *DEFINES, *includes, "-c", source, "-o", target], cwd=ROOT, check=True)
        print(f"compiled {source}", flush=True)
        return str(target)

    objects.mkdir(parents=True, exist_ok=True)
    sources = joined_sources(ROOT, relative_sources(ROOT, with_cuda=False, with_hopper=False), objects)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    torch = folder / "torch"
    link = [*CXX, "-shared", *compile_sources(torch, folder / "objects"), f"-L{torch / 'lib'}", *LIBRARIES]
    # Without Python's library the linker names what only the interpreter has; anything else is missing on a Mac.
    strict = subprocess.run([*link, "-o", folder / "strict.so"], capture_output=True, text=True, check=False)
    undefined = re.findall(r"undefined symbol: (\S+)", strict.stderr)
    missing = [name for name in undefined if not re.match(r"_{1,2}Py", name)]
    if missing or not undefined:
        print(f"macos-build: not in any library: {', '.join(missing) or strict.stderr}", file=sys.stderr)
        return 1
    extension = folder / "_C.darwin.so"
    subprocess.run([*link, "-undefined", "dynamic_lookup", "-o", extension], check=True)
    print(f"linked {extension.name}: {extension.stat().st_size} bytes, {len(undefined)} names left to Python")
    return 0


if __name__ == "__main__":
    sys.exit(main())
