"""The command line that the benchmarks share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from benchmarks.records import RESULTS as RESULTS
from peft_kernels import cpu
from peft_kernels._extension import build_info
from peft_kernels.cli.arguments import COUNT as COUNT
from peft_kernels.cli.arguments import POSITIVE as POSITIVE
from peft_kernels.cli.arguments import number as number

# Every name that a build of the kernels may know. A processor need not have them all.
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx", "neon", "neon_bf16")

Case = TypeVar("Case")


@dataclass(frozen=True)
class Options:
    """What to measure, and how thoroughly.

    Attributes:
        quick: few rounds, and no large cases.
        filter: cases whose name it is found in.
        vs: names of groups of baselines.
        isas: instruction sets of this package's kernels, the first of which the baselines are set beside. Torch keeps
            its own, unless ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA hold it to less.
        threads: of torch.
        output: a folder.
        device: "cpu", or "cuda" for the current card.
    """

    quick: bool
    filter: re.Pattern[str]
    vs: tuple[str, ...]
    isas: tuple[str, ...]
    threads: int
    output: Path
    device: str = "cpu"

    @property
    def seconds(self) -> float:
        """How long to time a case, about."""
        return 1.0 if self.quick else 8.0


LENGTH = number(int, lambda n: n >= 2, "a whole number of at least 2")
SEED = number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1")


def model_path(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not (path / "config.json").is_file() and not (path.suffix == ".gguf" and path.is_file()):
        raise argparse.ArgumentTypeError(f"got '{text}', wanted a folder with a config.json, or a .gguf file")
    return path


def expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"got '{text}', wanted a regular expression: {error}") from None


def names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: a list of known names, with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        given = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"got '{name}', wanted some of {','.join(known)}")
        return given

    return parse


def parse(
    benchmark: str,
    description: str,
    arguments: Sequence[str] | None,
    cases: Iterable[Case],
    baselines: Sequence[str],
    left_out: Sequence[str] = (),
    console: Console | None = None,
    devices: Sequence[str] = ("cpu",),
) -> tuple[Options, list[Case]]:
    """Reads the command line, sets torch's threads, and holds bitsandbytes to what torch is held to.

    Args:
        baselines: what --vs may name.
        left_out: those of them that --quick leaves out, unless --vs names them.
        cases: everything that there is, by the names that --filter sees; a `large` one is not for --quick.
        console: where to say what is skipped.
        devices: what the benchmark can run on, of cpu and cuda.

    Returns:
        The options, and the cases to be run.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {benchmark}", description=description)
    known_isas = list(dict.fromkeys([*ISAS, *cpu.isas()]))
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer cases and rounds: to see that it works")
    add("--filter", type=expression, default=re.compile(""), metavar="REGEX", help="only cases whose name has a match")
    add("--vs", type=names(baselines), metavar="NAMES", help=f"baselines, of {','.join(baselines)}")
    add("--isa", type=names(known_isas), default=(cpu.isa(),), metavar="NAMES", help=f"of {','.join(known_isas)}")
    add("--threads", type=COUNT, default=torch.get_num_threads(), metavar="N", help="of torch (%(default)s)")
    add("--output", type=Path, default=RESULTS, metavar="DIR", help="folder for the results (benchmarks/results)")
    add("--device", choices=devices, default=devices[0], help=f"of {','.join(devices)} ({devices[0]})")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not (torch.cuda.is_available() and build_info["cuda"]):
        parser.error(
            "argument --device: got 'cuda', wanted cpu: there is no CUDA device, or no build with CUDA kernels"
        )
    vs = given.vs or tuple(name for name in baselines if not (given.quick and name in left_out))
    isas = tuple(isa for isa in given.isa if isa in cpu.isas())
    for isa in given.isa:
        if isa not in isas and console:
            console.print(f"{isa}: skipped, this processor lacks it")
    if not isas:
        parser.error(f"argument --isa: got '{','.join(given.isa)}', wanted one of {','.join(cpu.isas())}")
    everything = [case for case in cases if not (given.quick and getattr(case, "large", False))]
    chosen = [case for case in everything if given.filter.search(str(case))]
    if not chosen:
        texts = ", ".join(f"'{case}'" for case in everything[:3])
        parser.error(f"argument --filter: got '{given.filter.pattern}', wanted one that some case matches: {texts}, …")
    torch.set_num_threads(given.threads)
    hold_bitsandbytes()
    options = Options(given.quick, given.filter, vs, isas, given.threads, given.output, given.device)
    return options, chosen


def hold_bitsandbytes() -> None:
    """Has layers go without bitsandbytes' product for AVX-512, which has no switch, where torch is held to less."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        from bitsandbytes.nn import modules

        modules.has_avx512bf16 = lambda: False
