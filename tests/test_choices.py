"""What follows from measurements: choices, crossovers, and what a report says; and the file that keeps them."""

import json
import threading
from pathlib import Path

import ptx_emulator
import pytest
import torch
from lora_linear_cases import make_case

from peft_kernels import _extension, choices, cuda
from peft_kernels.choices import UNBOUNDED, Interval
from peft_kernels.ops import lora_linear


def times(rows, stock, fused, **others):
    return {"rows": rows, "stock": stock, "fused": fused, **others}


ENTRY = {
    "inference": times([1, 8, 32, 128, 512], [3, 1, 1, 1, 2], [1, 2, 1, 3, 1]),
    "training": times([1, 8, 32], [2, 2, 2], [1, 1, 4]),
}
ON_A_CARD = {
    "weight": [64, 128],
    "inference": times([8, 32, 512], [9, 9, 9], [1, 2, 4], library=[3, 3, 3]),
    "training": times([8, 32, 512], [9, 9, 9], [4, 4, 4], library=[3, 3, 3]),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "folder" / "tuned.json"))
    monkeypatch.setattr(choices, "_decided", {})


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("model\t\t: 17\nmodel name\t: AMD EPYC\n", "AMD EPYC (model 17)"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n", "ARM64 of implementer 0x41, part 0xd0c"),
        ("", "a processor (model ?)"),
    ],
)
def test_processors_have_names(monkeypatch, lines, wanted):
    """Times of one processor are not taken for another's: Linux says of ARM64 what it is by other fields."""
    monkeypatch.setattr(Path, "read_text", lambda path: lines)
    assert choices.processor.__wrapped__() == wanted


# ---- Choices --------------------------------------------------------------------------------------------------------


def test_stock_is_chosen_where_it_was_faster():
    choice = choices.choice_of(ENTRY, 4, torch.float32, False)
    assert choice.inference == (Interval(3, 16), Interval(65, 256))
    assert choice.training == (Interval(17, 63),)  # what was measured last says nothing of many rows
    assert not choice.is_always_stock
    assert choice.speed == (
        "1.0–3.0×; stock for 3–16 rows and 65–256 rows in inference; 17–63 rows in training, 2.0–3.0× faster there"
    )


def test_stock_that_was_always_faster():
    slow = times([1, 512], [1, 1], [2, 1.5])
    choice = choices.choice_of({"inference": slow, "training": slow}, 4, torch.float32, False)
    assert choice.is_always_stock and choice.inference == (Interval(0, UNBOUNDED),)
    assert choice.speed == "1.5–2.0× faster here"


def test_stock_that_was_faster_where_anything_was_measured():
    choice = choices.choice_of({"inference": times([1], [1], [2])}, 4, torch.float32, False)
    assert not choice.is_always_stock and choice.speed == "stock for 1 rows in inference, 2.0× faster there"


def test_what_is_about_as_fast_is_fused():
    choice = choices.choice_of({"inference": times([1, 512], [1, 1], [1.02, 1.03])}, 4, torch.float32, False)
    assert choice.inference == () and choice.speed == "1.0×"


def test_choice_of_an_input():
    choice = choices.choice_of(ENTRY, 4, torch.float32, False)
    with torch.no_grad():
        assert [choice.is_stock(torch.zeros(rows, 4), False) for rows in (0, 1, 3, 16, 17, 64, 65, 256, 257)] == [
            False, False, True, True, False, False, True, True, False,
        ]  # fmt: skip
        assert choice.is_stock(torch.zeros(2, 4, 4), False) and not choice.is_stock(torch.zeros(2, 16, 4), False)
        # Reentrant checkpointing runs a layer that trains without gradients first.
        assert not choice.is_stock(torch.zeros(8, 4), True) and choice.is_stock(torch.zeros(32, 4), True)
        assert not choice.is_stock(torch.zeros(8, 4, dtype=torch.bfloat16), False)
        assert not choices.choice_of(ENTRY, 4, torch.float32, True).is_stock(torch.zeros(8, 4), False)
        with torch.autocast("cpu"):
            assert not choice.is_stock(torch.zeros(8, 4), False)
    assert not choice.is_stock(torch.zeros(8, 4), False) and choice.is_stock(torch.zeros(32, 4), False)


