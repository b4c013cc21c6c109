"""The linear layers of a mixture's experts, against the fp64 oracle."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import tolerances
import torch
from comparison import Made, assert_close, error, mode_id, rms, same_results, saved_for_backward, short
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels.ops import NF4Weight, dequantize_4bit, grouped_linear, quantize_4bit
from peft_kernels.ops import _grouped_on_gpu as on_gpu
from peft_kernels.ops.grouped_linear import GroupedCall
from peft_kernels.testing.reference.grouped_linear import grouped_linear as oracle

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels

# The rows of each expert: a few and many, none, one expert with all of them; then those of no expert, which come last.
COUNTS = {
    "mixed": ([5, 0, 40, 1], 0),
    "few": ([1, 2, 0, 8], 3),
    "one-has-all": ([0, 33, 0], 0),
    "single": ([7], 0),
    "all-foreign": ([0, 0], 4),
    "none": ([0, 0, 0], 0),
}
MODES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
BASES = ["dense", "dense-transposed", "nf4", "nf4-transposed", "nf4-nested", "nf4-straddling", "nf4-list", "fp4"]


@dataclass
class Case:
    x: Tensor
    weight: Any
    bias: Tensor | None
    lora_A: list[Tensor]  # noqa: N815
    lora_B: list[Tensor]  # noqa: N815
    scaling: list[float]
    offsets: Tensor
    grad_y: Tensor
    transposed: bool = False
    rows: Tensor | None = None
    trains_weight: bool = True

    def leaves(self) -> dict[str, Tensor]:
        tensors = {"x": self.x, "bias": self.bias, "weight": self.weight if self.trains_weight else None}
        tensors |= {f"lora_A{i}": a for i, a in enumerate(self.lora_A)}
        tensors |= {f"lora_B{i}": b for i, b in enumerate(self.lora_B)}
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}

    def dense_weight(self) -> Tensor:
        if isinstance(self.weight, Tensor):
            return self.weight
        if isinstance(self.weight, NF4Weight):
            return dequantize_4bit(self.weight)
        return torch.stack([dequantize_4bit(weight) for weight in self.weight])


def make_case(counts, foreign, n, k, dtype=torch.float32, adapter_dtype=torch.float32, base="dense", ranks=(16,),
              gathers=False, bias=True, blocksize=32):  # fmt: skip
    torch.manual_seed(0)
    experts, rows = len(counts), sum(counts) + foreign
    transposed = base.endswith("transposed")
    shape = (experts, k, n) if transposed else (experts, n, k)
    weight = torch.randn(shape).to(dtype) / k**0.5
    if base == "nf4-list":
        weight = [quantize_4bit(w) for w in weight]
    elif not base.startswith("dense"):
        nested = base == "nf4-nested"
        blocksize = 4096 if base == "nf4-straddling" else blocksize
        weight = quantize_4bit(weight, blocksize, "fp4" if base == "fp4" else "nf4", nested)
    tokens = max(rows // 2, 1) if gathers else rows
    return Case(
        torch.randn(tokens, k).to(dtype),
        weight,
        torch.randn(experts, n).to(dtype) if bias else None,
        [torch.randn(experts * r, k).to(adapter_dtype) / k**0.5 for r in ranks],
        [torch.randn(n, r * experts).to(adapter_dtype) for r in ranks],
        [0.5 + i for i in range(len(ranks))],
        torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32),
        torch.randn(rows, n).to(dtype),
        transposed,
        torch.randint(tokens, (rows,)) if gathers else None,
    )


def run(case, function=grouped_linear, **options):
    """y and the gradient of every leaf, by name."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in case.leaves().items()}
    adapters = {name: [leaves[f"{name}{i}"] for i in range(len(getattr(case, name)))] for name in ("lora_A", "lora_B")}
    weight = case.weight if function is grouped_linear else case.dense_weight()
    y = function(leaves["x"], leaves.get("weight", weight), leaves.get("bias"), **adapters, scaling=case.scaling,
                 offsets=case.offsets, transposed=case.transposed, rows=case.rows, **options)  # fmt: skip
    y.backward(case.grad_y.to(y.dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def expected(case):
    wide = replace(case, x=case.x.double(), weight=case.dense_weight().double(),
                   bias=None if case.bias is None else case.bias.double(), lora_A=[a.double() for a in case.lora_A],
                   lora_B=[b.double() for b in case.lora_B], grad_y=case.grad_y.double())  # fmt: skip
    results = run(wide, oracle)
    return results if "weight" in case.leaves() else {k: v for k, v in results.items() if k != "weight"}


def check(case, compute_dtype=None, out_dtype=None):
    actual, wanted = run(case, compute_dtype=compute_dtype, out_dtype=out_dtype), expected(case)
    compute_dtype, out_dtype = compute_dtype or case.x.dtype, out_dtype or case.x.dtype
    assert actual["y"].dtype == out_dtype and actual["y"].is_contiguous()
    # A dense product is rounded by itself before the branch is added to it, and so are all products on a GPU.
    is_apart = isinstance(case.weight, Tensor) or case.transposed or on_gpu.is_on_gpu(case.x)
    factor = 1.5 if is_apart else 1
    bounds = {
        "y": tolerances.product(compute_dtype, out_dtype) * factor,
        "x": tolerances.product(compute_dtype, case.x.dtype) * factor,
        "bias": tolerances.adapter_gradient(case.x.dtype),
        "weight": tolerances.product(compute_dtype, case.x.dtype),
    }
    for name, value in wanted.items():
        tolerance = bounds.get(name) or tolerances.adapter_gradient(case.leaves()[name].dtype)
        assert_close(actual[name], value, tolerance, name)
    foreign = slice(int(case.offsets[-1]), None)
    assert not actual["y"][foreign].any()


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("counts", list(COUNTS))
def test_results(cpu_isa, counts, base, mode):
    check(make_case(*COUNTS[counts], 96, 64, *mode, base))


@pytest.mark.parametrize("base", BASES)
def test_without_adapters(base):
    case = make_case([5, 0, 20, 1], 2, 24, 64, base=base, ranks=())
    y = grouped_linear(case.x, case.weight, case.bias, [], [], [], case.offsets, transposed=case.transposed)
    assert_close(y, expected(case)["y"], tolerances.FP32_SUM)


@pytest.mark.parametrize("base", ["dense", "dense-transposed", "nf4", "nf4-transposed"])
@pytest.mark.parametrize("shape", [(33, 96), (1, 64), (64, 32), (130, 160)], ids=str)
def test_odd_sizes(cpu_isa, shape, base):
    n, k = shape
    n, k = (k, n) if base.startswith("nf4-t") else (n, k)
    check(make_case([3, 0, 19], 1, n, k, base=base, ranks=(7,)))


@pytest.mark.parametrize("shape", [(5, 7), (65, 31)], ids=str)
def test_odd_sizes_of_dense_weights(cpu_isa, shape):
    for base in ("dense", "dense-transposed"):
        check(make_case([3, 0, 19], 1, *shape, base=base, ranks=(7,)))


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("ranks", [(), (1,), (3, 16, 40)], ids=str)
def test_adapters(cpu_isa, ranks, base):
    check(make_case([5, 0, 20], 2, 70, 96, base=base, ranks=ranks))
    check(make_case([5, 0, 20], 2, 70, 96, base=base, ranks=ranks, bias=False))


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_gathered_rows(cpu_isa, mode, base):
    """x is read where it lies, and its gradient is the sum over a token's rows."""
    case = make_case([5, 0, 20], 2, 70, 96, *mode, base=base, gathers=True)
    check(case)
    repeated = run(case)
    assert all(torch.equal(repeated[name], value) for name, value in run(case).items())


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dtypes_of_the_product(cpu_isa, base, out_dtype):
    case = make_case([5, 0, 20], 0, 70, 96, torch.bfloat16, base=base)
    check(case, torch.float32, out_dtype)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 3), st.integers(1, 70), st.integers(1, 70),
       st.lists(st.integers(1, 33), max_size=2), st.booleans(), st.booleans())  # fmt: skip
