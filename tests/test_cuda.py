"""The layer and the stack on a CUDA GPU, with FASTLANE_PATH empty or library. What needs no GPU: test_cuda_host.py."""

from dataclasses import replace

import pytest
import torch
from support.cases import RESIDUALS, make_case, random, small_case
from support.choices import ACTIVATIONS, DTYPES, dtype_name
from support.exactness import assert_as_exact_as_eager
from support.layouts import ALL_LAYOUTS, LAYOUTS
from support.paths import PATH
from support.runs import as_function, eager_layer, run_fused
from test_layer_accuracy import repeated
from test_stack import SIZES as STACK_SIZES
from test_stack import Network, draw, each_shortcut, pooled_error
from test_stack import assert_as_exact_as_eager as assert_network_as_exact_as_eager

import fastlane_ext as fl
from fastlane_ext import reference

pytestmark = [pytest.mark.cuda, pytest.mark.any_isa]

# Rows and columns around the blocks of the elementwise passes, with and without 16-byte accesses.
SIZES = [
    (1, 1, 1),
    (1, 64, 33),
    (3, 7, 15),
    (8, 16, 32),
    (33, 8, 8),
    (129, 24, 264),
    (1000, 64, 64),
    (2049, 31, 2056),
    (70000, 8, 8),
    (64, 0, 8),
]
TENSORS = ("x", "weight", "bias", "residual_data", "grad")


def on_gpu(case, **layouts):
    moved = {name: getattr(case, name) for name in TENSORS}
    case = replace(case, **{name: t if t is None else t.cuda() for name, t in moved.items()})
    return case.with_layout(**layouts)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_never_less_exact_than_eager(dtype, activation, size):
    assert_as_exact_as_eager([on_gpu(case) for case in repeated(*size, dtype=dtype, activation=activation)])


def test_no_rows():
    assert_as_exact_as_eager([on_gpu(make_case((0,), 8, 8))])


