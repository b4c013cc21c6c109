"""PEFT's layers called with `adapter_names`, fused: an adapter for each sample of a batch, or none."""

import copy

import decoding_models
import ptx_emulator
import pytest
import tolerances
import torch
from comparison import DTYPES, error, short
from peft import LoraConfig
from peft_models import (
    IN_FEATURES,
    OUT_FEATURES,
    dense_weight,
    is_repacked,
    layer_of,
    lora_model,
    oracle,
    randomize,
    stock_path_reasons,
)
from reports import missed
from tiny_models import SAME_STEP

import peft_kernels
from peft_kernels.integrations import registry
from peft_kernels.testing.reference.lora_linear_grouped import lora_linear_grouped as grouped_oracle

KINDS = ("dense", "conv1d", "4bit")
FP32 = {"rtol": 1e-5, "atol": 1e-5}

MIXED = ["b", "__base__", "default", "b", "elsewhere", "default"]


def mixed_model(kind, dtype=torch.float32, **config):
    """A stock model in evaluation, whose layer lacks one of the adapters in MIXED, and its accelerated copy."""
    stock = lora_model(kind, dtype, **config).eval()
    stock.add_adapter("b", LoraConfig(r=7, target_modules=["lin"]))
    randomize(stock)
    layer_of(stock).base_layer.support_avx512bf16_for_cpu = False  # else stock would round its statistics to bf16
    fused = copy.deepcopy(stock)
    peft_kernels.optimize(fused)
    return stock, fused


def mixed_call(model, *args, **kwargs):
    """Of the layer itself: the model refuses adapters that no layer has."""
    return layer_of(model)(*args, adapter_names=MIXED, **kwargs)


