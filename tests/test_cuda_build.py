"""Tests of the machine code of a CUDA build, without a GPU; `make cuda-build` runs them."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import fastlane_ext as fl
from fastlane_ext._load import library

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_support import find_cuda_home  # noqa: E402

pytestmark = [
    pytest.mark.any_isa,
    pytest.mark.skipif(not fl.build_info()["cuda_archs"], reason="for a build with CUDA kernels"),
]


@pytest.fixture(scope="module")
def cuobjdump():
    """Calls cuobjdump, the wheel's or the one on PATH, on the library or another file."""
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    tools = [str(file.locate()) for file in files if file.name == "cuobjdump"]
    tool = next(iter(tools), None) or shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")

    def run(*options, file=library.__file__):
        command = [tool, *options, str(Path(file))]
        # It calls nvdisasm, which a wheel puts beside it.
        environment = os.environ | {"PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    return run


def by_function(report, start):
    """The text of each function, by name, of a report that announces them by `start`."""
    parts = re.split(start, report)[1:]
    return [(part.split(None, 1)[0].rstrip(":"), part) for part in parts]


def test_every_architecture_is_there(cuobjdump):
    listed = cuobjdump("--list-elf") + cuobjdump("--list-ptx")
    for entry in fl.build_info()["cuda_archs"]:
        arch = "sm_" + entry.removesuffix("+PTX").replace(".", "")
        assert f"{arch}.cubin" in listed, entry
        assert not entry.endswith("+PTX") or f"{arch}.ptx" in listed, entry


def test_no_kernel_spills(cuobjdump):
    functions = by_function(cuobjdump("--dump-resource-usage"), r"Function ")
    kernels = [(name, text) for name, text in functions if "fastlane" in name or "cutlass" in name]
    assert kernels
    for name, text in kernels:
        usage = dict(re.findall(r"([A-Z]+):(\d+)", text))
        assert usage["LOCAL"] == "0" and int(usage["STACK"]) <= 64, (name, usage)


def test_hopper_kernels_use_wgmma_and_tma(cuobjdump):
    if not fl.build_info()["hopper"]:
        pytest.skip(fl.build_info()["hopper_reason"])
    functions = by_function(cuobjdump("--dump-sass", "--gpu-architecture", "sm_90a"), r"Function : ")
    kernels = [text for name, text in functions if "cutlass" in name]
    # 16 bits: forward with and without z with three tiles, dgrad and through the activation with two. TF32: forward.
    assert len(kernels) == 2 * (2 * 3 + 2 + 2) + 2 * 2
    for text in kernels:
        found = Counter(re.findall(r"\b(HGMMA|UTMALDG|UTMASTG)\b", text))
        assert set(found) == {"HGMMA", "UTMALDG", "UTMASTG"}, (text[:200], found)


SIXTEEN_VALUES = """
#include "kernels/cuda/common/device.cuh"
using namespace fastlane::cuda;
using Activation = fastlane::Activation;
template <class Function>
__device__ void each(const float* in, float* out, Function function) {
#pragma unroll
  for (int i = 0; i < 16; ++i) out[32 * i + threadIdx.x] = function(in[32 * i + threadIdx.x]);
}
#define KERNEL(name, call) \\
  extern "C" __global__ void name(const float* in, float* out) { each(in, out, [](float z) { return call(z); }); }
KERNEL(nothing, OnDevice<Activation::none>::value<__half>)
KERNEL(bf16_value, OnDevice<Activation::gelu>::value<__nv_bfloat16>)
KERNEL(bf16_slope, OnDevice<Activation::gelu>::slope<__nv_bfloat16>)
KERNEL(f16_value, OnDevice<Activation::gelu>::value<__half>)
KERNEL(f16_slope, OnDevice<Activation::gelu>::slope<__half>)
KERNEL(tf32_value, OnDevice<Activation::gelu>::value<Tf32>)
KERNEL(tanh_value, OnDevice<Activation::gelu_tanh>::value<__half>)
KERNEL(tanh_slope, OnDevice<Activation::gelu_tanh>::slope<__half>)
"""


def test_gelu_of_16_bits_is_short(cuobjdump, tmp_path):
    """In instructions an element, which is what an epilogue costs: csrc/kernels/cuda/common/gelu16.h says how many."""
    home = find_cuda_home()
    if home is None:
        pytest.skip("needs the CUDA toolkit")
    source, object_file = tmp_path / "gelu.cu", tmp_path / "gelu.cubin"
    source.write_text(SIXTEEN_VALUES)
    flags = ["-O3", "-std=c++17", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}"]
    subprocess.run([str(Path(home) / "bin" / "nvcc"), *flags, str(source), "-o", str(object_file)], check=True)
    functions = by_function(cuobjdump("--dump-sass", file=object_file), r"Function : ")
    counts = {name: len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/ +(?!NOP)", text, re.MULTILINE)) for name, text in functions}
    base = counts.pop("nothing")
    per_element = {name: (count - base) / 16 for name, count in counts.items()}
    most = {"bf16_value": 11.5, "bf16_slope": 15.5, "f16_value": 11.5, "f16_slope": 15.5, "tf32_value": 12.5}
    most |= {"tanh_value": 8.5, "tanh_slope": 13.5}
    assert per_element.keys() == most.keys()
    assert all(per_element[name] <= most[name] for name in most), per_element
