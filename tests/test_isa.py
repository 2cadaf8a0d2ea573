"""The numeric tests once more, in a process of its own for every other instruction set this CPU can run, and for none:
torch's own operators, as on a CPU without vector kernels of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlane_ext as fl
from fastlane_ext._load import library

HERE = Path(__file__).parent
FILES = [
    "test_fuzz.py",
    "test_gelu.py",
    "test_layer_accuracy.py",
    "test_layer_gradients.py",
    "test_layer_saved.py",
    "test_layer_hostile.py",
    "test_layer_process.py",
    "test_mlp.py",
    "test_packed.py",
    "test_stack.py",
]
FORCED = os.environ.get("FASTLANE_CPU_ISA")
ALL = fl.build_info()["supported_isas"]
OURS = "not any_isa"
TORCHS = "not any_isa and not own_product and not own_kernels"


def run_python(isa, code, *arguments, **environment):
    code = f"import sys, fastlane_ext as fl\nassert fl.cpu_isa() == {isa!r}\n{code}"
    path = {"FASTLANE_PATH": ""} if isa == "none" else {}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | path | {"FASTLANE_CPU_ISA": isa} | environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.any_isa
def test_the_best_one_runs_unless_another_is_forced():
    assert fl.cpu_isa() == (FORCED or ALL[0])
    assert set(ALL) <= set(fl.build_info()["compiled_isas"]) and "scalar" in ALL


VECTORS = ["avx512", "avx2", "scalar"]


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("asked", "supported", "isa", "reason"),
    [
        ("", VECTORS, "avx512", "the best set that this CPU runs"),
        ("", ["avx2", "scalar"], "avx2", "the best set that this CPU runs"),
        ("", ["neon", "scalar"], "neon", "the best set that this CPU runs"),
        ("", ["scalar"], "none", "no vector kernels for this CPU"),
        ("none", VECTORS, "none", "FASTLANE_CPU_ISA asks for it"),
        ("scalar", ["scalar"], "scalar", "FASTLANE_CPU_ISA asks for it"),
        ("avx2", VECTORS, "avx2", "FASTLANE_CPU_ISA asks for it"),
    ],
)
def test_choice(asked, supported, isa, reason):
    """Without vector kernels the scalar kernels run only on request: they take many times eager's time."""
    chosen, why = library.choose_isa(asked, supported)
    assert chosen == isa and why.startswith(reason)


@pytest.mark.any_isa
def test_a_set_that_is_not_there():
    message = "FASTLANE_CPU_ISA: got 'avx2', expected one of scalar, none on this machine; unset it to let"
    with pytest.raises(RuntimeError, match=f"^{message}"):
        library.choose_isa("avx2", ["scalar"])


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.skipif(bool(FORCED), reason="this process itself runs a forced instruction set")
@pytest.mark.parametrize("isa", [*ALL[1:], "none"])
def test_numeric_tests(isa):
    arguments = [*(HERE / file for file in FILES), "-m", TORCHS if isa == "none" else OURS, "-p", "no:cacheprovider"]
    result = run_python(isa, "import pytest; sys.exit(pytest.main(sys.argv[1:]))", *arguments)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-6000:] + result.stderr[-2000:]


COMPUTE = f"""
import torch
sys.path.insert(0, {str(HERE)!r})
from support.cases import make_case
from support.choices import DTYPES
from support.runs import run_fused
torch.save([run_fused(make_case((37,), 45, 51, dtype=dtype)) for dtype in DTYPES], sys.argv[1])
"""


@pytest.mark.slow
def test_all_sets_agree(tmp_path):
    """All sets agree up to rounding. This finds a set that is wrong in the same way as its own test."""
    results = {}
    for isa in (*ALL, "none"):
        result = run_python(isa, COMPUTE, tmp_path / isa)
        assert result.returncode == 0, result.stderr[-2000:]
        results[isa] = torch.load(tmp_path / isa)
    for isa, result in results.items():
        compared = result[:2] if isa == "none" else result  # in 16 bits torch's operators round three times
        for one, other in zip(results[ALL[0]], compared, strict=False):
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, msg=lambda m, what=(isa, name): f"{what}: {m}")


