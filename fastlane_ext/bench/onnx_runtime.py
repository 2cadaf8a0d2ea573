"""ONNX Runtime as a contestant, in a process of its own: thread pools of two runtimes in one process would fight."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .protocol import Skipped, reason_of

MISSING = Skipped("onnx or onnxruntime is not installed; pip install onnx onnxruntime")
NO_DTYPE = Skipped("ONNX Runtime's CPU kernels have GELU in float32 alone")
OPSET = 20
"""The first operator set with Gelu."""


@dataclass(frozen=True)
class Link:
    """One layer of a chain: ``h Wᵀ + b``, then GELU, then the sum with a tensor of the graph.

    ``adds`` names this tensor: ``"h"`` is the layer's input, other names are inputs of the graph.
    """

    weight: Tensor
    bias: Tensor | None
    gelu: bool = True
    adds: str | None = None


def model_of(chain: Sequence[Link], inputs: Mapping[str, Tensor]) -> bytes:
    """The ONNX file of a chain that begins at the input x. All inputs have two dimensions."""
    from onnx import TensorProto, helper, numpy_helper

    constants: list[Any] = []
    nodes: list[Any] = []

    def constant(name: str, value: Tensor) -> str:
        constants.append(numpy_helper.from_array(value.detach().numpy(), name))
        return name

    def node(kind: str, *operands: str, **attributes: Any) -> str:
        result = f"{kind}{len(nodes)}"
        nodes.append(helper.make_node(kind, operands, [result], **attributes))
        return result

    h = "x"
    for index, link in enumerate(chain):
        operands = [h, constant(f"weight{index}", link.weight)]
        if link.bias is not None:
            operands.append(constant(f"bias{index}", link.bias))
        y = node("Gemm", *operands, transB=1)
        if link.gelu:
            y = node("Gelu", y, approximate="none")
        if link.adds is not None:
            y = node("Add", y, h if link.adds == "h" else link.adds)
        h = y
    y = node("Identity", h)
    declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(t.shape)) for name, t in inputs.items()]
    result = helper.make_tensor_value_info(y, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "chain", declared, [result], constants)
    opset = helper.make_opsetid("", OPSET)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())


class OnnxRuntime:
    """A chain as a call whose result is a tensor. `timed` asks the process how long calls took there.

    The process gets as many threads as torch has when the contestant is made. Raises RuntimeError, with the process's
    last words, if the process ends.
    """

    def __init__(self, chain: Sequence[Link], inputs: Mapping[str, Tensor]) -> None:
        import numpy as np

        folder = tempfile.TemporaryDirectory()
        self._folder = Path(folder.name)
        self._leading = inputs["x"].shape[:-1]
        rows = {name: t.detach().reshape(-1, t.shape[-1]) for name, t in inputs.items()}
        (self._folder / "model.onnx").write_bytes(model_of(chain, rows))
        for name, tensor in rows.items():
            np.save(self._folder / f"{name}.npy", tensor.numpy())
        program = Path(__file__).with_name("onnx_process.py")
        self._words = self._folder / "stderr.txt"
        with self._words.open("w") as words:  # a pipe would fill up, and nobody reads it meanwhile
            self._process = subprocess.Popen(
                [sys.executable, str(program), folder.name, str(torch.get_num_threads())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
            )
        weakref.finalize(self, _end, self._process, folder)
        self.version = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            words = self._words.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"ONNX Runtime ended: {words[-1] if words else 'no message'}")
        return line.strip()

    def _ask(self, request: str) -> str:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer is missing then
            self._process.stdin.write(f"{request}\n")
            self._process.stdin.flush()
        return self._answer()

    def __call__(self) -> Tensor:
        import numpy as np

        self._ask("")
        y = torch.from_numpy(np.load(self._folder / "y.npy"))
        return y.reshape(*self._leading, y.shape[-1])

    def timed(self, calls: int) -> float:
        """The seconds that so many calls took, by the process's clock."""
        return float(self._ask(str(calls)))


def _end(process: subprocess.Popen[str], folder: tempfile.TemporaryDirectory[str]) -> None:
    process.kill()  # it may be in the middle of a sample
    process.wait()
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):
            if stream is not None:
                stream.close()
    folder.cleanup()


def runtime_of(chain: Sequence[Link] | Skipped, inputs: Mapping[str, Tensor]) -> OnnxRuntime | Skipped:
    """The contestant, or why there is none."""
    if isinstance(chain, Skipped):
        return chain
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "numpy")):
        return MISSING
    if inputs["x"].dtype != torch.float32:
        return NO_DTYPE
    try:
        return OnnxRuntime(chain, inputs)
    except Exception as error:  # a broken installation may raise anything, and so may a model of more than 2 GB
        return Skipped(reason_of(error))
