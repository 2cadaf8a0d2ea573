"""Handwritten digits, the network that ``fastlane train`` trains on them, and the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlane_ext._arguments import check_seed, shortened

from .errors import CommandError, need
from .limits import LARGEST, fits

CLASSES = 10


@dataclass(frozen=True)
class Options:
    """Options of ``fastlane train``: ``layers`` hidden layers of ``width``, SGD with momentum 0.9."""

    epochs: int = 20
    layers: int = 30
    width: int = 64
    batch: int = 64
    lr: float = 1e-3
    seed: int = 0
    momentum: float = 0.9

    def check(self) -> None:
        """Raise CommandError, naming the first option that is out of range."""
        for name in ("epochs", "layers", "width", "batch"):
            if not 1 <= getattr(self, name) <= LARGEST[name]:
                got = shortened(getattr(self, name))
                raise CommandError(f"--{name}: got {got}, expected a whole number from 1 to {LARGEST[name]}")
        if not 0 < self.lr <= LARGEST["lr"]:
            raise CommandError(f"--lr: got {self.lr}, expected a positive number up to {LARGEST['lr']:g}")
        try:
            check_seed("--seed", self.seed)
        except (TypeError, ValueError) as error:
            raise CommandError(str(error)) from error
        # Weights, gradients and momentum, for the fp64 run too; and the tensors that backward needs from every layer.
        parameters = (64 + CLASSES) * self.width + self.layers * self.width**2
        fits(f"--layers {self.layers}, --width {self.width}", 40 * parameters + 24 * self.layers * self.width * 64)


@dataclass(frozen=True)
class Digits:
    """Pixels in [0, 1], ``(images, 64)`` fp32, and labels 0 to 9; a fifth of the images is held out."""

    x: Tensor
    y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor

    @classmethod
    def load(cls, seed: int) -> Digits:
        datasets = need("sklearn.datasets", "train", "fastlane train")
        data = datasets.load_digits()
        x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        held_out, rest = order[: len(x) // 5], order[len(x) // 5 :]
        return cls(x[rest], y[rest], x[held_out], y[held_out])

    def batches(self, epochs: int, size: int, seed: int) -> list[Tensor]:
        """The row numbers of every step: each epoch in a new order, in equal batches, without the epoch's remainder."""
        generator = torch.Generator().manual_seed(seed % 2**64)
        size = min(size, len(self.x))
        out: list[Tensor] = []
        for _ in range(epochs):
            order = torch.randperm(len(self.x), generator=generator)
            out.extend(chunk for chunk in order.split(size) if len(chunk) == size)
        return out


class Classifier(nn.Module):
    """A stack of GELU layers and a linear head: ``(*, 64)`` to ``(*, 10)``."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def make_model(kind: Callable[..., nn.Module], options: Options, shortcut: str) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        body = kind([64] + [options.width] * options.layers, shortcut=shortcut)
        return Classifier(body, options.width)


def make_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=options.lr, momentum=options.momentum)


def step(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(
    model: Classifier,
    digits: Digits,
    batches: list[Tensor],
    options: Options,
    on_epoch: Callable[[], None] = lambda: None,
) -> tuple[list[float], float]:
    # Returns the loss of every step, and the fraction of held-out digits that are right in the end. Calls ``on_epoch``
    # after each epoch.
    dtype = model.head.weight.dtype
    x, optimizer = digits.x.to(dtype), make_optimizer(model, options)
    losses = []
    per_epoch = len(batches) // options.epochs
    for done, rows in enumerate(batches, start=1):
        losses.append(step(model, optimizer, x[rows], digits.y[rows]))
        if done % per_epoch == 0:
            on_epoch()
    with torch.no_grad():
        right = model(digits.held_out_x.to(dtype)).argmax(-1) == digits.held_out_y
    return torch.stack(losses).double().tolist(), right.double().mean().item()
