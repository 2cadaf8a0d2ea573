"""The layer, the MLP and networks on a GPU against eager, torch.compile and the library's bare GEMM.

    python benchmarks/gpu_bench.py --json results.json

Contestants take turns. Each sample is one call between two CUDA events; the L2 cache is overwritten before the call, so
that operands come from memory. A tiny network is bound by its launches; there the host's clock times many calls.
``--device cpu --quick`` runs the same code on small shapes, to try the script without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlane_ext
from fastlane_ext import reference
from fastlane_ext.bench import machine

TILE_COLS = (256, 192, 128)
Call = Callable[[], object]
Forward = Callable[[], Tensor]
CACHE_BYTES = 256 << 20
WARM_UP = 5


def normal(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    return draw


def with_steps(
    forwards: dict[str, Forward], leaves: list[Tensor], dy: Tensor, compiled: bool
) -> dict[str, tuple[Call, Call]]:
    """(forward, step) of each contestant; ``compiled`` adds eager compiled. A step leaves no gradient behind."""
    if compiled:
        forwards["compile"] = torch.compile(forwards["eager"], mode="max-autotune-no-cudagraphs", dynamic=False)
    calls: dict[str, tuple[Call, Call]] = {
        name: (run, lambda run=run: torch.autograd.grad(run(), leaves, dy, allow_unused=True))
        for name, run in forwards.items()
    }
    return with_tiles(calls, dy.device)


def with_tiles(calls: dict[str, tuple[Call, Call]], device: torch.device) -> dict[str, tuple[Call, Call]]:
    """``calls``, and on Hopper the fused call with each tile that `hopper_tile` chooses among, to judge its choice."""
    if device.type != "cuda" or not fastlane_ext.build_info()["hopper"]:
        return calls
    if torch.cuda.get_device_capability(device) != (9, 0):
        return calls
    forced = {
        f"fused, 128×{cols} where it exists": tuple(with_tile(cols, call) for call in calls["fused"])
        for cols in TILE_COLS
    }
    return calls | forced


def with_tile(cols: int, call: Call) -> Call:
    """``call`` with the given tile for every product that has a Hopper kernel with this tile."""

    def forced() -> object:
        fastlane_ext._C.force_hopper_tile(cols)
        try:
            return call()
        finally:
            fastlane_ext._C.force_hopper_tile(0)

    return forced


@dataclass(frozen=True)
class Layer:
    rows: int
    inputs: int
    outputs: int

    @property
    def title(self) -> str:
        return f"{self.rows}×{self.inputs}→{self.outputs}"

    def calls(self, device: str, dtype: torch.dtype, compiled: bool) -> dict[str, tuple[Call, Call]]:
        random = normal(device, dtype)
        x = random(self.rows, self.inputs).requires_grad_()
        weight = random(self.outputs, self.inputs, scale=self.inputs**-0.5).requires_grad_()
        bias = random(self.outputs).requires_grad_()
        residual = x if self.inputs == self.outputs else random(self.rows, self.outputs).requires_grad_()
        dy = random(self.rows, self.outputs)
        leaves = list(dict.fromkeys([x, weight, bias, residual]))

        def eager() -> Tensor:
            return F.gelu(F.linear(x, weight, bias)) + residual

        forwards: dict[str, Forward] = {
            "eager": eager,
            "linear": lambda: F.linear(x, weight, bias),
            "fused": lambda: fastlane_ext.linear_gelu_residual(x, weight, bias, residual),
        }
        return with_steps(forwards, leaves, dy, compiled)


@dataclass(frozen=True)
class Mlp:
    rows: int
    features: int
    hidden: int

    @property
    def title(self) -> str:
        return f"MLP {self.rows}×{self.features}→{self.hidden}→{self.features}"

    def calls(self, device: str, dtype: torch.dtype, compiled: bool) -> dict[str, tuple[Call, Call]]:
        random = normal(device, dtype)
        x = random(self.rows, self.features).requires_grad_()
        fc1_weight = random(self.hidden, self.features, scale=self.features**-0.5).requires_grad_()
        fc2_weight = random(self.features, self.hidden, scale=self.hidden**-0.5).requires_grad_()
        fc1_bias, fc2_bias = random(self.hidden).requires_grad_(), random(self.features).requires_grad_()
        parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)

        def eager() -> Tensor:
            return x + F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)

        forwards: dict[str, Forward] = {
            "eager": eager,
            "fused": lambda: fastlane_ext.mlp_residual(x, *parameters, x),
        }
        return with_steps(forwards, [x, *parameters], random(self.rows, self.features), compiled)


@dataclass(frozen=True)
class Network:
    sizes: tuple[int, ...]
    rows: int

    @property
    def title(self) -> str:
        if len(set(self.sizes)) == 1:
            return f"{len(self.sizes) - 1} layers of {self.sizes[0]}, {self.rows} rows"
        return f"{list(self.sizes)}, {self.rows} rows"

    def calls(self, device: str, dtype: torch.dtype, compiled: bool) -> dict[str, tuple[Call, Call]]:
        torch.manual_seed(0)
        eager = reference.ResidualNetwork(list(self.sizes)).to(device, dtype)
        fused = fastlane_ext.ResidualNetwork(list(self.sizes)).to(device, dtype)
        fused.load_state_dict(eager.state_dict())
        x = torch.randn(self.rows, self.sizes[0], device=device).to(dtype)
        dy = torch.randn(self.rows, self.sizes[-1], device=device).to(dtype)
        models = {"eager": eager, "fused": fused}
        if compiled:
            models["compile"] = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
        calls: dict[str, tuple[Call, Call]] = {
            name: (
                lambda run=run: run(x),
                lambda run=run: torch.autograd.grad(run(x), list(run.parameters()), dy),
            )
            for name, run in models.items()
        }
        return with_tiles(calls, dy.device) if max(self.sizes) > 128 else calls


Case = Layer | Mlp | Network
CASES: tuple[Case, ...] = (
    Layer(4096, 4096, 4096),
    Layer(8192, 4096, 4096),
    Layer(32768, 768, 768),
    Network((64,) * 9, 1 << 17),
    Network((128,) * 9, 1 << 17),
    Network((1, 64, 64, 64, 64, 1), 1),
    Network((3, 3, 3, 3, 3, 1), 1),
    Mlp(8192, 1024, 4096),
    Network((1024,) * 9, 8192),
)
QUICK_CASES: tuple[Case, ...] = (Layer(64, 32, 32), Layer(64, 32, 48), Network((3, 3, 3, 1), 1), Mlp(64, 32, 128))


class Sampler:
    """Measures a call's seconds, by device events after the cache was overwritten, or by the host's clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        self.cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def __call__(self, call: Call, calls: int) -> float:
        if not self.cuda or calls > 1:
            self._synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            self._synchronize()
            return (time.perf_counter() - start) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def worst_difference(calls: dict[str, tuple[Call, Call]]) -> float:
    """The largest difference between the fused output and eager's, relative to eager's largest element."""
    with torch.no_grad():
        eager, fused = calls["eager"][0]().double(), calls["fused"][0]().double()
    return ((fused - eager).abs().max() / eager.abs().max()).item()


