"""The transformer's MLP as one operation: values, gradients, bits, bytes held, layouts, transforms."""

import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.cases import random
from support.choices import ACTIVATIONS, DTYPES, dtype_name
from support.exactness import assert_no_less_exact
from support.layouts import ALL_LAYOUTS
from support.oracle import activation_and_slope
from support.paths import COUNTED, PATH
from support.runs import CUDA_PATHS, eager_activation
from torch import Tensor

import fastlane_ext as fl

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PARAMETERS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


@dataclass
class Mlp:
    x: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    residual: Tensor | str | None  # "x": x itself
    grad: Tensor
    activation: str = "gelu"
    recompute: bool = False

    def leaves(self):
        named = {name: getattr(self, name) for name in ("x", *PARAMETERS, "residual")}
        return {name: t.detach().requires_grad_() for name, t in named.items() if isinstance(t, Tensor)}


def make_mlp(
    rows, in_features, hidden, out_features, *, dtype=torch.float32, seed=0, bias=True, residual="tensor", **options
):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows,) if isinstance(rows, int) else tuple(rows)

    def data(*size, scale=1.0):
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return Mlp(
        x=data(*shape, in_features),
        fc1_weight=data(hidden, in_features, scale=max(1, in_features) ** -0.5),
        fc1_bias=data(hidden) if bias else None,
        fc2_weight=data(out_features, hidden, scale=max(1, hidden) ** -0.5),
        fc2_bias=data(out_features) if bias else None,
        residual={"tensor": data(*shape, out_features), "x": "x", "none": None, "row": data(out_features)}[residual],
        grad=data(*shape, out_features),
        **options,
    )


def call_eager(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, *, activation, recompute):
    hidden = eager_activation(F.linear(x, fc1_weight, fc1_bias), activation)
    y = F.linear(hidden, fc2_weight, fc2_bias)
    return y if residual is None else residual + y


def run(mlp, call):
    leaves = mlp.leaves()
    arguments = {name: leaves.get(name) for name in ("x", *PARAMETERS, "residual")}
    if isinstance(mlp.residual, str):
        arguments["residual"] = leaves["x"]
    y = call(*arguments.values(), activation=mlp.activation, recompute=mlp.recompute)
    grads = torch.autograd.grad(y, list(leaves.values()), mlp.grad)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def run_fused(mlp):
    before = fl.stats()
    result = run(mlp, fl.mlp_residual)
    after = fl.stats()
    paths = CUDA_PATHS[PATH] if mlp.x.is_cuda else (PATH,)
    for direction in COUNTED:
        assert sum(after[path][direction] - before[path][direction] for path in paths) == 1, (
            f"{direction}: not one call"
        )
    assert after["fallback"] == before["fallback"]
    return result


def run_eager(mlp):
    return run(mlp, call_eager)


def run_oracle(mlp):
    real = np.longdouble if mlp.x.dtype == torch.float64 else np.float64
    wide = lambda t: t.detach().double().cpu().numpy().astype(real)  # noqa: E731
    x, w1, w2 = (wide(t) for t in (mlp.x, mlp.fc1_weight, mlp.fc2_weight))
    x_rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    dy = wide(mlp.grad).reshape(len(x_rows), -1 if mlp.grad.numel() else mlp.grad.shape[-1])
    z = x_rows @ w1.T + (0 if mlp.fc1_bias is None else wide(mlp.fc1_bias))
    hidden, slope = activation_and_slope(z, mlp.activation)
    y = hidden @ w2.T + (0 if mlp.fc2_bias is None else wide(mlp.fc2_bias))
    y = y.reshape(mlp.grad.shape)
    dz = (dy @ w2) * slope
    result = {"dx": (dz @ w1).reshape(x.shape), "dfc1_weight": dz.T @ x_rows, "dfc2_weight": dy.T @ hidden}
    if mlp.fc1_bias is not None:
        result |= {"dfc1_bias": dz.sum(0), "dfc2_bias": dy.sum(0)}
    if isinstance(mlp.residual, str):
        y, result["dx"] = y + x, result["dx"] + wide(mlp.grad)
    elif mlp.residual is not None:
        y = y + wide(mlp.residual)
        result["dresidual"] = wide(mlp.grad) if mlp.residual.dim() == mlp.grad.dim() else dy.sum(0)
    return result | {"y": y}


