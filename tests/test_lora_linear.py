"""The lora_linear family against the fp64 oracle and stock PEFT: numerics, shapes, strides, every instruction set."""

import pytest
import tolerances
import torch
import torch.nn.functional as F
from comparison import Made, mode_id, views_of_x
from hypothesis import given
from hypothesis import strategies as st
from lora_linear_cases import (
    BASES,
    DTYPES,
    assert_close,
    error,
    expected,
    magnitudes,
    make_case,
    rms,
    run,
    run_stock,
    short,
)

from peft_kernels import cpu
from peft_kernels.ops import lora_linear, quantize_4bit
from peft_kernels.testing.reference.philox import dropout_mask

pytestmark = pytest.mark.kernels

# Decode and middle shapes, where blocks begin with rows of the weight; the others straddle rows, are odd, end in the
# middle of vectors and panels, or are longer than one block of k.
SHAPES = [
    (1, 64, 128), (2, 33, 64), (3, 1, 96), (4, 40, 320), (7, 17, 576), (8, 130, 192), (34, 21, 1600),
    (1, 9, 63), (5, 12, 257), (8, 30, 1), (9, 70, 257), (33, 65, 64), (70, 31, 100), (128, 129, 705), (17, 700, 40),
]  # fmt: skip
# (x, adapters)
MODES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]


def shape_id(shape):
    return "m{}-n{}-k{}".format(*shape)


def check(case, compute_dtype=None, out_dtype=None):
    """y and all gradients are as near to the oracle's as their dtypes allow."""
    options = {"compute_dtype": compute_dtype, "out_dtype": out_dtype}
    actual, wanted = run(case, **options), expected(case)
    assert actual.keys() == wanted.keys()
    compute_dtype, out_dtype = compute_dtype or case.x.dtype, out_dtype or case.x.dtype
    assert actual["y"].dtype == out_dtype
    for name, leaf in case.leaves().items():
        assert actual[name].dtype == leaf.dtype, name
    bounds = {
        "y": tolerances.product(compute_dtype, out_dtype),
        "x": tolerances.product(compute_dtype, case.x.dtype),
        "bias": tolerances.product(torch.float32, torch.float32),
    }
    if "weight" in wanted:
        bounds["weight"] = tolerances.product(compute_dtype, case.weight.dtype)
    for name, value in wanted.items():
        tolerance = bounds.get(name) or tolerances.adapter_gradient(case.leaves()[name].dtype)
        assert_close(actual[name], value, tolerance, name)


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes(backend, shape, mode):
    check(make_case(*shape, (5,), *mode, blocksize=32 if shape[2] == 96 else 64))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("base", ["nf4", "nested"])
def test_few_rows(cpu_isa, base, weight_dtype):
    """Each number of rows that may have a kernel of its own, and outputs that are no multiple of what it takes."""
    for dtype in (torch.bfloat16, torch.float32):
        for outputs, columns, blocksize in ((7, 192, 64), (101, 1088, 64), (5, 256, 128), (6, 96, 32)):
            for rows in range(1, 14 if blocksize == 64 else 6):
                case = make_case(
                    rows, outputs, columns, (5,), dtype, base=base, weight_dtype=weight_dtype, blocksize=blocksize
                )
                y = lora_linear(case.x, case.weight, case.bias, case.lora_A, case.lora_B, case.scaling)
                assert_close(y, expected(case)["y"], tolerances.product(dtype, dtype), f"{rows} rows")


@pytest.mark.parametrize("columns", [1344, 4160])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=short)
def test_some_rows(cpu_isa, weight_dtype, columns):
    """The numbers of rows that only long ones have a kernel for, in one part and in several."""
    for dtype in DTYPES:
        for rows in (3, 14, 16, 17, 25, 32, 33):
            case = make_case(rows, 31, columns, (5,), dtype, weight_dtype=weight_dtype)
            y = lora_linear(case.x, case.weight, case.bias, case.lora_A, case.lora_B, case.scaling)
            assert_close(y, expected(case)["y"], tolerances.product(dtype, dtype), f"{rows} rows")


