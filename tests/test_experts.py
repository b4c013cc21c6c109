"""The experts of a mixture, against the fp64 oracle."""

from dataclasses import replace

import pytest
import tolerances
import torch
import torch.nn.functional as F
from comparison import Made, assert_close, error, mode_id, rms, same_results, saved_for_backward
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_kernels.ops import ExpertStack, NF4Weight, dequantize_4bit, experts, quantize_4bit
from peft_kernels.ops.experts import sort_by_expert
from peft_kernels.ops.grouped_linear import GroupedCall
from peft_kernels.testing.reference.experts import experts as oracle

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels

MODES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
# (experts, top_k, tokens, hidden size, intermediate size)
SIZES = {
    "few-rows": (8, 2, 9, 64, 32),
    "many-rows": (4, 2, 60, 96, 64),
    "one-expert": (1, 1, 5, 32, 32),
    "one-token": (8, 3, 1, 64, 96),
    "no-token": (3, 2, 0, 32, 64),
    "whole-blocks": (8, 3, 20, 64, 64),  # which the kernels for GPUs take
}
BASES = ["dense", "dense-transposed", "nf4", "nf4-transposed", "nf4-list"]


def named(activation):
    return activation if isinstance(activation, str) else activation.__name__


def clamped(gate_up: Tensor) -> Tensor:
    """GPT-OSS's gate: interleaved and clamped."""
    gate, up = gate_up[..., ::2].clamp(max=1.0), gate_up[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def make_stack(count, n, k, dtype, adapter_dtype, base="dense", ranks=(7,), bias=True, blocksize=32):
    transposed = base.endswith("transposed")
    weight = torch.randn((count, k, n) if transposed else (count, n, k)).to(dtype) / k**0.5
    if base == "nf4-list":
        weight = [quantize_4bit(w, blocksize) for w in weight]
    elif base.startswith("nf4"):
        weight = quantize_4bit(weight, blocksize)
    return ExpertStack(
        weight,
        torch.randn(count, n).to(dtype) / 4 if bias else None,
        [torch.randn(count * r, k).to(adapter_dtype) / k**0.5 for r in ranks],
        [torch.randn(n, r * count).to(adapter_dtype) / 2 for r in ranks],
        [0.5] * len(ranks),
        transposed,
    )


def make_case(size="many-rows", dtype=torch.float32, adapter_dtype=torch.float32, base="dense", pair=False, **options):
    torch.manual_seed(0)
    count, top_k, tokens, hidden, intermediate = SIZES[size]
    parts = dtype, adapter_dtype, base
    if pair:
        gate_up = tuple(make_stack(count, intermediate, hidden, *parts, **options) for _ in range(2))
    else:
        gate_up = make_stack(count, 2 * intermediate, hidden, *parts, **options)
    scores = torch.randn(tokens, count).softmax(-1)
    routing, index = scores.topk(top_k, -1)
    return {
        "x": torch.randn(tokens, hidden).to(dtype), "index": index, "routing_weights": routing.to(dtype),
        "gate_up": gate_up, "down": make_stack(count, hidden, intermediate, *parts, **options),
    }  # fmt: skip


def wide(stack: ExpertStack) -> ExpertStack:
    weight = stack.weight
    if isinstance(weight, NF4Weight):
        weight = dequantize_4bit(weight)
    elif not isinstance(weight, Tensor):
        weight = torch.stack([dequantize_4bit(w) for w in weight])
    return replace(
        stack, weight=weight.double(), bias=None if stack.bias is None else stack.bias.double(),
        lora_A=[a.double() for a in stack.lora_A], lora_B=[b.double() for b in stack.lora_B],
    )  # fmt: skip


def run(case, function=experts, grad_y=None, trained=("bias", "weight", "lora_A", "lora_B"), **options):
    """y and the gradient of every floating-point tensor that is trained, by name."""
    if function is oracle:
        case = case | {"x": case["x"].double(), "routing_weights": case["routing_weights"].double()}
        gate_up = case["gate_up"]
        case |= {"gate_up": tuple(map(wide, gate_up)) if isinstance(gate_up, tuple) else wide(gate_up)}
        case |= {"down": wide(case["down"])}
    leaves = {}

    def leaf(name, tensor):
        leaves[name] = tensor.detach().clone().requires_grad_()
        return leaves[name]

    def leaves_of(name, stack):
        changes = {}
        for part in ("bias", "weight"):
            if part in trained and isinstance(getattr(stack, part), Tensor):
                changes[part] = leaf(f"{name}.{part}", getattr(stack, part))
        for part in ("lora_A", "lora_B"):
            if part in trained:
                changes[part] = [leaf(f"{name}.{part}{i}", t) for i, t in enumerate(getattr(stack, part))]
        return replace(stack, **changes)

    gate_up = case["gate_up"]
    if isinstance(gate_up, tuple):
        gate_up = tuple(leaves_of(f"gate_up{i}", stack) for i, stack in enumerate(gate_up))
    else:
        gate_up = leaves_of("gate_up", gate_up)
    y = function(leaf("x", case["x"]), case["index"], leaf("routing_weights", case["routing_weights"]), gate_up,
                 leaves_of("down", case["down"]), **options)  # fmt: skip
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(case["x"].dtype).to(y.dtype) if grad_y is None else grad_y.to(y.dtype))
    return {"y": y.detach()} | {name: tensor.grad for name, tensor in leaves.items()}


