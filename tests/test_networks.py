"""The networks: the published figures, the single fused call, and what happens when a child has changed."""

import copy
import doctest
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import fastlane_ext as fl
from fastlane_ext import networks, reference
from fastlane_ext._load import library

both_kinds = pytest.mark.parametrize("kind", [fl, reference], ids=["fused", "reference"])

PUBLISHED = {
    False: [
        0.00020173587836325169,
        0.00012011159560643137,
        0.0007152039906941354,
        0.0013988736318424344,
        0.005049645435065031,
    ],
    True: [
        0.22169792652130127,
        0.20694106817245483,
        0.32896995544433594,
        0.2665732204914093,
        1.3258540630340576,
    ],
}


@pytest.fixture(autouse=True)
def fresh():
    fl.reset_stats()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    fl.reset_stats()


@both_kinds
@pytest.mark.parametrize("use_shortcut", [False, True])
def test_published_table(kind, use_shortcut):
    torch.manual_seed(123)
    model = kind.ExampleDeepNeuralNetwork([3, 3, 3, 3, 3, 1], use_shortcut, activation="gelu_tanh")
    loss = nn.functional.mse_loss(model(torch.tensor([[1.0, 0.0, -1.0]])), torch.tensor([[0.0]]))
    loss.backward()
    means = [layer[0].weight.grad.abs().mean().item() for layer in model.layers]
    assert means == pytest.approx(PUBLISHED[use_shortcut], rel=2e-6, abs=0)
    if kind is fl:
        assert fl.stats()["fallback"] == {}
        assert fl.stats()["fused"]["forward"] > 0 and fl.stats()["fused"]["backward"] > 0


NETWORKS = {
    **{
        shortcut: (lambda shortcut=shortcut: fl.ResidualNetwork([4, 4, 5], shortcut=shortcut))
        for shortcut in reference.SHORTCUTS
    },
    "example": lambda: fl.ExampleDeepNeuralNetwork([4, 4, 5]),
    "improved": lambda: fl.ImprovedResidualNetwork([4, 4, 5]),
    "improved without shortcuts": lambda: fl.ImprovedResidualNetwork([4, 4, 5], use_shortcut=False),
    "deep": lambda: fl.DeepNeuralNet(True, [4, 4, 5]),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_any_network_is_one_call(make):
    network, x = make(), torch.randn(2, 4)
    before = fl.stats()["fused"]["forward"]
    y = network(x)
    assert fl.stats()["fused"]["forward"] == before + 1
    # The short way in C++ and the checks in Python end in the same call.
    assert torch.equal(library.run_plain_network(network, x), y)
    assert torch.equal(network._forward_checked(x), y)


class Subclass(torch.Tensor):
    pass


def test_the_short_way_leaves_to_python_what_python_watches():
    network, x = fl.ResidualNetwork([4, 4, 5]), torch.randn(2, 4)
    run = library.run_plain_network
    assert run(network, x) is not None
    assert run(network, x.tolist()) is None and run(network, None) is None
    assert run(network, x.as_subclass(Subclass)) is None
    assert run(nn.Linear(4, 4), x) is None and run(nn.Sequential(nn.Linear(4, 4)), x) is None
    with torch.overrides.BaseTorchFunctionMode():
        assert run(network, x) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert run(network, x) is None
    handle.remove()
    with pytest.raises(TypeError):
        run(network)
    network.layers[0][0].weight = nn.Parameter(network.layers[0][0].weight.detach().as_subclass(Subclass))
    assert run(network, x) is None


def test_projections_go_by_their_names():
    network, x = fl.ResidualNetwork([4, 6, 4, 6], shortcut="projection"), torch.randn(2, 4)
    y = network(x)
    children = network.projections._modules
    for name in ("1", "0"):
        children[name] = children.pop(name)
    assert library.run_plain_network(network, x) is None
    assert torch.equal(network(x), y)


def test_unusual_attributes_of_a_network():
    x = torch.randn(2, 4)
    network = fl.ResidualNetwork([4, 4])
    for name in ("\ud800", "identity\0"):
        network.shortcut = name
        with pytest.raises(ValueError, match="shortcut: got"):
            network(x)
    network = fl.ResidualNetwork([4, 4])
    del network.layers[0]
    assert torch.equal(network(x), x)
    network = fl.ResidualNetwork([4, 4])
    network.layers[0][0].__dict__["weight"] = torch.zeros(4, 4)
    expected = nn.functional.gelu(network.layers[0][0].bias.expand(2, 4))
    torch.testing.assert_close(network(torch.zeros(2, 4)), expected)
    network.layers = None
    assert library.run_plain_network(network, x) is None


@pytest.mark.slow
def test_a_shortcut_assigned_while_other_threads_call():
    """The shortcut's name lives as long as the call that read it."""
    network, x = fl.ResidualNetwork([4, 4]), torch.randn(2, 4)
    expected = {name: None for name in ("identity", "none")}
    for name in expected:
        network.shortcut = name
        expected[name] = network(x)
    stop, wrong = threading.Event(), []

    def write():
        while not stop.is_set():
            for name in expected:
                network.shortcut = "".join(list(name))

    def read():
        for _ in range(3000):
            try:
                y = network(x)
            except Exception as error:
                wrong.append(error)
            else:
                if not any(torch.equal(y, value) for value in expected.values()):
                    wrong.append(y)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        writer = threading.Thread(target=write)
        readers = [threading.Thread(target=read) for _ in range(2)]
        for thread in (writer, *readers):
            thread.start()
        for thread in readers:
            thread.join()
        stop.set()
        writer.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_network_holds_the_fused_layers():
    network, x = fl.ResidualNetwork([4, 4, 5]), torch.randn(2, 4)
    traced = torch.jit.trace(network, x)
    assert str(traced.graph).count("fastlane::linear_gelu_residual") == 2
    assert torch.allclose(traced(2 * x), network(2 * x), rtol=1e-5, atol=1e-6)


def test_the_short_way_raises_the_operators_own_errors():
    network = fl.ResidualNetwork([4, 4, 5])
    for x in (torch.randn(2, 3), torch.randn(2, 4, dtype=torch.float64), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="^residual_stack: ") as short:
            library.run_plain_network(network, x)
        with pytest.raises(RuntimeError) as checked:
            network._forward_checked(x)
        assert str(short.value) == str(checked.value)


def compare(fused, eager, width=4):
    """Outputs and all gradients of both networks in float64; the parameters must have the same names."""
    x = torch.randn(5, width, dtype=torch.float64)
    found = []
    for model in (fused, eager):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        grads = torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])
        found.append([y, *grads])
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in eager.named_parameters()]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


