"""The fused CUDA products, with FASTLANE_PATH=fused on a GPU of capability 9.0: forward and dgrad must take one."""

import pytest
import torch
from support.cases import make_case
from support.choices import ACTIVATIONS, dtype_name
from support.exactness import assert_as_exact_as_eager
from support.runs import run_fused
from test_cuda import assert_network_as_exact_as_eager, on_gpu, to_gpu
from test_cuda_mlp import check as assert_mlps_as_exact_as_eager
from test_cuda_mlp import on_gpu as mlp_on_gpu
from test_mlp import make_mlp, pooled
from test_mlp import run_fused as run_fused_mlp
from test_stack import Network, draw, each_shortcut

import fastlane_ext as fl

pytestmark = [pytest.mark.hopper, pytest.mark.any_isa]

# Rows, in, out: less than a tile; edges of each tile and of the cluster of two.
SIZES = [(8, 8, 8), (100, 72, 40), (128, 64, 256), (257, 136, 264), (1000, 520, 776), (5000, 1032, 1032)]
# Rows, in, hidden, out: fc2's dgrad goes on through the activation.
MLP_SIZES = [(8, 8, 16, 8), (100, 72, 264, 40), (257, 136, 1000, 264), (3000, 520, 1032, 256)]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[256, 192, 128], ids=lambda cols: f"tile 128x{cols}")
def tile(request):
    """Every product that has a kernel with this tile gets the tile."""
    fl._C.force_hopper_tile(request.param)
    yield
    fl._C.force_hopper_tile(0)


def assert_every_product_was_fused(forward=None):
    counts = fl.stats()
    assert counts["library"] == {"forward": 0, "backward": 0}
    assert counts["hopper"]["forward"] > 0 if forward is None else counts["hopper"]["forward"] == forward


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_hopper_never_less_exact_than_eager(tile, dtype, activation, size):
    rows, *features = size
    assert_as_exact_as_eager([on_gpu(make_case((rows,), *features, dtype=dtype, activation=activation))])
    assert_every_product_was_fused()


@pytest.mark.parametrize("residual", ["none", "tensor", "x"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"recompute": True}, {"concat": True}], ids=str)
def test_hopper_small(tile, options, residual):
    if options.get("concat") and residual != "none":
        pytest.skip("a concatenation adds nothing")
    case = make_case((3, 50), 64, 64, dtype=torch.bfloat16, residual=residual, **options)
    assert_as_exact_as_eager([on_gpu(case)])
    assert_every_product_was_fused()


@pytest.mark.parametrize("size", [(300, 128, 192), SIZES[-1]], ids=["small", "large"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_inference_gives_the_same_bits_as_training(tile, dtype, size):
    rows, *features = size
    case = on_gpu(make_case((rows,), *features, dtype=dtype))
    expected = fl.linear_gelu_residual(case.x, case.weight, case.bias, case.residual_data)
    with torch.no_grad():
        got = fl.linear_gelu_residual(case.x, case.weight, case.bias, case.residual_data)
    assert torch.equal(got, expected)
    assert_every_product_was_fused(forward=2)


@pytest.mark.parametrize("size", MLP_SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_mlp_never_less_exact_than_eager(tile, dtype, activation, size):
    assert_mlps_as_exact_as_eager(pooled(*size, dtype=dtype, activation=activation))
    assert_every_product_was_fused()


# Three rows of tiles: the second cluster has a block beside the matrix.
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"residual": "x"}], ids=str)
def test_hopper_small_mlp(tile, options):
    assert_mlps_as_exact_as_eager([make_mlp((3, 100), 64, 320, 64, dtype=torch.bfloat16, **options)])
    assert_every_product_was_fused()


def run_stacks(sizes, shortcut, rows_of_each, **options):
    runs = []
    for seed, rows in enumerate(rows_of_each):
        network = to_gpu(Network(sizes, shortcut, seed=seed, **options))
        x, dy = (t.detach().cuda() for t in draw(network, (rows,), sizes))
        runs.append((network, x.requires_grad_(), dy))
    assert_network_as_exact_as_eager(runs)
    assert fl.stats()["hopper"] == {"forward": len(runs), "backward": len(runs)}


