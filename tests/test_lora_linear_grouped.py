"""Batches in which each example, or each row, has its own LoRA adapter, against the fp64 oracle."""

from dataclasses import replace

import pytest
import tolerances
import torch
from comparison import Made, mode_id, same_results, views_of_x
from hypothesis import given
from hypothesis import strategies as st
from lora_linear_cases import (
    BASES,
    DTYPES,
    assert_close,
    error,
    expected,
    magnitudes,
    make_batch,
    rms,
    run,
    short,
    with_index,
)

from peft_kernels.ops import NF4Weight, lora_linear, lora_linear_grouped
from peft_kernels.testing.reference.lora_linear_grouped import lora_linear_grouped as oracle

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels

INDICES = [[0, 0, 1, 1, 2, 2], [2, 0, 1, 0, -1, 2], [1] * 6, [-1] * 6, [-1, -1, 0, -1, 2, -1]]
# (tokens of each of six examples, N, K): a few rows; more than one block of them; odd sizes; a task's rows and more.
SHAPES = [(1, 64, 128), (1, 33, 257), (3, 1, 96), (7, 66, 64), (50, 130, 31)]
MODES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def call(case, index, function=lora_linear_grouped, **options):
    weight = case.weight if function is lora_linear_grouped else case.dense_weight()
    return function(case.x, weight, case.bias, case.lora_A, case.lora_B, case.scaling, index, **options)


def used(case, index):
    """The adapters that have rows."""
    return set(torch.as_tensor(index).flatten().tolist()) if case.x.shape[:-1].numel() else set()


def check(case, index, compute_dtype=None, out_dtype=None):
    """y and all gradients are as near to the oracle's as their dtypes allow; adapters without rows have none."""
    actual = run(case, with_index(index), compute_dtype=compute_dtype, out_dtype=out_dtype)
    wanted = expected(case, with_index(index, oracle))
    compute_dtype, out_dtype = compute_dtype or case.x.dtype, out_dtype or case.x.dtype
    assert actual["y"].dtype == out_dtype and actual["y"].is_contiguous()
    rounds_once = isinstance(case.weight, NF4Weight) and case.x.is_cpu  # else the base product is rounded by itself
    bounds = {
        "y": tolerances.product(compute_dtype, out_dtype) * (1 if rounds_once else 1.5),
        "x": tolerances.product(compute_dtype, case.x.dtype) * (1 if rounds_once else 1.5),
        "bias": tolerances.product(torch.float32, torch.float32),
    }
    if "weight" in wanted:
        bounds["weight"] = tolerances.product(compute_dtype, case.weight.dtype)
    for name, value in wanted.items():
        if name.startswith("lora_") and int(name[6:]) not in used(case, index):
            assert actual[name] is None and not value.any(), name
            continue
        tolerance = bounds.get(name) or tolerances.adapter_gradient(case.leaves()[name].dtype)
        assert_close(actual[name], value, tolerance, name)


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape, base, mode):
    for index in INDICES[1:3]:
        check(make_batch(*shape, *mode, base, blocksize=32 if shape[2] == 96 else 64), index)


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_orders(backend, index, base):
    check(make_batch(2, 70, 128, base=base), index)


