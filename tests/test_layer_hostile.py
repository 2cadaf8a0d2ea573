"""Inputs and surroundings that broke packages of this kind: one layer survives them."""

import itertools
import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import (
    ACTIVATIONS,
    DTYPES,
    assert_as_exact_as_eager,
    dtype_name,
    eager_layer,
    fused_layer,
    make_case,
    run_eager,
    run_fused,
)

import fastlane_ext as fl

poisoned = pytest.mark.usefixtures("poisoned_memory")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


# Shapes


@poisoned
@every_dtype
@pytest.mark.parametrize("concat", [False, True], ids=["residual", "concat"])
@pytest.mark.parametrize(
    ("shape", "in_features", "out_features"),
    [
        ((0,), 3, 4),
        ((2, 0), 3, 4),
        ((0, 5), 3, 3),
        ((2, 0, 5), 1, 1),
        ((), 3, 4),
        ((), 1, 1),
        ((), 0, 3),
        ((5,), 0, 3),
        ((0,), 0, 3),
        ((5,), 3, 0),
        ((5,), 0, 0),
        ((0,), 0, 0),
        ((1,), 3, 4),
        ((1,), 1, 1),
        ((5,), 1, 4),
        ((5,), 3, 1),
        ((2, 1, 3, 2), 3, 4),
        ((1, 1, 1, 1), 3, 4),
        ((2, 3, 1, 2, 2), 3, 4),
    ],
    ids=str,
)
def test_shapes(shape, in_features, out_features, concat, dtype):
    """No rows: empty output, zero dW and db. No features: act(b) + residual. 1-D and 5-D: as `F.linear`."""
    case = make_case(shape, in_features, out_features, dtype=dtype, concat=concat)
    got = run_fused(case)
    for name, expected in run_eager(case).items():
        assert got[name].shape == expected.shape and got[name].dtype == expected.dtype, name
        tolerance = {"rtol": 4e-2, "atol": 4e-2} if dtype.itemsize == 2 else {}
        torch.testing.assert_close(got[name], expected, **tolerance)
        if math.prod(shape) == 0:
            assert (got[name] == 0).all(), name


EMPTY_FIRST = """
import torch
torch.use_deterministic_algorithms(True)  # fills new memory with NaN
import fastlane_ext as fl
x = torch.zeros(0, 3, requires_grad=True)
weight = torch.zeros(4, 3, requires_grad=True)
bias = torch.zeros(4, requires_grad=True)
fl.linear_gelu_residual(x, weight, bias).sum().backward()
assert (weight.grad == 0).all() and (bias.grad == 0).all(), (weight.grad, bias.grad)
assert fl.stats()["fused"] == {"forward": 1, "backward": 1}
"""


