"""The eager reference against formulas written out here, and its errors."""

import doctest
import math

import pytest
import torch
from torch import nn

import fastlane_ext
from fastlane_ext import reference


def gelu(z, activation):
    if activation == "gelu":
        return z * 0.5 * torch.erfc(-z / math.sqrt(2))
    if activation == "gelu_tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    if activation == "quick_gelu":
        return z / (1 + torch.exp(-1.702 * z))
    return z


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("kind", [fastlane_ext, reference], ids=["fused", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": []}, TypeError, "weights: got an empty list, expected a list of at least one tensor"),
        ({"weights": None}, TypeError, "weights: got a NoneType"),
        ({"weights": [None]}, TypeError, r"weights\[0\]: got a NoneType, expected a tensor"),
        ({"x": None}, TypeError, "x: got a NoneType, expected a tensor"),
        ({"activation": "relu"}, ValueError, "activation: got 'relu'"),
        ({"activation": None}, TypeError, "activation: got None"),
        ({"shortcut": "both"}, ValueError, "shortcut: got 'both'"),
    ],
)
def test_a_stack_names_the_argument(kind, change, error, message):
    given = {"x": torch.randn(2, 3), "weights": [torch.randn(3, 3)]} | change
    with pytest.raises(error, match=f"^{message}") as raised:
        kind.residual_stack(**given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("residual_shape", [None, (2, 5, 4), (4,), (5, 1)])
def test_layer(activation, with_bias, residual_shape):
    x, weight = random(2, 5, 3), random(4, 3)
    bias = random(4) if with_bias else None
    residual = None if residual_shape is None else random(*residual_shape)
    y = reference.linear_gelu_residual(x, weight, bias, residual, activation=activation)
    expected = gelu(x @ weight.T + (0 if bias is None else bias), activation)
    torch.testing.assert_close(y, expected + (0 if residual is None else residual), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_concat_and_mlp(activation):
    x, w1, b1, w2, b2 = random(5, 3), random(4, 3), random(4), random(3, 4), random(3)
    hidden = gelu(x @ w1.T + b1, activation)
    close = {"rtol": 1e-12, "atol": 1e-12}
    y = reference.linear_gelu_concat(x, w1, b1, activation=activation)
    torch.testing.assert_close(y, torch.cat([x, hidden], 1), **close)
    y = reference.mlp_residual(x, w1, b1, w2, b2, x, activation=activation)
    torch.testing.assert_close(y, x + hidden @ w2.T + b2, **close)
    y = reference.mlp_residual(x, w1, b1, w2, b2, activation=activation)
    torch.testing.assert_close(y, hidden @ w2.T + b2, **close)


@pytest.mark.parametrize("shortcut", reference.SHORTCUTS)
def test_stack_written_out(shortcut):
    x = random(5, 3)
    widths = [3, 6] if shortcut == "concat" else [3, 3]
    w0, w1, b0, b1, p, q = (
        random(3, widths[0]),
        random(4, widths[1]),
        random(3),
        random(4),
        random(4, 3),
        random(4),
    )
    h = gelu(x @ w0.T + b0, "gelu")
    h = {"concat": torch.cat([x, h], 1), "none": h}.get(shortcut, x + h)
    y = gelu(h @ w1.T + b1, "gelu")
    if shortcut == "concat":
        y = torch.cat([h, y], 1)
    if shortcut == "projection":
        y = y + h @ p.T + q
    options = {"projections": [None, p], "projection_biases": [None, q]} if shortcut == "projection" else {}
    got = reference.residual_stack(x, [w0, w1], [b0, b1], shortcut=shortcut, **options)
    torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shortcut", reference.SHORTCUTS)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_stack_is_the_network(shortcut, activation, bias):
    net = reference.ResidualNetwork([3, 3, 5, 5], shortcut=shortcut, activation=activation, bias=bias)
    x = torch.randn(2, 4, 3)
    linears = [layer[0] for layer in net.layers]
    options = {}
    if shortcut == "projection":
        options["projections"] = [p and p.weight for p in net.projections]
        options["projection_biases"] = [p and p.bias for p in net.projections]
    y = reference.residual_stack(
        x,
        [linear.weight for linear in linears],
        [linear.bias for linear in linears] if bias else None,
        shortcut=shortcut,
        activation=activation,
        **options,
    )
    assert torch.equal(y, net(x))
    assert y.shape[-1] == (3 + 3 + 5 + 5 if shortcut == "concat" else 5)


def test_a_projection_is_initialised_right_after_its_layer():
    torch.manual_seed(7)
    net = reference.ImprovedResidualNetwork([2, 3, 3, 1])
    torch.manual_seed(7)
    wanted = {
        "layers.0.0": nn.Linear(2, 3),
        "projections.0": nn.Linear(2, 3),
        "layers.1.0": nn.Linear(3, 3),
        "layers.2.0": nn.Linear(3, 1),
        "projections.2": nn.Linear(3, 1),
    }
    state = net.state_dict()
    assert set(state) == {f"{name}.{part}" for name in wanted for part in ("weight", "bias")}
    for name, linear in wanted.items():
        assert torch.equal(state[f"{name}.weight"], linear.weight), name
        assert torch.equal(state[f"{name}.bias"], linear.bias), name
    assert net.projections[1] is None


def test_networks_of_the_specification():
    x = torch.randn(2, 3)
    plain = reference.ExampleDeepNeuralNetwork([3, 3, 1], use_shortcut=False)
    assert torch.equal(plain(x), plain.layers[1](plain.layers[0](x)))
    assert not plain.use_shortcut and plain.projections is None
    example = reference.ExampleDeepNeuralNetwork([3, 3, 1])
    h = x + example.layers[0](x)
    assert torch.equal(example(x), example.layers[1](h)) and example.use_shortcut
    improved = reference.ImprovedResidualNetwork([3, 3, 1])
    h = x + improved.layers[0](x)
    assert torch.equal(improved(x), improved.layers[1](h) + improved.projections[1](h))
    off = reference.ImprovedResidualNetwork([3, 3, 1], use_shortcut=False)
    assert list(off.projections) == [None, None]
    assert torch.equal(off(x), off.layers[1](off.layers[0](x)))
    deep = reference.DeepNeuralNet(True, [25, 25, 43, 43, 54, 54])
    assert deep(torch.randn(2, 3, 25)).shape == (2, 3, 54) and deep.use_skip_connection
    assert deep.layers[0][1].approximate == "tanh"
    linear = reference.DeepNeuralNet(True, [3, 3], activation="none")
    torch.testing.assert_close(linear(x), x + linear.layers[0][0](x))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda r: r.ResidualNetwork([3]), ValueError, ["layer_sizes", "[3]", "at least two ints"]),
        (lambda r: r.ResidualNetwork(3), TypeError, ["layer_sizes", "3 (int)", "sequence"]),
        (lambda r: r.ResidualNetwork("64"), TypeError, ["layer_sizes", "'64' (str)", "sequence"]),
        (lambda r: r.ResidualNetwork([3, 2.5]), TypeError, ["layer_sizes[1]", "2.5 (float)", "an int"]),
        (lambda r: r.ResidualNetwork([3, True]), TypeError, ["layer_sizes[1]", "True (bool)", "an int"]),
        (lambda r: r.ResidualNetwork([-1, 3]), ValueError, ["layer_sizes[0]", "-1", ">= 0"]),
        (
            lambda r: r.ResidualNetwork([3, 3], shortcut="skip"),
            ValueError,
            ["shortcut", "'skip'", "'concat'"],
        ),
        (lambda r: r.ResidualNetwork([3, 3], shortcut=None), TypeError, ["shortcut", "None", "'concat'"]),
        (
            lambda r: r.ResidualNetwork([3, 3], activation="relu"),
            ValueError,
            ["activation", "'relu'", "'gelu'"],
        ),
        (lambda r: r.DeepNeuralNet(True, [3]), ValueError, ["layer_size:", "[3]", "at least two"]),
        (lambda r: r.ResidualMLP(3, "4"), TypeError, ["hidden_dim", "'4' (str)", "an int"]),
        (lambda r: r.ResidualMLP(3, 4, activation="x"), ValueError, ["activation", "'x'", "'gelu_tanh'"]),
        (lambda r: r.LinearGELUResidual(3, 4.0), TypeError, ["out_features", "4.0 (float)", "an int"]),
        (
            lambda r: r.LinearGELUResidual(3, 4, shortcut="sum"),
            ValueError,
            ["shortcut", "'sum'", "'identity'"],
        ),
    ],
)
@pytest.mark.parametrize("kind", ["reference", "fused"])
def test_constructors_refuse_in_one_line(kind, make, error, words):
    import fastlane_ext

    with pytest.raises(error) as caught:
        make(reference if kind == "reference" else fastlane_ext)
    message = str(caught.value)
    assert "\n" not in message
    for word in [*words, "expected", ";"]:
        assert word in message, (word, message)


def test_functions_refuse_in_one_line():
    x, w = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="^activation: got 'relu', expected one of 'none'"):
        reference.linear_gelu_residual(x, w, activation="relu")
    with pytest.raises(ValueError, match="^shortcut: got 'skip'"):
        reference.residual_stack(x, [w], shortcut="skip")
    with pytest.raises(ValueError, match="^biases: got 2 entries, expected 1"):
        reference.residual_stack(x, [w], [None, None])
    with pytest.raises(ValueError, match=r"^projections\[0\]: got None, expected a weight of shape \(4, 3\)"):
        reference.residual_stack(x, [w], shortcut="projection")
    with pytest.raises(ValueError, match="^projections: got tensors, expected None with shortcut='identity'"):
        reference.residual_stack(x, [w], projections=[w])


def test_examples_in_docstrings():
    result = doctest.testmod(reference)
    assert result.attempted >= 10 and result.failed == 0
