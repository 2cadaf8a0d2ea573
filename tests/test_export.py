"""torch.export and AOTInductor: saved here, run where the operators' library is loaded and none of our Python."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from compile_cases import EVERY_OP, SUBJECTS, fused_model, make, rows_of
from subprocesses import run_python

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
    """Ours, whole, and none of what they are made of; decompositions change nothing about it."""
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
    """Many in one, since each package costs a C++ compilation."""

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


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DEPLOYMENT.read_text(encoding="utf-8"), re.DOTALL)


def run_in(folder, *command):
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.thorough
def test_deployment_examples(tmp_path, monkeypatch):
    """docs/deployment.md as it stands: exported, run from Python without our Python, and from C++."""
    exporting, running = blocks("python")
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