def mixed_oracle(model, x):
    layer = layer_of(model)
    return torch.stack(
        [oracle(layer, row, (name,) if name in layer.lora_A else ()) for row, name in zip(x, MIXED, strict=True)]
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_names(kind, dtype, adapter_dtype, tokens, autocast, caplog):
    stock, fused = mixed_model(kind, dtype)
    for model in (stock, fused):
        for part in (layer_of(model).lora_A, layer_of(model).lora_B):
            part.to(adapter_dtype)
    x = torch.randn(len(MIXED), tokens, IN_FEATURES, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, theirs = mixed_call(fused, x), mixed_call(stock, x)
        assert not caplog.messages
    want = mixed_oracle(fused, x)
    assert y.dtype == theirs.dtype
    assert error(y, want) <= max(tolerances.VERSUS_STOCK * error(theirs, want), 2.0**-21)
    if kind == "4bit":
        assert not is_repacked(layer_of(fused).base_layer)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_names_go_through_the_model(kind, caplog):
    stock, fused = mixed_model(kind)
    x, adapter_names = torch.randn(3, IN_FEATURES), ["default", "__base__", "b"]
    with torch.no_grad():
        assert stock_path_reasons(fused, caplog, x, adapter_names=adapter_names) == []
        y = fused(x, adapter_names=adapter_names)
        torch.testing.assert_close(y, stock(x, adapter_names=adapter_names), **FP32)
        for ours, row, active in zip(y, x, (("default",), (), ("b",)), strict=True):
            torch.testing.assert_close(ours, oracle(layer_of(fused), row, active).float(), **FP32)
        fused(x, adapter_names=["__base__"] * 3)
        assert fused(x[:0], adapter_names=[]).shape == (0, OUT_FEATURES)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_names_of_strided_and_higher_x(kind):
    _, fused = mixed_model(kind)
    x = torch.randn(2, 5, len(MIXED), IN_FEATURES).permute(2, 0, 1, 3)
    with torch.no_grad():
        torch.testing.assert_close(mixed_call(fused, x), mixed_call(fused, x.contiguous()))
        flat = x.reshape(len(MIXED), 10, IN_FEATURES)
        torch.testing.assert_close(mixed_call(fused, x).flatten(1, 2), mixed_oracle(fused, flat).float(), **FP32)


def mixed_gradients(model, x, grad_y):
    """y, and the gradient of x and of each parameter of an adapter, by name."""
    x = x.clone().requires_grad_()
    y = mixed_call(model, x)
    y.backward(grad_y.to(y.dtype))
    adapters = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    return {"y": y.detach(), "x": x.grad, **adapters}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, dtype, tokens, autocast, caplog):
    stock, fused = mixed_model(kind, dtype)
    for model in (stock, fused):
        model.add_adapter("c", LoraConfig(r=3, target_modules=["lin"]))  # which no sample has
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    # PEFT adds to the result in place, which autograd refuses for that of bitsandbytes' own function.
    layer_of(stock).base_layer.register_forward_hook(lambda layer, inputs, y: y.clone())
    shape = len(MIXED), tokens
    x, grad_y = torch.randn(*shape, IN_FEATURES, dtype=dtype), torch.randn(*shape, OUT_FEATURES)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, theirs = (mixed_gradients(model, x, grad_y) for model in (fused, stock))
    assert not caplog.messages
    leaf = x.double().requires_grad_()
    trained = {name: p for name, p in fused.named_parameters() if "lora_" in name and ".c." not in name}
    wanted = torch.autograd.grad(mixed_oracle(fused, leaf), [leaf, *trained.values()], grad_y.double())
    assert actual.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (actual[name] is None) == (value is None) == (".c." in name), name
    for name, want in zip(["x", *trained], wanted, strict=True):
        assert actual[name].dtype == theirs[name].dtype
        limit = max(tolerances.VERSUS_STOCK * error(theirs[name], want), tolerances.FP32_SUM)
        assert error(actual[name], want) <= limit, name


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_a_layer_in_training_mode(kind, caplog):
    """PEFT refuses a model in training mode, and drops in a layer that is called by itself."""
    _, fused = mixed_model(kind, lora_dropout=0.5)
    layer = layer_of(fused).train()
    x = torch.randn(len(MIXED), 20, IN_FEATURES)
    torch.manual_seed(3)
    y = mixed_call(fused, x)
    assert not caplog.messages
    torch.manual_seed(3)
    names = ["b", "default"]  # in the order of the call; only the second drops
    adapters = [[part[name].weight for name in names] for part in (layer.lora_A, layer.lora_B)]
    index, seeds = [0, -1, 1, 0, -1, 1], torch.randint(torch.iinfo(torch.int64).max, (2,))
    base = layer.get_base_layer()
    wanted = grouped_oracle(x, dense_weight(base), base.bias, *adapters, [layer.scaling[name] for name in names], index,
                            [0.0, 0.5], seeds)  # fmt: skip
    assert error(y, wanted) <= tolerances.FP32_SUM


# What is done to a model, and to its call; the reason that is logged.
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_names_that_fall_through(kind, caplog):
    stock, fused = mixed_model(kind)
    calls = []
    layer_of(fused).lora_A["b"].register_forward_hook(lambda *args: calls.append(args))
    x = torch.randn(len(MIXED), IN_FEATURES)
    registry._logged.clear()
    torch.testing.assert_close(mixed_call(fused, x), mixed_call(stock, x), **FP32)
    assert [message.split(": ")[1] for message in caplog.messages] == ["adapter 'b' has hooks"]
    assert len(calls) == 1


# The configuration of 'default', with what its layer is called with beside names; and the tokens of x.
OF_ONE = {
    "lora_bias": ({"lora_bias": True}, {}, 5),
    "offsets": ({}, {"alora_offsets": [3] * len(MIXED)}, 5),  # of no adapter
    "alora": ({"alora_invocation_tokens": [7]}, {"alora_offsets": [2, 2, 3, None, None, 9]}, 5),
    "alora-nowhere": ({"alora_invocation_tokens": [7]}, {"alora_offsets": [None] * len(MIXED)}, 5),
    "alora-decodes": ({"alora_invocation_tokens": [7]}, {"alora_offsets": [None, None, 4, 2, 1, None]}, None),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("what", OF_ONE)
@pytest.mark.parametrize("kind", KINDS)
def test_biases_and_invocations(kind, what, dtype, caplog):
    config, options, tokens = OF_ONE[what]
    stock, fused = mixed_model(kind, dtype, **config)
    # PEFT adds to the result in place, which autograd refuses for that of bitsandbytes' own function.
    layer_of(stock).base_layer.register_forward_hook(lambda layer, inputs, y: y.clone())
    shape = (len(MIXED),) if tokens is None else (len(MIXED), tokens)
    x, grad_y, results = torch.randn(*shape, IN_FEATURES, dtype=dtype), torch.randn(*shape, OUT_FEATURES), []
    registry._logged.clear()
    for model in (stock, fused):
        if "lora_bias" in config:
            torch.nn.init.constant_(layer_of(model).lora_B["default"].bias, 1.5)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        leaf = x.clone().requires_grad_()
        y = mixed_call(model, leaf, **options)
        y.backward(grad_y.to(y.dtype))
        trained = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
        results.append({"y": y.detach(), "x": leaf.grad, **trained})
    assert caplog.messages == []
    want, got = results
    for name, value in want.items():
        if got[name] is None:  # an adapter without rows gets no gradient
            assert what == "alora-nowhere" and not value.any(), name
            continue
        assert got[name].dtype == value.dtype
        assert error(got[name], value) <= (1e-5 if dtype is torch.float32 else 0.02), name


def several_kinds(kind):
    """A layer with a DoRA, a bias and an aLoRA, all of them trained, and what calls it with each of them."""
    model = lora_model(kind, use_dora=True)
    model.add_adapter("b", LoraConfig(r=7, target_modules=["lin"], lora_bias=True))
    model.add_adapter("invoked", LoraConfig(r=2, target_modules=["lin"], alora_invocation_tokens=[7]))
    randomize(model)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name or "lora_B.b.bias" in name:
            parameter.data.add_(0.5)
        parameter.requires_grad_("lora_" in name)
    peft_kernels.optimize(model)
    names = ["default", "b", "invoked", "__base__", "default"]
    return model, {"adapter_names": names, "alora_offsets": [None, None, 3, None, None]}


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters_in_one_batch(kind, monkeypatch, caplog):
    model, call = several_kinds(kind)
    layer, x = layer_of(model), torch.randn(5, 8, IN_FEATURES, requires_grad=True)
    wanted = []
    for row, name in zip(x, call["adapter_names"], strict=True):
        model.base_model.set_adapter([] if name == "__base__" else [name])
        wanted.append(layer(row[None], **{"alora_offsets": [3]} if name == "invoked" else {}))
    wanted = torch.cat(wanted)
    trained = {name: p.requires_grad_() for name, p in model.named_parameters() if "lora_" in name}
    grad_y = torch.randn_like(wanted)
    want = torch.autograd.grad(wanted, [x, *trained.values()], grad_y, allow_unused=True)
    registry._logged.clear()
    y = layer(x, **call)
    assert error(y, wanted) < 1e-5 and caplog.messages == []
    got = torch.autograd.grad(y, [x, *trained.values()], grad_y)
    for name, ours, theirs in zip(["x", *trained], got, want, strict=True):
        assert theirs is None or error(ours, theirs) < 1e-5, name
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, **call), y)
    (once,) = torch.autograd.grad(layer(x, **call).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="trying to differentiate twice"):
        once.sum().backward()


