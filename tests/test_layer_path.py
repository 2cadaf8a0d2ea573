"""Which path a call takes: our own product, or the library's GEMM with one fused pass over its result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FORCED = os.environ.get("FASTLANE_PATH")
AVX512_BF16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
AMX = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "amx_fp16"))

pytestmark = pytest.mark.any_isa

COUNT = """
import json, sys, torch
import fastlane_ext as fl
rows, inputs, outputs, dtype = json.loads(sys.argv[1])
x = torch.ones(rows, inputs, dtype=getattr(torch, dtype), requires_grad=True)
weight = torch.ones(outputs, inputs, dtype=x.dtype, requires_grad=True)
fl.linear_gelu_residual(x, weight).sum().backward()
print(json.dumps(fl.stats()))
"""


def run_python(code, *arguments, path):
    environment = os.environ | {"FASTLANE_PATH": path}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


def paths_of(*shape, path=""):
    result = run_python(COUNT, json.dumps(shape), path=path)
    assert result.returncode == 0, result.stderr[-2000:]
    stats = json.loads(result.stdout)
    assert stats["fallback"] == {}
    chosen = []
    for direction in ("forward", "backward"):
        (one,) = [name for name in ("fused", "library") if stats[name][direction]]
        assert stats[one][direction] == 1
        chosen.append(one)
    return chosen


@pytest.mark.slow
@pytest.mark.skipif(AMX, reason="with tile registers other rules apply")
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 256, 256, "float32"), ["fused", "fused"]),
        ((1, 128, 128, "float32"), ["fused", "library"]),
        ((1, 128, 127, "float64"), ["fused", "fused"]),
        ((2, 256, 256, "float32"), ["fused", "fused"]),
        ((25, 4096, 4096, "bfloat16"), ["library", "library"] if AVX512_BF16 else ["fused", "fused"]),
        ((24, 4096, 4096, "bfloat16"), ["fused", "fused"]),
        ((25, 4096, 4095, "bfloat16"), ["fused", "fused"]),
        ((25, 4096, 4096, "float16"), ["fused", "fused"]),
    ],
    ids=str,
)
def test_choice(shape, expected):
    assert paths_of(*shape) == expected


@pytest.mark.slow
@pytest.mark.parametrize("path", ["fused", "library"])
@pytest.mark.parametrize("shape", [(1, 256, 256, "float32"), (8, 8, 8, "bfloat16")], ids=str)
def test_forced(shape, path):
    assert paths_of(*shape, path=path) == [path, path]


@pytest.mark.slow
def test_wrong_value():
    result = run_python(COUNT, json.dumps((2, 2, 2, "float32")), path="eager")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "ValueError: FASTLANE_PATH: got 'eager', expected fused or library; unset it to let fastlane_ext choose"
    )


AUTOCAST = """
import torch
import fastlane_ext as fl
torch.manual_seed(0)
x, weight, dy = torch.randn(40, 50, requires_grad=True), torch.randn(60, 50, requires_grad=True), torch.randn(40, 60)
y = fl.linear_gelu_residual(x, weight)
expected = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
with torch.autocast("cpu", dtype=torch.bfloat16):
    got = torch.autograd.grad(y, (x, weight), dy)
assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
assert fl.stats()["library"] == {"forward": 1, "backward": 2}
"""


@pytest.mark.slow
def test_autocast_leaves_the_products_alone():
    """A backward inside an autocast region multiplies the saved tensors in their own precision."""
    result = run_python(AUTOCAST, path="library")
    assert result.returncode == 0, result.stderr[-2000:]


BOTH = """
import torch
import fastlane_ext as fl
from fastlane_ext import reference
torch.manual_seed(0)
x = torch.randn(1, 300, dtype=torch.float64, requires_grad=True)
for shortcut in ("identity", "none", "concat"):
    weights, biases, fan_in = [], [], 300
    for width in (300, 300, 40, 300, 300):
        weights.append((torch.randn(width, fan_in, dtype=x.dtype) / fan_in**0.5).requires_grad_())
        biases.append(torch.randn(width, dtype=x.dtype, requires_grad=True))
        fan_in = fan_in + width if shortcut == "concat" else width
    for needed in ([x, *weights, *biases], weights, biases[:1], [x]):
        y = fl.residual_stack(x, weights, biases, shortcut=shortcut)
        dy = torch.randn_like(y)
        expected = torch.autograd.grad(reference.residual_stack(x, weights, biases, shortcut=shortcut), needed, dy)
        for got, want in zip(torch.autograd.grad(y, needed, dy), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
"""


@pytest.mark.slow
def test_a_stack_whose_layers_take_different_paths():
    """For one row, the library runs a layer of 300 × 300 and our kernels run one of 300 × 40; each is followed by the
    other.
    """
    assert paths_of(1, 300, 300, "float64") == ["fused", "library"]
    assert paths_of(1, 300, 40, "float64") == ["fused", "fused"]
    result = run_python(BOTH, path="")
    assert result.returncode == 0, result.stderr[-2000:]


CANCELLED = """
import torch
import torch.nn.functional as F
import fastlane_ext as fl
torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float16):
    x, weight = torch.ones(20, 300, dtype=dtype), torch.rand(40, 300).to(dtype)
    if dtype == torch.float16:
        weight *= 350
    bias = -F.linear(x, weight)[0]
    exact = F.linear(x.double(), weight.double(), bias.double())
    error = lambda y: (y.double() - exact).abs().max().item()
    got = fl.linear_gelu_residual(x, weight, bias, activation="none")
    assert error(got) <= 2 * error(F.linear(x, weight, bias)) + 1e-3, (dtype, error(got))
    assert error(F.linear(x, weight) + bias) > 10 * error(got) + 1e-3
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", ["fused", "library"])
def test_a_bias_that_cancels(path):
    """The product is not rounded to 16 bits before the bias is added."""
    result = run_python(CANCELLED, path=path)
    assert result.returncode == 0, result.stderr[-2000:]


INFERENCE = """
import torch
import fastlane_ext as fl
with torch.inference_mode():
    x, weight = torch.randn(4, 8).requires_grad_(), torch.randn(8, 8)
y, z = fl.linear_gelu_concat(x, weight), fl.linear_gelu_residual(x, weight)
assert y.grad_fn is None and z.grad_fn is None
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", ["fused", "library"])
def test_inference_tensors_outside_inference_mode(path):
    result = run_python(INFERENCE, path=path)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.skipif(FORCED == "library", reason="this process itself runs the other path")
def test_numeric_tests_on_the_other_path():
    names = (
        "test_gelu.py",
        "test_layer_accuracy.py",
        "test_layer_gradients.py",
        "test_layer_saved.py",
        "test_mlp.py",
        "test_stack.py",
    )
    files = [HERE / name for name in names]
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    result = run_python(
        code, *map(str, files), "-m", "not any_isa and not own_product", "-p", "no:cacheprovider", path="library"
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-6000:] + result.stderr[-2000:]
