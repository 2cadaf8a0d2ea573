"""The kinds of cases on which contestants meet: a layer, a network, an MLP, a whole model.

Each kind has a ``title``, builds its contestants, and counts the ``work`` of an ideal pass, which the limit of a row
comes from. ``suites`` lists the cases that ``fastlane bench`` runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch

from . import contestants, model_contestants, protocol
from .contestants import Contestant

__all__ = ["FORWARD", "MODES", "STEP", "Case", "Layer", "Mlp", "Model", "Network"]

FORWARD, STEP = "forward", "forward+backward"
MODES = (FORWARD, STEP)


@dataclass(frozen=True)
class Layer:
    """One layer, ``rows × inputs → outputs``."""

    rows: int
    inputs: int
    outputs: int
    dtype: torch.dtype = torch.float32
    quick: bool = False
    suite = "layer"

    @property
    def title(self) -> str:
        return f"{self.rows}×{self.inputs}→{self.outputs}"

    def contestants(self, compiled: bool) -> list[Contestant]:
        return contestants.layer_contestants(self.rows, self.inputs, self.outputs, self.dtype, compiled=compiled)

    def work(self, mode: str) -> tuple[int, int]:
        """(floating-point operations, bytes) of an ideal pass: each tensor is read or written once.

        Forward reads x, W, b and the residual and writes y. A training step also writes z in forward,
        then reads dy, z, x and W and writes dx, dW and db; the residual's gradient is dy itself.
        """
        m, k, n = self.rows, self.inputs, self.outputs
        forward = m * k + n * k + n + m * n + (0 if k == n else m * n)
        backward = m * n + (2 * m * n + m * k + n * k) + (m * k + n * k + n)
        if mode == FORWARD:
            return 2 * m * n * k, forward * self.dtype.itemsize
        return 6 * m * n * k, (forward + backward) * self.dtype.itemsize


@dataclass(frozen=True)
class Network:
    """A ``ResidualNetwork`` of the given sizes and shortcut on an input of the given shape."""

    label: str
    sizes: tuple[int, ...]
    input_shape: tuple[int, ...]
    shortcut: str = "identity"
    dtype: torch.dtype = torch.float32
    quick: bool = False
    suite = "networks"

    @property
    def title(self) -> str:
        return self.label

    def contestants(self, compiled: bool) -> list[Contestant]:
        return contestants.network_contestants(
            self.sizes, self.input_shape, self.shortcut, self.dtype, compiled=compiled
        )

    def work(self, mode: str) -> tuple[int, int]:
        """(floating-point operations, bytes) of an ideal pass: activations stay in cache between layers.

        Forward reads x and the parameters and writes y. A training step also writes and reads each
        layer's z once, reads x and the parameters again and writes the parameters' gradients; x needs
        none.
        """
        rows = prod(self.input_shape[:-1])
        products = parameters = hidden = 0
        first = 0
        for index, (before, after) in enumerate(pairwise(self.sizes)):
            fan_in = sum(self.sizes[: index + 1]) if self.shortcut == "concat" else before
            maps = 2 if self.shortcut == "projection" and before != after else 1
            products += maps * fan_in * after
            parameters += maps * (fan_in * after + after)
            hidden += after
            first = first or maps * fan_in * after
        width_in = self.sizes[0]
        width_out = sum(self.sizes) if self.shortcut == "concat" else self.sizes[-1]
        forward = rows * (width_in + width_out) + parameters
        if mode == FORWARD:
            return 2 * rows * products, forward * self.dtype.itemsize
        backward = rows * (2 * hidden + width_in + width_out) + 2 * parameters
        return 2 * rows * (3 * products - first), (forward + backward) * self.dtype.itemsize


@dataclass(frozen=True)
class Mlp:
    """A transformer's MLP, ``x + fc2(gelu(fc1(x)))``."""

    rows: int
    width: int
    hidden: int
    dtype: torch.dtype = torch.float32
    quick: bool = False
    suite = "models"

    @property
    def title(self) -> str:
        return f"MLP {self.width}→{self.hidden}→{self.width}, {self.rows:,} tokens"

    def contestants(self, compiled: bool) -> list[Contestant]:
        return model_contestants.mlp_contestants(self.rows, self.width, self.hidden, self.dtype, compiled=compiled)

    def work(self, mode: str) -> tuple[int, int]:
        """(floating-point operations, bytes) of an ideal pass: hidden activations stay in cache.

        Forward reads x and the parameters and writes y. A training step also writes z and reads it again, reads
        dy, x and the weights, and writes dx and the parameters' gradients.
        """
        weights = 2 * self.width * self.hidden
        parameters = weights + self.width + self.hidden
        forward = 2 * self.rows * self.width + parameters
        if mode == FORWARD:
            return 2 * self.rows * weights, forward * self.dtype.itemsize
        backward = 2 * self.rows * self.hidden + 3 * self.rows * self.width + weights + parameters
        return 6 * self.rows * weights, (forward + backward) * self.dtype.itemsize

    def facts(self, mode: str, field: Sequence[Contestant]) -> dict[str, Any]:
        """The bytes that eager and fused hold for backward, in a step."""
        if mode == FORWARD:
            return {}
        chosen = [c for c in field if c.name in ("eager", "fused")]
        held = {
            c.name: model_contestants.held_bytes(c.forward, c.leaves[1:])
            for c in chosen
            if not isinstance(c.forward, protocol.Skipped)
        }
        return {"held_bytes": held}


@dataclass(frozen=True)
class Model:
    """A whole model before and after ``fuse(model, linears=linears)``."""

    label: str
    architecture: model_contestants.Architecture
    batch: int
    tokens: int
    width: int
    layers: int
    other_weights: int  # weights that every token meets, beside the blocks' 12 · width²
    linears: bool = False
    dtype: torch.dtype = torch.float32
    quick: bool = False
    suite = "models"

    @property
    def title(self) -> str:
        return self.label + (", linears=True" if self.linears else "")

    def contestants(self, compiled: bool) -> list[Contestant]:
        return model_contestants.model_contestants(self.architecture, self.linears, self.dtype, compiled=compiled)

    def work(self, mode: str) -> tuple[int, int]:
        """(floating-point operations, bytes) of an ideal pass: the linear layers and attention's two products. Forward
        reads the parameters once; a step also reads them again and writes their gradients.
        """
        weights = self.layers * 12 * self.width**2 + self.other_weights
        attention = 4 * self.layers * self.tokens**2 * self.width
        flops, moved = self.batch * (2 * self.tokens * weights + attention), weights * self.dtype.itemsize
        return (flops, moved) if mode == FORWARD else (3 * flops, 3 * moved)

    def facts(self, mode: str, field: Sequence[Contestant]) -> dict[str, Any]:
        """The MLPs' fraction of eager's time, in forward."""
        if mode != FORWARD or self.linears or not model_contestants.has_transformers():
            return {}
        return {"mlp_share": model_contestants.mlp_share(self.architecture, self.dtype)}


Case = Layer | Network | Mlp | Model
