"""How benchmarks time, and by a clock of the tests' own how long they and demos take: too long is found early."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from benchmark_cases import ROOFLINE
from rich.console import Console

from benchmarks import harness, options, progress, records, report, timing
from benchmarks.records import FUSED, Faster, Record
from benchmarks.timing import Contender, Roofline
from peft_kernels import cpu


class Clock:
    """Time that passes only when a call says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def part_of(seconds, rows=1024):
    """Parts of calls that take seconds(rows); the rows that were called for."""
    called = []

    def part(share):
        count = max(1, round(share * rows))

        def call():
            called.append(count)
            seconds(count)

        return Contender("", {"forward": call}), count / rows

    return part, called


# ---- Estimates ------------------------------------------------------------------------------------------------------


def test_a_call_of_minutes_is_judged_by_a_part_of_it(clock):
    part, called = part_of(lambda rows: clock.spend(0.5 * rows))
    assert timing.estimate(part) == {"forward": pytest.approx(512)}
    assert max(called) <= 8 and clock.now < 30


def test_a_short_call_is_made_whole(clock):
    part, called = part_of(lambda rows: clock.spend(1e-5 * rows))
    assert timing.estimate(part) == {"forward": pytest.approx(0.01024)}
    assert called == [4, 1024]


def test_what_a_call_compiles_first_is_not_taken_for_its_time(clock):
    def seconds(rows):
        clock.spend(1e-3 * rows + (0 if clock.now else 40))

    part, called = part_of(seconds)
    assert timing.estimate(part)["forward"] == pytest.approx(1.024, rel=0.01) and max(called) > 100


def test_what_a_call_takes_whatever_its_rows_is_not_multiplied(clock):
    part, _ = part_of(lambda rows: clock.spend(2 + 1e-3 * rows))
    assert timing.estimate(part)["forward"] == pytest.approx(3, rel=0.1)


def test_a_dtype_without_instructions_is_not_waited_for(monkeypatch, clock):
    def product(rows, n, k, dtype, device, backward):
        speed = 1e-6 if dtype == timing.DTYPES["fp32"] else 10
        return part_of(lambda count: clock.spend(speed * count), rows)[0]

    monkeypatch.setattr(timing, "product", product)
    seconds = timing.dtype_seconds(1024, 1536, 576, "cpu")
    assert seconds["bf16"] > 1000 * seconds["fp32"] and clock.now < 600


def test_dtypes_are_timed_both_ways():
    part = timing.product(16, 8, 4, timing.DTYPES["bf16"], "cpu", backward=True)
    contender, share = part(0.5)
    assert share == 0.5 and set(contender.run()) == {"forward", "backward"}


# ---- Budgets --------------------------------------------------------------------------------------------------------


def test_a_stage_stops_before_its_time_is_up(clock):
    done = []
    for item in timing.within(10, range(40)):
        clock.spend(3)
        done.append(item)
    assert done == [0, 1, 2]
    assert list(timing.within(10, range(40))) == list(range(40))


def test_a_stage_has_one_step_at_least(clock):
    done = []
    for item in timing.within(10, range(40)):
        clock.spend(100)
        done.append(item)
    assert done == [0]


def test_slow_contenders_have_fewer_rounds(clock):
    contenders = [Contender(name, {"forward": lambda: clock.spend(25)}) for name in "ab"]
    assert [len(taken["forward"]) for taken in timing.interleaved(contenders, 8.0, least=7)] == [2, 2]


def test_a_stage_has_its_part_of_what_is_left(clock):
    budget = timing.Budget(100, {"first": 0.5, "second": 0.25, "third": 0.25})
    assert budget.stage("first") == 50
    clock.spend(80)  # more than it had
    assert budget.stage("second") == 10
    clock.spend(0)
    assert budget.stage("third") == 20
    clock.spend(40)
    assert timing.Budget(0, {"only": 1}).stage("only") == 0


# ---- Lines ----------------------------------------------------------------------------------------------------------


def test_lines_now_and_then_where_there_is_no_terminal(clock):
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture, progress.progress(console, 10, ["stock", "accelerated"]) as advance:
        for step in range(10):
            for name in ("stock", "accelerated"):
                clock.spend(2)
                advance(name, 3 - step / 10, 2)
    lines = capture.get().splitlines()
    assert re.match(r"stock +1/10  loss 3.000  2.00 s/step", lines[0])
    assert 8 <= len(lines) <= 16 and re.match(r"accelerated +10/10  loss 2.100", lines[-1])


