"""The benchmarks: options, checks, targets and files, on tiny problems; no timings."""

import csv
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ptx_emulator
import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import __main__ as command
from benchmarks import (
    adapter,
    adapter_fusion,
    architectures,
    attention,
    cross_entropy,
    dora_linear,
    dropout,
    experts,
    glu,
    harness,
    ia3_linear,
    linear_cross_entropy,
    lora_linear,
    lora_linear_grouped,
    merge,
    model,
    nf4,
    options,
    plot,
    prefix,
    profiling,
    records,
    report,
    rms_norm,
    roofline,
    rotary,
    timing,
    train_many,
)
from benchmarks.lora_layers import OWN_BASE, STOCK
from benchmarks.lora_linear import DENSE, DENSE_LORA, DEQUANTIZE, FUNCTION
from benchmarks.records import FUSED, Below, Faster, Nearer, Record, Within
from benchmarks.timing import Contender, Roofline
from peft_kernels import cpu

ROOT = Path(__file__).parent.parent
ROOFLINE = Roofline(2, 10e9, 1e12)
EVAL = lora_linear.Case(3, (64, 128))
TRAIN = lora_linear.Case(9, (64, 128), training=True, dropout=0.25)
BENCHMARKS = {
    "lora_linear": lora_linear,
    "lora_linear_grouped": lora_linear_grouped,
    "dora_linear": dora_linear,
    "ia3_linear": ia3_linear,
    "attention": attention,
    "prefix": prefix,
    "experts": experts,
    "adapter": adapter,
    "adapter_fusion": adapter_fusion,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "rotary": rotary,
    "rms_norm": rms_norm,
    "glu": glu,
    "dropout": dropout,
    "merge": merge,
    "nf4": nf4,
    "architectures": architectures,
    "model": model,
    "train_many": train_many,
}


def record(contender, *samples, case="eval", phase="forward", **rest):
    return Record(case, phase, contender, "avx2" if contender == FUSED else "", samples, **rest)


def shout(text):
    raise AssertionError(f"nothing was to be skipped: {text}")


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--filter", "(", "a regular expression"),
        ("--filter", "no such case", "one that some case matches: '"),
        ("--vs", "nothing", "some of "),
        ("--isa", "sse2", "some of portable,avx2"),
        ("--threads", "0", "a whole number of at least 1"),
        ("--threads", "two", "a whole number"),
    ],
)
def test_bad_option(name, option, value, wanted, capsys):
    with pytest.raises(SystemExit) as error:
        BENCHMARKS[name].main([option, value])
    assert error.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: got '{value}', wanted {wanted}" in message


def parse(*arguments, cases=lora_linear.CASES, console=None):
    return options.parse("lora_linear", "", arguments, cases, list(lora_linear.BASELINES), ["compiled"], console)


def test_filter_sees_the_names_of_the_cases():
    _, cases = parse("--filter", r"eval M=(1|8) 4096x4096")
    assert [case.rows for case in cases] == [1, 8]
    assert parse("--filter", "autocast")[1] == [case for case in lora_linear.CASES if case.autocast]


def test_quick_leaves_out_what_takes_long():
    given, cases = parse("--quick")
    assert given.vs == ("dense", "stock", "dequantize") and not any(case.large for case in cases)
    assert parse("--quick", "--vs", "stock,compiled")[0].vs == ("stock", "compiled")
    assert parse()[0].vs == tuple(lora_linear.BASELINES) and len(parse()[1]) == len(lora_linear.CASES)


def test_missing_instruction_sets_are_skipped_by_name(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "isas", lambda: ["portable", "avx2"])
    console = Console(file=sys.stdout)
    assert parse("--isa", "avx512,avx2,portable", console=console)[0].isas == ("avx2", "portable")
    assert "avx512: skipped, this processor lacks it" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse("--isa", "avx512")
    assert "argument --isa: got 'avx512', wanted one of portable,avx2" in capsys.readouterr().err


def test_threads():
    parse("--threads", "2")
    assert torch.get_num_threads() == 2


def test_help_lists_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    command.main()
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in command.BENCHMARKS)