def test_any_shape(cpu_isa, counts, foreign, n, k, ranks, transposed, gathers):
    case = make_case(counts, foreign, n, k, base="dense-transposed" if transposed else "dense", ranks=ranks,
                     gathers=gathers and sum(counts) + foreign > 0)  # fmt: skip
    actual, wanted = run(case), expected(case)
    for name, value in wanted.items():
        # Small tensors can cancel, whose terms are of the size of one.
        assert value.numel() == 0 or rms(actual[name] - value) <= 2 * tolerances.FP32_SUM * max(rms(value), 1), name


@pytest.mark.parametrize("base", ["dense", "nf4", "nf4-transposed", "nf4-nested"])
@pytest.mark.parametrize("counts", [[3, 0, 9, 1, 2, 30] * 3, [200, 0, 3]], ids=["one-each", "all-for-one"])
def test_threads(threads, cpu_isa, counts, base):
    """A thread for each expert or all for one, and the same bits whoever does it."""
    case = make_case(counts, 2, 96, 128, torch.bfloat16, base=base)
    wanted = run(case)
    threads(4)
    for _ in range(3):
        same_results(run(case), wanted)


def test_is_the_delta_of_peft():
    """Of a stack that PEFT wraps, whatever the layout of the stack."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)

    class Experts(torch.nn.Module):
        def __init__(self, is_transposed):
            super().__init__()
            self.stack, self.is_transposed = torch.nn.Parameter(torch.zeros(3, 20, 12)), is_transposed

    for is_transposed in (False, True):
        model = torch.nn.ModuleDict({"experts": Experts(is_transposed)})
        config = peft.LoraConfig(r=5, lora_alpha=7, target_parameters=["experts.stack"], init_lora_weights=False)
        wrapper = peft.get_peft_model(model, config).base_model.model["experts"]
        delta = wrapper.get_delta_weight("default").detach()
        assert delta.shape == (3, 20, 12)
        x, offsets = torch.randn(9, 20 if is_transposed else 12), torch.tensor([4, 4, 9])
        A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        base = wrapper.get_param().detach()
        y = grouped_linear(x, base, None, [A], [B], [wrapper.scaling["default"]], offsets, transposed=is_transposed)
        assert_close(y, oracle(x, delta, None, [], [], [], offsets, transposed=is_transposed), tolerances.FP32_SUM)


def test_stack_of_bitsandbytes():
    """The view of a stack that bitsandbytes quantised, of its own codes."""
    functional = pytest.importorskip("bitsandbytes.functional")
    stack = torch.randn(3, 48, 64)
    for nested in (False, True):
        codes, state = functional.quantize_4bit(stack, blocksize=64, compress_statistics=nested, quant_type="nf4")
        weight = NF4Weight.from_quant_state(codes, state)
        assert weight.shape == (3, 48, 64) and weight.codes.data_ptr() == codes.data_ptr()
        x, offsets = torch.randn(9, 64), torch.tensor([4, 4, 9])
        dense = functional.dequantize_4bit(codes, state)
        y = grouped_linear(x, weight, None, [], [], [], offsets)
        assert_close(y, oracle(x, dense, None, [], [], [], offsets), tolerances.FP32_SUM)


@pytest.mark.parametrize("base", ["nf4", "nf4-transposed", "nf4-nested", "nf4-straddling"])
def test_never_makes_a_stack(cpu_isa, base):
    case = make_case([3, 4, 5, 6, 7, 8, 9, 10], 0, 64, 96, base=base, ranks=(4,))
    with Made() as made:
        run(case)
    assert max(tensor.numel() for tensor in made.tensors) <= 64 * 96


@pytest.mark.parametrize("gathers", [False, True], ids=["sorted", "gathered"])
def test_saves_x_once_and_s(cpu_isa, gathers):
    case = make_case([5, 0, 20], 1, 70, 96, gathers=gathers)
    leaves = [tensor.requires_grad_() for tensor in case.leaves().values()]
    known = [*leaves, case.offsets, case.rows]
    case.weight.requires_grad_(False)
    _, saved = saved_for_backward(
        lambda: grouped_linear(case.x, case.weight, case.bias, case.lora_A, case.lora_B, case.scaling, case.offsets,
                               rows=case.rows), known)  # fmt: skip
    assert list(saved.values()) == [26 * 16 * 4]


@pytest.mark.parametrize("base", ["dense", "nf4", "nf4-transposed", "nf4-list"])
def test_opcheck(base):
    case = make_case([5, 0, 20], 2, 64, 96, torch.bfloat16, base=base, ranks=(4, 7))
    weight = case.weight if isinstance(case.weight, list) else [case.weight]
    parts = [(w,) if isinstance(w, Tensor) else w.arguments[0] for w in weight]
    format = () if isinstance(weight[0], Tensor) else weight[0].arguments[1]
    given = [False, False, isinstance(weight[0], Tensor)]
    stack = [tensor for some in parts for tensor in some], format, case.transposed, case.offsets.tolist(), given
    adapters = case.lora_A, case.lora_B, case.scaling
    y, s = torch.zeros(27, 64), torch.randn(27, 11)
    torch.library.opcheck(ops.grouped_linear_forward.default, (y, case.x, *stack, *adapters), {"bias": case.bias})
    arguments = case.grad_y, case.x, s, *stack, *adapters, [True, False], [False, True]
    for grad_x in (torch.zeros(27, 96), None):
        torch.library.opcheck(ops.grouped_linear_backward.default, (grad_x, *arguments))


def test_plan_is_printed(monkeypatch, capfd, threads):
    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")
    threads(2)
    run(make_case([4] * 17, 0, 33, 32, base="nf4"))
    assert (
        "grouped_linear of 17 experts and 68 rows, 4 of one at most, on the CPU with 2 threads: a thread for each"
        in (capfd.readouterr().err)
    )


def test_errors_are_no_larger_than_those_of_torch():
    """Which rounds the sum of W and B A to bf16, and multiplies with that."""
    case = make_case([25, 0, 40], 0, 96, 128, torch.bfloat16, torch.bfloat16, bias=False)
    experts = 3
    a, b = case.lora_A[0].view(experts, -1, 128), case.lora_B[0].view(96, -1, experts).permute(2, 0, 1)
    merged = torch.baddbmm(case.weight, b, a, alpha=case.scaling[0])
    stock = torch.nn.functional.grouped_mm(case.x, merged.transpose(1, 2), offs=case.offsets)
    wanted = expected(case)["y"]
    assert error(run(case)["y"], wanted) <= tolerances.VERSUS_STOCK * error(stock, wanted)


# ---- on a GPU ----------------------------------------------------------------------------------------------------

ON_GPU = pytest.mark.parametrize("platform", ["cuda", "emulated"], indirect=True)
BASES_ON_GPU = ["dense", "dense-transposed", "nf4", "nf4-transposed", "nf4-nested", "nf4-straddling"]


@pytest.fixture
def no_loop(monkeypatch):
    """No expert is looked at by itself, which waits for the offsets."""
    monkeypatch.setattr(GroupedCall, "experts", lambda *_: pytest.fail("it waited for the offsets"))


def frozen(case):
    """Without a gradient of a dense weight, which is made expert by expert."""
    return replace(case, trains_weight=False)


@pytest.mark.may_launch_nothing  # torch has dense products, and there may be no rows
@ON_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("base", BASES_ON_GPU)
@pytest.mark.parametrize("counts", list(COUNTS))
def test_results_on_a_gpu(platform, counts, base, dtype):
    check(make_case(*COUNTS[counts], 64, 128, dtype, base=base, ranks=(7,), blocksize=64))


@ON_GPU
@pytest.mark.parametrize("base", ["dense", "dense-transposed", "nf4", "nf4-transposed"])
@pytest.mark.parametrize("ranks", [(7,), (3, 16, 40)], ids=str)
def test_all_experts_at_once_on_a_gpu(platform, no_loop, ranks, base):
    """Results and all gradients; more rows than a tile has, and offsets of 64 bits."""
    case = frozen(make_case([5, 0, 150, 1], 3, 72, 128, torch.bfloat16, base=base, ranks=ranks, blocksize=64))
    if base == "nf4-transposed":  # K is that of the codes, in which blocks begin
        case = make_case([5, 0, 150, 1], 3, 128, 72, torch.bfloat16, base=base, ranks=ranks, blocksize=64)
    case.offsets = case.offsets.long()
    check(case)


@ON_GPU
@pytest.mark.parametrize("base", ["nf4", "nf4-transposed", "nf4-list", "dense"])
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_what_no_kernel_takes_on_a_gpu(platform, mode, base):
    """fp32, short blocks, odd sizes, separate weights: one expert after the other, in either direction or in one."""
    check(make_case([5, 0, 20], 2, 33, 64, *mode, base, ranks=(7,)))
    if base != "nf4-transposed":  # whose K would be odd
        check(make_case([5, 0, 20], 2, 33, 64, *mode, base, ranks=(7,), blocksize=64))


@ON_GPU
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_gathered_rows_on_a_gpu(platform, no_loop, base):
    case = frozen(make_case([5, 0, 20], 2, 72, 128, torch.bfloat16, base=base, gathers=True, blocksize=64))
    check(case)
    same_results(run(case), run(case))


@ON_GPU
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16], ids=short)
def test_dtypes_of_the_product_on_a_gpu(platform, no_loop, base, out_dtype):
    case = frozen(make_case([5, 0, 20], 2, 72, 128, torch.bfloat16, base=base, blocksize=64))
    check(case, out_dtype=out_dtype)
    wide = {name: getattr(case, name).float() for name in ("x", "bias", "grad_y")}
    check(replace(case, **wide), torch.bfloat16, out_dtype)


@ON_GPU
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_rows_that_begin_anywhere_on_a_gpu(platform, no_loop, base):
    case = frozen(make_case([5, 0, 20], 2, 72, 128, torch.bfloat16, base=base, blocksize=64))
    wanted = run(case)
    wide = torch.randn(27, 2, 131).bfloat16()
    wide[:, 1, 2:130] = case.x
    x = wide[:, 1, 2:130].detach().requires_grad_()
    y = grouped_linear(x, case.weight, case.bias, case.lora_A, case.lora_B, case.scaling, case.offsets)
    y.backward(case.grad_y.mT.contiguous().mT)
    assert torch.equal(y, wanted["y"]) and torch.equal(x.grad, wanted["x"])


def called(rows_each, experts, base, ranks, backward):
    """The operations of a call, views apart."""
    case = make_case([rows_each] * experts, 1, 64, 64, torch.bfloat16, base=base, ranks=ranks, blocksize=64)
    leaves = [t.detach().requires_grad_(backward) for t in (case.x, case.bias, *case.lora_A, *case.lora_B)]
    x, bias, *adapters = leaves
    count = len(case.lora_A)
    with Made() as made:
        y = grouped_linear(x, case.weight, bias, adapters[:count], adapters[count:], case.scaling, case.offsets)
        if backward:
            y.backward(case.grad_y)
    return made.names


@pytest.mark.may_launch_nothing
@ON_GPU
@pytest.mark.parametrize("backward", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("ranks", [(), (8,), (7, 16)], ids=str)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_as_many_operations_for_any_number_of_experts(platform, no_loop, base, ranks, backward):
    assert called(12, 2, base, ranks, backward) == called(3, 8, base, ranks, backward)


@ON_GPU
def test_offsets_that_make_no_sense_on_a_gpu(platform):
    """Nobody checks them there; they are no access out of bounds."""
    case = make_case([5, 0, 40, 1], 0, 64, 64, torch.bfloat16, base="nf4", blocksize=64)
    for offsets in ([46, 46, 46, 10**9], [-1, -2, -3, -4], [100, 200, 300, 400]):
        case.offsets = torch.tensor(offsets)
        run(case)


# ---- errors ------------------------------------------------------------------------------------------------------

BAD = {
    "x-columns": ({"x": torch.ones(25, 95)}, r"x: got float32 \[25, 95\], wanted .*\[rows, 96\]"),
    "x-3d": ({"x": torch.ones(1, 25, 96)}, r"x: got float32 \[1, 25, 96\], wanted"),
    "weight-matrix": ({"weight": torch.ones(70, 96)}, r"weight: got float32 \[70, 96\], wanted .* \[E, N, K\]"),
    "weight-list": ({"weight": [torch.ones(70, 96)] * 3}, r"weight: got \[tensor"),
    "weight-int": ({"weight": torch.ones(3, 70, 96).long()}, "weight: got int64"),
    "weights-shapes": (
        {"weight": [quantize_4bit(torch.ones(n, 96)) for n in (70, 71)]}, r"weight: .*\[70, 96\] and \[71, 96\]"
    ),
    "weight-unaligned": (
        {"weight": quantize_4bit(torch.ones(3, 5, 97)), "x": torch.ones(25, 97), "bias": None, "lora_A": [],
         "lora_B": [], "scaling": []}, r"weight: got a 4-bit stack of shape \[3, 5, 97\], wanted experts of whole"
    ),
    "bias": ({"bias": torch.ones(70)}, r"bias: got float32 \[70\], wanted .* \[3, 70\]"),
    "A-rows": ({"lora_A": [torch.ones(49, 96)]}, r"lora_A: got float32 \[49, 96\], wanted .*\[3 experts · rank, 96\]"),
    "A-tensor": ({"lora_A": torch.ones(48, 96)}, "lora_A: got .*, wanted a list or tuple"),
    "B-columns": ({"lora_B": [torch.ones(70, 16)]}, r"lora_B: got float32 \[70, 16\], wanted .*\[70, 48\]"),
    "B-missing": ({"lora_B": []}, "lora_B: got 0 items, wanted 1 items"),
    "scaling": ({"scaling": ["1"]}, "scaling: got '1', a str, wanted numbers"),
    "offsets-length": ({"offsets": torch.tensor([1, 2])}, r"offsets: got int64 \[2\], wanted a tensor \[3\] of"),
    "offsets-float": ({"offsets": torch.ones(3)}, r"offsets: got float32 \[3\], wanted"),
    "offsets-high": ({"offsets": torch.tensor([1, 2, 26])}, "offsets: got 26 after 2, wanted ends of experts' rows"),
    "offsets-descend": ({"offsets": torch.tensor([5, 2, 25])}, "offsets: got 2 after 5, wanted ends"),
    "rows-dtype": ({"rows": torch.zeros(25).int()}, r"rows: got int32 \[25\], wanted a tensor \[25\] of int64"),
    "transposed": ({"transposed": 1}, "transposed: got 1, wanted True or False"),
    "compute_dtype": ({"compute_dtype": torch.float64}, "compute_dtype: got torch.float64"),
    "device": ({"bias": torch.ones(3, 70, device="meta")}, "bias: got a tensor on meta, wanted one on cpu"),
}  # fmt: skip


BAD_FOR_THE_OP = {
    "y-rows": ({"y": torch.zeros(24, 70)}, r"y: got shape \[24, 70\], wanted \[25, 70\]"),
    "x-columns": ({"x": torch.ones(25, 95)}, r"x: got shape \[25, 95\], wanted \[25, 96\]"),
    "weight-none": ({"weight": []}, r"weight: got none, wanted a stack \[E, N, K\]"),
    "weight-experts": ({"weight": [torch.ones(2, 70, 96)]}, r"weight: got float32 \[2, 70, 96\], wanted a stack of a"),
    "weight-strides": ({"weight": [torch.ones(3, 96, 70).mT]}, "weight: got strides .*, wanted dense rows"),
    "offsets": ({"offsets": [5, 5, 26]}, "offsets: got 26 after 5, wanted ends of experts' rows that ascend to 25"),
    "given": ({"given": [True]}, "given: got 1 item, wanted 3 items"),
    "A-rank": ({"lora_A": [torch.ones(47, 96)], "lora_B": [torch.ones(70, 47)]}, r"lora_A: got float32 \[47, 96\]"),
    "bias": ({"bias": torch.ones(70)}, r"bias: got shape \[70\], wanted \[3, 70\]"),
}  # fmt: skip


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize(("changes", "message"), list(BAD_FOR_THE_OP.values()), ids=list(BAD_FOR_THE_OP))
def test_bad_argument_of_the_op(changes, message):
    case = make_case([5, 0, 20], 0, 70, 96)
    arguments = {
        "y": torch.zeros(25, 70), "x": case.x, "weight": [case.weight], "format": [], "transposed": False,
        "offsets": [5, 5, 25], "given": [False] * 3, "lora_A": case.lora_A, "lora_B": case.lora_B,
        "scaling": case.scaling, "bias": case.bias,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.grouped_linear_forward(**arguments | changes)


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize(("changes", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_argument(changes, message):
    case = make_case([5, 0, 20], 0, 70, 96)
    names = ("x", "weight", "bias", "lora_A", "lora_B", "scaling", "offsets")
    arguments = {name: getattr(case, name) for name in names}
    with pytest.raises(ValueError, match=message):
        grouped_linear(**arguments | changes)
