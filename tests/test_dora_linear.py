"""The dora_linear family against the fp64 oracle: numerics, shapes, gradients, every instruction set and the GPU's."""

from dataclasses import dataclass, fields, replace

import pytest
import tolerances
import torch
import torch.nn.functional as F
from comparison import DTYPES, assert_close, differentiated, error, mode_id, saved_for_backward, short
from lora_linear_cases import BASES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_kernels import cpu
from peft_kernels.ops import NF4Weight, dora_linear, dora_norm, quantize_4bit
from peft_kernels.ops.dora_linear import squares_of_rows
from peft_kernels.testing.reference.dora_linear import dora_linear as oracle
from peft_kernels.testing.reference.dora_linear import dora_norm as oracle_norm

pytestmark = pytest.mark.kernels

LEAVES = ("x", "weight", "bias", "lora_A", "lora_B", "magnitude")
SCALING = 0.5
SHAPES = [(1, 64, 128), (3, 33, 64), (8, 30, 20), (5, 12, 257), (33, 65, 64), (70, 300, 100)]
# (x, adapter)
MODES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


@dataclass
class Case:
    """The tensors of one call, and the gradient of its result."""

    x: Tensor
    weight: Tensor | NF4Weight
    bias: Tensor | None
    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    magnitude: Tensor
    grad_y: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """Everything with a gradient; a 4-bit weight has none."""
        return {name: value for name in LEAVES if isinstance(value := getattr(self, name), Tensor)}


def make_case(m, n, k, x_dtype=torch.float32, adapter_dtype=torch.float32, base="nf4", weight_dtype=None, rank=5):
    """Numbers of the sizes found in a trained model: y is about one, and B A about half as large as W."""
    weight = (torch.randn(n, k) / max(k, 1) ** 0.5).to(weight_dtype or x_dtype)
    if base != "dense":
        weight = quantize_4bit(weight, 64, "fp4" if base == "fp4" else "nf4", double_quant=base == "nested")
    return Case(
        x=torch.randn(m, k).to(x_dtype),
        weight=weight,
        bias=torch.randn(n),
        lora_A=(torch.randn(rank, k) / max(k, 1) ** 0.5).to(adapter_dtype),
        lora_B=(torch.randn(n, rank) / rank**0.5).to(adapter_dtype),
        magnitude=(torch.rand(n) + 0.5).to(adapter_dtype),
        grad_y=torch.randn(m, n).to(x_dtype),
    )


def run(case: Case, function=dora_linear, **options) -> dict[str, Tensor]:
    """y and every gradient, by name."""
    arguments = {name: getattr(case, name) for name in LEAVES}
    return differentiated(function, arguments, case.grad_y, scaling=SCALING, **options)


def dense(weight: Tensor | NF4Weight) -> Tensor:
    return weight.dequantize() if isinstance(weight, NF4Weight) else weight


def expected(case: Case, **options) -> dict[str, Tensor]:
    """The same in fp64; also of a 4-bit weight, whose gradient no one wants."""
    case = replace(case, weight=dense(case.weight))
    return run(Case(**{field.name: getattr(case, field.name).double() for field in fields(case)}), oracle, **options)


def check(case: Case, compute_dtype=None, dropout=0.0, seed=None):
    """y and all gradients are as near to the oracle's as their dtypes allow."""
    dtype = case.x.dtype
    product = tolerances.product(compute_dtype or dtype, dtype)
    actual = run(case, compute_dtype=compute_dtype, dropout=dropout, seed=seed)
    wanted = expected(case, dropout=dropout, seed=seed)
    # The base product is rounded before the branch is added; dropout rounds x, and adds a second one.
    bounds = {"y": 2 * product, "x": 2 * product, "bias": tolerances.FP32_SUM, "weight": product}
    rounds_x = 2 * tolerances.ROUNDING[dtype] if dropout else 0
    for name, leaf in case.leaves().items():
        assert actual[name].dtype == leaf.dtype, name
        if name in ("lora_A", "lora_B"):
            bounds[name] = tolerances.adapter_gradient(leaf.dtype) + rounds_x
            bounds[name] += product if name == "lora_B" and compute_dtype not in (None, torch.float32) else 0
    # Two sums over y before its scale, which cancel in part, and B's share of them.
    bounds["magnitude"] = 4 * (product + tolerances.ROUNDING[case.magnitude.dtype])
    for name in actual:
        assert_close(actual[name], wanted[name], bounds[name], name)


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
@pytest.mark.parametrize("shape", SHAPES, ids="m{0[0]}-n{0[1]}-k{0[2]}".format)
def test_shapes(backend, shape, mode, base):
    check(make_case(*shape, *mode, base=base))


