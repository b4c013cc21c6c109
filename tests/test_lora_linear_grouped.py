"""Batches in which each example has its own LoRA adapter, against the fp64 oracle."""

import pytest
import tolerances
import torch
from comparison import Made, mode_id, views_of_x
from hypothesis import given
from hypothesis import strategies as st
from lora_linear_cases import BASES, DTYPES, assert_close, error, make_case, short

from peft_kernels.ops import lora_linear, lora_linear_grouped
from peft_kernels.testing.reference.lora_linear_grouped import lora_linear_grouped as oracle

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels

RANKS = (4, 17, 1)
INDICES = [[0, 0, 1, 1, 2, 2], [2, 0, 1, 0, -1, 2], [1] * 6, [-1] * 6, [-1, -1, 0, -1, 2, -1]]
# (tokens of each of six examples, N, K): a few rows; more than one block of them; odd sizes; a task's rows and more.
SHAPES = [(1, 64, 128), (1, 33, 257), (3, 1, 96), (7, 66, 64), (50, 130, 31)]
MODES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def make(tokens, n, k, x_dtype=torch.float32, adapter_dtype=torch.float32, base="nf4", examples=6, ranks=RANKS, **more):
    """A case of lora_linear with x [examples, tokens, k]."""
    case = make_case(examples * tokens, n, k, ranks, x_dtype, adapter_dtype, base, **more)
    case.x = case.x.view(examples, tokens, k)
    return case


def call(case, index, function=lora_linear_grouped, **options):
    weight = case.weight if function is lora_linear_grouped else case.dense_weight()
    return function(case.x, weight, case.bias, case.lora_A, case.lora_B, case.scaling, index, **options)


def check(case, index, compute_dtype=None, out_dtype=None):
    y, wanted = call(case, index, compute_dtype=compute_dtype, out_dtype=out_dtype), call(case, index, oracle)
    compute_dtype, out_dtype = compute_dtype or case.x.dtype, out_dtype or case.x.dtype
    assert y.dtype == out_dtype and y.is_contiguous()
    tolerance = tolerances.product(compute_dtype, out_dtype)
    if not isinstance(case.weight, torch.Tensor) and y.is_cpu:
        return assert_close(y, wanted, tolerance)
    assert_close(y, wanted, 1.5 * tolerance)  # the base product is rounded by itself


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape, base, mode):
    for index in INDICES[1:3]:
        check(make(*shape, *mode, base, blocksize=32 if shape[2] == 96 else 64), index)


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_orders(backend, index, base):
    check(make(2, 70, 128, base=base), index)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_output_dtype(platform, base, out_dtype):
    check(make(3, 50, 128, torch.bfloat16, base=base), INDICES[1], torch.float32, out_dtype)
    with torch.autocast(platform, torch.bfloat16):
        assert call(make(3, 50, 128, base=base), INDICES[1]).dtype == torch.bfloat16


