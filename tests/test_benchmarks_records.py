"""Targets, and what is kept of a benchmark: its table, its file and its plot."""

import csv
import re

import pytest
import torch
from benchmark_cases import ROOFLINE, record
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import lora_linear, options, plot, records, report
from benchmarks.lora_layers import OWN_BASE, STOCK
from benchmarks.lora_linear import DENSE, DEQUANTIZE
from benchmarks.records import FUSED, Below, Faster, Nearer, Record, Within
from peft_kernels import cpu


def test_targets():
    seconds = {FUSED: 2.0, STOCK: 5.0, OWN_BASE: 1.9}
    assert Faster("forward", STOCK, 2.5).met(seconds) and not Faster("forward", STOCK, 2.6).met(seconds)
    assert Faster("forward", DENSE, 1).met(seconds) is None
    assert Within("forward", OWN_BASE, 0.06).met(seconds) and not Within("forward", OWN_BASE, 0.05).met(seconds)
    assert Below("forward", 2.0).met(seconds) and not Below("forward", 1.9).met(seconds)
    errors = {FUSED: 0.1, STOCK: 0.3}
    assert Nearer("forward", STOCK, 0.5).met(errors) and not Nearer("forward", STOCK, 0.3).met(errors)
    assert Nearer("forward", DENSE, 1).met(errors) is None
    targets = Faster("both", STOCK, 2.5), Within("both", OWN_BASE, 0.12), Below("both", 15e-6), Nearer("", STOCK, 1 / 3)
    assert list(map(str, targets)) == ["≥ 2.5× stock", "≤ 12% over own base", "≤ 15 µs", "error ≤ 0.33 of stock's"]


def test_targets_are_of_the_same_case_phase_and_instruction_set():
    wanted = (Faster("forward", STOCK, 2),)
    fast, slow = record(FUSED, 1.0, wanted=wanted), record(FUSED, 3.0, wanted=wanted)
    everything = [slow, fast, record(STOCK, 4.0), record(STOCK, 1.0, phase="backward"), record(STOCK, 1.0, case="x")]
    assert records.judge(fast, everything) == [(wanted[0], True)]
    assert records.judge(slow, everything) == [(wanted[0], False)]
    assert records.judge(fast, [fast]) == [(wanted[0], None)]
    near = record(FUSED, 1.0, error=0.1, wanted=(Nearer("forward", STOCK, 0.5),))
    assert records.judge(near, [near, record(STOCK, 1.0, error=0.3)]) == [(near.wanted[0], True)]
    assert records.judge(near, [near, record(STOCK, 1.0)]) == [(near.wanted[0], None)]


def test_slower_instruction_sets_have_targets_of_their_own(monkeypatch):
    monkeypatch.setattr(cpu, "isas", lambda: ["portable", "avx2", "avx512"])
    case = next(case for case in lora_linear.CASES if case.training and case.wanted)
    assert case.targets("avx512") == (Faster("both", STOCK, 25),)
    assert case.targets("avx2") == (Faster("both", STOCK, 1.5), Faster("both", DEQUANTIZE, 1.0))
    assert case.targets("portable") == ()


def test_every_target_names_something_measured():
    measured = {OWN_BASE, *(name for group in lora_linear.BASELINES.values() for name in group)}
    for case in lora_linear.CASES:
        phases = {"forward", "backward", "both"} if case.training else {"forward"}
        for target in case.wanted:
            assert target.phase in phases and getattr(target, "versus", STOCK) in measured


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234e-6, "1.23 µs"), (99.96e-6, "100 µs"), (0.0009996, "1.00 ms"), (0.0123, "12.3 ms"), (61.0, "61.0 s")],
)
def test_duration(seconds, text):
    assert records.duration(seconds) == text


def test_median_and_quartiles():
    assert record(STOCK, 5.0, 1.0, 2.0, 3.0, 4.0).median == 3
    assert record(STOCK, 5.0, 1.0, 2.0, 3.0, 4.0).quartiles == (2, 4)
    assert record(STOCK, 5.0).quartiles == (5, 5)


