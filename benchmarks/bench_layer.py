"""One layer against eager, ``torch.compile``, bare ``F.linear`` and oneDNN.

pytest benchmarks/bench_layer.py --benchmark-json=layer.json
"""

from __future__ import annotations

from collections.abc import Callable

from fastlane_ext.bench import suites

SUITE = "layer"


def test_layer(contest: Callable[[suites.Job, str], None], job: suites.Job, mode: str) -> None:
    contest(job, mode)
