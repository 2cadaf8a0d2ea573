"""The layer under torch's transformations: opcheck, compile, export, vmap, torch.func, autocast, fakes."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from oracle import (
    ACTIVATIONS,
    ALL_LAYOUTS,
    DTYPES,
    dtype_name,
    eager_layer,
    fused_layer,
    make_case,
)
from torch._subclasses import FakeTensorMode

import fastlane_ext as fl

OPS = torch.ops.fastlane
FUNC = "a torch.func transform is active"
VMAP = "vmap over weight or bias"
exact = {"rtol": 1e-11, "atol": 1e-12}


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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
    """Output and gradients: a compiler that believes other strides reads other elements."""
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


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


class Layer(torch.nn.Module):
    def __init__(self, concat):
        super().__init__()
        self.linear = torch.nn.Linear(7, 7)
        self.concat = concat

    def forward(self, x):
        residual = None if self.concat else x
        return fused_layer(x, self.linear.weight, self.linear.bias, residual, concat=self.concat)


@pytest.mark.parametrize("concat", [False, True])
def test_export(concat, tmp_path, assert_fused):
    """Saved, loaded and run on another number of rows; the graph holds our operator, not its parts."""
    module, x = Layer(concat), random(5, 7, dtype=torch.float32)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: rows}})
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [f"fastlane.linear_gelu_{'concat' if concat else 'residual'}.default"]
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for rows in (5, 31):
        x = random(rows, 7, dtype=torch.float32)
        assert torch.equal(loaded(x), module(x))
    assert_fused(forward=4)


# Vmap and torch.func


def as_eager(function, fused, *arguments):
    """function(layer, *arguments) with the fused layer equals the same with the eager one."""
    got, expected = function(fused, *arguments), function(eager_layer, *arguments)
    flat_got, flat_expected = (torch.utils._pytree.tree_leaves(t) for t in (got, expected))
    for a, b in zip(flat_got, flat_expected, strict=True):
        torch.testing.assert_close(a, b, **exact)


# which of x, weight, bias, residual carry a batch
BATCHED = [b for b in itertools.product([False, True], repeat=4) if any(b)]


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("batched", BATCHED, ids=lambda b: "".join(n for n, on in zip("xWbr", b, strict=True) if on))
def test_vmap(batched, shape, dim):
    """A batch of x or of residuals is one more leading size; of weights or biases, the composition."""
    sizes = ((*shape, 4), (3, 4), (3,), (*shape, 3))
    tensors = [
        random(*((6, *size) if on else size), seed=i) for i, (size, on) in enumerate(zip(sizes, batched, strict=True))
    ]
    tensors = [t.movedim(0, dim) if on else t for t, on in zip(tensors, batched, strict=True)]
    in_dims = tuple(dim if on else None for on in batched)
    got = torch.vmap(fused_layer, in_dims)(*tensors)
    composed = batched[1] or batched[2]
    assert fl.stats()["fused"]["forward"] == (not composed)
    assert fl.stats()["fallback"] == ({VMAP: 1} if composed else {})
    torch.testing.assert_close(got, torch.vmap(eager_layer, in_dims)(*tensors), **exact)
    fl.reset_stats()


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    ("batched", "bias"),
    [
        (b, bias)
        for b in itertools.product([False, True], repeat=3)
        for bias in (False, True)
        if any(b) and (bias or not b[2])
    ],
    ids=str,
)
def test_vmap_concat(batched, bias, shape, dim):
    sizes = ((*shape, 4), (3, 4), (3,))
    tensors, in_dims = [], []
    for i, (size, on) in enumerate(zip(sizes, batched, strict=True)):
        t = random(*((6, *size) if on else size), seed=i)
        where = min(dim, len(size))
        tensors.append(t.movedim(0, where) if on else t)
        in_dims.append(where if on else None)
    if not bias:
        tensors, in_dims = tensors[:2], in_dims[:2]

    def run(layer, *args):
        return torch.vmap(lambda *a: layer(*a, concat=True), tuple(in_dims))(*args)

    as_eager(run, fused_layer, *tensors)
    assert set(fl.stats()["fallback"]) == ({VMAP} if batched[1] or batched[2] else set())
    fl.reset_stats()


@pytest.mark.parametrize("residual_shape", [(), (1,), (3,), (5, 1), (1, 3), (5, 3)], ids=str)
@pytest.mark.parametrize(("x_batched", "residual_batched"), [(True, False), (False, True), (True, True)])
def test_vmap_over_a_broadcast_residual(residual_shape, x_batched, residual_batched, assert_fused):
    """Inside the batch the residual still broadcasts from its last dimension."""
    x = random(*((6, 5, 4) if x_batched else (5, 4)))
    residual = random(*((6, *residual_shape) if residual_batched else residual_shape), seed=1)
    in_dims = (0 if x_batched else None, None, None, 0 if residual_batched else None)
    as_eager(lambda layer, *a: torch.vmap(layer, in_dims)(*a), fused_layer, x, random(3, 4), None, residual)
    assert_fused(forward=1)


@pytest.mark.expects_fallback(VMAP)
def test_nested_vmap():
    """All pairs of weights and inputs, the batches in one order and in the other."""
    x, weight, bias = random(6, 5, 4), random(2, 3, 4, seed=1), random(2, 3, seed=2)

    def pairs(layer, *args):
        return torch.vmap(torch.vmap(layer, (0, None, None)), (None, 0, 0))(*args)

    def other_order(layer, *args):
        return torch.vmap(torch.vmap(layer, (None, 0, 0)), (0, None, None))(*args)

    as_eager(pairs, fused_layer, x, weight, bias)
    as_eager(other_order, fused_layer, x, weight, bias)


def test_nested_vmap_of_x_stays_fused(assert_fused):
    x, weight, bias = random(2, 6, 5, 4), random(3, 4, seed=1), random(3, seed=2)
    as_eager(lambda layer, *a: torch.vmap(torch.vmap(layer, (0, None, None)), (0, None, None))(*a),
             fused_layer, x, weight, bias)  # fmt: skip
    assert_fused(forward=1)


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_then_backward(dim):
    """requires_grad outside of vmap: the tape records through the batching rule."""
    results = []
    for layer in (fused_layer, eager_layer):
        leaves = [t.requires_grad_() for t in (random(6, 5, 4).movedim(0, dim), random(3, 4), random(3))]
        y = torch.vmap(layer, (dim, None, None))(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **exact)


def scalar(layer, activation="gelu"):
    return lambda x, w, b: layer(x, w, b, x[..., :3], activation=activation).square().sum()


def vector(layer, activation="gelu"):
    return lambda x, w, b: layer(x, w, b, x[..., :3], activation=activation)


def per_sample(layer, activation):
    return lambda x, w, b: torch.vmap(torch.func.grad(scalar(layer, activation), (1, 2)), (0, None, None))(x, w, b)


def vjp_of(layer, activation):
    def run(x, w, b):
        y, pull = torch.func.vjp(vector(layer, activation), x, w, b)
        return y, pull(torch.ones_like(y))

    return run


def jvp_of(layer, activation):
    return lambda *a: torch.func.jvp(vector(layer, activation), a, tuple(torch.ones_like(t) for t in a))


def ensemble(layer, activation):
    def run(x, w, b):
        many = torch.stack([w, 2 * w]), torch.stack([b, -b])
        return torch.vmap(torch.func.grad(scalar(layer, activation), (1, 2)), (None, 0, 0))(x, *many)

    return run


TRANSFORMS = {
    "grad": lambda layer, act: torch.func.grad(scalar(layer, act), (0, 1, 2)),
    "grad of grad": lambda layer, act: torch.func.grad(
        lambda *a: torch.func.grad(scalar(layer, act))(*a).square().sum(), (0, 1, 2)
    ),
    "vjp": vjp_of,
    "jvp": jvp_of,
    "jacrev": lambda layer, act: torch.func.jacrev(vector(layer, act), (0, 1, 2)),
    "jacfwd": lambda layer, act: torch.func.jacfwd(vector(layer, act), (0, 1, 2)),
    "hessian": lambda layer, act: torch.func.hessian(scalar(layer, act), (0, 1)),
    "per-sample": per_sample,
    "ensemble": ensemble,
    "functionalize": lambda layer, act: torch.func.functionalize(vector(layer, act)),
    "linearize": lambda layer, act: lambda *a: torch.func.linearize(vector(layer, act), *a)[1](*a),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform, activation):
    """Right, through the eager composition where need be, and counted there."""
    x, weight, bias = random(5, 4), random(3, 4, seed=1), random(3, seed=2)
    make = TRANSFORMS[transform]
    as_eager(lambda layer, *a: make(layer, activation)(*a), fused_layer, x, weight, bias)
    assert set(fl.stats()["fallback"]) <= {FUNC, VMAP, "forward-mode AD"}
    assert bool(fl.stats()["fallback"]) == (transform != "functionalize")
    fl.reset_stats()


@pytest.mark.expects_fallback("forward-mode AD")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("concat", "which"), [(c, i) for c in (False, True) for i in range(4 - c)])
def test_forward_mode(concat, which, activation):
    primals = [random(5, 4), random(4, 4, seed=1), random(4, seed=2), random(5, 4, seed=3)]

    def run(layer, *primals):
        with fwAD.dual_level():
            arguments = list(primals)
            arguments[which] = fwAD.make_dual(arguments[which], torch.ones_like(arguments[which]))
            y = layer(*arguments[: 3 if concat else 4], activation=activation, concat=concat)
            return tuple(fwAD.unpack_dual(y))

    as_eager(run, fused_layer, *primals)


@pytest.mark.expects_fallback("forward-mode AD")
def test_gradcheck_of_forward_mode():
    leaves = [t.requires_grad_() for t in (random(2, 3), random(3, 3), random(3), random(2, 3))]
    assert torch.autograd.gradcheck(fused_layer, leaves, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_jacobian_of_torch_autograd(strategy):
    """torch.autograd.functional, the older interface: vectorised, it batches our backward too."""
    x, weight = random(5, 4), random(3, 4, seed=1)
    vectorised = [True] if strategy == "forward-mode" else [False, True]
    for vectorize in vectorised:
        got, expected = (
            torch.autograd.functional.jacobian(
                lambda x, w, layer=layer: layer(x, w), (x, weight), strategy=strategy, vectorize=vectorize
            )
            for layer in (fused_layer, eager_layer)
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, **exact)
    fl.reset_stats()


def test_is_grads_batched():
    """A batch of cotangents through one recorded forward."""
    results = []
    for layer in (fused_layer, eager_layer):
        leaves = [t.requires_grad_() for t in (random(5, 4), random(3, 4, seed=1), random(3, seed=2))]
        y = layer(*leaves)
        results.append(torch.autograd.grad(y, leaves, random(7, *y.shape, seed=3), is_grads_batched=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **exact)
    fl.reset_stats()


# Autocast


def autocast_run(layer, case, low):
    leaves = [case.x, case.weight, case.bias]
    if case.residual_of:
        leaves.append(case.residual_data)
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    with torch.autocast("cpu", dtype=low):
        y = layer(*leaves, activation=case.activation, concat=case.concat)
    return [y.detach(), *torch.autograd.grad(y, leaves, case.grad.to(y.dtype))]


LOW = (torch.bfloat16, torch.float16)
AUTOCASTS = [
    # x, weights, residual; the parameters are float32 as a rule, and float64 is left alone
    *((x, torch.float32, r) for x in (torch.float32, *LOW) for r in (torch.float32, torch.float64, *LOW, None)),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64, torch.float64),
    (torch.float64, torch.float64, None),
]


def assert_autocast_as_eager(case, low, assert_fused):
    got, expected = autocast_run(fused_layer, case, low), autocast_run(eager_layer, case, low)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
    assert_fused(forward=1, backward=1)


@pytest.mark.parametrize("low", LOW, ids=dtype_name)
@pytest.mark.parametrize("activation", ["gelu", "none"])
@pytest.mark.parametrize("dtypes", AUTOCASTS, ids=lambda d: "-".join(str(dtype_name(t)) for t in d))
def test_autocast(dtypes, activation, low, assert_fused):
    """y's dtype and every gradient's as in eager's composition: a float32 residual stream stays float32."""
    x, weights, residual = dtypes
    case = make_case((5,), 4, 4, activation=activation, residual="tensor" if residual else "none")
    case.x, case.weight, case.bias = case.x.to(x), case.weight.to(weights), case.bias.to(weights)
    case.residual_data = case.residual_data.to(residual or x)
    assert_autocast_as_eager(case, low, assert_fused)


