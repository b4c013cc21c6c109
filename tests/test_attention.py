"""The ia3_attention family against the fp64 oracle and torch's attention: numerics, masks, shapes, strides, scales."""

from dataclasses import replace

import pytest
import tolerances
import torch
from attention_cases import angles, expected, make_case, on_gpu_plan, run, stock
from comparison import DTYPES, assert_close, error, short
from hypothesis import given
from hypothesis import strategies as st

from peft_kernels.ops import ia3_attention

pytestmark = pytest.mark.kernels

# (B, H, H_kv, S_q, S_k, D): one query and several, blocks of 256 keys and of 8 to 64 queries that end in their middle,
# several parts of the queries and splits of the keys, grouped heads, head dimensions that fit no vector or tile.
SHAPES = [
    (1, 1, 1, 1, 1, 1), (2, 2, 1, 1, 300, 80), (1, 4, 2, 3, 70, 33), (2, 3, 3, 65, 65, 64), (1, 2, 2, 130, 70, 32),
    (3, 4, 1, 20, 21, 7), (1, 2, 1, 70, 270, 128), (1, 1, 1, 40, 40, 256), (1, 2, 1, 600, 1100, 16),
    (4, 8, 8, 9, 9, 40),
]  # fmt: skip


@pytest.fixture
def backend(backend, request, monkeypatch):
    if request.node.callspec.params["backend"] == "emulated":
        on_gpu_plan(monkeypatch)
    return backend


def shape_id(shape):
    return "b{}-h{}-kv{}-q{}-k{}-d{}".format(*shape)


def make(shape, dtype=torch.float32, **options):
    return make_case(*shape, dtype=dtype, **options)


def check(case, tolerance=None):
    """The result and all gradients are as near to the oracle's as their dtype allows."""
    actual, wanted = run(case), expected(case)
    dtype = case.tensors["q"].dtype
    assert actual.keys() == wanted.keys()
    assert actual["out"].dtype == dtype and actual["out"].transpose(1, 2).is_contiguous()
    for name, value in wanted.items():
        assert name == "out" or actual[name].dtype == case.tensors[name].dtype
        assert_close(actual[name], value, tolerance or tolerances.attention(dtype), name)
    return actual


# ---- shapes and dtypes -------------------------------------------------------------------------------------------


@pytest.mark.may_launch_nothing  # torch has fp32, and head dimensions that are no multiple of 8
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes(backend, shape, dtype):
    # Every other shape is causal, which also asks for other blocks of keys.
    check(make(shape, dtype, causal=SHAPES.index(shape) % 2 == 0 and shape[3] <= shape[4]))


