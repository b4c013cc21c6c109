"""nn.LoRALinear against the fp64 oracle."""

import copy
import math
import pickle

import pytest
import torch
from optional import if_installed
from torch import nn

from peft_kernels.nn import LoRALinear
from peft_kernels.ops import lora_linear
from peft_kernels.ops.nf4 import NF4Weight
from peft_kernels.testing.reference.lora_linear import lora_linear as reference

bnb = if_installed("bitsandbytes")

K, N, RANK = 64, 96, 4
FORMATS = [(None, False), ("nf4", False), ("nf4", True), ("fp4", False)]
formats = pytest.mark.parametrize(("quantize", "double_quant"), FORMATS, ids=["dense", "nf4", "nf4-double", "fp4"])
# Of a result in that dtype, relative to its largest element.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def trained(layer):
    nn.init.normal_(layer.lora_B, std=0.2)
    return layer


def dense(layer):
    weight = layer.base_weight()
    return (weight.dequantize() if isinstance(weight, NF4Weight) else weight).detach()


def oracle(layer, x):
    return reference(x, dense(layer), layer.bias, [layer.lora_A], [layer.lora_B], [layer.scaling])


def assert_close(got, want):
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance * float(want.detach().abs().max()))


@formats
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_forward_and_backward(quantize, double_quant, dtype, bias):
    layer = trained(LoRALinear(K, N, RANK, 8, bias=bias, quantize=quantize, double_quant=double_quant, dtype=dtype))
    x = torch.randn(2, 5, K, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, N, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    leaves = x, layer.lora_A, layer.lora_B
    want = oracle(layer, x)
    assert_close(y, want)
    got_gradients, want_gradients = (
        torch.autograd.grad(y, leaves, grad),
        torch.autograd.grad(want, leaves, grad.double()),
    )
    for got, true in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(
            got.double(), true.double(), rtol=0, atol=2 * TOLERANCE[dtype] * float(true.abs().max())
        )


@formats
def test_starts_as_its_base_and_trains_the_adapter_only(quantize, double_quant):
    layer = LoRALinear(K, N, RANK, quantize=quantize, double_quant=double_quant)
    x = torch.randn(3, K)
    assert_close(layer(x), reference(x, dense(layer), layer.bias))
    assert not layer.lora_B.any()
    bound = math.sqrt(1 / K)  # Kaiming uniform with a = √5, as nn.Linear
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert layer.lora_A.shape == (RANK, K) and layer.lora_B.shape == (N, RANK)


@pytest.mark.parametrize(
    ("alpha", "rslora", "scaling"), [(None, False, 1.0), (8, False, 2.0), (8, True, 4.0), (-3, False, -0.75)]
)
def test_scaling(alpha, rslora, scaling):
    layer = trained(LoRALinear(K, N, RANK, alpha, rslora=rslora))
    assert layer.scaling == scaling
    x = torch.randn(3, K)
    assert_close(layer(x), oracle(layer, x))


def test_dropout_only_in_training():
    layer = trained(LoRALinear(K, N, RANK, dropout=0.5))
    x = torch.randn(3, K)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    seeds = torch.randint(torch.iinfo(torch.int64).max, (1,))
    parts = [layer.lora_A], [layer.lora_B], [layer.scaling], [0.5], seeds
    assert_close(y, reference(x, dense(layer), layer.bias, *parts))
    layer.eval()
    assert_close(layer(x), oracle(layer, x))


@formats
@pytest.mark.parametrize("cycles", [1, 5])
def test_merging(quantize, double_quant, cycles):
    layer = trained(LoRALinear(K, N, RANK, 8, quantize=quantize, double_quant=double_quant, dtype=torch.bfloat16))
    x = torch.randn(3, K, dtype=torch.bfloat16)
    state, y = copy.deepcopy(layer.state_dict()), layer(x)
    for _ in range(cycles):
        layer.merge()
        layer.merge()
        assert layer.merged
        error = (layer(x).double() - y.double()).norm() / y.double().norm()
        assert 0 < error < (0.3 if quantize else 0.01)
        assert_same(layer.state_dict(), state)
        layer.unmerge()
        assert not layer.merged
        assert torch.equal(layer(x), y)
        assert_same(layer.state_dict(), state)
    layer.unmerge()


def assert_same(state, want):
    assert list(state) == list(want)
    for name in want:
        assert torch.equal(state[name], want[name]), name


def test_merged_dense_weight_is_rounded_once():
    layer = trained(LoRALinear(K, N, RANK, 8, dtype=torch.bfloat16))
    layer.merge()
    want = layer.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
    # Half a unit in the last place, and the rounding of the fp32 sum.
    assert ((layer.merged_weight.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-7).all()


@formats
def test_state_dict_round_trips(quantize, double_quant):
    layer = trained(LoRALinear(K, N, RANK, 8, quantize=quantize, double_quant=double_quant))
    x = torch.randn(3, K)
    y = layer(x)
    other = LoRALinear(K, N, RANK, 8, quantize=quantize)  # how the statistics are stored is the checkpoint's choice
    other.merge()
    assert (
        str(nn.Sequential(other).load_state_dict(nn.Sequential(layer).state_dict()))
        == "<All keys matched successfully>"
    )
    assert torch.equal(other(x), y)
    with torch.no_grad():
        other.base_weight().codes.zero_() if quantize else other.weight.zero_()
    assert torch.equal(layer(x), y)  # loading copied
    for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(each(x), y)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_checkpoints_of_bitsandbytes(quantize, double_quant):
    stock = bnb.nn.Linear4bit(K, N, quant_type=quantize, compress_statistics=double_quant).to("cpu")
    layer = LoRALinear(K, N, RANK, quantize=quantize)
    keys = layer.load_state_dict(stock.state_dict(), strict=False)
    assert keys.unexpected_keys == [] and sorted(keys.missing_keys) == ["lora_A", "lora_B"]
    x = torch.randn(3, K)
    want = stock(x)
    assert_close(layer(x), want)

    state = {name: value for name, value in layer.state_dict().items() if not name.startswith("lora_")}
    assert sorted(state) == sorted(stock.state_dict())
    statistics = {name: value for name, value in state.items() if name.startswith("weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(state["weight"], statistics, device="cpu")
    back = bnb.nn.Linear4bit(K, N, quant_type=quantize)
    back.weight, back.bias = weight, stock.bias
    assert torch.equal(back(x), want)


def test_loading_what_does_not_fit():
    layer = LoRALinear(K, N, RANK, quantize="nf4")
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"got a 4-bit weight of shape \[96, 128\], wanted \[96, 64\]"):
        layer.load_state_dict(LoRALinear(2 * K, N, RANK, quantize="nf4").state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="got a checkpoint without quant_state, wanted a 4-bit weight"):
        layer.load_state_dict(LoRALinear(K, N, RANK).state_dict())
    del state["weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict(state)


@formats
def test_dtype_changes_leave_the_statistics(quantize, double_quant):
    layer = trained(LoRALinear(K, N, RANK, quantize=quantize, double_quant=double_quant))
    before = dense(layer)
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert layer.lora_A.dtype == torch.bfloat16
    if quantize:
        assert torch.equal(dense(layer), before)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    assert_close(layer(x), oracle(layer, x))


def test_from_dense_linear_shares_it():
    linear = nn.Linear(K, N)
    layer = LoRALinear.from_linear(linear, RANK, 8, 0.1, rslora=True).eval()
    assert layer.weight.data_ptr() == linear.weight.data_ptr() and linear.weight.requires_grad
    assert (layer.rank, layer.alpha, layer.dropout, layer.scaling) == (RANK, 8, 0.1, 4.0)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), linear(x))


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_from_linear_quantised(quantize):
    linear = nn.Linear(K, N, bias=False)
    layer = LoRALinear.from_linear(linear, RANK, quantize=quantize, double_quant=True)
    weight = layer.base_weight()
    assert (weight.quant_type, weight.shape, bool(weight.nested), layer.bias) == (quantize, (N, K), True, None)
    assert (dense(layer) - linear.weight).norm() < 0.15 * linear.weight.norm()


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_from_linear4bit_shares_it(quantize):
    linear = bnb.nn.Linear4bit(K, N, quant_type="nf4").to("cpu")
    layer = LoRALinear.from_linear(linear, RANK, quantize=quantize)
    assert layer.quantize == "nf4" and layer.base_weight().codes.data_ptr() == linear.weight.data_ptr()
    x = torch.randn(3, K)
    assert_close(layer(x), linear(x))
    with pytest.raises(ValueError, match="quantize: got 'fp4', wanted None: linear is 'nf4' already"):
        LoRALinear.from_linear(linear, RANK, quantize="fp4")


# ---- Several adapters -----------------------------------------------------------------------------------------------


def several(**options):
    layer = trained(LoRALinear(K, N, RANK, 8, **options))
    assert [layer.add_adapter(2), layer.add_adapter(7, 3, rslora=True)] == [1, 2]
    for name, parameter in layer.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.2)
    return layer


def alone(layer, position, x):
    """What one of the adapters, or none, makes of x."""
    adapters = [[layer, *layer._further()][position]] if position >= 0 else []
    parts = zip(*((a.lora_A, a.lora_B, a.scaling) for a in adapters), strict=True) if adapters else ()
    return lora_linear(x, layer.base_weight(), layer.bias, *parts)


@pytest.mark.parametrize("index", [[2, -1, 0, 1, 2], torch.tensor([[0, 1], [2, 2], [-1, -1], [1, 0], [0, 0]])],
                         ids=["rows", "tokens"])  # fmt: skip
@formats
def test_each_row_has_its_adapter(quantize, double_quant, index):
    layer = several(quantize=quantize, double_quant=double_quant)
    x, grad = torch.randn(5, 2, K, requires_grad=True), torch.randn(5, 2, N)
    positions = torch.as_tensor(index).reshape(5, -1).expand(5, 2)
    y = layer(x, index)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    want = torch.empty_like(y)
    for position in range(-1, 3):
        want[positions == position] = alone(layer, position, x[positions == position])
    assert_close(y, want)
    got_gradients, want_gradients = (torch.autograd.grad(each, leaves, grad) for each in (y, want))
    for got, true in zip(got_gradients, want_gradients, strict=True):
        assert_close(got, true)


def test_an_index_is_of_the_base_as_it_is_unmerged():
    layer, x = several(), torch.randn(3, K)
    want = layer(x, [0, -1, 2])
    layer.merge()
    assert torch.equal(layer(x, [0, -1, 2]), want)


def test_dropout_of_several_adapters():
    layer = trained(LoRALinear(K, N, RANK, dropout=0.5))
    layer.add_adapter(RANK)
    nn.init.normal_(layer.adapter_1.lora_B)
    x = torch.randn(2, K)
    first, second = (layer(x, [0, 1]) for _ in range(2))
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    layer.eval()
    assert torch.equal(layer(x, [0, 1]), layer(x, [0, 1]))


def test_several_adapters_are_saved_and_loaded():
    layer, other, x = several(quantize="nf4"), several(quantize="nf4"), torch.randn(3, K)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, [0, 1, 2]), layer(x, [0, 1, 2]))
    assert torch.equal(copy.deepcopy(layer)(x, [0, 1, 2]), layer(x, [0, 1, 2]))