def check(case, **options):
    torch.manual_seed(1)
    grad_y = torch.randn(case["x"].shape).to(case["x"].dtype)
    actual, wanted = run(case, grad_y=grad_y, **options), run(case, oracle, grad_y=grad_y.double(), **options)
    dtype = case["x"].dtype
    # Three products, an activation and a sum follow each other, all of which round to x's dtype.
    for name, value in wanted.items():
        tolerance = tolerances.experts(dtype, actual[name].dtype) if name in actual else 0
        if name == "routing_weights" and value.numel():
            # Each is a sum of products of grad_y and of an expert's y, which can cancel where there are few of them.
            of_an_expert = rms(wanted["y"]) / case["routing_weights"].double().norm(dim=-1).mean()
            terms = rms(grad_y) * of_an_expert * grad_y.shape[-1] ** 0.5
            assert rms(actual[name] - value) <= tolerance * max(rms(value), terms), name
        elif name in actual:
            assert_close(actual[name], value, tolerance, name)


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("size", list(SIZES))
def test_results(cpu_isa, size, base, mode):
    check(make_case(size, *mode, base))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", F.silu, clamped], ids=named)
@pytest.mark.parametrize("size", ["few-rows", "many-rows"])
def test_activations(cpu_isa, size, activation):
    case = make_case(size)
    if activation is F.silu:  # experts without a gate
        count, _, _, hidden, intermediate = SIZES[size]
        case["gate_up"] = make_stack(count, intermediate, hidden, torch.float32, torch.float32)
    check(case, activation=activation)


@pytest.mark.parametrize("base", ["dense", "nf4-list"])
def test_gate_and_up_apart(cpu_isa, base):
    check(make_case(base=base, pair=True))


@pytest.mark.parametrize("activation", ["silu", clamped], ids=named)
def test_experts_of_other_processes_add_nothing(cpu_isa, activation):
    case = make_case()
    case["index"][::3, 0] = 4
    case["index"][1::3, 1] = 1000
    case["index"][5] = -1
    check(case, activation=activation)
    y = experts(**case, activation=activation)
    assert not y[5].any()


def test_without_adapters_or_bias(cpu_isa):
    check(make_case(ranks=(), bias=False))
    check(make_case("few-rows", ranks=(3, 16), bias=False))


def test_threads(threads, cpu_isa):
    case = make_case()
    wanted = run(case)
    threads(4)
    same_results(run(case), wanted)


def test_all_tokens_on_one_expert(cpu_isa):
    case = make_case()
    case["index"] = torch.full((60, 1), 2)
    case["routing_weights"] = torch.rand(60, 1)
    check(case)


def test_more_dimensions(cpu_isa):
    case = make_case()
    wanted = experts(**case)
    batched = {name: case[name].view(3, 20, -1) for name in ("x", "index", "routing_weights")}
    assert torch.equal(experts(**case | batched), wanted.view(3, 20, 96))


def test_int32_index(cpu_isa):
    case = make_case()
    assert torch.equal(experts(**case | {"index": case["index"].int()}), experts(**case))


def test_frozen_parts(cpu_isa):
    """What is not trained has no gradient, and does not change the others'."""
    case = make_case()
    wanted = run(case)
    actual = run(case, trained=("lora_B",))
    assert len(actual) == 5
    for name, value in actual.items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("activation", ["silu", clamped], ids=named)
def test_checkpoint(cpu_isa, activation):
    case = make_case(bias=False)
    wanted = run(case, activation=activation)
    actual = run(case, lambda *args, **options: checkpoint(experts, *args, use_reentrant=False, **options),
                 activation=activation)  # fmt: skip
    for name, value in wanted.items():
        assert torch.equal(actual[name], value), name


