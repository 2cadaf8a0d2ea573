"""``fastlane info``: what is installed, what was compiled and what runs here."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import fastlane_ext
from fastlane_ext import _profile
from fastlane_ext._cpu import cpu_model

from ..errors import need
from ..output import console, table

VARIABLES = ("FASTLANE_CPU_ISA", "FASTLANE_PATH", "FASTLANE_PROFILE", "FASTLANE_DISABLE", "FASTLANE_STRICT")


def compute() -> dict[str, Any]:
    """The facts as a JSON-able dict: ``build_info()``, and facts about this process and machine."""
    cuda = torch.cuda.is_available()
    return {
        **fastlane_ext.build_info(),
        "torch_running": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cpu_isa": fastlane_ext.cpu_isa(),
        "path_choice": _profile.choice,
        "threads": torch.get_num_threads(),
        "cuda_available": cuda,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def render(result: dict[str, Any]) -> None:
    """Print the facts as a two-column table."""
    set_variables = ", ".join(f"{k}={v}" for k, v in result["environment"].items())
    archs = ", ".join(map(str, result["cuda_archs"])) or "none"
    rows = {
        "fastlane_ext": result["version"],
        "torch": f"{result['torch_running']} (built against {result['torch_version']})",
        "python": f"{result['python']} on {result['system']}",
        "compiler": result["compiler"],
        "CPU": f"{result['cpu']}, {result['cores']} cores",
        "kernels in use": f"{result['cpu_isa']}; {result['cpu_isa_reason']}",
        "kernels that run here": ", ".join(result["supported_isas"]),
        "kernels compiled": ", ".join(result["compiled_isas"]),
        "path chosen by": result["path_choice"],
        "threads": str(result["threads"]),
        "CUDA": f"archs {archs}; {result['cuda_reason']}",
        "Hopper kernels": f"{'yes' if result['hopper'] else 'no'}; {result['hopper_reason']}",
        "GPU": result["gpu"] or "none",
        "environment": set_variables or "none of " + ", ".join(VARIABLES),
    }
    out = table("fastlane_ext", "what", "value", left=2)
    escape = need("rich.markup", "cli", "output as tables").escape  # a path may have brackets
    for name, value in rows.items():
        out.add_row(name, escape(str(value)))
    console().print(out)
