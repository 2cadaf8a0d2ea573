"""What was built, which kernels run, and which path the calls took."""

from __future__ import annotations

from typing import Any

from ._load import build_record, library


def build_info() -> dict[str, Any]:
    """Facts about the compiled library.

    Returns a dict with ``version``, ``torch_version`` and ``torch_cuda`` (what it was built against),
    ``compiler``, ``compiled_isas`` and ``supported_isas`` (best first; this CPU can run the supported ones),
    ``cpu_isa_reason`` (the reason for the value of `cpu_isa`, or the error in FASTLANE_CPU_ISA),
    ``cuda_archs`` (empty in a CPU-only build) and ``cuda_reason`` (why CUDA was or was not compiled), ``hopper``
    (whether the fused CUDA products for capability 9.0 were compiled) and ``hopper_reason`` (why or why not).

    >>> "scalar" in build_info()["compiled_isas"]
    True
    """
    try:
        reason = library.cpu_isa_reason()
    except RuntimeError as error:
        reason = str(error)
    return {
        "version": build_record["version"],
        "torch_version": build_record["torch"],
        "torch_cuda": build_record["torch_cuda"],
        "compiler": build_record["compiler"],
        "compiled_isas": library.compiled_isas(),
        "supported_isas": library.supported_isas(),
        "cpu_isa_reason": reason,
        "cuda_archs": build_record["cuda_archs"],
        "cuda_reason": build_record["cuda_reason"],
        "hopper": build_record["hopper"],
        "hopper_reason": build_record["hopper_reason"],
    }


def cpu_isa() -> str:
    """The kernel set this process runs, such as ``"avx512_bf16"``, ``"avx512"``, ``"avx2"``, ``"neon"`` or ``"none"``.

    With ``"none"`` torch's own operators run, at eager's speed, with eager's rounding and memory. This happens where
    there are no vector kernels for the CPU. FASTLANE_CPU_ISA=none chooses ``"none"`` anywhere, and
    FASTLANE_CPU_ISA=scalar forces the slow scalar kernels. `build_info` gives the reason for the choice.

    Raises RuntimeError if FASTLANE_CPU_ISA names a kernel set that is unknown or that this machine does not support.

    >>> cpu_isa() in [*build_info()["supported_isas"], "none"]
    True
    """
    return library.cpu_isa()


def stats() -> dict[str, dict[str, int]]:
    """Calls since the start of the process or the last `reset_stats`, in all threads.

    Returns ``{path: {"forward": n, "backward": n}, ..., "fallback": {reason: n}}``. A call of a layer, an MLP or a
    network counts once, under the path it took or under the reason for which eager operations ran instead. The paths:

    * ``"fused"``: this library's own kernels;
    * ``"library"``: the machine's own GEMM, where it is expected to win, and one fused pass after it. A network counts
      here if any of its products took this path;
    * ``"hopper"``: the fused CUDA product for capability 9.0;
    * ``"torch"``: torch's own operators on a CPU where `cpu_isa` is ``"none"``. Autograd is torch's there too, so that
      a backward is counted only with ``recompute=True`` or in a graph exported elsewhere.

    On CUDA the library always computes dW, so that a backward counts under the path of its dgrad.

    >>> reset_stats()
    >>> stats()["fused"], stats()["fallback"]
    ({'forward': 0, 'backward': 0}, {})
    """
    return library.stats()


def reset_stats() -> None:
    """Set all counters of `stats` to zero, in all threads.

    >>> reset_stats()
    """
    library.reset_stats()
