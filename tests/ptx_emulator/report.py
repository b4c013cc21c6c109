"""Counters as a table, beside what ptxas makes of the same kernels: for benchmarks and for reading."""

import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from .build import find_nvcc
from .sass import Latency, disassemble, find_latency, loads_of_sums, main_loop


class Resources(NamedTuple):
    """What a kernel uses, as ptxas says, and what its main loop does, as the disassembler shows."""

    registers: int
    spill_bytes: int  # stores and loads
    stack_bytes: int
    mma_share: float | str  # of the main loop's instructions; or why there is none
    loads_of_sums: list[int] | None = None  # see sass.loads_of_sums; None without a disassembler
    latency: Latency | None = None  # None without a disassembler, or without a loop


def resources(source: Path, architecture: str, includes: tuple[Path, ...] = ()) -> dict[str, Resources]:
    """What the kernels of a .cu file take of a real card, by their (mangled) names."""
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [
            find_nvcc(),
            "-std=c++20",
            f"-arch={architecture}",
            "-cubin",
            "-Xptxas=-v",
            "-Werror=all-warnings",
            "-o",
            str(cubin),
        ]
        command += [*(f"-I{path}" for path in includes), str(source)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        codes = disassemble(cubin)
    found = {}
    for part in text.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part).group(1)
        registers, stores, loads, stack = (
            int(re.search(pattern, part).group(1))
            for pattern in (
                r"Used (\d+) registers",
                r"(\d+) bytes spill stores",
                r"(\d+) bytes spill loads",
                r"(\d+) bytes stack frame",
            )
        )
        loop = codes and main_loop(codes[name])
        share = "no disassembler" if codes is None else loop.mma_share if loop else "no loop"
        sums, latency = (codes and read(codes[name]) for read in (loads_of_sums, find_latency))
        found[name] = Resources(registers, stores + loads, stack, share, sums, latency)
    return found


def plain_name(kernel: str) -> str:
    """A kernel's name without namespaces and parameters, if there is c++filt."""
    if not shutil.which("c++filt"):
        return kernel
    name = subprocess.run(["c++filt", kernel], capture_output=True, text=True, check=True).stdout.strip()
    return re.search(r"\w+(?=[<(]|$)", name).group()


def ratio(value: float, ideal: float) -> str:
    return f"{value / ideal:.2f}" if ideal else "-"


def moved_bytes(record: dict) -> int:
    """What passes between the multiprocessors and the L2 if the L1 never hits: whole sectors."""
    return 32 * (record["global_load"]["sectors"] + record["global_store"]["sectors"])


def compulsory_bytes(record: dict) -> int:
    """What any memory has to deliver or take: every byte that the launch touches, once."""
    return record["unique_bytes_read"] + record["unique_bytes_written"]


def shared_wavefronts(record: dict) -> tuple[int, int]:
    """The wavefronts as they are, and as they would be without bank conflicts."""
    kinds = [record[kind] for kind in ("shared_load", "shared_store", "ldmatrix", "cp_async")]
    return sum(kind["wavefronts"] for kind in kinds), sum(kind["ideal_wavefronts"] for kind in kinds)


def mma_of_wgmma(record: dict) -> int:
    """So many mma of 16 x 8 x 16 as do what its products of warpgroups do, of 64 x columns x 16."""
    return record["wgmma_columns"] // 8 * (64 // 16)


def latency_cells(latency: Latency | None) -> dict[str, str]:
    """What sass.Latency counts; figures that a kernel has not are a dash."""
    if latency is None:
        return {}
    prologue, step = latency.prologue, latency.step
    distances = latency.load_distance, latency.copy_distance
    return {
        "waits before the first mma": f"{prologue.waits}, {prologue.looped} in loops",
        "loads under way before it": f"{prologue.loads} of {prologue.size} B",
        "waits of a step": str(step.waits),
        "loads under way in a step": f"{step.loads} of {step.size} B",
        "instructions from load, copy to use": ", ".join("-" if each is None else str(each) for each in distances),
        "ALU instructions / weight": f"{latency.alu_per_weight:.2f}" if latency.alu_per_weight else "-",
    }


def row(record: dict, used: Resources | None = None) -> dict[str, str]:
    """One launch, in words and figures."""
    loads, stores, mma = record["global_load"], record["global_store"], record["mma"] + mma_of_wgmma(record)
    wavefronts, ideal_wavefronts = shared_wavefronts(record)
    share = used.mma_share if used else "-"
    return {
        "kernel": plain_name(record["kernel"]),
        "grid": "x".join(map(str, record["grid"])),
        "warp instructions": str(record["warp_instructions"]),
        **{f"- {kind}": str(count) for kind, count in record["instructions"].items()},
        "load sectors / ideal": ratio(loads["sectors"], loads["ideal_sectors"]),
        "store sectors / ideal": ratio(stores["sectors"], stores["ideal_sectors"]),
        "compulsory bytes": str(compulsory_bytes(record)),
        "bytes / compulsory": ratio(moved_bytes(record), compulsory_bytes(record)),
        "shared wavefronts": str(wavefronts),
        "shared wavefronts / ideal": ratio(wavefronts, ideal_wavefronts),
        "shared wavefronts / mma": ratio(wavefronts, mma),
        "barriers": str(record["barriers"]),
        "shared bytes": str(record["shared_bytes"]),
        "mma": str(mma),
        "instructions / mma": ratio(record["warp_instructions"], mma),
        "registers": str(used.registers) if used else "-",
        "spill bytes": str(used.spill_bytes) if used else "-",
        "mma share of main loop": share if isinstance(share, str) else f"{share:.0%}",
        **latency_cells(used.latency if used else None),
        **{f"bytes read of {name}": str(32 * count) for name, count in sorted(record["sectors_read"].items())},
    }


def table(rows: list[dict[str, str]]) -> str:
    """Markdown, a column for each launch, for there are more figures than launches. Classes without instructions are
    left out."""
    names = dict.fromkeys(name for cells in rows for name in cells)
    lines = [[name, *(cells.get(name, "-") for cells in rows)] for name in names]
    lines = [line for line in lines if not (line[0].startswith("- ") and set(line[1:]) == {"0"})]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
