"""The layer under opcheck, fake tensors and torch.compile; every operator and module: test_compile.py."""

import pytest
import torch
from support.cases import make_case, random
from support.choices import ACTIVATIONS, DTYPES, dtype_name
from support.layouts import ALL_LAYOUTS
from support.runs import fused_layer
from torch._subclasses import FakeTensorMode

import fastlane_ext as fl

OPS = torch.ops.fastlane


# Opcheck: schema, autograd registration, fake kernel, compilation with dynamic shapes


def layer_samples():
    for shape, activation, bias in [((5,), "gelu", True), ((2, 3), "gelu_tanh", False), ((), "none", True),
                                    ((0,), "gelu", True)]:  # fmt: skip
        for layout in ("contiguous", "transposed"):
            case = make_case(shape, 4, 4, activation=activation, bias=bias).with_layout(x=layout, weight=layout)
            yield case


def with_grad(case):
    return [None if t is None else t.requires_grad_() for t in (case.x, case.weight, case.bias)]


OPCHECKS = [
    *(
        pytest.param(
            OPS.linear_gelu_residual.default,
            (*with_grad(case), residual(case)),
            {"activation": case.activation, "recompute": recompute},
            id=f"residual-{i}-{name}-{recompute}",
        )
        for i, case in enumerate(layer_samples())
        for name, recompute, residual in (
            ("none", False, lambda case: None),
            ("x", False, lambda case: case.x),
            ("row", True, lambda case: random(4, dtype=torch.float32)),
            ("tensor", True, lambda case: case.residual_data),
        )
    ),
    *(
        pytest.param(
            OPS.linear_gelu_concat.default,
            (*with_grad(case),),
            {"activation": case.activation},
            id=f"concat-{i}",
        )
        for i, case in enumerate(layer_samples())
    ),
    *(
        pytest.param(
            OPS.linear_gelu_forward.default,
            (case.x, case.weight, case.bias, None if concat else case.residual_data),
            {"activation": case.activation, "concat": concat},
            id=f"forward-{i}-{concat}",
        )
        for i, case in enumerate(layer_samples())
        for concat in (False, True)
    ),
    *(
        pytest.param(
            OPS.linear_gelu_backward.default,
            (random(5, 3), random(5, 3, seed=1), random(5, 4, seed=2), random(3, 4, seed=3), None, None),
            {"activation": "gelu", "weight_column_major": column_major, "output_mask": list(mask)},
            id=f"backward-{column_major}-{mask}",
        )
        for column_major in (False, True)
        for mask in [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
    ),
]


@pytest.mark.parametrize(("op", "args", "kwargs"), OPCHECKS)
def test_opcheck(op, args, kwargs, assert_fused):
    results = torch.library.opcheck(op, args, kwargs)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4
    assert_fused(forward=None if "backward" not in str(op) else 0, backward=fl.stats()["fused"]["backward"])


# Fake tensors


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("x_layout", ALL_LAYOUTS)
@pytest.mark.parametrize("weight_layout", ["contiguous", "transposed", "padded"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), (), (1,)], ids=str)
def test_fake_strides_equal_real_ones(shape, weight_layout, x_layout, concat):
    """Strides of output and gradients: a compiler that assumes other strides reads other elements."""
    case = make_case(shape, 4, 4, residual="x", concat=concat).with_layout(x=x_layout, weight=weight_layout)

    def run(x, weight, bias, grad):
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        y = fused_layer(*leaves, None if concat else leaves[0], concat=concat)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    arguments = [t.detach() for t in (case.x, case.weight, case.bias, case.grad)]
    mode = FakeTensorMode()
    fake_arguments = [mode.from_tensor(t) for t in arguments]
    real = run(*arguments)
    with mode:
        fake = run(*fake_arguments)
    for a, b in zip(real, fake, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
        assert a.storage_offset() == b.storage_offset()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_meta(dtype, requires_grad):
    case = make_case((2, 3), 4, 5, dtype=dtype)
    x, weight, bias = (t.to("meta").requires_grad_(requires_grad) for t in (case.x, case.weight, case.bias))
    for y, width in (
        (fl.linear_gelu_residual(x, weight, bias), 5),
        (fl.linear_gelu_concat(x, weight, bias), 9),
    ):
        assert y.is_meta and y.shape == (2, 3, width) and y.dtype == dtype and y.is_contiguous()
        if requires_grad:
            for grad, leaf in zip(torch.autograd.grad(y.sum(), (x, weight, bias)), (x, weight, bias), strict=True):
                assert grad.is_meta and grad.shape == leaf.shape and grad.dtype == dtype


# Torch.compile and torch.export


def training_step(x, weight, bias, residual, activation="gelu", concat=False):
    y = fused_layer(x * 2, weight, bias, residual, activation=activation, concat=concat)
    return (y * y).sum()


def run_step(step, case, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.weight, case.bias, case.residual_data)]
    used = leaves[:3] if options.get("concat") else leaves
    loss = step(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, used)]


def inductor(**options):
    return pytest.param("inductor", options, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        *(("aot_eager", {"activation": a, "concat": c}) for a in ACTIVATIONS for c in (False, True)),
        inductor(activation="gelu"),
        inductor(activation="gelu_tanh", concat=True),
    ],
)
def test_compile(backend, options, fresh_compiler, assert_fused):
    """One graph, the same kernels, the same bits where nothing else is fused around them."""
    case = make_case((5,), 7, 7, dtype=torch.float32)
    expected = run_step(training_step, case, **options)
    assert_fused(forward=1, backward=1)
    fl.reset_stats()
    got = run_step(torch.compile(training_step, fullgraph=True, backend=backend, dynamic=False), case, **options)
    for a, b in zip(got, expected, strict=True):
        if backend == "aot_eager":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b)
    assert_fused(forward=1, backward=1)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_dynamic(backend, fresh_compiler, assert_fused):
    """Any number of rows with one graph; 0 and 1, which torch specialises, with one more each at most."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    step = torch.compile(training_step, fullgraph=True, backend=counter, dynamic=True)
    for rows in (5, 6, 7, 97, 128, 300):
        case = make_case((rows,), 7, 7)
        for a, b in zip(run_step(step, case), run_step(training_step, case), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
    for rows in (1, 0):
        case = make_case((rows,), 7, 7)
        for a, b in zip(run_step(step, case), run_step(training_step, case), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 3
    assert_fused(forward=16, backward=16)


def test_compile_marked_dynamic(fresh_compiler):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_layer, fullgraph=True, backend=counter)
    case = make_case((5,), 7, 7)
    for rows in (5, 9, 31):
        x = random(rows, 7, dtype=torch.float32)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x, case.weight, case.bias, x), fused_layer(x, case.weight, case.bias, x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("layout", ["transposed", "stepped", "expanded_rows"])
def test_compile_layouts(layout, fresh_compiler):
    case = make_case((5,), 7, 7).with_layout(x=layout, weight="transposed", residual_data=layout)
    step = torch.compile(fused_layer, fullgraph=True, backend="aot_eager")
    arguments = [t.detach() for t in (case.x, case.weight, case.bias, case.residual_data)]
    compiled, plain = step(*arguments), fused_layer(*arguments)
    assert torch.equal(compiled, plain) and compiled.stride() == plain.stride()


def test_compiled_error_is_the_same_line(fresh_compiler):
    step = torch.compile(fused_layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"bias has shape \[4\], expected \(3,\)"):
        step(torch.zeros(5, 4), torch.zeros(3, 4), torch.zeros(4))