@pytest.mark.parametrize("scales", [(), ("l_q",), ("l_k",), ("l_v",), ("l_k", "l_v")], ids="-".join)
@pytest.mark.parametrize("prefix", [0, 1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_what_is_optional(dtype, prefix, scales):
    check(make((2, 4, 2, 21, 70, 40), dtype, scales=scales, prefix=prefix, causal=True))


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_dtypes_of_scales_and_prefixes(dtype, scale_dtype):
    case = make((1, 2, 1, 20, 20, 16), dtype, scale_dtype=scale_dtype, prefix=5)
    actual, wanted = run(case), expected(case)
    for name, value in wanted.items():
        assert_close(actual[name], value, tolerances.attention(dtype) + 2 * tolerances.ROUNDING[scale_dtype], name)


@pytest.mark.parametrize("scale", [0.3, 1.0, 0.0, -0.2, 2])
@pytest.mark.parametrize("prefix", [0, 3])
def test_scale_of_scores(cpu_isa, prefix, scale):
    check(make((1, 2, 2, 33, 40, 16), prefix=prefix, scale=scale, causal=True))


def test_large_scores(cpu_isa):
    # Sums of e^score would overflow; most weights are too small for fp32.
    case = make((1, 1, 1, 40, 300, 64), scale=30.0)
    actual, wanted = run(case), expected(case)
    # Scores of up to 1000 are known to their 24th bit, and so are the logarithms of the weights.
    for name, value in wanted.items():
        assert_close(actual[name], value, 1000 * 2**-22, name)


def test_weights(cpu_isa):
    """Each weight of two, down to e^-87, to a few units in the last place."""
    x = torch.linspace(-87, 0, 2000)
    keys = torch.stack([torch.zeros_like(x), x], dim=1)[:, None, :, None]
    values = torch.tensor([0.0, 1.0])[None, None, :, None].expand(len(x), 1, 2, 1)
    weight = ia3_attention(torch.ones(len(x), 1, 1, 1), keys, values, scale=1.0).flatten()
    wanted = x.double().sigmoid()
    # The factor log2(e) and its product with x are rounded to 24 bits each.
    assert ((weight / wanted - 1).abs() <= 4e-7 + 2**-23 * x.abs()).all()


@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 3), group=st.integers(1, 3), num_queries=st.integers(1, 140),
    num_keys=st.integers(1, 300), head_dim=st.integers(1, 100), prefix=st.sampled_from([0, 0, 1, 33]),
    dtype=st.sampled_from(DTYPES), scales=st.sets(st.sampled_from(["l_q", "l_k", "l_v"])), causal=st.booleans(),
    window=st.sampled_from([None, 1, 7, 100]), padding=st.booleans(), data_seed=st.integers(0, 2**31),
)  # fmt: skip
def test_random_cases(
    cpu_isa, batch, kv_heads, group, num_queries, num_keys, head_dim, prefix, dtype, scales, causal, window, padding,
    data_seed,
):  # fmt: skip
    torch.manual_seed(data_seed)
    shape = batch, kv_heads * group, kv_heads, num_queries, num_keys, head_dim
    mask = torch.rand(batch, num_keys) > 0.3 if padding else None
    case = make(shape, dtype, prefix=prefix, scales=sorted(scales), causal=causal, window=window, key_padding_mask=mask)
    actual, wanted = run(case), expected(case)
    # Few numbers may cancel: the error is held against the size of what was added up, about one for each query.
    for name, value in wanted.items():
        size = value.square().mean().sqrt().clamp_min(0.3 * num_queries**0.5)
        difference = (actual[name].double() - value).square().mean().sqrt()
        assert difference <= 3 * tolerances.attention(dtype) * size, name


# ---- masks -------------------------------------------------------------------------------------------------------

SHAPE = (2, 4, 2, 70, 290, 24)


def masks():
    batch, heads, _, queries, keys, _ = SHAPE
    generator = torch.Generator().manual_seed(1)
    random = torch.rand(batch, heads, queries, keys, generator=generator, device="cpu")
    left = torch.arange(keys) >= torch.tensor([[3], [270]])
    return {
        "causal": {"causal": True},
        "window": {"window": 30},
        "causal-window": {"causal": True, "window": 9},
        "window-1": {"window": 1},
        "window-wide": {"window": 10**12, "causal": True},
        "padding-left": {"key_padding_mask": left},
        "padding-right": {"key_padding_mask": ~left, "causal": True},
        "bool": {"attn_mask": random > 0.4},
        "bool-2d": {"attn_mask": random[0, 0] > 0.4, "causal": True},
        "additive": {"attn_mask": random},
        "additive-heads": {"attn_mask": random[:1, :, :1].bfloat16(), "window": 50},
        "additive-keys": {"attn_mask": random[:, :1, :1].half()},
        "additive-strided": {"attn_mask": random.transpose(2, 3).contiguous().transpose(2, 3)},
        "additive-hidden": {"attn_mask": torch.where(random > 0.3, random, -torch.inf)},
        "additive-minimum": {"attn_mask": torch.where(random > 0.3, 0.0, torch.finfo(torch.float32).min)},
        "all": {"causal": True, "window": 60, "key_padding_mask": left, "attn_mask": random},
    }


@pytest.mark.may_launch_nothing  # torch has fp32, and head dimensions that are no multiple of 8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("prefix", [0, 7])
@pytest.mark.parametrize("mask", list(masks()))
def test_masks(backend, mask, prefix, dtype):
    check(make(SHAPE, dtype, prefix=prefix, **masks()[mask]))


HIDING = {
    "causal": {"causal": True},
    "window": {"window": 20},
    "padding": {"key_padding_mask": torch.tensor([[True] * 30, [False] * 30])},
    "bool": {"attn_mask": (torch.arange(50) % 3 > 0)[:, None].expand(50, 30)},
    "additive": {"attn_mask": torch.where(torch.arange(50) % 3 > 0, 0.0, -torch.inf)[:, None].expand(50, 30)},
}


