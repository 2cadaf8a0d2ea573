"""Every operator, every module and a fused model, each as a module of one input, for compilers and exporters."""

import torch
import torch.nn.functional as F
from torch import nn

import fastlane_ext as fl

WIDTH, HIDDEN, OUT = 12, 20, 6


class Call(nn.Module):
    """One operator; `function(x, *parameters)`, a parameter for each shape."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.values = nn.ParameterList(torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes)

    def forward(self, x):
        # By index: torch 2.11's compiler cannot unpack a ParameterList.
        return self.function(x, *(self.values[i] for i in range(len(self.values))))


class TransformerMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """The residual is added inside the module, to the output of an MLP whose input was normalised."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), TransformerMlp()

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def fused_model():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), Block())
    fl.fuse(model).assert_fused(2)
    return model


def _stack(shortcut):
    growing = shortcut == "concat"
    first, second = (WIDTH, WIDTH), (OUT, WIDTH * 2 if growing else WIDTH)

    def call(x, w1, b1, w2, b2, *projection):
        projections = {"projections": [None, projection[0]]} if projection else {}
        return fl.residual_stack(x, [w1, w2], [b1, b2], shortcut=shortcut, **projections)

    return Call(call, first, first[:1], second, second[:1], *[(OUT, WIDTH)] * (shortcut == "projection"))


SQUARE, BIAS = (WIDTH, WIDTH), (WIDTH,)
OPERATORS = {
    "linear_gelu_residual": lambda: Call(lambda x, w, b: fl.linear_gelu_residual(x, w, b, x), SQUARE, BIAS),
    "linear_gelu_residual, row, recompute": lambda: Call(
        lambda x, w, b, row: fl.linear_gelu_residual(x, w, b, row, activation="gelu_tanh", recompute=True),
        SQUARE,
        BIAS,
        BIAS,
    ),
    "linear_gelu_residual, computed residual": lambda: Call(
        lambda x, w: fl.linear_gelu_residual(x, w, None, x.sin(), activation="none"), SQUARE
    ),
    "linear_gelu_concat": lambda: Call(fl.linear_gelu_concat, (OUT, WIDTH), (OUT,)),
    **{f"residual_stack, {name}": lambda name=name: _stack(name) for name in ("identity", "projection", "concat")},
    "mlp_residual": lambda: Call(
        lambda x, *parameters: fl.mlp_residual(x, *parameters, x),
        (HIDDEN, WIDTH),
        (HIDDEN,),
        (WIDTH, HIDDEN),
        BIAS,
    ),
    "mlp_residual, recompute": lambda: Call(
        lambda x, w1, w2: fl.mlp_residual(x, w1.t(), None, w2.t(), None, recompute=True),
        (WIDTH, HIDDEN),
        (HIDDEN, WIDTH),
    ),
}
MODULES = {
    **{
        f"LinearGELUResidual, {name}": lambda name=name: fl.LinearGELUResidual(WIDTH, OUT, shortcut=name)
        for name in ("identity", "projection", "concat")
    },
    "ResidualMLP": lambda: fl.ResidualMLP(WIDTH, HIDDEN),
    **{
        f"ResidualNetwork, {name}": lambda name=name: fl.ResidualNetwork([WIDTH, WIDTH, OUT], shortcut=name)
        for name in ("identity", "projection", "concat", "none")
    },
    "fuse(model)": fused_model,
}
SUBJECTS = OPERATORS | MODULES
EVERY_OP = (
    "linear_gelu_residual",
    "linear_gelu_concat",
    "residual_stack, projection",
    "mlp_residual",
    "fuse(model)",
)


def make(name):
    torch.manual_seed(0)
    return SUBJECTS[name]()


class EagerLayer(Call):
    """The eager layer that `linear_gelu_residual` replaces."""

    def __init__(self):
        super().__init__(lambda x, w, b: F.gelu(F.linear(x, w, b)) + x, SQUARE, BIAS)


def rows_of(rows, seed=1):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(module, x, leaves=None):
    """The output and the gradients of x and every parameter, for an ordinary grad_output."""
    x = x.detach().clone().requires_grad_()
    y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float32).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *(leaves or module.parameters())], dy)]
