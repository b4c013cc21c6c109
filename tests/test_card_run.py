"""How the card's steps are run: what is recorded of those that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from card_runs import ends

from benchmarks import card
from benchmarks.card import machine, run
from benchmarks.card.run import DeviceLostError, NotHereError, Run, Step

ROOT = Path(__file__).parent.parent


@pytest.fixture
def step(monkeypatch):
    """Makes a step of a function."""
    faults = ModuleType("benchmarks.card.faults")
    monkeypatch.setitem(sys.modules, faults.__name__, faults)

    def make(function, limit=20.0, phase="correctness", needs=""):
        setattr(faults, function.__name__, function)
        return Step(phase, function.__name__, limit, f"faults:{function.__name__}", needs)

    return make


def fine(context):
    context.run("check", [("a case", lambda: {"found": 1})])


def run_steps(*given, device="cpu", seconds=60.0, file=None):
    told = []
    runner = Run(device, seconds, told.append, file)
    runner.steps(given)
    assert len(told) == len(given)
    return runner.records


def of_cases(records):
    return {record["name"]: record for record in records if record["kind"] == "check"}


def test_a_step_that_raises(step):
    def raises(context):
        print("what it printed")
        raise ValueError("a reason\nand more")

    found = ends(run_steps(step(raises), step(fine)))
    assert found["raises"]["status"] == "failed" and found["raises"]["reason"] == "ValueError: a reason"
    assert "what it printed" in found["raises"]["output"] and "Traceback" in found["raises"]["output"]
    assert found["fine"]["status"] == "ok" and found["fine"]["cases"] == {"ok": 1}


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_step_that_is_killed(step, number):
    def killed(context):
        context.run("check", [
            ("before", lambda: None),
            ("fatal", lambda: os.kill(os.getpid(), number)),
            ("behind", lambda: {"process": os.getpid()}),
        ])  # fmt: skip

    records = run_steps(step(killed), step(fine))
    found = of_cases(records)
    assert found["fatal"]["status"] == "failed" and found["fatal"]["reason"].endswith(number.name)
    assert found["before"]["status"] == found["behind"]["status"] == "ok"
    assert [record["name"] for record in records if record["kind"] == "check"].count("before") == 1
    assert ends(records)["killed"]["status"] == "failed" and ends(records)["fine"]["status"] == "ok"


def test_a_step_that_is_killed_between_cases(step):
    def killed(context):
        os.kill(os.getpid(), signal.SIGABRT)

    found = ends(run_steps(step(killed), step(fine)))
    assert found["killed"]["reason"] == "its process ended with SIGABRT" and found["fine"]["status"] == "ok"


def test_a_step_over_its_limit_ends_with_all_that_it_started(step, tmp_path):
    def hangs(context):
        child = subprocess.Popen(["sleep", "600"], preexec_fn=os.setpgrp)
        (tmp_path / "child").write_text(str(child.pid))
        context.run("check", [("endless", lambda: time.sleep(600))])

    begin = time.monotonic()
    records = run_steps(step(hangs, limit=1.0), step(fine))
    assert time.monotonic() - begin < 30
    assert of_cases(records)["endless"]["reason"] == "it took longer than 1 s"
    found = ends(records)
    assert found["hangs"]["status"] == "failed" and found["fine"]["status"] == "ok"
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what it started still runs")


def test_an_error_that_the_device_keeps(step, monkeypatch):
    """What comes behind it is tried in a fresh process."""
    lost = []
    monkeypatch.setattr(run, "why_spoiled", lambda: lost[0] if lost else None)

    def sticks(context):
        def bad():
            lost.append("AcceleratorError: an illegal memory access was encountered")
            raise RuntimeError("CUDA error")

        context.run("check", [("wrong", lambda: {"status": "failed", "reason": "0 is not 1"}), ("bad", bad),
                              ("behind", lambda: {"seen": list(lost)})])  # fmt: skip

    records = run_steps(step(sticks), step(fine), device="cuda")
    found = of_cases(records)
    assert "illegal memory access" in found["bad"]["sticky"] and "sticky" not in found["wrong"]
    assert found["behind"]["status"] == "ok" and found["behind"]["seen"] == []
    assert ends(records)["sticks"]["cases"] == {"ok": 1, "failed": 2} and ends(records)["fine"]["status"] == "ok"


def test_the_device_is_asked_by_torch(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: misaligned address\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert run.why_spoiled() is None
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert run.why_spoiled() == "RuntimeError: CUDA error: misaligned address"
    context = run.Context("cuda", [], time.monotonic() + 9, lambda record: None)
    with pytest.raises(DeviceLostError):
        context.run("check", [("lost", lost)])


def test_a_phase_whose_time_is_up(step, monkeypatch):
    monkeypatch.setattr(run, "LEAST", 0.3)

    def long(context):
        context.run("check", [("endless", lambda: time.sleep(600))])

    records = run_steps(step(long), step(fine), seconds=0.5)
    found = ends(records)
    assert found["long"]["status"] == found["fine"]["status"] == "skipped"
    assert found["long"]["reason"] == "the phase's time was up while it ran"
    assert found["fine"]["reason"] == "the phase's time was up"
    assert not any(record.get("status") == "failed" for record in records)


def test_a_step_leaves_cases_out_when_its_own_time_is_up(step):
    def slow(context):
        context.deadline = time.monotonic() + 0.5
        context.run("check", ((f"case {i}", lambda: time.sleep(0.3)) for i in range(9)))

    records = run_steps(step(slow))
    found = of_cases(records)
    assert len(found) == 9 and found["case 0"]["status"] == "ok"
    assert found["case 8"] | {"reason": "the step's time was up", "status": "skipped"} == found["case 8"]
    assert ends(records)["slow"]["status"] == "ok"


def test_what_this_machine_can_not_run_is_skipped(step):
    def lacks(context):
        raise NotHereError("it needs a thing")

    def lacks_something(context):
        machine.need("torch", "no_such_package")

    found = ends(run_steps(step(lacks), step(lacks_something), step(fine, needs="cuda")))
    assert found["lacks"] | {"status": "skipped", "reason": "it needs a thing"} == found["lacks"]
    assert found["lacks_something"]["reason"] == "it needs no_such_package, which is not installed"
    assert found["fine"]["reason"] == "it needs a CUDA device, and this is cpu"


def test_records_are_written_as_they_are_made(step, tmp_path):
    path = tmp_path / "records.jsonl"

    def looks(context):
        context.run("check", [("first", lambda: None)])
        time.sleep(0.5)
        context.run("check", [("second", lambda: {"lines": len(path.read_text().splitlines())})])

    with path.open("w") as file:
        records = run_steps(step(looks), file=file)
    assert of_cases(records)["second"]["lines"] == 1
    assert run.read(path) == records == [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(path.read_text()[:-9])
    assert run.read(path) == records[:-1]


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_failed_step_is_the_command_s_failure(is_wrong, step, monkeypatch, tmp_path, capsys):
    def wrong(context):
        context.run("check", [("sum", lambda: {"status": "failed", "reason": "got 5, wanted 4"})])

    def absent(context):
        raise NotHereError("nothing is here")

    monkeypatch.setattr(card, "STEPS", (step(wrong), step(absent)) if is_wrong else (step(absent), step(fine)))
    arguments = ["correctness", "--device", "cpu", "--out", str(tmp_path)]
    if is_wrong:
        with pytest.raises(SystemExit) as end:
            card.main(arguments)
        assert end.value.code == 1
    else:
        card.main(arguments)
    text = capsys.readouterr().out
    assert ("wrong / sum: got 5, wanted 4" in text) == is_wrong and "nothing is here" in text
    assert [path.name for path in tmp_path.iterdir()] == ["correctness.jsonl"]
    first = run.read(tmp_path / "correctness.jsonl")[0]
    assert first["kind"] == "environment" and first["phase"] == "correctness" and first["module"]["refusal"] is None


def test_a_machine_is_described_without_a_module():
    """For one has to be built there first; that needs to be found out without it."""
    program = """
import sys
sys.modules["peft_kernels"] = None
from benchmarks import card
from benchmarks.card import machine, report, run
machine.environment(run.Context("cpu", [], 0.0, lambda record: print(record["module"])))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("{'refusal': 'ModuleNotFoundError: import of peft_kernels halted"), result.stderr


def test_a_module_that_can_not_be_had_is_said(step, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "_module", lambda device: {"refusal": "it was built for another card"})
    monkeypatch.setattr(machine, "ROOT", tmp_path)  # where there is no setup.py
    monkeypatch.setattr(card, "STEPS", (step(fine),))
    with pytest.raises(SystemExit):
        card.main(["correctness", "--device", "cpu", "--out", str(tmp_path)])
    found = ends(run.read(tmp_path / "correctness.jsonl"))
    assert found["build"]["status"] == "failed" and "setup.py" in found["build"]["output"]
    assert found["fine"]["status"] == "skipped" and found["fine"]["reason"] == "it was built for another card"
