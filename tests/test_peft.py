"""Fused PEFT layers against the stock ones and the fp64 oracle."""

import copy
import io
import itertools
import pickle
import warnings

import ptx_emulator
import pytest
import torch
from comparison import Made, error
from optional import if_installed
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from peft_models import (
    IN_FEATURES,
    OUT_FEATURES,
    OneLayer,
    dense_weight,
    fused_model,
    gradients,
    is_repacked,
    layer_of,
    lora_model,
    oracle,
    randomize,
    stock_path_reasons,
)
from reports import missed
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import peft_kernels
from peft_kernels.integrations.refusal import Refusal
from peft_kernels.testing.reference.lora_linear import lora_linear as reference

bnb = if_installed("bitsandbytes")

# The fused layer may be this much less exact than the stock layer, in relative error against fp64.
ERROR_RATIO = 1.05
# A relative error of fp32 results that comes from the order of summation alone.
FP32_NOISE = 2.0**-21
# Relative to the largest element: two roundings to bf16, of results that were summed up in another order.
BF16_TOLERANCE = 2 * 2.0**-8
FP32 = {"rtol": 1e-5, "atol": 1e-5}

KINDS = ("dense", "conv1d", "4bit")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Merge lora module", "ignore:Unmerge lora module", "ignore:Already following"
)