def test_report(tmp_path):
    chosen = options.Options(True, re.compile(""), (), (), 2, tmp_path)
    made = report.Report(tmp_path / "tiny", chosen.threads, {2: ROOFLINE}, records.describe_run(), Console(width=130))
    made.run["benchmark"] = "tiny"
    with made.console.capture() as capture:
        made.add(
            [
                record(FUSED, 0.5, 0.5, size=1e9, flops=1e12, wanted=(Faster("forward", STOCK, 2),), error=1e-3),
                record(STOCK, 1.5, peak=2_000_000),
            ]
        )
        made.finish()
    text = capture.get()
    assert "✓ wanted: forward ≥ 2× stock, avx2" in text and "1.50 s 3.00×" in text and "1 of 1 targets met" in text
    assert "saved MB" not in text  # nobody's was measured
    fused, stock = csv.DictReader((tmp_path / "tiny.csv").open())
    assert fused["gb_per_s"] == "2" and fused["tflop_per_s"] == "2" and fused["share_of_roofline"] == "2"
    assert fused["met"] == "yes" and fused["wanted"] == "≥ 2× stock" and stock["wanted"] == ""
    assert stock["times_fused"] == "3" and stock["peak_bytes"] == "2000000" and stock["median_ms"] == "1500"
    assert {"machine", "torch_isa", "versions", "commit", "date", "isa"} <= fused.keys()
    assert f"torch {torch.__version__}" in fused["versions"]
    assert f"to draw it: python -m benchmarks plot {tmp_path / 'tiny'}.csv" in text
    assert not list(tmp_path.glob("*.png"))


# ---- Plots ----------------------------------------------------------------------------------------------------------


def test_plots_are_drawn_on_demand(tmp_path, capsys):
    wanted = Faster("forward", STOCK, 2), Below("forward", 1e-5)
    found = [
        record(FUSED, 0.5, 0.7, wanted=wanted), record(STOCK, 1.5, peak=2_000_000),
        Record("eval", "forward", DENSE, "", (), estimate=70.0),
    ]  # fmt: skip
    made = report.Report(tmp_path / "tiny", 2, {2: ROOFLINE}, records.describe_run() | {"benchmark": "tiny"}, Console())
    made.add(found)
    read, run = plot.read(tmp_path / "tiny.csv")
    medians = [(r.contender, r.isa, r.samples) for r in read]
    assert medians == [(FUSED, "avx2", (0.6,)), (STOCK, "", (1.5,)), (DENSE, "", ())]
    assert read[0].wanted == wanted[:1] and run["benchmark"] == "tiny"
    plot.main([str(tmp_path / "tiny.csv"), "--output", str(tmp_path / "plots")])
    assert (tmp_path / "plots/tiny.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.csv", "group,ms\n1,2\n", "got no column case, phase, .*, wanted the CSV file of a benchmark"),
        ("a.csv", "", "got no column case"),
        ("a.json", "{}", "wanted the JSON file of a demo"),
        ("b.csv", None, "No such file"),
    ],
)
def test_files_that_are_no_results(name, text, wanted, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / name)])
    assert re.search(wanted, capsys.readouterr().err)


@pytest.mark.parametrize("path", sorted(options.RESULTS.glob("*/*.json")), ids=lambda path: path.stem)
def test_kept_results_of_demos_can_be_drawn(path, tmp_path):
    plot.main([str(path), "--output", str(tmp_path)])
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 10_000


def test_kept_results_of_benchmarks_can_be_read():
    for path in options.RESULTS.glob("*/*.csv"):
        if "breakdown" not in path.name:
            found, run = plot.read(path)
            assert found and run["benchmark"] in command.BENCHMARKS
    assert not list(options.RESULTS.glob("*/*.png"))
