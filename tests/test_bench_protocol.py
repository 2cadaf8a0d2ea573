"""The measuring protocol: turns, quartiles, failures that stay visible, memory, limits; no time asserted."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlane_ext import reference
from fastlane_ext.bench import contestants, machine, onnx_runtime, protocol, suites

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import report


class Clock:
    """Time that passes only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Any:
        def call() -> None:
            self.now += seconds

        return call


def test_contestants_take_turns() -> None:
    order: list[str] = []
    clock = Clock()

    def contestant(name: str) -> Any:
        def call() -> None:
            order.append(name)
            clock.now += 1.0

        return call

    race = protocol.Race({name: contestant(name) for name in "ABC"}, clock=clock)
    race.warm_up()
    order.clear()
    rounds = []
    for _ in range(40):
        race.round()
        rounds.append("".join(order))
        order.clear()
    assert all(sorted(turns) == list("ABC") for turns in rounds)
    assert len(set(rounds)) == 6, "every order comes up, so that nobody always follows the same one"


def test_quartiles_are_those_of_the_samples() -> None:
    timing = protocol.Timing.of([5.0, 1.0, 4.0, 2.0, 3.0], 7)
    assert (timing.q1, timing.median, timing.q3) == (2.0, 3.0, 4.0)
    assert (timing.samples, timing.calls_per_sample) == (5, 7)
    assert protocol.Timing.of([2.5]) == protocol.Timing(2.5, 2.5, 2.5, 1, 1)
    with pytest.raises(ValueError, match="at least one sample"):
        protocol.Timing.of([])


def test_short_calls_are_repeated_and_the_time_is_that_of_one() -> None:
    clock = Clock()
    race = protocol.Race({"short": clock.takes(1e-5), "long": clock.takes(1.0)}, min_sample=1e-3, clock=clock)
    race.warm_up()
    race.round()
    short, long = race.results().values()
    assert isinstance(short, protocol.Timing) and isinstance(long, protocol.Timing)
    assert short.calls_per_sample in (100, 101)
    assert short.median == pytest.approx(1e-5)
    assert (long.calls_per_sample, long.median) == (1, 1.0)


def test_prepare_runs_before_each_sample_and_outside_its_time() -> None:
    clock, made = Clock(), []

    def prepare(name: str) -> None:
        made.append(name)
        clock.now += 10.0

    race = protocol.Race(
        {"a": clock.takes(1.0), "b": clock.takes(2.0)}, min_sample=0.5, probes=1, clock=clock, prepare=prepare
    )
    race.warm_up()
    assert made == ["a", "b"] and clock.now == 20 + 2 * 1.0 + 2 * 2.0  # one call, and one probe
    race.round()
    assert sorted(made[2:]) == ["a", "b"] and [race.samples(name) for name in "ab"] == [[1.0], [2.0]]


def test_a_failing_contestant_stays_with_its_reason() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel\nmore lines")

    results = protocol.race({"good": lambda: None, "broken": broken}, repeats=1, min_sample=1e-6)
    assert isinstance(results["good"], protocol.Timing)
    assert results["broken"] == protocol.Skipped("RuntimeError: no such kernel")


def test_a_contestant_that_fails_later_stays_with_its_reason() -> None:
    calls = iter(range(1000))

    def sometimes() -> None:
        if next(calls) > 5:
            raise ValueError("worn out")

    race = protocol.Race({"sometimes": sometimes}, min_sample=1e-9)
    race.warm_up()
    for _ in range(20):
        race.round()
    assert race.results()["sometimes"] == protocol.Skipped("ValueError: worn out")


def test_race_stops_at_its_budget_but_not_before_three_rounds() -> None:
    rounds: list[int] = []
    results = protocol.race(
        {"a": lambda: None}, repeats=50, budget=0.0, min_sample=1e-6, on_round=lambda: rounds.append(1)
    )
    assert isinstance(results["a"], protocol.Timing)
    assert results["a"].samples == len(rounds) == protocol.MIN_ROUNDS
    with pytest.raises(ValueError, match="repeats"):
        protocol.race({"a": lambda: None}, repeats=0)


