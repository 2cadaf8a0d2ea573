"""The GELU benchmark: it compiles, its errors keep the promise, its JSON makes a table; no time asserted."""

import json
import os
import shlex
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import bench_gelu
import report

from fastlane_ext.bench import machine

PROMISE = 1e-5
STRIDE = 2003
FUNCTIONS = list(product(("gelu", "gelu_tanh"), ("value", "derivative")))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]) is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("gelu") / "gelu.json"
    assert bench_gelu.main(["--stride", str(STRIDE), "--rounds", "2", "--json", str(path)]) == 0
    return path


def isas_of_this_machine():
    flags = machine._cpu_flags()
    needed = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    return [isa for isa, wanted in needed.items() if wanted <= flags]


@pytest.mark.slow
def test_every_contestant_is_timed(results):
    document = json.loads(results.read_text())
    assert {"kind", "schema", "cpu", "commit", "date", "compiler", "flags", "busy_cores"} <= set(document)
    rows = document["throughput"]["rows"]
    found = {tuple(row[name] for name in ("dtype", "activation", "function", "formulas", "isa")) for row in rows}
    contestants = [(formulas, isa) for isa in isas_of_this_machine() for formulas in ("before", "now")]
    contestants.append(("libm", "baseline"))
    expected = product(("float32", "float64", "bfloat16"), FUNCTIONS, contestants)
    assert found == {(dtype, *function, *contestant) for dtype, function, contestant in expected}
    assert len(rows) == len(found)
    for row in rows:
        assert 0 < row["q1_ns"] <= row["median_ns"] <= row["q3_ns"]
        assert row["elements_per_ns"] == pytest.approx(1 / row["median_ns"], rel=1e-6)


@pytest.mark.slow
def test_errors_keep_the_promise_and_libm_does_not(results):
    errors = json.loads(results.read_text())["errors"]
    assert (errors["dtype"], errors["range"], errors["stride"]) == ("float32", [-10, 10], STRIDE)
    assert not errors["exhaustive"] and errors["checked"] == 2 * (0x41200000 // STRIDE + 1)
    for row in errors["rows"]:
        assert abs(row["at"]) <= 10
        if row["formulas"] == "libm":
            assert row["function"] != "value" or row["largest_error"] == 1
        else:
            # A float cannot be right to less than half its last bit: no comparison was left out.
            assert 2**-25 < row["largest_error"] <= PROMISE, row
    expected = {(*function, formulas) for function in FUNCTIONS for formulas in ("before", "now", "libm")}
    if isas_of_this_machine():
        assert {(row["activation"], row["function"], row["formulas"]) for row in errors["rows"]} == expected


@pytest.mark.slow
def test_report_puts_the_table_between_its_own_markers(results, tmp_path, capsys):
    readme = tmp_path / "RESULTS.md"
    others = f"{report.START}\nother figures\n{report.END}"
    readme.write_text(f"{others}\n{report.GELU_START}\nstale figures\n{report.GELU_END}\nafter\n")
    for _ in range(2):
        assert report.main([str(results), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(others) and text.endswith(f"{report.GELU_END}\nafter\n") and "stale" not in text
    assert text.count("\n| float64 | gelu_tanh | GELU |") == len(isas_of_this_machine())
    assert f"one float32 in {STRIDE:,}, NOT every one" in text
    assert report.main([str(results), "--plot", str(tmp_path / "gelu.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_compiler_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "gelu.json"
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert bench_gelu.main(["--json", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no-such-compiler" in error and not path.exists()
    monkeypatch.setenv("CXX", "false")
    assert bench_gelu.main(["--json", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
