"""A MODEL, not a measurement: what limits each CUDA kernel on each card, from counts of the emulator.

Each launch of a call is counted in the tests' emulator at a shape that it runs in seconds, on a card with so few
multiprocessors that they have as much to do as the card's have. The counts are scaled to the shape asked for, by the
rows and, for what reads the weight, by its size; a card's published rates turn them into the least time for each
resource: DRAM (distinct bytes), L2 (all sectors, as if the L1 never hit), the matrix unit, shared memory (wavefronts),
the issue of instructions (PTX's, which are not quite the machine's), and the ALU pipe (PTX's conversions, and its
integer instructions but multiplications, which are another pipe's). What a multiprocessor has for itself is left to
whole waves of CTAs. The longest is the prediction; what a real kernel loses to latency is not in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

import torch

from benchmarks.emulated import ops, ptx_emulator, report, resources_of
from benchmarks.progress import make_console
from peft_kernels.ops import lora_linear, quantize_4bit


@dataclass(frozen=True)
class Card:
    """Published rates and limits, of the CUDA C++ Programming Guide where they are a multiprocessor's. Tensor cores:
    multiply-adds a clock of a multiprocessor by mma.sync in bf16 with fp32 sums; tf32 has half of it, and half the
    depth of an mma, so that every mma takes the same time.

    The L2's rate is what the benchmark gpu-l2-cache of github.com/te42kyfo/gpu-benches measured on cards of the same
    chips: 5.4 TB/s on an A100 at 1.41 GHz, 2.4 on an A40 at 1.74, 5.2 on an L40 at 2.49, 9.7 on an H200 at 1.98."""

    name: str
    multiprocessors: int
    gigahertz: float
    gigabytes: float  # a second, of DRAM
    l2_bytes_per_clock: int  # of the whole device
    multiply_adds: int
    library_teraflops: float  # of the library's bf16 product, dense: nine tenths of the peak
    shared_bytes: int  # of a multiprocessor, as are the next two
    threads: int
    ctas: int
    alu_lanes: int = 16  # of a quarter of a multiprocessor: the pipe takes a warp every second clock

    def occupancy(self, counts: Counts) -> int:
        """CTAs that a multiprocessor holds at once: warps have registers by 256, CTAs a KB of shared memory each."""
        registers = ceil(counts.threads / 32) * ceil(32 * counts.registers / 256) * 256
        by_registers = 65536 // registers if registers else self.ctas
        by_shared = self.shared_bytes // (counts.shared + 1024)
        return max(min(self.ctas, self.threads // counts.threads, by_shared, by_registers), 1)

    def busy(self, counts: Counts) -> float:
        """The share of whole waves' time in which there is work, for the last wave takes as long as any."""
        at_once = min(self.occupancy(counts), ceil(counts.ctas / self.multiprocessors))
        return counts.ctas / (ceil(counts.ctas / (at_once * self.multiprocessors)) * at_once * self.multiprocessors)

    def limits(self, counts: Counts) -> dict[str, float]:
        """Seconds for each resource alone."""
        clock = self.gigahertz * 1e9
        per_multiprocessor = self.multiprocessors * clock * self.busy(counts)
        return {
            "dram": counts.dram / (self.gigabytes * 1e9),
            "l2": counts.l2 / (self.l2_bytes_per_clock * clock),
            "mma": counts.mma * 16 * 8 * 16 / self.multiply_adds / per_multiprocessor,
            "shared": counts.wavefronts / per_multiprocessor,
            "issue": counts.instructions / 4 / per_multiprocessor,
            "alu": counts.alu * 32 / (4 * self.alu_lanes) / per_multiprocessor,
        }


