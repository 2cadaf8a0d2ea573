"""Calls of all four operations, drawn by hypothesis: the operation, the data and its layouts, the expected result."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastlane_ext as fl
from support.cases import IN_X, RESIDUALS
from support.choices import ACTIVATIONS, DTYPES
from support.layouts import ALL_LAYOUTS, SHARING_LAYOUTS
from support.oracle import activation_and_slope

OPS = ("linear_gelu_residual", "linear_gelu_concat", "mlp_residual", "residual_stack")
SHORTCUTS = ("identity", "projection", "concat", "none")


@dataclass(frozen=True)
class Plan:
    """A call without its data, so that several seeds can make calls of one plan."""

    op: str
    dtype: torch.dtype
    leading: tuple[int, ...]
    widths: tuple[int, ...]  # of x, then of each layer's own output
    shapes: dict[str, tuple[int, ...]]  # every tensor's, by name
    layouts: dict[str, str]
    needs: frozenset[str]  # which of them need a gradient
    activation: str
    recompute: bool
    residual: str
    shortcut: str  # between the layers
    integers: bool
    threads: tuple[int, ...]  # with so many one after the other

    def layers(self):
        """(weight, bias, projection, projection_bias, activation, shortcut) of each layer; None where absent."""
        name = lambda text: text if text in self.shapes else None  # noqa: E731
        if self.op == "mlp_residual":
            yield "fc1_weight", name("fc1_bias"), None, None, self.activation, "none"
            yield "fc2_weight", name("fc2_bias"), None, None, "none", "none"
        for i in range(len(self.widths) - 1 if self.op != "mlp_residual" else 0):
            suffix = str(i) if self.op == "residual_stack" else ""
            own = (f"{kind}{suffix}" for kind in ("weight", "bias", "projection", "projection_bias"))
            yield *map(name, own), self.activation, self.shortcut

    def call(self, seed: int) -> Call:
        generator = torch.Generator().manual_seed(seed)

        def data(name, shape):
            if self.integers:
                # So few that the sums between layers stay exact in 16 bits.
                chance = 1.5 / max(1, *shape) if len(shape) == 2 and "weight" in name or "projection" in name else 1
                kept = torch.rand(shape, generator=generator) < chance
                return (torch.randint(-1, 2, shape, generator=generator) * kept).to(self.dtype)
            t = torch.randn(shape, generator=generator, dtype=torch.float64)
            if "bias" not in name and ("weight" in name or "projection" in name):
                # Terms that are all the same add up to their number, not its root.
                shared = self.layouts[name] in SHARING_LAYOUTS
                t /= max(1, *shape) if shared else max(1, shape[1]) ** 0.5
            return t.to(self.dtype)

        tensors = {name: ALL_LAYOUTS[self.layouts[name]](data(name, shape)) for name, shape in self.shapes.items()}
        return Call(self, tensors)


@dataclass(frozen=True)
class Call:
    plan: Plan
    tensors: dict[str, Tensor]

    @property
    def x(self):
        return self.tensors["x"]

    def contiguous(self):
        return replace(self, tensors={name: t.contiguous() for name, t in self.tensors.items()})

    def output(self, kind, leaves: dict[str, Tensor]) -> Tensor:
        """The output of ``kind``'s operation: fastlane_ext's or its reference's."""
        plan, op, options = self.plan, getattr(kind, self.plan.op), {"activation": self.plan.activation}
        x, get = leaves["x"], leaves.get
        if plan.op == "linear_gelu_concat":
            return op(x, leaves["weight"], get("bias"), **options)
        if plan.op == "residual_stack":
            weights, biases, projections, projection_biases = zip(
                *([name and leaves[name] for name in layer[:4]] for layer in plan.layers()), strict=True
            )
            if plan.shortcut == "projection":
                options |= {"projections": projections, "projection_biases": projection_biases}
            return op(x, weights, biases, shortcut=plan.shortcut, recompute=plan.recompute, **options)
        residual_of = RESIDUALS[plan.residual]
        residual = residual_of and residual_of(x, get("residual"))
        if plan.op == "mlp_residual":
            parameters = [leaves["fc1_weight"], get("fc1_bias"), leaves["fc2_weight"], get("fc2_bias")]
        else:
            parameters = [leaves["weight"], get("bias")]
        return op(x, *parameters, residual, recompute=plan.recompute, **options)

    def run(self, kind) -> dict[str, Tensor]:
        leaves = {
            name: t.detach().requires_grad_(name in self.plan.needs)
            for name, t in self.tensors.items()
            if name != "grad"
        }
        y = self.output(kind, leaves)
        needed = {name: t for name, t in leaves.items() if t.requires_grad}
        assert y.requires_grad == bool(needed)
        grads = torch.autograd.grad(y, list(needed.values()), self.tensors["grad"]) if needed else ()
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(needed, grads, strict=True)}


