"""How the benchmarks measure: contenders in turn, memory at its highest, and what the machine can do at best."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import cpu

LIMIT = 60.0  # seconds of a call; a contender that takes longer is left out
ENOUGH = 1.0  # seconds that a part of a call takes at least before the whole is judged by it
SMALLEST = 1 / 256  # of a call: some rows of it
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Samples = dict[str, list[float]]  # seconds of each phase, one number a round
Item = TypeVar("Item")


def nothing() -> None:
    """What a contender with nothing to put back does between its calls."""


def wait_for(device: str) -> None:
    """Waits until the device has done its work; a CPU does it at once."""
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

    def run(self) -> dict[str, float]:
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
        except Exception as error:  # a compiler may raise anything
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
        least: rounds, whatever the time; unless they take more than a minute in all.
        most: rounds.

    Returns:
        For each contender the seconds of its phases. With more than one phase there is "both", their sum.
    """
    for contender in contenders:
        contender.run()
    samples: list[Samples] = [{} for _ in contenders]
    begin = time.perf_counter()
    for turn in range(most):
        spent = time.perf_counter() - begin
        if turn and spent >= (seconds if turn >= least else max(seconds, LIMIT)):
            break
        for position in range(len(contenders)):
            index = (turn + position) % len(contenders)
            for phase, value in with_sum(contenders[index].run()).items():
                samples[index].setdefault(phase, []).append(value)
    return samples


def with_sum(phases: dict[str, float]) -> dict[str, float]:
    """The phases, and where they are several "both", their sum."""
    return phases | {"both": sum(phases.values())} if len(phases) > 1 else phases


# ---- Calls that may take very long ----------------------------------------------------------------------------------


Part = Callable[[float], tuple[Contender, float]]  # a contender for about a share of a call, and how much it is


def estimate(part: Part) -> dict[str, float]:
    """Seconds of each phase of calls that may take hours, and that nothing could interrupt.

    Parts of them are timed, each larger than the one before, until one is the whole, or takes so long that the whole
    follows from it and from one of twice its size.
    """
    share, last = SMALLEST, 0.0
    while True:
        contender, share = part(share)
        seconds = contender.run()
        for _ in range(2):  # the first calls may have compiled something
            if sum(seconds.values()) / share <= LIMIT:
                break
            seconds = min(seconds, contender.run(), key=lambda phases: sum(phases.values()))
        taken = sum(seconds.values())
        if share >= 1:
            return seconds
        if taken >= ENOUGH or share <= last:
            break
        last, share = share, min(1.0, share * 2 * ENOUGH / max(taken, 1e-9))
    contender, larger = part(min(1.0, 2 * share))
    if larger <= share:
        return {phase: value / share for phase, value in seconds.items()}
    longer = contender.run()  # than the other; the difference is what grows
    rest = (1 - larger) / (larger - share)
    return {phase: value + rest * max(0.0, value - seconds[phase]) for phase, value in longer.items()}


def best(part: Part, rounds: int = 6) -> float:
    """The least seconds of several calls; an estimate where one takes too long."""
    seconds = sum(estimate(part).values())
    if seconds < ENOUGH:
        contender, _ = part(1.0)
        seconds = min(sum(contender.run().values()) for _ in range(rounds))
    return seconds


def product(rows: int, n: int, k: int, dtype: torch.dtype, device: str, backward: bool = False) -> Part:
    """A product x W^T of x [rows, k], and on request its gradient's product with W [n, k]."""
    weight = torch.ones(n, k, dtype=dtype, device=device)

    def part(share: float) -> tuple[Contender, float]:
        count = max(1, round(rows * share))
        x, grad_y = (torch.ones(count, width, dtype=dtype, device=device) for width in (k, n))
        phases = {"forward": lambda: F.linear(x, weight)}
        if backward:
            phases["backward"] = lambda: grad_y @ weight
        return Contender("", phases, grad=False, device=device), count / rows

    return part


def dtype_seconds(rows: int, n: int, k: int, device: str) -> dict[str, float]:
    """Seconds of a linear layer's forward and backward with torch, in each of DTYPES.

    Where a processor has no instructions for bf16, torch's product with W as it lies is a loop of single numbers: a
    hundred times slower than that of fp32.
    """
    return {name: best(product(rows, n, k, dtype, device, backward=True)) for name, dtype in DTYPES.items()}


def within(seconds: float, items: Iterable[Item]) -> Iterator[Item]:
    """The items, at least one, as long as there is time for another that takes as long as the last."""
    begin = last = time.perf_counter()
    for number, item in enumerate(items):
        now = time.perf_counter()
        if number and now - begin + (now - last) > seconds:
            return
        last = now
        yield item


@dataclass
class Budget:
    """Divides seconds among stages, one after another; each has its part of what the ones before it have left.

    Attributes:
        shares: of the stages; what they leave of 1 is for what can't be cut, such as loading models.
    """

    seconds: float
    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        self._end = time.perf_counter() + self.seconds
        self._rest = 1.0

    def stage(self, name: str) -> float:
        """Seconds for a stage that begins now."""
        part = self.shares[name] / self._rest
        self._rest -= self.shares[name]
        return part * max(0.0, self._end - time.perf_counter())


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


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that one forward keeps for its backward: each storage once, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result  # held until here, what was saved is alive, and no two storages had the same address
    return sum(saved.values())


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
        read = min(best(lambda _, call=call: (Contender("", {"": call}, device=device), 1.0)) for call in reductions)
        multiply = best(product(side, side, side, torch.bfloat16, device))
    finally:
        torch.set_num_threads(before)
    return Roofline(threads, stream.nbytes / read, 2 * side**3 / multiply, device)
