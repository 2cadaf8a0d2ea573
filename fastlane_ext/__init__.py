"""fastlane_ext: ``shortcut + GELU(x Wᵀ + b)`` as one fused PyTorch operation, forward and backward."""

from . import _profile, reference
from ._info import build_info, cpu_isa, reset_stats, stats
from ._load import build_record as _build_record
from .freezing import FreezeReport, freeze, unfreeze
from .functional import linear_gelu_concat, linear_gelu_residual, mlp_residual, residual_stack
from .fusion import FusionReport, disabled, explain, fuse, unfuse
from .fusion.activations import register_activation
from .gradients import GradientReport, gradient_report, print_gradients
from .modules import LinearGELUResidual, ResidualMLP
from .networks import DeepNeuralNet, ExampleDeepNeuralNetwork, ImprovedResidualNetwork, ResidualNetwork
from .packed import PackedWeight, pack_weight

__version__: str = _build_record["version"]
_profile.choice = _profile.load()

__all__ = [
    "DeepNeuralNet",
    "ExampleDeepNeuralNetwork",
    "FreezeReport",
    "FusionReport",
    "GradientReport",
    "ImprovedResidualNetwork",
    "LinearGELUResidual",
    "PackedWeight",
    "ResidualMLP",
    "ResidualNetwork",
    "build_info",
    "cpu_isa",
    "disabled",
    "explain",
    "freeze",
    "fuse",
    "gradient_report",
    "linear_gelu_concat",
    "linear_gelu_residual",
    "mlp_residual",
    "pack_weight",
    "print_gradients",
    "reference",
    "register_activation",
    "reset_stats",
    "residual_stack",
    "stats",
    "unfreeze",
    "unfuse",
]