def run_eager(call: Call) -> dict[str, Tensor]:
    """Runs the call on contiguous tensors, since torch's own GELU refuses a grad_output that overlaps itself."""
    return call.contiguous().run(fl.reference)


class Exact:
    """A call's results, in long double for float64 and in float64 otherwise."""

    def __init__(self, call: Call):
        self.plan, self.call = call.plan, call
        real = np.longdouble if call.x.dtype == torch.float64 else np.float64
        wide = {name: t.detach().double().numpy().astype(real) for name, t in call.tensors.items()}
        self.between = []  # whatever a kernel may have to store between two products
        rows = math.prod(self.plan.leading)
        h, backwards = wide["x"].reshape(rows, self.plan.widths[0]), []
        for names in self.plan.layers():
            h, backward = self._layer(h, wide, *names)
            backwards.append(backward)
            self.between.append(h)
        self.between.pop()
        dy = wide["grad"].reshape(rows, h.shape[1])
        self.gradients, dh = {}, dy
        for backward in reversed(backwards):
            dh = backward(dh)
            self.between.append(dh)
        self.between.pop()
        self.y, self.gradients["x"] = h.reshape(wide["grad"].shape), dh.reshape(wide["x"].shape)
        self._add_residual(call)

    def _layer(self, h, wide, weight, bias, projection, projection_bias, activation, shortcut):
        wide = wide | {None: None}
        w, b, p, q = wide[weight], wide[bias], wide[projection], wide[projection_bias]
        z = h @ w.T + (0 if b is None else b)
        y, slope = activation_and_slope(z, activation)
        self.between += [z]
        out = y.shape[1]
        adds_h = p is None and shortcut in ("identity", "projection") and out == h.shape[1]
        if p is not None:
            projected = h @ p.T + (0 if q is None else q)
            self.between += [projected]
            y = y + projected
        elif adds_h:
            y = y + h
        elif shortcut == "concat":
            y = np.concatenate([h, y], 1)

        def backward(dy):
            own = dy[:, -out or dy.shape[1] :]
            dz = own * slope
            self.gradients |= {weight: dz.T @ h, bias: dz.sum(0)}
            dh = dz @ w
            self.between += [dz]
            if p is not None:
                self.gradients |= {projection: own.T @ h, projection_bias: own.sum(0)}
                self.between += [dh, own @ p]
                return dh + own @ p
            return dh + (dy if adds_h else dy[:, : h.shape[1]] if shortcut == "concat" else 0)

        return y, backward

    def _add_residual(self, call):
        residual_of = RESIDUALS[self.plan.residual]
        if residual_of is None:
            return
        # Which elements it has, and where their gradients go, is torch's own indexing, in float64.
        name = "x" if self.plan.residual in IN_X else "residual"
        source = call.tensors[name].detach().double().requires_grad_()
        residual = residual_of(source, source)
        self.y = self.y + residual.detach().numpy()
        grad = call.tensors["grad"].double()
        (d_source,) = torch.autograd.grad(residual.expand(grad.shape), source, grad)
        if self.plan.residual == "view_of_x":
            # autograd adds two gradients of x, each rounded before.
            self.between += [self.gradients["x"], d_source.numpy()]
        self.gradients[name] = self.gradients.get(name, 0) + d_source.numpy()

    @property
    def results(self):
        return {"y": self.y} | {
            f"d{name}": self.gradients[name] for name in self.call.tensors if name in self.plan.needs
        }

    @property
    def is_representable(self):
        """Whether no value between the products is rounded."""
        stored = (torch.from_numpy(t.astype(np.float64)) for t in self.between)
        return all(torch.equal(t.to(self.plan.dtype).double(), t) for t in stored)