# Without kernels of ours

EAGER = """
import json, torch
from fastlane_ext import reference
torch.manual_seed(0)

def leaves(*shapes, dtype):
    return [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_() for shape in shapes]

def weight(out_features, in_features, dtype):  # stored (in, out)
    return torch.randn(in_features, out_features).div(in_features ** 0.5).to(dtype).t().requires_grad_()

def mlp(f, x, a, b, c, d, activation, **options):
    return f.mlp_residual(x, a, b, c, d, x, activation=activation, **options)

def stack(f, x, a, b, c, d, activation, **options):
    return f.residual_stack(x, [a, c], [b, d], activation=activation, shortcut="none", **options)

def network(f, x, a, b, activation, **options):
    return f.residual_stack(x, [a, a, a], [b, None, b], activation=activation, **options)

def layer(f, x, a, b, activation, **options):
    return f.linear_gelu_residual(x, a, b, x[..., :1], activation=activation, **options)

def concat(f, x, a, b, activation):
    return f.linear_gelu_concat(x, a, b, activation=activation)

compared = 0
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for shape in ((7, 12), (2, 3, 12), (12,), (0, 12), (2, 3, 2, 12)):
        for activation in ("gelu", "gelu_tanh", "quick_gelu", "none"):
            small = leaves(shape, (12, 12), (12,), dtype=dtype)
            large = [*leaves(shape, (20, 12), (20,), dtype=dtype), weight(12, 20, dtype), *leaves((12,), dtype=dtype)]
            for call, tensors in (layer, small), (concat, small), (network, small), (mlp, large), (stack, large):
                outputs = [call(f, *tensors, activation=activation) for f in (reference, fl)]
                dy = torch.randn_like(outputs[0])
                for chosen in (tensors, tensors[1:2], tensors[2:]):
                    expected, got = (torch.autograd.grad(y, chosen, dy, retain_graph=True) for y in outputs)
                    for a, b in zip((outputs[0], *expected), (outputs[1], *got), strict=True):
                        assert torch.equal(a, b) and a.stride() == b.stride(), (call, dtype, shape, activation)
                        compared += 1
                with torch.inference_mode():
                    y = call(fl, *tensors, activation=activation)
                assert torch.equal(y, outputs[0]) and y.is_contiguous()
print(json.dumps([compared, fl.stats()]))
"""


@pytest.mark.any_isa
def test_none_is_eager_to_the_bit():
    """Results equal eager's to the bit, by a path of their own: FASTLANE_STRICT would refuse a fallback."""
    result = run_python("none", EAGER, FASTLANE_STRICT="1")
    assert result.returncode == 0, result.stderr[-2000:]
    compared, stats = json.loads(result.stdout)
    calls = 4 * 5 * 4 * 5
    assert compared > 5 * calls and stats.pop("torch") == {"forward": 2 * calls, "backward": 0}
    assert stats.pop("fallback") == {} and all(not any(counts.values()) for counts in stats.values())


