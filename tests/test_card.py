"""`python -m benchmarks card`: what is recorded of steps that fail, and the whole command without a card."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import ptx_emulator
import pytest
import torch

from benchmarks import card
from benchmarks.card import (
    cases,
    clock,
    correctness,
    driver,
    hardware,
    machine,
    model,
    profile,
    report,
    run,
    steps,
    timing,
)
from benchmarks.card.run import DeviceLostError, NotHereError, Run, Step
from benchmarks.records import FUSED

ROOT = Path(__file__).parent.parent
OPTIONAL = ("bitsandbytes", "peft", "transformers", "matplotlib")
# A Python that finds this on its path can't import them.
BLOCK = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


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


def ends(records):
    return {record["step"]: record for record in records if record["kind"] == "step"}


def of_cases(records):
    return {record["name"]: record for record in records if record["kind"] == "check"}


# ---- Steps that fail ------------------------------------------------------------------------------------------------


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


# ---- Wrong numbers --------------------------------------------------------------------------------------------------


def context_of(device="cpu"):
    sent = []
    return run.Context(device, [], time.monotonic() + 99, sent.append), sent


def checked(family, **functions):
    """The first case of a family, with other functions."""
    (case, *_) = [case for case in cases.cases(tiny=True) if case.family == family]

    def make(make=case.make):
        problem = make()
        problem.functions |= functions
        return problem

    return correctness.check(context_of()[0], cases.replace(case, make=make))


def test_what_a_kernel_does_not_write_is_found():
    def leaves_a_row(t):
        y = torch.empty_like(t["x"])
        y[1:] = t["x"][1:] * t["weight"] * 0 + 1
        return y * t["weight"] + 0 * t["x"]

    found = checked("rms_norm", **{FUSED: leaves_a_row})
    assert found["status"] == "failed" and re.search(r"; \d+ elements are not finite", found["reason"])


def test_a_nan_is_worse_than_any_number():
    """Here of the result only: the gradients, which come behind it, are right."""

    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return torch.cat([y[1:], torch.full_like(y[:1], torch.nan)])

        @staticmethod
        def backward(ctx, grad):
            return grad

    (case,) = [case for case in cases.cases(tiny=True) if case.family == "rms_norm"]
    right = case.make().functions[FUSED]
    found = checked("rms_norm", **{FUSED: lambda t: Hides.apply(right(t))})
    assert found["status"] == "failed" and found["what"] == "result 0" and found["bad"] == 40


def test_memory_is_poisoned_and_then_as_before():
    with correctness.poisoned():
        assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_rounding_is_found():
    def rounds_twice(t):
        return (t["x"] * t["x"].float().square().mean(-1, keepdim=True).add(1e-5).rsqrt()).bfloat16() * t["weight"]

    assert checked("rms_norm")["status"] == "ok"
    found = checked("rms_norm", **{FUSED: lambda t: rounds_twice(t) * 1.01})
    assert found["status"] == "failed" and "wanted 0.00313 at most" in found["reason"]


def test_equal_means_equal():
    found = checked("nf4", **{FUSED: lambda t: torch.zeros(16, 128, dtype=torch.bfloat16)})
    assert found["status"] == "failed" and "wanted 0 at most" in found["reason"]
    assert checked("nf4")["status"] == "ok"


def test_runs_that_differ_are_found():
    same, other = [torch.ones(3), torch.ones(2)], [torch.ones(3), torch.tensor([1.0, torch.nan])]
    assert hardware.differing(same, same) == "" and hardware.verdict("") == {}
    assert hardware.differing(other, same) == hardware.differing(other, other) == "1 elements of result 1"
    assert hardware.verdict("text")["status"] == "failed"


@pytest.mark.parametrize("tiny", [True, False])
def test_every_family_has_cases_that_differ(tiny):
    known = cases.cases(tiny)
    assert {case.family for case in known} == set(cases.FAMILIES)
    assert len({(case.family, case.name) for case in known}) == len(known)
    assert [family for family, _ in steps.CHECKED] == list(cases.FAMILIES)
    if not tiny:
        timed = {case.family for case in known if case.timed}
        assert timed == set(cases.FAMILIES) - {"lora_linear"}  # which has steps of its own


def test_the_sanitizers_program(capsys):
    driver.main(["--device", "cpu"])
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(cases.FAMILIES)


# ---- What programs say ----------------------------------------------------------------------------------------------


def test_what_the_sanitizers_say():
    judge = correctness.judge_sanitizer
    assert judge(0, "========= ERROR SUMMARY: 0 errors\n") == {"text": "ERROR SUMMARY: 0 errors"}
    found = judge(99, "========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error\n")
    assert found["status"] == "failed" and found["reason"] == "ERROR SUMMARY: 1 error" and "Invalid" in found["output"]
    race = judge(99, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n")
    assert race["status"] == "failed" and race["reason"].startswith("RACECHECK SUMMARY: 1 hazard")
    assert judge(1, "no such option")["reason"] == "exit status 1"
    for status, output in ((None, ""), (1, "Error: Unable to attach, insufficient permission")):
        with pytest.raises(NotHereError):
            judge(status, output)


def test_what_pytest_says():
    judge = correctness.judge_tests
    assert judge(0, "...\n===== 3 passed in 1 s =====\n") == {"text": "3 passed in 1 s"}
    found = judge(1, "F\nFAILED tests/test_x.py::test_y[cuda] - assert 1 == 2\n1 failed, 2 passed in 1 s\n")
    assert found["status"] == "failed" and "test_y[cuda]" in found["reason"]
    with pytest.raises(NotHereError, match="need expecttest, which"):
        judge(2, "E   ModuleNotFoundError: No module named 'expecttest.x'\n")
    for status in (5, None):
        with pytest.raises(NotHereError):
            judge(status, "")


NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","void few_rows<8>(Params)","GPU Speed Of Light Throughput","Duration","us","1,234.5"
"0","1","void few_rows<8>(Params)","GPU Speed Of Light Throughput","Memory Throughput","%","61.5"
"0","1","void few_rows<8>(Params)","Launch Statistics","No such metric","%","1"
"1","1","glu_kernel","GPU Speed Of Light Throughput","Duration","us","n/a"
==PROF== Disconnected
"""


