"""The contestants: eager, ``torch.compile``, ``F.linear`` alone, oneDNN with a packed weight, alone and with
GELU and shortcut, ONNX Runtime, and the fused op.

Each contestant has a forward (to be called without grad) and a step (forward and backward). A contestant that does not
exist for a case is a ``Skipped`` with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlane_ext
from fastlane_ext import reference

from .onnx_runtime import Link, runtime_of
from .protocol import Call, Skipped, reason_of

NAMES = ("eager", "compile", "linear", "onednn_linear", "onednn", "onnxruntime", "fused")
_LINEAR_ALONE = ("linear", "onednn_linear")
NO_COMPILE = Skipped("left out by --no-compile")
_NO_BACKWARD = Skipped("an inference op: it has no backward")
_NO_CHAIN = Skipped("the layers' inputs grow: bare linear layers do not chain")
_NO_LINKS = Skipped("the ONNX graph of this shortcut is not built here")

# The largest difference from eager that rounding can explain, relative to eager's largest output.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass
class Contestant:
    """A name and the calls to time; ``leaves`` are the tensors whose ``.grad`` a step fills."""

    name: str
    forward: Callable[[], Tensor] | Skipped
    step: Call | Skipped
    leaves: Sequence[Tensor] = ()
    same_formula: bool = True


def contestant(
    name: str, run: Callable[[], Tensor], leaves: Sequence[Tensor], backward: Callable[[Tensor], None]
) -> Contestant:
    def step() -> None:
        backward(run())
        for leaf in leaves:
            leaf.grad = None

    return Contestant(name, run, step, leaves, same_formula=name not in _LINEAR_ALONE)


def onednn_linear(weight: Tensor, rows: int) -> Callable[[Tensor, Tensor | None, str], Tensor] | Skipped:
    # The operators that torch.compile's freezing pass emits: the weight is reordered once, GELU is in the epilogue.
    ops = torch.ops.mkldnn
    try:
        packed = ops._reorder_linear_weight(weight.detach(), rows)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return Skipped(reason_of(error))

    def linear(x: Tensor, bias: Tensor | None, attr: str) -> Tensor:
        return ops._linear_pointwise(x, packed, bias, attr, [], "none" if attr == "gelu" else "")

    return linear


def onednn_contestants(
    alone: Callable[[], Tensor] | Skipped, whole: Callable[[], Tensor] | Skipped
) -> list[Contestant]:
    return [
        Contestant("onednn_linear", alone, _NO_BACKWARD, same_formula=False),
        Contestant("onednn", whole, _NO_BACKWARD),
    ]


def onnx_contestant(chain: Sequence[Link] | Skipped, inputs: Mapping[str, Tensor]) -> Contestant:
    return Contestant("onnxruntime", runtime_of(chain, inputs), _NO_BACKWARD)


def layer_contestants(
    rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    *,
    compiled: bool = True,
    seed: int = 0,
) -> list[Contestant]:
    """Contestants for ``gelu(x Wᵀ + b) + residual``, with x ``(rows, in)`` and W ``(out, in)``, all random.

    The residual is x itself where the sizes allow it, else a tensor of its own. A step backpropagates a
    random gradient into x, W, b and the residual.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    x = random(rows, in_features).requires_grad_()
    weight = random(out_features, in_features, scale=in_features**-0.5).requires_grad_()
    bias = random(out_features).requires_grad_()
    same = in_features == out_features
    residual = x if same else random(rows, out_features).requires_grad_()
    dy = random(rows, out_features)
    leaves = [x, weight, bias] if same else [x, weight, bias, residual]

    def composition(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias)) + residual

    def backward(y: Tensor) -> None:
        y.backward(dy)

    fused = fastlane_ext.linear_gelu_residual
    compiled_composition = torch.compile(composition, dynamic=False)
    out = [
        contestant("eager", lambda: composition(x, weight, bias, residual), leaves, backward),
        contestant("compile", lambda: compiled_composition(x, weight, bias, residual), leaves, backward),
        contestant("linear", lambda: F.linear(x, weight, bias), [x, weight, bias], backward),
    ]
    if not compiled:
        out[1] = Contestant("compile", NO_COMPILE, NO_COMPILE)
    packed = onednn_linear(weight, rows)
    if isinstance(packed, Skipped):
        out += onednn_contestants(packed, packed)
    else:
        out += onednn_contestants(lambda: packed(x, bias, "none"), lambda: packed(x, bias, "gelu") + residual)
    inputs = {"x": x} if same else {"x": x, "residual": residual}
    out.append(onnx_contestant([Link(weight, bias, adds="h" if same else "residual")], inputs))
    out.append(contestant("fused", lambda: fused(x, weight, bias, residual), leaves, backward))
    return out


