"""The backward of ia3_attention on the emulated GPU: numerics, what a launch fetches, order of blocks, registers."""

from pathlib import Path

import pytest
import tolerances
import torch
from attention_cases import expected, make_case, run, stock
from comparison import assert_close, error, short

import ptx_emulator
from peft_kernels.ops._attention_by_torch import ScaledHeads
from ptx_emulator import cards, report

CSRC = Path(__file__).parent.parent.parent / "csrc"
SOURCE = CSRC / "attention/cuda/launch_backward.cu"
PROFILES = ["sm_80", "sm_89", "sm_90"]
HALVES = [torch.bfloat16, torch.float16]
PREPARE, KEYS, QUERIES = (f"attention_{name}_kernel" for name in ("prepare", "keys", "queries"))
SUM = "sum_parts_kernel"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


def differentiate(case, wants=None) -> dict[str, torch.Tensor]:
    """The op itself, whatever ia3_attention sends where: every gradient by name."""
    ops, names = torch.ops.peft_kernels, ("q", "k", "v", "l_q", "l_k", "l_v", "prefix_k", "prefix_v")
    q, k, v, l_q, l_k, l_v, prefix_k, prefix_v = (case.tensors.get(name) for name in names)
    options = case.options
    mask = options.get("attn_mask")
    arguments = (
        q, k, v, l_q, l_k, l_v, options.get("scale", q.shape[-1] ** -0.5), options.get("causal", False),
        options.get("window") or 0, options.get("key_padding_mask"),
        None if mask is None else mask.expand(*q.shape[:3], k.shape[2]), prefix_k, prefix_v, None, None,
        0.0, None,
    )  # fmt: skip
    out, out_real, lse = ops.attention_forward(*arguments, True)
    given = [name in case.tensors for name in names]
    saved = out, out_real if l_v is not None else None, lse
    grads = ops.attention_backward(case.grad_out, *arguments, *saved, wants or given)
    found = {name: grad for name, grad, is_given in zip(names, grads, given, strict=True) if is_given}
    return {
        name: grad.transpose(1, 2) if name in "qkv" else grad.reshape(case.tensors[name].shape)
        for name, grad in found.items()
        if grad.numel()
    }


def check(case, profile="sm_80"):
    with ptx_emulator.profile(profile):
        actual = differentiate(case)
    wanted = expected(case)
    for name, value in actual.items():
        assert_close(value, wanted[name], tolerances.attention(case.grad_out.dtype), name)
    return actual


def launches_of(emulated, case, **options):
    emulated()
    differentiate(case, **options)
    return {report.plain_name(record["kernel"]): record for record in emulated()}


def read(record, name):
    """Bytes of an array, which may be known under several names."""
    return 32 * sum(count for known, count in record["sectors_read"].items() if name in known.split(", "))


# (B, H, H_kv, S_q, S_k, D): tiles that end in their middle, heads in groups, head dimensions below an instance's.
SHAPES = [
    (1, 2, 1, 100, 100, 64), (2, 4, 2, 37, 150, 128), (2, 3, 1, 33, 40, 8), (2, 6, 2, 130, 70, 24),
    (1, 2, 2, 65, 200, 96), (1, 2, 1, 70, 90, 200),
]  # fmt: skip


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("dtype", HALVES, ids=short)
@pytest.mark.parametrize("prefix", [0, 70])
@pytest.mark.parametrize("shape", SHAPES, ids="b{0[0]}-h{0[1]}-kv{0[2]}-q{0[3]}-k{0[4]}-d{0[5]}".format)
def test_shapes(emulated, shape, prefix, dtype, profile):
    check(make_case(*shape, dtype=dtype, prefix=prefix, causal=shape[3] <= shape[4]), profile)


LEFT = torch.arange(200) >= torch.tensor([[3], [170]])
MASKS = {
    "window": {"window": 30},
    "causal-window": {"window": 90, "causal": True},
    "padding-left": {"key_padding_mask": LEFT, "causal": True},
    "padding-right": {"key_padding_mask": ~LEFT},
    "padding-random": {"key_padding_mask": torch.arange(400).view(2, 200) * 7919 % 10 > 3},
    "bool": {"attn_mask": torch.arange(90 * 200).view(90, 200) * 7919 % 10 > 3, "causal": True},
    "additive": {"attn_mask": torch.linspace(-3, 3, 2 * 4 * 90 * 200).sin().view(2, 4, 90, 200)},
    "additive-heads": {"attn_mask": torch.linspace(-3, 3, 4 * 200).view(1, 4, 1, 200).bfloat16(), "window": 50},
    "additive-strided": {"attn_mask": torch.linspace(-3, 3, 90 * 200).sin().view(200, 90).half().mT},
    "negative-scale": {"scale": -0.2, "causal": True},
}