def test_what_ncu_says():
    assert profile.read_counters(NCU) == [
        {"name": "void few_rows<8>(Params)", "metrics": {"Duration (us)": 1234.5, "Memory Throughput (%)": 61.5}},
        {"name": "glu_kernel", "metrics": {}},
    ]
    assert profile.read_counters("==ERROR== ERR_NVGPUCTRPERM") == []


@pytest.mark.parametrize(("output", "status"), [(NCU, "ok"), ("ERR_NVGPUCTRPERM", "skipped"), ("crash", "failed")])
def test_a_machine_with_ncu(output, status, monkeypatch):
    monkeypatch.setattr(profile, "find_tool", lambda name: name)
    monkeypatch.setattr(profile, "program_within", lambda *_: (1, output))
    monkeypatch.setattr(run, "why_spoiled", lambda: None)
    context, sent = context_of("cuda")
    profile.counters(context)
    assert sent[-1]["status"] == status
    assert [record["name"] for record in sent if record.get("kind") == "launch"] == (
        ["void few_rows<8>(Params)", "glu_kernel"] if status == "ok" else []
    )


def test_a_machine_with_the_sanitizers(monkeypatch):
    calls = []

    def program(command, seconds, variables):
        calls.append(command)
        assert variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" and 0 < seconds < 99
        return 0, "========= ERROR SUMMARY: 0 errors\n"

    monkeypatch.setattr(correctness, "find_tool", lambda name: name)
    monkeypatch.setattr(correctness, "program_within", program)
    context, sent = context_of("cuda")
    correctness.sanitizers(context)
    assert [command[2] for command in calls] == ["memcheck", "racecheck", "synccheck"]
    assert [record["status"] for record in sent if "status" in record] == ["ok"] * 3


def test_programs_are_ended_in_time():
    status, output = correctness.program_within([sys.executable, "-c", "print(5, flush=True); input()"], 30.0)
    assert status == 1 and output.startswith("5")
    begin = time.monotonic()
    status, output = correctness.program_within(["sh", "-c", "echo 5; sleep 600; echo 6"], 1.0)
    assert status is None and output == "5\n" and time.monotonic() - begin < 30


# ---- What only hardware does ----------------------------------------------------------------------------------------


