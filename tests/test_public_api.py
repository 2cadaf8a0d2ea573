"""Every public name exists and has a docstring, types, and examples that run."""

import doctest
import inspect

import pytest

import fastlane_ext
from fastlane_ext import _arguments, _info, functional, fusion, reference
from fastlane_ext.fusion import activations

FUNCTIONS = {
    "linear_gelu_residual": "x, weight, bias, residual, activation, recompute",
    "linear_gelu_concat": "x, weight, bias, activation",
    "residual_stack": "x, weights, biases, shortcut, projections, projection_biases, activation, recompute",
    "mlp_residual": "x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation, recompute",
}
CLASSES = {
    "LinearGELUResidual": "in_features, out_features, bias, shortcut, activation, device, dtype",
    "ResidualNetwork": "layer_sizes, shortcut, activation, bias",
    "ResidualMLP": "dim, hidden_dim, activation, bias",
    "ExampleDeepNeuralNetwork": "layer_sizes, use_shortcut, activation",
    "ImprovedResidualNetwork": "layer_sizes, use_shortcut, activation",
    "DeepNeuralNet": "use_skip_connection, layer_size, activation",
}
OTHERS = ["print_gradients", "gradient_report", "build_info", "cpu_isa", "stats", "reset_stats"]


@pytest.mark.parametrize("module", [fastlane_ext, reference], ids=["fused", "reference"])
@pytest.mark.parametrize(("name", "parameters"), (FUNCTIONS | CLASSES).items())
def test_fused_and_reference_share_their_signatures(module, name, parameters):
    assert list(inspect.signature(getattr(module, name)).parameters) == parameters.split(", ")


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES, *OTHERS])
def test_public_names_have_docstring_example_and_types(name):
    assert name in fastlane_ext.__all__
    public = getattr(fastlane_ext, name)
    assert ">>>" in public.__doc__
    signature = inspect.signature(public.__init__ if inspect.isclass(public) else public)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.name == "self" or parameter.annotation is not inspect.Parameter.empty, parameter


@pytest.mark.parametrize("module", [functional, fusion, activations, _info, _arguments], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    assert doctest.testmod(module, extraglobs={"torch": __import__("torch")}).failed == 0
    fastlane_ext.reset_stats()  # one example shows how fused operations are disabled


def test_every_public_name_is_there():
    for name in fastlane_ext.__all__:
        assert getattr(fastlane_ext, name) is not None