def test_says_what_it_does_where_there_is_no_terminal():
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture, progress.working(console, "Generating"):
        pass
    assert capture.get() == "Generating …\n"


# ---- The harness ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(harness.Rows):
    rows: int = 512

    def __str__(self):
        return f"M={self.rows}"


def problems(clock, slow, made=None):
    """Problems whose contenders take 10 µs a row; one named `slow` takes a second, for a backward in the most."""

    class Problem(harness.Problem):
        def __init__(self, case):
            self.case, self.name = case, str(case)

        def contender(self, name, isa=""):
            if made is not None:
                made.append((name, self.case.rows))
            row = 1.0 if slow in (name, isa) else 1e-5
            phases = {
                "forward": lambda: clock.spend(0.1 * row * self.case.rows),
                "backward": lambda: clock.spend(0.9 * row * self.case.rows),
            }
            return Contender(name, phases, isa=isa)

        def check(self, isas):
            return dict.fromkeys(isas, 1e-3)

        def targets(self, isa):
            return (Faster("both", "stock", 2),)

    return Problem


def run(make_problem, names, isas, said):
    return harness.measure(make_problem, Case(), names, isas, 0.0, said.append)


def test_a_contender_of_minutes_is_named_and_left_out(clock, tmp_path):
    said, made = [], []
    found = run(problems(clock, "stock", made), ["stock", "dense"], [cpu.isa()], said)
    assert clock.now < 60 and ("stock", 512) not in made
    assert said == ["stock: left out, a call takes about 512 s"]
    left_out = [record for record in found if not record.samples]
    assert [(record.contender, record.phase) for record in left_out] == [
        ("stock", "forward"), ("stock", "backward"), ("stock", "both")
    ]  # fmt: skip
    assert [record.estimate for record in left_out] == pytest.approx([51.2, 460.8, 512])
    assert {record.contender for record in found if record.samples} == {FUSED, "dense"}
    assert records.judge(next(r for r in found if r.wanted), found) == [(Faster("both", "stock", 2), None)]

    chosen = options.Options(True, re.compile(""), (), (), 2, tmp_path)
    console, roofline = Console(width=130), Roofline(2, 10e9, 1e12)
    made = report.Report(tmp_path / "tiny", chosen.threads, {2: roofline}, records.describe_run(), console)
    made.run["benchmark"] = "tiny"
    with console.capture() as capture:
        made.add(found)
    text = capture.get()
    assert re.search(r"stock +~ 51.2 s +~ 461 s +~ 512 s", text)
    assert "stock: left out, for a part of a call says that it takes about 512 s" in text
    rows = {(row["contender"], row["phase"]): row for row in csv.DictReader((tmp_path / "tiny.csv").open())}
    assert rows["stock", "both"]["left_out_estimate_ms"] == "5.12e+05" and not rows["stock", "both"]["median_ms"]
    assert not rows["stock", "both"]["times_fused"] and rows["stock", "both"]["rounds"] == "0"
    assert rows[FUSED, "both"]["left_out_estimate_ms"] == "" and rows[FUSED, "both"]["median_ms"]


def test_an_instruction_set_that_takes_minutes_is_left_out(clock):
    said = []
    found = run(problems(clock, "portable"), ["dense"], [cpu.isas()[-1], "portable"], said)
    assert {(r.contender, r.isa, bool(r.samples)) for r in found} == {
        (FUSED, cpu.isas()[-1], True), ("dense", "", True), (FUSED, "portable", False)
    }  # fmt: skip
    assert report.case_table(found, Roofline(2, 10e9, 1e12)).row_count == 3


def test_nothing_to_compare_with_is_no_error(clock):
    found = run(problems(clock, FUSED), ["dense"], [cpu.isa()], [])
    assert report.case_table(found, Roofline(2, 10e9, 1e12)).row_count == 2
    assert [record for record in found if record.contender == FUSED and record.samples] == []


def test_parts_of_cases():
    assert Case(512).part(1 / 256) == Case(2) and Case(1).part(1 / 256) == Case(1)
    record = Record("M=1", "forward", "stock", "", (), estimate=70.0)
    assert str(record.median) == "nan" and record.label == "M=1, forward"


# ---- Turns, samples and the machine ---------------------------------------------------------------------------------


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
