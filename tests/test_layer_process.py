"""Threads, forks, environment variables, global state: surroundings that broke packages of this kind."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from support.cases import make_case
from support.choices import DTYPES, dtype_name
from support.runs import eager_layer, fused_layer, run_fused
from support.subprocesses import HANG_S, run_python

import fastlane_ext as fl

poisoned = pytest.mark.usefixtures("poisoned_memory")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


# Threads

PARALLEL_CASES = [
    ((300,), 120, 70, {}),
    ((300,), 120, 120, {"residual": "x"}),
    ((2, 150), 64, 1100, {"residual": "none"}),
    ((5,), 520, 1030, {}),
    ((1025,), 33, 31, {"concat": True}),
    ((3000,), 16, 16, {"residual": "row", "recompute": True}),
    ((300,), 16, 1100, {"residual": "column"}),
    # inner products; column blocks of a thread's own; one chunk of a narrow layer and a run; its largest chunks
    ((9,), 1025, 1031, {}),
    ((33,), 1025, 1031, {"activation": "none"}),
    ((385,), 100, 257, {}),
    ((64 * 384 + 1,), 16, 48, {"residual": "none"}),
]


def assert_same_bits(case, threads):
    """Any number of threads gives the same bits as one thread."""
    torch.set_num_threads(1)
    expected = run_fused(case)
    for count in threads:
        torch.set_num_threads(count)
        got = run_fused(case)
        for name, value in expected.items():
            assert torch.equal(got[name], value), f"{name}, {count} threads"


@pytest.mark.own_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", PARALLEL_CASES, ids=lambda c: f"{c}".replace(" ", ""))
def test_same_bits_for_any_number_of_threads(case, dtype, restore_threads):
    shape, in_features, out_features, options = case
    case = make_case(shape, in_features, out_features, dtype=dtype, **options)
    assert_same_bits(case, (2, 3, 4, 3, 1, 2, 2, 2))  # the last ones: from run to run, too


@pytest.mark.own_kernels
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("rows", [*range(1, 18), 24, 25, 48, 128])
def test_same_bits_of_few_rows(rows, layout, restore_threads):
    """From 4 rows on the threads share the columns; every third time x has a layout of its own."""
    x = ("contiguous", "padded", "transposed")[rows % 3]
    for dtype in DTYPES:
        case = make_case((rows,), 131, 263, dtype=dtype)
        assert_same_bits(case.with_layout(x=x, weight=layout), (2, 3, 4))


@pytest.mark.own_product
@every_dtype
def test_rows_have_the_same_bits_in_any_batch_where_sums_run_across_the_weight(dtype):
    """Forward with a weight stored (in, out), dx with one stored (out, in): few rows, read in place, meet the additions
    of tiles, over more than a block of them. Not one or two rows in bf16, where more may multiply pairs, nor a single
    row's dx, which the library computes."""
    long = 4200 if dtype == torch.bfloat16 else 2100
    whole = make_case((300,), 263, long, dtype=dtype, activation="none")
    across = make_case((300,), long, 263, dtype=dtype).with_layout(weight="transposed")
    y, dx = run_fused(across)["y"], run_fused(whole)["dx"]
    for rows in (1, 2, 3, 5, 6, 7, 12, 13, 24, 25, 48, 49, 96, 97, 128, 129):
        if dtype == torch.bfloat16 and rows <= 2:
            continue
        assert torch.equal(run_fused(first_rows(across, rows))["y"], y[:rows]), rows
        if rows > 1:
            assert torch.equal(run_fused(first_rows(whole, rows))["dx"], dx[:rows]), rows


def first_rows(case, rows):
    return replace(case, **{name: getattr(case, name)[:rows] for name in ("x", "residual_data", "grad")})


@pytest.mark.own_kernels
@pytest.mark.parametrize("rows", [33, 385])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_same_bits_for_a_column_major_weight(activation, layout, rows, restore_threads):
    """dweight is column-major, too, in one pass or in two; x along k or across it."""
    for dtype in DTYPES:
        for in_features, out_features in ((35, 129), (257, 300)):
            case = make_case((rows,), in_features, out_features, dtype=dtype, activation=activation)
            assert_same_bits(case.with_layout(x=layout, weight="transposed"), (2, 3, 4, 2))