def run_python(code, **environment):
    """Runs code in a fresh interpreter; returns its output's last line, read as JSON if it is JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None


@pytest.mark.any_isa
def test_no_rows_as_the_first_call_of_a_process():
    """Work memory of size zero has no address yet; the gradients are written all the same."""
    run_python(EMPTY_FIRST)


# Addresses and strides


@poisoned
@every_dtype
@pytest.mark.parametrize("operand", ["x", "weight", "bias", "residual_data", "grad"])
@pytest.mark.parametrize("size", [(5, 7, 9), (33, 64, 48)], ids=str)
def test_base_off_by_one_element(size, operand, dtype):
    rows, in_features, out_features = size
    case = make_case((rows,), in_features, out_features, dtype=dtype)
    moved = case.with_layout(**{operand: "misaligned"})
    element = case.x.element_size()
    assert getattr(moved, operand).data_ptr() % 16 == element
    expected = run_fused(case)
    for name, got in run_fused(moved).items():
        assert torch.equal(got, expected[name]), name


@poisoned
@every_dtype
def test_output_into_a_slice_off_by_one(dtype):
    """Concatenation writes behind x: with an odd width every row starts at another offset."""
    for in_features in range(1, 18):
        case = make_case((5,), in_features, 33, dtype=dtype, concat=True)
        got = run_fused(case)["y"]
        assert torch.equal(got[:, :in_features], case.x)
        activated = fl.linear_gelu_residual(case.x, case.weight, case.bias)
        assert torch.equal(got[:, in_features:], activated)


@pytest.fixture(scope="module")
def far_apart():
    """rows × cols views whose last elements lie beyond 2^31 elements; only the touched pages take memory."""
    step = 2**30 + 8
    try:
        memory = torch.empty(2 * step + 8 * 8192, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space are needed: {error}")

    def make(t, stride_of, slot):
        strides = (step, 1) if stride_of == "rows" else (1, step)
        view = memory.as_strided(t.shape, strides, slot * 8192)
        return view.copy_(t)

    return make


@pytest.mark.parametrize("far", ["rows", "columns"])
@pytest.mark.parametrize("operand", ["x", "weight", "residual_data", "grad"])
def test_strides_beyond_31_bits(operand, far, far_apart):
    """A row number times a leading dimension needs 64 bits."""
    rows, in_features, out_features = {
        ("x", "rows"): (3, 65, 5),
        ("x", "columns"): (65, 3, 5),
        ("weight", "rows"): (5, 65, 3),
        ("weight", "columns"): (5, 3, 65),
    }.get((operand, far), (3, 7, 65) if far == "rows" else (65, 7, 3))
    case = make_case((rows,), in_features, out_features, dtype=torch.bfloat16)
    expected = run_fused(case)
    setattr(case, operand, far_apart(getattr(case, operand), far, slot=1))
    for name, got in run_fused(case).items():
        assert torch.equal(got, expected[name]), name


# Values


def spared(t, row=None, column=None):
    """t without a row and a column."""
    rows, columns = (torch.ones(size, dtype=torch.bool) for size in t.shape)
    if row is not None:
        rows[row] = False
    if column is not None:
        columns[column] = False
    return t[rows][:, columns]


bad_values = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def limit_of_layer(z, residual, activation):
    """act(±inf or NaN) + residual."""
    return (z if activation == "none" else torch.where(z == -math.inf, torch.zeros_like(z), z)) + residual


@poisoned
@bad_values
@each_activation
@every_dtype
def test_a_bad_row_of_x_taints_its_row(dtype, activation, bad):
    case = make_case((29,), 21, 37, dtype=dtype, activation=activation)
    clean = run_fused(case)
    case.x[7, 3] = bad
    got = run_fused(case)
    for name in ("y", "dx"):
        assert torch.equal(spared(got[name], row=7), spared(clean[name], row=7)), name
    expected = limit_of_layer(bad * case.weight[:, 3], case.residual_data[7], activation)
    torch.testing.assert_close(got["y"][7], expected, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(got["dresidual"], clean["dresidual"])
    if activation == "none":  # dz is dy, whatever z is
        assert torch.equal(got["dx"], clean["dx"]) and torch.equal(got["dbias"], clean["dbias"])
        assert torch.equal(spared(got["dweight"], column=3), spared(clean["dweight"], column=3))
    elif math.isinf(bad):  # GELU′ of ±inf is 0 or 1
        assert got["dx"].isfinite().all() and got["dbias"].isfinite().all()
        assert spared(got["dweight"], column=3).isfinite().all()
        passed = (bad * case.weight[:, 3] > 0).to(dtype) * case.grad[7]
        torch.testing.assert_close(got["dx"][7], passed @ case.weight, rtol=2e-2, atol=2e-2)
    else:
        assert got["dx"][7].isnan().all() and got["dbias"].isnan().all() and got["dweight"].isnan().all()


@poisoned
@bad_values
@each_activation
@every_dtype
def test_a_bad_row_of_the_weight_taints_its_column(dtype, activation, bad):
    case = make_case((29,), 21, 37, dtype=dtype, activation=activation)
    clean = run_fused(case)
    case.weight[11, 5] = bad
    got = run_fused(case)
    assert torch.equal(spared(got["y"], column=11), spared(clean["y"], column=11))
    expected = limit_of_layer(bad * case.x[:, 5], case.residual_data[:, 11], activation)
    torch.testing.assert_close(got["y"][:, 11], expected, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(got["dresidual"], clean["dresidual"])
    assert torch.equal(spared(got["dweight"], row=11), spared(clean["dweight"], row=11))
    others = torch.arange(37) != 11
    assert torch.equal(got["dbias"][others], clean["dbias"][others])
    if activation == "none":
        assert torch.equal(spared(got["dx"], column=5), spared(clean["dx"], column=5))
        assert torch.equal(got["dweight"], clean["dweight"]) and torch.equal(got["dbias"], clean["dbias"])
    elif math.isinf(bad):
        assert spared(got["dx"], column=5).isfinite().all()
        assert got["dweight"].isfinite().all() and got["dbias"].isfinite().all()
    else:
        assert got["dx"].isnan().all() and got["dweight"][11].isnan().all() and got["dbias"][11].isnan()


@poisoned
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@every_dtype
def test_huge_preactivations(dtype, activation):
    """|z| up to the dtype's limit: y is z or 0, gradients pass or stop, nothing is NaN."""
    big = 1e4 if dtype == torch.float16 else 1e20
    signs = torch.tensor([[1.0], [-1.0], [1.0]], dtype=dtype)
    x = (big * signs).requires_grad_()
    weight = torch.ones(35, 1, dtype=dtype, requires_grad=True)
    bias = torch.zeros(35, dtype=dtype, requires_grad=True)
    y = fl.linear_gelu_residual(x, weight, bias, activation=activation)
    assert torch.equal(y, x.detach().clamp(min=0).expand(3, 35))
    dx, dbias = torch.autograd.grad(y, (x, bias), torch.ones_like(y))
    assert dx.flatten().tolist() == [35, 0, 35] and (dbias == 2).all()


