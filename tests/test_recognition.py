"""Layers whose functions were patched, before `optimize` or after it, and classes that only look like stock ones."""

import contextlib
import copy
import dis
import importlib.util
import inspect
import itertools
import pkgutil
import re
import sys
import types

import pytest
import torch
import transformers
from tiny_models import tiny, tokens
from torch import nn
from transformers import activations
from transformers.loss import loss_utils
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama

import peft_kernels
from peft_kernels.inference.decoder_layer import FusedDecoderLayer
from peft_kernels.integrations import recognition
from peft_kernels.integrations.peft import ia3 as peft_ia3
from peft_kernels.integrations.refusal import Refusal
from peft_kernels.integrations.registry import _refused, _table, fused_form
from peft_kernels.integrations.transformers import lookalike
from peft_kernels.integrations.transformers.attention import FusedAttention, FusedLlamaAttention
from peft_kernels.integrations.transformers.causal_lm_loss import FusedLoss
from peft_kernels.integrations.transformers.layers import FusedGatedMLP, FusedRMSNorm

_counter = itertools.count()


class OtherTorch(types.ModuleType):
    """torch, but for one function that norms call."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def rsqrt(x):
        return 2 * torch.rsqrt(x)


# What is put in the place of globals of modeling_llama, and which layers are not fused then.
PATCHES = {
    "apply_rotary_pos_emb": (lambda q, k, cos, sin: (2 * q, k), {"LlamaAttention"}),
    "rotate_half": (lambda x: x, {"LlamaAttention"}),
    "eager_attention_forward": (lambda *arguments, **options: None, {"LlamaAttention"}),
    "repeat_kv": (lambda states, times: states, {"LlamaAttention"}),
    "torch": (OtherTorch("torch"), {"LlamaAttention", "LlamaRMSNorm"}),
}


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Makes modules of modeling_llama's code, as remote code is, that nobody has seen before."""

    def copied(change=lambda source: source):
        name = f"copied_{next(_counter)}"
        source = inspect.getsource(modeling_llama).replace("from ...", "from transformers.")
        source = source.replace("from .configuration", "from transformers.models.llama.configuration")
        (tmp_path / f"{name}.py").write_text(change(source))
        full_name = f"{name}.modeling_{name}"
        spec = importlib.util.spec_from_file_location(full_name, tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full_name, module)
        spec.loader.exec_module(module)
        return module

    return copied


def make(module):
    return module.LlamaForCausalLM(tiny("llama").config).eval()


def logits(model, grad):
    torch.manual_seed(3)
    ids, padding = tokens(3, 5)
    with torch.set_grad_enabled(grad):
        return model(ids, padding).logits[padding.bool()].detach()


def check(model, stock):
    """Modules one by one, and the fused decoder layers."""
    for grad in (True, False):
        assert torch.allclose(logits(model, grad), logits(stock, grad), atol=1e-5)


def left_alone(report):
    """The reasons, but for layers that no function of the model is in."""
    return {
        layer.kind.partition(".")[2]: layer.reason for layer in report.left_alone if not layer.kind.startswith("torch.")
    }


@pytest.mark.parametrize("name", PATCHES)
def test_patched_before(copied, monkeypatch, name):
    module = copied()
    model, stock = make(module), make(module)
    stock.load_state_dict(model.state_dict())
    usual = logits(stock, False)
    replacement, kinds = PATCHES[name]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, replacement)
        reasons = left_alone(peft_kernels.optimize(model))
        assert reasons.pop("LlamaDecoderLayer", "").endswith("is not fused") or "LlamaDecoderLayer" not in reasons
        assert reasons == dict.fromkeys(kinds, f"{name} of {module.__name__} was replaced")
        check(model, stock)
        assert name in ("eager_attention_forward", "repeat_kv") or not torch.allclose(logits(stock, False), usual)
    assert not left_alone(peft_kernels.optimize(model))
    check(model, stock)
    assert all(layer._plan for layer in model.model.layers)