@pytest.mark.own_kernels
@pytest.mark.parametrize("size", [(9, 257, 300), (33, 257, 1100), (33, 1025, 600), (385, 35, 129)], ids=str)
@pytest.mark.parametrize("operand", ["x", "weight", "grad"])
def test_same_bits_with_a_denormal(operand, size, restore_threads):
    """If one thread finds a denormal in bf16, all compute again: either every element is computed once more or none."""
    rows, in_features, out_features = size
    case = make_case((rows,), in_features, out_features, dtype=torch.bfloat16, activation="none")
    getattr(case, operand)[-1, -1] = torch.finfo(torch.bfloat16).smallest_normal / 2
    assert_same_bits(case, (2, 3, 4, 2))


@pytest.mark.any_isa
@pytest.mark.parametrize("grad", ["contiguous", "transposed", "stepped", "expanded_columns", "scalar"])
@pytest.mark.parametrize("residual", ["scalar", "row", "column"])
def test_same_bits_for_a_broadcast_residual(residual, grad, restore_threads):
    """The gradient of a broadcast residual is a sum over dy. torch would cut a full sum, and a strided one, by the
    number of threads.
    """
    case = make_case((300,), 16, 1100, residual=residual).with_layout(grad=grad)
    torch.set_num_threads(1)
    expected = run_fused(case)["dresidual"]
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(run_fused(case)["dresidual"], expected), f"{threads} threads"


def forward_backward(case):
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.weight, case.bias)]
    y = fused_layer(*leaves, activation=case.activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, case.grad)]


@pytest.mark.own_kernels
def test_many_python_threads(assert_fused):
    """Each thread has its own work memory: calls of all sizes at once give the same results as alone."""
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


@pytest.mark.own_kernels
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
    """A fork like a DataLoader worker's: the pool is gone, the child has one thread, the bits are the same.

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
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, timeout=HANG_S)
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
    assert stats == {
        "fused": {"forward": 0, "backward": 0},
        "library": {"forward": 0, "backward": 0},
        "hopper": {"forward": 0, "backward": 0},
        "torch": {"forward": 0, "backward": 0},
        "fallback": {"FASTLANE_DISABLE is set": 5},
    }


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
def test_strict(reason, leave, set_strict):
    """A call raises, with the reason, where without FASTLANE_STRICT it runs in eager and is counted."""
    x = torch.randn(3, 3, requires_grad=True)
    set_strict(True)
    with pytest.raises(RuntimeError, match="FASTLANE_STRICT") as error:
        leave(x)
    assert reason in str(error.value)
    assert fl.stats()["fallback"] == {}
    fused_layer(x, x, None, x).sum().backward()
    set_strict(False)
    leave(x)
    assert list(fl.stats()["fallback"]) == [reason]
    fl.reset_stats()


def forward_mode(x):
    import torch.autograd.forward_ad as fwAD

    with fwAD.dual_level():
        return fused_layer(fwAD.make_dual(x, torch.ones_like(x)), x)


@pytest.mark.any_isa
@pytest.mark.parametrize("variable", ["FASTLANE_STRICT", "FASTLANE_DISABLE"])
def test_variables_are_read_once(variable):
    """Variables are read when they are first needed; later values change nothing."""
    code = """
import json, os, torch, fastlane_ext as fl
def leave():
    try:
        torch.vmap(fl.linear_gelu_residual, (None, 0))(torch.ones(2, 2), torch.ones(3, 2, 2))
        return str(sorted(fl.stats()["fallback"]))
    except RuntimeError as error:
        return str(error)
said = [leave()]
fl.reset_stats()
os.environ[VARIABLE] = "1" if os.environ.get(VARIABLE) != "1" else "0"
print(json.dumps([*said, leave()]))
""".replace("VARIABLE", repr(variable))
    for value in ("", "1"):
        before, after = run_python(code, **{variable: value})
        assert before == after
        assert before.startswith("FASTLANE_STRICT: ") == (value == "1" and variable == "FASTLANE_STRICT")


@pytest.mark.any_isa
def test_unknown_isa():
    """Importing still works, so that `info` can report the error; the first use raises it in one line."""
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
    messages, supported = run_python(code, FASTLANE_CPU_ISA="abacus")
    assert len(messages) == 3
    for message in messages:
        assert "FASTLANE_CPU_ISA: got 'abacus'" in message and ", ".join(supported) in message


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
    """The oracle's eager side must not call the kernels by mistake."""
    case = make_case((3,), 4, 5)
    eager_layer(case.x, case.weight)
    assert fl.stats()["fused"]["forward"] == 0
