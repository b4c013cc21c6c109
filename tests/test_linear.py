"""Products of few rows with a dense weight against fp64, and the output layers of models that decode with it."""

import copy
import pickle

import pytest
import tolerances
import torch
import torch.nn.functional as F
from comparison import DTYPES, assert_close, error, short
from optional import if_installed
from tiny_models import DECODERS, tiny, tokens

import peft_kernels
from peft_kernels.ops import linear
from peft_kernels.ops.projections import Projection, Projections, project

peft, output_layer = map(if_installed, ("peft", "peft_kernels.integrations.transformers.output_layer"))

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels


def make_case(m, n, k, dtype=torch.float32):
    return torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 17), (3, 70, 64), (7, 401, 100), (8, 2, 5000)], ids=str)
def test_shapes(cpu_isa, shape, bias, dtype):
    x, weight, b = make_case(*shape, dtype)
    b = b if bias else None
    y = ops.linear(x, weight, b)
    assert y.dtype is dtype
    wanted = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert_close(y, wanted, tolerances.FP32_SUM + 2 * tolerances.ROUNDING[dtype])
    assert torch.equal(linear(x, weight, b), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_error_against_torch(dtype):
    x, weight, bias = make_case(4, 300, 1000, dtype)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    theirs = error(F.linear(x, weight, bias), wanted)
    assert error(linear(x, weight, bias), wanted) <= tolerances.VERSUS_STOCK * theirs


def test_strides_and_dimensions():
    x, weight, bias = make_case(6, 30, 18, torch.bfloat16)
    wanted = linear(x, weight, bias)
    assert torch.equal(linear(F.pad(x, (1, 4))[:, 1:19], F.pad(weight, (2, 3))[:, 2:20], bias), wanted)
    assert torch.equal(linear(x.T.contiguous().T, weight, bias), wanted)
    assert torch.equal(linear(x.view(2, 3, 18), weight, bias).view(6, 30), wanted)
    assert torch.equal(linear(x[0], weight, bias), wanted[0])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(shape):
    x, weight, bias = make_case(*shape)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("count", [2, 5])
def test_thread_count_changes_no_bit(threads, count):
    case = make_case(3, 3001, 200, torch.bfloat16)
    wanted = linear(*case)
    threads(count)
    assert torch.equal(linear(*case), wanted)


@pytest.mark.parametrize("change", ["rows", "gradient", "autocast", "dtypes", "fp64", "weight", "sparse"])
def test_what_torch_does(change):
    x, weight, bias = make_case(9 if change == "rows" else 2, 12, 16)
    if change == "gradient":
        weight.requires_grad_()
    if change == "fp64":
        x, weight, bias = x.double(), weight.double(), bias.double()
    if change == "sparse":
        weight, bias = weight.to_sparse_csr(), None
    if change == "weight":
        weight = weight.T.contiguous().T
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        if change == "dtypes":
            with pytest.raises(RuntimeError):
                linear(x, weight.half(), bias)
            return
        got, wanted = linear(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(got, wanted) and got.dtype is wanted.dtype and got.requires_grad == wanted.requires_grad


def test_opcheck_and_compile():
    x, weight, bias = make_case(2, 5, 7)
    torch.library.opcheck(ops.linear.default, (x, weight, bias))
    torch.library.opcheck(ops.linear.default, (x[0], weight, None))
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, bias), linear(x, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 5)}, r"x: got shape \[2, 5\], wanted \[2, 4\]"),
        ({"weight": torch.ones(4)}, r"weight: got float32 \[4\], wanted a matrix \[N, K\]"),
        ({"weight": torch.ones(3, 4).double()}, "weight: got float64, wanted float32, bfloat16 or float16"),
        ({"bias": torch.ones(4)}, r"bias: got shape \[4\], wanted \[3\]"),
        ({"weight": torch.ones(3, 4, device="meta")}, "weight: got a tensor on meta, wanted one on cpu, where x is"),
        ({"bias": torch.ones(3, device="meta")}, "bias: got a tensor on meta, wanted one on cpu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ops.linear(*({"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3)} | change).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("m", [1, 5, 8])
def test_all_that_is_added_is_rounded_once(cpu_isa, m, dtype):
    # In one launch: what is between the product and the sum of everything would be rounded on its way.
    n, k, rank = 37, 50, 3
    x, weight, bias = make_case(m, n, k, dtype)
    add, lora_A, lora_B = torch.randn(m, n).to(dtype), torch.randn(rank, k), torch.randn(n, rank)
    weights = [weight] + [torch.randn(n, k).to(other) for other in DTYPES if other is not dtype]
    for stored in weights:
        y = ops.lora_linear(x, (stored,), (), [lora_A], [lora_B], [0.5], bias=bias, add=add, out_dtype=dtype)
        wanted = (
            x.double() @ stored.double().T + bias + add + 0.5 * (x.double() @ lora_A.T.double()) @ lora_B.T.double()
        )
        assert_close(y, wanted, tolerances.product(dtype, dtype))


@pytest.mark.parametrize("adapters", [0, 2])
def test_projections_make_one_call(monkeypatch, capfd, adapters):
    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")
    n, k = 41, 51 + adapters  # no other test's, since each plan is printed once
    x, weight, bias = make_case(2, n, k, torch.bfloat16)
    lora_A, lora_B = [torch.randn(4, k)] * adapters, [torch.randn(n, 4)] * adapters
    project(x, Projections([Projection(weight, bias, lora_A, lora_B, [1.0] * adapters)]))
    (line,) = capfd.readouterr().err.splitlines()
    assert f"n={n} k={k}" in line and line.endswith(": dot (few rows)")


@pytest.mark.parametrize("name", DECODERS)
def test_output_layer(name):
    model = tiny(name).eval()
    head, (ids, padding) = model.get_output_embeddings(), tokens()
    options = {"attention_mask": padding, "max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(ids, **options)
    report = peft_kernels.optimize(model)
    assert ("torch.Linear", output_layer.FusedOutputLayer.remark) in [(layer.kind, layer.reason) for layer in report]
    assert type(head) is output_layer.Linear and isinstance(head, torch.nn.Linear)
    assert torch.equal(model.generate(ids, **options), wanted)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.generate(ids, **options), wanted)
    peft_kernels.restore(model)
    assert type(head) is torch.nn.Linear


def test_output_layers_that_are_left_alone():
    model = tiny("llama")
    model.lm_head.forward = lambda x: x
    peft_kernels.optimize(model)
    assert type(model.lm_head) is torch.nn.Linear
    for model in (tiny("bert"), tiny("llama").double()):
        peft_kernels.optimize(model)
        assert not [layer for layer in model.modules() if type(layer) is output_layer.Linear]


@pytest.mark.parametrize("config", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_adapters_around_an_output_layer(config):
    model = tiny("llama")
    peft_kernels.optimize(model)
    model = peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"]} | config))
    ids, padding = tokens()
    wanted = model(ids, attention_mask=padding).logits
    peft_kernels.optimize(model)
    assert torch.allclose(model(ids, attention_mask=padding).logits, wanted, atol=1e-5)
    peft_kernels.restore(model)
    assert not [layer for layer in model.modules() if type(layer) is output_layer.Linear]