class Adapter(nn.Linear):
    """A linear map with something added, as adapters do."""

    def forward(self, x):
        return super().forward(x) + 0.5 * x.mean(-1, keepdim=True)


def adapt(net):
    old = net.layers[1][0]
    net.layers[1][0] = Adapter(old.in_features, old.out_features, dtype=torch.float64)
    net.layers[1][0].load_state_dict(old.state_dict())


def replace_forward(net):
    linear = net.layers[0][0]
    linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight, linear.bias)


def scale_output(module, args, output):
    return 1.5 * output


CHANGES = {
    "forward hook on a Linear": (
        lambda net: net.layers[0][0].register_forward_hook(scale_output),
        ["layers.0 has a child 0 that has hooks"],
    ),
    "pre-hook on a layer": (
        lambda net: net.layers[1].register_forward_pre_hook(lambda m, args: (2 * args[0],)),
        ["layers.1 has hooks"],
    ),
    "backward hook on an activation": (
        lambda net: net.layers[0][1].register_full_backward_hook(lambda m, gi, go: (3 * gi[0],)),
        ["layers.0 has a child 1 that has hooks"],
    ),
    "backward pre-hook on a Linear": (
        lambda net: net.layers[2][0].register_full_backward_pre_hook(lambda m, go: (3 * go[0],)),
        ["layers.2 has a child 0 that has hooks"],
    ),
    "hook on a projection": (
        lambda net: net.projections[1].register_forward_hook(scale_output),
        ["projections.1 has hooks"],
    ),
    "another activation": (
        lambda net: net.layers[1].__setitem__(1, nn.Tanh()),
        ["layers.1 has a child 1 that is a Tanh, not a plain GELU"],
    ),
    "one more child": (
        lambda net: net.layers[1].append(nn.Softplus()),
        ["layers.1 has 3 children, not Linear and activation"],
    ),
    "another layer": (
        lambda net: net.layers.__setitem__(0, nn.Softplus()),
        ["layers.0 is a Softplus, not a plain Sequential"],
    ),
    "parametrized weight": (
        lambda net: parametrize.register_parametrization(net.layers[1][0], "weight", nn.Softplus()),
        ["layers.1 has a child 0 that is a ParametrizedLinear, not a plain Linear"],
    ),
    "parametrized projection": (
        lambda net: parametrize.register_parametrization(net.projections[1], "weight", nn.Softplus()),
        ["projections.1 is a ParametrizedLinear, not a plain Linear"],
    ),
    "pruning": (
        lambda net: prune.l1_unstructured(net.layers[0][0], "weight", amount=0.5),
        ["layers.0 has a child 0 that has hooks"],
    ),
    "adapter": (adapt, ["layers.1 has a child 0 that is a Adapter, not a plain Linear"]),
    "own forward": (replace_forward, ["layers.0 has a child 0 that has a forward of its own"]),
    "two at once": (
        lambda net: (adapt(net), net.projections[1].register_forward_hook(scale_output)),
        ["layers.1 has a child 0 that is a Adapter, not a plain Linear"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_child_is_honoured(name, set_strict):
    change, reasons = CHANGES[name]
    fused = fl.ImprovedResidualNetwork([4, 4, 6, 6]).double()
    eager = reference.ImprovedResidualNetwork([4, 4, 6, 6]).double()
    eager.load_state_dict(fused.state_dict())
    unchanged = eager(torch.ones(1, 4, dtype=torch.float64))
    change(fused)
    change(eager)
    assert library.run_plain_network(fused, torch.ones(1, 4, dtype=torch.float64)) is None
    if "backward" not in name:
        assert not torch.allclose(eager(torch.ones(1, 4, dtype=torch.float64)), unchanged)
    compare(fused, eager)
    stats = fl.stats()
    assert stats["fallback"] == dict.fromkeys(reasons, 1)
    # The layers that did not change stay fused.
    assert stats["fused"]["forward"] > 0 and stats["fused"]["backward"] > 0
    set_strict(True)
    with pytest.raises(RuntimeError, match=reasons[0]):
        fused(torch.ones(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("shortcut", reference.SHORTCUTS)
def test_every_shortcut_survives_a_changed_child(shortcut):
    fused = fl.ResidualNetwork([4, 4, 6, 6], shortcut=shortcut).double()
    eager = reference.ResidualNetwork([4, 4, 6, 6], shortcut=shortcut).double()
    eager.load_state_dict(fused.state_dict())
    for net in (fused, eager):
        net.layers[1][1] = nn.Tanh()
    compare(fused, eager)
    stats = fl.stats()
    assert stats["fallback"] == {"layers.1 has a child 1 that is a Tanh, not a plain GELU": 1}
    assert stats["fused"]["forward"] > 0 and stats["fused"]["backward"] > 0


@both_kinds
def test_hooks_run_once_and_their_removal_restores_the_single_call(kind):
    net = kind.ResidualNetwork([4, 4, 4])
    seen = []
    handle = net.layers[0].register_forward_hook(lambda *_: seen.append("hook"))
    net(torch.randn(2, 4))
    assert seen == ["hook"]
    handle.remove()
    fl.reset_stats()
    net(torch.randn(2, 4))
    assert seen == ["hook"] and fl.stats()["fallback"] == {}


@both_kinds
def test_a_hook_for_all_modules_sees_every_child(kind):
    net = kind.ImprovedResidualNetwork([4, 4, 6])
    x = torch.randn(2, 4)
    expected = net(x)
    fl.reset_stats()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        torch.testing.assert_close(net(x), expected)
    finally:
        handle.remove()
    called = [net, *net.layers, net.projections[1], *(child for layer in net.layers for child in layer)]
    assert sorted(map(id, seen)) == sorted(map(id, called))
    if kind is fl:
        reason = "is under a hook registered for all modules"
        assert fl.stats()["fallback"] == {f"layers.{i} {reason}": 1 for i in range(2)}


@pytest.mark.parametrize("where", [[0, 1, 2], [1]], ids=["all", "one"])
@pytest.mark.parametrize("what", ["tanh", "identity"])
def test_another_gelu_form_stays_fused(where, what):
    """The kernels know both forms of nn.GELU, and a layer without an activation."""
    fused, eager = (kind.ResidualNetwork([4, 4, 4, 6]).double() for kind in (fl, reference))
    eager.load_state_dict(fused.state_dict())
    x = 3 * torch.randn(5, 4, dtype=torch.float64)
    unchanged = eager(x)
    for net in (fused, eager):
        for index in where:
            if what == "tanh":
                net.layers[index][1].approximate = "tanh"
            else:
                net.layers[index][1] = nn.Identity()
    assert not torch.allclose(eager(x), unchanged, rtol=1e-6)
    compare(fused, eager)
    assert fl.stats()["fallback"] == {} and fl.stats()["fused"]["backward"] > 0


def test_parameters_kept_as_plain_attributes():
    """Data-parallel replicas keep their parameters as plain attributes, and nn.Linear accepts these."""
    net, x = fl.ImprovedResidualNetwork([4, 4, 5]), torch.randn(2, 4)
    expected = net(x)
    for module in net.modules():
        for name in list(module._parameters):
            value = module._parameters.pop(name)
            module.__dict__[name] = value.detach()
    assert torch.equal(net(x), expected) and fl.stats()["fallback"] == {}


def test_functional_call_swaps_parameters():
    net = fl.ResidualNetwork([4, 4, 4])
    other = fl.ResidualNetwork([4, 4, 4])
    x = torch.randn(2, 4)
    y = torch.func.functional_call(net, dict(other.named_parameters()), (x,))
    assert torch.equal(y, other(x)) and not torch.equal(y, net(x))


def test_training_stays_beside_eager():
    fused, eager = (kind.ImprovedResidualNetwork([4, 16, 16, 2]).double() for kind in (fl, reference))
    eager.load_state_dict(fused.state_dict())
    x, target = torch.randn(32, 4, dtype=torch.float64), torch.randn(32, 2, dtype=torch.float64)
    losses = []
    for net in (fused, eager):
        optimiser = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(5):
            optimiser.zero_grad()
            loss = nn.functional.mse_loss(net(x), target)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-10)
    assert losses[4] < losses[0]
    assert fl.stats()["fallback"] == {}


def test_a_changed_copy_leaves_the_original_alone():
    net = fl.ResidualNetwork([4, 4, 4])
    x = torch.randn(2, 4)
    expected = net(x)
    twin = copy.deepcopy(net)
    twin.layers[0][0].register_forward_hook(scale_output)
    assert not torch.allclose(twin(x), expected)
    fl.reset_stats()
    assert torch.equal(net(x), expected) and fl.stats()["fallback"] == {}


@pytest.mark.parametrize("shortcut", reference.SHORTCUTS)
@pytest.mark.parametrize("changed", [False, True])
def test_compiles_without_a_graph_break(shortcut, changed):
    net = fl.ResidualNetwork([4, 4, 6], shortcut=shortcut)
    if changed:
        net.layers[0][1] = nn.Tanh()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 3):
        x = torch.randn(rows, 4)
        y, expected = compiled(x), net(x)
        torch.testing.assert_close(y, expected)
        parameters = list(net.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), parameters), torch.autograd.grad(expected.sum(), parameters)
        )
    torch._dynamo.reset()


def test_a_bias_kept_as_a_buffer():
    fused, eager = fl.ResidualNetwork([4, 4, 3]), reference.ResidualNetwork([4, 4, 3])
    fused.load_state_dict(eager.state_dict())
    for network in (fused, eager):
        linear = network.layers[1][0]
        bias = linear.bias.detach()
        del linear.bias
        linear.register_buffer("bias", bias)
    x = torch.randn(5, 4)
    torch.testing.assert_close(fused(x), eager(x))
    reason = "layers.1 has a child 0 that has a bias that is no plain parameter"
    assert fl.stats()["fused"] == {"forward": 1, "backward": 0} and fl.stats()["fallback"] == {reason: 1}
    fl.reset_stats()


def test_a_removed_last_layer_with_projections():
    fused = fl.ResidualNetwork([4, 4, 3, 2], shortcut="projection")
    eager = reference.ResidualNetwork([4, 4, 3, 2], shortcut="projection")
    eager.load_state_dict(fused.state_dict())
    del fused.layers[2], eager.layers[2]
    x = torch.randn(5, 4)
    torch.testing.assert_close(fused(x), eager(x))


@pytest.mark.parametrize("shortcut", ["identity", "projection", "concat", "none"])
def test_fx_traces_the_fused_ops(shortcut):
    network = fl.ResidualNetwork([4, 4, 3], shortcut=shortcut)
    traced = torch.fx.symbolic_trace(network)
    assert any("fastlane" in str(node.target) for node in traced.graph.nodes)
    x = torch.randn(5, 4)
    assert torch.equal(traced(x), network(x))


@both_kinds
def test_a_shortcuts_name_is_no_flag(kind):
    with pytest.raises(TypeError, match="^use_shortcut: got 'none', expected True or False"):
        kind.ExampleDeepNeuralNetwork([4, 4], "none")


def test_examples_in_docstrings():
    result = doctest.testmod(networks)
    assert result.attempted >= 4 and result.failed == 0
