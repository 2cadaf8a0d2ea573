"""Plans of products on the kernels of this process."""

import torch

from fastlane_ext._load import library

from .choices import dtype_name

CACHES = (32 << 10, 512 << 10, 32 << 20)
"""Bytes of L1, of L2 and of the last level."""


def plan_of_layer(rows, in_features, out_features, dtype=torch.float32, **options):
    """The plan of a forward whose x and weight are contiguous."""
    strides = {"a": (in_features, 1), "b": (1, in_features)} | options
    return gemm_plan(rows, out_features, in_features, dtype=dtype_name(dtype), **strides)


def gemm_plan(m, n, k, *, a, b, isa=None, dtype="float32", threads=1, caches=CACHES):
    """``a`` and ``b`` are the operands' strides of rows and columns."""
    isa = isa or library.cpu_isa()
    return library.gemm_plan("scalar" if isa == "none" else isa, dtype, m, n, k, a, b, threads, caches)