@pytest.mark.parametrize("head_dim", [40, 128, 256])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks(emulated, mask, prefix, head_dim):
    check(make_case(2, 4, 2, 90, 200, head_dim, torch.bfloat16, prefix=prefix, **mask))


@pytest.mark.parametrize("scales", [(), ("l_q",), ("l_k",), ("l_v",)], ids="-".join)
@pytest.mark.parametrize("prefix", [0, 20])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=short)
def test_what_is_optional(emulated, scale_dtype, prefix, scales):
    case = make_case(2, 4, 2, 50, 70, 64, torch.bfloat16, scales=scales, prefix=prefix, causal=True)
    if prefix and scale_dtype is torch.bfloat16:  # which is taken as it is; scales come in fp32
        case.tensors |= {name: case.tensors[name].to(scale_dtype) for name in ("prefix_k", "prefix_v")}
    check(case)


HIDING = {
    "causal": {"causal": True},
    "padding": {"key_padding_mask": torch.tensor([[True] * 30, [False] * 30])},
    "bool": {"attn_mask": (torch.arange(50) % 3 > 0)[:, None].expand(50, 30)},
    "additive": {"attn_mask": torch.where(torch.arange(50) % 3 > 0, 0.0, -torch.inf)[:, None].expand(50, 30)},
}


@pytest.mark.parametrize("mask", HIDING.values(), ids=HIDING)
@pytest.mark.parametrize("prefix", [0, 7])
def test_queries_that_see_nothing(emulated, prefix, mask):
    case = make_case(2, 2, 1, 50, 30, 16, torch.bfloat16, prefix=prefix, **mask)
    actual = check(case)
    if not prefix:
        hidden = (expected(case)["out"] == 0).all(dim=-1)
        assert hidden.any() and not actual["q"][hidden].any()


def test_large_scores_leave_no_infinities(emulated):
    """Weights of hidden keys would be 2^(score - lse), beyond fp32, and times zero not a number."""
    case = make_case(1, 2, 1, 40, 100, 64, torch.bfloat16, prefix=3, causal=True, scale=-30.0)
    case.tensors["q"] += 3
    case.tensors["k"] += 3
    for name, value in differentiate(case).items():
        assert value.isfinite().all(), name


def test_zero_scales_have_gradients(emulated):
    case = make_case(2, 4, 2, 33, 40, 16, torch.bfloat16, prefix=3, causal=True)
    for name in ("l_q", "l_k", "l_v"):
        case.tensors[name][::3] = 0
    actual = check(case)
    for name in ("l_q", "l_k", "l_v"):
        assert actual[name][::3].all(), name


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", HALVES, ids=short)
@pytest.mark.parametrize("prefix", [0, 32])
@pytest.mark.parametrize("scales", [(), ("l_q", "l_k", "l_v")], ids=["plain", "scaled"])
def test_no_worse_than_stock(emulated, scales, prefix, dtype, head_dim):
    case = make_case(2, 4, 2, 260, 260, head_dim, dtype, scales=scales, scale_dtype=dtype, prefix=prefix, causal=True)
    ours = case
    ours.tensors = {name: x.float() if name.startswith("l_") else x for name, x in case.tensors.items()}
    actual, wanted = differentiate(ours), expected(case)
    case.tensors = {name: x.to(dtype) for name, x in case.tensors.items()}
    theirs = run(case, stock)
    for name, value in actual.items():
        mine, others = error(value.to(theirs[name].dtype), wanted[name]), error(theirs[name], wanted[name])
        assert mine <= tolerances.VERSUS_STOCK * others, f"{name}: {mine:.3g}, stock {others:.3g}"