@pytest.mark.parametrize("payload", [0x7FFFFFFF, 0x7F800001, -1], ids=["largest", "signalling", "negative"])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=short)
def test_nan_of_a_block_propagates(cpu_isa, weight_dtype, payload):
    """Whatever its bits are, of which rounding must not make a number."""
    for rows in (1, 2, 4, 8, 40):
        case = make_case(rows, 12, 1344, (), weight_dtype, weight_dtype=weight_dtype)
        case.weight.absmax[1344 // 64 * 5 + 3] = torch.tensor(payload, dtype=torch.int32).view(torch.float32)
        y = lora_linear(case.x, case.weight)
        assert y[:, 5].isnan().all() and y[:, torch.arange(12) != 5].isfinite().all(), rows


@pytest.mark.parametrize("compute_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("base", BASES)
def test_bases(backend, base, weight_dtype, compute_dtype):
    for rows in (3, 21):
        check(make_case(rows, 50, 128, base=base, weight_dtype=weight_dtype), compute_dtype)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_output_dtype(platform, base, out_dtype):
    for rows in (3, 21):
        check(make_case(rows, 50, 128, x_dtype=torch.bfloat16, base=base, out_dtype=out_dtype), out_dtype=out_dtype)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("rank", [1, 2, 7, 8, 17, 64, 512])
def test_ranks(backend, rank, rows):
    check(make_case(rows, 66, 64, (rank,)))
    check(make_case(rows, 66, 64, (rank,), torch.bfloat16, torch.bfloat16, base="dense"))


@pytest.mark.parametrize("rows", [6, 75])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_several_adapters(backend, base, rows):
    case = make_case(rows, 66, 192, (3, 16, 1, 9), base=base, dropout=(0.5, 0.0, 0.1, 0.9))
    case.lora_A[1], case.lora_B[2] = case.lora_A[1].bfloat16(), case.lora_B[2].half()
    case.scaling[1], case.scaling[2] = -0.5, 0.0
    actual, wanted = run(case), expected(case)
    assert not actual["lora_A2"].any() and not actual["lora_B2"].any()
    for name, value in wanted.items():
        tolerance = tolerances.ROUNDING[case.leaves()[name].dtype] if name != "y" else 0
        assert_close(actual[name], value, tolerances.FP32_SUM + 2 * tolerance, name)


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_no_adapter(platform, base):
    for rows in (1, 30):
        case = make_case(rows, 40, 128, (), base=base)
        check(case)
        case.bias = None
        check(case)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_bias_dtype(platform, base, bias_dtype):
    for rows in (1, 30):
        case = make_case(rows, 40, 128, base=base)
        case.bias = case.bias.to(bias_dtype)
        actual, wanted = run(case), expected(case)
        assert_close(actual["y"], wanted["y"], tolerances.FP32_SUM)
        assert_close(actual["bias"], wanted["bias"], tolerances.adapter_gradient(bias_dtype))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (600, 1100, 4096), (5000, 40, 4096)], ids=shape_id)