def run_case(case: Case, device: str, dtype: torch.dtype, rounds: int, compiled: bool) -> list[dict]:
    calls = case.calls(device, dtype, compiled)
    sampler = Sampler(device)
    calls_per_sample = 100 if isinstance(case, Network) and case.rows == 1 else 1
    difference = worst_difference(calls)
    rows = []
    for index, mode in enumerate(("forward", "forward+backward")):
        before = fastlane_ext.stats()
        samples: dict[str, list[float]] = {name: [] for name in calls}
        with torch.set_grad_enabled(index == 1):
            for _ in range(WARM_UP):
                for pair in calls.values():
                    pair[index]()
            for _ in range(rounds):
                for name, pair in calls.items():
                    samples[name].append(sampler(pair[index], calls_per_sample))
        after = fastlane_ext.stats()
        medians = {name: statistics.median(times) for name, times in samples.items()}
        rows.append(
            {
                "case": case.title,
                "dtype": str(dtype).removeprefix("torch."),
                "mode": mode,
                "median_s": medians,
                "quartiles_s": {n: statistics.quantiles(t, n=4)[::2] for n, t in samples.items()},
                "over_fused": {n: t / medians["fused"] for n, t in medians.items() if n != "fused"},
                "difference_from_eager": difference,
                "path": {p: {w: after[p][w] - before[p][w] for w in after[p]} for p in after if p != "fallback"},
            }
        )
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in rows[-1]["over_fused"].items())
        print(f"{case.title:40} {mode:17} {medians['fused'] * 1e6:10.1f} µs   {ratios}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=30, help="samples of each contestant, at least 3")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but torch sees no GPU; use --device cpu --quick to try the script")
    if arguments.rounds < 3:
        parser.error(f"--rounds: got {arguments.rounds}, expected at least 3")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json: got {arguments.json}, but there is no folder {arguments.json.parent}; make it first")
    dtype = getattr(torch, arguments.dtype)
    rows = []
    for case in QUICK_CASES if arguments.quick else CASES:
        rows += run_case(case, arguments.device, dtype, arguments.rounds, not arguments.no_compile)
        torch._dynamo.reset()
        # After each case, so that an interrupted run keeps its results.
        if arguments.json:
            result = {"kind": "fastlane-gpu-bench", "schema": 1, **machine.environment(), "rows": rows}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
