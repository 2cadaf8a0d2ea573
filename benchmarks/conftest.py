"""Options of the benchmarks, and their one fixture, a contest by the protocol of ``fastlane_ext.bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastlane_ext.bench import machine, protocol, suites

REPEATS, QUICK_REPEATS = 15, 5


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastlane")
    group.addoption("--quick", action="store_true", help="a few cases, few rounds")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
    group.addoption("--threads", default=None, help="numbers of threads, as in 1,2 (default: one, and all)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "job" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--threads")
    threads = [int(part) for part in chosen.split(",")] if chosen else None
    jobs = suites.plan(metafunc.module.SUITE, threads, quick=metafunc.config.getoption("--quick"))
    # Plain ASCII, since pytest shows other characters as escapes.
    ids = [str(job).replace("×", "x").replace("→", "to") for job in jobs]
    metafunc.parametrize("job", jobs, ids=ids)
    metafunc.parametrize("mode", suites.MODES)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastlane"] = suites.document([])


@pytest.fixture
def contest(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[suites.Job, str], None]:
    """Time one job in one mode: pytest-benchmark times the fused contestant; the others run between its rounds.

    ``extra_info`` gets the row of ``fastlane bench``, with every contestant's quartiles and the ratios.
    """

    def run(job: suites.Job, mode: str) -> None:
        compiled = not request.config.getoption("--no-compile")
        rounds = QUICK_REPEATS if request.config.getoption("--quick") else REPEATS
        with suites.prepare(job, compiled=compiled) as prepared:
            calls = prepared.calls(mode)
            assert "fused" in calls, prepared.absent(mode)["fused"].reason
            with torch.set_grad_enabled(mode == suites.STEP):
                race = protocol.Race(calls)
                race.warm_up()

                def others() -> None:
                    for name in calls:
                        if name != "fused":
                            race.sample(name)

                # Setup runs before each round, untimed: eager, compile, linear, oneDNN, fused, eager, ...
                with machine.Neighbours() as neighbours:
                    benchmark.pedantic(race.sample, args=("fused",), setup=others, rounds=rounds)
            row = prepared.row(mode, race.results(), neighbours.cores)
        benchmark.group = f"{job} {mode}"
        benchmark.extra_info["over_fused"] = row["over_fused"]
        benchmark.extra_info["row"] = row
        assert "skipped" not in row["results"]["fused"], row["results"]["fused"]
        assert not row["path"]["fallback"], row["path"]

    return run
