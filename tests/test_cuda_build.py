"""What the machine code of a CUDA build says, without a GPU; `make cuda-build` runs it."""

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import fastlane_ext as fl
from fastlane_ext._load import library

pytestmark = [
    pytest.mark.any_isa,
    pytest.mark.skipif(not fl.build_info()["cuda_archs"], reason="for a build with CUDA kernels"),
]


@pytest.fixture(scope="module")
def cuobjdump():
    """Calls cuobjdump on the library: the wheel's, or the one on PATH."""
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    tools = [str(file.locate()) for file in files if file.name == "cuobjdump"]
    tool = next(iter(tools), None) or shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")

    def run(*options):
        command = [tool, *options, str(Path(library.__file__))]
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
