"""Prints a hash of the results of 2,000 random calls for each operator and kernel set.

    python tests/support/bits.py                 every kernel set that this CPU has
    python tests/support/bits.py --json FILE     the hashes as JSON too

A change that should keep all bits must keep all hashes: compare before and after. The hashes depend on the CPU's
caches, since the blocking depends on them, and on the library's GEMM, so compare on one machine.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

CALLS = 2000
DTYPES = ("float32", "float64", "bfloat16", "float16")


def tensor_of(torch, draw, shape, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    t = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    if len(shape) == 2 and draw.random() < 0.3:
        t = t.t().contiguous().t()  # the other storage order
    return t


def call_of(torch, fl, op, draw):
    """One random call: the inputs that need gradients, and a function of these inputs."""
    dtype = getattr(torch, draw.choice(DTYPES))
    rows, k, n = draw.choice([1, 2, 3, 5, 17, 64, 130]), draw.randint(1, 96), draw.randint(1, 96)
    leading = (rows,) if draw.random() < 0.8 else (2, rows)
    make = lambda *shape, scale=1.0: tensor_of(torch, draw, shape, dtype, scale)  # noqa: E731
    maybe = lambda *shape: make(*shape) if draw.random() < 0.7 else None  # noqa: E731
    options = {"activation": draw.choice(("gelu", "gelu_tanh", "none"))}
    x = make(*leading, k)
    if op == "linear_gelu_concat":
        inputs = [x, make(n, k, scale=k**-0.5), maybe(n)]
        return inputs, lambda t: fl.linear_gelu_concat(*t, **options)
    options["recompute"] = draw.random() < 0.2
    if op == "linear_gelu_residual":
        inputs = [x, make(n, k, scale=k**-0.5), maybe(n), maybe(*leading, n)]
        return inputs, lambda t: fl.linear_gelu_residual(*t, **options)
    if op == "mlp_residual":
        inputs = [x, make(n, k, scale=k**-0.5), maybe(n), make(k, n, scale=n**-0.5), maybe(k)]
        return inputs, lambda t: fl.mlp_residual(*t, t[0], **options)
    layers, shortcut = draw.randint(1, 6), draw.choice(("identity", "projection", "concat", "none"))
    widths = [k] + [draw.choice((k, n)) for _ in range(layers)]
    fan_in = [sum(widths[: i + 1]) if shortcut == "concat" else widths[i] for i in range(layers)]
    weights = [make(o, i, scale=i**-0.5) for i, o in zip(fan_in, widths[1:], strict=True)]
    biases = [maybe(o) for o in widths[1:]]
    differ = [shortcut == "projection" and i != o for i, o in zip(fan_in, widths[1:], strict=True)]
    projections = [make(o, i, scale=i**-0.5) if d else None for d, i, o in zip(differ, fan_in, widths[1:], strict=True)]

    def run(t):
        parts = [t[1 + i * layers : 1 + (i + 1) * layers] for i in range(3)]
        projected = {"projections": parts[2]} if shortcut == "projection" else {}
        return fl.residual_stack(t[0], parts[0], parts[1], shortcut=shortcut, **projected, **options)

    return [x, *weights, *biases, *projections], run


def hashes():
    import torch

    import fastlane_ext as fl

    torch.set_num_threads(2)
    result = {}
    for op in ("linear_gelu_residual", "linear_gelu_concat", "mlp_residual", "residual_stack"):
        draw, total = random.Random(op), hashlib.sha256()
        for _ in range(CALLS):
            inputs, run = call_of(torch, fl, op, draw)
            leaves = [t if t is None else t.requires_grad_(draw.random() < 0.8) for t in inputs]
            y = run(leaves)
            needed = [t for t in leaves if t is not None and t.requires_grad]
            grads = torch.autograd.grad(y, needed, torch.ones_like(y), allow_unused=True) if needed else ()
            for t in (y.detach(), *grads):
                if t is not None:
                    total.update(t.contiguous().view(torch.uint8).numpy().tobytes())
        result[op] = total.hexdigest()[:16]
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the hashes there")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(hashes()))
        return
    from fastlane_ext._load import library

    found = {}
    for isa in library.supported_isas():
        environment = os.environ | {"FASTLANE_CPU_ISA": isa}
        command = [sys.executable, __file__, "--here"]
        found[isa] = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
        for op, digest in found[isa].items():
            print(f"{isa:12} {op:22} {digest}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