@pytest.mark.parametrize("name", PATCHES)
def test_patched_after(monkeypatch, name):
    model = tiny("llama").eval()
    stock = copy.deepcopy(model)
    peft_kernels.optimize(model)
    check(model, stock)
    replacement, kinds = PATCHES[name]
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, name, replacement)
        check(model, stock)
        assert not any(layer._plan for layer in model.model.layers)
        reasons = left_alone(peft_kernels.optimize(model))
        assert reasons.pop("LlamaDecoderLayer").endswith(f"{name} of {modeling_llama.__name__} was replaced")
        assert reasons == dict.fromkeys(kinds, f"{name} of {modeling_llama.__name__} was replaced")
        check(model, stock)
        other = tiny("llama").eval()  # whose classes have fused forms by now
        assert left_alone(peft_kernels.optimize(other)).keys() == {*kinds, "LlamaDecoderLayer"}
    check(model, stock)
    assert all(layer._plan for layer in model.model.layers)
    assert not left_alone(peft_kernels.optimize(other))


@pytest.mark.parametrize("change", ["in place", "another function of the file", "other globals"])
def test_functions_that_are_not_what_they_seem(copied, monkeypatch, change):
    module = copied()
    function = module.rotate_half
    if change == "in place":
        monkeypatch.setattr(function, "__code__", (lambda x: x).__code__)
    elif change == "another function of the file":
        monkeypatch.setattr(module, "rotate_half", module.repeat_kv)
    else:
        monkeypatch.setattr(module, "rotate_half", types.FunctionType(function.__code__, {"torch": None}))
    reasons = left_alone(peft_kernels.optimize(make(module)))
    assert reasons["LlamaAttention"] == f"rotate_half of {module.__name__} was replaced"


@pytest.mark.parametrize("method", ["LlamaRMSNorm.forward", "LlamaAttention.forward", "LlamaMLP.forward"])
def test_methods_that_were_patched_before(copied, monkeypatch, method):
    module = copied()
    model = make(module)
    class_name, _, name = method.partition(".")
    owner = getattr(module, class_name)
    stock, calls = getattr(owner, name), []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **kwargs: calls.append(1) or stock(*args, **kwargs))
        assert left_alone(peft_kernels.optimize(model))[class_name] == "its class's forward was replaced"
        logits(model, False)
        assert calls
    assert not left_alone(peft_kernels.optimize(model))


def test_further_methods_that_were_patched(monkeypatch):
    norm = modeling_gemma.GemmaRMSNorm(8)
    peft_kernels.optimize(norm)
    monkeypatch.setattr(modeling_gemma.GemmaRMSNorm, "_norm", lambda self, x: x)
    (row,) = peft_kernels.optimize(norm)
    assert row.reason == "its class's _norm was replaced"


def test_other_models_are_not_patched(copied, monkeypatch):
    """Even if it is the model that they are compared with."""
    for name, (replacement, _) in PATCHES.items():
        monkeypatch.setattr(modeling_llama, name, replacement)
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", nn.Identity)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x)
    model = make(copied())
    stock = copy.deepcopy(model)
    assert not left_alone(peft_kernels.optimize(model))
    check(model, stock)


