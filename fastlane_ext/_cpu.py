"""The processor's name."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

# An x86 processor has a name; an Arm core has numbers, which name its maker and its design.
_ARM_FACTS = ("CPU implementer", "CPU part", "CPU variant")


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name from the system, with its family and model if the name has no number.

    >>> cpu_model() != ""
    True
    """
    facts: dict[str, str] = {}
    with suppress(OSError), cpuinfo.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in facts:
                break  # the next processor, the same as the first
            facts[key.strip()] = value.strip()
    name = facts.get("model name") or platform.processor() or platform.machine()
    # A hypervisor may hide the generation of an EPYC or Xeon, and generations differ by a factor of two.
    if not any(c.isdigit() for c in name) and {"cpu family", "model"} <= facts.keys():
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    if facts.keys() >= set(_ARM_FACTS):
        name += f" ({', '.join(f'{fact[4:]} {facts[fact]}' for fact in _ARM_FACTS)})"
    return name
