"""Weights in the order in which the kernels read them, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arguments import bad, check_tensor
from ._load import library

__all__ = ["PackedWeight", "pack_weight"]


class PackedWeight:
    """A copy of a weight, ``(out_features, in_features)``, in the order in which this CPU's kernels read it.

    Every function takes one where it takes a weight. The result has the same bits as with the weight itself. There is
    no gradient: a call in which a tensor requires one raises RuntimeError.

    ``data`` is a uint8 tensor of shape ``(out_features, bytes of a row)``. Register it as a buffer to carry it through
    ``torch.compile``, ``torch.export`` or a file; ``PackedWeight(data)`` makes it a packed weight again.

    Raises:
        TypeError: ``data`` is no uint8 tensor.
    """

    def __init__(self, data: Tensor) -> None:
        check_tensor("data", data)
        if data.dtype != torch.uint8:
            expected = "the uint8 tensor of a packed weight"
            raise bad("data", f"dtype {data.dtype}", expected, "pack a weight with pack_weight(weight)", TypeError)
        self.data = data

    def _header(self) -> tuple[int, int, torch.dtype, str]:
        return library.read_packed_weight(self.data)

    @property
    def shape(self) -> torch.Size:
        """The weight's, ``(out_features, in_features)``."""
        return torch.Size(self._header()[:2])

    @property
    def dtype(self) -> torch.dtype:
        """The weight's."""
        return self._header()[2]

    @property
    def kernels(self) -> str:
        """The kernel set that reads the copy. Empty if the copy keeps the weight's own order, which every set reads:
        without vector kernels, and for a bfloat16 weight with denormals where the CPU multiplies pairs.
        """
        return self._header()[3]

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the copy takes."""
        return self.data.nbytes

    def unpack(self) -> Tensor:
        """The weight, exactly."""
        return library.unpack_weight(self.data).clone()

    def __repr__(self) -> str:
        out_features, in_features, dtype, kernels = self._header()
        of = f", kernels={kernels!r}" if kernels else ""
        return f"PackedWeight(out_features={out_features}, in_features={in_features}, dtype={dtype}{of})"


def pack_weight(weight: Tensor) -> PackedWeight:
    """Copy a weight into the order in which this CPU's kernels read it, once for many calls.

    Args:
        weight: ``(out_features, in_features)`` on the CPU, any strides; float32, float64, bfloat16 or float16. A later
            change of the weight does not change the copy.

    Returns:
        The copy. It takes as much memory as the weight, up to 63 rows more, and twice as much for 16-bit weights
        whose kernels widen them.

    Raises:
        TypeError: the weight is no tensor.
        RuntimeError: the weight is not 2-D, is empty, not on the CPU, or of another dtype.

    >>> x, weight = torch.randn(8, 64), torch.randn(32, 64)
    >>> packed = pack_weight(weight)
    >>> bool((linear_gelu_residual(x, packed) == linear_gelu_residual(x, weight)).all())
    True
    """
    check_tensor("weight", weight)
    return PackedWeight(library.pack_weight(weight.detach()))


def is_packed(weight: Any) -> bool:
    """Whether this is the tensor of a packed weight, which eager operations cannot read."""
    return isinstance(weight, Tensor) and weight.dtype is torch.uint8


def weight_data(weight: Any) -> Any:
    """What the operators take. Anything but a packed weight is left to the checks of the function that took it."""
    return weight.data if type(weight) is PackedWeight else weight


def weights_data(weights: Any) -> Any:
    """The same for a list."""
    if not isinstance(weights, (list, tuple)) or not any(type(weight) is PackedWeight for weight in weights):
        return weights
    return [weight_data(weight) for weight in weights]
