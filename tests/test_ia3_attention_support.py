"""What ia3_attention supports, and how: every combination is run, and the table in docs/ia3_attention.md says the same.

`python tests/test_ia3_attention_support.py` writes the table anew.
"""

import sys
from itertools import product
from pathlib import Path

import pytest
import tolerances
import torch
from comparison import DTYPES, error, short
from ia3_attention_cases import angles, expected, make_case, run

from peft_kernels.ops import _attention_by_torch, ia3_attention

DOCUMENT = Path(__file__).parent.parent / "docs/ia3_attention.md"
BEGIN, END = "<!-- begin of the table -->\n", "<!-- end of the table -->\n"
SHAPE = (2, 4, 2, 33, 33, 16)
PADDING = torch.arange(33) >= torch.tensor([[4], [20]])
MASKS = {
    "none": {},
    "causal": {"causal": True},
    "causal, window": {"causal": True, "window": 9},
    "causal, padding": {"causal": True, "key_padding_mask": PADDING},
    "bool": {"attn_mask": torch.rand(33, 33, generator=torch.Generator().manual_seed(1)) > 0.3},
    "additive": {"attn_mask": torch.randn(1, 4, 33, 33, generator=torch.Generator().manual_seed(1))},
}
HEADINGS = ["mask", "RoPE", "prefix", *(f"CPU, {short(dtype)}" for dtype in DTYPES), "CUDA, all three"]


def by_torch(q, k, v, l_q=None, l_k=None, l_v=None, prefix_k=None, prefix_v=None, **options):
    """What other devices than the CPU do, on the CPU."""
    names = ("window", "key_padding_mask", "attn_mask", "rope")
    options = {"scale": q.shape[3] ** -0.5, "causal": False, **dict.fromkeys(names), **options}
    return _attention_by_torch.attention_by_torch(q, k, v, l_q, l_k, l_v, prefix_k, prefix_v, **options)


def is_right(case, function, wanted, tolerance) -> bool:
    actual = run(case, function)
    return all(error(actual[name], value) <= tolerance for name, value in wanted.items())


def way_of_torch(case, wanted) -> str:
    """Which of torch's implementations are open to it."""
    attention, calls = torch.nn.functional.scaled_dot_product_attention, []

    def record(*args, **options):
        calls.append(options)
        return attention(*args, **options)

    torch.nn.functional.scaled_dot_product_attention = record
    try:
        if not is_right(case, by_torch, wanted, tolerances.attention(torch.float32)):
            return "wrong"
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
    (options,) = calls
    return "torch, any" if options["attn_mask"] is None else "torch, with a mask"


def rows() -> list[list[str]]:
    found = []
    for (mask, options), rope, prefix in product(MASKS.items(), (False, True), (False, True)):
        cells = [mask, "yes" if rope else "", "yes" if prefix else ""]
        for dtype in DTYPES:
            torch.manual_seed(0)
            more = {"rope": angles(33, 16)} if rope else {}
            case = make_case(*SHAPE, dtype=dtype, prefix=5 if prefix else 0, **options, **more)
            wanted = expected(case)
            if dtype == torch.float32:
                by_device = way_of_torch(case, wanted)
            cells.append("own" if is_right(case, ia3_attention, wanted, tolerances.attention(dtype)) else "wrong")
        found.append([*cells, by_device])
    return found


def table() -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def documented() -> str:
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]


@pytest.fixture(scope="module")
def made():
    torch.set_num_threads(1)
    return table()


def test_table_is_what_the_document_says(made):
    assert made == documented(), "run `python tests/test_ia3_attention_support.py`"


def test_everything_is_supported(made):
    assert "wrong" not in made and made.count("| own |") == len(MASKS) * 4 * 2  # neighbours share a bar


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("mask", ["causal", "padding", "bool", "additive"])
def test_by_torch_with_queries_that_see_nothing(mask, prefix):
    from test_ia3_attention import HIDING

    case = make_case(2, 2, 1, 50, 30, 16, prefix=prefix, **HIDING[mask])
    assert is_right(case, by_torch, expected(case), tolerances.attention(torch.float32))


@pytest.mark.parametrize("scales", [(), ("l_q",), ("l_k",), ("l_v",)], ids="-".join)
@pytest.mark.parametrize("prefix", [0, 3])
def test_by_torch_without_scales(prefix, scales):
    case = make_case(2, 4, 2, 20, 30, 16, prefix=prefix, scales=scales, causal=True)
    assert is_right(case, by_torch, expected(case), tolerances.attention(torch.float32))


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text.split(BEGIN)[0] + BEGIN + table() + END + text.split(END)[1])
    print(f"Written: {DOCUMENT}", file=sys.stderr)
