"""torch.export and AOTInductor: saved here, run where the operators' library is loaded and none of our Python."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from support.compile_cases import EVERY_OP, SUBJECTS, fused_model, make, rows_of
from support.subprocesses import HANG_S, run_python

import fastlane_ext as fl

pytestmark = pytest.mark.any_isa
LIBRARY = fl._load.library.__file__
DEPLOYMENT = Path(__file__).resolve().parent.parent / "docs" / "deployment.md"
BATCH_SIZES = (5, 0, 1, 2, 64)

# Loads every model of a folder, each with its inputs and outputs beside it, and returns the names of those that differ.
RUN_FOLDER = """
import json, pathlib, sys, torch
torch.ops.load_library({library!r})
differing, names = [], []
for path in sorted(pathlib.Path({folder!r}).glob("*.pt2")):
    names.append(path.stem)
    model = {load}
    for x, expected in torch.load(path.with_suffix(".pt")):
        y = model(x)
        for a, b in zip(y if isinstance(y, list) else [y], expected, strict=True):
            if not torch.equal(a, b):
                differing.append([path.stem, len(x), float((a - b).abs().max())])
assert not any(name.split(".")[0] == "fastlane_ext" for name in sys.modules)
print(json.dumps([names, differing]))
"""


def run_folder(folder, load):
    return run_python(RUN_FOLDER.format(library=LIBRARY, folder=str(folder), load=load))


def export(module, strict=False):
    with torch.no_grad():
        rows = torch.export.Dim("rows", min=0, max=4096)
        return torch.export.export(module, (rows_of(5),), dynamic_shapes=({0: rows},), strict=strict)


def save_expected(module, path):
    inputs = [rows_of(rows) for rows in BATCH_SIZES]
    with torch.no_grad():
        outputs = [module(x) for x in inputs]
    torch.save([(x, y if isinstance(y, list) else [y]) for x, y in zip(inputs, outputs, strict=True)], path)


def operators_in(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def check_operators(program):
    """The graph has our operators, whole, and not the operators that they are made of, also after decompositions."""
    ours = [name for name in operators_in(program) if "fastlane" in name]
    decomposed = operators_in(program.run_decompositions())
    assert ours and not any("gelu" in name for name in set(decomposed) - set(ours))
    assert [name for name in decomposed if "fastlane" in name] == ours
    return ours


@pytest.mark.parametrize(
    ("names", "strict"),
    [
        pytest.param(EVERY_OP, False, marks=pytest.mark.slow, id="default"),
        pytest.param(SUBJECTS, False, marks=pytest.mark.thorough, id="default, all"),
        pytest.param(SUBJECTS, True, marks=pytest.mark.thorough, id="strict, all"),
    ],
)
def test_export(names, strict, tmp_path):
    for index, name in enumerate(names):
        module = make(name).eval()
        program = export(module, strict)
        ours = check_operators(program)
        assert len(ours) == (2 if name in ("fuse(model)", "LinearGELUResidual, projection") else 1), name
        torch.export.save(program, tmp_path / f"{index}.pt2")
        save_expected(module, tmp_path / f"{index}.pt")
    loaded, differing = run_folder(tmp_path, "torch.export.load(path).module()")
    assert len(loaded) == len(names) and differing == []


def test_the_default_export_of_a_fused_model_keeps_the_operators():
    assert check_operators(export(fused_model())) == ["fastlane.mlp_residual.default"] * 2


class Together(torch.nn.Module):
    """Many models in one, since each package costs a C++ compilation."""

    def __init__(self, names):
        super().__init__()
        self.parts = torch.nn.ModuleList(make(name) for name in names)

    def forward(self, x):
        return [part(x) for part in self.parts]


# What inductor computes there itself is not bit for bit what eager computes.
INDUCTOR_COMPUTES = ("linear_gelu_residual, computed residual", "fuse(model)")


@pytest.mark.thorough
def test_aot_inductor(tmp_path):
    names = [name for name in SUBJECTS if name not in INDUCTOR_COMPUTES]
    module = Together(names).eval()
    program = export(module)
    assert len(check_operators(program)) == len(names) + 1
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "together.pt2"))
    save_expected(module, tmp_path / "together.pt")
    assert run_folder(tmp_path, "torch._inductor.aoti_load_package(str(path))") == [["together"], []]


class Refused(torch.nn.Module):
    """A fused function called by a module that is not ours."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        y = fl.linear_gelu_residual(x, self.weight, None, x)
        y = fl.mlp_residual(y, self.weight, None, self.weight, None, y, activation="gelu_tanh")
        y = fl.linear_gelu_concat(fl.residual_stack(y, [self.weight] * 2), self.weight, activation="none")
        return fl.residual_stack(y, [y.new_ones(3, 16)], shortcut="projection", projections=[y.new_ones(3, 16)])