def test_peak_memory_counts_what_is_live_at_once() -> None:
    x = torch.zeros(1 << 20)

    def two_then_one() -> torch.Tensor:
        return (x + 1) * 2

    # The Python numbers become tensors of a few bytes.
    assert 2 * x.nbytes <= protocol.peak_memory(two_then_one) < 2 * x.nbytes + 1024
    assert protocol.peak_memory(lambda: None) == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("AMD EPYC", "AMD EPYC (family 25, model 17)"), ("AMD EPYC 9754 128-Core Processor", None)],
)
def test_a_cpu_is_named_by_a_number(name: str, expected: str | None, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {name}\n\nmodel\t\t: 9\n")
    assert machine.cpu_model(cpuinfo) == (expected or name)
    assert machine.cpu_model(tmp_path / "none") != ""


def test_machine_limits_are_positive_and_say_where_they_come_from() -> None:
    peak = machine.fma_peak(torch.float32, 1)
    assert peak.flops > 0 and peak.source
    again = machine.fma_peak(torch.float32, 1)
    assert again.flops >= peak.flops and again.source == peak.source
    assert machine.copy_bandwidth(1 << 20, 1) > 0
    gemm = machine._best_gemm(torch.float32, samples=2)
    assert gemm.flops > 0 and gemm.source.startswith("best GEMM seen")


def test_own_work_is_not_taken_for_a_neighbours() -> None:
    with machine.Neighbours() as others:
        torch.randn(256, 256) @ torch.randn(256, 256)
    assert others.cores is None or others.cores >= 0


def test_plan_has_every_case_at_every_number_of_threads() -> None:
    jobs = suites.plan("layer", [1, 2])
    assert len(jobs) == 2 * len(suites.LAYERS)
    assert {job.threads for job in jobs} == {1, 2}
    everything = suites.plan("all", [1], dtype=torch.float64)
    assert {job.case.dtype for job in everything} == {torch.float64}
    assert len(set(everything)) == len(everything)
    with pytest.raises(ValueError, match="suite"):
        suites.plan("nothing")
    with pytest.raises(ValueError, match="threads"):
        suites.plan("layer", [0])


def test_work_of_a_layer_and_of_the_same_layer_as_a_network() -> None:
    layer = suites.Layer(10, 4, 4)
    assert layer.work(suites.FORWARD) == (2 * 10 * 4 * 4, 4 * (10 * 4 + 16 + 4 + 10 * 4))
    assert layer.work(suites.STEP)[0] == 3 * layer.work(suites.FORWARD)[0]
    network = suites.Network("", (4, 4), (10, 4))
    assert network.work(suites.FORWARD) == layer.work(suites.FORWARD)
    # The network's input needs no gradient, so one of the three products is missing.
    assert network.work(suites.STEP)[0] == 2 * network.work(suites.FORWARD)[0]
    concat = suites.Network("", (4, 2, 2), (10, 4), "concat")
    assert concat.work(suites.FORWARD)[0] == 2 * 10 * (4 * 2 + 6 * 2)


NETWORK_SHAPES = {
    "identity": (8, 8, 5),
    "projection": (8, 4, 4),
    "concat": (8, 4, 4),
    "none": (8, 8),
}


@pytest.mark.parametrize("shortcut", NETWORK_SHAPES)
def test_network_contestants_compute_the_same(shortcut: str) -> None:
    field = contestants.network_contestants(NETWORK_SHAPES[shortcut], (3, 8), shortcut, torch.float32, compiled=False)
    contestants.reject_wrong_answers(field)
    by_name = {contestant.name: contestant for contestant in field}
    assert tuple(by_name) == contestants.NAMES
    assert by_name["compile"].forward == contestants.NO_COMPILE
    runtime = () if shortcut in ("projection", "concat") else ("onnxruntime",)
    for name in ("eager", "onednn", *runtime, "fused"):
        assert not isinstance(by_name[name].forward, protocol.Skipped), by_name[name].forward
    filled = []
    leaves = by_name["fused"].leaves
    for leaf in leaves:
        leaf.register_post_accumulate_grad_hook(lambda leaf: filled.append(leaf.grad is not None))
    by_name["fused"].step()  # type: ignore[operator]
    assert filled == [True] * len(leaves)
    # Else the next contestant's time would include freeing them.
    assert all(leaf.grad is None for leaf in leaves)


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **options: Any) -> torch.Tensor:
        return reference.linear_gelu_residual(*args, **options) + 0.5

    monkeypatch.setattr("fastlane_ext.linear_gelu_residual", wrong)
    field = contestants.layer_contestants(4, 8, 8, torch.float32, compiled=False)
    contestants.reject_wrong_answers(field)
    fused = field[-1]
    assert fused.name == "fused"
    for call in (fused.forward, fused.step):
        assert isinstance(call, protocol.Skipped) and "wrong result" in call.reason


