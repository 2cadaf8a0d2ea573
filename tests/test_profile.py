"""The profile of `fastlane tune`: which files are used, which are ignored and why, and what a profile changes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_cli import fails

import fastlane_ext as fl
from fastlane_ext import _profile
from fastlane_ext._cpu import cpu_identity
from fastlane_ext._load import library
from fastlane_ext.bench import tuning
from fastlane_ext.cli.commands import tune

pytestmark = [
    pytest.mark.any_isa,
    pytest.mark.skipif(fl.cpu_isa() == "none", reason="needs kernels to choose between"),
]

POINT = {"work": "layer_forward", "dtype": "float32", "rows": 64, "in_features": 64, "out_features": 64}


def profile_of(*points, **changed):
    return {**_profile.identity(), "date": "2026-01-01", "points": list(points), **changed}


def run(script, *, profile=None, tmp_path=None, **variables):
    """Run a script in a new process, with a profile or without, and return its output and its warnings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTLANE_")}
    if "FASTLANE_CPU_ISA" in os.environ:
        environment["FASTLANE_CPU_ISA"] = os.environ["FASTLANE_CPU_ISA"]
    if profile is not None:
        path = tmp_path / "profile.json"
        path.write_text(profile if isinstance(profile, str) else json.dumps(profile))
        environment["FASTLANE_PROFILE"] = str(path)
    code = ["-c", script] if isinstance(script, str) else script
    environment |= variables
    return subprocess.run([sys.executable, *code], env=environment, capture_output=True, text=True, check=False)


SHOW = """
import json, torch, fastlane_ext as fl
from fastlane_ext import _profile
from fastlane_ext._cpu import cpu_identity
from fastlane_ext._load import library
def path(rows, width, dtype=torch.float32):
    fl.reset_stats()
    x, weight = torch.randn(rows, width, dtype=dtype), torch.randn(width, width, dtype=dtype) / width**0.5
    y = fl.linear_gelu_residual(x, weight, residual=x)
    torch.testing.assert_close(y, fl.reference.linear_gelu_residual(x, weight, residual=x))
    return [name for name, counts in fl.stats().items() if counts.get("forward")]
print(json.dumps([_profile.choice, path(64, 64), path(128, 96), path(64, 256), path(64, 64, torch.float64)]))
"""


def test_a_profile_decides_near_its_points_and_nowhere_else(tmp_path):
    done = run(SHOW, profile=profile_of({**POINT, "fused_wins": False}), tmp_path=tmp_path)
    choice, at_the_point, near, far, other_dtype = json.loads(done.stdout)
    assert done.stderr == ""
    assert choice.startswith(f"the profile {tmp_path / 'profile.json'} of 2026-01-01, 1 points")
    assert at_the_point == near == ["library"]
    assert [far, other_dtype] == [["fused" if library.cpu_is_measured() else "library"]] * 2