RECOMPUTED = (
    EAGER.partition("compared = 0")[0]
    + """
def nothing_kept_but_x(call, tensors):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(fl, *tensors, activation="gelu", recompute=True)
    inputs = {t.untyped_storage().data_ptr() for t in tensors}
    return bool(kept) and all(t.untyped_storage().data_ptr() in inputs for t in kept)

calls = 0
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
    for shape in ((7, 12), (2, 3, 12)):
        for activation in ("gelu", "gelu_tanh", "quick_gelu", "none"):
            small = leaves(shape, (12, 12), (12,), dtype=dtype)
            large = [*leaves(shape, (20, 12), (20,), dtype=dtype), weight(12, 20, dtype), *leaves((12,), dtype=dtype)]
            for call, tensors in (layer, small), (network, small), (mlp, large), (stack, large):
                expected, got = call(reference, *tensors, activation=activation), call(
                    fl, *tensors, activation=activation, recompute=True)
                torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
                # Rows that share memory, as unfold's.
                dy = torch.randn(expected.numel() + 64).to(dtype).as_strided(expected.shape, [1] * expected.dim())
                for chosen in (tensors, tensors[1:2], tensors[2:], tensors[:1]):
                    expected_grads = torch.autograd.grad(expected, chosen, dy.clone(), retain_graph=True)
                    grads = torch.autograd.grad(got, chosen, dy, retain_graph=True)
                    for a, b in zip(expected_grads, grads, strict=True):
                        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
                    for t, b in zip(chosen, grads, strict=True):
                        assert t.stride() == b.stride(), (call, shape)
                    calls += 1
            assert nothing_kept_but_x(mlp, large) and nothing_kept_but_x(network, small)
print(json.dumps([calls, fl.stats()]))
"""
)


@pytest.mark.any_isa
def test_recompute_without_kernels():
    """The autograd nodes are ours; their products and passes are torch's."""
    result = run_python("none", RECOMPUTED, FASTLANE_STRICT="1")
    assert result.returncode == 0, result.stderr[-2000:]
    calls, stats = json.loads(result.stdout)
    assert stats["torch"]["backward"] == calls and stats["torch"]["forward"] > 0
    assert stats["fallback"] == {} and stats["library"] == stats["fused"] == {"forward": 0, "backward": 0}


OPERATORS = """
import json, torch
import torch.nn.functional as F
from fastlane_ext import reference
ops = torch.ops.fastlane
torch.manual_seed(0)
torch.use_deterministic_algorithms(True)  # fills new memory with NaN
torch.set_default_dtype(getattr(torch, sys.argv[1]))
random = torch.randn
leaf = lambda *shape: random(shape).div(shape[-1] ** 0.5).requires_grad_()

def check(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)

x, w, b, r, v, c = leaf(2, 5, 8), leaf(8, 8), leaf(8), leaf(8), leaf(8, 8), leaf(8)
for activation in ("gelu", "gelu_tanh", "quick_gelu", "none"):
    act = lambda z: reference.activate(z, activation)
    z = F.linear(x, w, b)
    for concat in (False, True):
        y = torch.cat([x, act(z)], -1) if concat else act(z) + r
        dy = torch.randn_like(y)
        with torch.no_grad():
            got = ops.linear_gelu_forward(x, w, b, None if concat else r, activation=activation, concat=concat)
            check(got, (y, z))
            grads = ops.linear_gelu_backward(dy[..., -8:], got[1], x, w, b, dy[..., :8] if concat else None,
                activation=activation, weight_column_major=True, output_mask=[True] * 3)
        check(grads, torch.autograd.grad(y, (x, w, b), dy, retain_graph=True))
        assert grads[1].stride() == (1, 8)
    y, dy = F.linear(act(z), v, c) + x, random(2, 5, 8)
    with torch.no_grad():
        got = ops.mlp_forward(x, w, b, v, c, x, activation=activation)
        check(got, (y, z))
        grads = ops.mlp_backward(dy, got[1], x, w, b, v, dy, activation=activation, fc1_column_major=False,
            fc2_column_major=True, output_mask=[True] * 5)
    check(grads, torch.autograd.grad(y, (x, w, b, v, c), dy))
    p, q = leaf(6, 8), leaf(6)
    for shortcut in ("identity", "projection", "concat", "none"):
        widths = (8, 16) if shortcut == "concat" else (8, 8)
        weights, biases = [leaf(8, widths[0]), leaf(6, widths[1])], [leaf(8), leaf(6)]
        lists = ([None, p], [None, q]) if shortcut == "projection" else ([None, None], [None, None])
        y = reference.residual_stack(x, weights, biases, shortcut=shortcut, activation=activation,
            **({"projections": lists[0], "projection_biases": lists[1]} if shortcut == "projection" else {}))
        dy = torch.randn_like(y)
        needed = [x, *weights, *biases, *([p, q] if shortcut == "projection" else [])]
        positions = [0, 1, 2, 3, 4, *([6, 8] if shortcut == "projection" else [])]
        options = {"shortcut": shortcut, "activation": activation}
        with torch.no_grad():
            got, z = ops.residual_stack_forward(x, weights, biases, *lists, **options)
            check([got], [y])
            sizes = {"features": [8, 8, 6], "column_major": []}
            for saved in (z, None):
                operands = (dy, x, weights, biases, *lists, saved)
                grads = ops.residual_stack_backward(*operands, needed=positions, **sizes, **options)
                check(grads, torch.autograd.grad(y, needed, dy, retain_graph=True))
print(json.dumps(fl.stats()))
"""