@pytest.mark.parametrize("name", ["linear", "onednn_linear"])
def test_linear_alone_is_the_product_with_its_bias(name: str) -> None:
    field = contestants.layer_contestants(4, 8, 6, torch.float32, compiled=False)
    contestants.reject_wrong_answers(field)
    by_name = {contestant.name: contestant for contestant in field}
    call = by_name[name].forward
    if isinstance(call, protocol.Skipped):
        pytest.skip(call.reason)
    x, weight, bias, residual = by_name["eager"].leaves
    torch.testing.assert_close(call(), torch.nn.functional.linear(x, weight, bias))


def test_onnx_runtime_times_itself_and_its_answer_is_compared() -> None:
    field = contestants.layer_contestants(4, 8, 6, torch.float32, compiled=False)
    runtime = next(c for c in field if c.name == "onnxruntime").forward
    assert isinstance(runtime, onnx_runtime.OnnxRuntime) and isinstance(runtime, protocol.TimesItself)
    x, weight, bias, residual = field[0].leaves
    torch.testing.assert_close(runtime(), reference.linear_gelu_residual(x, weight, bias, residual))
    process = runtime._process
    race = protocol.Race({"onnxruntime": runtime}, min_sample=1e-4, clock=lambda: 0.0)  # the process has its own clock
    race.warm_up()
    race.round()
    timing = race.results()["onnxruntime"]
    assert isinstance(timing, protocol.Timing) and timing.median > 0
    chain = [onnx_runtime.Link(weight, bias, gelu=False, adds="residual")]
    linear = onnx_runtime.OnnxRuntime(chain, {"x": x, "residual": residual})
    torch.testing.assert_close(linear(), torch.nn.functional.linear(x, weight, bias) + residual)
    linear._process.kill()
    with pytest.raises(RuntimeError, match="^ONNX Runtime ended: "):
        linear()
    del field, runtime, race
    gc.collect()
    assert process.returncode is not None and not Path(process.args[2]).exists()


def test_another_process_of_ours_is_no_neighbour() -> None:
    with machine.Neighbours() as none:
        pass
    spin = "import time\nwhile time.process_time() < 0.6: pass\nprint(1, flush=True); input()"
    before = machine._seconds_of_live_children()
    child = subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "1\n" and none.cores is not None
    assert machine._seconds_of_live_children() >= before + 0.5
    child.communicate("\n")
    assert machine._seconds_of_live_children() < before + 0.5


def test_onnx_runtime_that_is_missing_or_refuses_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    link = onnx_runtime.Link(weight, None)
    assert onnx_runtime.runtime_of([link], {"x": x.bfloat16()}) == onnx_runtime.NO_DTYPE
    refused = onnx_runtime.runtime_of([replace(link, adds="nothing")], {"x": x})
    assert isinstance(refused, protocol.Skipped) and refused.reason.startswith("RuntimeError: ONNX Runtime ended: ")
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "onnx", None)  # an import of it raises
        failed = onnx_runtime.runtime_of([link], {"x": x})
        assert isinstance(failed, protocol.Skipped) and "onnx" in failed.reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert onnx_runtime.runtime_of([link], {"x": x}) == onnx_runtime.MISSING


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    before = torch.get_num_threads()
    rows = [
        row
        for case in (suites.Layer(16, 32, 32), suites.Layer(16, 32, 8, torch.float64))
        for row in suites.run_job(suites.Job(case, 1), repeats=3, budget=0.1, compiled=False)
    ]
    assert torch.get_num_threads() == before
    return suites.document(rows, repeats=3)


