"""Calls whose every operand ends or begins at a page that may not be touched. Run this file as a program: an access one
element beyond an operand ends the program with SIGSEGV, and the last line of stderr before that names the call.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import mmap
import sys
from dataclasses import replace

import torch

import fastlane_ext as fl
from support.choices import ACTIVATIONS, DTYPES, dtype_name
from support.fuzz import OPS, SHORTCUTS, Plan, depth_of, shapes_of

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """Memory between two pages without any access."""

    def __init__(self, usable=1 << 20):
        self.memory = mmap.mmap(-1, usable + 2 * PAGE)
        self.usable = usable
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for page in (address, address + PAGE + usable):
            if libc.mprotect(page, PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, t: torch.Tensor, at_end: bool) -> torch.Tensor:
        """A copy of t with t's strides: the last element lies just before the second page, or the first element just
        behind the first page.
        """
        if t.numel() == 0:
            return t
        span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        first = (PAGE + self.usable) // t.element_size() - span if at_end else PAGE // t.element_size()
        assert span * t.element_size() <= self.usable
        elements = torch.frombuffer(self.memory, dtype=t.dtype)
        elements[first : first + span] = torch.nan
        return elements.as_strided(t.shape, t.stride(), first).copy_(t)


# Around vectors of 4, 8, 16 and 32 elements, tiles of 6 and 12 rows, few rows and many.
FEATURES = (1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 257)
ROWS = (1, 3, 4, 5, 7, 13, 16, 17, 65, 193)
LAYOUTS = ("contiguous", "padded", "transposed")
RESIDUALS = ("tensor", "none", "row", "x", "column")


def plans(op: str):
    """Each number of rows with each number of features; other choices take turns."""
    turn = itertools.count()
    for dtype, rows, (i, first) in itertools.product(DTYPES, ROWS, enumerate(FEATURES)):
        n = next(turn)
        widths = (first, *(FEATURES[(i * k + n) % len(FEATURES)] for k in range(1, 1 + depth_of(op, 3))))
        if n % 3 == 0:
            widths = (*widths[:-1], first)
        residual = RESIDUALS[n % 5] if op in ("linear_gelu_residual", "mlp_residual") else "none"
        if residual == "x" and first != widths[-1]:
            residual = "tensor"
        shortcut = {"residual_stack": SHORTCUTS[n % 4], "linear_gelu_concat": "concat"}.get(op, "none")
        shapes = shapes_of(op, (rows,), widths, shortcut=shortcut, residual=residual, bias=lambda _, n=n: n % 4 > 0)
        yield Plan(
            op=op,
            dtype=dtype,
            leading=(rows,),
            widths=widths,
            shapes=shapes,
            layouts={name: LAYOUTS[(n // (1 + j)) % 3] for j, name in enumerate(shapes)},
            needs=frozenset(shapes) - {"grad"},
            activation=ACTIVATIONS[n % len(ACTIVATIONS)],
            recompute=n % 7 == 0,
            residual=residual,
            shortcut=shortcut,
            integers=False,
            threads=(1 + n % 2,),
        )


def run(op: str, step: int) -> None:
    """Makes every ``step``-th call."""
    memory, count = {}, 0
    for plan in itertools.islice(plans(op), 0, None, step):
        call = plan.call(seed=0)
        torch.set_num_threads(plan.threads[0])
        expected = call.run(fl)
        for at_end in (True, False):
            layouts = ", ".join(f"{name}{list(plan.shapes[name])} {plan.layouts[name]}" for name in plan.shapes)
            case = f"{op} {dtype_name(plan.dtype)} {plan.activation} {plan.shortcut} {plan.residual}: {layouts}"
            print(f"{case}; guarded {'behind' if at_end else 'before'} them", file=sys.stderr, flush=True)
            tensors = {name: memory.setdefault(name, Guarded()).place(t, at_end) for name, t in call.tensors.items()}
            for name, value in replace(call, tensors=tensors).run(fl).items():
                assert torch.equal(value, expected[name]), name
            count += 1
    assert fl.stats()["fallback"] == {}
    print(op, count)


def overrun(what: str) -> None:
    """Reads one element more than an operand, or than a result, has."""
    x, weight = Guarded().place(torch.ones(3, 8), at_end=True), torch.ones(5, 8)
    y = fl.linear_gelu_residual(x, weight)
    assert y.shape == (3, 5)
    print("within", flush=True)
    if what == "operand":
        fl.linear_gelu_residual(x.as_strided((3, 8), (8, 1), x.storage_offset() + 1), weight)
    else:
        ctypes.string_at(y.data_ptr() + y.nbytes, 1)
    print("not seen", flush=True)


if __name__ == "__main__":
    faulthandler.enable()
    if sys.argv[1] == "overrun":
        overrun(sys.argv[2])
    else:
        for op in OPS:
            run(op, step=int(sys.argv[1]))
