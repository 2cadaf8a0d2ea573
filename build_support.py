"""Decisions of the build. They are not in setup.py, so that tests can check them without building anything."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 11)
MINIMUM_SETUPTOOLS = (77, 0)  # the first that takes pyproject.toml's licence expression
# Turing and newer. A GPU without code of its own compiles the PTX at load time. 9.0a, unlike 9.0, has wgmma.
DEFAULT_CUDA_ARCHITECTURES = "7.5;8.0+PTX;9.0a"


class BuildError(RuntimeError):
    """One line: why the extension cannot be built here, and what to do."""


@dataclass(frozen=True)
class CudaDecision:
    """Whether the CUDA half is compiled, and why. The build prints the reason; `build_info()` repeats it."""

    build: bool
    reason: str


def decide_cuda(
    *,
    requested: str | None,
    torch_cuda: str | None,
    toolkit_home: str | None,
    toolkit_version: str | None,
    has_sources: bool,
) -> CudaDecision:
    """Decide from the installed torch and toolkit alone, never from a visible GPU.

    `requested` is the value of FASTLANE_CUDA (None, "" , "0" or "1"); `torch_cuda` is `torch.version.cuda`;
    `find_cuda_home` finds the toolkit. Raises BuildError if FASTLANE_CUDA has another value, or if it is "1" and CUDA
    cannot be compiled.
    """
    if requested not in (None, "", "0", "1"):
        raise BuildError(f"FASTLANE_CUDA: got {requested!r}, expected 0 or 1; unset it to let the build decide")
    if requested == "0":
        return CudaDecision(False, "FASTLANE_CUDA=0")
    obstacle = None
    if not has_sources:
        obstacle = "this version of fastlane_ext has no CUDA sources"
    elif torch_cuda is None:
        obstacle = "the installed torch is a CPU build"
    elif toolkit_home is None:
        obstacle = f"torch was built for CUDA {torch_cuda}, but no nvcc was found; set CUDA_HOME"
    elif toolkit_version is None or toolkit_version.split(".")[0] != torch_cuda.split(".")[0]:
        obstacle = (
            f"torch was built for CUDA {torch_cuda}, but the toolkit in {toolkit_home} is "
            f"{toolkit_version or 'of unknown version'}; install toolkit {torch_cuda.split('.')[0]}.x"
        )
    if obstacle is None:
        return CudaDecision(True, f"torch for CUDA {torch_cuda} and toolkit {toolkit_version}")
    if requested == "1":
        raise BuildError(f"FASTLANE_CUDA=1: {obstacle}")
    return CudaDecision(False, obstacle)


def find_cuda_home(environment: Mapping[str, str] = os.environ) -> str | None:
    """The toolkit's root: CUDA_HOME, CUDA_PATH, or the folder that nvcc itself names as its TOP.

    nvcc on PATH may be a wrapper script in another folder; `nvcc --dryrun` prints the real root.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = environment.get(variable)
        if home and (Path(home) / "bin" / "nvcc").exists():
            return home
    nvcc = shutil.which("nvcc", path=environment.get("PATH"))
    if nvcc is None:
        return None
    dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    return parse_nvcc_top(dryrun.stderr + dryrun.stdout)


def parse_nvcc_top(dryrun_output: str) -> str | None:
    match = re.search(r"\bTOP=(\S+)", dryrun_output)
    return os.path.normpath(match.group(1)) if match else None


def cuda_toolkit_version(home: str | None) -> str | None:
    """The "major.minor" that the toolkit's nvcc prints, or None."""
    if home is None:
        return None
    try:
        output = subprocess.run(
            [str(Path(home) / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return None
    match = re.search(r"release (\d+\.\d+)", output)
    return match.group(1) if match else None


def cuda_architectures(requested: str | None) -> list[str]:
    """The architectures to compile for, from TORCH_CUDA_ARCH_LIST or, if that is not set, the default ones.

    An entry looks like "9.0a+PTX". Raises BuildError if an entry is not a compute capability of 7.5 or newer, or asks
    for PTX below 8.0.
    """
    entries = [entry for entry in re.split(r"[;\s]+", requested or "") if entry] or DEFAULT_CUDA_ARCHITECTURES.split(
        ";"
    )
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d+)[af]?(\+PTX)?", entry)
        capability = match and (int(match.group(1)), int(match.group(2)))
        if match and match.group(3) and (7, 5) <= capability < (8, 0):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: got '{entry}', expected +PTX at 8.0 or newer: later GPUs would compile code "
                "without their tensor cores from it; write '7.5;8.0+PTX'"
            )
        if match is None or capability < (7, 5):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: got '{entry}', expected compute capabilities of 7.5 or newer such as "
                f"'{DEFAULT_CUDA_ARCHITECTURES}'; unset it for these"
            )
    return entries


@dataclass(frozen=True)
class HopperDecision:
    """Whether the Hopper kernels are compiled, and why. ``include`` is the folder of CUTLASS's headers, or None."""

    include: str | None
    reason: str


