"""ia3_attention with so few queries that keys are read where they lie: the CPU's kernel of csrc/attention/cpu."""

from dataclasses import replace

import pytest
import tolerances
import torch
from attention_cases import angles, expected_forward, make_case, stock
from comparison import DTYPES, assert_close, error, short

from peft_kernels.ops import ia3_attention

pytestmark = pytest.mark.kernels

# Blocks of 128 keys and parts of 256 that end in their middle, vectors of 4 to 16 keys, folds of 4.
NUM_KEYS = [1, 3, 16, 17, 128, 131, 300, 1025]
HALVES = [torch.bfloat16, torch.float16]


def padding(batch: int, num_keys: int) -> torch.Tensor:
    """The first sequence begins late, others have holes; the last key is seen."""
    mask = torch.rand(batch, num_keys) > 0.3
    mask[0] = torch.arange(num_keys) >= num_keys // 2
    mask[:, -1] = True
    return mask


def check(case, tolerance=None):
    with torch.no_grad():
        out = ia3_attention(**case.tensors, **case.options)
    assert_close(out, expected_forward(case), tolerance or tolerances.attention(out.dtype))
    return out


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("num_queries", [1, 2, 7, 16, 17, 49])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_queries_and_groups(cpu_isa, num_queries, group, dtype):
    """Every number of rows of a key head, for numbers of keys that it brings in turn."""
    for num_keys in NUM_KEYS[num_queries % 2 :: 2]:
        causal = num_queries <= num_keys
        case = make_case(2, 2 * group, 2, num_queries, num_keys, 32, dtype=dtype, scales=(), causal=causal)
        check(case)


@pytest.mark.parametrize("head_dim", [1, 8, 16, 40, 64, 80, 100, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_head_dims(cpu_isa, dtype, head_dim):
    """Channels that fill the vectors, pairs of vectors and strips, or do not."""
    for num_queries in (1, 6):
        check(make_case(2, 6, 2, num_queries, 133, head_dim, dtype=dtype, scales=(), causal=True))


OPTIONS = {
    "padding": lambda: {"key_padding_mask": padding(2, 700)},
    "causal-padding": lambda: {"key_padding_mask": padding(2, 700), "causal": True},
    "window": lambda: {"window": 200, "causal": True},
    "window-1": lambda: {"window": 1},
    "bool": lambda: {"attn_mask": torch.rand(2, 6, 1, 700) > 0.4},
    "additive": lambda: {"attn_mask": torch.randn(6, 1, 700), "causal": True},
    "negative": lambda: {"scale": -0.2, "causal": True},
    "rope": lambda: {"rope": angles(700, 16, 2)},
}


@pytest.mark.parametrize(("prefix", "num_queries"), [(0, 1), (0, 33), (5, 4), (130, 1), (130, 4)])
@pytest.mark.parametrize("options", list(OPTIONS))
def test_what_is_optional(cpu_isa, options, prefix, num_queries):
    for dtype in (torch.float32, torch.bfloat16):
        check(make_case(2, 6, 2, num_queries, 700, 32, dtype=dtype, prefix=prefix, **OPTIONS[options]()))


def test_cache(cpu_isa):
    """Any strides: keys of a cache with room for more, of one head after the other, of rows with gaps."""
    for dtype in DTYPES:
        case = make_case(2, 6, 2, 3, 300, 64, dtype=dtype, scales=(), causal=True)
        wanted = check(case)
        layouts = {
            "static": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], dim=2)[:, :, : x.shape[2]],
            "dense": lambda x: x.contiguous(),
            "odd": lambda x: torch.cat([x, x[..., :1]], dim=3)[..., : x.shape[3]],
        }
        for name, layout in layouts.items():
            tensors = {key: layout(x) for key, x in case.tensors.items()}
            assert torch.equal(check(replace(case, tensors=tensors)), wanted), name


def test_nan_and_infinity(cpu_isa):
    """They stay with the sequence and the heads that have them."""
    for dtype in DTYPES:
        case = make_case(2, 4, 2, 2, 200, 32, dtype=dtype, scales=())
        wanted = check(case)
        for value in (torch.nan, torch.inf):
            k = case.tensors["k"].clone()
            k[1, 0, 70] = value
            out = ia3_attention(case.tensors["q"], k, case.tensors["v"])
            assert torch.equal(out[0], wanted[0]) and torch.equal(out[1, 2:], wanted[1, 2:])
            assert out[1, :2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("num_queries", [1, 4, 12])
def test_no_worse_than_stock(cpu_isa, num_queries, dtype):
    for num_keys in (16, 150, 1025):
        case = make_case(4, 9, 3, num_queries, num_keys, 64, dtype=dtype, scales=(), causal=True)
        with torch.no_grad():
            actual, theirs = (function(**case.tensors, causal=True) for function in (ia3_attention, stock))
        wanted = expected_forward(case)
        ours, others = error(actual, wanted), error(theirs, wanted)
        assert ours <= tolerances.VERSUS_STOCK * others, f"{num_keys} keys: {ours:.3g}, stock {others:.3g}"


@pytest.mark.parametrize("shape", [(1, 6, 2, 1, 1100, 32), (2, 8, 1, 12, 700, 16)], ids=["decode", "group"])
def test_thread_count_changes_no_bit(cpu_isa, threads, shape):
    case = make_case(*shape, dtype=torch.bfloat16, prefix=9, causal=True)
    threads(2)
    wanted = check(case)
    for count in (1, 3, 8):
        threads(count)
        assert torch.equal(check(case), wanted)


# The most queries for which the plan names the kernel.
FEW = {"amx": (48, 16, 48), "avx512_bf16": (48,) * 3, "avx512": (48,) * 3, "avx2": (48, 12, 12),
       "neon_bf16": (48, 12, 12), "neon": (48, 12, 12), "portable": (48, 12, 12)}  # fmt: skip


def test_plan(cpu_isa, capfd, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")

    def plan(num_queries, dtype, **options) -> str:
        num_keys = 1100 + DTYPES.index(dtype)  # each plan is printed once, and no dtype with it
        case = make_case(1, 6, 2, num_queries, num_keys, 16, dtype=dtype, scales=())
        ia3_attention(**case.tensors, **options)
        return capfd.readouterr().err

    for dtype, most in zip((torch.float32, *HALVES), FEW[cpu_isa], strict=True):
        assert "4 parts of the keys of each head (few queries)" in plan(1, dtype)
        assert "(few queries)" in plan(most, dtype)
        assert "(blocks of queries)" in plan(most + 1, dtype)
        assert "(blocks of queries)" in plan(1, dtype, dropout=0.1)


def test_forward_of_training(cpu_isa, capfd, monkeypatch):
    """It rounds scores as the backward does, so its kernel is the one of blocks sooner."""
    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")
    for num_queries, kernel in ((4, "few queries"), (5, "blocks of queries")):
        case = make_case(1, 6, 2, num_queries, 1200, 16, scales=())
        case.tensors["q"].requires_grad_()
        ia3_attention(**case.tensors)
        assert f"({kernel})" in capfd.readouterr().err
