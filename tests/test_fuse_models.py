"""`fuse` on real architectures with random weights: transformers, timm, a nanoGPT block. Nothing is downloaded."""

import copy
import io
import pickle

import pytest
import torch
from support.nanogpt import VOCABULARY, NanoGpt

import fastlane_ext as fl
from fastlane_ext.fusion.linears import is_linear

pytestmark = pytest.mark.any_isa

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160}


def _transformer(config_name, model_name, **options):
    def make(dropout=0.0):
        transformers = pytest.importorskip("transformers")
        config_class = getattr(transformers, config_name)
        settings = SIZES | options
        names = set(config_class().to_dict())
        settings |= {
            name: dropout
            for name in ("hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "hidden_dropout", "resid_dropout")
            if name in names
        }
        settings |= {
            name: 0.0 for name in ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout") if name in names
        }
        return getattr(transformers, model_name)(config_class(**settings))

    return make


def _timm(name, **options):
    def make(dropout=0.0):
        timm = pytest.importorskip("timm")
        return timm.create_model(name, pretrained=False, num_classes=10, **options)

    return make


def tokens():
    return {"input_ids": torch.randint(0, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(3))}


def pixels(size=32, name="pixel_values"):
    return {name: torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))}


TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 32, "patch_size": 8}
# make, inputs, fused sites
MODELS = {
    "gpt2": (_transformer("GPT2Config", "GPT2LMHeadModel", **TEXT, n_embd=64, n_layer=2, n_head=4), tokens, 2),
    "bert": (_transformer("BertConfig", "BertModel", **TEXT), tokens, 6),
    "vit": (_transformer("ViTConfig", "ViTModel", **IMAGE), pixels, 2),
    "gpt_neox": (_transformer("GPTNeoXConfig", "GPTNeoXForCausalLM", **TEXT), tokens, 2),
    "phi": (_transformer("PhiConfig", "PhiForCausalLM", **TEXT), tokens, 2),
    "clip": (_transformer("CLIPVisionConfig", "CLIPVisionModel", **IMAGE, hidden_act="quick_gelu"), pixels, 2),
    "siglip": (_transformer("SiglipVisionConfig", "SiglipVisionModel", **IMAGE), pixels, 3),
    "nanogpt": (lambda dropout=0.0: NanoGpt(dropout=dropout), tokens, 2),
    "timm_vit_tiny": (_timm("vit_tiny_patch16_224", img_size=64, depth=2), lambda: pixels(64, "x"), 2),
    "timm_vit_small": (_timm("vit_small_patch16_224", img_size=64, depth=2), lambda: pixels(64, "x"), 2),
    "timm_mixer": (_timm("mixer_s32_224", img_size=64), lambda: pixels(64, "x"), 16),
}
each_model = pytest.mark.parametrize("name", MODELS)
TRANSFORMERS = [name for name in MODELS if name != "nanogpt" and not name.startswith("timm")]


def build(name, dropout=0.0):
    make, inputs, sites = MODELS[name]
    torch.manual_seed(7)
    model = make(dropout)
    # Initial weights of 0.02 leave every GELU where it is a line, a head of zeros every gradient zero.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3) if parameter.any() else parameter.normal_(std=0.06)
    return model, inputs(), sites


def fused_copy(model, sites=None, **options):
    fused = copy.deepcopy(model)
    report = fl.fuse(fused, **options)
    if sites is not None:
        report.assert_fused(sites)
    return fused


def output(model, inputs):
    result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result[0]


def loss_of(model, inputs):
    y = output(model, inputs)
    return (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).square().mean()


def results(model, inputs):
    """The output and every gradient, in float64, by name."""
    model.zero_grad()
    y = output(model, inputs)
    loss_of(model, inputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach().double() for name, t in {"output": y, **gradients}.items()}


def relative_error(values, expected):
    """The rms of all tensors' errors, each relative to the tensor's largest value. A gradient that is zero but for
    rounding, such as the gradient of attention's key bias, does not count.
    """
    largest = {name: exact.abs().max() for name, exact in expected.items()}
    threshold = 1e-6 * max(largest.values())
    return (
        torch.cat(
            [
                ((values[name] - exact) / largest[name]).flatten()
                for name, exact in expected.items()
                if largest[name] > threshold
            ]
        )
        .square()
        .mean()
        .sqrt()
        .item()
    )


def as_double(inputs):
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def calls():
    stats = fl.stats()
    return sum(stats[path]["forward"] for path in ("fused", "library")), sum(
        stats[path]["backward"] for path in ("fused", "library")
    )


@pytest.fixture
def every_linear(monkeypatch):
    from fastlane_ext import fusion

    monkeypatch.setattr(fusion, "_measured", lambda *_: {"library_ms": 2.0, "fused_ms": 1.0})


@pytest.mark.parametrize("linears", [False, True], ids=["mlps", "linears"])
@each_model
def test_as_exact_as_eager(name, linears, every_linear):
    model, inputs, sites = build(name)
    fused = fused_copy(model, None if linears else sites, linears=linears)
    expected = results(copy.deepcopy(model).double(), as_double(inputs))
    eager = results(model, inputs)
    before = calls()
    got = results(fused, inputs)
    after = calls()
    count = len(fl.explain(fused).fused)
    assert after[0] - before[0] == 2 * count
    # What follows the output, a pooler, has no gradient.
    assert count - 1 <= after[1] - before[1] <= count
    assert got.keys() == eager.keys() == expected.keys()

    assert relative_error(got, expected) <= 1.5 * relative_error(eager, expected) <= 1e-4


