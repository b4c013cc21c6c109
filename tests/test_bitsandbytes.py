"""A fused Linear4bit against the stock one and the fp64 oracle."""

import copy
import io
import logging
import pickle

import bitsandbytes as bnb
import pytest
import torch
from comparison import error
from peft_models import IN_FEATURES, OUT_FEATURES, dense_weight, is_repacked, linear4bit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels
from peft_kernels.integrations import registry
from peft_kernels.integrations.refusal import Refusal
from peft_kernels.testing.reference.lora_linear import lora_linear as reference

# The fused layer may be this much less exact than the stock layer, in relative error against fp64.
ERROR_RATIO = 1.05
# Relative to the largest element: two roundings to bf16, of results that were summed up in another order.
BF16_TOLERANCE = 2 * 2.0**-8
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = [
    {"quant_type": quant_type, "compress_statistics": nested, "quant_storage": storage}
    for quant_type in ("nf4", "fp4")
    for nested in (False, True)
    for storage in (torch.uint8, torch.bfloat16)
]


def names(value):
    return "-".join(str(v).removeprefix("torch.") for v in (value.values() if isinstance(value, dict) else [value]))


def as_bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def fused4bit(*args, **kwargs):
    layer = linear4bit(*args, **kwargs)
    assert all(row.fused for row in peft_kernels.optimize(layer))
    return layer


@pytest.fixture
def can_repack():
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks only on processors with AVX-512 BF16")


@pytest.mark.parametrize("format", FORMATS, ids=names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_exact_as_stock(format, dtype):
    stock = linear4bit(dtype, **format)
    fused = copy.deepcopy(stock)
    peft_kernels.optimize(fused)
    x = torch.randn(5, 7, IN_FEATURES, dtype=dtype)
    grad = torch.randn(5, 7, OUT_FEATURES, dtype=dtype)

    def run(forward):
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.backward(grad.to(y.dtype))
        return y.detach(), leaf.grad

    want = run(lambda x: reference(x, dense_weight(stock), stock.bias))
    for ours, theirs, true in zip(run(fused), run(stock), want, strict=True):
        assert ours.dtype == theirs.dtype
        assert error(ours, true) <= ERROR_RATIO * error(theirs, true)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=names)
