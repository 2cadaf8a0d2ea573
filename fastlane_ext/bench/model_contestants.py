"""Contestants for the uses of `fuse`: a transformer's MLP, and whole models with and without `fuse`."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlane_ext
from fastlane_ext import reference

from . import contestants
from .contestants import NO_COMPILE, Contestant
from .onnx_runtime import Link
from .protocol import Skipped

_AS_WITHOUT_LINEARS = Skipped("as in the row without linears=True")
NO_TRANSFORMERS = Skipped("transformers is not installed; pip install transformers")
_NO_PACKED_MODEL = Skipped("a whole model: nobody packs its weights beforehand")
_NO_EXPORT = Skipped("a whole model: its export is not measured here")
_NO_CHAIN = Skipped("a whole model is more than a chain of linear layers")


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def mlp_contestants(
    rows: int, width: int, hidden: int, dtype: torch.dtype, *, compiled: bool = True, seed: int = 0
) -> list[Contestant]:
    """Contestants for ``x + fc2(gelu(fc1(x)))`` on random x. A step backpropagates a random gradient into x and the
    parameters. ``linear`` is only the two linear layers; ``onednn`` has both weights packed beforehand.
    """
    torch.manual_seed(seed)
    eager = reference.ResidualMLP(width, hidden).to(dtype)
    fused = fastlane_ext.ResidualMLP(width, hidden).to(dtype)
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(rows, width).to(dtype).requires_grad_()
    dy = torch.randn(rows, width).to(dtype)
    compiled_eager = torch.compile(eager, dynamic=False)
    fc1, fc2 = eager.fc1, eager.fc2

    def backward(y: Tensor) -> None:
        y.backward(dy)

    leaves = [x, *eager.parameters()]
    out = [
        contestants.contestant("eager", lambda: eager(x), leaves, backward),
        contestants.contestant("compile", lambda: compiled_eager(x), leaves, backward),
        contestants.contestant("linear", lambda: fc2(fc1(x)), leaves, backward),
    ]
    if not compiled:
        out[1] = Contestant("compile", NO_COMPILE, NO_COMPILE)
    packed = [contestants.onednn_linear(layer.weight, rows) for layer in (fc1, fc2)]
    missing = next((p for p in packed if isinstance(p, Skipped)), None)
    if missing is not None:
        out += contestants.onednn_contestants(missing, missing)
    else:
        run1, run2 = (run for run in packed if not isinstance(run, Skipped))
        out += contestants.onednn_contestants(
            lambda: run2(run1(x, fc1.bias, "none"), fc2.bias, "none"),
            lambda: x + run2(run1(x, fc1.bias, "gelu"), fc2.bias, "none"),
        )
    chain = [Link(fc1.weight, fc1.bias), Link(fc2.weight, fc2.bias, gelu=False, adds="x")]
    out.append(contestants.onnx_contestant(chain, {"x": x}))
    out.append(contestants.contestant("fused", lambda: fused(x), [x, *fused.parameters()], backward))
    return out


@dataclass(frozen=True)
class Architecture:
    """A model with random weights, built by transformers from a config, without dropout, and its input."""

    model_class: str
    config_class: str
    config: tuple[tuple[str, Any], ...]
    make_inputs: Callable[[], dict[str, Tensor]] = field(compare=False)

    def build(self) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config_class)(**dict(self.config))
        return getattr(transformers, self.model_class)(config).eval()

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        made = self.make_inputs()
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in made.items()}


def _gpt2_small(model_class: str) -> Architecture:
    return Architecture(
        model_class,
        "GPT2Config",
        (("resid_pdrop", 0.0), ("embd_pdrop", 0.0), ("attn_pdrop", 0.0)),
        lambda: {"input_ids": torch.randint(0, 50257, (1, 256))},
    )


GPT2_SMALL, GPT2_SMALL_WITH_HEAD = _gpt2_small("GPT2Model"), _gpt2_small("GPT2LMHeadModel")
VIT_SMALL = Architecture(
    "ViTModel",
    "ViTConfig",
    (("hidden_size", 384), ("num_hidden_layers", 12), ("num_attention_heads", 6), ("intermediate_size", 1536)),
    lambda: {"pixel_values": torch.randn(4, 3, 224, 224)},
)


def model_contestants(
    architecture: Architecture, linears: bool, dtype: torch.dtype, *, compiled: bool = True
) -> list[Contestant]:
    """Contestants for a whole model; ``fused`` is a copy of it after ``fuse(model, linears=linears)``.

    A step is forward, the mean square of the output as loss, and backward into every parameter.
    """
    if not has_transformers():
        return [Contestant(name, NO_TRANSFORMERS, NO_TRANSFORMERS) for name in contestants.NAMES]
    torch.manual_seed(1)
    inputs = architecture.inputs(dtype)
    eager = architecture.build().to(dtype)
    fused = copy.deepcopy(eager)
    fastlane_ext.fuse(fused, linears=linears)

    def backward(y: Tensor) -> None:
        F.mse_loss(y, torch.zeros(()).to(y).expand_as(y)).backward()

    def model_contestant(name: str, run: Callable[..., Any], owner: nn.Module) -> Contestant:
        return contestants.contestant(name, lambda: run(**inputs)[0], list(owner.parameters()), backward)

    absent = NO_COMPILE if not compiled else _AS_WITHOUT_LINEARS if linears else None
    if absent is None:
        compile_contestant = model_contestant("compile", torch.compile(eager, dynamic=False), eager)
    else:
        compile_contestant = Contestant("compile", absent, absent)
    return [
        model_contestant("eager", eager, eager),
        compile_contestant,
        Contestant("linear", _NO_CHAIN, _NO_CHAIN),
        *contestants.onednn_contestants(_NO_PACKED_MODEL, _NO_PACKED_MODEL),
        Contestant("onnxruntime", _NO_EXPORT, _NO_EXPORT),
        model_contestant("fused", fused, fused),
    ]


def mlp_share(architecture: Architecture, dtype: torch.dtype, runs: int = 5) -> float:
    """The fraction of an eager forward's time spent in modules where `fuse` finds an MLP; a median over ``runs``."""
    torch.manual_seed(1)
    model, inputs = architecture.build().to(dtype), architecture.inputs(dtype)
    names = {site.name for site in fastlane_ext.explain(model) if site.pattern.count("Linear") == 2}
    started: list[float] = []
    spent = [0.0]

    def stop(*_: Any) -> None:
        spent[0] += time.perf_counter() - started.pop()

    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
        module.register_forward_hook(stop)
    shares = []
    with torch.no_grad():
        for _ in range(runs + 1):
            spent[0], start = 0.0, time.perf_counter()
            model(**inputs)
            shares.append(spent[0] / (time.perf_counter() - start))
    return statistics.median(shares[1:])


def held_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of one forward, without parameters; each storage counts once."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = forward()
    del y
    return sum(held.values())