def test_rows_have_every_contestant_and_are_json(document: dict[str, Any]) -> None:
    json.dumps(document, allow_nan=False)
    assert [row["mode"] for row in document["rows"]] == [*suites.MODES, *suites.MODES]
    for row in document["rows"]:
        assert tuple(row["results"]) == contestants.NAMES
        assert row["results"]["compile"] == {"skipped": "left out by --no-compile"}
        assert row["results"]["fused"]["q1_s"] <= row["results"]["fused"]["q3_s"]
        assert row["path"]["fused"]["forward"] == 1 and not row["path"]["fallback"]
        assert row["peak_bytes"]["fused"] > 0
        assert row["limit"]["flops"] > 0
    # oneDNN's packed linear has no fp64, and no backward.
    assert "skipped" in document["rows"][2]["results"]["onednn"]
    assert "backward" in document["rows"][1]["results"]["onednn"]["skipped"]


def test_report_reads_both_kinds_of_json_alike(document: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    ours.write_text(json.dumps(document))
    wrapped = {
        "machine_info": {"fastlane": {**document, "rows": []}},
        "benchmarks": [{"extra_info": {"row": row}} for row in document["rows"]],
    }
    theirs.write_text(json.dumps(wrapped))
    assert report.markdown(report.load([ours])) == report.markdown(report.load([theirs]))


def test_report_takes_the_median_of_runs(document: dict[str, Any], tmp_path: Path) -> None:
    paths = []
    for factor in (1.0, 4.0, 2.0):
        run = copy.deepcopy(document)
        for row in run["rows"]:
            row["results"]["fused"]["median_s"] *= factor
            row["over_fused"]["eager"] = factor
        paths.append(tmp_path / f"{factor}.json")
        paths[-1].write_text(json.dumps(run))
    loaded = report.load(paths)
    assert len(loaded["rows"]) == len(document["rows"])
    for row, first in zip(loaded["rows"], document["rows"], strict=True):
        assert row["over_fused"]["eager"] == 2
        assert row["results"]["fused"]["median_s"] == 2 * first["results"]["fused"]["median_s"]
    assert "of 3 runs" in report.markdown(loaded)


def test_report_keeps_losing_rows_and_says_who_was_absent(document: dict[str, Any]) -> None:
    table = report.markdown(document)
    assert table.count("| 16×32→") == len(document["rows"])
    losing = json.loads(json.dumps(document))
    losing["rows"][0]["over_fused"]["eager"] = 0.5
    assert "**0.50**" in report.markdown(losing)
    assert "left out by --no-compile" in table


def test_report_says_when_the_machine_was_not_quiet(document: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(document))
    for row in changed["rows"]:
        row["busy_cores"] = 0.0
    assert "NOT a quiet machine" not in report.markdown(changed)
    changed["rows"][0]["busy_cores"] = 1.5
    assert f"in 1 of {len(changed['rows'])} rows something else kept up to 1.5" in report.markdown(changed)


@pytest.mark.parametrize("suite", ["layer", "networks"])
def test_report_rewrites_between_its_markers_only(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], suite: str
) -> None:
    results, readme = tmp_path / "r.json", tmp_path / "README.md"
    results.write_text(json.dumps({**document, "rows": [{**row, "suite": suite} for row in document["rows"]]}))
    start, end = (report.START, report.END) if suite == "layer" else (report.NETWORKS_START, report.NETWORKS_END)
    readme.write_text(f"before\n{start}\nstale figures\n{end}\nafter\n")
    for _ in range(2):
        assert report.main([str(results), "--readme", str(readme), "--suite", suite]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{start}\n") and text.endswith(f"{end}\nafter\n")
    assert "stale" not in text and text.count("| 16×32→32 |") == 2
    readme.write_text("no markers")
    assert report.main([str(results), "--readme", str(readme)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and report.START in error


def test_report_refuses_other_files_and_mixed_machines(document: dict[str, Any], tmp_path: Path) -> None:
    other, ours, theirs = (tmp_path / name for name in ("other.json", "ours.json", "theirs.json"))
    other.write_text("{}")
    ours.write_text(json.dumps(document))
    theirs.write_text(json.dumps({**document, "cpu": "another"}))
    assert report.main([str(other)]) == 2
    assert report.main([str(tmp_path / "absent.json")]) == 2
    assert report.main([str(ours), str(theirs)]) == 2
    assert report.main([str(ours), "--suite", "networks"]) == 2


def test_report_draws_a_picture(document: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(document, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
