"""A fused model travels as the original would: by any pickler, into another process, saved by transformers."""

import copy
import importlib.util
import inspect
import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.subprocesses import run_python
from test_fuse import FunctionalMlp, NamedMlp, fused_calls
from torch import fx, nn

import fastlane_ext as fl
from fastlane_ext import fused_classes
from fastlane_ext.fusion import classes

LOAD = "import pickle, sys; model = pickle.load(sys.stdin.buffer); print(type(model).__name__)"
IN_MAIN = """
import cloudpickle, subprocess, sys, torch, fastlane_ext as fl
from torch import nn
class Mlp(nn.Module):
    def __init__(self): super().__init__(); self.fc1, self.act, self.fc2 = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)
    def forward(self, x): return self.fc2(self.act(self.fc1(x)))
model = Mlp()
fl.fuse(model).assert_fused(1)
x = torch.ones(1, 8)
load = '''import pickle, sys, torch, fastlane_ext as fl
model = pickle.load(sys.stdin.buffer); y = model(torch.ones(1, 8))
print(type(model).__name__, type(model).__module__, fl.stats()["fused"]["forward"], y.double().sum().item())'''
result = subprocess.run([sys.executable, "-c", load], input=cloudpickle.dumps(model), capture_output=True)
assert not result.returncode, result.stderr.decode()
name, module, calls, total = result.stdout.decode().split()
assert (name, module, calls) == ("Mlp", "__main__", "1"), result.stdout
assert abs(float(total) - model(x).double().sum().item()) < 1e-6
print(1)
"""


def checked(function):
    """A decorator without functools.wraps: nobody finds its result under the result's own name."""

    def inner(self, x):
        return function(self, x)

    return inner


class Act(nn.Module):
    @checked
    def forward(self, x):
        return F.gelu(x)


class ByLambda(nn.Module):
    forward = lambda self, x: F.gelu(x)  # noqa: E731


def made():
    def forward(self, x):
        return F.gelu(x)

    return forward


class MadeInAFunction(nn.Module):
    forward = made()


@pytest.mark.parametrize("kind", [Act, ByLambda, MadeInAFunction], ids=lambda kind: kind.__name__)
def test_forwards_that_pickle_cannot_name(kind):
    model, x = nn.Sequential(nn.Linear(8, 8), kind()), torch.ones(2, 8)
    fl.fuse(model)
    loaded = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(loaded(x), model(x))
    assert type(loaded) is type(model)


@pytest.mark.skipif(importlib.util.find_spec("cloudpickle") is None, reason="cloudpickle is not installed")
def test_a_class_of_main_in_another_process():
    assert run_python(IN_MAIN) == 1


def _total(model, x, queue):
    with torch.no_grad():
        queue.put((type(model).__name__, model(x).double().sum().item(), fl.stats()["fused"]["forward"]))


@pytest.mark.slow
def test_a_spawned_worker():
    model, x = NamedMlp(), torch.ones(2, 12)
    fl.fuse(model)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    worker = context.Process(target=_total, args=(model, x, queue))
    worker.start()
    name, total, calls = queue.get()
    worker.join()
    assert (name, calls) == ("NamedMlp", 1)
    assert abs(total - model(x).double().sum().item()) < 1e-4


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(protocol):
    model, x = nn.Sequential(NamedMlp(), FunctionalMlp()), torch.randn(2, 12)
    fl.fuse(model)
    loaded = pickle.loads(pickle.dumps(model, protocol))
    assert [type(m) for m in loaded] == [type(m) for m in model]
    calls = fused_calls()
    assert torch.equal(loaded(x), model(x)) and fused_calls() == calls + 4


