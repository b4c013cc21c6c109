"""The fusion family against the fp64 oracle, and the form on bottlenecks against the one on outputs."""

import pytest
import tolerances
import torch
import torch.nn.functional as F
from comparison import DTYPES, assert_close, error, saved_for_backward, short

from peft_kernels.ops import fusion, fusion_of_bottlenecks
from peft_kernels.testing.reference.adapter_fusion import fusion as oracle

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels
NAMES = ("query_weight", "query_bias", "key_weight", "key_bias", "value_weight", "value_bias")


def make_case(m, d, n, x_dtype=torch.float32, weight_dtype=None, value=True, residual=True, bias=True):
    """Scores have a size of a few, so that no adapter gets all of the weight; results are about one."""
    weight_dtype = weight_dtype or x_dtype
    case = {"query_input": torch.randn(m, d).to(x_dtype)}
    for name in NAMES:
        if name.startswith("value") and not value:
            continue
        if name.endswith("weight"):
            case[name] = (torch.randn(d, d) / d**0.75).to(weight_dtype)
        elif bias:
            case[name] = (0.3 * torch.randn(d)).to(weight_dtype)
    if residual:
        case["residual"] = torch.randn(m, d).to(x_dtype)
    return case | {f"a{i}": torch.randn(m, d).to(x_dtype) for i in range(n)}


def call(case, function=fusion, **options):
    outputs = [tensor for name, tensor in case.items() if name[0] == "a"]
    matrices = [case.get(name) for name in NAMES]
    return function(case["query_input"], outputs, *matrices, residual=case.get("residual"), **options)