@each_model
def test_twenty_steps_of_training(name):
    """The model's own dropouts are active and draw the same random numbers, so that the losses are the same."""
    model, inputs, sites = build(name, dropout=0.1)
    fused = fused_copy(model, sites)
    curves = []
    for one in (model.train(), fused.train()):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.002)
        torch.manual_seed(11)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = loss_of(one, inputs)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    fl.reset_stats()
    assert curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_greedy_generation_is_the_same():
    model, inputs, sites = build("gpt2")
    fused = fused_copy(model.eval(), sites)
    before = calls()[0]
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(fused.generate(**inputs, **options), model.generate(**inputs, **options))
    assert calls()[0] == before + 24 * sites


@each_model
def test_state_dicts_load_both_ways(name):
    model, inputs, sites = build(name)
    fused = fused_copy(model.eval(), sites)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
        other.load_state_dict(model.state_dict())
        model.load_state_dict(fused.state_dict())
        assert torch.equal(output(other, inputs), output(fused, inputs))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_save_pretrained(name, tmp_path):
    model, inputs, sites = build(name)
    fused = fused_copy(model.eval(), sites)
    fused.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(output(loaded, inputs), output(model, inputs))
    fl.fuse(loaded).assert_fused(sites)


@each_model
def test_copies_and_the_way_back(name):
    model, inputs, sites = build(name)
    fused = fused_copy(model.eval(), sites)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    copies = [
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
    ]
    with torch.no_grad():
        expected = output(fused, inputs)
        for one in copies:
            before = calls()[0]
            assert torch.equal(output(one, inputs), expected)
            assert calls()[0] == before + sites
        assert fl.unfuse(fused) == sites
        assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(output(fused, inputs), output(model, inputs))


def lora(model, target):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def first_linears(model):
    """The names of the first linear layer inside a fused site and of the first outside all fused sites."""
    (site, *_) = [site for site in fl.explain(model).fused if "gelu" in site.pattern.lower()]
    children = model.get_submodule(site.name).named_children()
    inside = next(f"{site.name}.{name}" for name, child in children if is_linear(child))
    sites = {site.name for site in fl.explain(model)}
    outside = next(
        name for name, module in model.named_modules() if is_linear(module) and name.rpartition(".")[0] not in sites
    )
    return inside, outside


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@each_model
def test_lora_before_and_after(name):
    model, inputs, sites = build(name)
    model.eval()
    inside, outside = first_linears(model)
    with torch.no_grad():
        adapted = lora(copy.deepcopy(model), inside)
        expected = output(adapted, inputs)
        after = lora(fused_copy(model, sites), inside)
        torch.testing.assert_close(output(after, inputs), expected, rtol=1e-4, atol=1e-4)
        (reason,) = fl.stats()["fallback"]
        assert "is a peft.tuners.lora.layer.Linear, not a plain" in reason
        fl.reset_stats()

        report = fl.fuse(adapted)
        assert len(report.fused) == sites - 1 and len(report.refused) == 1
        assert "is a peft.tuners.lora.layer.Linear, not a plain Linear" in report.refused[0].reason
        torch.testing.assert_close(output(adapted, inputs), expected, rtol=1e-4, atol=1e-4)

        adapted = lora(copy.deepcopy(model), outside)
        expected = output(adapted, inputs)
        fl.fuse(adapted).assert_fused(sites)
        torch.testing.assert_close(output(adapted, inputs), expected, rtol=1e-4, atol=1e-4)


def test_other_activations_and_gated_mlps_of_transformers():
    make = _transformer("BertConfig", "BertModel", **TEXT, hidden_act="gelu_10")
    report = fl.explain(make())
    assert [site.pattern for site in report.fused] == ["Linear+residual"] * 4
    reason = "intermediate_act_fn is a ClippedGELUActivation, which is not known to compute a GELU"
    assert [site.reason.partition(" (")[0] for site in report.refused] == [reason] * 2
    make = _transformer("GemmaConfig", "GemmaModel", **TEXT, head_dim=16, num_key_value_heads=4)
    report = fl.explain(make())
    assert len(report) == 2
    assert {site.reason for site in report} == {"its forward also computes mul"}


@pytest.mark.parametrize(
    ("act", "form"),
    [
        ("gelu", "GELU"),
        ("gelu_python", "GELU"),
        ("gelu_new", "GELU(tanh)"),
        ("gelu_fast", "GELU(tanh)"),
        ("gelu_accurate", "GELU(tanh)"),
        ("gelu_pytorch_tanh", "GELU(tanh)"),
        ("gelu_python_tanh", "GELU(tanh)"),
        ("quick_gelu", "quick_gelu"),
    ],
)
def test_every_name_of_an_activation(act, form):
    if act not in pytest.importorskip("transformers").activations.ACT2FN:
        pytest.skip(f"this transformers has no {act}")
    make = _transformer("PhiConfig", "PhiModel", **TEXT, hidden_act=act)
    assert [site.pattern for site in fl.explain(make())] == [f"Linear→{form}→Linear"] * 2


def check_compiled(name, **options):
    model, inputs, sites = build(name)
    fused = fused_copy(model, sites)
    compiled = torch.compile(fused, **options)
    got = {name.removeprefix("_orig_mod."): t for name, t in results(compiled, inputs).items()}
    assert relative_error(got, results(model, inputs)) <= 1e-5


@pytest.mark.slow
@each_model
def test_compile_of_a_fused_model(name):
    check_compiled(name, backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "vit", "nanogpt", "timm_vit_tiny"])
def test_compile_of_a_fused_model_with_inductor(name):
    check_compiled(name)
