"""The processor's name, and what tells it from its siblings."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

# On x86, and on Arm. A name such as "Intel(R) Xeon(R) CPU @ 2.20GHz" stands for several generations.
_FACTS = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "CPU revision")


def _facts(cpuinfo: Path) -> dict[str, str]:
    facts: dict[str, str] = {}
    with suppress(OSError), cpuinfo.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in facts:
                break  # the next processor, the same as the first
            facts[key.strip()] = value.strip()
    return facts


def _name(facts: dict[str, str]) -> str:
    return facts.get("model name") or platform.processor() or platform.machine()


def cpu_identity(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name with all numbers that the system gives for its design.

    >>> cpu_identity().startswith(cpu_model().split(" (family")[0])
    True
    """
    facts = _facts(cpuinfo)
    name = _name(facts)
    return ", ".join([name, *(f"{fact} {facts[fact]}" for fact in _FACTS if fact in facts)])


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name from the system, with its family and model if the name has no number.

    >>> cpu_model() != ""
    True
    """
    facts = _facts(cpuinfo)
    name = _name(facts)
    # A hypervisor may hide the generation of an EPYC or Xeon, and generations differ by a factor of two.
    if not any(c.isdigit() for c in name) and {"cpu family", "model"} <= facts.keys():
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name
