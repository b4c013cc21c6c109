"""Bad arguments of ia3_attention: each is a ValueError that names the argument, what it got and what it wanted."""

import pytest
import torch
from attention_cases import angles, make_case
from test_attention_autograd import everything, op_arguments

from peft_kernels.ops import ia3_attention

pytestmark = pytest.mark.kernels

ops = torch.ops.peft_kernels


def call(**changes):
    """A good call of B = 2, H = 4, H_kv = 2, S_q = 5, S_k = 7, D = 8, except for the changes."""
    case = make_case(2, 4, 2, 5, 7, 8, prefix=3)
    arguments = case.tensors | case.options
    for name, value in changes.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    return ia3_attention(**arguments)


def to(target):
    return lambda tensor: tensor.to(target)


FLOATS = "float32, bfloat16 or float16"
CASES = {
    "q-none": ({"q": None}, f"q: got None, a NoneType, wanted a {FLOATS} tensor"),
    "q-3d": ({"q": lambda q: q[0]}, r"q: got float32 \[4, 5, 8\], wanted a .* tensor \[B, heads, S, D\]"),
    "q-fp64": ({"q": to(torch.float64)}, r"q: got float64 \[2, 4, 5, 8\]"),
    "q-no-channels": ({"q": lambda q: q[..., :0]}, r"q: got float32 \[2, 4, 5, 0\]"),
    "k-batch": ({"k": lambda k: k[:1]}, r"k: got float32 \[1, 2, 7, 8\], wanted float32 \[2, H_kv, S_k, 8\]"),
    "k-channels": ({"k": lambda k: k[..., :7]}, r"k: got float32 \[2, 2, 7, 7\], wanted"),
    "k-dtype": ({"k": to(torch.bfloat16)}, r"k: got bfloat16 \[2, 2, 7, 8\], wanted float32"),
    "k-heads": (
        {"k": lambda k: k.repeat(1, 3, 1, 1)[:, :3], "v": lambda v: v.repeat(1, 3, 1, 1)[:, :3]},
        r"k: got float32 \[2, 3, 7, 8\], wanted a number of heads that divides q's 4",
    ),
    "k-meta": ({"k": to("meta")}, "k: got a tensor on meta, wanted one on cpu"),
    "v-keys": ({"v": lambda v: v[:, :, 1:]}, r"v: got float32 \[2, 2, 6, 8\], wanted float32 \[2, 2, 7, 8\], as k"),
    "v-dtype": ({"v": to(torch.float16)}, r"v: got float16 \[2, 2, 7, 8\], wanted float32"),
    "l_q-size": ({"l_q": torch.ones(16)}, r"l_q: got float32 \[16\], wanted a .* tensor \[32\] or \[4, 8\]"),
    "l_k-size": ({"l_k": torch.ones(32)}, r"l_k: got float32 \[32\], wanted a .* tensor \[16\] or \[2, 8\]"),
    "l_v-shape": ({"l_v": torch.ones(8, 2)}, r"l_v: got float32 \[8, 2\]"),
    "l_v-dtype": ({"l_v": to(torch.float64)}, r"l_v: got float64 \[16\]"),
    "l_k-number": ({"l_k": 2.0}, "l_k: got 2.0, a float"),
    "l_q-meta": ({"l_q": to("meta")}, "l_q: got a tensor on meta, wanted one on cpu"),
    "scale-text": ({"scale": "1"}, "scale: got '1', a str, wanted a finite float32 number"),
    "scale-nan": ({"scale": float("nan")}, "scale: got nan, a float, wanted a finite float32 number"),
    "scale-huge": ({"scale": 1e39}, "scale: got 1e\\+39, a float, wanted a finite float32 number"),
    "dropout-one": ({"dropout": 1}, "dropout: got 1, a int, wanted a probability in \\[0, 1\\)"),
    "seed-float": ({"dropout": 0.1, "seed": torch.ones(1)}, "seed: got float32 .*, wanted an int64 tensor"),
    "seed-meta": (
        {"dropout": 0.1, "seed": torch.ones(1, dtype=torch.int64, device="meta")},
        "seed: got a tensor on meta, wanted one on cpu, where q is",
    ),
    "window-zero": ({"window": 0}, "window: got 0, a int, wanted a whole number of at least 1"),
    "window-float": ({"window": 2.0}, "window: got 2.0, a float"),
    "padding-int": (
        {"key_padding_mask": torch.ones(2, 7, dtype=torch.int64)},
        r"key_padding_mask: got int64 \[2, 7\], wanted a bool tensor \[2, 7\]",
    ),
    "padding-shape": ({"key_padding_mask": torch.ones(2, 10).bool()}, r"key_padding_mask: got bool \[2, 10\]"),
    "padding-meta": ({"key_padding_mask": torch.ones(2, 7).bool().to("meta")}, "key_padding_mask: got a tensor on"),
    "mask-shape": ({"attn_mask": torch.zeros(5, 10)}, r"attn_mask: got float32 \[5, 10\], .* to \[2, 4, 5, 7\]"),
    "mask-5d": ({"attn_mask": torch.zeros(1, 1, 1, 5, 7)}, r"attn_mask: got float32 \[1, 1, 1, 5, 7\]"),
    "mask-int": ({"attn_mask": torch.zeros(5, 7).int()}, r"attn_mask: got int32 \[5, 7\], wanted a bool, float32"),
    "mask-gradient": (
        {"attn_mask": torch.zeros(5, 7, requires_grad=True)},
        "attn_mask: got one that requires a gradient",
    ),
    "prefix-alone": ({"prefix_v": None}, "prefix_v: got None, wanted a tensor, since prefix_k is one"),
    "prefix-heads": ({"prefix_k": torch.ones(4, 3, 8)}, r"prefix_k: got float32 \[4, 3, 8\], .* tensor \[2, P, 8\]"),
    "prefix-batch": ({"prefix_k": torch.ones(2, 2, 3, 8)}, r"prefix_k: got float32 \[2, 2, 3, 8\]"),
    "prefix-rows": ({"prefix_v": torch.ones(2, 4, 8)}, r"prefix_v: got float32 \[2, 4, 8\], .* tensor \[2, 3, 8\]"),
    "rope-tensor": ({"rope": torch.ones(7, 8)}, "rope: got float32 .*, wanted a pair of tensors"),
    "rope-positions": ({"rope": angles(5, 8)}, r"rope cos: got float32 \[5, 8\], wanted a .* tensor \[7, R\]"),
    "rope-odd": ({"rope": (torch.ones(7, 3), torch.ones(7, 3))}, "rope cos: got .*, wanted .* an even R ≤ 8"),
    "rope-wide": ({"rope": angles(7, 10)}, r"rope cos: got float32 \[7, 10\]"),
    "rope-batch": ({"rope": angles(7, 8, 3)}, r"rope cos: got float32 \[3, 7, 8\]"),
    "rope-differ": ({"rope": (torch.ones(7, 8), torch.ones(7, 6))}, r"rope sin: got float32 \[7, 6\]"),
    "rope-gradient": (
        {"rope": (torch.ones(7, 8, requires_grad=True), torch.ones(7, 8))},
        "rope cos: got one that requires a gradient",
    ),
    "rope-queries": (
        {"q": torch.ones(2, 4, 9, 8), "rope": angles(7, 8)},
        "q: got 9 positions, wanted at most k's 7, since rope is given",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), list(CASES.values()), ids=list(CASES))