@pytest.mark.parametrize("dropout", [(), (0.5, 0.0, 0.25)], ids=["plain", "dropout"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("tokens", [1, 25])
def test_an_adapter_for_each_row(backend, tokens, base, dropout):
    """In any order, by any kind of index, and dropped by the masks of the whole x."""
    case = make_batch(tokens, 70, 136, base=base, ranks=(7, 17, 1), dropout=dropout)
    index = torch.randint(-1, 3, (6, tokens))
    check(case, index)
    wanted = call(case, index, dropout=case.dropout, seeds=case.seeds)
    for same in (index.tolist(), index.int(), index.to(torch.int8), index.T.contiguous().T):
        assert torch.equal(call(case, same, dropout=case.dropout, seeds=case.seeds), wanted)


@pytest.mark.parametrize("dropout", [(), (0.5, 0.25, 0.0)], ids=["plain", "dropout"])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_mixed_adapters(backend, base, dropout):
    """Of several ranks, dtypes and scalings, one without rows."""
    case = make_batch(9, 66, 192, base=base, ranks=(3, 16, 40), dropout=dropout)
    case.lora_A[0], case.lora_B[2] = case.lora_A[0].bfloat16(), case.lora_B[2].half()
    case.scaling[0], case.scaling[2] = -0.5, 0.0
    check(case, [2, 0, -1, 2, 0, 2])


def test_one_adapter_for_all_rows(platform):
    case = make_batch(3, 40, 65)
    wanted = call(case, [1] * 6)
    assert torch.equal(call(case, torch.tensor(1)), wanted)
    case.x = case.x[0, 0]
    assert_close(call(case, torch.tensor(1)), wanted[0, 0], tolerances.FP32_SUM)


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_no_adapters(platform, base):
    check(make_batch(3, 40, 65, base=base, ranks=()), [-1] * 6)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_output_dtype(platform, base, out_dtype):
    check(make_batch(3, 50, 128, torch.bfloat16, base=base), INDICES[1], torch.float32, out_dtype)


@given(
    st.integers(1, 9), st.integers(1, 300), st.integers(1, 140), st.integers(1, 140),
    st.lists(st.integers(1, 70), min_size=1, max_size=5), st.data(),
)  # fmt: skip
def test_any_shape(cpu_isa, examples, rows, n, k, ranks, data):
    index = data.draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=examples, max_size=examples))
    tokens = -(-rows // examples)
    if data.draw(st.booleans()):
        index = torch.randint(-1, len(ranks), (examples, tokens))
    dropout = data.draw(st.sampled_from([(), (0.3,) * len(ranks)]))
    case = make_batch(tokens, n, k, base="dense", examples=examples, ranks=ranks, dropout=dropout)
    # Small tensors can cancel: what is summed is the measure, not the sum. One number's roundings may all be large.
    actual, scales = run(case, with_index(index)), magnitudes(case, with_index(index, oracle))
    for name, value in expected(case, with_index(index, oracle)).items():
        tolerance = tolerances.FP32_SUM * (1.5 if value.numel() == 1 else 1)
        got = torch.zeros_like(value) if actual[name] is None else actual[name].double()
        assert rms(got - value) <= tolerance * rms(scales[name]), name


@pytest.mark.parametrize("tokens", [1, 40])
def test_threads(threads, cpu_isa, tokens):
    """Enough work for several, and the same bits whoever does it."""
    case = make_batch(tokens, 200, 512, torch.bfloat16, ranks=(64, 65, 33), bias=False, dropout=(0.2, 0.0, 0.5))
    wanted = run(case, with_index(INDICES[1]))
    threads(4)
    for _ in range(5):
        same_results(run(case, with_index(INDICES[1])), wanted)


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_gradients_are_those_of_separate_calls(cpu_isa, dtype, base):
    """Bit for bit for all that the same kernels compute of the same numbers; the others to rounding."""
    case = make_batch(40, 70, 320, dtype, base=base, ranks=(16, 7, 33), bias=False)
    index = torch.randint(-1, 3, (6, 40))
    actual = run(case, with_index(index))
    for i in range(3):
        rows = index == i
        part = replace(case, x=case.x[rows], grad_y=case.grad_y[rows], lora_A=case.lora_A[i : i + 1],
                       lora_B=case.lora_B[i : i + 1], scaling=case.scaling[i : i + 1])  # fmt: skip
        alone = run(part)
        assert_close(actual["x"][rows], alone["x"], tolerances.product(dtype, dtype), "x")
        assert_close(actual[f"lora_B{i}"], alone["lora_B0"], tolerances.FP32_SUM)
        if cpu_isa == "amx" and dtype == torch.bfloat16:  # whose tiles add up other terms
            assert_close(actual[f"lora_A{i}"], alone["lora_A0"], tolerances.FP32_SUM)
        else:
            assert torch.equal(actual[f"lora_A{i}"], alone["lora_A0"])


def test_example_is_what_it_is_alone(cpu_isa):
    """Whatever the others are: an adapter that overflowed is its own examples' trouble."""
    case = make_batch(2, 70, 128)
    case.lora_B[2].fill_(float("inf"))
    case.lora_A[1][0, 5] = float("nan")
    index = INDICES[1]
    y = call(case, index)
    for b, i in enumerate(index):
        some = slice(i, i + 1) if i >= 0 else slice(0)
        adapter = case.lora_A[some], case.lora_B[some], case.scaling[some]
        alone = lora_linear(case.x[b : b + 1], case.weight, case.bias, *adapter)
        assert y[b].isfinite().all() == (i <= 0)
        torch.testing.assert_close(y[b], alone[0], equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 40])