@pytest.mark.parametrize("value", ["fused", "library"])
def test_a_forced_path_comes_before_the_profile(value, tmp_path):
    fused_wins = value != "fused"
    done = run(SHOW, profile=profile_of({**POINT, "fused_wins": fused_wins}), tmp_path=tmp_path, FASTLANE_PATH=value)
    assert json.loads(done.stdout)[1:] == [[value]] * 4


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        ("", "the file is damaged"),
        ("[" * 100_000, "the file is damaged"),
        ("[]", "the file is no profile"),
        ('{"points": 3}', "the file is no profile"),
        (profile_of(format=2), "the profile's format is 2, but 1 is running"),
        (profile_of(cpu="another CPU"), "the profile's cpu is 'another CPU', but "),
        (profile_of(kernels="avx9"), "the profile's kernels is 'avx9', but "),
        (profile_of(torch="1.0"), "the profile's torch is '1.0', but "),
        (profile_of(3), "the file is damaged: a point lacks a value"),
        (profile_of(POINT), "the file is damaged: a point lacks a value"),
        (profile_of({**POINT, "rows": True, "fused_wins": True}), "the file is damaged: a point lacks a value"),
        (profile_of({**POINT, "rows": 2**70, "fused_wins": True}), "the file is damaged: "),
        (profile_of({**POINT, "dtype": "int8", "fused_wins": True}), "dtype: got 'int8', expected float32"),
        (profile_of({**POINT, "work": "tea", "fused_wins": True}), "work: got 'tea', expected layer_forward"),
        (None, "there is no such file"),
    ],
)
def test_a_profile_that_does_not_fit_is_ignored_with_one_line(profile, reason, tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    if profile is not None:
        path.write_text(profile if isinstance(profile, str) else json.dumps(profile))
    monkeypatch.setenv("FASTLANE_PROFILE", str(path))
    known, set_profile = [], library.set_profile
    monkeypatch.setattr(library, "set_profile", lambda points: known.append(set_profile(points)))
    with pytest.warns(RuntimeWarning) as warned:
        choice = _profile.load()
    (message,) = (str(warning.message) for warning in warned)
    assert message.startswith(f"fastlane_ext: ignores the profile {path}: ") and reason in message
    assert "\n" not in message and message.endswith("set FASTLANE_PROFILE=off")
    assert f"({path} is ignored: " in choice and known == []


def test_a_foreign_profile_changes_nothing(tmp_path):
    done = run(SHOW, profile=profile_of({**POINT, "fused_wins": False}, cpu="another CPU"), tmp_path=tmp_path)
    choice, *paths = json.loads(done.stdout)
    (line,) = (line for line in done.stderr.splitlines() if "fastlane_ext: " in line)
    assert "RuntimeWarning: fastlane_ext: ignores the profile" in line and "is ignored" in choice
    assert paths == [["fused" if library.cpu_is_measured() else "library"]] * 4


def test_no_profile_is_no_event(tmp_path, monkeypatch, recwarn):
    rules = _profile.load()  # with FASTLANE_PROFILE=off, as all tests
    assert rules.endswith(" (FASTLANE_PROFILE=off)")
    monkeypatch.delenv("FASTLANE_PROFILE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert f"{_profile.load()} (FASTLANE_PROFILE=off)" == rules
    (tmp_path / "fastlane_ext").mkdir()
    assert f"{_profile.load()} (FASTLANE_PROFILE=off)" == rules and not recwarn.list
    for isa, expected in (("none", "torch's own operators"), ("tea", "FASTLANE_CPU_ISA is wrong")):
        done = run("import fastlane_ext; print(fastlane_ext._profile.choice)", FASTLANE_CPU_ISA=isa)
        assert done.stderr == "" and expected in done.stdout


def test_the_folder_follows_the_users_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _profile.default_path().parent == tmp_path / "fastlane_ext"
    assert library.cpu_isa().replace("_", "-") in _profile.default_path().name
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says: ignore a relative path
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert str(_profile.folder()).startswith(str(tmp_path / "home"))


def test_tune_writes_what_the_next_process_reads(tmp_path):
    command = ["-m", "fastlane_ext", "tune", "--seconds", "2", "--dtype", "float32", "--json"]
    done = run(command, XDG_CACHE_HOME=str(tmp_path), OMP_WAIT_POLICY="passive")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    profile = json.loads(next((tmp_path / "fastlane_ext").iterdir()).read_text())
    assert result["path"].startswith(str(tmp_path)) and profile["points"] == result["points"]
    assert len(result["points"]) + len(result["left_out"]) == len(tuning.grid(["float32"]))
    for point in result["points"]:
        assert set(point["fused_s"]) == set(point["library_s"]) == {str(n) for n in result["threads"]}
        assert all(value > 0 for times in (point["fused_s"], point["library_s"]) for value in times.values())
    script = f"""
import json, fastlane_ext
from fastlane_ext._load import library
points = json.loads({json.dumps(json.dumps(result["points"]))})
shapes = [(p["work"], p["dtype"], p["rows"], p["in_features"], p["out_features"]) for p in points]
print(fastlane_ext._profile.choice, [library.fuses(*shape) for shape in shapes] == [p["fused_wins"] for p in points])
"""
    done = run(script, XDG_CACHE_HOME=str(tmp_path))
    assert done.stderr == "" and done.stdout.startswith("the profile ") and done.stdout.endswith(" True\n")


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({"FASTLANE_PATH": "fused"}, [], "FASTLANE_PATH: got 'fused', expected nothing; unset it"),
        ({"FASTLANE_DISABLE": "1"}, [], "FASTLANE_DISABLE: got '1', expected nothing; unset it"),
        ({}, ["--output", "/nowhere/p.json"], "--output: got /nowhere/p.json, but the folder /nowhere does not exist"),
        ({}, ["--output", "."], "--output: got '.', which is a folder"),
        ({}, ["--seconds", "0"], "argument --seconds: got '0', expected a whole number from 1 to 86400"),
        ({}, ["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ({"XDG_CACHE_HOME": "/proc/1"}, [], "--output: cannot write /proc/1/fastlane_ext/profile"),
    ],
)
def test_tune_refuses_in_one_line(variables, options, message, monkeypatch, capsys):
    for name in tune.FORBIDDEN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tuning, "measure", lambda *_: pytest.fail("measured before the check"))
    assert message in fails(["tune", "--json", *options], capsys)


def test_tune_needs_kernels():
    done = run(["-m", "fastlane_ext", "tune", "--json"], FASTLANE_CPU_ISA="none")
    assert (done.returncode, done.stdout) == (2, "") and "no kernels to measure: " in done.stderr


@pytest.fixture
def raced(monkeypatch):
    """Makes `measure` see given times instead of a clock's."""
    times, seen = {}, []

    def race(point, layers, call):
        seen.append((point, list(layers)))
        return times[point.work][torch.get_num_threads()]

    monkeypatch.setattr(tuning, "_race", race)
    monkeypatch.setattr(tuning, "WORKS", {work: lambda point: None for work in tuning.WORKS})
    return times, seen


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ((1.0, 2.0), (1.0, 2.0), True),
        ((2.0, 1.0), (2.0, 1.0), False),
        ((1.0, 1.2), (1.02, 1.0), True),  # the mean decides: 1.2 · 0.98 > 1
        ((1.2, 1.0), (1.0, 1.02), False),
        ((1.0, 1.2), (1.1, 1.0), None),  # one number of threads speaks against the mean
        ((1.0, 1.02), (1.0, 1.02), None),  # within the margin the rule stays
        ((1.02, 1.0), (1.02, 1.0), None),
    ],
)
@pytest.mark.parametrize("rule", [True, False])
def test_the_faster_path_is_taken_and_a_tie_keeps_the_rule(one, two, expected, rule, raced, monkeypatch):
    times, seen = raced
    times["layer_forward"] = {1: one, 2: two}
    monkeypatch.setattr(tuning.library, "fuses", lambda *shape: rule, raising=True)
    times["stack"] = times["layer_forward"]
    points = [tuning.Point(work, "float32", 8, 64, 64) for work in ("layer_forward", "stack")]
    measured = list(tuning.measure(points, [1, 2], budget=60))
    assert [each.fused_wins for each in measured] == [rule if expected is None else expected] * 2
    # A stack that does not run as one kernel runs layer by layer, as its layers were measured.
    assert [layers for _, layers in seen] == [[], [], *[[points[0].values(measured[0].fused_wins)]] * 2]


