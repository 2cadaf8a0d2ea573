"""Whole networks against eager, ``torch.compile``, bare ``F.linear`` and oneDNN.

pytest benchmarks/bench_networks.py --benchmark-json=networks.json
"""

from __future__ import annotations

from collections.abc import Callable

from fastlane_ext.bench import suites

SUITE = "networks"


def test_network(contest: Callable[[suites.Job, str], None], job: suites.Job, mode: str) -> None:
    contest(job, mode)