@pytest.mark.parametrize(
    ("x", "weights", "low"),
    [
        *((x, torch.float32, low) for low in LOW for x in (torch.float32, low)),  # eager mixes no two low dtypes
        *((torch.float64, torch.float64, low) for low in LOW),
    ],
    ids=dtype_name,
)
def test_autocast_concat(x, weights, low, assert_fused):
    case = make_case((5,), 4, 4, concat=True)
    case.x, case.weight, case.bias = case.x.to(x), case.weight.to(weights), case.bias.to(weights)
    assert_autocast_as_eager(case, low, assert_fused)


def test_autocast_uses_the_weight_cache():
    """One cast of a weight serves all its uses in a step."""
    weight = random(4, 4, dtype=torch.float32).requires_grad_()
    x = random(5, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.profiler.profile() as profile:
        fused_layer(fused_layer(x, weight), weight)
    casts = [event.count for event in profile.key_averages() if event.key == "aten::_to_copy"]
    assert sum(casts) == 1


def test_autocast_off(assert_fused):
    x, weight = random(5, 4, dtype=torch.bfloat16), random(3, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with (
            torch.autocast("cpu", enabled=False),
            pytest.raises(RuntimeError, match="weight has dtype Float"),
        ):
            fused_layer(x, weight)
        assert fused_layer(x, weight).dtype == torch.bfloat16
    assert_fused(forward=1)


def test_autocast_under_compile(fresh_compiler, assert_fused):
    case = make_case((5,), 4, 4)

    def step(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fused_layer(*args)

    arguments = [t.requires_grad_() for t in (case.x, case.weight, case.bias, case.residual_data)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    plain = step(*arguments)
    assert compiled.dtype == plain.dtype == torch.float32 and torch.equal(compiled, plain)
    for a, b in zip(*(torch.autograd.grad(y.sum(), arguments) for y in (compiled, plain)), strict=True):
        assert torch.equal(a, b)
    assert_fused(forward=2, backward=2)


# Tensors that are not plain


class Logged(torch.Tensor):
    """A wrapper subclass: it has no data of its own, so a kernel that read its pointer would crash."""

    calls: list[str] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(str(func))
        unwrap = lambda t: t.inner if isinstance(t, Logged) else t  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        wrap = lambda t: Logged(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
        return torch.utils._pytree.tree_map(wrap, func(*args, **kwargs))


def test_wrapper_subclass(assert_fused):
    """Through the dispatcher, never a raw pointer read."""
    case = make_case((5,), 4, 3)
    leaves = [t.detach().requires_grad_() for t in (case.x, case.weight, case.bias)]
    expected = fused_layer(*leaves)
    expected = [expected, *torch.autograd.grad(expected.sum(), leaves)]
    wrapped = [Logged(t.detach()).requires_grad_() for t in leaves]
    Logged.calls.clear()
    y = fused_layer(*wrapped)
    got = [y, *torch.autograd.grad(y.sum(), wrapped)]
    for a, b in zip(got, expected, strict=True):
        assert isinstance(a, Logged) and torch.equal(a.inner, b)
    assert "fastlane.linear_gelu_forward.default" in Logged.calls
    assert "fastlane.linear_gelu_backward.default" in Logged.calls
    assert_fused(forward=2, backward=2)


@pytest.mark.parametrize("kind", ["parameter", "conjugate view", "negative view"])
def test_lazy_views(kind):
    """Negation bits are resolved before a kernel sees the memory."""
    weight = torch.nn.Parameter(random(3, 4))
    x = random(5, 4)
    if kind == "conjugate view":
        x = torch.complex(x, x).conj().real
    elif kind == "negative view":
        x = torch.complex(x, x).conj().imag
        assert x.is_neg()
    torch.testing.assert_close(fused_layer(x, weight), eager_layer(x, weight), **exact)