@pytest.mark.parametrize("mode", MODES[:3], ids=mode_id)
def test_large_shapes(processor, shape, mode):
    check(make_case(*shape, (16,), *mode, dropout=(0.1,)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(3, 40000, 576), (32, 9000, 2048), (64, 100, 16384), (150, 20000, 1152)], ids=shape_id
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_waves_and_splits(processor, shape, dtype):
    """More tiles than a card has room for at once, and sums that several of its CTAs share."""
    check(make_case(*shape, (8,), dtype, base="nested"))


@given(
    shape=st.tuples(st.integers(1, 128), st.integers(1, 140), st.integers(1, 300)),
    ranks=st.lists(st.integers(1, 40), max_size=3),
    mode=st.sampled_from(MODES),
    base=st.sampled_from(BASES),
    weight_dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from([32, 64, 256]),
    drops=st.booleans(),
    data_seed=st.integers(0, 2**31),
)
def test_random_cases(backend, shape, ranks, mode, base, weight_dtype, blocksize, drops, data_seed):
    torch.manual_seed(data_seed)
    dropout = (0.3, 0.0, 0.7)[: len(ranks)] if drops else ()
    case = make_case(*shape, ranks, *mode, base, weight_dtype, blocksize, bias=drops, dropout=dropout)
    actual, wanted, scales = run(case), expected(case), magnitudes(case)
    x_dtype, adapter_dtype = mode
    for name, value in wanted.items():
        if name in ("y", "x", "weight"):
            tolerance = tolerances.product(x_dtype, weight_dtype if name == "weight" else x_dtype)
        else:
            tolerance = tolerances.adapter_gradient(torch.float32 if name == "bias" else adapter_dtype)
        # Small tensors can cancel: what is summed is the measure, not the sum. One number's roundings may all be large.
        tolerance *= 1.5 if value.numel() == 1 else 1
        assert rms(actual[name].double() - value) <= tolerance * rms(scales[name]), name


# ---- against stock -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 8, 96])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("mode", MODES[:5], ids=mode_id)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_error_against_stock(platform, base, mode, autocast, rows):
    x_dtype, adapter_dtype = mode
    # Enough elements, so that the ratio of two rms errors is no accident.
    case = make_case(rows, 384, 512, (16,), *mode, base=base, weight_dtype=x_dtype, bias=False)
    # As in trained models, the branch is smaller than the base product. On a GPU the branch is rounded before the base
    # product is added to it; stock rounds the base product instead.
    case.scaling[0] /= 4
    with torch.autocast(platform, torch.bfloat16, enabled=autocast):
        actual, theirs = run(case), run_stock(case)
    wanted = expected(case)
    for name in theirs:
        ours, stocks = error(actual[name], wanted[name]), error(theirs[name], wanted[name])
        if autocast or adapter_dtype != torch.float32:
            assert ours <= tolerances.VERSUS_STOCK * stocks, name
        elif name in ("lora_A0", "lora_B0"):
            assert ours <= tolerances.BRANCH_FP32, name
        else:
            assert ours <= tolerances.VERSUS_STOCK * stocks or ours <= tolerances.FP32_SUM, name


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_nan_and_infinity_propagate(backend, rows, base, special):
    case = make_case(rows, 30, 128, (4,), base=base)
    row, column = rows // 2, 77
    case.x[row, column] = special
    actual = run(case)["y"]
    stock = F.linear(case.x, case.dense_weight(), case.bias)
    stock = stock + case.scaling[0] * (case.x @ case.lora_A[0].T) @ case.lora_B[0].T
    assert torch.equal(actual.isnan(), stock.isnan())
    assert torch.equal(actual.isinf(), stock.isinf())
    assert torch.equal(actual[stock.isinf()], stock[stock.isinf()])
    others = torch.arange(rows) != row
    assert actual[others].isfinite().all() and not actual[row].isfinite().any()


# ---- the product with a dense weight, where it is not torch's ----------------------------------------------------


@pytest.fixture
def own_products(cpu_isa, monkeypatch):
    monkeypatch.setattr("peft_kernels.cpu.outruns_torch", lambda: True)
    return cpu_isa


def in_columns(weight):
    """The same numbers, lying as [K, N]: what the weight of transformers' Conv1D is, transposed."""
    return weight.T.contiguous().T


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, in_columns], ids=["rows", "columns"])
@pytest.mark.parametrize(
    "shape", [(9, 70, 257), (33, 65, 64), (128, 129, 705), (20, 300, 1100), (17, 1, 33)], ids=shape_id
)
def test_own_product(own_products, shape, layout):
    for ranks, dropout in (((), ()), ((5, 17), (0.5, 0.0))):
        case = make_case(*shape, ranks, base="dense", dropout=dropout)
        case.weight = layout(case.weight)
        check(case)
        case.x, case.bias = case.x.bfloat16(), None
        case.grad_y = case.grad_y.bfloat16()
        check(case, compute_dtype=torch.float32)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, in_columns], ids=["rows", "columns"])
@pytest.mark.parametrize("columns", [768, 4096])
def test_own_product_errs_no_more_than_torchs(own_products, columns, layout):
    case = make_case(300, 260, columns, (16,), base="dense")
    case.weight = layout(case.weight)
    actual, theirs, wanted = run(case), run_stock(case), expected(case)
    for name in theirs:
        assert error(actual[name], wanted[name]) <= tolerances.VERSUS_STOCK * error(theirs[name], wanted[name]), name


def test_own_product_copies_no_weight(own_products):
    case = make_case(40, 300, 200, base="dense")
    case.weight = in_columns(case.weight)
    x = case.x.requires_grad_()
    with Made() as made:
        lora_linear(x, case.weight, case.bias, case.lora_A, case.lora_B, case.scaling).sum().backward()
    assert made.tensors and max(tensor.numel() for tensor in made.tensors) < case.weight.numel()


# ---- the product with a 4-bit weight, where it is torch's ---------------------------------------------------------


@pytest.fixture
def by_torch(monkeypatch, capfd):
    """Where it is, from 512 rows of fp32 on; a forward and a backward have to be printed as such."""
    if "avx2" not in cpu.isas():
        pytest.skip("this processor lacks avx2")
    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")
    with cpu.use_isa("avx2"):
        yield
    plans = [line for line in capfd.readouterr().err.splitlines() if ": panels (" in line]
    assert {line.split()[2] for line in plans} == {"forward", "backward"}, plans


@pytest.mark.parametrize("base", ["nf4", "nested"])
@pytest.mark.parametrize("shape", [(512, 70, 257), (513, 33, 64), (530, 129, 704)], ids=shape_id)
def test_product_by_torch(by_torch, shape, base):
    rows, *size = shape
    rows += base == "nested"  # each plan is printed once
    for ranks, dropout in (((), ()), ((5, 17), (0.5, 0.0))):
        case = make_case(rows, *size, ranks, base=base, dropout=dropout)
        check(case)
        case.x, case.bias = F.pad(case.x, (3, 5))[:, 3:-5], None
        check(case)