@pytest.mark.parametrize("compute_dtype", [None, *FLOATS], ids=names)
def test_result_dtype_is_stocks(compute_dtype, x_dtype, autocast):
    stock = linear4bit(compute_dtype)
    fused = copy.deepcopy(stock)
    peft_kernels.optimize(fused)
    x = torch.randn(3, IN_FEATURES, dtype=x_dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        got, want = fused(x), stock(x)
    assert got.dtype == want.dtype
    assert (fused.compute_dtype, fused.compute_type_is_set) == (stock.compute_dtype, stock.compute_type_is_set)
    torch.testing.assert_close(got, want, rtol=0, atol=BF16_TOLERANCE * float(want.detach().abs().max()))


def test_bias_takes_the_compute_dtype_and_trains():
    layer = fused4bit(torch.bfloat16)
    layer.bias.requires_grad_()
    y = layer(torch.randn(3, IN_FEATURES, dtype=torch.bfloat16))
    y.sum().backward()
    assert layer.bias.dtype == torch.bfloat16
    torch.testing.assert_close(layer.bias.grad, torch.full((OUT_FEATURES,), 3.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("format", FORMATS, ids=names)
def test_evaluation_then_training(format):
    """After an evaluation of the stock layer the input's gradient is None, and without double quantisation its
    state_dict is corrupt."""
    layer = fused4bit(**format)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(3, IN_FEATURES, requires_grad=True)
    layer.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            layer(x)
    layer(x.detach())
    assert not is_repacked(layer)
    layer.train()
    layer(x).sum().backward()
    want = dense_weight(layer).sum(0).float().expand(3, -1)
    torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-5)
    after = layer.state_dict()
    assert list(before) == list(after)
    for name, value in before.items():
        assert torch.equal(as_bytes(value), as_bytes(after[name])), name


def test_evaluation_equals_training():
    layer = fused4bit()
    x = torch.randn(3, IN_FEATURES)
    assert torch.equal(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("format", FORMATS, ids=names)
def test_repacked_weight_is_converted_once(format, can_repack):
    layer = linear4bit(**format)
    want, codes = dense_weight(layer), layer.weight.data.clone()
    layer.eval()(torch.randn(1, IN_FEATURES))
    assert is_repacked(layer)

    (row,) = peft_kernels.optimize(layer)
    assert row.fused and "statistics were already bf16" in row.reason
    assert not is_repacked(layer) and layer.quant_state is layer.weight.quant_state
    assert torch.equal(as_bytes(layer.weight.data), as_bytes(codes))
    assert layer.weight.dtype == format["quant_storage"]
    assert error(dense_weight(layer), want) < 2.0**-8
    x = torch.randn(2, IN_FEATURES)
    layer(x)
    storage, view = layer.weight.data_ptr(), layer.nf4_weight()
    layer(x)
    assert layer.weight.data_ptr() == storage and layer.nf4_weight() is view
    (again,) = peft_kernels.optimize(layer)
    assert again.fused and not again.reason
    assert torch.equal(as_bytes(layer.state_dict()["weight"]), as_bytes(codes))

    peft_kernels.restore(layer)
    torch.testing.assert_close(layer.train()(x), reference(x, dense_weight(layer), layer.bias).float())


def test_repacking_by_a_layer_that_shares_the_weight(can_repack):
    stock, fused = linear4bit(compress_statistics=False), fused4bit()
    fused.weight, fused.bias = stock.weight, stock.bias
    x = torch.randn(2, IN_FEATURES)
    want = fused(x)
    stock.eval()(x)
    assert is_repacked(fused)
    assert error(fused(x), want) < 2.0**-8
    assert not is_repacked(fused)


def test_nested_offset_in_bf16():
    """Such checkpoints drove training to NaN."""
    layer = linear4bit(torch.bfloat16, compress_statistics=True)
    layer.weight.quant_state.offset = layer.weight.quant_state.offset.bfloat16()
    peft_kernels.optimize(layer)
    x = torch.randn(3, IN_FEATURES, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert error(y, reference(x, dense_weight(layer), layer.bias)) < 2.0**-7
    assert x.grad.isfinite().all()
    layer.weight.quant_state.offset += 1  # the fp32 copy of it must not be kept
    assert error(layer(x), y) > 0.1


@pytest.mark.parametrize("change", ["data", "parameter", "in-place", "statistics", "offset", "moved", "assign"])
def test_a_changed_weight_is_seen(change):
    layer, other = fused4bit(bias=False), linear4bit(bias=False)
    nn.init.zeros_(layer.weight.quant_state.offset)  # so that a change of it is a large one
    x = torch.randn(2, IN_FEATURES)
    layer(x)
    if change == "data":
        layer.weight.data = other.weight.data
    elif change == "parameter":
        layer.weight = other.weight
    elif change == "in-place":
        layer.weight.data.copy_(other.weight.data)
    elif change == "statistics":
        layer.weight.quant_state = other.weight.quant_state
    elif change == "offset":
        layer.weight.quant_state.offset = torch.tensor(1.0)
    elif change == "moved":
        layer.share_memory()
        layer.to("cpu", torch.float32)
    elif change == "assign":
        weight = bnb.nn.Params4bit(other.weight.data.clone(), quant_state=other.weight.quant_state, bnb_quantized=True)
        layer.load_state_dict({"weight": weight}, strict=False, assign=True)
    torch.testing.assert_close(layer(x), reference(x, dense_weight(layer)).float(), rtol=1e-4, atol=1e-4)


def test_lost_quant_state_is_recovered_from_the_layer():
    layer = fused4bit()
    x = torch.randn(2, IN_FEATURES)
    want = layer(x)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(layer(x), want)


def test_not_quantised_yet():
    layer = bnb.nn.Linear4bit(IN_FEATURES, OUT_FEATURES)
    (row,) = peft_kernels.optimize(layer)
    assert not row.fused and row.reason.startswith("not quantised yet")
    x = torch.randn(2, IN_FEATURES)
    with pytest.raises(ValueError, match="weight: got a Params4bit without a quant_state, wanted a quantised"):
        layer(x)
    layer.to("cpu")
    torch.testing.assert_close(layer(x), reference(x, dense_weight(layer), layer.bias).float())


def test_quant_state_that_does_not_fit():
    layer = fused4bit()
    layer.weight.quant_state.shape = torch.Size([OUT_FEATURES, 2 * IN_FEATURES])
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.clone()
    with pytest.raises(ValueError, match=r"weight: got .*, wanted .* half the elements of quant_state.shape"):
        layer(torch.randn(2, 2 * IN_FEATURES))


def test_input_of_another_width_gets_stocks_error():
    stock, fused = linear4bit(), fused4bit()
    x = torch.randn(2, IN_FEATURES + 1)
    errors = []
    for layer in (stock, fused):
        with pytest.raises(RuntimeError) as error:
            layer(x)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_input_without_a_fused_path(caplog):
    layer = fused4bit(torch.float32).eval()
    registry._logged.clear()
    x = torch.randn(2, IN_FEATURES, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "peft_kernels"):
        for _ in range(3):
            y = layer(x)
    assert y.dtype == torch.float64 and not is_repacked(layer)
    assert caplog.messages == ["a bitsandbytes.Linear4bit takes its stock forward: x is torch.float64"]


class Called(TorchDispatchMode):
    """The names of bitsandbytes' operations that are called, without "bitsandbytes"."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "bitsandbytes":
            self.names.add(function.name().removeprefix("bitsandbytes::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("nested", [False, True])
def test_operations_of_bitsandbytes(nested):
    """Fused layers call none. Stock ones call the operation that can have a kernel from the hub for repacked weights
    alone, as docs/limits.md says."""
    stock, x = linear4bit(torch.bfloat16, compress_statistics=nested), torch.randn(3, IN_FEATURES).bfloat16()
    fused = copy.deepcopy(stock)
    peft_kernels.optimize(fused)

    def called(layer, training):
        with Called() as seen, torch.set_grad_enabled(training):
            y = layer.train(training)(x.clone().requires_grad_(training))
            if training:
                y.sum().backward()
        return seen.names

    of_statistics = {"dequantize_blockwise"}
    assert not called(fused, True) | called(fused, False)
    assert called(stock, True) - of_statistics == {"gemm_4bit", "dequantize_4bit"}
    assert called(stock, False) - of_statistics == {"gemv_4bit" if bnb.functional.has_avx512bf16() else "gemm_4bit"}
    assert is_repacked(stock) == bnb.functional.has_avx512bf16()


def test_other_devices_are_left_to_stock():
    layer = fused4bit()
    assert layer.base_product(torch.empty(2, IN_FEATURES, device="meta")) == Refusal("no fused kernel for meta")


@pytest.mark.parametrize("shape", [(IN_FEATURES,), (0, IN_FEATURES), (2, 0, IN_FEATURES), (1, 2, 3, IN_FEATURES)])
def test_shapes(shape):
    layer = fused4bit()
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT_FEATURES)
    torch.testing.assert_close(y, reference(x, dense_weight(layer), layer.bias).float(), rtol=1e-5, atol=1e-5)


def test_blocks_that_straddle_rows():
    """bitsandbytes' AVX-512 kernel mistakes the blocks of such a weight, by 20 % of the result."""
    layer = bnb.nn.Linear4bit(IN_FEATURES + 32, OUT_FEATURES, quant_type="nf4").to("cpu")
    peft_kernels.optimize(layer)
    x = torch.randn(3, IN_FEATURES + 32)
    assert error(layer(x), reference(x, dense_weight(layer), layer.bias)) < 1e-6


def copies(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    yield "deepcopy", copy.deepcopy(layer)
    yield "pickle", pickle.loads(pickle.dumps(layer))
    yield "torch.save", torch.load(buffer, weights_only=False)


def test_copies_stay_fused_and_restorable():
    layer = fused4bit(torch.bfloat16)
    x = torch.randn(2, IN_FEATURES)
    want = layer(x)
    for how, other in copies(layer):
        assert type(other) is type(layer) and "_view" not in vars(other), how
        assert torch.equal(other(x), want)
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        peft_kernels.restore(other)
        assert type(other) is bnb.nn.Linear4bit
        assert error(other(x), want) < BF16_TOLERANCE
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("stock", [bnb.nn.LinearNF4, bnb.nn.LinearFP4])
def test_named_formats(stock):
    layer = stock(IN_FEATURES, OUT_FEATURES).to("cpu")
    (row,) = peft_kernels.optimize(layer)
    assert row.fused and row.kind == f"bitsandbytes.{stock.__name__}"
    layer.load_state_dict(type(layer)(IN_FEATURES, OUT_FEATURES).to("cpu").state_dict(), strict=False)
    x = torch.randn(2, IN_FEATURES)
    torch.testing.assert_close(layer(x), reference(x, dense_weight(layer), layer.bias).float())
    peft_kernels.restore(layer)
    assert type(layer) is stock


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_compiles_into_one_graph(grad):
    layer = fused4bit()
    x = torch.randn(2, IN_FEATURES, requires_grad=grad)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        want, got = layer(x), compiled(x)
    torch.testing.assert_close(got, want)
    if grad:
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, want)))