def test_bad_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_good_arguments():
    assert call().shape == (2, 4, 5, 8)
    assert call(scale=1, window=3, rope=list(angles(7, 8)), key_padding_mask=torch.ones(2, 7).bool()).isfinite().all()


def test_stays_usable_after_an_error():
    for _ in range(3):
        with pytest.raises(ValueError, match="l_k"):
            call(l_k=torch.ones(1))
    assert call().isfinite().all()


# ---- the ops themselves, as other libraries call them ------------------------------------------------------------

FORWARD = {
    "q": ({0: torch.ones(4, 5, 8)}, r"q: got float32 \[4, 5, 8\], wanted a tensor \[B, H, S_q, D\]"),
    "q-columns": ({0: torch.ones(2, 4, 24, 37).mT}, r"q: got strides .*, wanted dense rows"),
    "k": ({1: torch.ones(5, 8)}, r"k: got float32 \[5, 8\], wanted a tensor \[B, H_kv, S_k, D\]"),
    "k-heads": (
        {1: torch.ones(2, 3, 70, 24), 2: torch.ones(2, 3, 70, 24)},
        "k: got 3 heads, wanted a number that divides q's 4",
    ),
    "v": ({2: torch.ones(2, 2, 71, 24)}, r"v: got shape \[2, 2, 71, 24\], wanted \[2, 2, 70, 24\]"),
    "l_q": ({3: torch.ones(96).half()}, r"l_q: got float16 \[96\], wanted float32 with 96 elements"),
    "scale": ({6: float("inf")}, "scale: got inf, wanted a finite float32 number"),
    "window": ({8: -1}, "window: got -1"),
    "padding": ({9: torch.ones(2, 70)}, r"key_padding_mask: got float32 \[2, 70\], wanted bool"),
    "mask": ({10: torch.ones(1, 4, 37, 70)}, r"attn_mask: got shape \[1, 4, 37, 70\], wanted \[2, 4, 37, 70\]"),
    "mask-dtype": ({10: torch.ones(2, 4, 37, 70).int()}, "attn_mask: got int32"),
    "prefix_v": ({12: None}, "prefix_v: got none, wanted a tensor"),
    "prefix": ({11: torch.ones(2, 5, 23)}, r"prefix_k: got shape \[2, 5, 23\], wanted \[2, 5, 24\]"),
    "sin": ({14: None}, "sin: got none, wanted a tensor"),
    "seed": ({16: None}, "seed: got none, wanted an int64 tensor, since there is dropout"),
    "cos": ({13: torch.ones(1, 70, 26)}, r"cos: got float32 \[1, 70, 26\], wanted .* an even R of at most 24"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), list(FORWARD.values()), ids=list(FORWARD))