@pytest.mark.skipif("avx2" not in cpu.isas(), reason="this processor lacks avx2")
@pytest.mark.parametrize("base", ["nf4", "nested"])
def test_product_by_torch(base):
    """Which the kernels leave rows of fp32 to from 512 on."""
    with cpu.use_isa("avx2"):
        check(make_case(514, 40, 128, base=base))


@pytest.mark.parametrize("compute_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("base", BASES)
def test_bases(platform, base, compute_dtype):
    for rows in (3, 21):
        check(make_case(rows, 50, 128, base=base), compute_dtype)


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("rows", [4, 40])
def test_dropout(platform, rows, dtype, base):
    case = make_case(rows, 40, 128, dtype, base=base)
    check(case, dropout=0.2, seed=torch.tensor([11]))
    torch.manual_seed(3)
    first = dora_linear(*(getattr(case, name) for name in LEAVES), dropout=0.2)
    torch.manual_seed(3)
    assert torch.equal(first, dora_linear(*(getattr(case, name) for name in LEAVES), dropout=0.2))


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("base", ["nf4", "nested", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(40, 128), (300, 20), (257, 65)], ids=str)
def test_norm(platform, shape, dtype, base):
    """In fp32 whatever the weight's dtype, since every gradient is divided by it."""
    for scaling in (0.0, 0.5, -3.0):
        case = make_case(1, *shape, dtype, base=base)
        parts = case.lora_A, case.lora_B, scaling
        wanted = oracle_norm(dense(case.weight).double(), *parts, torch.float64)
        for squares in (None, squares_of_rows(case.weight)):
            norm = dora_norm(case.weight, *parts, squares=squares)
            assert norm.dtype == torch.float32
            assert_close(norm, wanted, tolerances.FP32_SUM)
        with torch.autocast(case.lora_A.device.type, torch.bfloat16):
            assert torch.equal(dora_norm(case.weight, *parts), norm)


@pytest.mark.may_launch_nothing
def test_norm_of_rows_that_the_adapter_cancels(platform):
    case = make_case(1, 40, 8, base="dense", rank=8)
    norm = dora_norm(case.weight, torch.eye(8), -case.weight)
    assert norm.isfinite().all() and norm.max() < 1e-3 * case.weight.norm(dim=1).min()


@pytest.mark.parametrize("rows", [2, 30])
def test_norm_that_is_given(platform, rows):
    case = make_case(rows, 40, 128, torch.bfloat16)
    norm = dora_norm(case.weight, case.lora_A, case.lora_B, SCALING)
    wanted = run(case)
    for name, value in run(case, norm=norm).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("rows", [3, 60])
def test_strides(platform, rows, base):
    case = make_case(rows, 40, 128, base=base)
    wanted = run(case)
    case.x, case.grad_y = F.pad(case.x, (5, 3))[:, 5:133], case.grad_y.T.contiguous().T
    case.lora_A, case.lora_B = F.pad(case.lora_A, (0, 9))[:, :128], case.lora_B.T.contiguous().T
    for name, value in run(case).items():
        assert_close(value, wanted[name], tolerances.FP32_SUM, name)
    if base == "dense":
        case.weight = case.weight.T.contiguous().T  # a Conv1D's
        check(case)


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("shape", [(0, 40, 128), (5, 40, 0)], ids=str)
def test_empty(platform, shape, base):
    case = make_case(*shape, base=base)
    norm = torch.ones(40)
    actual = run(case, norm=norm)
    assert actual["y"].shape == shape[:2] and actual["lora_A"].shape == (5, shape[2])
    assert_close(actual["y"], case.bias.expand(shape[0], 40), tolerances.FP32_SUM)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("rows", [2, 30])
def test_without_gradients(platform, rows, base, x_dtype):
    case = make_case(rows, 40, 128, x_dtype, base=base)
    with torch.no_grad():
        y = dora_linear(*(getattr(case, name) for name in LEAVES), SCALING)
    assert y.dtype == x_dtype
    assert_close(y, expected(case)["y"], 3 * tolerances.product(x_dtype, x_dtype))


def test_leading_dimensions(platform):
    case = make_case(12, 40, 128)
    for dropout in (0.0, 0.2):
        options = {"dropout": dropout, "seed": torch.tensor([3])}
        wanted = run(case, **options)
        folded = replace(case, x=case.x.view(3, 1, 4, 128), grad_y=case.grad_y.view(3, 1, 4, 40))
        for name, value in run(folded, **options).items():
            assert torch.equal(value.flatten(), wanted[name].flatten()), name


@pytest.mark.parametrize("rows", [1, 40])
def test_magnitudes_that_are_zero_or_negative(backend, rows):
    case = make_case(rows, 40, 128)
    case.magnitude[::3], case.magnitude[1::3] = 0, -1
    actual = run(case)
    assert torch.equal(actual["y"][:, ::3], case.bias[::3].expand(rows, -1))
    assert not actual["lora_B"][::3].any()
    assert_close(actual["magnitude"], expected(case)["magnitude"], 5 * tolerances.FP32_SUM)


# ---- torch's machinery -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("trained", ["x", "lora_A", "lora_B", "magnitude", "bias", "x lora_A lora_B magnitude", ""])
def test_saves_and_computes_what_is_asked_for(platform, trained, base):
    case, trained = make_case(30, 40, 128, base=base), trained.split()
    full = run(case)
    leaves = {name: leaf.detach().requires_grad_(name in trained) for name, leaf in case.leaves().items()}
    arguments = {name: leaves.get(name, getattr(case, name)) for name in LEAVES}
    known = [tensor for name, tensor in leaves.items() if name != "x"]
    y, saved = saved_for_backward(lambda: dora_linear(**arguments, scaling=SCALING), known)
    matrices = sum(size for size in saved.values() if size > 4 * 5 * 40)  # B's size, as which g ⊙ B is kept
    assert matrices == 4 * (("lora_A" in trained) * 30 * 128 + ("magnitude" in trained) * 30 * 40)
    assert y.requires_grad == bool(trained)
    if trained:
        y.backward(case.grad_y)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in trained)
        if name in trained:
            assert_close(leaf.grad, full[name], tolerances.FP32_SUM, name)