def test_saves_one_x(cpu_isa):
    """And the outputs of gate_up, s of both branches, and the sort."""
    case = make_case(bias=False)
    tensors = [case["x"].requires_grad_(), case["routing_weights"].requires_grad_(), case["index"]]
    for stack in (case["gate_up"], case["down"]):
        tensors += [stack.weight, *(t.requires_grad_() for t in (*stack.lora_A, *stack.lora_B))]
    _, saved = saved_for_backward(lambda: experts(**case), tensors)
    rows = 120
    assert sum(saved.values()) == rows * 128 * 4 + 2 * rows * 7 * 4 + 2 * rows * 8 + 4 * 8


@pytest.mark.parametrize("base", ["nf4", "nf4-transposed"])
def test_never_makes_a_stack(cpu_isa, base):
    case = make_case("few-rows", base=base)
    with Made() as made:
        run(case)
    assert max(tensor.numel() for tensor in made.tensors) <= 64 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_what_transformers_computes(cpu_isa, dtype):
    """With errors no larger than those of its own implementations."""
    pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=96, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    case = make_case(dtype=dtype, ranks=(), bias=False)
    block = Qwen3MoeExperts(config).to(dtype)
    block.gate_up_proj.data, block.down_proj.data = case["gate_up"].weight, case["down"].weight
    stock = block(case["x"], case["index"], case["routing_weights"]).detach()
    wanted = run(case, oracle)["y"]
    at_most = max(tolerances.VERSUS_STOCK * error(stock, wanted), tolerances.FP32_SUM)
    assert error(experts(**case), wanted) <= at_most


def test_opcheck():
    gate, up, weights = torch.randn(6, 20), torch.randn(6, 20), torch.rand(3, 2)
    index = torch.tensor([[1, 0], [3, 1], [-1, 1]])
    torch.library.opcheck(ops.experts_sort.default, (index, 2))
    order, inverse, _ = ops.experts_sort(index, 2)
    torch.library.opcheck(ops.experts_sum.default, (gate, inverse, weights), {"out_dtype": torch.bfloat16})
    torch.library.opcheck(ops.experts_sum.default, (gate, inverse, None))
    torch.library.opcheck(ops.experts_gate_forward.default, (gate, up, weights, order, "silu"))
    torch.library.opcheck(ops.experts_gate_backward.default, (gate, gate, up, weights, order, "gelu"))


def test_sort():
    """Stable, and those of no expert last."""
    order, inverse, offsets = ops.experts_sort(torch.tensor([[1, 0], [3, 1], [-1, 1]]), 2)
    assert order.tolist() == [1, 0, 3, 5, 2, 4] and offsets.tolist() == [1, 4]
    assert torch.equal(order[inverse.flatten()], torch.arange(6))


# ---- on a GPU ----------------------------------------------------------------------------------------------------

ON_GPU = pytest.mark.parametrize("platform", ["cuda", "emulated"], indirect=True)


@ON_GPU
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("size", ["few-rows", "whole-blocks"])
def test_results_on_a_gpu(platform, size, base, mode):
    check(make_case(size, *mode, base, blocksize=64))