@pytest.mark.parametrize("options", [{"bias": False}, {"recompute": True}, {"concat": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_options(dtype, options):
    assert_as_exact_as_eager([on_gpu(make_case((37,), 45, 51, dtype=dtype, **options))])
    assert_as_exact_as_eager([on_gpu(make_case((3, 16), 64, 128, dtype=dtype, **options))])


@pytest.mark.parametrize("residual", RESIDUALS)
def test_residuals(residual):
    assert_as_exact_as_eager([on_gpu(make_case((5, 7), 48, 48, residual=residual))])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_layouts(dtype, tensor, layout):
    assert_as_exact_as_eager([on_gpu(make_case((6, 20), 32, 64, dtype=dtype), **{tensor: layout})])


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_every_operand_in_one_layout(layout):
    assert_as_exact_as_eager([on_gpu(make_case((6, 20), 32, 64), **dict.fromkeys(TENSORS, layout))])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck(activation):
    call, leaves = as_function(on_gpu(small_case(activation=activation)))
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    fl.reset_stats()


@each_shortcut
@pytest.mark.parametrize("sizes", STACK_SIZES.values(), ids=STACK_SIZES)
def test_stack(sizes, shortcut):
    network = to_gpu(Network(sizes, shortcut))
    for shape in [(1,), (2, 3, 5), (130,), (0,), ()]:
        x, dy = (t.detach().cuda() for t in draw(network, shape, sizes))
        x.requires_grad_()
        for recompute in (False, True):
            got = network.results(x, dy, recompute=recompute)
            for a, b in zip(got, network.results(x, dy, reference), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    counts = [fl.stats()[path] for path in ("fused", "library", "hopper")]
    assert [sum(count[way] for count in counts) for way in ("forward", "backward")] == [10, 10]


def to_gpu(network):
    for tensors in network.lists:
        tensors[:] = [t if t is None else t.detach().cuda().requires_grad_() for t in tensors]
    return network


NARROW_SIZES = {
    "tiny": (3, 3, 3, 3, 3, 1),
    "published": (25, 25, 43, 43, 54, 54),
    "one layer": (20, 20),
    "equal": (64,) * 9,
    "more than fit at once": (64,) * 20,
    "128": (100, 128, 128, 7),
}
# Many rows several times: the largest error of one draw's few sums is luck.
NARROW_ROWS = (1, 7, 64, 100, 3000, 3000, 3000, 3000)


def scale_parameters(network, factor):
    """Scales the parameters so that through many layers no values or gradients vanish or leave float16's range."""
    with torch.no_grad():
        for tensor in network.parameters:
            tensor *= factor


def narrow_dtypes():
    return pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shortcut", ["identity", "none"])
@narrow_dtypes()
@pytest.mark.parametrize("sizes", NARROW_SIZES.values(), ids=NARROW_SIZES)
def test_a_narrow_stack(sizes, dtype, shortcut, activation):
    """The rule of exactness.py over all draws; one kernel wherever the widths allow it."""
    runs = []
    for seed, rows in enumerate(NARROW_ROWS):
        network = to_gpu(Network(sizes, shortcut, dtype=dtype, activation=activation, seed=seed))
        if len(sizes) > 10 and shortcut == "identity":
            scale_parameters(network, 0.5)
        x, dy = (t.detach().cuda() for t in draw(network, (rows,), sizes))
        runs.append((network, x.requires_grad_(), dy))
    assert_network_as_exact_as_eager(runs)
    if PATH != "library" and not (dtype == torch.float32 and max(sizes) > 64):
        calls = {"forward": len(NARROW_ROWS), "backward": len(NARROW_ROWS)}
        assert fl.stats()["fused"] == calls


@narrow_dtypes()
def test_a_narrow_stack_has_the_same_bits_however_it_runs(dtype):
    sizes = (64,) * 9
    network = to_gpu(Network(sizes, "identity", dtype=dtype))
    x, dy = (t.detach().cuda() for t in draw(network, (5000,), sizes))
    x.requires_grad_()
    first = network.results(x, dy)
    for options in ({}, {"recompute": True}):
        for a, b in zip(network.results(x, dy, **options), first, strict=True):
            assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(network.run(x), first[0])


@narrow_dtypes()
def test_a_hundred_narrow_layers(dtype):
    """Errors are at most twice eager's; they are pooled, since errors grow from layer to layer."""
    sizes = (32,) * 101
    network = to_gpu(Network(sizes, "identity", dtype=dtype))
    scale_parameters(network, 0.2)
    x, dy = (t.detach().cuda() for t in draw(network, (300,), sizes))
    x.requires_grad_()
    exact = network.results(x, dy, reference, double=True)
    fused, eager = (pooled_error(network.results(x, dy, kind), exact) for kind in (fl, reference))
    assert fused <= 2 * eager


@narrow_dtypes()
def test_a_narrow_stack_of_no_rows(dtype):
    sizes = (16, 16, 8)
    network = to_gpu(Network(sizes, "identity", dtype=dtype))
    x, dy = (t.detach().cuda() for t in draw(network, (0,), sizes))
    y, dx, *gradients = network.results(x.requires_grad_(), dy)
    assert y.shape == (0, 8) and dx.shape == (0, 16)
    assert all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@narrow_dtypes()
def test_layouts_of_a_narrow_stack(dtype, layout):
    sizes = (24, 24, 40)
    network = to_gpu(Network(sizes, "identity", dtype=dtype))
    x, dy = (t.detach().cuda() for t in draw(network, (70,), sizes))
    expected = network.results(x.requires_grad_(), dy)
    change = LAYOUTS[layout]
    network.weights = [change(w.detach()).requires_grad_() for w in network.weights]
    network.biases = [change(b.detach()).requires_grad_() for b in network.biases]
    got = network.results(change(x.detach()).requires_grad_(), change(dy))
    # The library's products of other strides need not have the same bits.
    close = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)


def test_subsets_of_a_narrow_stacks_gradients():
    sizes = (16, 24, 24, 8)
    network = to_gpu(Network(sizes, "identity", dtype=torch.bfloat16))
    x, dy = (t.detach().cuda() for t in draw(network, (300,), sizes))
    x.requires_grad_()
    leaves = [x, *network.parameters]
    expected = torch.autograd.grad(network.run(x), leaves, dy)
    for i, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        (got,) = torch.autograd.grad(network.run(x), [leaf], dy)
        assert torch.equal(got, expected[i]), i


@pytest.mark.parametrize("kind", [fl.ExampleDeepNeuralNetwork, fl.ImprovedResidualNetwork])
def test_networks_move_to_the_gpu(kind):
    torch.manual_seed(0)
    model = kind([8, 16, 16, 4])
    x = torch.randn(9, 8)
    expected = model(x)
    torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_same_bits_from_run_to_run(dtype):
    case = on_gpu(make_case((5000,), 96, 72, dtype=dtype))
    first = run_fused(case)
    for _ in range(5):
        for name, value in run_fused(case).items():
            assert torch.equal(value, first[name]), name


def test_no_synchronisation_and_the_current_stream():
    case = on_gpu(make_case((4096,), 128, 128))
    expected = run_fused(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # whatever ran elsewhere would be finished too early
        late = replace(case, x=case.x * 1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = run_fused(late)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_graph_capture_and_replay_with_new_data():
    case = on_gpu(make_case((64,), 32, 32))
    layer = fl.LinearGELUResidual(32, 32).cuda()
    x, grad = case.x.clone().requires_grad_(), case.grad.clone()

    def step():
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *layer.parameters()], grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            x.copy_(random(64, 32, dtype=torch.float32, seed=seed))
            grad.copy_(random(64, 32, dtype=torch.float32, seed=seed + 10))
        graph.replay()
        replayed = [t.clone() for t in captured]
        for a, b in zip(replayed, step(), strict=True):
            assert torch.equal(a, b)


def test_autocast():
    case = on_gpu(make_case((64,), 32, 48))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = fl.linear_gelu_residual(case.x, case.weight, case.bias)
        expected = eager_layer(case.x, case.weight, case.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    layer = fl.LinearGELUResidual(32, 32).cuda()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for rows in (4, 9):
        x = torch.randn(rows, 32, device="cuda", requires_grad=True)
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(layer(x).sum(), x))


def test_opcheck():
    pytest.importorskip("expecttest", reason="torch's opcheck needs expecttest")
    case = on_gpu(make_case((6,), 16, 16))
    arguments = [t.requires_grad_() for t in (case.x, case.weight, case.bias, case.residual_data)]
    torch.library.opcheck(torch.ops.fastlane.linear_gelu_residual.default, arguments)


def test_more_than_two_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    rows, features = (1 << 31) // 64 + 1000, 64
    if free < 5 * rows * features * 2:
        pytest.skip(f"needs {5 * rows * features * 2 >> 30} GiB of free GPU memory")
    weight, bias = (random(*shape, dtype=torch.bfloat16).cuda() for shape in [(features, features), (features,)])
    x = torch.zeros(rows, features, device="cuda", dtype=torch.bfloat16)
    tail = random(1000, features, dtype=torch.bfloat16).cuda()
    x[-1000:] = tail
    x.requires_grad_()
    y = fl.linear_gelu_residual(x, weight, bias, x)
    close = {"rtol": 2e-2, "atol": 2e-2}  # the library's product of other sizes need not have the same bits
    torch.testing.assert_close(y[-1000:], fl.linear_gelu_residual(tail, weight, bias, tail), **close)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    assert dx[-1000:].isfinite().all()
    torch.testing.assert_close(dx[0], dx[rows - 1001], **close)


def test_half_of_eagers_bytes_are_saved():
    def saved(call, *leaves):
        total, own = set(), {t.data_ptr() for t in leaves}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.add((t.data_ptr(), t.nbytes)) or t, lambda t: t):
            call()
        return sum(size for pointer, size in total if pointer not in own)

    layers = [torch.nn.Linear(64, 64).cuda() for _ in range(16)]
    x = torch.randn(512, 64, device="cuda")
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    fused = saved(lambda: fl.residual_stack(x, weights, biases), x, *weights, *biases)
    eager = saved(lambda: reference.residual_stack(x, weights, biases), x, *weights, *biases)
    assert fused <= 0.55 * eager


def test_tensors_on_different_devices():
    case = on_gpu(small_case(torch.float32))
    with pytest.raises(RuntimeError, match="weight is on cpu, expected cuda:0 like x") as error:
        fl.linear_gelu_residual(case.x, case.weight.cpu())
    assert "\n" not in str(error.value).split("\nException raised from")[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one():
    case = make_case((40,), 32, 32)
    expected = run_fused(on_gpu(case))
    moved = {name: getattr(case, name).to("cuda:1") for name in TENSORS}
    with torch.cuda.device(0):
        got = run_fused(replace(case, **moved))
    for name, value in got.items():
        assert value.device.index == 1
        torch.testing.assert_close(value.cpu(), expected[name].cpu())