class Stub:
    """A stream, or an event by the host's clock."""

    def __init__(self, **options):
        self.at = 0.0

    def wait_stream(self, other):
        pass

    synchronize = record_stream = lambda self: None

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def played_cuda(monkeypatch):
    """The CPU plays a card, so that what only a card runs is run at all; yields what the graphs do at a replay."""
    replays = SimpleNamespace(call=lambda calls: [each() for each in calls])
    properties = SimpleNamespace(L2_cache_size=4096, total_memory=1 << 30)
    capture = lambda calls: SimpleNamespace(replay=(lambda: replays.call(calls)) if [c() for c in calls] else None)  # noqa: E731
    for name, value in {
        "Stream": Stub, "Event": Stub, "current_stream": Stub, "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None, "_sleep": lambda cycles: None, "device_count": lambda: 2,
        "get_device_name": lambda index: "a card", "get_device_properties": lambda index: properties,
        "mem_get_info": lambda: (1 << 40, 1 << 40), "memory_reserved": lambda: 0,
        "set_per_process_memory_fraction": lambda share: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(run.Context, "tensors_on", "cpu")
    for module in (clock, hardware):
        monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(clock, "MOST_ROUNDS", 3)
    for name, value in {"N": 48, "K": 128, "ROWS": 200, "WIDTH": 128}.items():
        monkeypatch.setattr(hardware, name, value)
    for name, value in {"FEW": (1,), "SOME": (3,), "MANY": (40,)}.items():
        monkeypatch.setattr(timing, name, value)
    return replays


def ran(function, **options):
    context, sent = context_of("cuda")
    function(context, **options)
    return [record for record in sent if "status" in record]


def test_hardware_s_steps_run(played_cuda):
    for function in (hardware.side_stream, hardware.graphs, hardware.second_device, hardware.large):
        found = ran(function)
        bad = [record for record in found if record["status"] != "ok"]
        # The CPU's masks are drawn in no order that two replays would share, and 200 rows are few to count kept ones.
        assert not [record for record in bad if record["name"] != "dropout"], bad


@pytest.mark.parametrize(
    "function",
    [machine.ceilings, timing.eager, timing.families, profile.backends],
    ids=lambda function: function.__name__,
)
def test_a_card_s_small_steps_run(function, played_cuda, monkeypatch):
    monkeypatch.setattr(run.Context, "is_rehearsal", True)
    found = ran(function)
    assert len(found) >= 5 and not [record for record in found if record["status"] == "failed"]


def test_a_stale_graph_is_found(played_cuda):
    played_cuda.call = lambda calls: None
    found = ran(hardware.graphs)
    assert {record["status"] for record in found} == {"failed"}
    assert "replay 0: " in found[0]["reason"] and "replay 0: " in found[-1]["reason"]
    assert found[-2]["reason"] == "two replays drew the same mask"


@pytest.mark.parametrize(
    ("message", "status"), [("CUDA out of memory", "ok"), ("an error", "failed"), (None, "skipped")]
)
def test_an_allocation_that_fails(message, status, played_cuda, monkeypatch):
    limit, layer = [1.0], hardware.layer

    def limited(*arguments):
        call, *rest = layer(*arguments)

        def maybe():
            if limit[0] < 1 and message:
                raise RuntimeError(message)
            return call()

        return maybe, *rest

    monkeypatch.setattr(hardware, "layer", limited)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: limit.__setitem__(0, share))
    (found,) = ran(hardware.failed_allocation)
    assert found["status"] == status and limit == [1.0]


def test_a_card_s_layers_are_timed(played_cuda):
    found = ran(timing.linear, n=48, k=128)
    assert [(record["m"], record["direction"]) for record in found if record.get("contender") == FUSED] == [
        (1, timing.FORWARD), (3, timing.FORWARD), (40, timing.FORWARD),
        (3, timing.BOTH), (40, timing.BOTH), (1, timing.BOTH),
    ]  # fmt: skip
    assert all(record["how"] == clock.IN_A_GRAPH and record["rounds"] == 3 for record in found if "how" in record)
    assert len(found) == 6 * len(timing.CONTENDERS)


def test_what_can_not_be_captured_is_timed_call_by_call(played_cuda, monkeypatch):
    def refuses(calls):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(clock, "capture", refuses)
    called = []
    samples, how = clock.seconds_each([lambda: called.append(0), lambda: called.append(1)], "cuda", calls=5)
    assert how == clock.EAGER and len(samples) == 3 and called[:4] == [0, 1, 0, 1] and len(called) == 6 * 6


def test_another_library_s_error_is_no_failure(played_cuda, monkeypatch):
    def broken(self, name):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(timing.Weights, "layers", broken)
    found = {record["name"].split(": ")[1]: record["status"] for record in ran(timing.linear, n=48, k=128)}
    assert [name for name, status in found.items() if status == "failed"] == [FUSED, timing.FUSED_LORA]
    assert set(found.values()) == {"failed", "skipped"}


