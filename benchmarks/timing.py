"""How the benchmarks measure: contenders in turn, memory at its highest, and what the machine can do at best."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from peft_kernels import cpu

Samples = dict[str, list[float]]  # seconds of each phase, one number a round


def nothing() -> None:
    """What a contender does between its calls unless it has something to put back."""


def wait_for(device: str) -> None:
    """Until the work that the device was given is done; a CPU does it at once."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Contender:
    """One of the things that are timed against each other.

    Attributes:
        name: as it stands in the results.
        phases: what is called, in this order, and timed apart: a forward and its backward, say.
        reset: called, untimed, after the phases.
        isa: the instruction set of this package's kernels meanwhile; the one in use if empty.
        repeat: calls of each phase that make one sample; for calls of a few microseconds.
        grad: whether autograd is on.
        device: where it runs; the host waits for a "cuda" before it reads the clock.
    """

    name: str
    phases: Mapping[str, Callable[[], object]]
    reset: Callable[[], None] = nothing
    isa: str = ""
    repeat: int = 1
    grad: bool = True
    device: str = "cpu"

    def run(self) -> Samples:
        """Calls everything once, and returns the seconds for each phase."""
        seconds = {}
        kernels = cpu.use_isa(self.isa) if self.isa else nullcontext()
        # Entered once, not in each call, where it would add microseconds.
        with kernels, torch.set_grad_enabled(self.grad):
            for phase, call in self.phases.items():
                wait_for(self.device)
                begin = time.perf_counter()
                for _ in range(self.repeat):
                    call()
                wait_for(self.device)
                seconds[phase] = (time.perf_counter() - begin) / self.repeat
            self.reset()
        return seconds


def runnable(contenders: Sequence[Contender], optional: Collection[str], say: Callable[[str], None]) -> list[Contender]:
    """The contenders without those of the optional names that fail at their first call, of which it says why."""
    able = []
    for contender in contenders:
        try:
            contender.run()
        except Exception as error:  # what a compiler fails with is not ours to foresee
            if contender.name not in optional:
                raise
            say(f"{contender.name}: skipped, {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        else:
            able.append(contender)
    return able


def interleaved(contenders: Sequence[Contender], seconds: float, least: int = 3, most: int = 200) -> list[Samples]:
    """Times the contenders in turn, so that whatever else the machine does meets them all alike.

    Each round begins with another contender: who comes after whom decides what is left in the caches.

    Args:
        seconds: about how long to go on, warm-up left out.
        least, most: bounds of the number of rounds, whatever the time.

    Returns:
        For each contender the seconds of its phases. With more than one phase there is "both", their sum.
    """
    for contender in contenders:
        contender.run()
    samples: list[Samples] = [{} for _ in contenders]
    end = time.perf_counter() + seconds
    for turn in range(most):
        if turn >= least and time.perf_counter() >= end:
            break
        for position in range(len(contenders)):
            index = (turn + position) % len(contenders)
            taken = contenders[index].run()
            if len(taken) > 1:
                taken["both"] = sum(taken.values())
            for phase, value in taken.items():
                samples[index].setdefault(phase, []).append(value)
    return samples


# ---- Memory ---------------------------------------------------------------------------------------------------------


def peak_memory(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes by which the process's resident memory rises at most during a call, as Linux counts it; elsewhere None.

    What malloc keeps for later is given back first: memory that is already there would not be seen to be used. On a
    CUDA device it is what torch hands out of it.
    """
    if device == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        wait_for(device)
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    except (AttributeError, OSError):
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# ---- Roofline -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """The most that this machine was seen to do with so many threads, or that its CUDA device was."""

    threads: int
    bytes_per_second: float  # read from memory
    flops_per_second: float  # of torch's bf16 matrix product
    device: str = "cpu"

    def seconds(self, size: float, flops: float) -> float:
        """The least time for work that moves `size` bytes and takes that many operations."""
        return max(size / self.bytes_per_second, flops / self.flops_per_second)

    def __str__(self) -> str:
        plural = "s" if self.threads > 1 else ""
        source = torch.cuda.get_device_name() if self.device == "cuda" else f"{self.threads} thread{plural}"
        return f"{source}: {self.bytes_per_second / 1e9:.1f} GB/s read, {self.flops_per_second / 1e12:.3g} TFLOP/s bf16"


def measure_roofline(threads: int, megabytes: int = 256, side: int = 2048, device: str = "cpu") -> Roofline:
    """Streams through more memory than caches hold, and multiplies matrices that caches hold; best of several.

    Reading is timed by more than one reduction, since which of them is limited by memory alone depends on the machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if device == "cuda":
        megabytes, side = 4 * megabytes, 4 * side  # for a card this is little
    try:
        stream = torch.ones(megabytes << 18, device=device)
        left, right = stream.chunk(2)
        reductions = (stream.sum, stream.max, lambda: torch.dot(left, right))
        read = min(_best(reduction, device) for reduction in reductions)
        a, b = (torch.ones(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
        multiply = _best(lambda: F.linear(a, b), device)
    finally:
        torch.set_num_threads(before)
    return Roofline(threads, stream.nbytes / read, 2 * side**3 / multiply, device)


def _best(call: Callable[[], object], device: str, rounds: int = 6) -> float:
    return min(Contender("", {"": call}, device=device).run()[""] for _ in range(rounds))
