"""The adapter op and torch's machinery: what is saved and computed, checkpointing, compilation, threads; errors."""

from dataclasses import replace

import pytest
import tolerances
import torch
from adapter_cases import call, make_case, run
from comparison import assert_close, same_results, saved_for_backward
from torch.utils.checkpoint import checkpoint

from peft_kernels.ops import adapter

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels
EVERYTHING = {"norm": True, "post_norm": True, "scale": "learned", "gate": True, "dropout": 0.1}


def saved_bytes(case):
    """What autograd holds after a call, x and the parameters apart."""
    case = case.map(lambda tensor: tensor.requires_grad_())
    _, saved = saved_for_backward(lambda: call(case), case.leaves().values())
    return sum(saved.values())


@pytest.mark.parametrize(("weight_dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)], ids=["bf16", "fp32"])
def test_saves_pre_and_stats(platform, weight_dtype, size):
    m, d, r, mode = 48, 64, 8, (torch.bfloat16, weight_dtype)
    assert saved_bytes(make_case(m, d, r, *mode)) == m * r * size + 4  # 4: the scale
    assert saved_bytes(make_case(m, d, r, *mode, norm=True)) == m * r * size + m * 8 + 4
    assert saved_bytes(make_case(m, d, r, *mode, dropout=0.1)) == m * r * size + 8 + 4


@pytest.mark.parametrize("wanted", ["x", "down_weight", "up_bias", "scale", "gate", "norm_bias", "residual",
                                    "post_weight", "x up_weight"])  # fmt: skip
def test_computes_what_is_asked_for(platform, wanted):
    case = make_case(37, 40, 8, residual="given", **EVERYTHING)
    full = run(case)
    for name, leaf in case.leaves().items():
        leaf.requires_grad_(name in wanted.split())
    call(case).backward(case.grad_y)
    for name, leaf in case.leaves().items():
        assert (leaf.grad is not None) == (name in wanted.split())
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, full[name]), name


def test_nothing_asked_for():
    case = make_case(20, 40, 8)
    assert not call(case).requires_grad
    with torch.no_grad():
        assert not call(case.map(lambda tensor: tensor.requires_grad_())).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(dtype):
    case = make_case(37, 40, 8)
    with torch.autocast("cpu", dtype):
        actual = run(case)
        bare = call(replace(case, residual=None))
    assert actual["y"].dtype == torch.float32 and bare.dtype == dtype
    for name, value in run(case).items():
        assert_close(actual[name], value, tolerances.product(dtype, value.dtype), name)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(platform, reentrant):
    case = make_case(37, 40, 8, norm=True)

    def checkpointed(x, *weights, residual, **options):
        return checkpoint(
            lambda x: adapter(x, *weights, residual=x, dropout=0.5, **options), x, use_reentrant=reentrant
        )

    torch.manual_seed(5)
    wanted = run(case, dropout=0.5)
    torch.manual_seed(5)
    same_results(run(case, checkpointed), wanted)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (37, 6):
        case = make_case(rows, 24, 8, torch.bfloat16, torch.bfloat16, **EVERYTHING)
        wanted = run(case)
        for name, value in run(case, compiled).items():
            assert_close(value, wanted[name], tolerances.product(value.dtype, value.dtype), name)


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_opcheck(everything):
    m, d, r = 7, 24, 5
    case = make_case(m, d, r, torch.bfloat16, torch.float32)
    vector = [torch.randn(d)] if everything else []
    weights = [case.down_weight], [case.down_bias], [case.up_weight], [case.up_bias], torch.ones(1)
    gate, eps, seed = (torch.rand(m), [1e-5], torch.tensor([3])) if everything else (None, [], None)
    dropout = 0.2 if everything else 0.0
    torch.library.opcheck(
        ops.adapter_forward.default,
        (case.x, case.x, gate, [m], [0], *weights, vector, vector, eps, vector, vector, 1e-5 if everything else None,
         "gelu", dropout, seed, torch.float32, torch.bfloat16, True),
    )  # fmt: skip
    torch.library.opcheck(
        ops.adapter_backward.default,
        (case.grad_y, case.x, torch.randn(m, r), torch.rand(m, 2) if everything else None, gate, [m], [0], *weights,
         vector, vector, eps, "gelu", dropout, seed, torch.float32, torch.bfloat16, True, True, True, everything,
         everything),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(20, 48, 8), (700, 72, 40)], ids=str)
