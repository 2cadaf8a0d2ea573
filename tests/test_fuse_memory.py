"""A fused model's peak memory is at most eager's: every value is released when its last user has run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastlane_ext as fl

ROWS, WIDTH = 4096, 64
ACTIVATION_BYTES = 4 * ROWS * WIDTH


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.Identity(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Convolutions(nn.Module):
    """Children that are not linear layers need no more memory either."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv1d(ROWS, ROWS, 1, groups=ROWS) for _ in range(4))
        self.fc, self.act = nn.Linear(64, 8), nn.GELU()

    def forward(self, x):
        return self.act(self.fc(self.d(self.c(self.b(self.a(x))))))


class ByFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x), approximate="tanh")), approximate="tanh"))


def layers(count):
    return nn.Sequential(*[layer for _ in range(count) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())])


MODELS = {
    "layers": lambda: layers(12),
    "with other children": lambda: nn.Sequential(
        *layers(2), nn.Tanh(), *layers(2), nn.Dropout(0.0), nn.LayerNorm(WIDTH)
    ),
    "blocks": lambda: nn.Sequential(Block(), Block(), Block()),
    "convolutions": Convolutions,
    "functions": ByFunction,
    "network": lambda: fl.reference.ResidualNetwork([WIDTH] * 9),
    "mlp": lambda: fl.reference.ResidualMLP(WIDTH, 4 * WIDTH),
}


def peak(call):
    """The most bytes that torch's allocator held, beyond the bytes held before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held, most = 0, 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def step(model, x, training):
    if not training:
        with torch.no_grad():
            model(x)
        return
    model.zero_grad()
    model(x).square().mean().backward()


@pytest.mark.parametrize("training", [False, True], ids=["no_grad", "training"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_peak(make, training):
    eager = make()
    fused = copy.deepcopy(eager)
    assert fl.fuse(fused).fused
    x = torch.randn(ROWS, WIDTH)
    if isinstance(eager, Convolutions):
        x = x.view(1, ROWS, WIDTH)
    expected, got = (peak(lambda model=model: step(model, x, training)) for model in (eager, fused))
    assert expected >= ACTIVATION_BYTES, "the profiler saw nothing"
    assert got <= expected + ACTIVATION_BYTES // 8