def names(value):
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_as_stock(kind, dtype, adapter_dtype):
    stock = lora_model(kind, dtype)
    for part in (layer_of(stock).lora_A, layer_of(stock).lora_B):
        part.to(adapter_dtype)
    fused, true = copy.deepcopy(stock), copy.deepcopy(stock)
    assert all(row.fused for row in peft_kernels.optimize(fused))
    layer_of(true).forward = lambda x: oracle(layer_of(true), x)
    x, grad = torch.randn(3, 11, IN_FEATURES, dtype=dtype), torch.randn(3, 11, OUT_FEATURES, dtype=dtype)
    for ours, theirs, want in zip(*(gradients(model, x, grad) for model in (fused, stock, true)), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert error(ours, want) <= max(ERROR_RATIO * error(theirs, want), FP32_NOISE)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("kind", KINDS)
def test_result_dtype_or_error_is_stocks(kind, dtype, adapter_dtype):
    stock = lora_model(kind, dtype)
    for part in (layer_of(stock).lora_A, layer_of(stock).lora_B):
        part.to(adapter_dtype)
    fused = copy.deepcopy(stock)
    peft_kernels.optimize(fused)
    for x_dtype, autocast in itertools.product(FLOATS, (None, torch.bfloat16, torch.float16)):
        x = torch.randn(3, IN_FEATURES, dtype=x_dtype)
        results = []
        for model in (stock, fused):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None), torch.no_grad():
                try:
                    results.append(model(x))
                except RuntimeError as error:
                    results.append(str(error))
        want, got = results
        if isinstance(want, str):
            assert got == want
        else:
            assert got.dtype == want.dtype, (x_dtype, autocast)
            torch.testing.assert_close(got, want, rtol=0, atol=BF16_TOLERANCE * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation(kind):
    model = fused_model(kind, lora_dropout=0.5)
    x = torch.randn(4, IN_FEATURES)
    want = oracle(layer_of(model), x).float()
    for _ in range(2):
        model.eval()
        torch.testing.assert_close(model(x), want, **FP32)
        model.train()
        assert error(model(x), want) > 0.01
        assert not torch.equal(model(x), model(x))
    if kind == "4bit":
        assert not is_repacked(layer_of(model).base_layer)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerated_in_evaluation_then_trained(kind):
    """On a stock 4-bit layer the input's gradient is None after an evaluation."""
    model = lora_model(kind).eval()
    peft_kernels.optimize(model)
    x = torch.randn(4, IN_FEATURES)
    model(x)
    want = oracle(layer_of(model), x).float()
    model.train()
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    torch.testing.assert_close(y, want, **FP32)
    y.sum().backward()
    true = x.double().requires_grad_()
    oracle(layer_of(model), true).sum().backward()
    torch.testing.assert_close(leaf.grad, true.grad.float(), **FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_the_op(kind):
    model = fused_model(kind, lora_dropout=0.3)
    layer, x = layer_of(model), torch.randn(6, IN_FEATURES)
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    seeds = torch.randint(torch.iinfo(torch.int64).max, (1,))
    parts = [layer.lora_A["default"].weight], [layer.lora_B["default"].weight], [layer.scaling["default"]]
    want = reference(x, dense_weight(layer.base_layer), layer.base_layer.bias, *parts, [0.3], seeds)
    torch.testing.assert_close(y, want.float(), **FP32)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_repeats_the_dropout(kind, use_reentrant):
    model = fused_model(kind, lora_dropout=0.3)
    x, grad = torch.randn(6, IN_FEATURES), torch.randn(6, OUT_FEATURES)
    results = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        forward(leaf).backward(grad)
        results.append([leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for direct, recomputed in zip(*results, strict=True):
        assert torch.equal(direct, recomputed)


@pytest.mark.parametrize("kind", KINDS)
def test_switching_adapters(kind):
    model = fused_model(kind)
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=3, target_modules=["lin"], use_rslora=True))
    model.add_adapter("c", LoraConfig(r=7, target_modules=["lin"]))
    randomize(model)
    layer, x = layer_of(model), torch.randn(4, IN_FEATURES)
    assert layer.scaling["b"] == 3 / 2**0.5
    for active in ("b", "default", ["default", "b"], ["c", "b", "default"]):
        model.base_model.set_adapter(active)
        torch.testing.assert_close(model(x), oracle(layer, x).float(), **FP32)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), oracle(layer, x, ()).float(), **FP32)
    torch.testing.assert_close(model(x), oracle(layer, x).float(), **FP32)
    model.delete_adapter("b")
    torch.testing.assert_close(model(x), oracle(layer, x, ("c", "default")).float(), **FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_active_adapter_that_the_layer_lacks(kind):
    model = fused_model(kind)
    layer, x = layer_of(model), torch.randn(4, IN_FEATURES)
    layer._active_adapter = ["elsewhere"]
    torch.testing.assert_close(model(x), oracle(layer, x, ()).float(), **FP32)
    layer._active_adapter = ["elsewhere", "default"]
    torch.testing.assert_close(model(x), oracle(layer, x, ("default",)).float(), **FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading(kind, tmp_path):
    model = lora_model(kind)
    base = copy.deepcopy(layer_of(model).base_layer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    peft_kernels.optimize(model)
    x = torch.randn(3, IN_FEATURES)
    want = model.eval()(x)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(OneLayer(base), tmp_path)
    assert all(row.fused for row in peft_kernels.optimize(loaded))
    assert torch.equal(loaded(x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_stay_fused_and_restorable(kind):
    model = fused_model(kind).eval()
    x = torch.randn(3, IN_FEATURES)
    want = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False))
    for other in copies:
        assert type(layer_of(other)) is type(layer_of(model))
        assert torch.equal(other(x), want)
        peft_kernels.restore(other)
        assert type(layer_of(other)) in (lora.Linear, lora.Linear4bit)
        torch.testing.assert_close(other(x), want, rtol=0, atol=BF16_TOLERANCE * float(want.abs().max()))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph(kind, rows, grad):
    torch.compiler.reset()  # one function is compiled anew eight times at most
    model = fused_model(kind)
    compiled = torch.compile(layer_of(model), backend="aot_eager", fullgraph=True)
    x = torch.randn(rows, IN_FEATURES)
    with torch.set_grad_enabled(grad):
        got, want = compiled(x), model(x)
    torch.testing.assert_close(got, want)
    if grad:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for ours, theirs in zip(*(torch.autograd.grad(y.sum(), parameters) for y in (got, want)), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("kind", KINDS)
def test_scaling_that_is_a_tensor(kind, grad):
    model = fused_model(kind)
    x = torch.randn(3, IN_FEATURES)
    with torch.set_grad_enabled(grad):
        want = model(x)
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        assert isinstance(layer_of(model).scaling["default"], torch.Tensor)
        torch.testing.assert_close(model(x), want, **FP32)
        layer_of(model).scale_layer(2.0)  # in place
        torch.testing.assert_close(model(x), oracle(layer_of(model), x).float(), **FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_input_casting_that_is_disabled(kind):
    model = fused_model(kind, torch.bfloat16)
    x = torch.randn(3, IN_FEATURES, dtype=torch.bfloat16)
    model(x)
    with disable_input_dtype_casting(model):
        with pytest.raises(RuntimeError, match="same dtype"):
            model(x)
        layer_of(model).lora_A.to(torch.bfloat16)
        layer_of(model).lora_B.to(torch.bfloat16)
        assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["dense", "conv1d"])
def test_trained_base_weight_and_bias(kind):
    stock = lora_model(kind)
    fused = copy.deepcopy(stock)
    peft_kernels.optimize(fused)
    x = torch.randn(3, IN_FEATURES)
    results = []
    for model in (stock, fused):
        base = layer_of(model).base_layer.requires_grad_(True)
        model(x).square().sum().backward()
        results.append((base.weight.grad, base.bias.grad))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def with_bias(stock):
    """Its copies with the bias of its B, which are not zero: the stock model, the accelerated one, and the oracle."""
    layer = layer_of(stock)
    for b in layer.lora_B.values():
        if b.bias is not None:
            nn.init.uniform_(b.bias, 0.5, 2)
    fused, true = copy.deepcopy(stock), copy.deepcopy(stock)
    assert peft_kernels.optimize(fused).layers[0].fused

    def forward(x):
        layer = layer_of(true)
        y = oracle(layer, x)
        return y + sum(float(layer.scaling[name]) * layer.lora_B[name].bias.double() for name in layer.active_adapters)

    layer_of(true).forward = forward
    return stock, fused, true


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("kind", KINDS)
def test_lora_bias(kind, dtype, adapter_dtype, caplog):
    stock = lora_model(kind, dtype, lora_bias=True)
    for part in (layer_of(stock).lora_A, layer_of(stock).lora_B):
        part.to(adapter_dtype)
    stock, fused, true = with_bias(stock)
    x, grad = torch.randn(3, 11, IN_FEATURES, dtype=dtype), torch.randn(3, 11, OUT_FEATURES, dtype=dtype)
    for ours, theirs, want in zip(*(gradients(model, x, grad) for model in (fused, stock, true)), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert error(ours, want) <= max(ERROR_RATIO * error(theirs, want), FP32_NOISE)
    assert not caplog.messages


@pytest.mark.parametrize("kind", KINDS)
def test_lora_bias_is_followed_in_inference(kind):
    _, fused, true = with_bias(lora_model(kind, lora_bias=True))
    x = torch.randn(2, IN_FEATURES)
    with torch.no_grad():
        for factor in (1, 2):
            for model in (fused, true):
                layer_of(model).lora_B["default"].bias.data.mul_(factor)
                layer_of(model).base_layer.bias.data.mul_(factor)
            torch.testing.assert_close(fused.eval()(x), true(x).float(), **FP32)
            assert kind == "conv1d" or layer_of(fused)._packed is not None
    if kind == "4bit":
        assert not is_repacked(layer_of(fused).base_layer)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_added_later_falls_through_while_it_is_active(kind, caplog):
    model = fused_model(kind)
    x = torch.randn(3, IN_FEATURES)
    want = model(x)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["lin"]))
    layer_of(model).lora_B["b"].register_forward_hook(lambda *_: None)
    assert stock_path_reasons(model, caplog, x) == []
    model.set_adapter("b")
    (message,) = stock_path_reasons(model, caplog, x)
    assert message.endswith("adapter 'b' has hooks")
    assert peft_kernels.optimize(model).layers[0].reason == "adapter 'b' has hooks"
    model.set_adapter("default")
    assert peft_kernels.optimize(model).layers[0].fused
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("kind", ["dense", "conv1d"])
def test_base_weight_is_neither_copied_nor_kept(kind, dtype):
    model = fused_model(kind, dtype)
    weight, saved = layer_of(model).base_layer.weight, []
    x = torch.randn(3, IN_FEATURES, dtype=dtype, requires_grad=True)
    with Made() as made, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x).float().sum().backward()
        with torch.no_grad():
            model(x)
    assert made.tensors and not [tensor for tensor in made.tensors if tensor.numel() >= weight.numel()]
    assert saved and {t.data_ptr() for t in saved if t.numel() >= weight.numel()} <= {weight.data_ptr()}


@pytest.mark.parametrize("rows", [1, 40])
def test_conv1d_takes_the_product_of_stock(rows, monkeypatch):
    """While the adapter is zero, the result is stock's bit for bit, where torch makes the product of the same
    operands."""
    monkeypatch.setattr("peft_kernels.cpu.outruns_torch", lambda: False)
    model = lora_model("conv1d", nonzero=False)
    x = torch.randn(rows, IN_FEATURES)
    with torch.no_grad():
        want = model(x)
        peft_kernels.optimize(model)
        assert torch.equal(model(x), want)
    peft_kernels.restore(model)
    assert type(layer_of(model)) is lora.Linear and type(layer_of(model).base_layer) is Conv1D


def test_fan_in_fan_out_is_for_merging_alone():
    model = lora_model("conv1d")
    x = torch.randn(3, IN_FEATURES)
    layer_of(model).fan_in_fan_out = False  # with which PEFT can't merge
    assert [row.fused for row in peft_kernels.optimize(model)] == [True]
    torch.testing.assert_close(model(x), oracle(layer_of(model), x).float(), **FP32)


def test_conv1d_of_another_forward_is_left_alone():
    class Doubled(Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    model = lora_model("conv1d", base=Doubled(OUT_FEATURES, IN_FEATURES))
    (row,) = peft_kernels.optimize(model)
    assert (row.fused, row.reason) == (False, "its base layer is a Doubled, not a torch.nn.Linear")


def test_peft_layers_without_a_fused_form_are_mentioned():
    model = get_peft_model(
        nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16)), LoraConfig(r=2, target_modules=["0", "1"])
    )
    report = peft_kernels.optimize(model)
    assert [(row.kind, row.fused, row.reason) for row in report] == [
        ("peft.Embedding", False, "its adapter looks rows of A up, for which there is no kernel"),
        ("peft.Linear", True, ""),
    ]


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_inside_a_layer_are_called(kind, part, caplog):
    model = fused_model(kind)
    module = getattr(layer_of(model), part)
    module = module if part == "base_layer" else module["default"]
    calls = []
    handle = module.register_forward_hook(lambda *args: calls.append(args))
    (message,) = stock_path_reasons(model, caplog, torch.randn(3, IN_FEATURES))
    assert len(calls) == 1 and message.endswith("has hooks")
    handle.remove()
    assert stock_path_reasons(model, caplog, torch.randn(3, IN_FEATURES)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_layers_on_the_cuda_kernels(kind):
    if reason := ptx_emulator.missing():
        pytest.skip(reason)
    from ptx_emulator.ops import emulated

    layer = layer_of(fused_model(kind))
    x = torch.randn(40, IN_FEATURES, requires_grad=True)
    with emulated() as launches:
        y = layer(x)
        y.backward(torch.ones_like(y))
        kernels = " ".join(record["kernel"] for record in launches())
    assert error(y, oracle(layer, x)) < 1e-5
    assert all(name in kernels for name in ("lora_shrink", "lora_expand", "lora_dy_pass", "lora_x_pass"))


def test_other_devices_are_left_to_stock():
    x = torch.empty(2, IN_FEATURES, device="meta")
    for kind, reason in (("4bit", "no fused kernel for meta"), ("dense", "x is on meta, and the weight on cpu")):
        assert layer_of(fused_model(kind)).adapted_product(x) == Refusal(reason)
    (row,) = peft_kernels.optimize(lora_model("dense").to("meta"))
    assert (row.fused, row.reason) == (False, "no fused kernel for meta")


@pytest.mark.parametrize("part", ["base", "adapter"])
def test_fp64_is_left_to_stock(part):
    model = lora_model("dense")
    (layer_of(model).base_layer if part == "base" else layer_of(model)).double()
    (row,) = peft_kernels.optimize(model)
    assert not row.fused and "torch.float64" in row.reason
    x = torch.randn(3, IN_FEATURES, dtype=torch.float64)
    torch.testing.assert_close(model(x), oracle(layer_of(model), x), rtol=1e-5, atol=1e-5)


def test_base_layer_that_was_wrapped_later(caplog):
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, x):
            return 2 * self.inner(x)

    model = fused_model("dense")
    layer, x = layer_of(model), torch.randn(3, IN_FEATURES)
    want = oracle(layer, x) + oracle(layer, x, ())
    layer.base_layer = Doubled(layer.base_layer)
    (message,) = stock_path_reasons(model, caplog, x)
    assert message.endswith("its base layer is a Doubled, not a torch.nn.Linear")
    torch.testing.assert_close(model(x), want.float(), **FP32)


def test_4bit_layer_whose_base_was_restored(caplog):
    model = fused_model("4bit")
    x = torch.randn(3, IN_FEATURES)
    want = model(x)
    peft_kernels.restore(layer_of(model).base_layer)
    (message,) = stock_path_reasons(model, caplog, x)
    assert message.endswith("its base layer is not fused")
    torch.testing.assert_close(model(x), want, **FP32)


def tiny_llama(quantized: bool = False) -> nn.Module:
    """A Llama with random weights, its linear layers in 4 bits or dense."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if quantized:
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, child in list(block.named_children()):
                    if isinstance(child, nn.Linear):
                        new = bnb.nn.Linear4bit(
                            child.in_features, child.out_features, bias=False, compute_dtype=torch.float32,
                            quant_type="nf4",
                        )  # fmt: skip
                        new.load_state_dict(child.state_dict())
                        setattr(block, name, new.to("cpu"))
        model.is_loaded_in_4bit = True
    return model


def tiny_lora_llama(quantized: bool, **config) -> PeftModel:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(tiny_llama(quantized), LoraConfig(**config))
    randomize(model)
    return model.train()


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_language_model(kind):
    stock = tiny_lora_llama(kind == "4bit")
    fused = copy.deepcopy(stock)
    report = peft_kernels.optimize(fused)
    # Of two decoder layers: itself, attention, MLP, two norms; then the last norm, the output layer and the loss.
    assert len(report.fused) == (28 if kind == "4bit" else 14) + 2 * 5 + 3 and not missed(report)
    tokens = torch.randint(128, (2, 9))
    results = []
    for model in (stock, fused):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert torch.equal(fused.eval()(tokens).logits, fused.train()(tokens).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_trainer_with_bf16_autocast_and_checkpointing(kind, tmp_path):
    from transformers import Trainer, TrainingArguments  # slow to import

    model = tiny_lora_llama(kind == "4bit", lora_dropout=0.1)
    assert not missed(peft_kernels.optimize(model))
    tokens = torch.randint(128, (8, 12))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, bf16=True, use_cpu=True,
        gradient_checkpointing=True, report_to=[], save_strategy="steps", save_steps=6, logging_steps=1,
        disable_tqdm=True, eval_strategy="steps", eval_steps=3, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    parameters = dict(model.named_parameters())
    assert all(p.isfinite().all() and not torch.equal(p, parameters[name]) for name, p in trained.items())
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").exists()