def test_rounds_once_on_a_4bit_base(cpu_isa, tokens):
    case = make_batch(tokens, 384, 512, torch.bfloat16, torch.bfloat16, bias=False)
    weight = case.dense_weight().bfloat16()  # as the product has it
    once = oracle(case.x, weight, None, case.lora_A, case.lora_B, case.scaling, INDICES[1]).bfloat16()
    wanted = call(case, INDICES[1], oracle)
    assert error(call(case, INDICES[1]), wanted) <= 1.01 * error(once, wanted)


@pytest.mark.parametrize("view", ["row-strided", "every-second-row", "transposed", "inner-strided", "3d-transposed"])
def test_strided_x(platform, view):
    case = make_batch(4, 40, 65)
    x = views_of_x(case.x.view(24, 65))[view]
    index = (torch.arange(24) % 4 - 1).view(x.shape[:-1])
    case.x = x.contiguous()
    wanted = call(case, index)
    case.x = x
    assert torch.equal(call(case, index), wanted)
    case.grad_y = torch.randn(*x.shape[:-1], 40)
    wanted = run(replace(case, x=x.contiguous()), with_index(index))
    case.grad_y = case.grad_y.transpose(0, 1).contiguous().transpose(0, 1)
    same_results(run(case, with_index(index)), wanted)


def test_strided_adapters(platform):
    """PEFT leaves such, where it combines adapters by their singular values."""
    case = make_batch(2, 40, 65)
    wanted = call(case, INDICES[1])
    for transposed in (case.lora_A, case.lora_B):
        transposed[:] = [tensor.T.contiguous().T for tensor in transposed]
    assert torch.equal(call(case, INDICES[1]), wanted)


def test_more_dimensions(platform):
    case = make_batch(6, 40, 65)
    wanted = call(case, INDICES[1])
    case.x = case.x.view(6, 2, 3, 65)
    assert torch.equal(call(case, INDICES[1]), wanted.view(6, 2, 3, 40))


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_empty(platform, base, shape):
    check(make_batch(*shape, base=base), INDICES[1])
    check(make_batch(*shape, base=base, examples=0), [])


def test_no_copy_of_x_or_of_a_weight(cpu_isa):
    case = make_batch(3, 300, 200, base="dense")
    for index in (INDICES[1], torch.randint(-1, 3, (6, 3))):
        y = call(replace(case, x=case.x.requires_grad_()), index)
        with Made() as made:
            call(case, index)
            y.backward(case.grad_y)
        assert made.tensors and max(tensor.numel() for tensor in made.tensors) <= 18 * 300


# ---- errors ------------------------------------------------------------------------------------------------------

