"""Whether the kernels compute what they should, by the means of any machine: fp64, the sanitizers, the tests."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from benchmarks.card.machine import ROOT, find_tool, need
from benchmarks.card.run import FAILED, OK, TAIL, Context, NotHereError, Record

# ---- Calls against fp64 ---------------------------------------------------------------------------------------------


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated meanwhile is full of NaN: what a kernel does not write, or reads before, shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def emulating(context: Context) -> Iterator[Callable[[], list[Record]]]:
    """Sends the kernels to the emulator, if that is the device; yields a function that takes its launches."""
    if context.device != "emulated":
        yield list
        return
    from benchmarks.emulated import ops, ptx_emulator

    with ptx_emulator.profile("sm_90"), ops.emulated() as launches:
        yield launches


@contextmanager
def on(context: Context) -> Iterator[Callable[[], list[Record]]]:
    """The same, and new tensors are on the device. That costs the host microseconds a call: not for what it is part
    of."""
    default = torch.device(context.tensors_on) if context.device == "cuda" else nullcontext()
    with default, emulating(context) as launches:
        yield launches


def paused(context: Context) -> AbstractContextManager:
    """Leaves the emulator for what is no kernel's: references, which would go through it for nothing."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes() if context.device == "emulated" else nullcontext()


def kernels(context: Context, family: str) -> None:
    """Every case of a family, its results and gradients, into memory full of NaN."""
    from benchmarks.card.cases import cases

    chosen = [case for case in cases(context.is_rehearsal) if case.family == family]
    context.run("check", ((case.name, lambda case=case: check(context, case)) for case in chosen))


def check(context: Context, case) -> Record:
    from benchmarks.functions import error_of
    from benchmarks.records import FUSED

    torch.manual_seed(0)
    with on(context) as launches:
        problem = case.make()
        launches()
        with poisoned():
            got = case.results(problem, problem.functions[FUSED], problem.leaves)
        launched = sorted({record["kernel"] for record in launches()})
        with paused(context):
            doubles = {name: leaf.double() for name, leaf in problem.leaves.items()}
            wanted = case.results(problem, problem.oracle, doubles)
            worst: Record = {"error": 0.0, "share": 0.0}
            for name, value in got.items():
                bound = case.tolerance(name, value.dtype)
                error = error_of(value, wanted[name].double()) if value.numel() else 0.0
                share = error / bound if bound else error  # of a bound of zero: how far from equal
                if share > worst["share"] or (math.isnan(share) and not math.isnan(worst["share"])):
                    worst = {"what": name, "error": error, "bound": bound, "share": share,
                             "bad": int((~value.isfinite()).sum())}  # fmt: skip
    fields = worst | ({"kernels": launched} if launched else {})
    allowed = 1.0 if worst.get("bound", 1.0) else 0.0
    if worst["share"] <= allowed:
        return {"status": OK, **fields}
    unwritten = f"; {worst['bad']} elements are not finite" if worst["bad"] else ""
    reason = (
        f"got {worst['what']} with an error of {worst['error']:.3g}, wanted {worst['bound']:.3g} at most{unwritten}"
    )
    return {"status": FAILED, "reason": reason, **fields}


# ---- The sanitizers -------------------------------------------------------------------------------------------------

SANITIZERS = {
    "memcheck": ("--leak-check", "no"),
    "racecheck": ("--racecheck-report", "analysis"),
    "synccheck": (),
}


def sanitizers(context: Context) -> None:
    """Each tool on the tiny calls of every family, see driver.py."""
    program = find_tool("compute-sanitizer")
    if not program:
        raise NotHereError("compute-sanitizer is not installed")
    driver = [sys.executable, "-m", "benchmarks.card.driver", "--device", context.device]

    def run(tool: str) -> Record:
        # The caching allocator would hide accesses beyond a tensor that is within a larger block.
        variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [program, "--tool", tool, *SANITIZERS[tool], "--error-exitcode", "99", *driver]
        share = context.left() / (len(SANITIZERS) - list(SANITIZERS).index(tool))
        return judge_sanitizer(*program_within(command, share, variables))

    context.run("check", ((tool, lambda tool=tool: run(tool)) for tool in SANITIZERS))


def judge_sanitizer(status: int | None, output: str) -> Record:
    summary = (re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output) or ["no summary"])[-1]
    if status is None:
        raise NotHereError(f"its share of the time was up; until then {output.count('=========  ')} lines of findings")
    if status == 0:
        return {"text": summary}
    if status == 99 or "SUMMARY" in summary:
        return {"status": FAILED, "reason": summary, "output": output[:TAIL]}
    if re.search(r"not supported|permission|unable to|insufficient", output, re.IGNORECASE):
        raise NotHereError(f"it can't run here: {(output.splitlines() or [''])[-1]}")
    return {"status": FAILED, "reason": f"exit status {status}", "output": output[-TAIL:]}


def program_within(command: list[str], seconds: float, variables=os.environ) -> tuple[int | None, str]:
    """Runs a program; its exit status, or None if its time was up, and what it printed."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", preexec_fn=os.setpgrp,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it runs, as the sanitizers and ncu do
        output, _ = process.communicate()
        return None, output
    return process.returncode, output


# ---- The tests ------------------------------------------------------------------------------------------------------

# The most used families first; each file is a case, and a process, of its own.
TESTS = (
    "lora_linear", "lora_linear_autograd", "nf4", "rms_norm", "glu", "rotary", "cross_entropy", "dropout", "attention",
    "attention_autograd", "ia3_linear", "dora_linear", "nn_lora_linear", "adapter", "adapter_autograd",
    "adapter_grouped", "adapter_fusion", "combine", "lora_linear_grouped", "lora_linear_errors", "derivatives",
    "sum_parts", "compile_and_export", "threads",
)  # fmt: skip
# What runs in seconds where nothing but the command is tried.
REHEARSED = {
    "cpu": ("rms_norm", "test_shapes and portable"),
    "emulated": ("rms_norm", "test_dtypes and emulated"),
}


def tests(context: Context) -> None:
    """pytest's tests on CUDA, file by file."""
    need("pytest", "hypothesis")
    chosen, expression = (TESTS, "cuda") if context.device == "cuda" else ((REHEARSED[context.device][0],), "")
    expression = expression or REHEARSED[context.device][1]

    def run(name: str) -> Record:
        path = ROOT / "tests" / f"test_{name}.py"
        command = [sys.executable, "-m", "pytest", str(path), "-k", expression, "-q", "-p", "no:cacheprovider"]
        seconds = max(30.0, context.left() / 3)  # so that there is time for others
        return judge_tests(*program_within([*command, "--no-header", "--tb=short"], min(seconds, context.left())))

    context.run("check", ((f"test_{name}.py", lambda name=name: run(name)) for name in chosen))


def judge_tests(status: int | None, output: str) -> Record:
    last = (output.strip().splitlines() or [""])[-1].strip("= ")
    if status is None:
        failures = re.findall(r"^FAILED .*", output, re.MULTILINE)
        if failures:
            return {"status": FAILED, "reason": failures[0]}
        raise NotHereError("the step's time was up while they ran")
    if status == 0:
        return {"text": last}
    if status == 5:
        raise NotHereError("it has no such tests")
    missing = re.search(r"No module named '(\w+)", output)
    if status in (2, 4) and missing:
        raise NotHereError(f"its tests need {missing[1]}, which is not installed")
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)", output, re.MULTILINE)
    return {"status": FAILED, "reason": "; ".join([last, *failed[:3]])[:500], "output": output[-TAIL:]}
