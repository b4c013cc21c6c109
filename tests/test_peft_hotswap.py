"""PEFT's hot swap: an adapter's numbers are replaced, in compiled code without another compilation."""

import copy

import pytest
import torch
from comparison import error
from decoding_models import decode, layers_of, quantised
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import IN_FEATURES, OUT_FEATURES, gradients, layer_of, lora_model, oracle, randomize
from test_peft import ERROR_RATIO, FP32, FP32_NOISE
from tiny_models import SAME_STEP, tiny

import peft_kernels

FIRST = {"r": 4, "lora_alpha": 8}
# PEFT pads no 4-bit layer, whose second adapter has to fit into the first.
SECOND = {"dense": {"r": 7, "lora_alpha": 12}, "conv1d": {"r": 7, "lora_alpha": 12}, "4bit": {"r": 3, "lora_alpha": 5}}
TARGET_RANK = 8


def prepare(model):
    prepare_model_for_compiled_hotswap(model, target_rank=TARGET_RANK)


def layer_model(kind, config, folder=None, dtype=torch.float32):
    torch.manual_seed(1)
    base = lora_model(kind, dtype).unload().lin
    base.support_avx512bf16_for_cpu = False  # else stock would round its statistics to bf16
    torch.manual_seed(config["r"])
    model = lora_model(kind, base=base, **config).eval()
    if folder is not None:
        model.save_pretrained(folder)
    return model


def llama_model(kind, config, folder=None):
    torch.manual_seed(1)
    model = tiny("llama", hidden=64, intermediate=128)
    if kind == "4bit":
        model = quantised(model)
    torch.manual_seed(config["r"])
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", **config)).eval()
    randomize(model)
    if folder is not None:
        model.save_pretrained(folder)
    return model