def test_product_by_torch_in_panels(by_torch):
    """Two of them, of 512 rows and of 8. It errs no more than stock."""
    case = make_case(512, 520, 4096, (16,))
    actual, stock, wanted = run(case), run_stock(case), expected(case)
    for name in stock:
        assert error(actual[name], wanted[name]) <= tolerances.VERSUS_STOCK * error(stock[name], wanted[name]), name


def test_product_by_torch_is_added(by_torch):
    case, ops = make_case(515, 40, 128), torch.ops.peft_kernels
    adapters = case.lora_A, case.lora_B, case.scaling
    add, add_x = torch.randn(515, 40), torch.randn(515, 128)
    wanted = expected(case)
    y, s = ops.lora_linear_forward(case.x, *case.weight.arguments, *adapters, bias=case.bias, add=add)
    grads = ops.lora_linear_backward(
        case.grad_y, case.x, s, *case.weight.arguments, *adapters, True, [False], [False], add=add_x
    )
    assert_close(y, wanted["y"] + add, tolerances.FP32_SUM, "y")
    assert_close(grads[0], wanted["x"] + add_x, tolerances.FP32_SUM, "x")


# ---- strides and empty tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("view", list(views_of_x(torch.zeros(2, 1))))
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("rows", [4, 38])
def test_strided_x(platform, rows, base, view):
    case = make_case(rows, 40, 65, base=base)
    wanted = run(case)
    x = views_of_x(case.x)[view].detach().requires_grad_()
    y = lora_linear(x, case.weight, case.bias, case.lora_A, case.lora_B, case.scaling)
    y.backward(case.grad_y.view_as(y))
    assert y.shape == (*x.shape[:-1], 40)
    assert torch.equal(y.view_as(wanted["y"]), wanted["y"])
    assert torch.equal(x.grad.reshape(rows, 65), wanted["x"])


@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_strided_adapters(platform, base):
    """PEFT leaves such, where it combines adapters by their singular values."""
    case = make_case(6, 40, 65, (3, 1), base=base)
    wanted = run(case)
    for transposed in (case.lora_A, case.lora_B):
        transposed[:] = [tensor.T.contiguous().T for tensor in transposed]
    for name, value in run(case).items():
        assert torch.equal(value, wanted[name]), name


def test_expanded_and_one_dimensional_x(platform):
    case = make_case(6, 40, 65)
    arguments = case.weight, case.bias, case.lora_A, case.lora_B, case.scaling
    row = case.x[0]
    y = lora_linear(row, *arguments)
    assert y.shape == (40,)
    assert_close(lora_linear(row.expand(6, 65), *arguments), y.expand(6, 40), tolerances.FP32_SUM)
    ones = torch.ones(1, 1)
    assert_close(
        lora_linear(ones.expand(9, 65), *arguments), lora_linear(torch.ones(9, 65), *arguments), tolerances.FP32_SUM
    )


@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_strided_grad_y(platform, base):
    case = make_case(20, 40, 65, base=base)
    for grad_y in (case.grad_y.T.contiguous().T, torch.ones(()).expand(20, 40), torch.randn(40).expand(20, 40)):
        case.grad_y = grad_y
        actual = run(case)
        case.grad_y = grad_y.contiguous()
        for name, value in run(case).items():
            assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0), (20, 5, 0), (0, 0, 0)], ids=shape_id)
@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_empty(platform, base, shape):
    for ranks in ((), (4, 2)):
        case = make_case(*shape, ranks, base=base)
        actual, wanted = run(case), expected(case)
        for name, value in wanted.items():
            assert_close(actual[name], value, tolerances.FP32_SUM, name)


# ---- dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [1e-9, 1e-3, 0.25, 0.999999])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_dropout(backend, base, probability):
    for rows in (2, 35):
        check(make_case(rows, 40, 320, dropout=(probability,), base=base))


def test_seeds_come_from_torchs_generator(platform):
    case = make_case(20, 24, 64, dropout=(0.5,))
    arguments = case.x, case.weight, None, case.lora_A, case.lora_B, case.scaling, case.dropout
    torch.manual_seed(3)
    first, second = lora_linear(*arguments), lora_linear(*arguments)
    torch.manual_seed(3)
    assert torch.equal(lora_linear(*arguments), first)
    assert not torch.equal(first, second)


def test_adapters_drop_independently(platform):
    x, weight = torch.ones(64, 512), quantize_4bit(torch.zeros(1, 512))
    a, b = torch.eye(512), torch.zeros(1, 512)
    forward = torch.ops.peft_kernels.lora_linear_forward
    _, s = forward(x, *weight.arguments, [a, a], [b, b], [1.0, 1.0], dropout=[0.5, 0.25], seeds=torch.tensor([5, 6]))
    assert torch.equal(s[:, :512] != 0, dropout_mask(5, 64, 512, 0.5))
    assert torch.equal(s[:, 512:] != 0, dropout_mask(6, 64, 512, 0.25))
