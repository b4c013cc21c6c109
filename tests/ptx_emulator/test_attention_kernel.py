"""The forward of ia3_attention on the emulated GPU: right for all that it takes, in any order of CTAs; what it costs,
counted and read from machine code; and what goes to torch's attention instead."""

from pathlib import Path

import pytest
import tolerances
import torch
from attention_cases import expected_forward, make_case, on_gpu_plan, stock
from comparison import assert_close, error, short
from test_attention import HIDING, masks

import ptx_emulator
from peft_kernels.ops import _attention_plan, ia3_attention
from ptx_emulator import cards, report

CSRC = Path(__file__).parent.parent.parent / "csrc"
KERNEL = "attention_forward_kernel"
BF16, FP16 = torch.bfloat16, torch.float16
# (B, H, H_kv, S_q, S_k, D): tiles that end in the middle, padded head dimensions, each instance, heads that share keys,
# one query.
SHAPES = [
    (1, 1, 1, 1, 1, 8), (2, 2, 2, 70, 130, 64), (1, 4, 2, 100, 333, 24), (1, 6, 2, 150, 150, 80),
    (1, 2, 1, 65, 200, 128), (1, 2, 1, 70, 140, 256), (2, 8, 1, 1, 300, 64),
]  # fmt: skip

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture
def emulated(monkeypatch):
    from ptx_emulator.ops import emulated

    on_gpu_plan(monkeypatch)
    with emulated() as launches:
        yield launches


def call(case, function=ia3_attention):
    with torch.no_grad():
        return function(**case.tensors, **case.options)


def launch_of(emulated, case):
    """The result, and the one launch that made it."""
    out = call(case)
    (launch,) = emulated()
    assert KERNEL in launch["kernel"]
    return out, launch


# ---- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 5, 70])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_shapes(emulated, shape, prefix):
    dtype = FP16 if SHAPES.index(shape) % 3 == 2 else BF16
    case = make_case(*shape, dtype=dtype, prefix=prefix, causal=True, window=10**12)
    assert_close(launch_of(emulated, case)[0], expected_forward(case), tolerances.attention(dtype))


@pytest.mark.parametrize("mask", list(masks()))
def test_masks(emulated, mask):
    case = make_case(2, 4, 2, 70, 290, 24, BF16, prefix=7, **masks()[mask])
    assert_close(launch_of(emulated, case)[0], expected_forward(case), tolerances.attention(BF16))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_masks_of_each_instance(emulated, dim):
    mask = torch.randn(1, 4, 70, 150).masked_fill(torch.rand(1, 4, 70, 150) > 0.8, -torch.inf)
    case = make_case(2, 4, 2, 70, 150, dim, BF16, attn_mask=mask, causal=True)
    assert_close(launch_of(emulated, case)[0], expected_forward(case), tolerances.attention(BF16))


@pytest.mark.parametrize("mask", list(HIDING))
def test_queries_that_see_nothing(emulated, mask):
    case = make_case(2, 2, 1, 50, 30, 16, BF16, **HIDING[mask])
    out, _ = launch_of(emulated, case)
    wanted = expected_forward(case)
    hidden = (wanted == 0).all(-1)
    assert hidden.any() and not out[hidden].any()
    assert_close(out, wanted, tolerances.attention(BF16))


@pytest.mark.parametrize("scale", [0.0, -0.2, 30.0])
def test_scale_of_scores(emulated, scale):
    # Scores reach 1000, so that those of a later tile make everything before them vanish.
    case = make_case(1, 2, 1, 40, 200, 64, BF16, prefix=3, window=300, scale=scale)
    tolerance = tolerances.attention(BF16) * (1 if scale < 1 else 50)  # e^score of scores that are rounded
    assert_close(launch_of(emulated, case)[0], expected_forward(case), tolerance)


@pytest.mark.parametrize("scale_dtype", [torch.float32, BF16], ids=short)
@pytest.mark.parametrize("scales", [(), ("l_q",), ("l_k", "l_v")], ids="-".join)
def test_scales_and_prefixes(emulated, scales, scale_dtype):
    case = make_case(2, 4, 2, 21, 70, 40, FP16, scales=scales, prefix=40, scale_dtype=scale_dtype)
    assert_close(launch_of(emulated, case)[0], expected_forward(case), tolerances.attention(FP16))


