"""Tuned thresholds: the file, what is done about a bad one, and that plans follow them."""

import json

import ptx_emulator
import pytest
import torch
from lora_linear_cases import make_case

from peft_kernels import _extension, cuda, tune, tuned
from peft_kernels.ops import lora_linear

ENTRY = {"forward": 200, "backward": 100}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "folder" / "tuned.json"))


def test_file(monkeypatch):
    assert tuned.load() == {}
    tuned.save("Card A", {"forward": 1, "backward": 2})
    tuned.save("Card B", ENTRY)
    file = tuned.save("Card A", ENTRY)
    assert file == tuned.path() and tuned.load() == {"lora_linear": {"Card A": ENTRY, "Card B": ENTRY}}
    told = []
    monkeypatch.setattr(tuned, "set_crossover", lambda *arguments: told.append(arguments))
    monkeypatch.setitem(_extension.build_info, "cuda", True)
    tuned.apply()
    assert told == [("Card A", 200, 100), ("Card B", 200, 100)]
    monkeypatch.setitem(_extension.build_info, "cuda", False)
    tuned.apply()
    assert len(told) == 2


def test_default_path(monkeypatch, tmp_path):
    monkeypatch.delenv("PEFT_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.path() == tmp_path / "peft_kernels" / "tuned.json"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"lora_linear": {"A": 3}}', '{"lora_linear": {"A": {"forward": 3}}}']
)
def test_bad_file(monkeypatch, text):
    tuned.path().parent.mkdir()
    tuned.path().write_text(text)
    with pytest.raises(ValueError, match=r"tuned\.json: got no crossovers of devices, wanted what peft_kernels\.tune"):
        tuned.load()
    monkeypatch.setitem(_extension.build_info, "cuda", True)
    with pytest.warns(UserWarning, match=r"tuned\.json.*its thresholds are not used"):
        tuned.apply()
    tuned.save("Card A", ENTRY)
    assert json.loads(tuned.path().read_text()) == {"lora_linear": {"Card A": ENTRY}}


@pytest.mark.parametrize(
    ("fused", "library", "wanted"),
    [([1, 2, 4, 8], [3, 3, 3, 3], 24), ([9, 9, 9, 9], [3, 3, 3, 3], 0), ([1, 1, 1, 1], [3, 3, 3, 3], 64)],
)
def test_find_crossover(fused, library, wanted):
    assert tune.find_crossover((8, 16, 32, 64), fused, library) == wanted


def test_tune_without_a_card(monkeypatch):
    monkeypatch.setitem(_extension.build_info, "cuda", False)
    with pytest.raises(SystemExit, match="this build has no CUDA kernels"):
        tune.main([])
    monkeypatch.setitem(_extension.build_info, "cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no CUDA device"):
        tune.main([])
    with pytest.raises(SystemExit):
        tune.main(["--shape", "0", "8"])


def test_tune_leaves_out_what_has_no_kernels(monkeypatch, capsys):
    monkeypatch.setitem(_extension.build_info, "cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device}")
    monkeypatch.setattr(tune, "why_not", lambda device: "an old driver")
    tune.main([])
    assert capsys.readouterr().out == "Card 0: an old driver\n"


@pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))
def test_plans_follow_the_threshold(capfd, monkeypatch):
    from ptx_emulator.ops import emulated

    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")
    case = make_case(16, 64, 128, (), torch.bfloat16)
    with ptx_emulator.profile("sm_86"), emulated() as launches:
        set_crossover = torch.ops.peft_kernels_emulated.lora_linear_set_crossover
        for threshold, kernel in ((15, "nf4_dequantize"), (16, "matmul_few_rows")):
            set_crossover("sm_86", threshold, 0)
            for _ in range(2):
                lora_linear(case.x, case.weight)
            assert kernel in launches()[-1]["kernel"]
        set_crossover("sm_86", 512, 512)
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
