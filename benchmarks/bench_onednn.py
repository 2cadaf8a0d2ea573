"""The whole fused forward against oneDNN's product alone: weight packed beforehand, no GELU, no residual.

    python benchmarks/bench_onednn.py --json results.json

`fastlane bench` shows oneDNN with GELU and the residual, which is the fused layer's work; this is the bound below it.
Contestants take turns, medians, as everywhere; printed is oneDNN's time over the fused one, above 1 where the layer
with everything in it is faster than the bare product.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fastlane_ext import linear_gelu_residual
from fastlane_ext.bench import machine, protocol, suites


def run_case(case: suites.Layer, threads: int, repeats: int = 15) -> dict[str, Any]:
    """One row: both medians in seconds and their ratio. Restores the number of threads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.rows, case.inputs, generator=generator).to(case.dtype)
    weight = (torch.randn(case.outputs, case.inputs, generator=generator) * case.inputs**-0.5).to(case.dtype)
    bias = torch.randn(case.outputs, generator=generator).to(case.dtype)
    residual = x if case.inputs == case.outputs else torch.randn(case.rows, case.outputs).to(case.dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, case.rows)
    calls = {
        "onednn product": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""),
        "fused": lambda: linear_gelu_residual(x, weight, bias, residual),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            results = protocol.race(calls, repeats=repeats, budget=6.0)
    finally:
        torch.set_num_threads(before)
    medians = {name: result.median for name, result in results.items() if isinstance(result, protocol.Timing)}
    return {
        "case": case.title,
        "dtype": suites.dtype_name(case.dtype),
        "threads": threads,
        "median_s": medians,
        "onednn_over_fused": medians["onednn product"] / medians["fused"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json: got {arguments.json}, but there is no folder {arguments.json.parent}; make it first")
    rows = []
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        for case in suites.LAYERS:
            if case.dtype == torch.float64:
                continue  # oneDNN has none
            rows.append(run_case(case, threads))
            row = rows[-1]
            print(f"{threads} {row['case']:18} {row['dtype']:9} {row['onednn_over_fused']:.2f}", flush=True)
    if arguments.json:
        document = {"kind": "fastlane-onednn", "schema": 1, **machine.environment(), "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