@pytest.mark.any_isa
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_operators_of_a_compiled_graph_without_kernels(dtype):
    """A program that was exported on a machine with vector kernels calls these operators."""
    result = run_python("none", OPERATORS, dtype)
    assert result.returncode == 0, result.stderr[-2000:]
    stats = json.loads(result.stdout)
    assert stats["torch"] == {"forward": 4 * 7, "backward": 4 * 11}
    assert stats["library"] == stats["fused"] == {"forward": 0, "backward": 0}


COMPILED = """
import torch
from fastlane_ext import reference
network, plain = (kind.ResidualNetwork([6, 6, 4], shortcut="projection") for kind in (fl, reference))
plain.load_state_dict(network.state_dict())
mlp = fl.ResidualMLP(6, 9)
both = torch.compile(lambda x: network(mlp(x)), fullgraph=True, backend="aot_eager")
x = torch.randn(3, 6, requires_grad=True)
y, expected = both(x), plain(x + mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x))))
torch.testing.assert_close(y, expected)
torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))
assert fl.stats()["torch"] == {"forward": 0, "backward": 0} and fl.stats()["fallback"] == {}, fl.stats()
"""


@pytest.mark.any_isa
@pytest.mark.slow
def test_compile_without_kernels():
    """The graph holds torch's operators, for a compiler to fuse. Tracing is not a call and is not counted."""
    result = run_python("none", COMPILED, FASTLANE_STRICT="1")
    assert result.returncode == 0, result.stderr[-2000:]


SAYS = """
import contextlib, io, torch
from fastlane_ext import cli
fl.linear_gelu_residual(torch.ones(2, 2), torch.ones(2, 2))
out = io.StringIO()
with contextlib.redirect_stdout(out):
    assert cli.main(["info"]) == 0
assert "none; FASTLANE_CPU_ISA asks for it" in out.getvalue(), out.getvalue()
facts = fl.build_info()
assert facts["cpu_isa_reason"] == "FASTLANE_CPU_ISA asks for it" and "none" not in facts["supported_isas"]
"""


@pytest.mark.any_isa
def test_none_is_said():
    result = run_python("none", SAYS, COLUMNS="200")
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.any_isa
def test_no_kernels_but_kernels_forced():
    code = "import torch; fl.linear_gelu_residual(torch.ones(2, 2), torch.ones(2, 2))"
    environment = os.environ | {"FASTLANE_CPU_ISA": "none", "FASTLANE_PATH": "fused"}
    command = [sys.executable, "-c", f"import fastlane_ext as fl; {code}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == (
        "ValueError: FASTLANE_PATH: got 'fused', expected library or nothing where fastlane_ext.cpu_isa() is 'none' "
        "(FASTLANE_CPU_ISA asks for it); set FASTLANE_CPU_ISA=scalar for the scalar kernels"
    )
