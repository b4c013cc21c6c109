"""Counters as a table, beside what ptxas makes of the same kernels: for benchmarks and for reading."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from .build import find_nvcc


class Resources(NamedTuple):
    """Of a kernel, as ptxas tells."""

    registers: int
    spill_bytes: int  # stores and loads
    stack_bytes: int


def resources(source: Path, architecture: str, includes: tuple[Path, ...] = ()) -> dict[str, Resources]:
    """What the kernels of a .cu file take of a real card, by their (mangled) names."""
    command = [find_nvcc(), "-std=c++20", f"-arch={architecture}", "-cubin", "-Xptxas=-v", "-o", "/dev/null"]
    command += [*(f"-I{path}" for path in includes), str(source)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {}
    for part in text.split("Compiling entry function")[1:]:
        numbers = [
            int(re.search(pattern, part).group(1))
            for pattern in (
                r"Used (\d+) registers",
                r"(\d+) bytes spill stores",
                r"(\d+) bytes spill loads",
                r"(\d+) bytes stack frame",
            )
        ]
        registers, stores, loads, stack = numbers
        found[re.search(r"'(\w+)'", part).group(1)] = Resources(registers, stores + loads, stack)
    return found


def ratio(traffic: dict, what: str) -> str:
    ideal = traffic[f"ideal_{what}"]
    return f"{traffic[what] / ideal:.2f}" if ideal else "-"


def row(record: dict, used: Resources | None = None) -> dict[str, str]:
    """One launch, in words and figures."""
    shared = {
        key: sum(record[kind][key] for kind in ("shared_load", "shared_store", "ldmatrix", "cp_async"))
        for key in ("wavefronts", "ideal_wavefronts")
    }
    read, unique = record["global_load"]["bytes"], record["unique_bytes_read"]
    return {
        "kernel": record["kernel"],
        "grid": "x".join(map(str, record["grid"])),
        "warp instructions": str(record["warp_instructions"]),
        "bytes read": str(read),
        "/ unique": f"{read / unique:.2f}" if unique else "-",
        "bytes written": str(record["global_store"]["bytes"]),
        "load sectors / ideal": ratio(record["global_load"], "sectors"),
        "store sectors / ideal": ratio(record["global_store"], "sectors"),
        "shared wavefronts / ideal": ratio(shared, "wavefronts"),
        "mma": str(record["mma"]),
        "instructions / mma": f"{record['instructions_per_mma']:.1f}" if record["mma"] else "-",
        "wavefronts / mma": f"{shared['wavefronts'] / record['mma']:.1f}" if record["mma"] else "-",
        "registers": str(used.registers) if used else "-",
        "spill bytes": str(used.spill_bytes) if used else "-",
    }


def table(rows: list[dict[str, str]]) -> str:
    """Markdown, the columns aligned."""
    columns = list(rows[0])
    lines = [columns, *([cells[column] for column in columns] for cells in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