# ---- Contenders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [timing.FORWARD, timing.BOTH])
def test_contenders_compute_the_same(phase):
    weights = timing.Weights(48, 128, 2, "cpu")
    x = torch.randn(5, 128).bfloat16().requires_grad_(phase == timing.BOTH)
    results = {}
    for name in timing.CONTENDERS:
        if "bitsandbytes" in name and not machine.has("bitsandbytes"):
            continue
        layers = weights.layers(name)
        assert len(layers) == 2
        y = layers[0](x)
        grads = ()
        if phase == timing.BOTH:
            leaves = (x, weights.A, weights.B)
            grads = [g for g in torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True) if g is not None]
        results[name] = [y.detach(), *grads]
    for name, found in results.items():
        wanted = results[timing.FUSED_LORA if len(found) == 4 or "LoRA" in name else FUSED]
        for got, want in zip(found, wanted, strict=True):
            assert (got - want).norm() <= 0.02 * want.norm(), name


def test_shares_are_of_what_was_measured():
    context, _ = context_of()
    context.records = [
        {"kind": "ceiling", "name": name, "status": "ok", "value": value}
        for name, value in (("copy", 10.0), ("bf16 product", 100.0))
    ]
    found = timing.timed(context, [4.0, 2.0, 8.0], "", size=20.0, flops=100.0)
    assert found["median"] == 4.0 and found["quartile1"] == 3.0 and found["share_of_ceiling"] == 0.5
    assert timing.timed(context, [4.0], "", size=20.0, flops=400.0)["share_of_ceiling"] == 1.0
    assert "share_of_ceiling" not in timing.timed(context_of()[0], [4.0], "", size=20.0)


def test_weights_are_more_than_the_cache_holds_twice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=50 << 20))
    for n, k in steps.SHAPES:
        count, size = timing.count_of(n * k / 2), n * k / 2
        assert count >= 8 and count * size > 2 * (50 << 20)


def test_a_model_without_bitsandbytes_computes_the_same(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(model, "has", lambda package: False)
    made = model.make_model(model.TINY, "cpu")
    ids = torch.randint(model.TINY["vocab_size"], (2, 7))
    with torch.no_grad():
        wanted = made(input_ids=ids).logits
        text = model.optimize(made)
        got = made(input_ids=ids).logits
    assert not any(isinstance(module, model.Stock) for module in made.modules()) and text
    assert 0 < (got - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_model_that_computes_otherwise_is_found(is_wrong, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(model, "has", lambda package: False)
    monkeypatch.setattr(model, "need", lambda package: None)
    if is_wrong:
        monkeypatch.setattr(model.Stock, "forward", lambda self, x: 1.5 * self.fused(x))
    context, sent = context_of()
    model.measure(context)
    found = {record["name"]: record for record in sent if "name" in record}
    assert found["same logits"]["status"] == ("failed" if is_wrong else "ok")
    assert {record["status"] for name, record in found.items() if "status" in record} <= {"ok", "failed"}
    assert found["training step, accelerated"]["attention"] and found["decoding, stock"]["table"]


# ---- Report ---------------------------------------------------------------------------------------------------------


def many_records(failed=0):
    records = [
        {"kind": "check", "phase": "correctness", "step": "kernels", "name": f"case {i}", "status": "failed",
         "reason": "wrong"}
        for i in range(failed)
    ]  # fmt: skip
    for n, k in steps.SHAPES:
        for m in (*timing.FEW, *timing.SOME, *timing.MANY):
            for direction in (timing.FORWARD, timing.BOTH):
                for contender in timing.CONTENDERS:
                    records.append({
                        "kind": "time", "phase": "timing", "step": "linear", "name": "", "status": "ok", "m": m, "n": n,
                        "k": k, "direction": direction, "contender": contender, "median": 123.4e-6, "quartile1": 1e-4,
                        "quartile3": 2e-4, "share_of_ceiling": 0.5,
                    })  # fmt: skip
    return records


def test_the_summary_fits_on_a_screen():
    text = report.summary(many_records(failed=20))
    assert len(text) <= report.MOST_CHARACTERS and text.index("case 19: wrong") < text.index("4096 x 4096, forward, µs")
    assert text.rstrip().splitlines()[-1].startswith("… ") or "8192 x 28672, forward and backward" in text
    assert len(report.summary(many_records(failed=2000))) <= report.MOST_CHARACTERS


def test_page_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    records = many_records(failed=1)
    text = report.page(records)
    assert "### 8192 x 28672, forward and backward, µs" in text and "| 8192 | 123 |" in text and "case 0: wrong" in text
    report.plot(records, tmp_path / "card.png")
    assert (tmp_path / "card.png").stat().st_size > 10_000


def test_a_card_s_name_as_a_folder():
    assert card.name_of("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# ---- The command ----------------------------------------------------------------------------------------------------


def command(*arguments, path=(), environment=None):
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])} | (environment or {})
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "card", *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )


def test_every_step_has_a_function_and_a_name_of_its_own():
    assert len({(step.phase, step.name) for step in steps.STEPS}) == len(steps.STEPS)
    modules = {
        "correctness": correctness, "hardware": hardware, "machine": machine, "model": model, "profile": profile,
        "timing": timing,
    }  # fmt: skip
    for each in (steps.ENVIRONMENT, steps.BUILD, *steps.STEPS):
        module, name = each.function.split(":")
        assert callable(getattr(modules[module], name)), each
    for phase in steps.PHASES:
        assert next(each for each in steps.STEPS if each.phase == phase).name == "ceilings"


def test_the_steps_are_listed(capsys):
    card.main(["timing", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(step.phase == "timing" for step in steps.STEPS)
    assert lines[1].split() == ["timing", "90", "s", "linear", "4096x4096"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["speed"], "argument PHASE: got 'speed', wanted some of correctness, timing, profile, report"),
        (["--only", "no such step", "timing"], "argument --only: got 'no such step', wanted one that the name of"),
        (["--minutes", "0"], "argument --minutes: got 0, wanted a number above 0"),
        (["--only", "("], "argument --only: got '(', wanted a regular expression"),
    ],
)
def test_bad_arguments(arguments, wanted, capsys):
    with pytest.raises(SystemExit) as end:
        card.main(arguments)
    assert end.value.code == 2 and wanted in capsys.readouterr().err


def test_without_the_optional_packages(tmp_path):
    """The command in a Python without PEFT, bitsandbytes, transformers and matplotlib; a step of every phase."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    out = tmp_path / "out"
    only = "^(ceilings|kernels of (lora_linear|nf4)|linear .*|side stream|model)$"
    result = command("--device", "cpu", "--only", only, path=[tmp_path], environment={"OUT": str(out)})
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout) < 12_000 and "A REHEARSAL on cpu" in result.stdout
    assert {path.name for path in out.iterdir()} == {"correctness.jsonl", "timing.jsonl", "profile.jsonl", "card.md"}
    found = {phase: run.read(out / f"{phase}.jsonl") for phase in steps.PHASES}
    assert all(records[0]["packages"]["peft"] is None for records in found.values())
    assert ends(found["correctness"])["kernels of lora_linear"]["cases"] == {"ok": 4}
    assert ends(found["correctness"])["side stream"]["reason"] == "it needs a CUDA device, and this is cpu"
    linear = ends(found["timing"])["linear 4096x4096"]
    assert linear["status"] == "ok" and set(linear["cases"]) == {"ok", "skipped"}
    assert ends(found["profile"])["model"]["reason"] == "it needs transformers, which is not installed"
    assert "plot" in result.stdout and "matplotlib" in result.stdout
    assert "bitsandbytes is not installed" in (out / "card.md").read_text()


needs_emulator = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("emulated", marks=needs_emulator)])
def test_the_whole_command(device, tmp_path):
    result = command("--device", device, "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ok ") > 20 and "\nfailed" not in result.stdout
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"correctness.jsonl", "timing.jsonl", "profile.jsonl", "card.md", "card.png"}
    records = [record for phase in steps.PHASES for record in run.read(tmp_path / f"{phase}.jsonl")]
    found = {(record["phase"], record["step"]): record for record in records if record["kind"] == "step"}
    assert {(step.phase, step.name) for step in steps.STEPS} <= set(found)
    for step in steps.STEPS:
        record = found[step.phase, step.name]
        assert record["status"] == "ok" or record["reason"], step
        assert (record["status"] == "ok") or step.needs == "cuda" or step.name in ("compiled", "tune 4096x4096")
    if device == "emulated":
        launched = " ".join(name for record in records for name in record.get("kernels", ()))
        sources = [path.read_text() for path in ROOT.glob("csrc/*/cuda/*.cu*")]
        kernels = {name for source in sources for name in re.findall(r"__global__[^;{]*?\b(\w+_kernel)\b", source)}
        assert len(kernels) > 30 and not {name for name in kernels if name not in launched}


def test_make_card_needs_no_environment(tmp_path):
    result = subprocess.run(
        ["make", "--silent", "card", f"PYTHON={sys.executable}", f"VENV={tmp_path}/none", "ARGS=timing --list"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and "linear 4096x4096" in result.stdout, result.stderr
    assert not (tmp_path / "none").exists()