@poisoned
@every_dtype
def test_denormals_are_kept(dtype):
    """Through every operand, forward and backward: no flush to zero."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    one = torch.ones(1, 1, dtype=dtype)
    small = torch.full((1, 1), tiny, dtype=dtype)
    zero = torch.zeros(1, 1, dtype=dtype)
    assert small.item() != 0
    for x, weight, bias, residual in ((small, one, None, None), (one, small, None, None),
                                      (zero, one, small[0], None), (zero, one, None, small)):  # fmt: skip
        y = fl.linear_gelu_residual(x, weight, bias, residual, activation="none")
        assert torch.equal(y, small)
    leaves = [t.clone().requires_grad_() for t in (one, one, one[0], one)]
    y = fl.linear_gelu_residual(*leaves, activation="none")
    for grad in torch.autograd.grad(y, leaves, small):
        assert grad.item() == small.item()


@poisoned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_large_sums(dtype):
    """K and M in the thousands: the float32 sum is rounded once."""
    assert_as_exact_as_eager([make_case((3,), 4099, 5, dtype=dtype), make_case((4099,), 3, 5, dtype=dtype)])


@poisoned
def test_bias_is_added_once():
    """Also where K is cut into blocks, whatever their number."""
    for in_features in (1, 255, 256, 257, 512, 513, 1100):
        case = make_case((3,), in_features, 5, integers=True, activation="none", residual="none")
        case.x.zero_()
        case.bias.fill_(1000)
        assert (run_fused(case)["y"] == 1000).all()


# Threads

PARALLEL_CASES = [
    ((300,), 120, 70, {}),
    ((300,), 120, 120, {"residual": "x"}),
    ((2, 150), 64, 1100, {"residual": "none"}),
    ((5,), 520, 1030, {}),
    ((1025,), 33, 31, {"concat": True}),
    ((3000,), 16, 16, {"residual": "row", "recompute": True}),
    ((300,), 16, 1100, {"residual": "column"}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", PARALLEL_CASES, ids=lambda c: f"{c}".replace(" ", ""))
def test_same_bits_for_any_number_of_threads(case, dtype, restore_threads):
    shape, in_features, out_features, options = case
    case = make_case(shape, in_features, out_features, dtype=dtype, **options)
    torch.set_num_threads(1)
    expected = run_fused(case)
    for threads in (2, 3, 4, 3, 1, 2, 2, 2):  # the last ones: from run to run, too
        torch.set_num_threads(threads)
        got = run_fused(case)
        for name, value in expected.items():
            assert torch.equal(got[name], value), f"{name}, {threads} threads"


@pytest.mark.any_isa
def test_same_bits_for_a_scalar_residual(restore_threads):
    """Its gradient is the sum of all of dy, which torch's own full reduction cuts by the number of threads."""
    case = make_case((300,), 16, 1100, residual="scalar")
    torch.set_num_threads(1)
    expected = run_fused(case)["dresidual"]
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(run_fused(case)["dresidual"], expected), f"{threads} threads"