def test_code_that_changed_before_loading(monkeypatch):
    """The plan is read from the code that is there when the model is loaded."""
    model, x = NamedMlp(), torch.randn(2, 12)
    fl.fuse(model)
    data = pickle.dumps(model)
    monkeypatch.setattr(NamedMlp, "forward", lambda self, x: self.fc2(self.act(self.fc1(x))) + 1)
    loaded = pickle.loads(data)
    assert torch.equal(loaded(x), NamedMlp.forward(model, x))
    assert list(fl.stats()["fallback"]) == ["NamedMlp: its forward adds a int"]
    fl.reset_stats()
    (site,) = fl.explain(loaded)
    assert not site.fused and "adds a int" in site.reason
    assert fl.unfuse(loaded) == 1 and type(loaded) is NamedMlp
    monkeypatch.undo()
    assert fl.fuse(loaded).fused


class WithOwnState(NamedMlp):
    def __getstate__(self):
        return {**super().__getstate__(), "cached": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.cached = "again"


class WithArguments(NamedMlp):
    def __new__(cls, *arguments, **options):
        instance = super().__new__(cls)
        instance.__dict__["made_with"] = arguments
        return instance

    def __getnewargs__(self):
        return ("pickled",)


@pytest.mark.parametrize("kind", [WithOwnState, WithArguments], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=range(3))
def test_ways_of_its_own(kind, way):
    model, x = kind(), torch.randn(2, 12)
    plain = way(model)
    fl.fuse(model).assert_fused(1)
    other = way(model)
    assert isinstance(other, kind) and vars(other).keys() - {classes.PLAN} == vars(plain).keys()
    assert {n: v for n, v in vars(other).items() if n in ("cached", "made_with")} == {
        n: v for n, v in vars(plain).items() if n in ("cached", "made_with")
    }
    calls = fused_calls()
    assert torch.equal(other(x), model(x)) and fused_calls() == calls + 2


def test_fx_takes_a_fused_linear_for_a_leaf(monkeypatch):
    from fastlane_ext import fusion

    monkeypatch.setattr(fusion, "_measured", lambda *_: {"rows": 128, "library_ms": 2.0, "fused_ms": 1.0})
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    fl.fuse(model, linears=True).assert_fused(1)
    assert [n.op for n in fx.symbolic_trace(model).graph.nodes] == [
        "placeholder",
        "call_module",
        "call_module",
        "output",
    ]
    model[0].forward = model[0].forward  # what a hook keeps that was made on the fused module
    fl.unfuse(model)
    model(torch.ones(1, 8))
    assert fused_calls() == 0


def test_the_source_of_a_fused_class():
    model = NamedMlp()
    fl.fuse(model)
    assert inspect.getsource(type(model)) == inspect.getsource(NamedMlp)
    assert inspect.getfile(type(model)) == __file__.replace("test_fuse_travel", "test_fuse")


TINY = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

class Config(PretrainedConfig):
    model_type = "tiny"

class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.fc, self.act = nn.Linear(8, 8), nn.GELU()
        self.post_init()

    def forward(self, x):
        return self.act(self.fc(x))
"""
SAVE = """
import sys; sys.path.insert(0, {folder!r})
import tiny, torch, fastlane_ext as fl
from transformers import AutoModel
tiny.Config.register_for_auto_class(); tiny.Model.register_for_auto_class("AutoModel")
model = tiny.Model(tiny.Config())
fl.fuse(model).assert_fused(1)
model.save_pretrained({folder!r} + "/saved")
x = torch.ones(1, 8)
loaded = AutoModel.from_pretrained({folder!r} + "/saved", trust_remote_code=True)
assert type(loaded).__name__ == "Model" and torch.allclose(loaded(x), model(x))
print(1)
"""


@pytest.mark.slow
def test_save_pretrained_of_a_class_of_ones_own(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "tiny.py").write_text(TINY)
    code = SAVE.format(folder=str(tmp_path))
    assert run_python(code, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1") == 1
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tiny.py",
    ]
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "tiny.Config", "AutoModel": "tiny.Model"}


def test_without_the_package_nothing_loads_and_the_message_names_it():
    model = NamedMlp()
    fl.fuse(model)
    code = "import sys; sys.modules['fastlane_ext'] = None\n" + LOAD
    result = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(model), capture_output=True)
    assert result.returncode and b"fastlane_ext" in result.stderr


class ByHand(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def loaded(act=None):
    model = NamedMlp(12, 20, act)
    fl.fuse(model).assert_fused(1)
    return pickle.loads(pickle.dumps(model))


def test_loaded_and_compiled_before_the_first_call():
    model, x = loaded(ByHand()), torch.randn(2, 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), NamedMlp.forward(model, x))
    torch._dynamo.reset()


def test_loaded_and_first_called_in_a_transform():
    model, x = loaded(ByHand()), torch.randn(2, 12)
    torch.testing.assert_close(torch.func.vmap(model)(x), NamedMlp.forward(model, x))
    fl.reset_stats()
    fresh = NamedMlp(12, 20, ByHand())
    torch.func.grad(lambda x: (fl.fuse(fresh), x.sum())[1])(x)
    assert fl.explain(fresh).fused


def test_loaded_and_first_traced():
    model, x = nn.Sequential(loaded(), nn.Tanh()), torch.randn(2, 12)
    model[0].__dict__[classes.PLAN] = classes.Unread()
    fx.symbolic_trace(model)
    fl.reset_stats()
    model(x)
    assert fused_calls() == 1 and fl.explain(model).fused


def test_a_reducer_in_copyreg(monkeypatch):
    import copyreg

    class Registered(NamedMlp):
        pass

    monkeypatch.setitem(copyreg.dispatch_table, Registered, lambda m: (NamedMlp, ()))
    (site,) = fl.fuse(Registered())
    assert not site.fused and "copyreg" in site.reason
    monkeypatch.undo()
    model = Registered()
    fl.fuse(model).assert_fused(1)
    monkeypatch.setitem(copyreg.dispatch_table, Registered, lambda m: (NamedMlp, ()))
    assert type(copy.deepcopy(model)) is NamedMlp


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_jagged_tensors_in_a_graph():
    model = NamedMlp(8, 8)
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    expected = model(x)
    fl.fuse(model).assert_fused(1)
    for run in (model, torch.compile(model, backend="eager")):
        for got, wanted in zip(run(x).unbind(), expected.unbind(), strict=True):
            torch.testing.assert_close(got, wanted)
    torch._dynamo.reset()
    fl.reset_stats()


def test_the_name_under_which_earlier_versions_pickled_a_fused_class():
    assert getattr(fused_classes, "torch:nn:modules:container|Sequential") is classes.fused_class(nn.Sequential)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fused_classes.nonsense  # noqa: B018


@pytest.mark.parametrize("name", ["fused_with_a_plan", "fused_by_remake"])
def test_a_model_that_an_earlier_version_pickled(name):
    """The last version that pickled plans wrote the first file; the last version with classes in fused_classes.py and
    plans in _plan.py wrote the second.
    """
    data = (Path(__file__).parent / "support" / "pickles" / f"{name}.pkl").read_bytes()
    assert b"fastlane_ext.fused_classes" in data and b"fastlane_ext._plan" in data
    model, x = pickle.loads(data), torch.tensor([[1.0, -2.0]])
    torch.testing.assert_close(model(x), nn.Sequential.forward(model, x))
    assert fused_calls() == 1 and type(model) is classes.fused_class(nn.Sequential)
    again = pickle.dumps(model)
    assert b"fastlane_ext.fused_classes" not in again and b"fastlane_ext._plan" not in again
    assert fl.unfuse(model) == 1


def test_a_plan_that_an_earlier_version_pickled():
    model, x = NamedMlp(), torch.randn(2, 12)
    fl.fuse(model)
    plan = model.__dict__[classes.PLAN]
    old = object.__new__(type(plan))
    old.__setstate__({"inputs": plan.inputs, "steps": plan.steps})
    model.__dict__[classes.PLAN] = old
    model(x)
    assert fused_calls() == 1