@given(
    st.integers(1, 9), st.integers(1, 300), st.integers(1, 140), st.integers(1, 140),
    st.lists(st.integers(1, 70), min_size=1, max_size=5), st.data(),
)  # fmt: skip
def test_any_shape(cpu_isa, examples, rows, n, k, ranks, data):
    index = data.draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=examples, max_size=examples))
    check(make(-(-rows // examples), n, k, base="dense", examples=examples, ranks=ranks), index)


@pytest.mark.parametrize("tokens", [1, 40])
def test_threads(threads, cpu_isa, tokens):
    """Enough work for several, and the same bits whoever does it."""
    case = make(tokens, 200, 512, torch.bfloat16, ranks=(64, 65, 33))
    wanted = call(case, INDICES[1])
    threads(4)
    for _ in range(5):
        assert torch.equal(call(case, INDICES[1]), wanted)


def test_example_is_what_it_is_alone(cpu_isa):
    """Whatever the others are: an adapter that overflowed is its own examples' trouble."""
    case = make(2, 70, 128)
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
    case = make(tokens, 384, 512, torch.bfloat16, torch.bfloat16, bias=False)
    weight = case.dense_weight().bfloat16()  # as the product has it
    once = oracle(case.x, weight, None, case.lora_A, case.lora_B, case.scaling, INDICES[1]).bfloat16()
    wanted = call(case, INDICES[1], oracle)
    assert error(call(case, INDICES[1]), wanted) <= 1.01 * error(once, wanted)


@pytest.mark.parametrize("view", ["row-strided", "every-second-row", "transposed", "inner-strided", "3d-transposed"])
def test_strided_x(platform, view):
    case = make(4, 40, 65)
    x = views_of_x(case.x.view(24, 65))[view]
    index = [i % 4 - 1 for i in range(x.shape[0])]
    case.x = x.contiguous()
    wanted = call(case, index)
    case.x = x
    assert torch.equal(call(case, index), wanted)


def test_strided_adapters(platform):
    """PEFT leaves such, where it combines adapters by their singular values."""
    case = make(2, 40, 65)
    wanted = call(case, INDICES[1])
    for transposed in (case.lora_A, case.lora_B):
        transposed[:] = [tensor.T.contiguous().T for tensor in transposed]
    assert torch.equal(call(case, INDICES[1]), wanted)


def test_more_dimensions(platform):
    case = make(6, 40, 65)
    wanted = call(case, INDICES[1])
    case.x = case.x.view(6, 2, 3, 65)
    assert torch.equal(call(case, INDICES[1]), wanted.view(6, 2, 3, 40))


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_empty(platform, base, shape):
    check(make(*shape, base=base), INDICES[1])
    check(make(*shape, base=base, examples=0), [])


def test_no_copy_of_x_or_of_a_weight(cpu_isa):
    case = make(3, 300, 200, base="dense")
    with Made() as made:
        call(case, INDICES[1])
    assert made.tensors and max(tensor.numel() for tensor in made.tensors) <= 18 * 300


# ---- torch's machinery -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16], ids=["same", "bf16"])
def test_opcheck(platform, out_dtype):
    case = make(3, 40, 128, torch.float16)
    for x in (case.x, case.x.transpose(0, 1).contiguous().transpose(0, 1), case.x[:, 0], case.x[:, :0]):
        arguments = x, torch.randn(*x.shape[:-1], 40), INDICES[1], case.lora_A, case.lora_B, case.scaling
        torch.library.opcheck(ops.lora_linear_grouped.default, arguments, {"out_dtype": out_dtype})


@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_compile(base):
    torch.compiler.reset()
    compiled = torch.compile(lora_linear_grouped, fullgraph=True, backend="aot_eager")
    for index in INDICES[:3]:
        case = make(3, 24, 128, torch.bfloat16, base=base)
        arguments = case.x, case.weight, case.bias, case.lora_A, case.lora_B, case.scaling, index
        assert torch.equal(compiled(*arguments), lora_linear_grouped(*arguments))


# ---- errors ------------------------------------------------------------------------------------------------------

BAD = {
    "x-vector": ({"x": torch.ones(128)}, r"index: got 6 items, wanted one for each x\[b\]; x is float32 \[128\]"),
    "x-columns": ({"x": torch.ones(6, 127)}, r"x: got float32 \[6, 127\], wanted \[..., 128\]"),
    "index-short": ({"index": [0, 1]}, r"index: got 2 items, wanted one for each x\[b\]; x is float32 \[6, 3, 128\]"),
    "index-tensor": ({"index": torch.zeros(6)}, r"index: got float32 \[6\], wanted a list or tuple of positions"),
    "index-floats": ({"index": [0.0] * 6}, r"index: got \[0.0.*, a list, wanted a list or tuple of positions"),
    "index-high": ({"index": [0, 1, 2, 3, 0, 0]}, "index: got 3, wanted -1, or one of 3 items of lora_A"),
    "index-low": ({"index": [0, -2, 0, 0, 0, 0]}, "index: got -2, wanted -1"),
    "A-missing": ({"lora_A": []}, "lora_B: got 3 items, wanted 0 items"),
    "A-tensor": ({"lora_A": torch.ones(8, 128)}, "lora_A: got .*, wanted a list or tuple"),
    "B-columns": ({"lora_B": [torch.ones(24, 8)] * 3}, r"lora_B: got shape \[24, 8\], wanted \[24, 4\]"),
    "scaling-nan": ({"scaling": [1.0, float("nan"), 1.0]}, "scaling: got nan, wanted a finite"),
    "A-gradient": (
        {"lora_A": [torch.ones(r, 128, requires_grad=True) for r in RANKS]},
        r"x: got one that requires a gradient, or parameters that do, wanted a call under torch.no_grad\(\)",
    ),
}  # fmt: skip


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("platform", ["cpu", "emulated"], indirect=True)
@pytest.mark.parametrize(("changes", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_argument(platform, changes, message):
    case = make(3, 24, 128)
    arguments = {
        name: getattr(case, name) for name in ("x", "weight", "bias", "lora_A", "lora_B", "scaling")
    } | {"index": INDICES[1]}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        lora_linear_grouped(**arguments | changes)


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("platform", ["cpu", "emulated"], indirect=True)
@pytest.mark.parametrize(
    ("x", "base", "message"),
    [
        ((128,), (24,), r"x: got float32 \[128\], wanted a tensor \[examples, ..., K\]"),
        ((6, 3, 128), (6, 24), r"base: got shape \[6, 24\], wanted \[6, 3, 24\]"),
        ((5, 128), (5, 24), r"index: got 6 items, wanted 5 items, one for each x\[i\]"),
        ((6, 100), (6, 24), r"lora_A: got shape \[4, 128\], wanted \[4, 100\]"),
    ],
)
def test_bad_argument_of_the_op(platform, x, base, message):
    case = make(3, 24, 128)
    with pytest.raises(ValueError, match=message):
        ops.lora_linear_grouped(
            torch.ones(x), torch.ones(base), INDICES[1], case.lora_A, case.lora_B, case.scaling
        )  # fmt: skip