# Drawing

FEATURES = st.integers(0, 70) | st.sampled_from([129, 257, 400])
LEADING = (
    st.integers(0, 70).map(lambda n: (n,))
    | st.lists(st.integers(0, 6), max_size=4).map(tuple)
    | st.sampled_from([(193,), (385,), (600,), (2, 300)])
)
LAYOUT = st.sampled_from(["contiguous", "contiguous", *sorted(ALL_LAYOUTS)])
MOST_MULTIPLY_ADDS = 1_500_000


def shapes_of(op, leading, widths, *, shortcut="none", residual="none", bias=lambda layer: True):
    """Every tensor's shape, by name, and the features of the result."""
    shapes, fan_in = {}, widths[0]
    for i, out in enumerate(widths[1:]):
        weight, own_bias = {
            "residual_stack": (f"weight{i}", f"bias{i}"),
            "mlp_residual": (f"fc{i + 1}_weight", f"fc{i + 1}_bias"),
        }.get(op, ("weight", "bias"))
        shapes[weight] = (out, fan_in)
        if bias(i):
            shapes[own_bias] = (out,)
        if shortcut == "projection" and fan_in != out:
            shapes[f"projection{i}"] = (out, fan_in)
            if bias(i):
                shapes[f"projection_bias{i}"] = (out,)
        fan_in = fan_in + out if shortcut == "concat" else out
    if residual not in ("none", *IN_X):
        shapes["residual"] = (*leading, fan_in)
    return shapes | {"x": (*leading, widths[0]), "grad": (*leading, fan_in)}


def depth_of(op, depth):
    return {"residual_stack": depth, "mlp_residual": 2}.get(op, 1)


@st.composite
def plans(draw, op):
    leading = draw(LEADING)
    # Equal widths by turns, or a shortcut would never be an addition.
    first = draw(FEATURES)
    width = st.just(first) | FEATURES
    widths = (first, *(draw(width) for _ in range(depth_of(op, draw(st.integers(1, 5))))))
    shortcut = draw(st.sampled_from(SHORTCUTS)) if op == "residual_stack" else "none"
    if op == "linear_gelu_concat":
        shortcut = "concat"
    with_bias = draw(st.lists(st.booleans(), min_size=5, max_size=5))
    options = {"shortcut": shortcut, "bias": with_bias.__getitem__}
    shapes = shapes_of(op, leading, widths, **options)
    work = sum(math.prod(shape) for name, shape in shapes.items() if name not in ("x", "grad"))
    if work * math.prod(leading) > MOST_MULTIPLY_ADDS:
        leading = (draw(st.integers(1, 20)),)
    residual = "none"
    if op in ("linear_gelu_residual", "mlp_residual"):
        possible = {"none", "tensor", "column"}
        possible |= {"row"} if math.prod(leading) else set()
        possible |= {"scalar"} if math.prod(leading) * widths[-1] else set()
        possible |= {"x"} if first == widths[-1] else set()
        possible |= {"view_of_x"} if first else set()
        residual = draw(st.sampled_from(sorted(possible)))
    shapes = shapes_of(op, leading, widths, residual=residual, **options)
    leaves = sorted(set(shapes) - {"grad"})
    needs = draw(st.just(set(leaves)) | st.sets(st.sampled_from(leaves)))
    integers = draw(st.booleans())
    layouts = {name: draw(LAYOUT) for name in shapes}
    if not integers:
        # Terms that are all the same round the same way: their error is the order's of adding, not the kernel's.
        for name in [name for name, layout in layouts.items() if layout in SHARING_LAYOUTS][1:]:
            layouts[name] = "contiguous"
    return Plan(
        op=op,
        dtype=draw(st.sampled_from(DTYPES)),
        leading=leading,
        widths=widths,
        shapes=shapes,
        layouts=layouts,
        needs=frozenset(needs),
        activation=draw(st.sampled_from(("none", "none", *ACTIVATIONS) if integers else ACTIVATIONS)),
        recompute=draw(st.booleans()),
        residual=residual,
        shortcut=shortcut,
        integers=integers,
        threads=draw(st.sampled_from([(1, 1, 2), (2, 2, 1), (3, 1), (2, 3)])),
    )