@ON_GPU
@pytest.mark.parametrize("activation", ["silu", F.glu], ids=["named", "callable"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_all_experts_at_once_on_a_gpu(platform, monkeypatch, base, activation):
    """None is looked at by itself, which waits for the sort; some of the rows are other processes'."""
    case = make_case("whole-blocks", torch.bfloat16, base=base, ranks=(3, 8), blocksize=64)
    case["index"][::3, 0] = 8
    case["index"][1::3, 1] = 1000
    case["index"][5] = -1
    monkeypatch.setattr(GroupedCall, "experts", lambda *_: pytest.fail("it waited for the offsets"))
    check(case, activation=activation, trained=("bias", "lora_A", "lora_B"))
    assert not experts(**case, activation=activation)[5].any()


@ON_GPU
@pytest.mark.parametrize("index", [[[0, 0]], [[7, 2]], [[-1, 8]]], ids=str)
def test_one_token_on_a_gpu(platform, index):
    case = make_case("whole-blocks", torch.bfloat16, base="nf4", blocksize=64)
    x, routing_weights = case["x"][:1], case["routing_weights"][:1, :2]
    check(case | {"x": x, "routing_weights": routing_weights, "index": torch.tensor(index)})


@pytest.mark.may_launch_nothing
@ON_GPU
def test_sort_on_a_gpu(platform):
    index = torch.randint(-2, 9, (300, 3))
    sort, wanted = sort_by_expert(index, 7), ops.experts_sort(index.cpu(), 7)
    for actual, one in zip((sort.order, sort.inverse, sort.offsets), wanted, strict=True):
        assert torch.equal(actual.cpu(), one)


# ---- errors ------------------------------------------------------------------------------------------------------


def stack(count=4, n=96, k=64, **changes):
    return replace(make_stack(count, n, k, torch.float32, torch.float32), **changes)


BAD = {
    "x": ({"x": torch.ones(60, 95)}, r"x: got float32 \[60, 95\], wanted \[..., 96\], for a gate_up of 96 inputs"),
    "x-int": ({"x": torch.ones(60, 96).long()}, "x: got int64"),
    "index-shape": ({"index": torch.zeros(59, 2).long()}, r"index: got int64 \[59, 2\], wanted .*\[60, 'top_k'\]"),
    "index-float": ({"index": torch.zeros(60, 2)}, r"index: got float32 \[60, 2\], wanted an int32 or int64"),
    "index-no-expert": ({"index": torch.zeros(60, 0).long()}, r"index: got int64 \[60, 0\]"),
    "routing": ({"routing_weights": torch.ones(60, 1)}, r"routing_weights: got float32 \[60, 1\], wanted .*\[60, 2\]"),
    "gate_up": ({"gate_up": torch.ones(4, 128, 96)}, "gate_up: got float32 .*, wanted an ExpertStack"),
    "gate_up-outputs": ({"gate_up": stack(4, 130, 96)}, "gate_up: got 130 outputs, wanted 128, for a down of 64"),
    "gates-outputs": ({"gate_up": (stack(4, 64, 96), stack(4, 63, 96))}, "gate_up: got 63 outputs, wanted 64"),
    "gates-three": ({"gate_up": (stack(4, 64, 96),) * 3}, "gate_up: got 3 stacks, wanted one stack, or two"),
    "gates-callable": (
        {"gate_up": (stack(4, 64, 96),) * 2, "activation": clamped}, "gate_up: got 2 stacks, wanted one stack"
    ),
    "down-experts": ({"down": stack(3)}, "down: got 3 experts, wanted 4, as gate_up has"),
    "down-bias": ({"down": stack(bias=torch.ones(4))}, r"down.bias: got float32 \[4\], wanted .*\[4, 96\]"),
    "down-A": ({"down": stack(lora_A=[torch.ones(28, 65)])}, r"down.lora_A: got float32 \[28, 65\], wanted"),
    "activation": ({"activation": "sine"}, "activation: got 'sine'"),
    "activation-none": ({"activation": None}, "activation: got None, a NoneType, wanted a name of ACTIVATIONS, or"),
    "out_dtype": ({"out_dtype": torch.int8}, "out_dtype: got torch.int8"),
    "device": ({"index": torch.zeros(60, 2, device="meta").long()}, "index: got a tensor on meta, wanted one on cpu"),
}  # fmt: skip


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize(("changes", "message"), list(BAD.values()), ids=list(BAD))
def test_bad_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        experts(**make_case() | changes)


ROWS = torch.ones(4, 8)
BAD_FOR_THE_OPS = {
    "sort-vector": (lambda: ops.experts_sort(torch.zeros(4).long(), 2), r"index: got int64 \[4\], wanted a matrix"),
    "sort-dtype": (lambda: ops.experts_sort(torch.zeros(4, 1).int(), 2), r"index: got int32 .* wanted int64"),
    "sum-rows": (lambda: ops.experts_sum(ROWS, torch.zeros(3, 2).long(), None), r"rows: got shape \[4, 8\]"),
    "sum-position": (
        lambda: ops.experts_sum(ROWS, torch.full((2, 2), 4), None), "inverse: got 4, wanted positions of 4 items"
    ),
    "sum-weights": (
        lambda: ops.experts_sum(ROWS, torch.zeros(2, 2).long(), torch.ones(2, 1)), r"weights: got shape \[2, 1\]"
    ),
    "gate-order": (
        lambda: ops.experts_gate_forward(ROWS, ROWS, torch.ones(4), torch.full((4,), -1), "silu"), "order: got -1"
    ),
    "gate-up": (
        lambda: ops.experts_gate_forward(ROWS, ROWS.half(), torch.ones(4), torch.zeros(4).long(), "silu"), "up: got"
    ),
    "gate-weights": (
        lambda: ops.experts_gate_backward(ROWS, ROWS, ROWS, torch.ones(5), torch.zeros(4).long(), "silu"), "weights:"
    ),
}  # fmt: skip


@pytest.mark.may_launch_nothing
@pytest.mark.parametrize(("call", "message"), list(BAD_FOR_THE_OPS.values()), ids=list(BAD_FOR_THE_OPS))
def test_bad_argument_of_an_op(call, message):
    with pytest.raises(ValueError, match=message):
        call()
