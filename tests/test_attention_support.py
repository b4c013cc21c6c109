"""What ia3_attention supports, and how: every combination is run, and the table in docs/attention.md says the same.

`python tests/test_attention_support.py` writes the table anew.
"""

import sys
from itertools import product
from pathlib import Path

import ptx_emulator
import pytest
import tolerances
import torch
from attention_cases import angles, expected, make_case, on_gpu_plan, run
from comparison import DTYPES, error, short

from peft_kernels.ops import _attention_by_torch, _attention_plan, ia3_attention

pytestmark = pytest.mark.kernels

DOCUMENT = Path(__file__).parent.parent / "docs/attention.md"
BEGIN, END = "<!-- begin of the table -->\n", "<!-- end of the table -->\n"
SHAPE = (2, 4, 2, 33, 33, 16)
MASKLESS = {"causal": False, "window": None, "key_padding_mask": None, "attn_mask": None, "dropout": 0.0}
PADDING = torch.arange(33) >= torch.tensor([[4], [20]])
MASKS = {
    "none": {},
    "causal": {"causal": True},
    "causal, window": {"causal": True, "window": 9},
    "causal, padding": {"causal": True, "key_padding_mask": PADDING},
    "bool": {"attn_mask": torch.rand(33, 33, generator=torch.Generator().manual_seed(1)) > 0.3},
    "additive": {"attn_mask": torch.randn(1, 4, 33, 33, generator=torch.Generator().manual_seed(1))},
}
HALVES = [torch.bfloat16, torch.float16]
HEADINGS = [
    "mask",
    "RoPE",
    "prefix",
    *(f"CPU, {short(dtype)}" for dtype in DTYPES),
    "CUDA, fp32",
    "CUDA, bf16 and fp16",
]


def by_torch(q, k, v, l_q=None, l_k=None, l_v=None, prefix_k=None, prefix_v=None, **options):
    """What a GPU does where it takes torch's attention, on the CPU."""
    options = {"scale": q.shape[3] ** -0.5, "rope": None, **MASKLESS, **options}
    return _attention_by_torch.attention_by_torch(q, k, v, l_q, l_k, l_v, prefix_k, prefix_v, **options)


def goes_to_torch(case) -> bool:
    tensors = [case.tensors.get(name) for name in ("q", "k", "v", "l_q", "l_k", "l_v", "prefix_k", "prefix_v")]
    options = MASKLESS | {name: value for name, value in case.options.items() if name in MASKLESS}
    return _attention_plan.why_torch(*tensors, **options) is not None


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


def way_of_halves(by_dtype, rope: bool, fp32: str) -> str:
    """Of bf16 and fp16, whose kernels run in the emulator."""
    from ptx_emulator.ops import emulated

    ways = set()
    for case, wanted in by_dtype:
        if goes_to_torch(case):
            ways.add(fp32)
            continue
        with pytest.MonkeyPatch.context() as patch, emulated() as launches:
            on_gpu_plan(patch)
            right = is_right(case, ia3_attention, wanted, tolerances.attention(case.tensors["q"].dtype))
            ways.add(("own, rotated by torch" if rope else "own") if right and launches() else "wrong")
    return " or ".join(ways)


def rows() -> list[list[str]]:
    found = []
    for (mask, options), rope, prefix in product(MASKS.items(), (False, True), (False, True)):
        cells, cases = [mask, "yes" if rope else "", "yes" if prefix else ""], []
        for dtype in DTYPES:
            torch.manual_seed(0)
            more = {"rope": angles(33, 16)} if rope else {}
            case = make_case(*SHAPE, dtype=dtype, prefix=5 if prefix else 0, **options, **more)
            cases.append((case, expected(case)))
            right = is_right(case, ia3_attention, cases[-1][1], tolerances.attention(dtype))
            cells.append("own" if right else "wrong")
        fp32 = way_of_torch(*cases[DTYPES.index(torch.float32)])
        halves = way_of_halves([cases[DTYPES.index(dtype)] for dtype in HALVES], rope, fp32)
        found.append([*cells, fp32, halves])
    return found


def table() -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def documented() -> str:
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]


@pytest.fixture(scope="module", params=["emulated"])  # the name by which such tests are left out
def made():
    if reason := ptx_emulator.missing():
        pytest.skip(reason)
    torch.set_num_threads(1)
    return table()


def test_table_is_what_the_document_says(made):
    assert made == documented(), "run `python tests/test_attention_support.py`"


def test_everything_is_supported(made):
    assert "wrong" not in made
    for line in made.splitlines()[2:]:
        assert [cell.strip() for cell in line.split("|")][4:7] == ["own"] * 3


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("mask", ["causal", "padding", "bool", "additive"])
def test_by_torch_with_queries_that_see_nothing(mask, prefix):
    from test_attention import HIDING

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
