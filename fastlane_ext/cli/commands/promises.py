"""The promises that ``fastlane check`` measures, each as JSON-able rows; runs in one process per
instruction set.

A row has ``promise``, ``dtype``, ``activation``, ``what``, the error ``fused`` made, the one ``eager``
makes in the same place (None where there is no such thing), the ``limit`` on the fused one and ``ok``.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastlane_ext
from fastlane_ext import experiments, reference
from fastlane_ext._gelu64 import gelu64
from fastlane_ext.bench.machine import torch_threads

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
OUTPUTS = ("y", "dx", "dW", "db", "dresidual")
HARD_RATIO = 2.0
Row = dict[str, Any]

# (rows, in, out, scale of the weight, shape of the residual: full or a row)
_SHAPES = (
    (64, 64, 64, 1.0, "full"),
    (37, 53, 29, 1.0, "row"),
    (5, 130, 17, 3.0, "full"),
    (257, 33, 65, 1.0, "full"),
    (96, 256, 48, 0.5, "row"),
    (1, 64, 64, 1.0, "full"),
)
# mpmath is exact and slow.
_SMALL_SHAPES = (
    (8, 16, 8, 1.0, "full"),
    (7, 13, 9, 2.0, "row"),
    (5, 3, 17, 1.0, "full"),
    (40, 16, 8, 1.0, "full"),
)
# A largest error over few sums is luck; over several draws of each shape it says something.
_DRAWS = 4

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

Inputs = dict[str, Tensor]


def _inputs(shape: tuple[int, int, int, float, str], dtype: torch.dtype, seed: int) -> Inputs:
    rows, fan_in, fan_out, scale, residual = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return {
        "x": random(rows, fan_in).to(dtype),
        "weight": (random(fan_out, fan_in) * (scale * fan_in**-0.5)).to(dtype),
        "bias": random(fan_out).to(dtype),
        "residual": (random(rows, fan_out) if residual == "full" else random(fan_out)).to(dtype),
        "dy": random(rows, fan_out).to(dtype),
    }


def _run(layer: Callable[..., Tensor], inputs: Inputs, activation: str) -> list[Tensor]:
    # y and the gradients of x, W, b and the residual, in the order of OUTPUTS.
    leaves = [inputs[name].clone().requires_grad_() for name in ("x", "weight", "bias", "residual")]
    y = layer(*leaves, activation=activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs["dy"])]


def _exact(inputs: Inputs, activation: str) -> list[Tensor]:
    return _run(reference.linear_gelu_residual, {k: v.double() for k, v in inputs.items()}, activation)


def _multiprecision_activation(z: Any, activation: str) -> tuple[Any, Any]:
    # (act(z), act'(z)) in mpmath numbers.
    from mpmath import mp

    if activation == "none":
        return z, mp.mpf(1)
    if activation == "gelu":
        cdf = mp.erfc(-z / mp.sqrt(2)) / 2
        return z * cdf, cdf + z * mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)
    c, k = mp.sqrt(2 / mp.pi), mp.mpf(0.044715)
    gate = 1 / (1 + mp.exp(-2 * c * (z + k * z**3)))
    return z * gate, gate + z * gate * (1 - gate) * 2 * c * (1 + 3 * k * z * z)


def _multiprecision(inputs: Inputs, activation: str) -> list[list[list[Any]]]:
    # The same five results with 40 digits, as nested lists of mpmath numbers.
    from mpmath import mp, mpf

    with mp.workdps(40):
        x, weight, dy = ([[mpf(v) for v in row] for row in inputs[n].tolist()] for n in ("x", "weight", "dy"))
        bias = [mpf(v) for v in inputs["bias"].tolist()]
        full = inputs["residual"].dim() == 2
        residual = inputs["residual"].tolist() if full else [inputs["residual"].tolist()] * len(x)
        y, dz = [], []
        for i, row in enumerate(x):
            z = [mp.fdot(row, weight[n]) + bias[n] for n in range(len(weight))]
            pairs = [_multiprecision_activation(value, activation) for value in z]
            y.append([value + mpf(residual[i][n]) for n, (value, _) in enumerate(pairs)])
            dz.append([dy[i][n] * slope for n, (_, slope) in enumerate(pairs)])
        dz_columns, dy_columns = list(zip(*dz, strict=True)), list(zip(*dy, strict=True))
        x_columns, weight_columns = list(zip(*x, strict=True)), list(zip(*weight, strict=True))
        dx = [[mp.fdot(row, column) for column in weight_columns] for row in dz]
        dweight = [[mp.fdot(column, other) for other in x_columns] for column in dz_columns]
        db = [[mp.fsum(column) for column in dz_columns]]
        dresidual = dy if full else [[mp.fsum(column) for column in dy_columns]]
        return [y, dx, dweight, db, dresidual]


def _error(got: Tensor, exact: Tensor) -> float:
    # Largest difference, relative to the largest exact value.
    scale = max(exact.abs().max().item(), 1e-300)
    error = (got.double() - exact).abs().max().item() / scale
    return error if error == error else math.inf


def _multiprecision_error(got: Tensor, exact: list[list[Any]]) -> float:
    from mpmath import mp, mpf

    if not torch.isfinite(got).all():
        return math.inf
    with mp.workdps(40):
        rows = got.reshape(len(exact), -1).tolist()
        scale = max(abs(value) for row in exact for value in row)
        pairs = [(mpf(a), b) for mine, other in zip(rows, exact, strict=True) for a, b in zip(mine, other, strict=True)]
        return float(max(abs(a - b) for a, b in pairs) / max(scale, mpf("1e-300")))


def ratio(fused: float, eager: float) -> float:
    """How many times eager's error the fused one is; 1 where both are exact."""
    if eager == 0:
        return 1.0 if fused == 0 else math.inf
    return fused / eager