def pooled(*sizes, **options):
    return [make_mlp(*sizes, seed=seed, **options) for seed in range(6)]


# (rows, in_features, hidden, out_features): around tiles, k blocks, few rows, several blocks of rows.
SIZES = [
    (1, 1, 1, 1),
    (2, 64, 256, 64),
    (3, 7, 19, 5),
    (13, 33, 65, 31),
    (11, 100, 300, 101),
    (16, 48, 192, 48),
    (17, 31, 129, 33),
    (23, 100, 300, 101),
    (25, 100, 300, 101),
    (64, 0, 8, 4),
    (65, 16, 0, 12),
    (129, 65, 257, 64),
    (300, 24, 2100, 20),
]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_never_less_exact_than_eager(dtype, activation, size):
    assert_no_less_exact(pooled(*size, dtype=dtype, activation=activation), run_fused, run_eager, run_oracle)


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"recompute": True}, {"residual": "x"}, {"residual": "none"}], ids=str
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_options(dtype, activation, options):
    cases = pooled((2, 19), 45, 150, 45, dtype=dtype, activation=activation, **options)
    assert_no_less_exact(cases, run_fused, run_eager, run_oracle)


def test_a_residual_row():
    assert_no_less_exact(pooled((3, 5), 8, 9, 7, residual="row"), run_fused, run_eager, run_oracle)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("operand", ["x", *PARAMETERS, "residual", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_any_layout(dtype, operand, layout):
    cases = [
        replace(mlp, **{operand: ALL_LAYOUTS[layout](getattr(mlp, operand))})
        for mlp in pooled(37, 20, 70, 21, dtype=dtype)
    ]
    assert_no_less_exact(cases, run_fused, run_eager, run_oracle)


@pytest.mark.parametrize("transposed", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_weights_stored_in_out(dtype, rows, transposed):
    """A weight in Conv1D's layout is read in place, and its gradient has the same layout."""
    lay = lambda t, transpose: t.t().contiguous().t() if transpose else t  # noqa: E731
    cases = [
        replace(mlp, fc1_weight=lay(mlp.fc1_weight, transposed[0]), fc2_weight=lay(mlp.fc2_weight, transposed[1]))
        for mlp in pooled(rows, 32, 128, 33, dtype=dtype)
    ]
    assert_no_less_exact(cases, run_fused, run_eager, run_oracle)
    result = run_fused(cases[0])
    assert result["dfc1_weight"].stride() == cases[0].fc1_weight.stride()
    assert result["dfc2_weight"].stride() == cases[0].fc2_weight.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_few_rows_and_a_wide_weight_stored_in_out(dtype):
    """The products run transposed: transposed, fc2's dgrad also multiplies by act′ and sums its columns."""
    cases = [
        replace(mlp, fc2_weight=mlp.fc2_weight.t().contiguous().t())
        for mlp in pooled(100, 20, 2100, 300, dtype=dtype)[:2]
    ]
    assert_no_less_exact(cases, run_fused, run_eager, run_oracle)


@pytest.mark.own_product
def test_rows_in_several_blocks():
    """More hidden activations than a cache holds: blocks of rows give the same bits as single rows."""
    mlp = make_mlp(5000, 4, 6000, 3)
    arguments = [getattr(mlp, name) for name in PARAMETERS]
    with torch.no_grad():
        y = fl.mlp_residual(mlp.x, *arguments, mlp.residual)
        pairs = zip(mlp.x.split(700), mlp.residual.split(700), strict=True)
        parts = [fl.mlp_residual(x, *arguments, residual) for x, residual in pairs]
    assert torch.equal(y, torch.cat(parts))


def test_subsets_of_gradients():
    mlp = make_mlp(9, 6, 11, 5, dtype=torch.float64)
    whole = run(mlp, call_eager)
    names = ["x", *PARAMETERS, "residual"]
    for wanted in product([False, True], repeat=len(names)):
        leaves = {
            name: getattr(mlp, name).detach().requires_grad_(need) for name, need in zip(names, wanted, strict=True)
        }
        needed = [leaf for leaf in leaves.values() if leaf.requires_grad]
        if not needed:
            continue
        for recompute in (False, True):
            y = fl.mlp_residual(*leaves.values(), recompute=recompute)
            for (name, _), grad in zip(
                [(n, t) for n, t in leaves.items() if t.requires_grad],
                torch.autograd.grad(y, needed, mlp.grad),
                strict=True,
            ):
                torch.testing.assert_close(grad, whole[f"d{name}"], msg=f"{wanted} {name}")


@pytest.mark.expects_fallback("backward with create_graph=True")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", [{}, {"residual": "x"}, {"bias": False}, {"recompute": True}], ids=str)
def test_gradcheck(activation, options):
    mlp = make_mlp((2, 2), 3, 4, 3, dtype=torch.float64, activation=activation, **options)
    leaves = mlp.leaves()

    def call(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        arguments = [given.get(name) for name in ("x", *PARAMETERS)]
        residual = given["x"] if isinstance(mlp.residual, str) else given.get("residual")
        return fl.mlp_residual(*arguments, residual, activation=activation, recompute=mlp.recompute)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))


def bytes_held(call, *arguments):
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call(*arguments).sum().backward()
    return sum(held.values())


@pytest.mark.own_kernels
def test_bytes_held_for_backward():
    """Held are x and z; eager keeps act(z) too. With recompute=True only x is held."""
    rows, width, hidden = 128, 64, 256
    mlp = torch.nn.Sequential(torch.nn.Linear(width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, width))
    x = torch.randn(rows, width)
    parameters = [mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias]
    fc2_weight = 4 * width * hidden
    eager, fused = bytes_held(mlp, x) - fc2_weight, bytes_held(fl.mlp_residual, x, *parameters) - fc2_weight
    assert fused == 4 * rows * (width + hidden)
    assert fused <= 0.6 * eager
    recompute = bytes_held(lambda *tensors: fl.mlp_residual(*tensors, recompute=True), x, *parameters)
    assert recompute == 4 * rows * width + 4 * (2 * width * hidden + hidden)


@pytest.mark.own_product
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_bits_do_not_depend_on_threads(dtype):
    mlp = make_mlp(1100, 60, 250, 61, dtype=dtype)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(run_fused(mlp))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name


@pytest.mark.parametrize("options", [{}, {"residual": "x"}, {"bias": False, "residual": "none"}], ids=str)
def test_opcheck(options):
    mlp = make_mlp((2, 3), 4, 5, 4, **options)
    leaves = mlp.leaves()
    residual = leaves["x"] if isinstance(mlp.residual, str) else leaves.get("residual")
    arguments = [leaves.get(name) for name in ("x", *PARAMETERS)]
    torch.library.opcheck(torch.ops.fastlane.mlp_residual.default, (*arguments, residual))
    plain = [None if t is None else t.detach() for t in arguments]
    torch.library.opcheck(torch.ops.fastlane.mlp_forward.default, (*plain, mlp.grad), {"activation": "gelu"})
    z = torch.randn(2, 3, 5)
    torch.library.opcheck(
        torch.ops.fastlane.mlp_backward.default,
        (mlp.grad, z, plain[0], plain[1], plain[2], plain[3], mlp.grad),
        {"activation": "gelu", "fc1_column_major": False, "fc2_column_major": True, "output_mask": [True] * 5},
    )


def check_vmap(in_dims):
    sizes = ((4, 6), (9, 6), (9,), (5, 9), (5,), (4, 5))
    arguments = []
    for size, dim in zip(sizes, in_dims, strict=True):
        t = random(3, *size, seed=len(arguments))
        arguments.append(t[0] if dim is None else t.movedim(0, dim))
    call = lambda *tensors: call_eager(*tensors, activation="gelu", recompute=False)  # noqa: E731
    torch.testing.assert_close(torch.vmap(fl.mlp_residual, in_dims)(*arguments), torch.vmap(call, in_dims)(*arguments))


@pytest.mark.parametrize("in_dims", [(1, *[None] * 4, 1), (0, *[None] * 5), (*[None] * 5, 0)], ids=str)
def test_vmap_over_the_data(in_dims):
    check_vmap(in_dims)


@pytest.mark.expects_fallback("vmap over weight or bias")
@pytest.mark.parametrize(
    "in_dims",
    [
        (None, 0, *[None] * 4),
        (0, 0, 0, 0, 0, None),
        (0, None, None, 0, None, 1),
        (None, None, None, 0, None, None),
        (None, None, None, None, 0, 0),
    ],
    ids=str,
)
def test_vmap_over_parameters(in_dims):
    check_vmap(in_dims)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_autocast(residual_dtype):
    mlp = make_mlp(12, 16, 40, 16)
    leaves = mlp.leaves()
    arguments = [leaves[name] for name in ("x", *PARAMETERS)]
    residual = leaves["residual"].to(residual_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        fused = fl.mlp_residual(*arguments, residual)
        eager = call_eager(*arguments, residual, activation="gelu", recompute=False)
    assert fused.dtype == eager.dtype
    torch.testing.assert_close(fused, eager, rtol=2e-2, atol=2e-2)
    for a, b in zip(
        torch.autograd.grad(fused.sum(), arguments), torch.autograd.grad(eager.sum(), arguments), strict=True
    ):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


ERRORS = [
    (0, torch.randn(3, 4).long(), "x has dtype Long"),
    (1, torch.randn(9, 5), r"fc1_weight has shape \[9, 5\], expected \(out_features, 4\) to fit x of shape \[3, 4\]"),
    (2, torch.randn(8), r"fc1_bias has shape \[8\], expected \(9,\), one element for each row of fc1_weight"),
    (
        3,
        torch.randn(5, 8),
        r"fc2_weight has shape \[5, 8\], expected \(out_features, 9\) to fit fc1_weight of shape \[9, 4\]",
    ),
    (3, torch.randn(5, 9).double(), "fc2_weight has dtype Double, expected Float like x"),
    (4, torch.randn(5, 1), r"fc2_bias has shape \[5, 1\], expected \(5,\)"),
    (5, torch.randn(3, 4), r"residual has shape \[3, 4\], expected one that broadcasts to the output's shape \[3, 5\]"),
]


@pytest.mark.parametrize(("position", "value", "message"), ERRORS, ids=[message[:30] for *_, message in ERRORS])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_errors_name_the_argument(position, value, message, grad):
    arguments = [torch.randn(size) for size in ((3, 4), (9, 4), (9,), (5, 9), (5,), (3, 5))]
    arguments[position] = value
    if grad:
        arguments = [t.requires_grad_() if t.is_floating_point() else t for t in arguments]
    with pytest.raises(RuntimeError, match=f"^mlp_residual: {message}") as error:
        fl.mlp_residual(*arguments)
    assert "\n" not in str(error.value).split("\nException raised")[0]


@pytest.mark.parametrize("position", range(6))
def test_no_tensor(position):
    arguments = [torch.randn(size) for size in ((3, 4), (9, 4), (9,), (5, 9), (5,), (3, 5))]
    arguments[position] = [1.0]
    with pytest.raises(TypeError, match="got a list, expected a tensor"):
        fl.mlp_residual(*arguments)


def test_empty_rows():
    mlp = make_mlp(0, 6, 9, 5)
    result = run_fused(mlp)
    for name in ("dfc1_weight", "dfc1_bias", "dfc2_weight", "dfc2_bias"):
        assert torch.equal(result[name], torch.zeros_like(result[name])), name