def test_thread_count_changes_no_bit(cpu_isa, threads, shape):
    case = make_case(*shape, torch.bfloat16, torch.bfloat16, **EVERYTHING)
    threads(2)
    wanted = run(case)
    for count in (1, 3, 8, 2):
        threads(count)
        same_results(run(case), wanted)


# ---- errors ------------------------------------------------------------------------------------------------------

BAD = {
    "x-list": ({"x": [1.0]}, r"x: got \[1.0\], a list, wanted a float32, bfloat16 or float16 tensor \[..., d\]"),
    "x-int": ({"x": torch.ones(3, 16).int()}, r"x: got int32 \[3, 16\]"),
    "down-columns": ({"down_weight": torch.ones(4, 15)}, r"down_weight: got shape \[4, 15\], wanted \[4, 16\]"),
    "down-none": ({"down_weight": None}, "down_weight: got None, a NoneType, wanted a tensor"),
    "down-empty": (
        {"down_weight": torch.ones(0, 16)},
        r"down_weight: got float32 \[0, 16\], wanted .* r of 1 at least",
    ),
    "down-fp64": ({"down_weight": torch.ones(4, 16).double()}, "down_weight: got float64, wanted float32"),
    "down-bias": ({"down_bias": torch.ones(5)}, r"down_bias: got shape \[5\], wanted \[4\]"),
    "up-shape": ({"up_weight": torch.ones(4, 16)}, r"up_weight: got shape \[4, 16\], wanted \[16, 4\]"),
    "up-bias": ({"up_bias": [0.0]}, r"up_bias: got \[0.0\], a list, wanted a tensor or None"),
    "residual": ({"residual": torch.ones(3, 15)}, r"residual: got float32 \[3, 15\], wanted .* \[3, 16\], as x is"),
    "up-meta": ({"up_weight": torch.ones(16, 4, device="meta")}, "up_weight: got a tensor on meta, wanted one on cpu"),
    "residual-meta": ({"residual": torch.ones(3, 16, device="meta")}, "residual: got a tensor on meta"),
    "norm-meta": ({"layer_norm": (torch.ones(16, device="meta"), None, 1e-5)}, "layer_norm: got a tensor on meta"),
    "activation": ({"activation": "mish"}, "activation: got 'mish', wanted one of relu, gelu"),
    "scale": ({"scale": torch.ones(2)}, r"scale: got float32 \[2\], wanted a number, or a tensor with one element"),
    "scale-text": ({"scale": "learned"}, "scale: got 'learned', a str, wanted a number"),
    "gate": ({"gate": torch.ones(3, 16)}, r"gate: got float32 \[3, 16\], wanted a tensor that broadcasts to \[3, 1\]"),
    "norm": ({"layer_norm": (torch.ones(16), None)}, "layer_norm: got .* wanted None, or a tuple of a weight, a bias"),
    "norm-size": (
        {"layer_norm": (torch.ones(15), None, 1e-5)},
        r"layer_norm's weight: got shape \[15\], wanted \[16\]",
    ),
    "post-size": ({"post_layer_norm": (torch.ones(1), None, 1e-5)}, r"post_layer_norm's weight: got shape \[1\]"),
    "dropout": ({"dropout": 1.0}, r"dropout: got 1.0, a float, wanted a probability in \[0, 1\)"),
    "seed": ({"seed": 3}, r"seed: got 3, a int, wanted an int64 tensor \[1\]"),
    "out_dtype": ({"out_dtype": torch.float64}, "out_dtype: got torch.float64, a dtype, wanted float32, bfloat16"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_arguments(name):
    changes, message = BAD[name]
    case = make_case(3, 16, 4)
    arguments = {n: getattr(case, n) for n in ("x", "down_weight", "down_bias", "up_weight", "up_bias")} | changes
    with pytest.raises(ValueError, match=message):
        adapter(**arguments)
