"""The fused rotary embedding in transformers' attention: where it is used, what it leaves alone, and how it goes."""

import importlib
import inspect

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny_models import DECODERS, tiny, tokens

import peft_kernels
from peft_kernels.integrations.transformers import rotary as integration

NOT_ROTATING = ["gpt2", "opt", "bert"]
ROTATING = [name for name in DECODERS if name not in NOT_ROTATING]


def stock_module(name="llama"):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


@pytest.fixture
def calls(monkeypatch):
    """What the fused function is called with."""
    calls, fused = [], integration.rotary
    monkeypatch.setattr(integration, "rotary", lambda *tensors: calls.append(tensors) or fused(*tensors))
    return calls


@pytest.fixture
def logits_of():
    """Of a model and always the same tokens, some of them padding."""
    ids, padding = tokens()

    def logits_of(model, **options):
        with torch.no_grad():
            return model(ids, padding, **options).logits[padding.bool()]

    return logits_of


@pytest.mark.parametrize("name", ROTATING)
def test_every_layer_uses_it(name, calls, logits_of):
    model = tiny(name).eval()
    wanted = logits_of(model)
    peft_kernels.optimize(model)
    assert not calls
    assert torch.allclose(logits_of(model), wanted, atol=1e-5)
    assert len(calls) == 2
    peft_kernels.restore(model)
    assert torch.equal(logits_of(model), wanted)
    assert len(calls) == 2


def test_positions_of_each_row(calls, logits_of):
    model = tiny("llama").eval()
    positions = torch.stack([torch.arange(9), torch.arange(3, 12), torch.randperm(9)])
    wanted = logits_of(model, position_ids=positions)
    peft_kernels.optimize(model)
    assert torch.allclose(logits_of(model, position_ids=positions), wanted, atol=1e-5)
    assert [call[2].shape for call in calls] == [(3, 9, 8)] * 2


@pytest.mark.parametrize("name", NOT_ROTATING)
def test_models_without_one_keep_their_forward(name):
    def forwards():
        return {type(module).forward for module in model.modules() if "Attention" in type(module).__name__}

    model = tiny(name)
    before = forwards()
    peft_kernels.optimize(model)
    assert forwards() == before


def test_decorators_are_kept(calls):
    model = tiny("llama").eval()
    layer = model.model.layers[0].self_attn
    stock = type(layer).forward
    peft_kernels.optimize(model)
    fused = type(layer).forward
    assert fused is not stock and inspect.signature(fused) == inspect.signature(stock)
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__"):
        assert getattr(fused, name) == getattr(stock, name)
    hidden = torch.randn(1, 4, 32)
    angles = model.model.rotary_emb(hidden, torch.arange(4)[None])
    # The stock forward's decorator warns, and hands the argument on under its new name.
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated .* for `LlamaAttention.forward`"):
        got, _ = layer(hidden, angles, past_key_values=None)
    assert torch.equal(got, layer(hidden, angles)[0]) and len(calls) == 2


def test_copies_through_decorators():
    def twice(function):
        def wrapper(*arguments):
            return function(*arguments) * 2

        wrapper.__wrapped__ = function
        return wrapper

    def keeps_it_elsewhere(function):
        functions = [function]
        wrapper = twice(lambda *arguments: functions[0](*arguments))
        wrapper.__wrapped__ = function
        return wrapper

    source = "def forward(q, scale=3, *, shift=1): return apply_rotary_pos_emb(q, q, q[0], q[0])[0] * scale + shift"
    namespace = dict(vars(stock_module()))
    exec(source, namespace)
    plain, q = namespace["forward"], torch.randn(1, 1, 2, 4)
    for decorated in (plain, twice(plain), twice(twice(plain))):
        copied = integration.with_fused_rotary(decorated)
        assert copied is not decorated and torch.allclose(copied(q), decorated(q))
    # What can't be reached, or rotates nothing, is not copied.
    for other in (keeps_it_elsewhere(plain), twice(print), test_copies_through_decorators, print):
        assert integration.with_fused_rotary(other) is None


def test_what_replaces_the_stock_function_later_is_called(calls, logits_of, monkeypatch):
    stock = stock_module().apply_rotary_pos_emb
    model = tiny("llama").eval()
    peft_kernels.optimize(model)
    assert stock_module().apply_rotary_pos_emb is stock
    rotated = logits_of(model)
    monkeypatch.setattr(stock_module(), "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    assert not torch.allclose(logits_of(model), rotated, atol=1e-3)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: ((q, k, cos.requires_grad_(), sin), {}),
        lambda q, k, cos, sin: ((q.double(), k.double(), cos, sin), {}),
        lambda q, k, cos, sin: ((q, k.bfloat16(), cos, sin), {}),
        lambda q, k, cos, sin: ((q, k, cos.double(), sin.double()), {}),
        lambda q, k, cos, sin: ((q, k, cos, sin[:1]), {}),
        lambda q, k, cos, sin: ((q, k, cos, sin.bfloat16()), {}),
        lambda q, k, cos, sin: ((q, k, cos, sin, 1), {}),
        lambda q, k, cos, sin: ((q.transpose(1, 2), k.transpose(1, 2), cos, sin), {"unsqueeze_dim": 2}),
    ],
    ids=[
        "angles-with-gradients",
        "fp64",
        "mixed",
        "fp64-angles",
        "one-sin",
        "mixed-angles",
        "further-argument",
        "unsqueeze-dim",
    ],
)
def test_unusual_calls_take_the_stock_function(change, calls):
    tensors = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    arguments, options = change(*tensors)
    wanted = stock_module().apply_rotary_pos_emb(*arguments, **options)
    got = integration._fused(stock_module())(*arguments, **options)
    assert not calls and all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def test_hooks_of_the_accelerate_library(calls, logits_of):
    model = tiny("llama").eval()
    layer = model.model.layers[0].self_attn
    peft_kernels.optimize(model)
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    logits_of(model)
    assert len(calls) == 2
    peft_kernels.restore(model)
    assert layer._old_forward.__func__ is type(layer).forward
    logits_of(model)
    assert len(calls) == 2


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_compiles_once(grad):
    """A copied function's globals are no module's, which the guards of torch.compile must not expect."""
    model = tiny("llama").eval()
    peft_kernels.optimize(model)
    ids, _ = tokens()
    torch.compiler.reset()
    with torch.set_grad_enabled(grad), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-6)
