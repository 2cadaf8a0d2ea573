"""The published table of gradients, from the fused network."""

from __future__ import annotations

from typing import Any

import torch

from fastlane_ext import experiments

from .rows import Row, row

# Mean |gradient| of each weight: seed 123, tanh GELU, [3, 3, 3, 3, 3, 1], input [[1, 0, -1]], target 0,
# MSE.
PUBLISHED = {
    "without shortcut": (
        0.00020173587836325169,
        0.00012011159560643137,
        0.0007152039906941354,
        0.0013988736318424344,
        0.005049645435065031,
    ),
    "with shortcut": (
        0.22169792652130127,
        0.20694106817245483,
        0.32896995544433594,
        0.2665732204914093,
        1.3258540630340576,
    ),
}
PUBLISHED_TOLERANCE = 2e-6


def published_table() -> list[Row]:
    """The published mean gradients, without and with shortcuts, from the fused network."""
    rows = []
    for name, expected in PUBLISHED.items():
        errors = []
        for eager in (False, True):
            demo = experiments.published(eager=eager)
            model = demo.with_shortcuts if name == "with shortcut" else demo.without
            torch.nn.functional.mse_loss(model(demo.x), torch.zeros(1, 1)).backward()
            layers: list[Any] = list(model.layers)
            means = [layer[0].weight.grad.abs().mean().item() for layer in layers]
            errors.append(max(abs(a - b) / b for a, b in zip(means, expected, strict=True)))
        mine, eagers = errors
        ok = mine <= PUBLISHED_TOLERANCE
        rows.append(row("published table", "float32", "gelu_tanh", name, mine, eagers, PUBLISHED_TOLERANCE, ok))
    return rows
