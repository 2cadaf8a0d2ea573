"""The ``fastlane`` command where the surroundings are poor: ASCII terminals, full disks, closed streams, slips."""

from __future__ import annotations

import doctest
import io
import json
import os
import re
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import SMALL_TRAINING, fails

import fastlane_ext
from fastlane_ext import _files, _text, cli, plots
from fastlane_ext.cli import files, limits, output
from fastlane_ext.cli.commands import bench, gradients, info
from fastlane_ext.cli.errors import CommandError

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, which this system has not")


class Stream(io.TextIOWrapper):
    """A standard stream with an encoding of its own."""

    def __init__(self, encoding: str, errors: str = "strict") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors=errors)

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Any:
    def replace(encoding: str, errors: str = "strict") -> tuple[Stream, Stream]:
        made = Stream(encoding, errors), Stream(encoding, "backslashreplace")
        monkeypatch.setattr(sys, "stdout", made[0])
        monkeypatch.setattr(sys, "stderr", made[1])
        return made

    return replace


def process(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(fastlane_ext.__file__).parent.parent)}
    environment |= options.pop("environment", {})
    command = [sys.executable, "-m", "fastlane_ext", *argv]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, text=True, timeout=120, env=environment, **options)


def test_spelling() -> None:
    ascii_stream, latin = Stream("ascii"), Stream("latin-1")
    text = "3 µs × ±2 → x Wᵀ ≤ 4², é"
    assert _text.for_stream(text, ascii_stream) == r"3 us x +/-2 -> x W^T <= 4^2, \xe9"
    assert _text.for_stream(text, latin) == "3 µs × ±2 -> x W^T <= 4², é"
    for stream in (Stream("utf-8"), None, object()):
        assert _text.for_stream(text, stream) == text
    for stream, expected in ((ascii_stream, _text.for_stream(text, ascii_stream)), (latin, "3 µs × ±2 -> ")):
        with _text.tolerant(stream):
            stream.write(text)
        assert stream.text().startswith(expected) and stream.errors == "strict"
        with pytest.raises(UnicodeEncodeError):
            stream.write("→")
    chosen = Stream("ascii", "replace")
    with _text.tolerant(chosen):
        chosen.write("µ")
    assert chosen.text() == "?"
    assert doctest.testmod(_text).failed == 0


def test_a_name_that_is_no_text_goes_out_as_it_came_in() -> None:
    for encoding in ("utf-8", "ascii", "cp1252"):
        stream = Stream(encoding)
        with _text.tolerant(stream):
            stream.write("a\udcff\udc80→")
        expected = "→".encode(encoding) if encoding == "utf-8" else b"->"
        assert stream.buffer.getvalue() == b"a\xff\x80" + expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
@pytest.mark.parametrize(
    "argv", [["gradients"], ["gradients", "--experiment", "worked"], ["info"], ["--help"], ["train", "--help"]]
)
def test_every_terminal_gets_its_text(encoding: str, argv: list[str], streams: Any) -> None:
    out, err = streams(encoding)
    try:
        assert cli.main(argv) == 0
    except SystemExit as stop:
        assert stop.code == 0
    assert out.text() and "\\" not in out.text() and err.text() == ""
    if argv == ["--help"]:
        assert "x W^T + b" in out.text()