def test_points_without_time_are_left_to_the_rules(raced):
    times, _ = raced
    times["layer_forward"] = {1: (1.0, 2.0)}
    points = [tuning.Point("layer_forward", "float32", rows, 64, 64) for rows in (8, 1024)]
    first, second = tuning.measure(points, [1], budget=60)  # 128 times as much work as one that took two seconds
    assert isinstance(first, tuning.Measured) and second == points[1]
    assert list(tuning.measure(points, [1], budget=0)) == points


@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize("after", [0, 3])
def test_a_call_that_fails_ends_the_measurement(path, after, monkeypatch):
    profile, calls = [], []

    def fail():
        calls.append(profile[-1][-1])  # the fused path or the library's
        if calls.count(path) > after:
            raise MemoryError("no room for the operands")

    monkeypatch.setattr(tuning, "WORKS", {"layer_forward": lambda point: fail})
    monkeypatch.setattr(tuning.library, "set_profile", lambda points: profile.__setitem__(slice(None), points))
    with pytest.raises(MemoryError, match="no room for the operands"):
        list(tuning.measure([tuning.Point("layer_forward", "float32", 8, 64, 64)], [1], budget=60))
    assert calls[-1] == path and calls.count(path) == after + 1 and profile == []


def test_every_work_runs_on_both_paths():
    """The calls that are timed take the path that the profile names, and leave no profile behind."""
    script = """
import torch, fastlane_ext as fl
from fastlane_ext._load import library
from fastlane_ext.bench import tuning
for work in tuning.WORKS:
    point = tuning.Point(work, "float32", 8, 32, 32 if work == "stack" else 64)
    call = tuning.WORKS[work](point)
    for fused in (True, False):
        features = ((32, 64), (64, 32), (32, 32))
        layers = [(w, "float32", 8, *f, fused) for w in ("layer_forward", "layer_backward") for f in features]
        library.set_profile([*layers, point.values(fused)])
        fl.reset_stats()
        call()
        counts = fl.stats()["fused" if fused else "library"]
        other = fl.stats()["library" if fused else "fused"]
        assert sum(counts.values()) > 0 and sum(other.values()) == 0, (work, fused, fl.stats())
    assert len(list(tuning.measure([point], [1], budget=9))) == 1
    library.set_profile([])
print("ok")
"""
    done = run(script, FASTLANE_PROFILE="off")
    assert done.stdout == "ok\n", done.stderr