def decide_hopper(*, architectures: Sequence[str], cutlass: str | None) -> HopperDecision:
    """Decide from the architectures of the CUDA half (none without it) and the folder that `find_cutlass` found."""
    if not architectures:
        return HopperDecision(None, "no CUDA kernels are built")
    if not any(entry.startswith("9.0a") for entry in architectures):
        return HopperDecision(None, f"9.0a is not among the architectures {';'.join(architectures)}")
    if cutlass is None:
        return HopperDecision(
            None,
            "no CUTLASS headers were found; pip install --no-deps nvidia-cutlass==4.2.0.0, or name them by "
            "FASTLANE_CUTLASS",
        )
    return HopperDecision(cutlass, "compiled for 9.0a with CUTLASS")


def find_cutlass(environment: Mapping[str, str] = os.environ) -> str | None:
    """The folder of CUTLASS's headers: FASTLANE_CUTLASS, or the folder in the wheel nvidia-cutlass, or None.

    Raises BuildError if FASTLANE_CUTLASS has no `cutlass/cutlass.h`.
    """
    named = environment.get("FASTLANE_CUTLASS")
    if named:
        if not (Path(named) / "cutlass" / "cutlass.h").exists():
            raise BuildError(
                f"FASTLANE_CUTLASS: got '{named}', expected a folder with cutlass/cutlass.h; unset it to use the wheel "
                "nvidia-cutlass"
            )
        return str(Path(named).resolve())
    wheel = importlib.util.find_spec("cutlass_library")
    for package in (wheel and wheel.submodule_search_locations) or ():
        include = Path(package) / "source" / "include"
        if (include / "cutlass" / "cutlass.h").exists():
            return str(include)
    return None


JOINED = {
    "python": ("csrc/python/*.cpp", "csrc/ops/autocast.cpp"),
    "autograd": ("csrc/ops/autograd/*.cpp", "csrc/ops/backend/cpu.cpp"),
    "dense": ("csrc/ops/dense/*.cpp", "csrc/ops/backend/torch_backend.cpp"),
    "operators": ("csrc/ops/*.cpp",),
}
"""The files that are compiled as one, by the name of the joint file.

The first pattern that fits a file counts; ``*`` also stands for folders. Torch's headers take longer than the code
behind them. Files that define the same operator for another dispatch key have functions of the same names, so they are
in different groups.
"""


def join(sources: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The members of each joint file, and the sources that are compiled alone: the kernels and what only CUDA has."""
    groups: dict[str, list[str]] = {name: [] for name in JOINED}
    alone = []
    for source in sources:
        name = next((n for n, patterns in JOINED.items() if any(fnmatch.fnmatch(source, p) for p in patterns)), None)
        is_of_cuda = re.search(r"/cuda(_stack)?\.cpp$", source) is not None
        (alone if name is None or is_of_cuda else groups[name]).append(source)
    return {name: members for name, members in groups.items() if members}, alone


def relative_sources(root: Path, with_cuda: bool, with_hopper: bool) -> list[str]:
    """The sources to compile, by their paths in `root`."""
    backend, hopper = root / "csrc/ops/backend", root / "csrc/kernels/cuda/hopper"
    without_hopper = {hopper / "absent.cpp"}
    left_out = {backend / "cuda_absent.cpp"} if with_cuda else {backend / "cuda.cpp", backend / "cuda_stack.cpp"}
    left_out |= without_hopper if with_hopper else set(hopper.glob("*.c*")) - without_hopper
    left_out |= set() if with_cuda else without_hopper
    paths = {*(root / "csrc").rglob("*.cpp"), *((root / "csrc").rglob("*.cu") if with_cuda else ())}
    return sorted(path.relative_to(root).as_posix() for path in paths - left_out)


def joined_sources(root: Path, sources: Sequence[str], folder: Path) -> list[str]:
    """The sources with some replaced by files in `folder`, below `root`, that include them."""
    groups, single = join(sources)
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in groups.items():
        text = "".join(f'#include "{Path(member).relative_to("csrc").as_posix()}"\n' for member in members)
        file = folder / f"{name}.cpp"
        # A file that is not written anew is not compiled anew.
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
    # What takes longest comes first, so that all cores are busy to the end.
    single.sort(key=lambda source: ("/isa/" not in source, source))
    return [*((folder / f"{name}.cpp").relative_to(root).as_posix() for name in groups), *single]


def check_version(package: str, version: str, minimum: tuple[int, int]) -> None:
    """Raise BuildError unless `version` (a package's ``__version__``) is `minimum` or newer."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or tuple(map(int, match.groups())) < minimum:
        text = ".".join(map(str, minimum))
        raise BuildError(
            f"{package}: got {version}, expected {text} or newer; install it with: pip install '{package}>={text}'"
        )


def is_clang(command: str) -> bool:
    """Whether a compiler is clang or made from it, as Intel's and AMD's are; not every such version line says clang."""
    asked = [*command.split(), "-dM", "-E", "-x", "c++", os.devnull]
    return "__clang__" in subprocess.run(asked, capture_output=True, text=True, check=False).stdout


def find_compiler(environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """The C++ compiler's command and its version line. Raises BuildError if there is no compiler."""
    command = environment.get("CXX") or "c++"
    executable = shutil.which(command.split()[0], path=environment.get("PATH"))
    if executable is None:
        raise BuildError(
            f"C++ compiler: '{command}' was not found; install g++ 9 or newer (Debian: apt install g++), "
            "or set CXX to one"
        )
    output = subprocess.run([*command.split(), "--version"], capture_output=True, text=True, check=False).stdout
    return command, output.splitlines()[0] if output else command
