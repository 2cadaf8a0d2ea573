"""The ``fastlane`` command: through ``main(argv)`` and as a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.subprocesses import HANG_S

import fastlane_ext
from fastlane_ext import _text, cli, experiments, reference
from fastlane_ext.cli import digits, files, output, promises
from fastlane_ext.cli.commands import bench, check, gradients, train

# The last digits depend on how the machine's kernels add up.
FIRST_LINE = re.compile(r"layers\.0\.0\.weight has gradient mean of 1\.797\d{3}e-05")
COMMANDS = ("gradients", "train", "bench", "check", "info")
SMALL_TRAINING = ["--epochs", "1", "--layers", "3", "--width", "16", "--no-compile"]


def run_json(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit status and the one JSON document that stdout must be."""
    status = cli.main(argv)
    return status, json.loads(capsys.readouterr().out)


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a call, which must end with exit status 2 and write nothing to stdout."""
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    streams = capsys.readouterr()
    assert status == 2
    assert streams.out == ""
    assert streams.err.count("\n") == 1 and streams.err.startswith("fastlane"), streams.err
    return streams.err


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small layers on several threads crawl on a machine that is busy with something else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: fastlane {command}") and "--json" in out
    assert "default: None" not in out and "default: True" not in out


def test_top_level_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS) and "FASTLANE_CPU_ISA" in out


def test_as_a_process() -> None:
    def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fastlane_ext", *argv],
            capture_output=True,
            text=True,
            timeout=HANG_S,
            env={**os.environ, "PYTHONPATH": str(Path(fastlane_ext.__file__).parent.parent), **environment},
        )

    done = run("gradients")
    assert done.returncode == 0, done.stderr
    heading, line = done.stdout.splitlines()[:2]
    assert heading == "=== Gradients WITHOUT shortcuts ===" and FIRST_LINE.fullmatch(line)
    wrong = run("info", FASTLANE_CPU_ISA="sse9")
    assert wrong.returncode == 2
    assert "FASTLANE_CPU_ISA" in wrong.stderr and wrong.stderr.count("\n") == 1
    strict = run("gradients", FASTLANE_STRICT="1", FASTLANE_DISABLE="1")
    assert strict.returncode == 1
    assert "FASTLANE_DISABLE is set" in strict.stderr and strict.stderr.count("\n") == 1


def test_gradients_agree_with_eager_and_run_fused(capsys: pytest.CaptureFixture[str]) -> None:
    status, result = run_json(["gradients", "--json"], capsys)
    assert status == 0 and result["ok"]
    assert FIRST_LINE.fullmatch(result["blocks"]["without"]["lines"][0])
    assert result["largest_relative_difference"] < 1e-5
    assert result["path"]["fallback"] == {}
    assert min(result["path"]["fused"].values()) > 0


def test_gradients_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "g.png"
    argv = ["gradients", "--sizes", "3,8,8,1", "--seed", "1", "--activation", "gelu_tanh", "--style", "table"]
    assert cli.main([*argv, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "Gradients by layer" in out and str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_gradients_fail_where_fused_and_eager_disagree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = experiments.shortcut_demo

    def off(*args: Any, eager: bool = False, **options: Any) -> Any:
        made = demo(*args, eager=eager, **options)
        if not eager:
            with torch.no_grad():
                made.without.layers[0][0].weight.mul_(1.01)
        return made

    monkeypatch.setattr(experiments, "shortcut_demo", off)
    assert cli.main(["gradients"]) == 1
    assert "DISAGREE" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_train_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    picture = tmp_path / "t.png"
    status, result = run_json(["train", *SMALL_TRAINING, "--plot", str(picture), "--json"], capsys)
    assert status == 0 and result["ok"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert result["images"] == {"training": 1438, "held_out": 359}
    for run in result["runs"].values():
        assert len(run["loss"]["fused"]) == len(run["loss"]["eager"]) == result["steps_per_epoch"]
        assert len(run["gradients_at_start"]) == 3
    assert result["epoch"]["compile"] == {"skipped": "left out by --no-compile"}
    assert result["epoch"]["fused"]["median_s"] > 0
    assert result["path"]["fallback"] == {}


@pytest.mark.usefixtures("one_thread")
def test_progress_reaches_its_end(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    done: list[int] = []
    texts: list[str | None] = []

    def note(steps: int = 0, text: str | None = None) -> None:
        done.append(steps)
        texts.append(text)

    options = digits.Options(epochs=2, layers=3, width=16)
    train.compute(options, compiled=False, plot=str(tmp_path / "t.svg"), note=note)
    assert sum(done) == train.steps(options)
    assert max(done[: 2 * len(train.TRAININGS) * options.epochs]) == 1, "an epoch is a step"
    assert {"with shortcuts: eager_fp64", "first epochs of eager", "time of an epoch", "picture"} <= set(texts)
    done.clear()
    gradients.compute(plot=str(tmp_path / "g.svg"), note=note)
    assert sum(done) == gradients.STEPS and "time of a step" in texts


@pytest.mark.usefixtures("one_thread")
def test_train_renders(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert cli.main(["train", *SMALL_TRAINING]) == 0
    out = capsys.readouterr().out
    assert "without shortcuts" in out and "agree" in out and "left out by --no-compile" in out


@pytest.mark.usefixtures("one_thread")
def test_shortcuts_make_a_deep_network_learn() -> None:
    pytest.importorskip("sklearn")
    options = digits.Options(epochs=6)
    data = digits.Digits.load(options.seed)
    batches = data.batches(options.epochs, options.batch, options.seed)
    accuracy = {}
    for key, shortcut in train.SHORTCUTS.items():
        model = digits.make_model(fastlane_ext.ResidualNetwork, options, shortcut)
        _, accuracy[key] = digits.train(model, data, batches, options)
    assert accuracy["without"] < 0.2
    assert accuracy["with"] > 0.7


def test_training_disagreement_is_seen() -> None:
    eager = [2.0, 1.0, 0.5]
    nearly = [2.0, 1.0 + 1e-7, 0.5 - 1e-7]
    curves = {"eager": eager, "eager_fp64": nearly, "eager_reordered": eager}
    assert train._agreement({**curves, "fused": nearly})["ok"]
    assert not train._agreement({**curves, "fused": [2.0, 1.0, 0.501]})["ok"]
    assert not train._agreement({**curves, "fused": [2.0, float("nan"), 0.5]})["ok"]


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (bench.suites.Layer(8, 16, 16, quick=True), bench.suites.Layer(8, 16, 4))
    networks = (bench.suites.Network("tiny", (4, 4, 4), (2, 4), quick=True),)
    suites = {"layer": cases, "networks": networks, "all": (*cases, *networks)}
    monkeypatch.setattr(bench.suites, "SUITES", suites)


@pytest.mark.usefixtures("tiny_suite")
def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "--threads", "1", "--repeats", "3", "--no-compile"]
    path = tmp_path / "b.json"
    assert cli.main([*argv, "--json", str(path)]) == 0
    assert capsys.readouterr().out == ""
    result = json.loads(path.read_text())
    assert result["kind"] == "fastlane-bench" and len(result["rows"]) == 6
    assert {"cpu", "cores", "isa", "torch", "commit", "date"} <= set(result)
    status, quick = run_json([*argv, "--quick", "--suite", "layer", "--dtype", "float64", "--json"], capsys)
    assert status == 0
    assert [row["dtype"] for row in quick["rows"]] == ["float64", "float64"]


@pytest.mark.usefixtures("tiny_suite")
def test_bench_renders(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--quick", "--threads", "1", "--no-compile"]) == 0
    out = capsys.readouterr().out
    assert "8×16→16" in out and "tiny" in out
    assert "compile, forward: left out by --no-compile" in out


def test_check_passes_on_this_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    isa = fastlane_ext.cpu_isa()
    status, result = run_json(["check", "--isa", isa, "--json"], capsys)
    assert status == 0, [row for row in result["rows"] if not row["ok"]]
    assert result["isas"] == [isa] and result["failed"] == 0
    layers = [row for row in result["rows"] if row["promise"] == "error of a layer"]
    assert len(layers) == 4 * len(reference.ACTIVATIONS) * len(promises.layers.OUTPUTS)
    assert {row["dtype"] for row in layers} == set(promises.rows.DTYPES)
    assert all(row["fused"] <= 2 * row["eager"] for row in layers)
    (path,) = (row for row in result["rows"] if row["promise"] == "the fused path ran")
    assert path["ok"]


def test_check_fails_if_one_promise_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good = promises.rows.row("error of a layer", "float32", "gelu", "y", 1e-7, 2e-7, 4e-7, True)
    above = promises.rows.row("error of a layer", "float32", "gelu", "dx", 3e-7, 2e-7, 4e-7, True)
    bad = promises.rows.row("error of a layer", "float32", "gelu", "dW", 9e-7, 2e-7, 4e-7, False)
    died = promises.rows.died("signal 4: illegal instruction")

    def lines(rows: list[promises.rows.Row]) -> Any:
        return lambda isa: iter([{"isa": isa}, {"group": "g", "rows": rows}])

    monkeypatch.setattr(check, "_lines", lines([good, above]))
    isa = fastlane_ext.cpu_isa()
    assert cli.main(["check", "--isa", isa]) == 0
    assert "all promises hold" in capsys.readouterr().out
    monkeypatch.setattr(check, "_lines", lines([good, above, bad, died]))
    assert cli.main(["check", "--isa", isa]) == 1
    out = capsys.readouterr().out
    assert "2 of 4 promises FAIL" in out and "illegal instruction" in out and "1 within the limit" in out


def test_a_wrong_layer_breaks_the_promises() -> None:
    class Wrong(promises.rows.Counter):
        def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
            return super().__call__(*args, **options) * (1 + 1e-5)

    rows = promises.layers.accuracy(Wrong(), "float32", "gelu")
    assert not any(row["ok"] for row in rows if row["what"] != "dresidual")
    assert not all(row["ok"] for row in promises.gelu.scalar_float32(Wrong(), "gelu"))


def test_a_layer_that_left_the_fused_path_breaks_the_promise() -> None:
    fastlane_ext.reset_stats()
    assert not promises.process.path(1)["ok"]
    fused = promises.rows.Counter()
    promises.layers.accuracy(fused, "float32", "gelu")
    assert promises.process.path(fused.calls)["ok"]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    status, result = run_json(["info", "--json"], capsys)
    assert status == 0
    assert result["cpu_isa"] == fastlane_ext.cpu_isa()
    assert result["threads"] == torch.get_num_threads()
    assert cli.main(["info"]) == 0
    assert result["cuda_reason"][:20] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["nothing"], "nothing"),
        (["gradients", "--sizes", "64"], "--sizes"),
        (["gradients", "--sizes", "3,x"], "--sizes"),
        (["gradients", "--activation", "relu"], "--activation"),
        (["gradients", "--plot", "/no/such/folder/g.png"], "--plot"),
        (["train", "--epochs", "0"], "--epochs"),
        (["train", "--lr", "-1"], "--lr"),
        (["bench", "--threads", "0"], "--threads"),
        (["bench", "--suite", "nothing"], "--suite"),
        (["bench", "--json", "/no/such/folder/b.json"], "--json"),
        (["check", "--isa", "sse9"], "--isa"),
        (["info", "--json", "."], "--json"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(argv, capsys)


@pytest.mark.parametrize(
    ("module", "extra", "argv"),
    [
        ("rich", "cli", ["info"]),
        ("sklearn.datasets", "train", ["train"]),
        ("matplotlib.figure", "plot", ["train", "--plot", "t.png"]),
    ],
)
def test_a_missing_extra_is_named(
    module: str,
    extra: str,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # None in sys.modules makes an import fail as if the package were not installed.
    monkeypatch.setitem(sys.modules, module, None)
    assert f'pip install "fastlane_ext[{extra}]"' in fails(argv, capsys)


def test_json_needs_no_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rich", "rich.console", "rich.table", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run_json(["info", "--json"], capsys)[0] == 0
    for on_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=on_terminal: answer)
        assert run_json(["gradients", "--json"], capsys)[0] == 0


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    files.write_json({"a": [float("nan"), {"b": float("inf")}], "c": 1.5}, "-")
    assert json.loads(capsys.readouterr().out) == {"a": [None, {"b": None}], "c": 1.5}


def test_units() -> None:
    assert _text.seconds(0.00123) == "1.23 ms"
    assert _text.seconds(5e-9) == "5 ns"
    assert _text.size(3 << 19) == "1.5 MiB"
    assert _text.size(12) == "12 B"


def test_progress_off_a_terminal_is_plain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(output, "PLAIN_NOTE_SECONDS", -1.0)
    with output.progress("work", 2, json_output=False) as note:
        note(1, "first")
    with output.progress("work", 2, json_output=True) as note:
        note(1, "silent")
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", "work: 1 of 2 done; first\n")