def test_errors_of_several_adapters():
    layer = several()
    with pytest.raises(ValueError, match="rank: got 0, wanted a positive integer"):
        layer.add_adapter(0)
    assert len(layer._further()) == 2
    with pytest.raises(ValueError, match="index"):
        layer(torch.randn(3, K), [0, 1, 3])
    with pytest.raises(ValueError, match=r"index: got one of shape \[2\], wanted one item for each row of x"):
        layer(torch.randn(3, K), [0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank: got 0, wanted a positive integer"),
        ({"rank": 2.0}, "rank: got 2.0, wanted a positive integer"),
        ({"alpha": math.inf}, "alpha: got inf, wanted a finite number"),
        ({"dropout": 1.0}, r"dropout: got 1.0, wanted a probability in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout: got -0.1, wanted a probability in \[0, 1\)"),
        ({"quantize": "int8"}, "quantize: got 'int8', wanted 'nf4', 'fp4' or None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(**({"in_features": K, "out_features": N, "rank": RANK} | arguments))
    with pytest.raises(ValueError, match=message):
        LoRALinear.from_linear(nn.Linear(K, N), **({"rank": RANK} | arguments))


def test_dtype_without_a_kernel():
    with pytest.raises(ValueError, match=r"dtype: got torch.float64, a dtype, wanted float32, bfloat16 or"):
        LoRALinear(K, N, RANK, dtype=torch.float64)


def test_from_linear_of_another_module():
    with pytest.raises(ValueError, match=r"linear: got a Conv1d, wanted a torch.nn.Linear or a Linear4bit"):
        LoRALinear.from_linear(nn.Conv1d(2, 2, 1), RANK)
    with pytest.raises(ValueError, match="weight: got a Params4bit without a quant_state"):
        LoRALinear.from_linear(bnb.nn.Linear4bit(K, N), RANK)


def test_repr():
    layer = LoRALinear(K, N, RANK, 8, 0.1)
    settings = "in_features=64, out_features=96, rank=4, alpha=8, dropout=0.1, bias=True, rslora=False, quantize=None"
    assert repr(layer) == f"LoRALinear({settings})"
    layer.merge()
    assert repr(layer) == f"LoRALinear({settings}, merged)"
