"""Fused models beside their eager twins, for tests that change something in both."""

import copy

import torch
from torch import nn

import fastlane_ext as fl
from fastlane_ext import reference
from fastlane_ext._load import library
from fastlane_ext.fusion.classes import PLAN


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


class Subject:
    """A fused model, its eager twin, and where their first linear layer and activation are."""

    def __init__(self, fused, eager, linear, activation):
        self.fused, self.eager, self._linear, self._activation = fused, eager, linear, activation
        self.eager.load_state_dict(fused.state_dict())

    def linears(self):
        return [self._linear(model) for model in (self.fused, self.eager)]

    def activations(self):
        return [self._activation(model) for model in (self.fused, self.eager)]

    def compiled_check(self, x):
        """Whether the compiled code would go on without Python; None if this kind of model has no compiled code."""
        if isinstance(self.fused, reference.ResidualNetwork):
            return library.run_plain_network(self.fused, x) is not None
        if isinstance(self.fused, reference.ResidualMLP):
            return library.run_plain_residual_mlp(self.fused, x) is not None
        plan = vars(self.fused).get(PLAN)
        return None if plan is None else library.is_as_planned(self.fused, plan.checks)


def fused_mlp():
    model = Mlp()
    eager = copy.deepcopy(model)
    fl.fuse(model).assert_fused(1)
    return Subject(model, eager, lambda m: m.fc1, lambda m: m.act)


def residual_mlp():
    return Subject(fl.ResidualMLP(8, 8), reference.ResidualMLP(8, 8), lambda m: m.fc1, lambda m: None)


def network():
    sizes = [8, 8, 8]
    kinds = fl.ResidualNetwork(sizes), reference.ResidualNetwork(sizes)
    return Subject(*kinds, lambda m: m.layers[0][0], lambda m: m.layers[0][1])


SUBJECTS = {"fuse": fused_mlp, "module": residual_mlp, "network": network}


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def results(model, x):
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    wanted = [leaf, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach().as_subclass(torch.Tensor), *torch.autograd.grad(y.sum(), wanted, allow_unused=True)]
