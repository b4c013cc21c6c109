"""The card's checks: wrong numbers are found, and so is what other programs say."""

import re
import sys
import time

import pytest
import torch
from card_runs import context_of

from benchmarks.card import cases, correctness, driver, steps
from benchmarks.card.run import NotHereError
from benchmarks.records import FUSED


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