@pytest.mark.parametrize("name", command.BENCHMARKS)
def test_every_benchmark_can_be_run_by_its_name(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", name, "--help"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 0 and f"python -m benchmarks {name}" in capsys.readouterr().out


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


def test_device_without_a_card(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        lora_linear.main(["--device", "cuda"])
    assert "argument --device: got 'cuda', wanted cpu: there is no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        nf4.main(["--device", "cuda"])
    assert "argument --device" in capsys.readouterr().err


def test_quick_and_a_large_case(capsys):
    with pytest.raises(SystemExit):
        parse("--quick", "--filter", "49152")
    assert "argument --filter: got '49152', wanted one that some case matches: " in capsys.readouterr().err


# ---- Timing ---------------------------------------------------------------------------------------------------------


def test_contenders_take_turns():
    calls = []
    contenders = [
        Contender(name, {"forward": lambda name=name: calls.append(name)}, reset=lambda: calls.append("|"))
        for name in "abc"
    ]
    samples = timing.interleaved(contenders, seconds=0, least=3)
    assert "".join(calls).replace("|", "") == "abc" + "abc" + "bca" + "cab"
    assert calls.count("|") == 12
    assert all(set(taken) == {"forward"} and len(taken["forward"]) == 3 for taken in samples)


def test_both_is_the_sum_of_the_phases():
    (taken,) = timing.interleaved([Contender("", {"forward": timing.nothing, "backward": timing.nothing})], 0)
    assert taken["both"] == [a + b for a, b in zip(taken["forward"], taken["backward"], strict=True)]


def test_repeated_calls_make_one_sample():
    calls = []
    Contender("", {"forward": lambda: calls.append(0)}, repeat=5).run()
    assert len(calls) == 5


def test_contender_runs_with_its_instruction_set():
    seen, before = [], cpu.isa()
    Contender("", {"forward": lambda: seen.append(cpu.isa())}, isa="portable").run()
    assert seen == ["portable"] and cpu.isa() == before


def test_failing_contender_is_skipped_only_if_it_may_be():
    def fail():
        raise ValueError("no compiler\nsecond line")

    contenders = [Contender("fine", {"": timing.nothing}), Contender("compiled", {"": fail})]
    said = []
    assert timing.runnable(contenders, ["compiled"], said.append) == contenders[:1]
    assert said == ["compiled: skipped, ValueError: no compiler"]
    with pytest.raises(ValueError):
        timing.runnable(contenders, [], said.append)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory():
    assert 60 << 20 < timing.peak_memory(lambda: torch.ones(16 << 20)) < 80 << 20  # Linux counts in batches of pages


def test_roofline():
    measured = timing.measure_roofline(1, megabytes=1, side=64)
    assert measured.threads == 1 and measured.bytes_per_second > 0 and measured.flops_per_second > 0
    assert ROOFLINE.seconds(20e9, 1e12) == 2 and ROOFLINE.seconds(1e9, 3e12) == 3
    assert str(ROOFLINE) == "2 threads: 10.0 GB/s read, 1 TFLOP/s bf16"


# ---- Targets and results --------------------------------------------------------------------------------------------


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


def test_names_of_cases_are_unique():
    for module in BENCHMARKS.values():
        assert len({str(case) for case in module.CASES}) == len(module.CASES)


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


# ---- What a benchmark loads -----------------------------------------------------------------------------------------


def test_a_family_is_timed_without_other_libraries():
    families = [
        "adapter",
        "adapter_fusion",
        "cross_entropy",
        "linear_cross_entropy",
        "rotary",
        "rms_norm",
        "glu",
        "dropout",
        "attention",
        "prefix",
    ]
    unwanted = ["peft", "transformers", "bitsandbytes", "examples"]
    script = f"""
import importlib, sys
for name in {families}:
    importlib.import_module("benchmarks." + name)
    found = [module for module in {unwanted} if module in sys.modules]
    assert not found, (name, found)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_emulator_is_found_without_a_path_to_the_tests():
    script = "import benchmarks.emulated, sys; assert not [p for p in sys.path if p.endswith('tests')], sys.path"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


# ---- functions of tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "case", "other"),
    [
        (adapter, adapter.Case(9, 64, 8), adapter.EAGER),
        (adapter, adapter.Case(9, 64, 8, norm=True, activation="relu"), adapter.EAGER),
        (adapter_fusion, adapter_fusion.Case(9, 32, 3), adapter_fusion.UNFUSED),
        (adapter_fusion, adapter_fusion.Case(9, 32, 3, rank=8), adapter_fusion.UNFUSED),
        (cross_entropy, cross_entropy.Case(9, 50), cross_entropy.TORCH),
        (linear_cross_entropy, linear_cross_entropy.Case(9, 50, 32), linear_cross_entropy.LOGITS),
        (linear_cross_entropy, linear_cross_entropy.Case(300, 50, 32, trained=True), linear_cross_entropy.TORCH),
        (rotary, rotary.Case(1, 7, 4, 2, 16), rotary.TORCH),
        (rms_norm, rms_norm.Case(9, 50, trained=True), rms_norm.EAGER),
        (glu, glu.Case(9, 50), glu.EAGER),
        (dropout, dropout.Case(9, 50), dropout.TORCH),
        (experts, experts.Case(9, 4, 2, (64, 32)), experts.PEFT),
        (experts, experts.Case(9, 4, 2, (64, 32), is_4bit=True), experts.DENSE),
        (dora_linear, dora_linear.Case(9, (64, 128)), STOCK),
        (dora_linear, dora_linear.Case(9, (64, 128), False), STOCK),
    ],
    ids=str,
)
def test_functions(module, case, other):
    isas = cpu.isas()[-2:]
    found = module.run(case, [other], isas, 0.0, shout)
    phases = ["forward", "backward", "both"]
    wanted = [(FUSED, isa, phase) for isa in isas for phase in phases] + [(other, "", phase) for phase in phases]
    assert [(r.contender, r.isa, r.phase) for r in found] == wanted
    assert all(0 < r.error < module.TOLERANCE for r in found if r.contender == FUSED)
    saved = {r.contender: r.saved for r in found}
    if module is rotary:  # either keeps the angles alone
        assert 0 < saved[FUSED] == saved[other]
    else:
        assert (saved[FUSED] == 0) == (module is glu) and saved[FUSED] < saved[other]
    for size, flops in [(r.size, r.flops) for r in found]:
        assert size > 0 and (flops > 0 or module in (glu, dropout))


def test_functions_are_checked(monkeypatch):
    monkeypatch.setattr(adapter, "TOLERANCE", 1e-9)
    with pytest.raises(ArithmeticError, match=r"M=9 d=64 r=8, .*: got .* with a relative error of"):
        adapter.run(adapter.Case(9, 64, 8), [], [cpu.isa()], 0.0, shout)


# ---- lora_linear ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [EVAL, TRAIN, lora_linear.Case(9, (64, 128), True, autocast=True)], ids=str)
def test_lora_linear(case):
    isas = cpu.isas()[-2:]
    found = lora_linear.run(case, ["dense", "stock", "dequantize"], isas, 0.0, shout)
    names = [OWN_BASE, DENSE, DENSE_LORA, STOCK, DEQUANTIZE]
    phases = ["forward", "backward", "both"] if case.training else ["forward"]
    wanted = [(FUSED, isa, phase) for isa in isas for phase in phases]
    wanted += [(name, "", phase) for name in names for phase in phases]
    assert [(r.contender, r.isa, r.phase) for r in found] == wanted
    assert all(0 < r.error < 4e-3 for r in found if r.contender == FUSED)
    if case.training:
        saved = {r.contender: r.saved for r in found}
        assert saved[FUSED] < saved[STOCK] and saved[DENSE] == saved[OWN_BASE] == 0
        assert saved[FUSED] == 2 * 9 * 128 + 4 * 9 * 16 + 8 * bool(case.dropout)  # x, s, and the seed


def test_overhead_case_calls_the_function_too():
    target = Below("forward", 10.0)
    case = lora_linear.Case(1, (64, 64), repeat=3, wanted=(target,))
    found = lora_linear.run(case, ["stock"], [cpu.isas()[-1]], 0.0, shout)
    assert [r.contender for r in found] == [FUSED, FUNCTION] and found[0].peak is None
    assert [r.wanted for r in found] == [(target,), ()]
    assert report.case_table(found, ROOFLINE).row_count == 2


def test_wrong_numbers_are_not_timed(monkeypatch):
    monkeypatch.setitem(lora_linear.TOLERANCES, "lora_B", 0.0)
    with pytest.raises(
        ArithmeticError, match=r"train M=9 64x128 dropout 0.25, \w+: got lora_B with .* wanted 0 at most"
    ):
        lora_linear.run(TRAIN, [], [cpu.isa()], 0.0, shout)


def test_contenders_compute_the_same():
    problem = lora_linear.Problem(EVAL)
    results = {}
    for name in (FUSED, FUNCTION, STOCK, DENSE_LORA):
        with torch.no_grad():
            results[name] = problem.layer(name)(problem.x)
    for name, y in results.items():
        assert harness.relative_error(y, results[STOCK].double()) < 1e-2, name


def test_training_starts_with_a_fresh_layer():
    problem = lora_linear.Problem(TRAIN)
    layer = problem.layer(STOCK)
    problem.contender(STOCK).run()
    assert layer.training and not vars(layer.base_layer.weight.quant_state).get("packing_format_for_cpu", False)
    assert layer.lora_A["default"].weight.grad is None  # put back


def test_work_counts_each_operand_once():
    case = lora_linear.Case(2, (3, 5), True)
    size, flops = lora_linear.work(case, "forward", 100, lora=False)
    assert (size, flops) == (100 + 2 * 2 * 8, 2 * 2 * 3 * 5)
    with_lora = lora_linear.work(case, "forward", 100, lora=True)
    assert with_lora == (size + 4 * 16 * 8, flops + 2 * 2 * 16 * 8)
    problem = lora_linear.Problem(TRAIN)
    parts = [problem.work(phase, FUSED) for phase in ("forward", "backward")]
    assert harness.work(problem, "both", FUSED) == tuple(a + b for a, b in zip(*parts, strict=True))


# ---- nf4 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["dequantize", "quantize"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_nf4(phase, quant_type, nested):
    case = nf4.Case(phase, (32, 192), quant_type, nested, 256, "fp16")
    found = nf4.run(case, [nf4.STOCK, nf4.EAGER], [cpu.isa()], 0.0, shout)
    assert [r.contender for r in found] == [FUSED, nf4.STOCK, nf4.EAGER]
    statistics = 24 + 4 * (256 + 1 + 1) if nested else 4 * 24
    assert found[0].size == 2 * 32 * 192 + 32 * 192 // 2 + statistics


def test_nf4_finds_a_difference():
    case = nf4.Case("quantize", (32, 192))
    problem = nf4.Problem(case)
    with pytest.raises(ArithmeticError, match=r"got \d+ codes that differ"):
        problem.compare(nf4.quantize_4bit(problem.tensor.flip(0), double_quant=True))


# ---- attention and prefix ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "training"), [(0, True), (0, False), (1, False)], ids=["train", "eval", "decode"])
@pytest.mark.parametrize("prefix_length", [0, 5])
def test_attention(prefix_length, queries, training):
    case = attention.Case(2, 4, 2, 40, 16, queries, prefix=prefix_length, training=training)
    isas = [cpu.isas()[0], cpu.isas()[-1]]
    found = attention.run(case, ["stock", "plain"], isas, 0.0, shout)
    phases = ["forward", "backward", "both"] if training else ["forward"]
    assert [r.phase for r in found] == phases * 4
    names = [FUSED, FUSED, attention.STOCK, attention.PLAIN]
    assert [r.contender for r in found] == [name for name in names for _ in phases]
    assert all((r.saved is not None) == training for r in found)
    assert all(0 < r.error < 0.01 for r in found if r.contender == FUSED)


def test_attention_with_dropout():
    case = attention.Case(2, 4, 2, 40, 16, dropout=0.1, training=True)
    found = attention.run(case, ["stock"], [cpu.isa()], 0.0, shout)
    assert {record.phase for record in found} == {"forward", "backward", "both"}


def test_attention_finds_a_difference(monkeypatch):
    monkeypatch.setattr(attention, "fused", lambda p: 1.01 * attention.stock(p))
    with pytest.raises(ArithmeticError, match="out: got an error of"):
        attention.run(attention.Case(1, 2, 2, 20, 16), [], [cpu.isa()], 0.0, shout)


def test_attention_work():
    case = attention.Case(2, 4, 2, 3, 8, prefix=1)
    seen = 1 + 2 + 3 + 3
    assert attention.work(case, "forward", True) == (2 * 2 * 8 * (2 * 4 * 3 + 2 * 2 * 3), 4 * 2 * 4 * 8 * seen)
    assert attention.work(replace(case, queries=1), "forward", False)[1] == 4 * 2 * 4 * 8 * 3


# ---- model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bits", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_ia3_linear(training, feedforward, four_bits):
    case = ia3_linear.Case(9, (64, 128), feedforward, four_bits, training)
    found = ia3_linear.run(case, ["stock", "dense"], [cpu.isa()], 0.0, shout)
    assert {r.contender for r in found} == {FUSED, STOCK, ia3_linear.DENSE}
    assert {r.phase for r in found} == ({"forward", "backward", "both"} if training else {"forward"})
    if training:
        (saved,) = {r.saved for r in found if r.contender == FUSED}
        assert saved == (9 * 128 * 2 if feedforward else 9 * 64 * 2)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_lora_linear_grouped(monkeypatch, training):
    case = lora_linear_grouped.Case(2, (64, 128), training=training)
    isas = cpu.isas()[-2:]
    found = lora_linear_grouped.run(case, ["stock", "base", "one"], isas, 0.0, shout)
    names = [(FUSED, isa) for isa in isas] + [(STOCK, ""), (OWN_BASE, ""), (lora_linear_grouped.ONE, "")]
    assert [(r.contender, r.isa) for r in found if r.phase == "forward"] == names
    assert [r.phase for r in found[:3]] == (["forward", "backward", "both"] if training else ["forward"] * 3)
    assert all(0 < r.error < lora_linear_grouped.TOLERANCES["y"] for r in found if r.contender == FUSED)
    own = next(r for r in found if r.contender == OWN_BASE)
    assert found[0].size > own.size > 0 and found[0].flops > own.flops > 0
    monkeypatch.setitem(lora_linear_grouped.TOLERANCES, "y", 1e-9)
    with pytest.raises(ArithmeticError, match="got y with an error of"):
        lora_linear_grouped.run(case, [], isas, 0.0, shout)


def test_ia3_linear_checks():
    problem = ia3_linear.Problem(ia3_linear.Case(9, (64, 128)))
    problem.check([cpu.isa()])
    problem.layers[FUSED].ia3_l["default"].data[3] *= 2
    problem.layers[FUSED].base_layer.weight.data ^= 1
    with pytest.raises(ArithmeticError, match="y: got an error of"):
        problem.check([cpu.isa()])


@pytest.mark.parametrize("method", ["dora", "ia3", "prefix"])
def test_model_with_other_methods(tiny_model, method):
    case = model.Case("train", 1, 8, method=method)
    found, _ = model.run(case, tiny_model, [STOCK], [cpu.isa()], 0.0, shout, least=1)
    assert [r.contender for r in found] == [FUSED, STOCK] and str(case) == f"train 1x8 {method}"


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_architectures(monkeypatch, name):
    small = {
        "bert": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
        "t5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4},
    }
    architecture = architectures.ARCHITECTURES[name]
    monkeypatch.setitem(
        architectures.ARCHITECTURES, name, (*architecture[:2], architecture[2] | small[name], architecture[3])
    )
    case = architectures.Case(name, "fp32", 2, 8)
    found = architectures.run(case, ["stock"], [cpu.isa()], 0.0, shout)
    assert [r.contender for r in found] == [FUSED, STOCK] and all(r.saved > 0 and r.tokens == 16 for r in found)
    assert found[0].error < 1e-5 and found[1].error is None


def test_architectures_find_a_difference(monkeypatch):
    def worse(model, **options):
        for parameter in model.parameters():
            parameter.data.mul_(1.01)

    monkeypatch.setattr(architectures.peft_kernels, "optimize", worse)
    monkeypatch.setattr(architectures, "LEAST_TOKENS", 1)
    with pytest.raises(ArithmeticError, match=r"vit fp32 1, .*: got an error of"):
        architectures.run(architectures.Case("vit", "fp32", 1), [], [cpu.isa()], 0.0, shout)


@pytest.mark.parametrize("phase", ["train", "prefill", "decode"])
def test_model(tiny_model, phase):
    case = model.Case(phase, 1, 8)
    found, profiles = model.run(case, tiny_model, [STOCK, DENSE_LORA], [cpu.isa()], 0.0, shout, rank=2, least=1)
    assert [r.contender for r in found] == [FUSED, STOCK, DENSE_LORA] and all(r.tokens == 8 for r in found)
    assert all((r.saved is not None) == (phase == "train") for r in found)
    for name, seconds in profiles.items():
        assert set(seconds) == set(profiling.GROUPS)
        spent = {group for group, value in seconds.items() if value > 0}
        whole = name == FUSED and phase != "train"  # layers
        missing = {profiling.LINEAR, profiling.MLP} if whole else {profiling.LAYER}
        assert spent >= set(profiling.GROUPS) - {profiling.OPTIMIZER} - missing
        assert (profiling.OPTIMIZER in spent) == (phase == "train")
        assert (profiling.LAYER in spent) == whole


def test_breakdown_counts_a_backward_where_its_forward_was():
    def event(name, start, self_time, parent=None, sequence=-1):
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start), self_cpu_time_total=self_time * 1e6, cpu_parent=parent,
            sequence_nr=sequence,
        )  # fmt: skip

    root = event(profiling.REST, 0, 1)
    layer = event(profiling.LINEAR, 1, 2, root)
    forward = event("aten::mm", 3, 4, layer, sequence=7)
    looks_up = event("aten::detach", 2, 8, root, sequence=7)  # sees the number that mm will take
    backward = event("autograd::engine::evaluate_function: MmBackward0", 5, 16, root, sequence=7)
    inner = event("MmBackward0", 6, 32, backward, sequence=7)
    outside = event("aten::mm", 9, 64)
    seconds = profiling.by_group([inner, backward, forward, looks_up, layer, root, outside])
    assert {group: value for group, value in seconds.items() if value} == {
        profiling.PYTHON: 3,
        profiling.LINEAR: 4 + 16 + 32,
        profiling.REST: 8,
    }


def test_breakdown_leaves_the_model_as_it_was():
    base = nn.Module()
    base.norm, base.lm_head = nn.LayerNorm(4), nn.Linear(4, 4)
    base.get_output_embeddings = lambda: base.lm_head
    base.loss_function = loss = torch.nn.functional.mse_loss
    peft_model = SimpleNamespace(get_base_model=lambda: base)
    x = torch.ones(2, 4)
    seconds = profiling.breakdown(peft_model, lambda: base.loss_function(base.lm_head(base.norm(x)), x).backward())
    assert seconds[profiling.NORM] > 0 and seconds[profiling.HEAD] > 0 and seconds[profiling.ATTENTION] == 0
    assert base.loss_function is loss
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_breakdown_table_and_file(tmp_path):
    profiles = {FUSED: dict.fromkeys(profiling.GROUPS, 0.0) | {profiling.LINEAR: 3.0, profiling.HEAD: 1.0}}
    table = model.breakdown_table(model.CASES[0], profiles)
    assert table.row_count == 2
    model.write_breakdowns({"train": profiles}, tmp_path / "b.csv")
    rows = list(csv.DictReader((tmp_path / "b.csv").open()))
    assert math.isclose(sum(float(row["share"]) for row in rows), 1)
    assert rows[0] == {"case": "train", "contender": FUSED, "group": profiling.LINEAR, "ms": "3000", "share": "0.7500"}