CARDS = {
    "sm_80": Card("A100 SXM 40 GB", 108, 1.41, 1555, 3830, 1024, 280, 164 << 10, 2048, 32),
    "sm_86": Card("GeForce RTX 3090", 82, 1.70, 936, 1380, 256, 64, 100 << 10, 1536, 16),
    "sm_89": Card("GeForce RTX 4090", 128, 2.52, 1008, 2090, 256, 148, 100 << 10, 1536, 24),
    "sm_90": Card("H100 SXM", 132, 1.755, 3350, 4900, 1280, 890, 228 << 10, 2048, 32),
}
LAUNCH_SECONDS = 2e-6  # between kernels of one stream
WGMMA_TIME = 5 / 8  # of that by mma.sync, for the same sums


@dataclass(frozen=True)
class Counts:
    """The counts of one launch."""

    kernel: str
    dram: float
    l2: float
    mma: float
    wavefronts: float
    instructions: float
    alu: float = 0
    ctas: int = 1
    threads: int = 32  # of a CTA, as is the shared memory
    shared: int = 0
    registers: int = 0  # of a thread; unknown, they don't bound the CTAs of a multiprocessor

    @classmethod
    def of(cls, record: dict, scale: float, ctas: int, registers: int) -> Counts:
        wavefronts, _ = report.shared_wavefronts(record)
        return cls(
            plain_name(record),
            scale * report.compulsory_bytes(record),
            scale * report.moved_bytes(record),
            scale * (record["mma"] + WGMMA_TIME * report.mma_of_wgmma(record)),
            scale * wavefronts,
            scale * record["warp_instructions"],
            scale * (record["instructions"]["integer"] + record["instructions"]["convert"]),
            ctas,
            prod(record["block"]),
            record["shared_bytes"],
            registers,
        )


def plain_name(record: dict) -> str:
    return report.plain_name(record["kernel"]).removesuffix("_kernel")


@dataclass(frozen=True)
class Shape:
    m: int
    n: int
    k: int
    rank: int = 16

    def counted(self, backward: bool) -> Shape:
        """The part of it that is run in the emulator: few outputs of a long reduction, so that what a CTA does once
        weighs as little as in the whole; and on the same side of every card's crossover."""
        if backward:
            return Shape(min(self.m, 1024), min(self.n, 2048), min(self.k, 256), self.rank)
        if self.m <= 32:
            return Shape(self.m, min(self.n, 128), min(self.k, 1 << 15), self.rank)
        return Shape(min(self.m, 1024), min(self.n, 256), min(self.k, 2048), self.rank)

    def activations(self) -> int:
        """Bytes of x and of y, or of their gradients, in bf16."""
        return 2 * self.m * (self.n + self.k)


def launch(shape: Shape, card: str, backward: bool, dropout: float, multiprocessors: int | None = None) -> list[dict]:
    """The launches of a forward, or of a backward, in bf16 with fp32 adapters on an NF4 weight."""
    torch.manual_seed(0)
    weight = quantize_4bit(torch.randn(shape.n, shape.k, dtype=torch.bfloat16))
    adapters = [torch.randn(shape.rank, shape.k).requires_grad_()], [torch.randn(shape.n, shape.rank).requires_grad_()]
    x = torch.randn(shape.m, shape.k, dtype=torch.bfloat16).requires_grad_()
    grad_y = torch.randn(shape.m, shape.n, dtype=torch.bfloat16)
    with ptx_emulator.profile(card, multiprocessors), ops.emulated() as launches:
        y = lora_linear(x, weight, None, *adapters, (1.0,), (dropout,) if dropout else ())
        records = launches()
        if backward:
            y.backward(grad_y)
            records = launches()
    return records