@pytest.mark.usefixtures("one_thread_here")
def test_tables_stay_aligned(streams: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    out, _ = streams("ascii")
    assert cli.main(["train", *SMALL_TRAINING]) == 0
    monkeypatch.setattr(bench.suites, "SUITES", {"layer": (bench.suites.Layer(8, 16, 16, quick=True),)})
    assert cli.main(["bench", "--suite", "layer", "--quick", "--threads", "1", "--no-compile"]) == 0
    tables = re.findall(r"(?:^[+|].*\n)+", out.text(), re.MULTILINE)
    assert len(tables) >= 5
    for table in tables:
        assert len({len(line) for line in table.splitlines()}) == 1, table
    assert " -> " in out.text() and "8x16->16" in out.text()


@pytest.fixture
def one_thread_here() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_json_keeps_every_character(encoding: str, streams: Any, tmp_path: Path) -> None:
    value = {"name": "µ → é \udcff"}
    out, _ = streams(encoding)
    with _text.tolerant(sys.stdout):
        files.write_json(value, "-")
    assert json.loads(out.text()) == value
    files.write_json(value, str(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


def test_an_error_is_spelled_too(streams: Any) -> None:
    _, err = streams("ascii")
    assert cli.main(["gradients", "--plot", "/no/such/µ/g.png"]) == 2
    assert err.text().startswith("fastlane gradients: --plot: got /no/such/u/g.png, but the folder")


# Full disks and closed streams


@needs_full
@pytest.mark.parametrize("argv", [["info"], ["info", "--json"], ["--help"], ["--version"]])
def test_a_full_disk(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with FULL.open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["fastlane: cannot write to standard output: No space left on device"]


@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_as_a_process(unbuffered: str) -> None:
    with FULL.open("w", encoding="utf-8") as full:
        done = process(["gradients"], stdout=full, environment={"PYTHONUNBUFFERED": unbuffered})
        assert done.returncode == 2
        assert done.stderr == "fastlane: cannot write to standard output: No space left on device\n"
    if unbuffered:
        with FULL.open("w", encoding="utf-8") as full:
            assert process(["gradients", "--seed", "x"], stderr=full).returncode == 2


def test_a_reader_that_left_as_a_process() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = process(["info"], stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_closed_streams(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    for argv in (["info"], ["info", "--json"]):
        assert cli.main(argv) == 2
        assert capsys.readouterr().err == ("fastlane info: standard output is closed; open it, or give --json a PATH\n")
    path = tmp_path / "i.json"
    assert cli.main(["info", "--json", str(path)]) == 0 and json.loads(path.read_text())["threads"]
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["info"]) == 2
    with output.progress("work", 1, json_output=False) as note:
        note(1)


@needs_full
@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_full_disk_for_a_file(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    expected = f"fastlane gradients: {option}: cannot write /dev/full: No space left on device\n"
    assert fails(["gradients", option, str(FULL)], capsys) == expected
    assert stat.S_ISCHR(FULL.stat().st_mode)


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("before", [None, b"earlier"])
def test_nothing_is_half_written(option: str, before: bytes | None, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib").figure  # noqa: B018
    path = tmp_path / "result.png"
    if before is not None:
        path.write_bytes(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal, and write() says that the file is too large.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        message = fails(["gradients", option, str(path)], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message == f"fastlane gradients: {option}: cannot write {path}: File too large\n"
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["result.png"])
    assert before is None or path.read_bytes() == before


def test_a_file_is_replaced_as_a_file(tmp_path: Path) -> None:
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    path.write_text("earlier")
    path.chmod(0o640)
    link.symlink_to(path)
    _files.write_whole(link, b"now")
    assert link.is_symlink() and path.read_bytes() == b"now"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    umask = os.umask(0o022)
    os.umask(umask)
    _files.write_whole(tmp_path / "new", b"")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask
    _files.write_whole("/dev/null", b"nothing")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_folder_where_no_file_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "a.json", _files._write

    def refuse(place: str, data: bytes, mode: str) -> None:
        if place != str(path):
            raise PermissionError(13, "Permission denied")
        write(place, data, mode)

    monkeypatch.setattr(_files, "_write", refuse)
    with pytest.raises(PermissionError):
        _files.write_whole(path, b"new")
    path.write_bytes(b"earlier")
    _files.write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CommandError, match="^--json: cannot write .*: no permission to write to "):
        files.writable("--json", str(path))


# Pictures


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "svg"])
def test_a_notebooks_backend(backend: str, tmp_path: Path) -> None:
    """The picture is made; MPLBACKEND stays as it was, and a later use of pyplot is not affected."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "p.png"
    code = (
        "import os, sys; from fastlane_ext import cli; "
        f"status = cli.main(['gradients', '--plot', {str(path)!r}]); "
        f"assert os.environ['MPLBACKEND'] == {backend!r}; "
        "import matplotlib; print(matplotlib.rcParams['backend']); sys.exit(status)"
    )
    environment = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # matplotlib_inline may be installed after all.
    assert done.stdout.splitlines()[-1] in ([backend] if backend == "svg" else [backend, "agg"])
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("argv", [["gradients"], ["train"]])
def test_an_unknown_format_is_refused_before_the_work(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    message = fails([*argv, "--plot", "a.xyz"], capsys)
    assert "--plot: got the ending .xyz, expected one of " in message and " png, " in message
    assert plots.picture_format("a.SVG") == "svg" and plots.picture_format("a") == "png"


# Slips


HUGE = "9" * 5000
BEYOND = str(2**64)


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["gradients", "--seed", BEYOND], "--seed"),
        (["gradients", "--seed", str(-(2**63) - 1)], "--seed"),
        (["gradients", "--seed", HUGE], "--seed"),
        (["gradients", "--seed", "1.5"], "--seed"),
        (["train", "--seed", BEYOND], "--seed"),
        (["gradients", "--sizes", "1000000000000,3"], "--sizes"),
        (["gradients", "--sizes", f"{10**100},3"], "--sizes"),
        (["gradients", "--sizes", f"3,{HUGE}"], "--sizes"),
        (["gradients", "--sizes", "3,-1"], "--sizes"),
        (["gradients", "--sizes", ","], "--sizes"),
        *((["train", f"--{name}", value], f"--{name}") for name in ("epochs", "layers", "width", "batch")
          for value in ("0", "-1", "nan", "1e3", str(10**12), HUGE)),
        (["train", "--layers", "99999", "--width", "999999"], "--width"),
        *((["train", "--lr", value], "--lr") for value in ("nan", "inf", "0", "-1", "1e400", "1e300", "x")),
        *((["bench", "--repeats", value], "--repeats") for value in ("0", "-1", str(10**12), HUGE)),
        *((["bench", "--threads", value], "--threads") for value in ("0", "-1", "1,x", str(10**9), HUGE, "")),
        (["check", "--isa", "sse9\nsse10"], "--isa"),
        (["info", "--json", "a" * 300], "--json"),
        (["info", "--json", ""], "--json"),
        (["info", "a\nb"], "unrecognized"),
    ],
)  # fmt: skip
def test_absurd_values(argv: list[str], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(argv, capsys)
    assert option in message and len(message) < 300


def test_the_ends_of_the_range(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (str(2**64 - 1), str(-(2**63))):
        assert cli.main(["gradients", "--seed", seed, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["seed"] == int(seed)


def test_memory_is_asked_for_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory", lambda: 1000)
    with pytest.raises(CommandError, match="^--sizes '1,64,1': needs about .* KiB of memory, this machine"):
        gradients.compute(sizes=[1, 64, 1])
    monkeypatch.setattr(limits, "memory", lambda: None)
    assert gradients.compute(sizes=[1, 2])["ok"]
    monkeypatch.undo()
    assert limits.memory() is None or limits.memory() > 1 << 20


def test_an_error_of_the_system_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(info, "compute", fail)
    assert fails(["info"], capsys) == "fastlane info: [Errno 2] No usable temporary directory found\n"


@pytest.mark.parametrize("environment", [{"COLUMNS": "1"}, {"TERM": "dumb"}, {"COLUMNS": "x", "LINES": "-1"}])
def test_odd_terminals(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["info"]) == 0
    with pytest.raises(SystemExit) as stop:
        cli.main(["gradients", "--help"])
    assert stop.value.code == 0 and "--plot" in capsys.readouterr().out
