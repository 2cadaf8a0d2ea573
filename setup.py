"""Builds fastlane_ext._C against the installed torch. Run it through pip:

pip install --no-build-isolation .
"""

import json
import os
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_support import (  # noqa: E402
    MINIMUM_SETUPTOOLS,
    MINIMUM_TORCH,
    BuildError,
    check_version,
    cuda_architectures,
    cuda_toolkit_version,
    decide_cuda,
    decide_hopper,
    find_compiler,
    find_cuda_home,
    find_cutlass,
    is_clang,
    joined_sources,
    relative_sources,
)

BUILD_RECORD = "_build_record.json"


def extension_and_command():
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            "torch: not found in the environment that builds fastlane_ext; install torch first, then run: "
            "pip install --no-build-isolation ."
        ) from error
    check_version("torch", torch.__version__, MINIMUM_TORCH)
    check_version("setuptools", setuptools.__version__, MINIMUM_SETUPTOOLS)
    compiler, compiler_version = find_compiler()

    toolkit_home = find_cuda_home() if torch.version.cuda else None
    if toolkit_home:
        os.environ["CUDA_HOME"] = toolkit_home  # set before cpp_extension guesses it from nvcc's folder
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    decision = decide_cuda(
        requested=os.environ.get("FASTLANE_CUDA"),
        torch_cuda=torch.version.cuda,
        toolkit_home=toolkit_home,
        toolkit_version=cuda_toolkit_version(toolkit_home),
        has_sources=any((ROOT / "csrc" / "kernels").rglob("*.cu")),
    )
    print(f"fastlane_ext: torch {torch.__version__}, {compiler_version}")
    print(f"fastlane_ext: CUDA kernels: {'yes' if decision.build else 'no'} ({decision.reason})")
    architectures = cuda_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST")) if decision.build else []
    hopper = decide_hopper(architectures=architectures, cutlass=find_cutlass() if decision.build else None)
    print(f"fastlane_ext: Hopper kernels: {'yes' if hopper.include else 'no'} ({hopper.reason})")
    if decision.build:
        # If this is unset, torch compiles for the GPUs that are visible now.
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)

    class RecordingBuildExtension(BuildExtension):
        """Writes a record beside the library, with the torch that it fits; readable where the library does not load."""

        def run(self):
            if os.environ.get("FASTLANE_JOIN", "1") != "0":
                self.extensions[0].sources = joined_sources(ROOT, self.extensions[0].sources, ROOT / "build" / "joined")
            super().run()
            package = ROOT / "fastlane_ext" if self.inplace else Path(self.build_lib) / "fastlane_ext"
            record = {
                "version": self.distribution.get_version(),
                "torch": torch.__version__,
                "torch_cuda": torch.version.cuda,
                "cuda_archs": architectures,
                "cuda_reason": decision.reason,
                "hopper": hopper.include is not None,
                "hopper_reason": hopper.reason,
                "compiler": compiler_version,
            }
            (package / BUILD_RECORD).write_text(json.dumps(record, indent=2) + "\n")

    extension = (CUDAExtension if decision.build else CppExtension)(
        "fastlane_ext._C",
        relative_sources(ROOT, decision.build, hopper.include is not None),
        include_dirs=[str(ROOT / "csrc"), *([hopper.include] if hopper.include else [])],
        define_macros=[("FASTLANE_CUDA_REASON", json.dumps(decision.reason))],
        # -ffp-contract=off: a product and a sum are fused only where the source says fma, the same in every ISA.
        # -fopenmp is for at::parallel_for's header and is not a link flag: the runtime must be the one torch
        # loaded, since a second one would not follow torch.set_num_threads. Clang: ops/backend/torch_threads.h.
        extra_compile_args={
            "cxx": [
                "-O3",
                "-ffp-contract=off",
                *([] if is_clang(compiler) else ["-fopenmp"]),
                "-fvisibility=hidden",
                "-g0",
                "-Wall",
                "-Wno-psabi",
            ],
            # Without NDEBUG an assertion in CUTLASS makes ptxas run wgmma one at a time.
            "nvcc": ["-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"],
        },
    )
    return extension, RecordingBuildExtension


try:
    extension, build_ext = extension_and_command()
except BuildError as error:
    sys.exit(f"fastlane_ext: {error}")

setuptools.setup(ext_modules=[extension], cmdclass={"build_ext": build_ext})