@pytest.mark.may_launch_nothing  # torch has fp32, and head dimensions that are no multiple of 8
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("mask", list(HIDING))
def test_queries_that_see_nothing(backend, mask, dtype):
    case = make((2, 2, 1, 50, 30, 16), dtype, **HIDING[mask])
    actual = check(case)
    hidden = (expected(case)["out"] == 0).all(dim=-1)
    assert hidden.any() and not hidden.all()
    assert not actual["out"][hidden].any() and not actual["q"][hidden].any()
    # A prefix is seen by all of them.
    out = check(make((2, 2, 1, 50, 30, 16), dtype, prefix=2, **HIDING[mask]))["out"]
    assert (out != 0).any(dim=-1).all()


def test_nothing_is_visible(cpu_isa):
    case = make((2, 2, 1, 50, 300, 16), key_padding_mask=torch.zeros(2, 300, dtype=torch.bool))
    for name, value in run(case).items():
        assert not value.any(), name


# ---- scales ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("name", ["l_q", "l_k", "l_v"])
def test_zero_and_negative_scales(cpu_isa, name, prefix):
    case = make((2, 4, 2, 33, 40, 16), prefix=prefix, causal=True)
    case.tensors[name][::3] = 0
    case.tensors[name][1::3] *= -1
    actual = check(case)
    assert actual[name][::3].all(), "a scale of zero has a gradient"
    case.tensors[name].zero_()
    check(case)


def test_scales_are_those_of_the_heads():
    case = make((1, 4, 2, 9, 9, 8), scales=())
    wanted = ia3_attention(*(case.tensors[name] for name in "qkv"))
    flat = {"l_q": torch.ones(32), "l_k": torch.ones(16), "l_v": torch.ones(16)}
    flat["l_v"][8:] = 2  # of the second key head, so of the third and fourth query head
    out = ia3_attention(*(case.tensors[name] for name in "qkv"), **flat)
    assert torch.equal(out[:, :2], wanted[:, :2]) and torch.equal(out[:, 2:], 2 * wanted[:, 2:])
    heads = {name: value.view(-1, 8) for name, value in flat.items()}
    assert torch.equal(ia3_attention(*(case.tensors[name] for name in "qkv"), **heads), out)


# ---- dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("prefix", [0, 7])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=shape_id)
def test_dropout(cpu_isa, shape, prefix, dtype):
    seed = torch.tensor([2**40 + SHAPES.index(shape)])
    check(make(shape, dtype, prefix=prefix, dropout=0.3, seed=seed, causal=shape[3] <= shape[4]))


@pytest.mark.parametrize("mask", list(masks()))
def test_dropout_with_masks(cpu_isa, mask):
    check(make(SHAPE, prefix=3, dropout=0.1, seed=torch.tensor([5]), **masks()[mask]))


def test_dropout_keeps_its_share():
    """All values are one: a result is the sum of the weights that were kept, divided by the share that is kept."""
    case = make((4, 8, 8, 64, 256, 8), scales=())
    case.tensors["q"].zero_()  # equal weights
    case.tensors["v"].fill_(1)
    out = ia3_attention(**case.tensors, dropout=0.25)
    count = 4 * 8 * 64 * 256
    share = out[..., 0].mean().item() * 0.75
    assert abs(share - 0.75) <= 5 * (0.75 * 0.25 / count) ** 0.5
    assert not torch.equal(ia3_attention(**case.tensors, dropout=0.25), out)


# ---- rotary embedding --------------------------------------------------------------------------------------------


@pytest.mark.may_launch_nothing  # torch has fp32, and head dimensions that are no multiple of 8
@pytest.mark.parametrize("scales", [(), ("l_q", "l_k", "l_v")], ids=["plain", "scaled"])
@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize(
    ("num_queries", "channels", "batch"),
    [(70, 24, None), (70, 10, 2), (1, 24, 1), (7, 2, None), (33, 0, None)],
    ids=["whole", "partial", "decode", "pair", "none"],
)
def test_rope(backend, num_queries, channels, batch, prefix, scales):
    for dtype in (torch.float32, torch.bfloat16):
        rope = angles(70, channels, batch)
        check(make((2, 4, 2, num_queries, 70, 24), dtype, prefix=prefix, scales=scales, rope=rope, causal=True))


