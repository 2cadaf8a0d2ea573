"""The Hopper kernels, run from their PTX without a GPU; `make cuda-build` has the CUTLASS that they need."""

import subprocess
import sys

import pytest
from support.native import KERNELS, ROOT, run_ptx

sys.path.insert(0, str(ROOT))

from build_support import find_cutlass

pytestmark = [pytest.mark.any_isa, pytest.mark.slow, pytest.mark.longest]


def test_hopper_kernels_on_the_host(tmp_path):
    """Kernels of CUTLASS's templates, launched by its host code. One file, since reading the headers takes longest."""
    cutlass = find_cutlass()
    if cutlass is None:
        pytest.skip("needs CUTLASS: pip install --no-deps nvidia-cutlass==4.2.0.0")
    kernels = [
        *sorted(KERNELS.glob("hopper/*.cu")),
        KERNELS / "hopper/hopper.cpp",
        KERNELS / "elementwise/preactivation_grad.cu",
    ]
    runs = [["bf16"], ["f16"], ["f32"]]
    (kept,) = run_ptx("hopper_kernels_test", tmp_path, kernels, ["90a"], runs, f"-I{cutlass}")
    # And what it would say of kernels that lack a fence.
    text, fence = kept.read_text(), "fence.proxy.async.shared::cta;"
    assert fence in text
    (tmp_path / "unfenced.ptx").write_text(text.replace(fence, ""))
    command = [str(tmp_path / "hopper_kernels_test"), "f32", str(tmp_path / "unfenced.ptx")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "without a fence.proxy.async since" in result.stdout