# Functions of a module whose classes have Llama's very code.
OTHERS = {
    "apply_rotary_pos_emb": ("(rotate_half(q) * sin)", "(rotate_half(q) * cos)"),
    "rotate_half": ("torch.cat((-x2, x1), dim=-1)", "torch.cat((x2, x1), dim=-1)"),
    "a default": ("cos, sin, unsqueeze_dim=1)", "cos, sin, unsqueeze_dim=-3)"),
    "eager_attention_forward": ("query, key_states.transpose(2, 3)", "query, key_states.transpose(3, 2)"),
    "an import": (
        "ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep",
        "PreTrainedModel, slice_logits_to_keep, AttentionInterface; ALL_ATTENTION_FUNCTIONS = AttentionInterface()",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_code_that_calls_other_functions(copied, name):
    module = copied(lambda source: source.replace(*OTHERS[name]))
    same = copied()
    assert inspect.getsource(module) != inspect.getsource(same)
    model = make(module)
    stock = copy.deepcopy(model)
    reasons = left_alone(peft_kernels.optimize(model))
    assert reasons.keys() >= {"LlamaAttention"} and reasons["LlamaAttention"] == "this class has no fused form"
    assert fused_form(module.LlamaRMSNorm) and fused_form(module.LlamaMLP) and not fused_form(module.LlamaAttention)
    check(model, stock)
    peft_kernels.optimize(make(same))
    assert issubclass(fused_form(same.LlamaAttention), FusedLlamaAttention)


def test_code_whose_file_is_gone(copied):
    module = copied()
    module.__loader__ = None
    assert lookalike.form_of(module.LlamaRMSNorm) is None
    assert "LlamaRMSNorm" in left_alone(peft_kernels.optimize(make(module)))


def test_functions_that_the_hub_of_kernels_makes_modules_of(copied, monkeypatch):
    module = copied()
    function = module.rotate_half

    class Func(nn.Module):  # what its decorator returns
        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    Func.__module__ = "kernels.layer.layer"
    monkeypatch.setattr(module, "rotate_half", Func())
    model = make(module)
    stock = copy.deepcopy(model)
    assert not left_alone(peft_kernels.optimize(model))
    check(model, stock)
    module.rotate_half.forward = lambda x: x
    check(model, stock)
    assert left_alone(peft_kernels.optimize(model))["LlamaAttention"].startswith("rotate_half of")


def test_loggers_are_each_module_s_own(copied):
    def change(source):
        return re.sub(r"(        input_dtype = hidden_states.dtype\n)", r"\1        logger.debug('')\n", source)

    one, other, third = copied(change), copied(change), copied()
    assert recognition.mean_the_same(one, "logger", other, "logger")
    assert recognition.same_methods(one.LlamaRMSNorm, other, "LlamaRMSNorm", ("forward",))
    assert not recognition.same_methods(one.LlamaRMSNorm, third, "LlamaRMSNorm", ("forward",))


@pytest.mark.parametrize("module", [modeling_llama, modeling_gemma, activations, loss_utils, torch.nn.functional])
def test_what_bytecode_says(module):
    """Against dis, and what is imported under these names."""
    codes = [code for codes in recognition._codes_of(module).values() for code in codes]
    assert len(codes) > 5
    for code in codes:
        steps = [step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"]
        inner = [name for part in code.co_consts if inspect.iscode(part) for name in recognition.global_names(part)]
        assert set(recognition.global_names(code)) == {*steps, *inner}
    imports = recognition._imports_of(module)
    for name, sources in imports.items():
        if hasattr(module, name) and recognition._ASSIGNED not in sources:  # and not for type checkers alone
            assert any(recognition._imported(*source) is getattr(module, name) for source in sources), name
    assert imports["torch"] == [("torch", None)]


def test_compiles_without_breaks_and_again_when_patched(monkeypatch):
    model = tiny("llama").eval()
    peft_kernels.optimize(model)
    norm, x = model.model.norm, torch.randn(2, 32)
    torch.compiler.reset()
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    wanted = norm(x)
    assert torch.allclose(compiled(x), wanted)
    monkeypatch.setattr(modeling_llama, "torch", OtherTorch("torch"))
    assert not torch.allclose(norm(x), wanted) and torch.allclose(compiled(x), norm(x))


# ---- Losses and activations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fixed_cross_entropy", "ForCausalLMLoss", "the table"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_patched_losses(monkeypatch, name, when):
    model = tiny("llama").eval()
    stock = copy.deepcopy(model)
    ids, _ = tokens()

    def losses():
        return model(ids, labels=ids).loss, stock(ids, labels=ids).loss

    if when == "after":
        peft_kernels.optimize(model)
    else:
        monkeypatch.setattr(FusedLoss, "reliance", None)
    with monkeypatch.context() as patch:
        if name == "the table":
            patch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", lambda logits, labels, vocab_size: logits.sum())
        else:
            patch.setattr(loss_utils, name, lambda *arguments, **options: arguments[0].float().sum())
        report = peft_kernels.optimize(model)
        (row,) = [layer for layer in report if layer.name == ""]
        what = "ForCausalLM in LOSS_MAPPING" if name == "the table" else name
        assert not row.fused and row.reason == f"its loss: {what} of {loss_utils.__name__} was replaced"
        assert torch.allclose(*losses(), rtol=1e-5)
    (row,) = [layer for layer in peft_kernels.optimize(model) if layer.name == ""]
    assert row.fused and FusedLoss.is_set(model)
    assert torch.allclose(*losses(), rtol=1e-5)


@pytest.mark.parametrize("name", ["gelu_new", "silu"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_patched_activations(monkeypatch, name, when):
    model = tiny("llama", hidden_act=name).eval()
    stock = copy.deepcopy(model)
    if when == "after":
        peft_kernels.optimize(model)
        check(model, stock)
    cls = activations.ACT2CLS[name]
    cls = cls[0] if isinstance(cls, tuple) else cls
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", lambda self, x: x)
        if when == "before":
            peft_kernels.optimize(model)
        check(model, stock)
        reasons = left_alone(peft_kernels.optimize(model))
        assert reasons["LlamaMLP"] == f"its activation is a {cls.__name__}"
    assert not left_alone(peft_kernels.optimize(model))
    check(model, stock)


# ---- All of transformers -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_classes_of_transformers():
    """How many are known, of the version that they were counted in; others have more or less."""
    for package in pkgutil.iter_modules(transformers.models.__path__):
        folder = importlib.import_module(f"transformers.models.{package.name}")
        for file in pkgutil.iter_modules(getattr(folder, "__path__", ())):
            if file.name.startswith("modeling_"):
                with contextlib.suppress(ImportError):  # it needs another package
                    importlib.import_module(f"{folder.__name__}.{file.name}")
    lookalike.register_loaded()
    kinds = {FusedRMSNorm: 177, FusedGatedMLP: 160, FusedAttention: 150, FusedDecoderLayer: 73}
    found = {kind: [cls for cls in _table.values() if issubclass(cls, kind) and in_transformers(cls)] for kind in kinds}
    if transformers.__version__.startswith("5.24."):
        assert {kind: len(classes) for kind, classes in found.items()} == kinds
    assert not [stock for stock in _refused if stock.__module__.startswith("transformers.")]
    # Vectors of (IA)³ can be merged into all that have Llama's layers.
    for fused in found[FusedGatedMLP]:
        if fused.up_names != FusedGatedMLP.up_names:
            continue
        for cls in (fused, fused.stock):
            block = module_of(cls)
            assert peft_ia3._producer(block, "down_proj", torch.ones(1)) is block.up_proj
            assert isinstance(peft_ia3._producer(block, "up_proj", torch.ones(1)), Refusal)


def in_transformers(cls):
    return cls.stock.__module__.startswith("transformers.")


def module_of(cls):
    """A gated block, without the rest of its class's constructor."""
    block = cls.__new__(cls)
    nn.Module.__init__(block)
    block.gate_proj, block.up_proj, block.down_proj = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(4, 2)
    return block


@pytest.mark.parametrize("name", ["gemma", "olmo2"])
def test_input_vectors_of_gated_blocks_beyond_the_four(name):
    """Whose classes merge_ia3 did not know by name."""
    cls = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), f"{name.capitalize()}MLP")
    block = module_of(cls)
    assert peft_ia3._producer(block, "down_proj", torch.ones(1)) is block.up_proj

    class Other(cls):
        def forward(self, x):
            return self.down_proj(self.up_proj(self.gate_proj(x)))

    assert "no layer is known" in peft_ia3._producer(module_of(Other), "down_proj", torch.ones(1)).reason