class Counter:
    """The fused layer, counting its calls: ``stats()`` must agree in the end."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        self.calls += 1
        return fastlane_ext.linear_gelu_residual(*args, **options)


def accuracy(fused: Counter, dtype_name: str, activation: str) -> list[Row]:
    """Errors of fused and eager against fp64 (fp64 itself: against 40 digits), pooled over layers; five
    rows."""
    dtype = DTYPES[dtype_name]
    worst: dict[str, list[float]] = {name: [0.0, 0.0] for name in OUTPUTS}
    wide = dtype == torch.float64
    for seed, shape in enumerate((_SMALL_SHAPES if wide else _SHAPES) * _DRAWS):
        inputs = _inputs(shape, dtype, seed)
        exact: list[Any] = _multiprecision(inputs, activation) if wide else _exact(inputs, activation)
        measure: Callable[[Tensor, Any], float] = _multiprecision_error if wide else _error
        for place, layer in enumerate((fused, reference.linear_gelu_residual)):
            for name, got, want in zip(OUTPUTS, _run(layer, inputs, activation), exact, strict=True):
                worst[name][place] = max(worst[name][place], measure(got, want))
    rows = []
    for name, (mine, eagers) in worst.items():
        limit = HARD_RATIO * eagers
        rows.append(_row("error of a layer", dtype_name, activation, name, mine, eagers, limit, mine <= limit))
    return rows


def _row(
    promise: str,
    dtype: str,
    activation: str,
    what: str,
    fused: float,
    eager: float | None,
    limit: float,
    ok: bool,
) -> Row:
    return {
        "promise": promise,
        "dtype": dtype,
        "activation": activation,
        "what": what,
        "fused": fused,
        "eager": eager,
        "limit": limit,
        "ratio": None if eager is None else ratio(fused, eager),
        "ok": bool(ok),
    }


def _through_layer(layer: Callable[..., Tensor], x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    # GELU and its derivative as a layer computes them: one input, one output, weight 1, no bias.
    leaf = x.unsqueeze(1).requires_grad_()
    y = layer(leaf, torch.ones(1, 1, dtype=x.dtype), activation=activation)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach().squeeze(1), dx.squeeze(1)


def _dense_float32() -> Tensor:
    # Every 1,024th bit pattern of either sign up to 10, and a million evenly spaced values.
    ten = torch.tensor(10.0).view(torch.int32).item()
    patterns = torch.arange(0, int(ten) + 1, 1024, dtype=torch.int32).view(torch.float32)
    return torch.cat([patterns, -patterns, torch.linspace(-10, 10, 1_000_001)])


def scalar_float32(fused: Counter, activation: str) -> list[Row]:
    """Relative error of GELU over fp32 in [-10, 10], and of GELU' relative to Φ(x) + |x|φ(x): at most
    1e-5."""
    x = _dense_float32()
    value, slope, slope_size = gelu64(x.double(), activation)
    smallest = torch.finfo(torch.float32).smallest_normal
    errors = []
    for layer in (fused, reference.linear_gelu_residual):
        y, dx = _through_layer(layer, x, activation)
        # Below the smallest normal number a relative error has no meaning; there half of its ulp is
        # allowed.
        off = ((y.double() - value).abs() / value.abs().clamp_min(smallest)).max().item()
        off_slope = ((dx.double() - slope).abs() / slope_size.clamp_min(smallest)).max().item()
        errors.append([e if e == e else math.inf for e in (off, off_slope)])
    return [
        _row("GELU on [-10, 10]", "float32", activation, what, mine, eagers, 1e-5, mine <= 1e-5)
        for what, mine, eagers in zip(("value", "derivative"), *errors, strict=True)
    ]


def _ulps(got: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp_min(info.smallest_normal))[1] - 1
    ulp = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    error = ((got.double() - exact).abs() / ulp).max().item()
    return error if error == error else math.inf


def scalar_half(fused: Counter, dtype_name: str, activation: str) -> list[Row]:
    """GELU and GELU' at all 65,536 values of a 16-bit type, in units in the last place: at most one.

    NaN must stay NaN; at +infinity the values are infinity and 1, at -infinity 0 and 0.
    """
    dtype = DTYPES[dtype_name]
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = torch.isfinite(x)
    value, slope, _ = gelu64(x.double(), activation)
    errors = []
    for layer in (fused, reference.linear_gelu_residual):
        results = _through_layer(layer, x, activation)
        pair = []
        for got, exact, at_infinity in zip(results, (value, slope), (math.inf, 1.0), strict=True):
            special = (
                bool(got[x.isnan()].isnan().all())
                and bool((got[x == math.inf] == at_infinity).all())
                and bool((got[x == -math.inf] == 0).all())
            )
            pair.append(_ulps(got[finite], exact[finite], dtype) if special else math.inf)
        errors.append(pair)
    return [
        _row("all 65,536 values, in ulp", dtype_name, activation, what, mine, eagers, 1.0, mine <= 1.0)
        for what, mine, eagers in zip(("value", "derivative"), *errors, strict=True)
    ]


def published_table() -> list[Row]:
    """The published mean gradients, without and with shortcuts, from the fused network."""
    rows = []
    for name, expected in PUBLISHED.items():
        errors = []
        for eager in (False, True):
            demo = experiments.published(eager=eager)
            model = demo.with_shortcuts if name == "with shortcut" else demo.without
            torch.nn.functional.mse_loss(model(demo.x), torch.zeros(1, 1)).backward()
            means = [layer[0].weight.grad.abs().mean().item() for layer in model.layers]
            errors.append(max(abs(a - b) / b for a, b in zip(means, expected, strict=True)))
        mine, eagers = errors
        ok = mine <= PUBLISHED_TOLERANCE
        rows.append(_row("published table", "float32", "gelu_tanh", name, mine, eagers, PUBLISHED_TOLERANCE, ok))
    return rows


def determinism(fused: Counter, dtype_name: str) -> list[Row]:
    """Results whose bits differ over 1, 2, 3 and 4 threads or between two runs: none may."""
    differing = 0
    with torch_threads(torch.get_num_threads()):
        for seed, shape in enumerate(((515, 129, 67, 1.0, "full"), (2048, 64, 64, 1.0, "full"))):
            inputs = _inputs(shape, DTYPES[dtype_name], seed)
            first: list[Tensor] | None = None
            for threads in (1, 1, 2, 3, 4):
                torch.set_num_threads(threads)
                got = _run(fused, inputs, "gelu")
                first = first or got
                differing += sum(not torch.equal(a, b) for a, b in zip(first, got, strict=True))
    row = _row("same bits, 1 to 4 threads", dtype_name, "gelu", "differing", differing, None, 0, not differing)
    return [row]


def groups(fused: Counter, isa: str) -> list[tuple[str, Callable[[], list[Row]]]]:
    """All measurements, as (what to tell the user, call).

    Torch's own operators, which run where ``isa`` is ``"none"``, are never less exact than themselves; what our
    kernels promise beyond that they do not keep.
    """
    out: list[tuple[str, Callable[[], list[Row]]]] = []
    for dtype in DTYPES:
        for activation in reference.ACTIVATIONS:
            out.append((f"{dtype} {activation}", lambda d=dtype, a=activation: accuracy(fused, d, a)))
    if isa == "none":
        return [*out, ("published table", published_table)]
    for activation in ("gelu", "gelu_tanh"):
        out.append((f"float32 sweep {activation}", lambda a=activation: scalar_float32(fused, a)))
        for dtype in ("bfloat16", "float16"):
            out.append((f"{dtype} sweep {activation}", lambda d=dtype, a=activation: scalar_half(fused, d, a)))
    out.append(("published table", published_table))
    out.extend((f"threads {dtype}", lambda d=dtype: determinism(fused, d)) for dtype in DTYPES)
    return out


def path(calls: int) -> Row:
    """Whether ``stats()`` counted ``calls`` forwards and backwards on one of our paths, and no fallback."""
    counted = fastlane_ext.stats()
    reasons_counted = counted.pop("fallback")
    # Torch differentiates its own operators.
    directions = ("forward",) if fastlane_ext.cpu_isa() == "none" else ("forward", "backward")
    fewest = min(sum(path[name] for path in counted.values()) for name in directions)
    fallbacks = sum(reasons_counted.values())
    reasons = "; ".join(f"{reason} ({n})" for reason, n in reasons_counted.items())
    missing = max(0, calls - fewest) + fallbacks
    row = _row("the fused path ran", "all", "all", "calls elsewhere", missing, None, 0, missing == 0)
    return {**row, "note": reasons or f"{calls} calls, {fewest} of them fused both ways"}


def died(reason: str) -> Row:
    """The failed row that stands for measurements that never came."""
    return {**_row("runs to the end", "all", "all", "errors", 1, None, 0, False), "note": reason}


def measure() -> Iterator[tuple[str, list[Row]]]:
    """All rows of this process's instruction set, group by group."""
    fused = Counter()
    fastlane_ext.reset_stats()
    for name, call in groups(fused, fastlane_ext.cpu_isa()):
        try:
            rows = call()
        except Exception as error:  # a crash is a failed promise of this group, not the end of the table
            rows = [died(f"{name}: {type(error).__name__}: {error}")]
        yield name, rows
    yield "path", [path(fused.calls)]


def worker() -> None:
    """Entry of the subprocess: one JSON document a line on stdout, the instruction set first."""
    print(json.dumps({"isa": fastlane_ext.cpu_isa()}), flush=True)
    for name, rows in measure():
        print(json.dumps({"group": name, "rows": rows}), flush=True)
    sys.stdout.flush()