@pytest.mark.parametrize("prefix", [0, 32])
@pytest.mark.parametrize("scales", [(), ("l_q", "l_k", "l_v")], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
def test_no_worse_than_stock(emulated, dtype, scales, prefix):
    padding = torch.ones(2, 260, dtype=torch.bool)
    case = make_case(2, 4, 2, 260, 260, 64, dtype, scales=scales, scale_dtype=dtype, prefix=prefix, causal=True)
    case.options["key_padding_mask"] = padding  # hides nothing, but torch has no fast path for it
    wanted = expected_forward(case)
    ours, others = error(launch_of(emulated, case)[0], wanted), error(call(case, stock), wanted)
    assert ours <= tolerances.VERSUS_STOCK * others, f"{ours:.3g}, stock {others:.3g}"


def test_saved_for_the_backward(emulated):
    """The logarithms of the sums, and the real keys' share before l_v, are those of the CPU."""
    case = make_case(2, 4, 2, 70, 100, 64, BF16, prefix=5, causal=True)
    tensors = case.tensors
    tensors["l_v"][::7] = 0
    arguments = (
        *(tensors[name] for name in ("q", "k", "v", "l_q", "l_k", "l_v")), 0.125, True, 0, None, None,
        tensors["prefix_k"], tensors["prefix_v"], None, None, 0.0, None, True,
    )  # fmt: skip
    out, real, lse = torch.ops.peft_kernels.attention_forward(*arguments)
    assert emulated()
    cpu = torch.ops.peft_kernels.attention_forward.default
    wanted = cpu.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)
    for actual, value in zip((out, real), wanted[:2], strict=True):
        assert_close(actual, value.double(), tolerances.attention(BF16))
    # The sum is that of weights rounded to bf16.
    assert (lse - wanted[2]).abs().max() <= 1.5 * 2**-8


def test_same_bits_in_any_order(emulated):
    case = make_case(2, 4, 2, 150, 200, 64, BF16, prefix=5, causal=True, key_padding_mask=torch.rand(2, 200) > 0.2)
    results = []
    for seed in range(3):
        with ptx_emulator.set_checks(seed=seed):
            results.append(call(case))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# ---- what it costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_reads_keys_once_for_each_tile_of_queries(emulated, dim):
    rows = 64 if dim == 256 else 128
    case = make_case(1, 2, 2, 2 * rows, 256, dim, BF16, scales=(), window=10**6)
    _, launch = launch_of(emulated, case)
    for name in ("k", "v"):
        read, size = 32 * launch["sectors_read"][name], case.tensors[name].nbytes
        assert 2 * size <= read <= 1.05 * 2 * size, name
    for direction in ("global_load", "global_store"):
        assert launch[direction]["sectors"] == launch[direction]["ideal_sectors"], direction
    wavefronts, ideal_wavefronts = report.shared_wavefronts(launch)
    assert wavefronts == ideal_wavefronts


def test_grouped_heads_read_keys_together(emulated):
    case = make_case(2, 8, 2, 16, 256, 64, BF16, scales=(), window=10**6)
    _, launch = launch_of(emulated, case)
    assert launch["grid"] == (1, 2, 2)
    assert 32 * launch["sectors_read"]["k"] == case.tensors["k"].nbytes


@pytest.mark.parametrize("options", ["prefix", "scales", "padding", "mask"])
def test_no_bank_conflicts(emulated, options):
    more = {
        "prefix": {"prefix": 70, "window": 10**6},
        "scales": {"window": 10**6},
        "padding": {"key_padding_mask": torch.rand(1, 256) > 0.5},
        "mask": {"attn_mask": torch.randn(128, 256)},
    }[options]
    scales = ("l_q", "l_k", "l_v") if options == "scales" else ()
    for dim in (64, 128, 256):
        _, launch = launch_of(emulated, make_case(1, 2, 2, 128, 256, dim, BF16, scales=scales, **more))
        wavefronts, ideal_wavefronts = report.shared_wavefronts(launch)
        assert wavefronts == ideal_wavefronts, dim
        loads = launch["global_load"]
        assert loads["sectors"] <= 1.05 * loads["ideal_sectors"], dim


