"""The path of this process's tests, and the counters of `stats` that count there."""

import os

import fastlane_ext as fl

if os.environ.get("FASTLANE_CPU_ISA") == "none":
    PATH = "torch"
else:
    # The fused kernels are what is tested, wherever the policy would rather call the library, or torch on a CPU without
    # vector kernels; test_layer_path.py and test_isa.py repeat the numeric tests on the other paths.
    PATH = os.environ.setdefault("FASTLANE_PATH", "fused")
    if fl.build_info()["supported_isas"] == ["scalar"]:
        os.environ.setdefault("FASTLANE_CPU_ISA", "scalar")

# Torch differentiates its own operators, which nobody counts.
COUNTED = ("forward",) if PATH == "torch" else ("forward", "backward")