def test_choice_for_any_dtype():
    choice = choices.choice_of(ENTRY, 4, None, False)
    assert choice.is_stock(torch.zeros(32, 4, dtype=torch.bfloat16), True)


@pytest.mark.parametrize(
    ("fused", "library", "wanted"),
    [([1, 2, 4], [3, 3, 3], 128), ([9, 9, 9], [3, 3, 3], 0), ([1, 1, 1], [3, 3, 3], UNBOUNDED)],
)
def test_crossover(fused, library, wanted):
    entry = {"inference": times([8, 32, 512], [9, 9, 9], fused, library=library)}
    assert choices.crossover_of(entry, "inference") == wanted
    assert choices.crossover_of(entry, "training") is None and choices.crossover_of(ENTRY, "inference") is None


def test_the_faster_of_the_fused_forms_counts():
    slow = times([1, 512], [2, 2], [3, 1], library=[1, 3])
    assert choices.choice_of({"inference": slow}, 4, torch.float32, True).speed == "2.0×"


def test_what_was_decided_stays():
    choices.decide("here", {"a": ENTRY, "b": None})
    choices.decide("here", {"a": None, "b": ENTRY, "c": ENTRY})
    assert [choices.entry_of("here", name) for name in "abcd"] == [ENTRY, None, ENTRY, None]
    assert [choices.is_known("here", name) for name in "abcd"] == [True, True, True, False]


# ---- The kernels ----------------------------------------------------------------------------------------------------


def test_import_tells_the_kernels_of_the_same_software(monkeypatch):
    told = []
    monkeypatch.setattr(choices, "set_crossover", lambda *arguments: told.append(arguments))
    monkeypatch.setitem(_extension.build_info, "cuda", False)
    monkeypatch.setattr(choices, "_software", lambda device_type: f"software of {device_type}")
    choices.save("Card A; software of cuda", {"an operation": ON_A_CARD, "one on the CPU": ENTRY})
    choices.save("Card B; older software of cuda", {"an operation": ON_A_CARD})
    choices.apply()
    assert told == []
    monkeypatch.setitem(_extension.build_info, "cuda", True)
    choices.apply()
    assert told == [("Card A", 64, 128, 128, 0)]


# ---- The file -------------------------------------------------------------------------------------------------------


def test_file():
    assert choices.load() == {}
    choices.save("here", {"a": ENTRY, "b": ENTRY})
    choices.save("there", {"a": ON_A_CARD})
    file = choices.save("here", {"b": ON_A_CARD})
    assert file == choices.path()
    assert choices.load() == {"here": {"a": ENTRY, "b": ON_A_CARD}, "there": {"a": ON_A_CARD}}
    assert sorted(path.name for path in file.parent.iterdir()) == ["tuned.json", "tuned.json.lock"]


def test_default_path(monkeypatch, tmp_path):
    monkeypatch.delenv("PEFT_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choices.path() == tmp_path / "peft_kernels" / "tuned.json"


WITHOUT_STOCK = {"rows": [1], "fused": [1.0]}
BAD_TIMES = (
    WITHOUT_STOCK, times([1], [1, 2], [1]), times([1], [0], [1]), times([1], [1], [-1]), times([], [], []),
    times([8, 1], [1, 1], [1, 1]), times([1, 1], [1, 1], [1, 1]), times([1.5], [1], [1]), times([1], ["1"], [1]),
    times([1], [float("nan")], [1]), times([1], [1], [float("inf")]), [1], None,
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "\x00",
        "[" * 5000,
        '{"here": 3}',
        '{"here": {"a": 3}}',
        '{"lora_linear": {"Card": {"forward": 3}}}',
    ]
    + ['{"here": {"a": {"weight": [1]}}}', '{"here": {"a": {"weight": ["N", "K"]}}}']
    + [json.dumps({"here": {"a": {"inference": bad}}}) for bad in BAD_TIMES],
)
def test_bad_file(monkeypatch, text):
    choices.path().parent.mkdir()
    choices.path().write_text(text)
    with pytest.warns(UserWarning, match=r"tuned\.json: got no times of operations.*; nothing of it is used"):
        assert choices.load() == {}
    monkeypatch.setitem(_extension.build_info, "cuda", True)
    with pytest.warns(UserWarning, match=r"nothing of it is used"):
        choices.apply()
    choices.save("here", {"a": ENTRY})
    assert choices.load() == {"here": {"a": ENTRY}}


