"""What the emulator counts, and a card's time as the roofline models it."""

import re
import sys

import ptx_emulator
import pytest

from benchmarks import __main__ as command
from benchmarks import roofline


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["lora_layers", "--emulated"], "got the family 'lora_layers', wanted one with CUDA kernels: nf4, lora_linear"),
        (
            ["--emulated", "--filter", "no such case"],
            "argument --filter: got 'no such case', wanted one that some case",
        ),
        (["--emulated", "--card", "sm_75"], "argument --card: got 'sm_75', wanted some of sm_80,sm_86,sm_89,sm_90"),
    ],
)
def test_bad_emulated_option(arguments, wanted, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2 and wanted in capsys.readouterr().err


def test_emulated_counters(monkeypatch, capsys):
    if reason := ptx_emulator.missing():
        pytest.skip(reason)
    arguments = ["benchmarks", "nf4", "--emulated", "--filter", "33x517", "--card", "sm_80,sm_90"]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    text = capsys.readouterr().out
    assert re.findall(r"^nf4 on (.*)$", text, re.MULTILINE) == ["sm_80", "sm_90"]
    assert len(re.findall(r"^\| spill bytes +\| 0 ", text, re.MULTILINE)) == 2
    assert "| 33x517 float16 " in text and "| nf4_dequantize_kernel " in text


def test_roofline_is_a_model(monkeypatch, capsys):
    if reason := ptx_emulator.missing():
        pytest.skip(reason)
    monkeypatch.setattr(roofline, "resources_of", lambda family, card: {})  # which compiles for a minute
    roofline.main(["--rows", "8", "600", "--weight", "128", "128", "--card", "sm_80"])
    text = capsys.readouterr().out
    assert text.startswith("A MODEL, not a measurement")
    assert re.findall(r"MODEL of A100.*, (\w+), (\d+) rows", text) == [
        ("forward", "8"), ("backward", "8"), ("forward", "600"), ("backward", "600")
    ]  # fmt: skip
    assert "matmul_few_rows" in text and text.count("the product") == 2


def test_roofline_takes_activations_once():
    """Eight times as many rows of the weight as are counted are eight times its bytes, but no more of x and s."""
    if reason := ptx_emulator.missing():
        pytest.skip(reason)
    m, n, k, rank = 32, 1024, 64, 16
    launches = roofline.count(roofline.Shape(m, n, k, rank), "sm_80", False, 0.0, {})
    (product,) = (launch for launch in launches if launch.kernel == "matmul_few_rows")
    weight, lora = n * k * (1 / 2 + 4 / 64), 4 * rank * (n + m)
    assert product.dram == pytest.approx(weight + lora + 2 * m * (n + k), rel=0.01)


def test_roofline_of_one_resource():
    card = roofline.CARDS["sm_80"]
    counts = roofline.Counts("copy", dram=1.555e9, l2=3e9, mma=0, wavefronts=0, instructions=1e6)
    assert max(card.limits(counts).values()) == card.limits(counts)["dram"] == pytest.approx(1e-3)
    assert roofline.predict([counts], card) == pytest.approx(1e-3 + roofline.LAUNCH_SECONDS)


def test_roofline_of_the_alu_pipe():
    card = roofline.CARDS["sm_90"]
    counts = roofline.Counts("decode", dram=0, l2=0, mma=0, wavefronts=0, instructions=3e6, alu=2e6, ctas=132)
    limits = card.limits(counts)
    # Two warps a clock of a multiprocessor, where four are issued.
    assert limits["alu"] == pytest.approx(2e6 / 2 / 132 / 1.755e9)
    assert max(limits, key=limits.get) == "alu" and limits["issue"] == pytest.approx(0.75 * limits["alu"])


def test_roofline_in_whole_waves():
    def counts(ctas, **limits):
        return roofline.Counts("k", 1e6, 1e6, mma=1e6, wavefronts=0, instructions=0, ctas=ctas, **limits)

    card = roofline.CARDS["sm_80"]  # 108 multiprocessors with 164 KB, 2048 threads and 65536 registers each
    assert card.occupancy(counts(1, threads=256, shared=59 << 10, registers=80)) == 2
    assert card.occupancy(counts(1, threads=256, shared=0, registers=80)) == 3
    assert card.occupancy(counts(1, threads=256, registers=129)) == 1  # 136 for each thread
    assert card.occupancy(counts(1, threads=1024)) == 2
    assert card.occupancy(counts(1, threads=32)) == 32
    one = {"threads": 128, "shared": 120 << 10}
    full, over = card.limits(counts(108, **one)), card.limits(counts(109, **one))
    assert over["mma"] == pytest.approx(2 * 108 / 109 * full["mma"]) and over["dram"] == full["dram"]
    # Where a wave has room for more CTAs, a multiprocessor's part is what it has.
    assert card.busy(counts(108, threads=64)) == 1 and card.busy(counts(54, threads=64)) == 0.5