MIXED_ERRORS = {
    "too short": lambda model: {"adapter_names": ["b"]},
    "no list": lambda model: {"adapter_names": 3},
    "merged": lambda model: model.merge_adapter() or {"adapter_names": MIXED},
    "unknown": lambda model: {"adapter_names": [*MIXED[:-1], "c"]},
    "training": lambda model: model.train() and {"adapter_names": ["b"] * 6},
}


@pytest.mark.parametrize("change", MIXED_ERRORS)
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_names_that_peft_refuses(kind, change):
    messages = []
    for model in mixed_model(kind):
        options = MIXED_ERRORS[change](model)
        with torch.no_grad(), pytest.raises((ValueError, TypeError)) as raised:
            model(torch.randn(6, IN_FEATURES), **options)
        messages.append((type(raised.value), str(raised.value)))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_names_with_disabled_adapters(kind):
    _, fused = mixed_model(kind)
    x = torch.randn(len(MIXED), IN_FEATURES)
    with torch.no_grad(), fused.disable_adapter():
        torch.testing.assert_close(mixed_call(fused, x), oracle(layer_of(fused), x, ()).float(), **FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_names_compile_into_one_graph(kind):
    torch.compiler.reset()
    _, fused = mixed_model(kind)
    compiled = torch.compile(layer_of(fused), backend="aot_eager", fullgraph=True)
    for tokens in (2, 40):
        x = torch.randn(len(MIXED), tokens, IN_FEATURES)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, adapter_names=MIXED), mixed_call(fused, x))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_generation_of_a_mixed_batch(kind, options, caplog):
    stock = decoding_models.make(base=kind)
    # An adapter on fewer layers than the other: elsewhere its samples run without one.
    stock.add_adapter("b", LoraConfig(r=3, lora_alpha=24, target_modules=["q_proj", "down_proj"]))
    randomize(stock)
    fused = copy.deepcopy(stock)
    assert not missed(peft_kernels.optimize(fused))
    tokens = torch.randint(3, 60, (4, 9))
    call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False,
            "adapter_names": ["b", "default", "__base__", "b"], "pad_token_id": 0, **options}  # fmt: skip
    call |= {"output_logits": True, "return_dict_in_generate": True}
    fused.generate(**call | {"adapter_names": None})  # layers keep what they found out, adapters among it
    registry._logged.clear()
    want, got = (model.generate(**call) for model in (stock, fused))
    assert caplog.messages == []
    assert torch.equal(got.sequences, want.sequences)
    for ours, theirs in zip(got.logits, want.logits, strict=True):
        assert error(ours, theirs) <= SAME_STEP
    fused.set_adapter("b")
    alone = fused(input_ids=tokens[:1]).logits[:, -1]
    assert error(got.logits[0][:1], alone) <= SAME_STEP
    fused.set_adapter("default")
    assert error(fused(input_ids=tokens[:1]).logits[:, -1], alone) > 10 * SAME_STEP


@pytest.mark.parametrize("kind", KINDS)
def test_runs_on_the_cuda_kernels(kind):
    if reason := ptx_emulator.missing():
        pytest.skip(reason)
    from ptx_emulator.ops import emulated

    _, fused = mixed_model(kind)
    x = torch.randn(len(MIXED), 3, IN_FEATURES)
    with emulated() as launches, torch.no_grad():
        y = mixed_call(fused, x)
        kernels = [record["kernel"] for record in launches()]
    assert error(y, mixed_oracle(fused, x)) < 1e-5
    assert sum("lora_grouped" in name for name in kernels) == 2, kernels  # for all adapters