def test_bad_forward_argument(changes, message):
    arguments = list(op_arguments(everything()))
    for index, value in changes.items():
        arguments[index] = value
    with pytest.raises(ValueError, match=message):
        ops.attention_forward(*arguments, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.ones(2, 4, 37, 23)}, r"grad_out: got shape \[2, 4, 37, 23\], wanted \[2, 4, 37, 24\]"),
        ({0: torch.ones(2, 4, 37, 24).half()}, "grad_out: got float16 .*, wanted float32"),
        ({-4: None}, "out: got none, wanted the forward's, since there is no l_v, or a prefix"),
        ({-4: torch.ones(2, 4, 37, 24)}, r"out: got shape \[2, 4, 37, 24\], wanted \[2, 37, 4, 24\]"),
        ({-3: None}, "out_real: got none, wanted the forward's, since l_v is given"),
        ({-2: torch.ones(2, 4, 38)}, r"lse: got shape \[2, 4, 38\], wanted \[2, 4, 37\]"),
        ({-1: [True] * 7}, "wants: got 7 items, wanted 8"),
        ({-1: [True]}, "wants: got 1 item, wanted 8"),
        ({4: None, -1: [True] * 8}, "wants: got true for item 3, wanted false, since there is no such tensor"),
    ],
)  # fmt: skip
def test_bad_backward_argument(changes, message):
    case = everything()
    arguments = op_arguments(case)
    saved = ops.attention_forward(*arguments, True)
    arguments = [case.grad_out, *arguments, *saved, [True] * 8]
    for index, value in changes.items():
        arguments[index] = value
    with pytest.raises(ValueError, match=message):
        ops.attention_backward(*arguments)