def test_rope_dtype():
    rope = tuple(part.bfloat16() for part in angles(20, 16))
    check(make((1, 2, 2, 20, 20, 16), rope=rope))


# ---- caches, strides, empty calls --------------------------------------------------------------------------------


@pytest.mark.may_launch_nothing  # torch has fp32, and head dimensions that are no multiple of 8
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("new", [1, 2, 5])
def test_decoding(backend, new, dtype):
    """With a cache, the last rows of the whole result come out."""
    case = make((2, 6, 2, 300, 300, 48), dtype, prefix=3, causal=True)
    tensors = case.tensors
    whole = ia3_attention(**tensors, causal=True)
    step = ia3_attention(**(tensors | {"q": tensors["q"][:, :, -new:]}), causal=True)
    assert_close(step, whole[:, :, -new:].double(), tolerances.attention(dtype))
    wanted = expected(case)["out"][:, :, -new:]
    assert_close(step, wanted, tolerances.attention(dtype))


def test_strides():
    case = make((2, 4, 4, 20, 30, 16), torch.bfloat16, prefix=3, causal=True)
    wanted = run(case)
    layouts = {
        "dense": lambda x: x.contiguous(),
        "cache": lambda x: torch.cat([x, x], dim=-2)[..., : x.shape[-2], :],
        "channels": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
        "columns": lambda x: x.mT.contiguous().mT,
    }
    for name, layout in layouts.items():
        tensors = {key: layout(x) if x.dim() > 1 else x for key, x in case.tensors.items()}
        actual = run(replace(case, tensors=tensors, grad_out=layout(case.grad_out)))
        for key, value in wanted.items():
            assert torch.equal(actual[key], value), f"{name}: {key}"


def test_shared_batch():
    """Keys of a batch stride of 0, as `expand` makes them, are not copied; their gradient is the sum."""
    case = make((3, 2, 2, 20, 30, 16))
    k, v = (case.tensors[name][:1].clone().requires_grad_() for name in "kv")
    ia3_attention(case.tensors["q"], k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)).sum().backward()
    apart = [x.detach().repeat(3, 1, 1, 1).requires_grad_() for x in (k, v)]
    ia3_attention(case.tensors["q"], *apart).sum().backward()
    for shared, single in zip((k, v), apart, strict=True):
        assert_close(shared.grad, single.grad.double().sum(0, keepdim=True), tolerances.FP32_SUM)


@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 4, 5, 8), (2, 0, 0, 4, 5, 8), (2, 2, 1, 0, 5, 8), (2, 2, 1, 4, 0, 8)], ids=shape_id
)
@pytest.mark.parametrize("prefix", [0, 3])
def test_empty(shape, prefix):
    case = make(shape, prefix=prefix)
    actual = run(case)
    if shape[1]:
        for name, value in expected(case).items():
            assert_close(actual[name], value, tolerances.FP32_SUM, name)
    assert actual["out"].shape == case.grad_out.shape


def test_prefix_of_no_rows():
    case = make((2, 4, 2, 20, 30, 16), torch.bfloat16)
    wanted = run(case)
    case.tensors |= {"prefix_k": torch.zeros(2, 0, 16), "prefix_v": torch.zeros(2, 0, 16)}
    actual = run(case)
    assert all(torch.equal(actual[name], value) for name, value in wanted.items())
    assert actual["prefix_k"].shape == (2, 0, 16)


# ---- against torch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("prefix", [0, 32])
@pytest.mark.parametrize("scales", [(), ("l_q", "l_k", "l_v")], ids=["plain", "scaled"])
def test_no_worse_than_stock(cpu_isa, scales, prefix, dtype):
    case = make((2, 4, 2, 260, 260, 64), dtype, scales=scales, scale_dtype=dtype, prefix=prefix, causal=True)
    actual, theirs, wanted = run(case), run(case, stock), expected(case)
    for name, value in wanted.items():
        ours, others = error(actual[name], value), error(theirs[name], value)
        assert ours <= tolerances.VERSUS_STOCK * others, f"{name}: {ours:.3g}, stock {others:.3g}"