def test_skips_tiles_that_padding_hides(emulated):
    padding = torch.arange(512) < torch.tensor([[64], [512]])
    case = make_case(2, 1, 1, 128, 512, 64, BF16, scales=(), key_padding_mask=padding)
    _, launch = launch_of(emulated, case)
    # The first hidden tile behind those of which nothing is hidden is on its way before it is known to be hidden.
    assert 32 * launch["sectors_read"]["k"] == case.tensors["k"].nbytes * (64 + 64 + 512) // 1024


@pytest.mark.parametrize("architecture", cards.ALL)
def test_machine_code(architecture):
    kernels = report.resources(CSRC / "attention/cuda/launch_forward.cu", architecture, includes=(CSRC,))
    assert len(kernels) == 6
    for kernel, used in kernels.items():
        assert used.spill_bytes == used.stack_bytes == 0, kernel
        if isinstance(used.mma_share, str):
            pytest.skip("needs nvdisasm")
        assert used.mma_share >= cards.least_share(0.25, architecture), kernel


# ---- who runs -----------------------------------------------------------------------------------------------------

TO_TORCH = {
    "fp32": ({"dtype": torch.float32, "causal": True, "prefix": 3}, "q is fp32"),
    "head_dim 20": ({"head_dim": 20, "prefix": 3}, "head_dim is 20"),
    "head_dim 264": ({"head_dim": 264, "prefix": 3}, "head_dim is 264"),
    "nothing masked": ({}, "torch has FlashAttention"),
    "causal": ({"causal": True}, "torch has FlashAttention"),
}
HERE = {
    "prefix": {"prefix": 3},
    "cache": {"causal": True, "num_queries": 5},
    "window": {"window": 20},
    "padding": {"key_padding_mask": torch.ones(2, 37, dtype=torch.bool)},
    "mask": {"attn_mask": torch.zeros(37, 37)},
}


@pytest.mark.parametrize("name", list(TO_TORCH))
def test_goes_to_torch(emulated, name, monkeypatch, capsys):
    options, reason = TO_TORCH[name]
    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")
    monkeypatch.setattr(_attention_plan, "_printed", set())
    case = make_case(**{"dtype": BF16} | options)
    out = call(case)
    assert not emulated() and f"torch's attention ({reason}" in capsys.readouterr().err
    assert_close(out, expected_forward(case), tolerances.attention(out.dtype))


@pytest.mark.parametrize("name", list(HERE))
def test_has_a_kernel(emulated, name, monkeypatch, capfd):
    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")
    case = make_case(dtype=BF16, head_dim=8 * (2 + list(HERE).index(name)), **HERE[name])
    out, _ = launch_of(emulated, case)
    assert "ia3_attention forward batch=2 heads=4/2" in capfd.readouterr().err
    assert_close(out, expected_forward(case), tolerances.attention(BF16))


def test_rows_at_any_address_go_to_torch(emulated):
    case = make_case(dtype=BF16, prefix=3)
    case.tensors["k"] = torch.nn.functional.pad(case.tensors["k"], (0, 3))[..., :64]
    out = call(case)
    assert not emulated()
    assert_close(out, expected_forward(case), tolerances.attention(BF16))


@pytest.mark.parametrize(
    ("dtype", "dropout", "reason"), [(torch.float32, 0.0, "q is fp32"), (BF16, 0.1, "weights can't be dropped here")]
)
def test_the_op_refuses_what_it_has_no_kernel_for(emulated, dtype, dropout, reason):
    case = make_case(dtype=dtype, scales=())
    tensors = (case.tensors[name] for name in "qkv")
    with pytest.raises(ValueError, match=rf"q, k and v: got tensors that no CUDA kernel takes \({reason}"):
        torch.ops.peft_kernels.attention_forward(
            *tensors, None, None, None, 1.0, False, 0, *[None] * 6, dropout, torch.tensor([1]), False
        )