def test_file_that_is_no_text():
    choices.path().parent.mkdir()
    choices.path().write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match="nothing of it is used"):
        assert choices.load() == {}


def test_file_that_is_a_folder():
    choices.path().mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"tuned\.json.*nothing of it is used"):
        assert choices.load() == {}


def test_many_writers_lose_nothing():
    threads = [
        threading.Thread(target=choices.save, args=(f"machine {number % 3}", {f"operation {number}": ENTRY}))
        for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(map(len, choices.load().values())) == 12


# ---- Plans and devices ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))
def test_plans_follow_the_threshold(capfd, monkeypatch):
    from ptx_emulator.ops import emulated

    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")
    case = make_case(16, 64, 128, (), torch.bfloat16)
    with ptx_emulator.profile("sm_86"), emulated() as launches:
        set_crossover = torch.ops.peft_kernels_emulated.lora_linear_set_crossover
        for threshold, kernel in ((15, "nf4_dequantize"), (16, "matmul_few_rows")):
            set_crossover("sm_86", 64, 128, threshold, 0)
            set_crossover("sm_86", 128, 64, 512 - threshold, 0)  # of another weight
            for _ in range(2):
                lora_linear(case.x, case.weight)
            assert kernel in launches()[-1]["kernel"]
        set_crossover("sm_86", 64, 128, 512, 512)
    first, second = capfd.readouterr().err.splitlines()  # each plan once
    start = "peft_kernels: lora_linear forward m=16 n=64 k=128 rank=0 bf16, products in bf16, on sm_86 with 82"
    assert first.startswith(start) and second.startswith(start)
    assert "base library, 1 panel of 64 rows (more rows than the crossover)" in first and "base fused" in second


@pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))
@pytest.mark.parametrize(("card", "other", "fused"), [("sm_100", "sm_90", 160), ("sm_120", "sm_89", 896)])
def test_plans_say_whose_threshold_a_card_has(capfd, monkeypatch, card, other, fused):
    from ptx_emulator.ops import emulated

    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")
    case = make_case(fused + 1, 24, 64, (), torch.bfloat16)
    with ptx_emulator.profile(card), emulated() as launches:
        for m, kernel in ((fused, "matmul_many_rows"), (fused + 1, "nf4_dequantize")):
            lora_linear(case.x[:m], case.weight)
            assert kernel in launches()[-1]["kernel"]
    first, second = capfd.readouterr().err.splitlines()
    assert f"each, the crossover is that of {other}, because" in first
    assert f"more rows than the crossover, the crossover is that of {other}, because" in second


def test_devices(monkeypatch):
    assert cuda.why_not(torch.device("cpu")) is None
    assert cuda.why_not(torch.device("meta")) == "no fused kernel for meta"
    monkeypatch.setitem(_extension.build_info, "cuda", False)
    assert "built without CUDA" in cuda.why_not(torch.device("cuda", 0))
    monkeypatch.setitem(_extension.build_info, "cuda", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda, "_why_not_driver", lambda: None)
    for capability, reason in (((7, 5), "no fused kernel for sm_75, which is older than sm_80"), ((9, 0), None)):
        cuda._why_not_card.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        assert cuda.why_not(torch.device("cuda", 0)) == reason
    cuda._why_not_card.cache_clear()