@pytest.fixture
def without_recompiling():
    """Compiled functions that may not break the graph, and are not compiled once more."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # of what other tests have compiled
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda model, backend="aot_eager": torch.compile(model, backend=backend, fullgraph=True)
    assert not torch._dynamo.utils.counters["graph_break"]


def same_gradients(model, stock, x):
    grad = torch.randn(*x.shape[:-1], OUT_FEATURES)
    for got, wanted in zip(gradients(model, x, grad), gradients(stock, x, grad), strict=True):
        torch.testing.assert_close(got, wanted, **FP32)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("kind", SECOND)
def test_swap_in_compiled_inference(kind, rows, tmp_path, without_recompiling):
    second, model = layer_model(kind, SECOND[kind], tmp_path), layer_model(kind, FIRST)
    x = torch.randn(rows, IN_FEATURES)
    first, second = (oracle(layer_of(of), x).float() for of in (model, second))
    peft_kernels.optimize(model)
    prepare(model)
    compiled = without_recompiling(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), first, **FP32)
        hotswap_adapter(compiled, tmp_path, adapter_name="default")
        torch.testing.assert_close(compiled(x), second, **FP32)


@pytest.mark.parametrize("kind", SECOND)
def test_swap_in_compiled_training(kind, tmp_path, without_recompiling):
    layer_model(kind, SECOND[kind], tmp_path)
    stock = layer_model(kind, FIRST)
    model = copy.deepcopy(stock)
    peft_kernels.optimize(model)
    prepare(stock), prepare(model)
    compiled, x = without_recompiling(model), torch.randn(3, IN_FEATURES)
    same_gradients(compiled, stock, x)
    hotswap_adapter(stock, tmp_path, adapter_name="default")
    hotswap_adapter(compiled, tmp_path, adapter_name="default")
    same_gradients(compiled, stock, x)


@pytest.mark.parametrize("kind", SECOND)
def test_accelerated_when_compiled(kind, tmp_path):
    """Other classes are compiled anew, once; a swap is not."""
    second, model = layer_model(kind, SECOND[kind], tmp_path), layer_model(kind, FIRST)
    prepare(model)
    torch.compiler.reset()
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(3, IN_FEATURES)
    with torch.no_grad():
        compiled(x)
        peft_kernels.optimize(compiled)
        compiled(x)
        hotswap_adapter(compiled, tmp_path, adapter_name="default")
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(x), oracle(layer_of(second), x).float(), **FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", SECOND)
def test_compiled_as_exact_as_stock(kind, dtype):
    """With a scaling of 5 / 3, which no 16 bits hold."""
    stock = layer_model(kind, {"r": 3, "lora_alpha": 5}, dtype=dtype)
    for part in (layer_of(stock).lora_A, layer_of(stock).lora_B):
        part.to(dtype)
    fused, true = copy.deepcopy(stock), copy.deepcopy(stock)
    peft_kernels.optimize(fused)
    layer_of(true).forward = lambda x: oracle(layer_of(true), x)
    for model in (stock, fused, true):
        prepare(model)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x, grad = torch.randn(11, IN_FEATURES, dtype=dtype), torch.randn(11, OUT_FEATURES, dtype=dtype)
    for ours, theirs, want in zip(*(gradients(model, x, grad) for model in (compiled, stock, true)), strict=True):
        assert ours.dtype == theirs.dtype
        assert error(ours, want) <= max(ERROR_RATIO * error(theirs, want), FP32_NOISE)


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_dora_whose_scaling_is_a_tensor(kind):
    model = lora_model(kind, use_dora=True).eval()
    peft_kernels.optimize(model)
    prepare_model_for_compiled_hotswap(model)
    torch.compiler.reset()
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(3, IN_FEATURES)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(x), model(x), **FP32)
        layer_of(model).scaling["default"].fill_(0.7)
        torch.testing.assert_close(compiled(x), model(x), **FP32)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_swap_in_a_compiled_llama(kind, grad, tmp_path, without_recompiling):
    second = llama_model(kind, SECOND[kind], tmp_path)
    model = llama_model(kind, FIRST)
    ids = torch.randint(3, 60, (2, 12))
    wanted = [of(ids).logits for of in (model, second)]
    assert not peft_kernels.optimize(model).left_alone
    prepare(model)
    compiled = without_recompiling(model)
    with torch.set_grad_enabled(grad):
        assert error(compiled(ids).logits, wanted[0]) <= SAME_STEP
        hotswap_adapter(compiled, tmp_path, adapter_name="default")
        logits = compiled(ids).logits
    assert error(logits, wanted[1]) <= SAME_STEP
    if grad:
        logits.square().sum().backward()
        wanted[1].square().sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), second.parameters(), strict=True):
            if theirs.grad is not None:
                unpadded = ours.grad[tuple(slice(size) for size in theirs.shape)]
                assert error(unpadded, theirs.grad) <= SAME_STEP, name


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_decoding_sees_a_swap(kind, prepared, tmp_path):
    """What few rows in inference are packed for is packed anew."""
    second = llama_model(kind, {"r": 4, "lora_alpha": 12} if not prepared else SECOND[kind], tmp_path)
    model = llama_model(kind, FIRST)
    wanted = [decode(of) for of in (model, second)]
    peft_kernels.optimize(model)
    if prepared:
        prepare(model)
    assert error(decode(model), wanted[0]) <= SAME_STEP
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert error(decode(model), wanted[1]) <= SAME_STEP


@pytest.mark.parametrize("rank", [2, 4, 7])
@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_swap_is_in_place(kind, rank, tmp_path):
    """PEFT writes into tensors that are large enough, and then what was packed for decoding still holds; where it puts
    others in their place, this is seen. A captured graph goes on for as long as memory stays where it is."""
    second = llama_model(kind, {"r": rank, "lora_alpha": 2 * rank}, tmp_path)
    model = llama_model(kind, FIRST)
    wanted = [decode(of, rows=1) for of in (model, second)]
    peft_kernels.optimize(model)

    def state():
        layers = layers_of(model)
        return {name: p.data_ptr() for name, p in model.named_parameters()}, [id(layer._plan) for layer in layers]

    assert error(decode(model, rows=1), wanted[0]) <= SAME_STEP
    before = state()
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert error(decode(model, rows=1), wanted[1]) <= SAME_STEP
    assert (state() == before) == (rank <= FIRST["r"])
    hotswap_adapter(model, tmp_path, adapter_name="default")
    before = state()
    assert error(decode(model, rows=1), wanted[1]) <= SAME_STEP and state() == before
    assert all(layer._plan for layer in layers_of(model))


@pytest.mark.parametrize("kind", SECOND)
def test_swap_of_a_prepared_model_is_in_place(kind, tmp_path, without_recompiling):
    """Of a compiled one, and of the same one called without its graph."""
    second, model = layer_model(kind, SECOND[kind], tmp_path), layer_model(kind, FIRST)
    peft_kernels.optimize(model)
    prepare(model)
    compiled, x = without_recompiling(model), torch.randn(1, IN_FEATURES)
    wanted = oracle(layer_of(second), x).float()
    with torch.no_grad():
        compiled(x), model(x)
        before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        hotswap_adapter(compiled, tmp_path, adapter_name="default")
        for called in (compiled, model):
            torch.testing.assert_close(called(x), wanted, **FP32)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