def run(case, function=fusion, grad_dtype=None, **options):
    """z and every gradient, by name; that of z are numbers of grad_dtype."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in case.items()}
    z = call(leaves, function, **options)
    torch.manual_seed(1)
    z.backward(torch.randn(z.shape).to(grad_dtype or case["query_input"].dtype).to(z.dtype))
    return {"z": z.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def expected(case, **options):
    dtype = case["query_input"].dtype
    return run({name: tensor.double() for name, tensor in case.items()}, oracle, dtype, **options)


def check(case, **options):
    actual, wanted = run(case, **options), expected(case, **options)
    dtype = case["query_input"].dtype
    for name, value in wanted.items():
        if value is None:  # b_k without dropout: the oracle has zero, up to rounding
            continue
        got = actual[name]
        if name == "key_bias" and not options.get("dropout"):
            assert not got.any()
            continue
        # q, t, the pooled rows and what comes back through them are rounded: more roundings than one product's.
        assert_close(got, value, 3 * tolerances.product(dtype, got.dtype if got.is_floating_point() else dtype), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(1, 16, 1), (5, 17, 3), (40, 64, 8), (33, 70, 20)], ids=str)
def test_shapes(backend, shape, dtype):
    check(make_case(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    "options",
    [{"value": False}, {"residual": False}, {"bias": False}, {"value": False, "residual": False, "bias": False}],
    ids=lambda options: "-".join(f"no-{name}" for name in options),
)
def test_optional_parts(platform, options, dtype):
    check(make_case(20, 48, 4, dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=short)
def test_temperature_and_dropout(backend, dtype):
    case = make_case(30, 40, 9, dtype)
    check(case, temperature=3.0)
    check(case, temperature=0.7, dropout=0.4, seed=torch.tensor([77]))


@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_dtype_of_adapters(platform, dtype, adapter_dtype):
    case = make_case(9, 50, 3, dtype)
    check(case | {name: tensor.to(adapter_dtype) for name, tensor in case.items() if name[0] == "a"})


def test_fp32_matrices_keep_fp32(platform):
    case = make_case(20, 48, 4, torch.bfloat16, torch.float32, residual=False)
    actual, wanted = run(case), expected(case)
    for name in ("query_weight", "value_weight"):
        assert_close(actual[name], wanted[name], 2 * tolerances.FP32_SUM, name)


def test_seeds_come_from_torchs_generator():
    case = make_case(20, 16, 5)
    torch.manual_seed(3)
    first, second = call(case, dropout=0.5), call(case, dropout=0.5)
    torch.manual_seed(3)
    assert torch.equal(call(case, dropout=0.5), first) and not torch.equal(first, second)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [(8, 8, 8), (5, 1, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=short)
def test_bottlenecks(backend, dtype, ranks, dropout):
    m, d = 30, 48
    base = {name: tensor for name, tensor in make_case(m, d, 0, dtype).items()}
    count = range(len(ranks))
    base |= {f"h{i}": torch.randn(m, r).to(dtype) for i, r in enumerate(ranks)}
    base |= {f"w{i}": (torch.randn(d, r) / r**0.5).to(dtype) for i, r in enumerate(ranks)}
    base |= {"b0": torch.randn(d).to(dtype), "b1": torch.randn(d).to(dtype), "s1": torch.tensor([0.6]).to(dtype)}
    options = {"temperature": 2.0, "dropout": dropout, "seed": torch.tensor([5])}

    def of_bottlenecks(case):
        scales = [1.0, case["s1"], 0.5]
        return fusion_of_bottlenecks(
            case["query_input"], [case[f"h{i}"] for i in count], [case[f"w{i}"] for i in count],
            [case.get(f"b{i}") for i in count], scales, *(case[name] for name in NAMES), residual=case["residual"],
            **options,
        )  # fmt: skip

    def of_outputs(case):
        outputs = [F.linear(case[f"h{i}"], case[f"w{i}"], case.get(f"b{i}")) for i in count]
        outputs = [a * s for a, s in zip(outputs, (1.0, case["s1"], 0.5), strict=True)]
        return oracle(case["query_input"], outputs, *(case[name] for name in NAMES), residual=case["residual"],
                      **options)  # fmt: skip

    def gradients(function, case):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in case.items()}
        z = function(leaves)
        torch.manual_seed(1)
        z.backward(torch.randn(z.shape).to(dtype).to(z.dtype))
        return {"z": z.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}

    actual, wanted = gradients(of_bottlenecks, base), gradients(of_outputs, {n: t.double() for n, t in base.items()})
    for name, value in wanted.items():
        if name in ("s1", "key_bias", "query_bias"):  # sums that cancel
            continue
        assert_close(actual[name], value, 3 * tolerances.product(dtype, dtype), name)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_error_against_unfused(autocast):
    dtype = torch.bfloat16
    case = make_case(64, 256, 6, torch.float32 if autocast else dtype)

    def unfused(query_input, outputs, qw, qb, kw, kb, vw, vb, *, residual):
        a = torch.stack(outputs, dim=-2)
        scores = (F.linear(a, kw, kb) @ F.linear(query_input, qw, qb).unsqueeze(-1)).squeeze(-1)
        return residual + (scores.softmax(-1).to(a.dtype).unsqueeze(-2) @ F.linear(a, vw, vb)).squeeze(-2)

    with torch.autocast("cpu", dtype, enabled=autocast):
        actual, theirs = run(case), run(case, unfused)
    wanted = expected(case)
    for name in ("z", "query_input", "query_weight", "key_weight", "value_weight", "residual", "a0"):
        ours, stocks = error(actual[name], wanted[name]), error(theirs[name], wanted[name])
        assert ours <= tolerances.VERSUS_STOCK * stocks, name


@pytest.mark.parametrize("wanting", [{"key_bias"}, set(NAMES)], ids=["alone", "with others"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient_of_the_key_bias_is_zero(wanting, dtype):
    """It cancels in the softmax; DistributedDataParallel waits for a gradient of every parameter."""
    case = make_case(20, 16, 3, dtype)
    plain = call(case)
    for name in wanting:
        case[name].requires_grad_()
    z = call(case)
    assert torch.equal(z, plain)
    z.sum().backward()
    assert torch.equal(case["key_bias"].grad, torch.zeros(16, dtype=dtype))
    assert all(case[name].grad is not None for name in wanting)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_thread_count_changes_no_bit(threads, count):
    case = make_case(70, 40, 3, torch.bfloat16)
    wanted = run(case)
    threads(count)
    actual = run(case)
    for name in ("z", "a0", "residual"):
        assert torch.equal(actual[name], wanted[name]), name


def test_keeps_no_key_or_value():
    m, d, n = 64, 32, 8
    case = {name: tensor.requires_grad_() for name, tensor in make_case(m, d, n).items()}
    _, saved = saved_for_backward(lambda: call(case), case.values())
    assert sum(saved.values()) <= 3 * m * d * 4 + m * n * 4


def test_strides_and_empty(platform):
    case = make_case(12, 16, 3)
    wanted = call(case)
    strided = case | {"a1": F.pad(case["a1"], (2, 3))[:, 2:18], "query_input": case["query_input"].T.contiguous().T}
    assert torch.equal(call(strided), wanted)
    cube = {name: tensor.view(3, 4, 16) if tensor.shape == (12, 16) else tensor for name, tensor in case.items()}
    assert torch.equal(call(cube).view(12, 16), wanted)
    empty = {name: tensor[:0] if tensor.shape == (12, 16) else tensor for name, tensor in case.items()}
    assert run(empty)["z"].shape == (0, 16)


@pytest.mark.parametrize("shared", [True, False])
def test_opcheck(shared):
    t = torch.randn(7, 24)
    adapters = [torch.randn(7, 24 if shared else 8) for _ in range(3)]
    offsets, seed = torch.randn(7, 3), torch.tensor([3])
    torch.library.opcheck(ops.adapter_fusion_forward.default, (t, adapters, shared, offsets, 2.0, 0.25, seed))
    probabilities = torch.rand(7, 3)
    torch.library.opcheck(
        ops.adapter_fusion_backward.default,
        (t, torch.randn(7, 3), t, adapters, probabilities, shared, offsets, 2.0, 0.25, seed, [True, False, True]),
    )


def test_compile():
    case = make_case(20, 16, 3)
    compiled = torch.compile(lambda *arguments, **options: fusion(*arguments, **options), backend="aot_eager",
                             fullgraph=True)  # fmt: skip
    actual, wanted = run(case, compiled), run(case)
    for name, value in wanted.items():
        if value is not None:
            assert_close(actual[name], value, tolerances.FP32_SUM, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_input": torch.ones(2)}, r"query_weight: got float32 \[16, 16\], wanted .* \[2, 2\]"),
        ({"key_weight": torch.ones(16, 8)}, r"key_weight: got float32 \[16, 8\], wanted .* \[16, 16\]"),
        ({"value_bias": torch.ones(3)}, r"value_bias: got float32 \[3\], wanted .* tensor \[16\] or None"),
        ({"value_weight": None}, r"value_bias: got float32 \[16\], wanted None"),
        ({"residual": torch.ones(3, 16)}, r"residual: got float32 \[3, 16\], wanted .* tensor \[4, 16\]"),
        ({"residual": torch.ones(4, 16).double()}, r"residual: got float64 \[4, 16\], wanted a float32"),
        ({"a1": torch.ones(4, 8)}, r"adapter_outputs: got float32 \[4, 8\], wanted .* tensors \[4, 16\]"),
        ({"a1": torch.ones(4, 16).int()}, r"adapter_outputs: got int32 \[4, 16\]"),
        ({"a1": torch.ones(4, 16, device="meta")}, "adapter_outputs: got a tensor on meta, wanted one on cpu"),
        ({"key_weight": torch.ones(16, 16, device="meta")}, "key_weight: got a tensor on meta, .* where query_input"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_tensors(change, message):
    with pytest.raises(ValueError, match=message):
        call(make_case(4, 16, 2) | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0, a float, wanted a positive number"),
        ({"dropout": 1.0}, r"dropout: got 1.0, a float, wanted a probability in \[0, 1\)"),
        ({"seed": torch.tensor(3)}, r"seed: got int64 \[\], wanted an int64 tensor \[1\]"),
        ({"out_dtype": torch.int32}, "out_dtype: got torch.int32, a dtype, wanted float32, bfloat16 or float16"),
    ],
    ids=["temperature", "dropout", "seed", "out_dtype"],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        call(make_case(4, 16, 2), **options)


def test_no_adapters():
    with pytest.raises(ValueError, match=r"adapter_outputs: got \[\], a list, wanted a list or tuple of at least one"):
        call(make_case(4, 16, 0))


@pytest.mark.parametrize("scale", [1j, "1", None, float("nan"), torch.ones(2), torch.ones(1).double()], ids=str)
def test_bad_scale_of_a_bottleneck(scale):
    case = make_case(4, 16, 0)
    with pytest.raises(ValueError, match=r"scales: got .*, wanted a number, or a tensor with one element"):
        fusion_of_bottlenecks(
            case["query_input"], [torch.ones(4, 3)], [torch.ones(16, 3)], [None], [scale],
            *(case[name] for name in NAMES),
        )  # fmt: skip