def test_double_backward_is_refused(platform):
    case = make_case(20, 40, 128)
    case.x.requires_grad_()
    y = dora_linear(*(getattr(case, name) for name in LEAVES))
    (grad,) = torch.autograd.grad(y.square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_autocast(platform, base):
    case = make_case(20, 40, 128, base=base)
    with torch.autocast(platform, torch.bfloat16):
        actual = run(case)
    wanted = run(case, compute_dtype=torch.bfloat16, out_dtype=torch.bfloat16)
    assert actual["y"].dtype == torch.bfloat16 and actual["x"].dtype == torch.float32
    for name, value in wanted.items():
        assert torch.equal(actual[name], value), name


def test_checkpointing(platform):
    case = make_case(20, 40, 128)

    def checkpointed(x, **others):
        return checkpoint(lambda x: dora_linear(x, **others), x, use_reentrant=False)

    wanted = run(case)
    for name, value in run(case, checkpointed).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_compile(base, dropout):
    torch.compiler.reset()
    compiled = torch.compile(dora_linear, fullgraph=True, backend="aot_eager")
    for rows in (37, 6):
        case = make_case(rows, 24, 128, torch.bfloat16, base=base)
        options = {"dropout": dropout, "seed": torch.tensor([5])}
        actual, wanted = run(case, compiled, **options), run(case, **options)
        for name, value in wanted.items():
            assert_close(actual[name], value, tolerances.product(value.dtype, value.dtype), name)


# ---- against PEFT's way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_no_worse_than_separate_operations(platform, base):
    """bf16, with PEFT's operations: x in fp32 for the adapter, W + B A in full, the base product rounded first."""
    case = make_case(96, 384, 512, torch.bfloat16, base=base)

    def separate(x, weight, bias, lora_A, lora_B, magnitude, scaling):
        result = F.linear(x, weight, bias.to(x.dtype))
        wide = x.float()
        norm = torch.linalg.norm(weight.float() + scaling * (lora_B @ lora_A).detach(), dim=1)
        gain = (magnitude / norm.detach())[None]
        lora = F.linear(F.linear(wide, lora_A), lora_B)
        return (result + (gain - 1) * (result - bias) + gain * lora * scaling).to(x.dtype)

    actual, wanted = run(case), expected(case)
    case.weight = dense(case.weight)
    theirs = run(case, separate)
    for name in actual:
        ours = error(actual[name], wanted[name])
        assert ours <= max(tolerances.VERSUS_STOCK * error(theirs[name], wanted[name]), tolerances.FP32_SUM), name


# ---- bad arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[:, 1:], r"x: got float32 \[3, 127\], wanted \[..., 128\]"),
        ("lora_A", lambda a: a[:, 1:], r"lora_A: got float32 \[5, 127\], wanted a .* tensor \[r, 128\], with r at"),
        ("lora_A", lambda a: a[:0], r"lora_A: got float32 \[0, 128\], wanted"),
        ("lora_B", lambda b: b[:, 1:], r"lora_B: got float32 \[40, 4\], wanted a .* tensor \[40, 5\]"),
        ("lora_B", lambda b: None, "lora_B: got None, a NoneType, wanted"),
        ("magnitude", lambda m: m[1:], r"magnitude: got float32 \[39\], wanted a .* tensor \[40\]"),
        ("magnitude", lambda m: m.int(), r"magnitude: got int32 \[40\], wanted"),
        ("magnitude", lambda m: None, "magnitude: got None, a NoneType, wanted"),
        ("magnitude", lambda m: m.to("meta"), "magnitude: got a tensor on meta, wanted one on cpu, where x is"),
        ("weight", lambda w: None, "weight: got None, a NoneType, wanted an NF4Weight or"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_bad_tensors(base, name, change, message):
    case = make_case(3, 40, 128, base=base)
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(ValueError, match=message):
        dora_linear(**{leaf: getattr(case, leaf) for leaf in LEAVES})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"scaling": float("nan")}, "scaling: got nan, a float, wanted a finite number"),
        ({"scaling": "1"}, "scaling: got '1', a str, wanted a finite number"),
        ({"dropout": 1.0}, r"dropout: got 1.0, a float, wanted a probability in \[0, 1\)"),
        ({"seed": torch.ones(2)}, r"seed: got float32 \[2\], wanted an int64 tensor \[1\]"),
        ({"norm": torch.ones(39)}, r"norm: got float32 \[39\], wanted a .* tensor \[40\]"),
        ({"compute_dtype": torch.int8}, "compute_dtype: got torch.int8"),
    ],
)
def test_bad_options(option, message):
    case = make_case(3, 40, 128)
    with pytest.raises(ValueError, match=message):
        dora_linear(*(getattr(case, name) for name in LEAVES), **option)
    with pytest.raises(ValueError, match=r"squares: got float32 \[3\], wanted"):
        dora_norm(case.weight, case.lora_A, case.lora_B, squares=torch.ones(3))