def forward_backward(case):
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.weight, case.bias)]
    y = fused_layer(*leaves, activation=case.activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, case.grad)]


def test_many_python_threads(assert_fused):
    """Work memory belongs to the thread: calls of all sizes at once give what they give alone."""
    cases = [
        make_case((rows,), k, n, dtype=dtype, seed=rows, residual="none")
        for (rows, k, n), dtype in zip(
            [(3, 5, 7), (97, 257, 33), (300, 64, 64), (1, 300, 1030), (500, 17, 3)] * 4,
            itertools.cycle(DTYPES),
            strict=False,
        )
    ]
    expected = [forward_backward(case) for case in cases]
    barrier = threading.Barrier(8)

    def work(number):
        barrier.wait()
        order = cases[number:] + cases[:number]
        return [forward_backward(case) for case in order]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for number, result in enumerate(results):
        for got, wanted in zip(result, expected[number:] + expected[:number], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert_fused(forward=9 * len(cases), backward=9 * len(cases))


def test_threads_changed_by_another_thread(restore_threads):
    case = make_case((300,), 120, 70, residual="none")
    expected = forward_backward(case)
    stop = threading.Event()

    def change():
        for threads in itertools.cycle((1, 2, 3)):
            torch.set_num_threads(threads)
            if stop.wait(0.001):
                return

    other = threading.Thread(target=change)
    other.start()
    try:
        for _ in range(50):
            assert all(torch.equal(a, b) for a, b in zip(forward_backward(case), expected, strict=True))
    finally:
        stop.set()
        other.join()


FORK = """
import os, sys, torch
import fastlane_ext as fl
torch.manual_seed(0)
torch.set_num_threads({parent})
x, weight, bias = torch.randn(300, 120), torch.randn(120, 120, requires_grad=True), torch.randn(120)
def step():
    y = fl.linear_gelu_residual(x, weight, bias, x)
    return [y, *torch.autograd.grad(y.sum(), weight)]
expected = step()
child = os.fork()
if child == 0:
    try:
        if {child}:
            torch.set_num_threads({child})
        same = all(torch.equal(a, b) for a, b in zip(step(), expected))
        os._exit(0 if same else 3)
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(4)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert all(torch.equal(a, b) for a, b in zip(step(), expected))
"""


@pytest.mark.any_isa
def test_fork_after_use():
    """As a DataLoader worker does it: the pool is gone, the child has one thread, the bits are the same.

    With more threads a forked child hangs in eager PyTorch as well: GNU OpenMP does not survive a fork.
    """
    run_python(FORK.format(parent=2, child=1))


class Layered(torch.utils.data.Dataset):
    def __init__(self):
        self.case = make_case((300,), 120, 120, residual="none")

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.no_grad():
            return fused_layer(self.case.x * (index + 1), self.case.weight, self.case.bias)


@pytest.mark.any_isa
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_data_loader_workers():
    data = Layered()
    expected = [data[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, timeout=60)
    for got, wanted in zip(loader, expected, strict=True):
        assert torch.equal(got, wanted)


# The environment

DISABLED = """
import json, torch
import torch.nn.functional as F
import fastlane_ext as fl
torch.manual_seed(0)
x, weight, bias, residual = (torch.randn(*s, requires_grad=True) for s in ((5, 4), (3, 4), (3,), (5, 3)))
for z in (None, torch.ones(5, 3)):
    y = fl.linear_gelu_residual(x, weight, bias, z)
    eager = F.gelu(F.linear(x, weight, bias))
    assert torch.equal(y, eager if z is None else eager + z)
    y.sum().backward()
with torch.no_grad():
    fl.linear_gelu_residual(x, weight)
    assert torch.equal(fl.linear_gelu_concat(x, weight, bias), torch.cat([x, eager], -1))
with torch.inference_mode():
    fl.linear_gelu_residual(x * 1, weight * 1)
print(json.dumps(fl.stats()))
"""


@pytest.mark.any_isa
def test_disable():
    stats = run_python(DISABLED, FASTLANE_DISABLE="1")
    assert stats == {"fused": {"forward": 0, "backward": 0}, "fallback": {"FASTLANE_DISABLE is set": 5}}


@pytest.mark.any_isa
@pytest.mark.parametrize("value", ["", "0"])
def test_disable_off(value):
    code = "import torch, json, fastlane_ext as fl; fl.linear_gelu_residual(torch.ones(2, 2), torch.ones(2, 2));"
    code += "print(json.dumps(fl.stats()))"
    assert run_python(code, FASTLANE_DISABLE=value)["fused"]["forward"] == 1


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("reason", "leave"),
    [
        (
            "backward with create_graph=True",
            lambda x: torch.autograd.grad(fused_layer(x, x).sum(), x, create_graph=True),
        ),
        ("vmap over weight or bias", lambda x: torch.vmap(fused_layer, (None, 0))(x, x.expand(2, 3, 3))),
        ("a torch.func transform is active", torch.func.grad(lambda x: fused_layer(x, x).sum())),
        ("forward-mode AD", lambda x: forward_mode(x)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_strict(reason, leave, monkeypatch):
    """Raises, with the reason, where the same call without FASTLANE_STRICT runs in eager and is counted."""
    x = torch.randn(3, 3, requires_grad=True)
    monkeypatch.setenv("FASTLANE_STRICT", "1")
    with pytest.raises(RuntimeError, match="FASTLANE_STRICT") as error:
        leave(x)
    assert reason in str(error.value)
    assert fl.stats()["fallback"] == {}
    fused_layer(x, x, None, x).sum().backward()
    monkeypatch.delenv("FASTLANE_STRICT")
    leave(x)
    assert list(fl.stats()["fallback"]) == [reason]
    fl.reset_stats()


def forward_mode(x):
    import torch.autograd.forward_ad as fwAD

    with fwAD.dual_level():
        return fused_layer(fwAD.make_dual(x, torch.ones_like(x)), x)


@pytest.mark.any_isa
def test_unknown_isa():
    """Importing still works, so that `info` can say what is wrong; the first use says it in one line."""
    code = """
import json, torch, fastlane_ext as fl
messages = []
for use in (fl.cpu_isa, lambda: fl.linear_gelu_residual(torch.ones(2, 2), torch.ones(2, 2)), fl.cpu_isa):
    try:
        use()
    except RuntimeError as error:
        messages.append(str(error))
print(json.dumps([messages, fl.build_info()["supported_isas"]]))
"""
    messages, supported = run_python(code, FASTLANE_CPU_ISA="neon")
    assert len(messages) == 3
    for message in messages:
        assert "FASTLANE_CPU_ISA: got 'neon'" in message and ", ".join(supported) in message


IMPORT = """
import json, os, signal, sys, warnings
import torch

def state():
    return {
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "rng": torch.get_rng_state().tolist(),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "denormal": (torch.tensor([1e-40]) * 0.5).item(),
        "denormal in python": 1e-310 * 0.5,
        "matmul": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "cuda": torch.cuda.is_initialized(),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "signals": [str(signal.getsignal(s)) for s in signal.valid_signals()],
        "except hook": str(sys.excepthook),
        "path": sys.path,
    }

before = state()
import fastlane_ext as fl
imported = state()
x = torch.ones(300, 120, requires_grad=True)
rng = torch.get_rng_state().tolist()
fl.linear_gelu_residual(x, torch.ones(120, 120), None, x).sum().backward()
used = state()
assert used["denormal"] != 0
print(json.dumps([[k for k in before if before[k] != after[k]] for after in (imported, used)]))
"""


@pytest.mark.any_isa
def test_importing_and_using_changes_no_global_state():
    """No threads set, no CUDA context, no denormal mode, no random number drawn."""
    assert run_python(IMPORT) == [[], []]


@pytest.mark.any_isa
def test_heavy_packages_are_not_imported():
    code = "import json, sys, torch; before = set(sys.modules); import fastlane_ext;"
    code += "print(json.dumps(sorted(m.split('.')[0] for m in set(sys.modules) - before)))"
    assert not {"rich", "matplotlib", "sklearn", "scipy"} & set(run_python(code))


@pytest.mark.any_isa
def test_eager_helper_is_not_the_fused_layer():
    """The oracle's eager side must not have become a second call of the kernels."""
    case = make_case((3,), 4, 5)
    eager_layer(case.x, case.weight)
    assert fl.stats()["fused"]["forward"] == 0