def _onednn_network(model: reference.ResidualNetwork, x: Tensor) -> list[Contestant]:
    rows = x.numel() // x.shape[-1]
    layers: list[tuple[Callable[..., Tensor], Tensor, Callable[..., Tensor] | None, nn.Linear | None]] = []
    layer: Any
    projection: Any
    for index, layer in enumerate(model.layers):
        linear: nn.Linear = layer[0]
        projection = model.projections[index] if model.projections is not None else None
        run = onednn_linear(linear.weight, rows)
        project = None if projection is None else onednn_linear(projection.weight, rows)
        if isinstance(run, Skipped):
            return onednn_contestants(run, run)
        if isinstance(project, Skipped):
            return onednn_contestants(project, project)
        layers.append((run, linear.bias, project, projection))

    def forward() -> Tensor:
        h = x
        for run, bias, project, projection in layers:
            y = run(h, bias, "gelu")
            if model.shortcut == "concat":
                h = torch.cat([h, y], -1)
            elif project is not None and projection is not None:
                h = y + project(h, projection.bias, "none")
            else:
                h = y + h if model.shortcut != "none" and y.shape == h.shape else y
        return h

    def chain() -> Tensor:
        h = x
        for run, bias, _, _ in layers:
            h = run(h, bias, "none")
        return h

    return onednn_contestants(_NO_CHAIN if model.shortcut == "concat" else chain, forward)


def _onnx_network(model: reference.ResidualNetwork, x: Tensor) -> Contestant:
    if model.shortcut not in ("identity", "none"):
        return onnx_contestant(_NO_LINKS, {"x": x})
    layers: list[Any] = list(model.layers)
    adds = [
        "h" if model.shortcut == "identity" and layer[0].in_features == layer[0].out_features else None
        for layer in layers
    ]
    chain = [Link(layer[0].weight, layer[0].bias, adds=added) for layer, added in zip(layers, adds, strict=True)]
    return onnx_contestant(chain, {"x": x})


def network_contestants(
    sizes: Sequence[int],
    input_shape: Sequence[int],
    shortcut: str,
    dtype: torch.dtype,
    *,
    compiled: bool = True,
    seed: int = 0,
) -> list[Contestant]:
    """Contestants for a whole network on a random input; all start from the same parameters.

    A step clears the gradients, runs forward, the mean square of the output as loss, and backward into
    every parameter. ``linear`` and ``onednn_linear`` are chains of linear layers alone.
    """
    torch.manual_seed(seed)
    eager = reference.ResidualNetwork(list(sizes), shortcut=shortcut).to(dtype)
    x = torch.randn(*input_shape).to(dtype)
    fused = fastlane_ext.ResidualNetwork(list(sizes), shortcut=shortcut).to(dtype)
    fused.load_state_dict(eager.state_dict())
    compiled_eager = torch.compile(eager, dynamic=False)
    zeros = torch.zeros_like(_without_grad(lambda: eager(x)))

    def backward(y: Tensor) -> None:
        F.mse_loss(y, zeros).backward()

    parameters, fused_parameters = list(eager.parameters()), list(fused.parameters())
    out = [
        contestant("eager", lambda: eager(x), parameters, backward),
        contestant("compile", lambda: compiled_eager(x), parameters, backward),
    ]
    if not compiled:
        out[1] = Contestant("compile", NO_COMPILE, NO_COMPILE)
    if shortcut == "concat":
        out.append(Contestant("linear", _NO_CHAIN, _NO_CHAIN))
    else:
        layers: list[Any] = list(eager.layers)
        linears = [layer[0] for layer in layers]

        def chain() -> Tensor:
            h = x
            for linear in linears:
                h = F.linear(h, linear.weight, linear.bias)
            return h

        out.append(contestant("linear", chain, [p for m in linears for p in m.parameters()], backward))
    out += _onednn_network(eager, x)
    out.append(_onnx_network(eager, x))
    out.append(contestant("fused", lambda: fused(x), fused_parameters, backward))
    return out


def _without_grad(call: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return call()


def reject_wrong_answers(contestants: Sequence[Contestant], on_contestant: Callable[[str], None] | None = None) -> None:
    """Run every forward once; replace a contestant that fails or differs from eager by the reason.

    The speed of a wrong answer means nothing. ``on_contestant`` gets each name before the call, which may compile.
    """
    expected: Tensor | None = None
    for contestant in contestants:
        if isinstance(contestant.forward, Skipped):
            continue
        if on_contestant is not None:
            on_contestant(contestant.name)
        problem = None
        try:
            y = _without_grad(contestant.forward).double()
        except Exception as error:
            problem = reason_of(error)
        else:
            if expected is None:
                expected = y
                tolerance = _TOLERANCE[_dtype_of(contestant)]
            elif contestant.same_formula:
                difference = (y - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
                if not difference <= tolerance:
                    problem = f"wrong result: differs from eager by {difference:.1e} of its largest output"
        if problem is not None:
            contestant.forward = Skipped(problem)
            if not isinstance(contestant.step, Skipped):
                contestant.step = Skipped(problem)


def stats_since(before: dict[str, Any]) -> dict[str, Any]:
    """The counts of ``fastlane_ext.stats()`` since ``before``, in the same form, without fallbacks of zero."""
    after = fastlane_ext.stats()
    since = {name: {key: n - before[name].get(key, 0) for key, n in counts.items()} for name, counts in after.items()}
    since["fallback"] = {reason: n for reason, n in since["fallback"].items() if n}
    return since


def _dtype_of(contestant: Contestant) -> torch.dtype:
    return contestant.leaves[0].dtype if contestant.leaves else torch.float32