BAD = {
    "x-vector": ({"x": torch.ones(128)}, r"index: got one of shape \[6\], wanted one item .* x is float32 \[128\]"),
    "x-columns": ({"x": torch.ones(6, 127)}, r"x: got float32 \[6, 127\], wanted \[..., 128\]"),
    "index-short": ({"index": [0, 1]}, r"index: got one of shape \[2\], wanted one item for each row of x, or x\[b\]"),
    "index-long": ({"index": torch.zeros(6, 3, 128, dtype=torch.int64)}, r"index: got one of shape \[6, 3, 128\]"),
    "index-tokens": ({"index": torch.zeros(6, 2, dtype=torch.int64)}, r"index: got .*\[6, 2\].*x is float32 \[6, 3,"),
    "index-float": ({"index": torch.zeros(6)}, r"index: got float32 \[6\], wanted a tensor, list or tuple of integers"),
    "index-bool": ({"index": torch.zeros(6, dtype=torch.bool)}, r"index: got bool \[6\], wanted a tensor, list"),
    "index-floats": ({"index": [0.0] * 6}, r"index: got float32 \[6\], wanted a tensor, list or tuple of integers"),
    "index-ragged": ({"index": [[0], [0, 1]] * 3}, r"index: got \[\[0\], .*, a list, wanted a tensor, list or tuple"),
    "index-none": ({"index": None}, "index: got None, a NoneType, wanted a tensor, list or tuple of integers"),
    "index-device": (
        {"index": torch.zeros(6, dtype=torch.int64, device="meta")}, "index: got a tensor on meta, wanted one on cpu"
    ),
    "index-high": ({"index": [0, 1, 2, 3, 0, 0]}, "index: got 3, wanted -1, or one of 3 items of lora_A"),
    "index-low": ({"index": [0, -2, 0, 0, 0, 0]}, "index: got -2, wanted -1"),
    "A-missing": ({"lora_A": []}, "lora_B: got 3 items, wanted 0 items"),
    "A-tensor": ({"lora_A": torch.ones(8, 128)}, "lora_A: got .*, wanted a list or tuple"),
    "B-columns": ({"lora_B": [torch.ones(24, 8)] * 3}, r"lora_B: got shape \[24, 8\], wanted \[24, 4\]"),
    "scaling-nan": ({"scaling": [1.0, float("nan"), 1.0]}, "scaling: got nan, wanted a finite"),
    "dropout-one": ({"dropout": [0.5, 1.0, 0.0]}, r"dropout: got 1.0*, wanted a probability in \[0, 1\)"),
    "dropout-short": ({"dropout": [0.5]}, "dropout: got 1 item, wanted 3 items"),
    "seeds-short": ({"seeds": torch.ones(2).long()}, r"seeds: got int64 \[2\], wanted an int64 tensor \[3\]"),
}  # fmt: skip


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("platform", ["cpu", "emulated"], indirect=True)
@pytest.mark.parametrize(("changes", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_argument(platform, changes, message):
    case = make_batch(3, 24, 128)
    arguments = {
        name: getattr(case, name) for name in ("x", "weight", "bias", "lora_A", "lora_B", "scaling")
    } | {"index": INDICES[1]}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        lora_linear_grouped(**arguments | changes)


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("platform", ["cpu", "emulated"], indirect=True)
@pytest.mark.parametrize(
    ("x", "base", "index", "message"),
    [
        ((128,), (24,), torch.zeros(6).long(), r"index: got shape \[6\], wanted the first sizes of \[\]"),
        ((6, 3, 128), (5, 24), torch.zeros(6).long(), r"base: got shape \[5, 24\], wanted \[18, 24\]"),
        ((5, 128), (5, 24), torch.zeros(6).long(), r"index: got shape \[6\], wanted the first sizes of \[5\]"),
        ((5, 128), (5, 24), torch.zeros(5), r"index: got float32 \[5\], wanted int64"),
        ((6, 100), (6, 24), torch.zeros(6).long(), r"lora_A: got shape \[4, 128\], wanted \[4, 100\]"),
    ],
)
def test_bad_argument_of_the_op(platform, x, base, index, message):
    case = make_batch(3, 24, 128)
    with pytest.raises(ValueError, match=message):
        ops.lora_linear_grouped(torch.ones(x), torch.ones(base), index, case.lora_A, case.lora_B, case.scaling)


def test_bad_argument_of_the_backward_op(platform):
    case = make_batch(3, 24, 128)
    index, adapters = torch.tensor(INDICES[1]), (case.lora_A, case.lora_B, case.scaling)
    wants = [True] * 3, [True] * 3
    for x, s, message in (
        (None, torch.ones(18, 20), "x: got none, wanted the forward's x"),
        (case.x, None, "s: got none, wanted the forward's s"),
        (case.x, torch.ones(18, 22), r"s: got shape \[18, 22\], wanted \[18, 20\]"),
        (case.x[:, :, 1:], torch.ones(18, 20), r"x: got shape \[18, 127\], wanted \[18, 128\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.lora_linear_grouped_backward(case.grad_y, x, s, None, index, *adapters, *wants)