@pytest.mark.parametrize("shortcut", ["identity", "none"])
def test_hopper_small_stack(shortcut):
    run_stacks((136, 136, 136, 136), shortcut, [300], dtype=torch.bfloat16)


@each_shortcut
@pytest.mark.parametrize("sizes", [(256, 256, 256, 256), (136, 264, 264, 520)], ids=["equal", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_wide_stack_never_less_exact_than_eager(dtype, sizes, shortcut):
    run_stacks(sizes, shortcut, [1, 100, 128, 300, 1000], dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_dgrads_go_on_through_the_activation_before(dtype, activation):
    """The names of the kernels show this; a dgrad with a pass after it would give nearly the same numbers."""

    def count(call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert any("GemmUniversal" in event.name for event in events), "no kernel was seen"
        return sum("TimesSlope" in event.name for event in events)

    goes_on = activation != "none"
    mlp = mlp_on_gpu(make_mlp(300, 64, 320, 64, dtype=dtype, activation=activation))
    assert count(lambda: run_fused_mlp(mlp)) == goes_on
    for shortcut, expected in (("identity", 2), ("none", 2), ("projection", 2), ("concat", 0)):
        sizes = (136, 136, 264, 264)
        network = to_gpu(Network(sizes, shortcut, dtype=dtype, activation=activation))
        x, dy = (t.detach().cuda() for t in draw(network, (300,), sizes))
        x.requires_grad_()
        assert count(lambda network=network, x=x, dy=dy: network.results(x, dy)) == goes_on * expected, shortcut


def test_an_mlp_never_stores_the_gradient_before_the_activation():
    """This gradient overflows float16; times gelu′(−5) it does not. Finite gradients show a float32 epilogue."""
    rows, in_features, hidden, out_features = 40, 64, 264, 64
    full = lambda *shape, value: torch.full(shape, value, dtype=torch.float16, device="cuda")  # noqa: E731
    x, fc1_weight = full(rows, in_features, value=1), full(hidden, in_features, value=-5 / 64)
    fc2_weight, dy = full(out_features, hidden, value=100), full(rows, out_features, value=32)
    leaves = [t.requires_grad_() for t in (x, fc1_weight, full(hidden, value=0), fc2_weight)]
    grads = torch.autograd.grad(fl.mlp_residual(*leaves, fc2_bias=None), leaves, dy)
    assert torch.equal(leaves[0] @ leaves[1].t(), full(rows, hidden, value=-5))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y = torch.nn.functional.gelu(wide[0] @ wide[1].t() + wide[2]) @ wide[3].t()
    for grad, expected in zip(grads, torch.autograd.grad(y, wide, dy.double()), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=5e-3, atol=1e-3)
    assert_every_product_was_fused()


def test_same_bits_from_run_to_run():
    case = on_gpu(make_case((5000,), 512, 768, dtype=torch.bfloat16))
    first = run_fused(case)
    for _ in range(5):
        for name, value in run_fused(case).items():
            assert torch.equal(value, first[name]), name
    mlp = mlp_on_gpu(make_mlp(5000, 512, 1032, 512, dtype=torch.bfloat16))
    first = run_fused_mlp(mlp)
    for _ in range(5):
        for name, value in run_fused_mlp(mlp).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("size", [(300, 128, 192), SIZES[-1]], ids=["small", "large"])
def test_tf32_where_torch_allows_it(tile, size):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rows, *features = size
        case = on_gpu(make_case((rows,), *features))
        operands = (case.x, case.weight, case.bias, case.residual_data)
        with torch.no_grad():
            y = fl.linear_gelu_residual(*operands)
        trained = fl.linear_gelu_residual(*(t.detach().requires_grad_() for t in operands))
        assert_every_product_was_fused(forward=2)
        x, weight, bias, residual = (t.double() for t in operands)
        expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias)) + residual
        assert (y - expected).abs().max() < 1e-2
        assert torch.equal(trained, y)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_what_no_fused_kernel_takes_is_refused(dtype):
    case = on_gpu(make_case((16,), 16, 16, dtype=dtype))
    with pytest.raises(NotImplementedError, match="FASTLANE_PATH=fused: got a CUDA product that no fused kernel takes"):
        fl.linear_gelu_residual(case.x, case.weight, case.bias)