@pytest.mark.parametrize("strict", [False, True])
def test_disabled_records_eager_operators(strict):
    x = torch.randn(5, 8, dtype=torch.double)
    for model in (Refused(), fl.LinearGELUResidual(8, 8), fl.ResidualMLP(8, 8), fl.ResidualNetwork([8, 8, 3])):
        model.double()
        assert any("fastlane" in name for name in operators_in(torch.export.export(model, (x,), strict=strict)))
        with fl.disabled():
            program = torch.export.export(model, (x,), strict=strict)
        assert not any("fastlane" in name for name in operators_in(program))
        torch.testing.assert_close(program.module()(x), model(x))
    fl.reset_stats()


# From the issue: the checker of draft_export takes an absent optional tensor for one that was changed.
@pytest.mark.slow
@pytest.mark.parametrize(
    "make_model",
    [
        lambda: fl.LinearGELUResidual(8, 8, shortcut="none"),
        lambda: fl.LinearGELUResidual(8, 8, shortcut="concat"),
        lambda: fl.ResidualMLP(8, 8),
        lambda: fused(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8)),
        lambda: fused(torch.nn.Linear(8, 8, bias=False), torch.nn.GELU()),
        lambda: fl.ResidualNetwork([8, 8, 3], bias=False),
    ],
)
def test_draft_export(make_model):
    program = torch.export.draft_export(make_model(), (torch.randn(5, 8),))
    assert program._report.successful(), program._report


def fused(*children):
    model = torch.nn.Sequential(*children)
    fl.fuse(model)
    return model


onnx_only = pytest.mark.skipif(
    importlib.util.find_spec("onnxscript") is None or importlib.util.find_spec("onnx") is None,
    reason="needs onnx and onnxscript, which are not installed",
)


@pytest.mark.parametrize("grad", [False, True])
def test_recorded_for_onnx(grad, monkeypatch):
    """`torch.onnx.export` gets ATen's operators; the next export gets ours again."""
    x = torch.randn(5, 8, dtype=torch.double)
    models = (Refused(), fl.LinearGELUResidual(8, 8), fl.ResidualMLP(8, 3), fl.ResidualNetwork([8, 8, 3]))
    for model in (*models, fused(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))):
        with torch.set_grad_enabled(grad):
            model.double().requires_grad_(grad)
            with monkeypatch.context() as context:
                context.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
                program = torch.export.export(model, (x,))
            assert not any("fastlane" in name for name in operators_in(program))
            torch.testing.assert_close(program.module()(x), model(x))
            assert any("fastlane" in name for name in operators_in(torch.export.export(model, (x,))))


def test_operators_stay_whole():
    """Where CI is set, as on hosting sites, Inductor refuses an operator that has a decomposition in torch."""
    names = [name.removeprefix("fastlane::") for name in torch._C._dispatch_get_all_op_names() if "fastlane" in name]
    assert len(names) > 5
    assert not torch._decomp.get_decompositions([getattr(torch.ops.fastlane, name) for name in names])


@pytest.mark.slow
@onnx_only
def test_onnx():
    from onnx.reference import ReferenceEvaluator

    x = torch.randn(5, 8)
    models = (
        fl.LinearGELUResidual(8, 8),
        fl.LinearGELUResidual(8, 4, shortcut="concat"),
        fl.ResidualMLP(8, 3),
        fl.ResidualNetwork([8, 8, 3], shortcut="projection"),
        fused(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8)),
    )
    for model in models:
        program = torch.onnx.export(model.eval(), (x,), dynamo=True, verbose=False)
        proto = program.model_proto
        (got,) = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@onnx_only
def test_onnx_example(tmp_path):
    *_, onnx, disabled, _ = blocks("python")
    run_in(tmp_path, sys.executable, "-c", onnx + disabled)
    assert (tmp_path / "model.onnx").is_file()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DEPLOYMENT.read_text(encoding="utf-8"), re.DOTALL)


def run_in(folder, *command):
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANG_S)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.thorough
def test_deployment_examples(tmp_path, monkeypatch):
    """The examples of docs/deployment.md: exported, run from Python without our Python, and from C++."""
    served, packed, exporting, *_, running = blocks("python")
    run_in(tmp_path, sys.executable, "-c", served + packed)
    (program,), (build_and_run,) = blocks("cpp"), blocks("sh")
    run_in(tmp_path, sys.executable, "-c", exporting)
    run_in(tmp_path, sys.executable, "-c", running)
    if shutil.which("g++") is None or not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        pytest.skip("the C++ example needs g++ and a shared libpython")
    (tmp_path / "run_model.cpp").write_text(program)
    # The page's `python` is the one that runs this.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    output = run_in(tmp_path, "bash", "-ec", build_and_run)
    got = torch.tensor([float(line) for line in output.split()])
    torch.testing.assert_close(got, torch.load(tmp_path / "expected.pt").flatten())