# ---- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_moves_each_operand_once(emulated, head_dim):
    """A CTA has a tile of keys, or of queries: it reads once what stays, and once what passes by."""
    case = make_case(1, 2, 1, 256, 64, head_dim, torch.bfloat16, scales=())
    record = launches_of(emulated, case)[KEYS]
    halves = max(head_dim // 128, 1)  # of 256 channels, each for itself
    assert record["grid"][0] == halves
    for name, tensor in (("q", case.tensors["q"]), ("grad_out", case.grad_out), ("k", case.tensors["k"])):
        assert read(record, name) == halves * tensor.nbytes, name
    if halves == 1:
        assert report.moved_bytes(record) <= 1.05 * report.compulsory_bytes(record)

    case = make_case(1, 1, 1, 64, 512, head_dim, torch.bfloat16, scales=())
    record = launches_of(emulated, case)[QUERIES]
    for name in ("q", "k", "v"):
        assert read(record, name) == case.tensors[name].nbytes, name
    assert report.moved_bytes(record) <= 1.05 * report.compulsory_bytes(record)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("prefix", [0, 64])
def test_sectors_and_banks(emulated, prefix, head_dim):
    case = make_case(1, 4, 2, 128, 128, head_dim, torch.bfloat16, prefix=prefix, causal=True)
    records = launches_of(emulated, case)
    # Its lanes read scales by half sectors; rows of the batch once, and whole.
    for name in ("q", "grad_out", "out_real", *(["out"] if prefix else [])):
        assert read(records[PREPARE], name) == case.grad_out.nbytes, name
    for name, record in records.items():
        for direction in ("global_load", "global_store") if name != PREPARE else ("global_store",):
            traffic = record[direction]
            assert traffic["sectors"] <= 1.02 * traffic["ideal_sectors"], (name, direction)
        wavefronts, ideal_wavefronts = report.shared_wavefronts(record)
        assert wavefronts == ideal_wavefronts, name
        assert record["order_dependent_atomics"] == 0


@pytest.mark.parametrize("mask", ["padding-left", "additive"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_any_order_of_blocks_gives_the_same_bits(emulated, head_dim, mask):
    case = make_case(2, 4, 2, 90, 200, head_dim, torch.bfloat16, prefix=70, **MASKS[mask])
    wanted = differentiate(case)
    for seed in (1, 2, 3):
        with ptx_emulator.set_checks(seed=seed):
            actual = differentiate(case)
        for name, value in wanted.items():
            assert torch.equal(actual[name], value), name


NAMES = ("q", "k", "v", "l_q", "l_k", "l_v", "prefix_k", "prefix_v")
LAUNCHED = dict(zip(NAMES, (QUERIES, KEYS, KEYS, QUERIES, QUERIES, None, KEYS, KEYS), strict=True))


@pytest.mark.parametrize("wanted", NAMES)
def test_computes_what_is_asked_for(emulated, wanted):
    case = make_case(1, 2, 1, 70, 80, 64, torch.bfloat16, prefix=5, causal=True)
    full = differentiate(case)
    wants = [name == wanted for name in NAMES]
    launched = launches_of(emulated, case, wants=wants)
    assert {KEYS, QUERIES} & launched.keys() == {LAUNCHED[wanted]} - {None}
    ((name, value),) = differentiate(case, wants).items()
    assert name == wanted and torch.equal(value, full[name])


def test_rows_anywhere(emulated):
    """A gradient whose rows are one, and one whose rows begin anywhere."""
    case = make_case(1, 2, 2, 40, 50, 64, torch.bfloat16)
    case.grad_out = torch.ones((), dtype=torch.bfloat16).expand(1, 2, 40, 64)
    case.grad_out = torch.cat([case.grad_out, case.grad_out], dim=-1)[..., 3:67]
    check(case)


# ---- the scalings around torch's attention -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=short)
@pytest.mark.parametrize("layout", ["projected", "by-head"])
def test_scaled_heads(emulated, layout, dtype):
    x, grad = torch.randn(2, 2, 150, 4, 40).to(dtype).transpose(2, 3)  # [B, H, S, D], as projections leave it
    if layout == "by-head":
        x, grad = x.contiguous(), grad.contiguous()
    x, factors = x.requires_grad_(), (1 + torch.randn(4, 1, 40)).requires_grad_()
    y = ScaledHeads.apply(x, factors)
    y.backward(grad)
    wanted_y = (x.double() * factors.double()).detach()
    assert torch.equal(y, wanted_y.float().to(dtype))
    assert torch.equal(x.grad, (grad.double() * factors.double()).float().to(dtype))
    wanted = (grad.double() * x.double()).sum((0, 2), keepdim=True)[0]
    assert_close(factors.grad, wanted, tolerances.FP32_SUM)


def test_scaled_heads_read_once(emulated):
    x = torch.randn(2, 150, 4, 64).bfloat16().transpose(1, 2).requires_grad_()
    y = ScaledHeads.apply(x, torch.ones(4, 1, 64, requires_grad=True))
    emulated()
    y.backward(torch.randn(2, 150, 4, 64).bfloat16().transpose(1, 2))
    records = {report.plain_name(record["kernel"]): record for record in emulated()}
    assert records.keys() == {"scale_columns_kernel", SUM}
    for name in ("grad_y", "x"):
        assert read(records["scale_columns_kernel"], name) == x.nbytes


@pytest.mark.parametrize("architecture", cards.ALL)
def test_registers(architecture):
    kernels = report.resources(SOURCE, architecture, includes=(CSRC,))
    assert len(kernels) == 2 * 3 * 3
    for kernel, used in kernels.items():
        # On sm_120, up to four registers of an instance are more than the 255 that a thread can have.
        spills = architecture == "sm_120" and used.registers == 255
        assert used.stack_bytes <= 16 * spills and used.spill_bytes <= 36 * spills, kernel
        if "prepare" not in kernel and not isinstance(used.mma_share, str):
            assert used.mma_share >= cards.least_share(0.25, architecture), kernel