def test_a_stacks_gradients_are_right_on_either_way():
    script = """
import torch, fastlane_ext as fl
from fastlane_ext._load import library
torch.manual_seed(0)
x = torch.randn(40, 32, dtype=torch.float64, requires_grad=True)
weights = [(torch.randn(32, 32, dtype=torch.float64) / 6).requires_grad_() for _ in range(3)]
expected = torch.autograd.grad(fl.reference.residual_stack(x, weights).square().sum(), [x, *weights])
for fused in (True, False):
    library.set_profile([("stack", "float64", 40, 32, 32, fused)])
    assert library.fuses("stack", "float64", 40, 32, 32) is fused
    got = torch.autograd.grad(fl.residual_stack(x, weights).square().sum(), [x, *weights])
    torch.testing.assert_close(got, expected)
print("ok")
"""
    done = run(script, FASTLANE_PROFILE="off")
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize("work", tuning.WORKS)
def test_fuses_refuses_what_is_unknown(work):
    with pytest.raises(ValueError, match="dtype: got 'tea', expected float32"):
        library.fuses(work, "tea", 1, 1, 1)
    with pytest.raises(ValueError, match="work: got 'tea', expected layer_forward"):
        library.fuses("tea", "float32", 1, 1, 1)
    with pytest.raises(ValueError, match="work: got 'tea', expected layer_forward"):
        library.set_profile([("tea", "float32", 1, 1, 1, True)])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (profile_of(date="x\n"), "its date is no date"),
        (profile_of(date="x" * 41), "its date is no date"),
        (profile_of(format=True), "the profile's format is True"),
        (profile_of({**POINT, "rows": 0, "fused_wins": True}), "a point has a size that no call has"),
        (profile_of(cpu="x" * 50_000), "the profile's cpu is 'xxxx"),
    ],
)
def test_a_strange_value_is_named_in_few_words(content, reason, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content))
    with pytest.raises(_profile.ProfileError, match=reason) as caught:
        _profile.use(_profile.read(path))
    assert len(str(caught.value)) < 400


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(_profile.ProfileError, match="this is no file"):
            _profile.read(path)


def test_siblings_of_one_name_are_two_cpus(tmp_path):
    name = "Intel(R) Xeon(R) CPU @ 2.20GHz"
    identities = set()
    for model in (79, 85):
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(
            f"processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t: {model}\nmodel name\t: {name}\n\n"
        )
        identities.add(cpu_identity(cpuinfo))
    assert identities == {f"{name}, vendor_id GenuineIntel, cpu family 6, model {model}" for model in (79, 85)}


def test_tune_writes_the_file_that_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLANE_PROFILE", str(tmp_path / "mine.json"))
    assert tune._path(None) == tmp_path / "mine.json"
    assert "later processes read it" in tune._who_reads(str(tmp_path / "mine.json"))
    assert "makes processes read it" in tune._who_reads(str(tmp_path / "other.json"))
    monkeypatch.setenv("FASTLANE_PROFILE", "off")
    assert "no process reads it" in tune._who_reads(str(tune._path("x.json")))


def test_dtypes_share_the_time(raced, monkeypatch):
    times, _ = raced
    times["layer_forward"] = {1: (1e-9, 2e-9)}
    clock = iter(range(0, 1000, 20))  # each look at the clock costs twenty seconds
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: next(clock))
    dtypes = ["float32"] * 6 + ["float64"] * 2
    points = [tuning.Point("layer_forward", dtype, 1 + i, 64, 64) for i, dtype in enumerate(dtypes)]
    measured = [isinstance(each, tuning.Measured) for each in tuning.measure(points, [1], budget=140)]
    # float32 has five sevenths of the time, until second 100, and float64 has the rest.
    assert measured == [True] * 4 + [False] * 2 + [True, False]
    assert tuning.SHARES.keys() == tuning.DTYPES.keys()


@pytest.mark.parametrize(
    ("fused", "library_", "clear"),
    [
        ((1, 1), (2, 2), True),
        ((1, 1), (2, 0.9), False),
        ((2, 1), (1, 1.1), False),
        ((2, 2), (1, 1), True),
        ((1, 1), (1.02, 1.02), False),
    ],
)
def test_one_number_of_threads_can_keep_the_rule(fused, library_, clear):
    point = tuning.Point("layer_forward", "float32", 8, 64, 64)
    measured = tuning.Measured(point, dict(enumerate(fused, 1)), dict(enumerate(library_, 1)), True, True)
    assert measured.is_clear is clear
