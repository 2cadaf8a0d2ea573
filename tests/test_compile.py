"""Every operator, module and a fused model under torch.compile, compiled autograd, and the tracers beneath them."""

import threading

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from support.compile_cases import EVERY_OP, OPERATORS, SUBJECTS, EagerLayer, fused_model, make, rows_of, run
from torch._dynamo import compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastlane_ext as fl

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("fresh_compiler")]
BATCH_SIZES = (5, 9, 7, 2, 3, 4, 6, 8, 16, 31, 32, 33, 64, 100, 128, 256, 257, 1, 0, 12)

each_operator = pytest.mark.parametrize("name", OPERATORS)
each_op_once = pytest.mark.parametrize("name", [*EVERY_OP[:-1], pytest.param("fuse(model)", marks=pytest.mark.slow)])


def with_marks(names, mark, otherwise):
    return [pytest.param(name, marks=mark if name in names else otherwise) for name in SUBJECTS]


def compiled(function, backend="aot_eager", **options):
    """The function compiled without a graph break, and the backend, which counts its calls."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def calls():
    return fl.stats()["fused"]


# torch.compile


@pytest.mark.parametrize("name", with_marks(EVERY_OP, (), pytest.mark.thorough))
def test_compile(name):
    """The same bits as without a compiler, from the same number of calls of our kernels."""
    module, x = make(name), rows_of(5)
    expected = run(module, x)
    plain_calls = calls()
    fl.reset_stats()
    function, counter = compiled(module, dynamic=False)
    assert_equal(run(function, x, list(module.parameters())), expected)
    assert calls() == plain_calls and plain_calls["backward"] > 0
    for graph in counter.graphs:
        targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        assert not any("gelu" in target and "fastlane" not in target for target in targets)


@pytest.mark.thorough
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SUBJECTS)
def test_compile_with_inductor(name, dynamic):
    module = make(name)
    function, _ = compiled(module, "inductor", dynamic=dynamic)
    for rows in (5, 9):
        expected = run(module, rows_of(rows))
        fl.reset_stats()
        got = run(function, rows_of(rows), list(module.parameters()))
        torch.testing.assert_close(got, expected)
        assert calls()["forward"] == calls()["backward"] > 0


def compilations(module, dynamic):
    torch._dynamo.reset()
    function, counter = compiled(module, dynamic=dynamic)
    for rows in BATCH_SIZES:
        x = rows_of(rows)
        assert_equal(run(function, x, list(module.parameters())), run(module, x))
    return counter.frame_count


@pytest.mark.parametrize(("dynamic", "limit"), [(True, 3), (None, 4)])
@pytest.mark.parametrize("name", with_marks(EVERY_OP[:1], pytest.mark.slow, pytest.mark.thorough))
def test_number_of_compilations(name, dynamic, limit):
    """20 batch sizes: one graph for all, one each for 0 and 1, which torch specialises, and without `dynamic=True` one
    for the first size, before torch knows that the size varies. Eager layers need as many.
    """
    number = compilations(make(name), dynamic)
    eager = EagerLayer()
    if name == "fuse(model)":
        eager = fused_model()
        fl.unfuse(eager)
    else:
        assert number <= limit
    assert number <= compilations(eager, dynamic)


@each_op_once
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compile_without_gradients(name, mode):
    module, x = make(name), rows_of(5)
    function, _ = compiled(module)
    with mode():
        y, expected = function(x), module(x)
    assert_equal([y], [expected])
    assert not y.requires_grad and y.is_inference() == expected.is_inference()


@each_op_once
def test_compile_under_autocast(name):
    module, x = make(name), rows_of(5)

    def step(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    expected = run(step, x, list(module.parameters()))
    function, _ = compiled(step)
    assert_equal(run(function, x, list(module.parameters())), expected)


@each_op_once
def test_compile_with_checkpointing(name):
    """The checkpointed region is run again for backward, inside the compiled graph."""
    module, x = make(name), rows_of(5)
    leaves = list(module.parameters())

    def step(x):
        return checkpoint(lambda x: module(x.cos()).sin(), x, use_reentrant=False)

    expected = run(step, x, leaves)
    plain_calls = calls()
    fl.reset_stats()
    function, _ = compiled(step)
    assert_equal(run(function, x, leaves), expected)
    assert calls() == plain_calls and plain_calls["forward"] == 2 * plain_calls["backward"]


# Compiled autograd


# The node keeps the sizes of a residual that has a gradient of its own, and compiled autograd takes them as constants.
RESIDUAL_SIZES_ARE_CONSTANTS = ("linear_gelu_residual, computed residual", "LinearGELUResidual, projection")


def check_compiled_autograd(name, backend):
    """The backward of an eager call is traced through the C++ node into one graph, for varying sizes."""
    module = make(name)
    leaves = list(module.parameters())
    expected = {rows: run(module, rows_of(rows)) for rows in (5, 9, 16)}
    compilers = []

    def compiler(graph):
        function, counter = compiled(graph, backend, dynamic=True)
        compilers.append(counter)
        return function

    with compiled_autograd._enable(compiler):
        for rows, (_, dx, *gradients) in expected.items():
            x = rows_of(rows).requires_grad_()
            for leaf in leaves:
                leaf.grad = None
            fl.reset_stats()
            y = module(x)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
            got = [x.grad, *(leaf.grad for leaf in leaves)]
            if backend == "inductor":
                torch.testing.assert_close(got, [dx, *gradients])
            else:
                assert_equal(got, [dx, *gradients])
            assert calls()["backward"] == calls()["forward"] > 0
    limit = len(expected) if name in RESIDUAL_SIZES_ARE_CONSTANTS else 2
    assert 0 < sum(counter.frame_count for counter in compilers) <= limit


@each_op_once
def test_compiled_autograd(name):
    check_compiled_autograd(name, "eager")


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_compiled_autograd_everywhere(name, backend):
    check_compiled_autograd(name, backend)


@pytest.mark.slow
@each_op_once
def test_compiled_autograd_within_a_compiled_step(name):
    module, x = make(name), rows_of(5)
    leaves = list(module.parameters())
    module(x).square().sum().backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None

    def step(x):
        module(x).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="aot_eager")(x)
    torch.testing.assert_close([leaf.grad for leaf in leaves], expected)


# Tracers


def names_of(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@each_operator
def test_make_fx(name, mode):
    """Forward and backward are one graph of our operators, which is right for other sizes too if sizes are symbols."""
    module = make(name)
    leaves = list(module.parameters())

    def step(x, *values):
        y = torch.func.functional_call(module, dict(zip(dict(module.named_parameters()), values, strict=True)), x)
        return [y, *torch.autograd.grad(y, [x, *values], torch.ones_like(y))]

    arguments = lambda rows: [rows_of(rows).requires_grad_(), *leaves]  # noqa: E731
    graph = make_fx(step, tracing_mode=mode)(*arguments(5))
    assert any("fastlane" in target and "backward" in target for target in names_of(graph))
    assert not any("gelu" in target and "fastlane" not in target for target in names_of(graph))
    for rows in (5, 9) if mode == "symbolic" else (5,):
        with torch.no_grad():
            got = graph(*arguments(rows))
        assert_equal(got, [t.detach() for t in step(*arguments(rows))])


@pytest.mark.parametrize("name", SUBJECTS)
def test_functionalize(name):
    module, x = make(name), rows_of(5)
    with torch.no_grad():
        expected = module(x)
        fused_calls = calls()
        fl.reset_stats()
        assert_equal([torch.func.functionalize(module)(x)], [expected])
    assert calls() == fused_calls


@each_operator
def test_min_cut_partitioner(name):
    """Backward computes no kernel's forward result again: it has only our backward operators."""
    module, x = make(name), rows_of(5)
    expected = run(module, x)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    names = list(dict(module.named_parameters()))

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

    function = aot_function(call, keep, keep, partition_fn=min_cut_rematerialization_partition)
    leaves = list(module.parameters())
    assert_equal(run(lambda x: function(x, *leaves), x, leaves), expected)
    forward, backward = ([t for t in names_of(graph) if "fastlane" in t] for graph in graphs)
    assert forward and all("_backward" not in t for t in forward)
    assert len(backward) == len(forward) and all("_backward" in t for t in backward)


def test_disabled_holds_for_what_is_compiled_inside():
    """One graph inside the block, one outside, and both are reused."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    network = fl.ResidualNetwork([8, 8, 3])
    compiled = torch.compile(lambda x: network(fl.mlp_residual(x, *mlp_of(x))), backend=backend, fullgraph=True)
    x = torch.randn(5, 8)
    for turn in range(2):
        outside = compiled(x)
        with fl.disabled():
            inside = compiled(x)
        torch.testing.assert_close(inside, outside)
        assert len(graphs) == 2, turn
    with_ours, without = (any("fastlane" in name for name in graph) for graph in graphs)
    assert with_ours and not without


def mlp_of(x):
    return torch.ones(4, x.shape[1]), None, torch.ones(x.shape[1], 4), None


def test_is_disabled():
    from fastlane_ext._disabled import is_disabled

    assert not is_disabled()
    with fl.disabled(), fl.disabled():
        assert is_disabled()
    with fl.disabled():
        assert is_disabled()
    assert not is_disabled()
    seen = []
    with fl.disabled():
        thread = threading.Thread(target=lambda: seen.append(is_disabled()))
        thread.start()
        thread.join()
    assert seen == [False]