def count(
    shape: Shape, card: str, backward: bool, dropout: float, used: Mapping[str, report.Resources]
) -> list[Counts]:
    """The counts of these launches. Where the library multiplies, there are many CTAs, which are scaled as well."""
    small = shape.counted(backward)
    rows = shape.m / small.m
    outputs = shape.k / small.k if backward else shape.n / small.n
    records = launch(small, card, backward, dropout, max(1, round(CARDS[card].multiprocessors / rows / outputs)))
    ctas = {}
    if not any("nf4_dequantize" in record["kernel"] for record in records):
        with ptx_emulator.set_checks(max_instructions=0):
            whole = launch(shape, card, backward, dropout)
        ctas = {record["kernel"]: prod(record["grid"]) for record in whole}
    weights = shape.n * shape.k / (small.n * small.k)
    columns = {"lora_shrink": shape.k / small.k, "lora_expand": shape.n / small.n, "lora_dy_pass": shape.n / small.n,
               "lora_x_pass": shape.k / small.k, "lora_sum_parts": shape.k / small.k}  # fmt: skip
    s_bytes = sum(each["unique_bytes_written"] for each in records if plain_name(each) == "lora_shrink")
    result = []
    for record in records:
        name, kernel = record["kernel"], plain_name(record)
        scale = weights if kernel == "nf4_dequantize" else rows * columns.get(kernel, weights)
        registers = used[name].registers if name in used else 0
        counts = Counts.of(record, scale, ctas.get(name) or ceil(scale * prod(record["grid"])), registers)
        if kernel.startswith("matmul_"):
            # DRAM delivers the weight once for all rows; x, y and s are not of its size.
            weight_bytes = report.compulsory_bytes(record) - small.activations() - s_bytes
            counts = replace(counts, dram=weights * weight_bytes + shape.activations() + rows * s_bytes)
        result.append(counts)
    return result


def product(shape: Shape, card: Card) -> float:
    """Seconds of the library's product: its operands are read and its result is read and written."""
    size = 2 * (shape.n * shape.k + shape.m * shape.k + 2 * shape.m * shape.n)
    return max(2 * shape.m * shape.n * shape.k / card.library_teraflops / 1e12, size / card.gigabytes / 1e9)


def predict(counts: Sequence[Counts], card: Card) -> float:
    return sum(max(card.limits(each).values()) + LAUNCH_SECONDS for each in counts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks roofline", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", nargs="+", type=int, default=(1, 16, 128, 4096), metavar="M", help="(1 16 128 4096)")
    add("--weight", nargs=2, type=int, default=(4096, 4096), metavar=("N", "K"), help="(4096 4096)")
    add("--rank", type=int, default=16, help="(16)")
    add("--dropout", type=float, default=0.0, help="(0)")
    add("--card", nargs="+", choices=CARDS, default=tuple(CARDS), help="(all)")
    given = parser.parse_args(arguments)
    if reason := ptx_emulator.missing():
        sys.exit(f"python -m benchmarks roofline: {reason}")
    console = make_console()
    console.print(__doc__.splitlines()[0])
    for name in given.card:
        used = resources_of("lora_linear", name)
        for m in given.rows:
            show(Shape(m, *given.weight, given.rank), name, given.dropout, used, console.print)


def show(
    shape: Shape, name: str, dropout: float, used: Mapping[str, report.Resources], say: Callable[[str], None]
) -> None:
    """The launches of both directions, with the least time of each resource in microseconds."""
    card = CARDS[name]
    for backward in (False, True):
        counts = count(shape, name, backward, dropout, used)
        total = predict(counts, card)
        is_library = any(each.kernel == "nf4_dequantize" for each in counts)
        if is_library:
            total += product(shape, card) + LAUNCH_SECONDS
        say(
            f"\nMODEL of {card.name} ({name}), {'backward' if backward else 'forward'}, {shape.m} rows, weight "
            f"{shape.n} x {shape.k}, rank {shape.rank}: {total * 1e6:.1f} µs"
        )
        for each in counts:
            limits = card.limits(each)
            longest = max(limits, key=limits.__getitem__)
            times = ", ".join(f"{resource} {seconds * 1e6:.1f}" for resource, seconds in limits.items())
            say(f"  {each.kernel:20} {times}: {longest}")
        if is_library:
            say(f"  {'the product':20} {product(shape, card) * 1e6:.1f}")
