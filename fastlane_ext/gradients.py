"""How large the gradients are, layer by layer: printed, as a table, as JSON or as a picture.

Looking at gradients changes nothing: ``.grad``, buffers (a BatchNorm's running statistics), the random state and train
or eval mode stay as they were, and no optimizer steps. `_differentiate` describes how.

``GradientReport.plot`` and `fastlane_ext.plots` need matplotlib: ``pip install "fastlane_ext[plot]"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import networks, reference
from ._arguments import bad, check_choice, check_layer_sizes, check_seed, check_tensor
from ._differentiate import check_model, differentiate, untouched, whole
from ._gradient_report import GradientComparison, GradientReport, GradientRow

__all__ = [
    "GradientComparison",
    "GradientReport",
    "GradientRow",
    "ShortcutDemo",
    "gradient_report",
    "print_gradients",
    "shortcut_demo",
]

Loss = Callable[[Any, Any], Tensor]
_STYLES = ("lines", "full", "table")
_TABLE_HEADING = "Gradients by layer"


def _loss(output: Any, target: Any, loss_fn: Loss | None) -> Tensor:
    if loss_fn is None and (not isinstance(output, Tensor) or not output.dtype.is_floating_point):
        returned = f"{output.dtype} tensor" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"loss_fn: got None for a model that returns a {returned}, expected a function "
            "loss_fn(output, target) -> scalar tensor; pass one that picks the tensor to look at"
        )
    if target is None and isinstance(output, Tensor):
        target = torch.zeros_like(output)
    if loss_fn is None:
        if target.shape != output.shape:
            raise ValueError(
                f"target: got shape {tuple(target.shape)}, expected the output's {tuple(output.shape)}; "
                "reshape it, or pass your own loss_fn(output, target)"
            )
        return F.mse_loss(output, target)
    loss = loss_fn(output, target)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn: got {got}, expected a tensor of one element; take its mean or sum")
    if loss.is_complex():
        raise ValueError(f"loss_fn: got {loss.dtype}, expected a real number; take its abs() or its real part")
    return loss


def _recordable(value: Any) -> Any:
    # Autograd cannot save an inference tensor, but it can save a copy.
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) and t.is_inference() else t, value)


def _gradients(
    model: nn.Module, x: Any, target: Any, loss_fn: Loss | None, keep_grad: bool
) -> tuple[float, list[tuple[str, Tensor, Tensor | None]]]:
    """The loss and, for each parameter once, its name, itself and its gradient or None."""
    check_model(model)
    if loss_fn is not None and not callable(loss_fn):
        raise bad("loss_fn", repr(loss_fn), "a function loss_fn(output, target)", "or None for MSE", TypeError)
    if loss_fn is None and target is not None:
        check_tensor("target", target)
    with torch.inference_mode(False), torch.enable_grad(), untouched(model, x, target):
        x, target = _recordable(x), _recordable(target)
        known = [*model.parameters(), *(t for t in tree_leaves((x, target)) if isinstance(t, Tensor))]
        loss = _loss(model(x), target, loss_fn)
        if not loss.requires_grad:
            raise ValueError(
                "model: got an output that no parameter has a part in, expected a differentiable one; "
                "look for detach() or no_grad() in its forward"
            )
        rows = differentiate(model, loss, known)
    if keep_grad:
        for _, p, grad in rows:
            if grad is not None:
                p.grad = grad.clone() if p.grad is None else p.grad.add_(grad)
    return whole(loss.detach()).item(), [(n, p.detach(), None if g is None else g.detach()) for n, p, g in rows]


def _wide(tensor: Tensor) -> Tensor:
    # In fp32 and fp64 the mean equals eager code's to the last digit; narrower types would round the mean.
    narrow = {torch.complex32: torch.complex64, torch.float64: torch.float64, torch.complex128: torch.complex128}
    return tensor.to(narrow.get(tensor.dtype, torch.complex64 if tensor.is_complex() else torch.float32))


def _mean_abs(grad: Tensor) -> float:
    grad = whole(grad)
    return _wide(grad).abs().mean().item() if grad.numel() else 0.0


def print_gradients(
    model: nn.Module,
    x: Any,
    *,
    style: str = "lines",
    target: Any = None,
    loss_fn: Loss | None = None,
    keep_grad: bool = False,
    file: TextIO | None = None,
) -> None:
    """Print the mean absolute gradient of every weight, one line each, for one forward and backward of ``model``.

    Args:
        model: any module; a weight is a parameter with "weight" in its name.
        x: passed as ``model(x)``.
        style: ``"lines"``: ``{name} has gradient mean of {value:.6e}``; ``"full"``: the value's full digits;
            ``"table"``: a heading, a rule and ``{name}: gradient mean = {value:.6f}``.
        target: the loss's second argument; zeros in the output's shape, dtype and device unless given.
        loss_fn: a function ``loss_fn(output, target)`` that returns a tensor of one element; mean squared error unless
            given.
        keep_grad: also add the gradients to ``.grad``, as ``backward()`` would.
        file: where to print; standard output unless given.

    Raises:
        TypeError: the model's output is not a floating-point tensor and there is no ``loss_fn``, or an argument has
            the wrong type.
        ValueError: unknown ``style``, a target of another shape, a loss that is not one real number, nothing to
            differentiate, parameters on the meta device or made in inference mode, a FullyShardedDataParallel.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> print_gradients(model, torch.ones(1, 2))
    weight has gradient mean of 4.000000e+00
    """
    check_choice("style", style, _STYLES)
    _, rows = _gradients(model, x, target, loss_fn, keep_grad)
    if style == "table":
        print(_TABLE_HEADING, "-" * len(_TABLE_HEADING), sep="\n", file=file)
    weights = [(name, grad) for name, _, grad in rows if "weight" in name]
    if not weights:
        print(f'no parameter has "weight" in its name; gradient_report lists all {len(rows)} parameters', file=file)
    for name, grad in weights:
        if grad is None:
            print(f"{name}: no gradient" if style == "table" else f"{name} has no gradient", file=file)
            continue
        value = _mean_abs(grad)
        if style == "table":
            print(f"{name}: gradient mean = {value:.6f}", file=file)
        else:
            print(f"{name} has gradient mean of {value if style == 'full' else f'{value:.6e}'}", file=file)


def _row(name: str, parameter: Tensor, grad: Tensor | None) -> GradientRow:
    shape = tuple(parameter.shape)
    if grad is None:
        return GradientRow(name, shape)
    grad, parameter = whole(grad), whole(parameter)
    size = max(grad.numel(), 1)
    # Absolute values first: a conversion to real numbers would drop the imaginary parts.
    absolute, weights = (t.to(torch.complex128 if t.is_complex() else torch.float64).abs() for t in (grad, parameter))
    norm, weight = (torch.linalg.vector_norm(t).item() for t in (absolute, weights))
    return GradientRow(
        name,
        shape,
        mean_abs=_mean_abs(grad),
        l2=norm,
        max_abs=absolute.max().item() if grad.numel() else 0.0,
        zero_fraction=(grad == 0).sum().item() / size,
        nonfinite_fraction=(~torch.isfinite(grad)).sum().item() / size,
        ratio=norm / weight if weight else math.inf if norm > 0 else math.nan,
    )


def gradient_report(
    model: nn.Module, x: Any, target: Any = None, loss_fn: Loss | None = None, *, keep_grad: bool = False
) -> GradientReport:
    """Figures on every parameter's gradient for one forward and backward of ``model``.

    Arguments and errors are as in `print_gradients`. A shared parameter is listed once, under its first name. A frozen
    or unused parameter has no gradient and shows "-". Figures of complex gradients use the absolute values. Lazy
    modules are initialised, as by any forward.

    Under FSDP2 and tensor parallelism every process has to make the call. The figures then describe whole parameters,
    with gradients averaged as ``backward()`` averages them. Under DistributedDataParallel the figures describe the
    process's own gradients.

    >>> import torch
    >>> report = gradient_report(torch.nn.Linear(2, 1), torch.zeros(3, 2))
    >>> report.rows[0].name, report.rows[0].zero_fraction
    ('weight', 1.0)
    """
    loss, rows = _gradients(model, x, target, loss_fn, keep_grad)
    return GradientReport(loss, tuple(_row(*row) for row in rows))


class ShortcutDemo(NamedTuple):
    """The result of `shortcut_demo`: an input, and the network without and with shortcuts."""

    x: Tensor
    without: reference.ResidualNetwork
    with_shortcuts: reference.ResidualNetwork


def shortcut_demo(
    layer_sizes: Sequence[int] = (1, 64, 64, 64, 64, 1),
    *,
    seed: int = 42,
    activation: str = "gelu",
    shortcut: str = "identity",
    x: Tensor | None = None,
    eager: bool = False,
) -> ShortcutDemo:
    """The pair of networks that shows what shortcuts do to gradients: the ``example`` of `fastlane_ext.experiments`.

    After one ``torch.manual_seed(seed)``, first ``torch.randn(1, layer_sizes[0])`` is drawn, then the parameters of the
    network without shortcuts, then the parameters of the network with shortcuts. The two networks therefore start from
    different values. The random state is restored.

    Args:
        layer_sizes, activation, shortcut: as in `ResidualNetwork`; ``"identity"`` adds x where the sizes are equal.
        seed: for ``torch.manual_seed``, at least -2**63 and less than 2**64.
        x: an input of your own in place of the random one, ``(*, layer_sizes[0])``.
        eager: make the networks of `fastlane_ext.reference`, with the same values, instead of the fused networks.

    Raises:
        TypeError, ValueError: one line naming the argument, its value and the expected one.

    >>> demo = shortcut_demo(eager=True)
    >>> f"{gradient_report(demo.without, demo.x).rows[0].mean_abs:.5e}"
    '1.79718e-05'
    """
    kind = reference.ResidualNetwork if eager else networks.ResidualNetwork
    sizes = check_layer_sizes("layer_sizes", layer_sizes)
    with seeded(seed):
        drawn = torch.randn(1, sizes[0])
        without, with_shortcuts = (kind(sizes, shortcut=rule, activation=activation) for rule in ("none", shortcut))
    return ShortcutDemo(drawn if x is None else x, without, with_shortcuts)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block whose random numbers follow ``torch.manual_seed(seed)``; the random state is restored after the block."""
    check_seed("seed", seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
