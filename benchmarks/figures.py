"""The tables of docs/figures.md and of the README, made of the files in benchmarks/results.

A table stands behind a comment that names it, such as <!-- table: epyc-zen5/model -->. `python -m benchmarks figures`
writes all of them anew, and `make docs` writes those of the site.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.records import FUSED, RESULTS, duration

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs/figures.md")
TABLE = re.compile(r"(<!-- table: (\S+) -->\n\n)(?:\|.*\n)*")

STOCK = "stock"
Source = tuple[str, str, str]  # file, case, phase
Cell = Callable[[Source], str]


# ---- Cells ----------------------------------------------------------------------------------------------------------


@cache
def rows_of(file: str) -> list[dict[str, str]]:
    with (RESULTS / f"{file}.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def number(source: Source, contender: str, column: str) -> float | None:
    """What a file has of a contender; of the fused one with the fastest instruction set, which is the first.

    Raises:
        LookupError: the file lacks the case or the phase.
    """
    file, *wanted = source
    rows = [row for row in rows_of(file) if [row["case"], row["phase"]] == wanted]
    if not rows:
        raise LookupError(f"benchmarks/results/{file}.csv: got no {' of '.join(reversed(wanted))}")
    return next((float(row[column]) for row in rows if row["contender"] == contender and row[column]), None)


def median(contender: str) -> Cell:
    def cell(source: Source) -> str:
        milliseconds = number(source, contender, "median_ms")
        return "" if milliseconds is None else duration(milliseconds / 1e3)

    return cell


def ratio(contender: str, other: str, column: str) -> Cell:
    def cell(source: Source) -> str:
        upper, lower = number(source, contender, column), number(source, other, column)
        return f"{upper / lower:.2f} ×" if upper and lower else ""

    return cell


def speed(contender: str) -> Cell:
    """How many times as fast as a contender the fused one is."""
    return ratio(contender, FUSED, "median_ms")


def peak(contender: str) -> Cell:
    """The fused peak memory as a share of a contender's."""
    return ratio(FUSED, contender, "peak_bytes")


COMPARED = {"accelerated": median(FUSED), "stock": median(STOCK), "faster": speed(STOCK), "peak memory": peak(STOCK)}


# ---- Tables ---------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row has the headings."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


@dataclass(frozen=True)
class Table:
    """A row for each label, with the cells of every source behind each other."""

    title: str
    cells: Mapping[str, Cell]
    rows: Mapping[str, Sequence[Source]]
    groups: Sequence[str] = ("",)  # what stands before the first heading of each source

    def __str__(self) -> str:
        headings = [f"{group}{name}" for group in self.groups for name in self.cells]
        body = [
            [label, *(cell(source) for source in sources for cell in self.cells.values())]
            for label, sources in self.rows.items()
        ]
        return markdown([[self.title, *headings], *body])


def model(machine: str) -> Table:
    step, decoding = f"{machine}/model", f"{machine}/model-decode"
    return Table("SmolLM2-135M in 4 bits", COMPARED, {
        "training step, LoRA, r = 16, 4 × 256 tokens": [(step, "train 4x256 dropout 0.05", "train")],
        "training step, DoRA, r = 16, without dropout": [(step, "train 4x256 dora", "train")],
        "training step, (IA)³, under autocast": [(step, "train 4x256 ia3", "train")],
        "training step, prefix of 32": [(step, "train 4x256 prefix", "train")],
        "prefill of 256 tokens": [(decoding, "prefill 1x256", "prefill")],
        "greedy `generate` of 48 tokens": [(decoding, "decode 1x48", "decode")],
    })  # fmt: skip


def model_fp32(machine: str) -> Table:
    file = f"{machine}/model"
    return Table("SmolLM2-135M in 4 bits, fp32", COMPARED, {
        "training step, LoRA, r = 16, 4 × 256 tokens": [(file, "train 4x256 dropout 0.05 fp32", "train")],
        "training step, DoRA, r = 16, without dropout": [(file, "train 4x256 dora fp32", "train")],
        "prefill of 256 tokens": [(file, "prefill 1x256 fp32", "prefill")],
        "greedy `generate` of 48 tokens": [(file, "decode 1x48 fp32", "decode")],
    })  # fmt: skip


def architectures(machine: str) -> Table:
    labels = {
        "bert": "BERT, adapters on query and value", "gpt2": "GPT-2, on `c_attn`", "llama": "Llama, on all layers",
        "qwen3": "Qwen 3, on all layers", "t5": "T5, on query and value", "vit": "ViT, on all layers",
    }  # fmt: skip
    rows = {}
    for name, label in labels.items():
        cases = (f"{name} {dtype} {'4' if name == 'vit' else '4x128'}" for dtype in ("fp32", "bf16"))
        rows[label] = [(f"{machine}/architectures", case, "train") for case in cases]
    cells = {"fused": median(FUSED), "stock": median(STOCK), "peak memory": peak(STOCK)}
    return Table("", cells, rows, ("fp32: ", "bf16: "))


def lora_linear(machine: str) -> Table:
    file = f"{machine}/lora_linear"
    return layers({
        **forwards(file),
        "forward and backward, 8": [(file, "train M=8 4096x4096", "both")],
        "forward and backward, 512, dropout 0.05": [(file, "train M=512 4096x4096 dropout 0.05", "both")],
    })  # fmt: skip


def lora_linear_fp32(machine: str) -> Table:
    file = f"{machine}/lora_linear"
    return layers({
        **forwards(file, " fp32"),
        "forward and backward, 512, dropout 0.05": [(file, "train M=512 4096x4096 dropout 0.05 fp32", "both")],
        **{f"forward, {m}, in bf16": [(file, f"eval M={m} 4096x4096", "forward")] for m in (1, 8)},
    })  # fmt: skip


def forwards(file: str, suffix: str = "") -> dict[str, list[Source]]:
    rows = (1, 8, 32, 128, 512, 2048)
    return {f"forward, {m}": [(file, f"eval M={m} 4096x4096{suffix}", "forward")] for m in rows}


def layers(rows: Mapping[str, Sequence[Source]]) -> Table:
    return Table("tokens", {name: median(name) for name in (FUSED, STOCK, "dense")}, rows)


def other_linear(machine: str) -> Table:
    dora, grouped = f"{machine}/dora_linear", f"{machine}/lora_linear_grouped"
    nf4 = {
        f"dequantisation to {dtype}, {label}": [
            (f"{machine}/nf4", f"dequantize 4096x4096 nf4 {nested}b64 {dtype}", "dequantize")
        ]
        for dtype in ("bf16", "fp32")
        for label, nested in (("nested statistics", "nested "), ("statistics in fp32", ""))
    }
    call = (f"{machine}/lora_linear", "eval M=1 576x576 overhead", "forward")
    return Table("4096 × 4096 in 4 bits, and others", {"fused": median(FUSED), "stock": median(STOCK)}, {
        "DoRA, 512 tokens, forward and backward": [(dora, "M=512 4096x4096 nf4", "both")],
        "DoRA on a dense weight, the same": [(dora, "M=512 4096x4096 dense", "both")],
        "DoRA, one token, forward": [(dora, "M=1 4096x4096 nf4", "forward")],
        "eight samples with four adapters, one token each": [(grouped, "8 x 1 4096x4096", "forward")],
        "the same, 64 tokens each": [(grouped, "8 x 64 4096x4096", "forward")],
        "the same on 576 × 576, one token each": [(grouped, "8 x 1 576x576", "forward")],
        "the same on 576 × 576, 64 tokens each": [(grouped, "8 x 64 576x576", "forward")],
        **nf4,
        "LoRA on 576 × 576, a call for one token": [call],
    })  # fmt: skip


def surroundings(machine: str) -> Table:
    """Whose stock contender has the name `eager` or `torch`."""

    def stock(source: Source) -> str:
        return median("torch")(source) or median("eager")(source)

    return Table("", {"fused": median(FUSED), "torch, as transformers has it": stock, "compiled": median("compiled")}, {
        "RMSNorm, 1024 × 576": [(f"{machine}/rms_norm", "M=1024 d=576", "both")],
        "RMSNorm, 2048 × 4096": [(f"{machine}/rms_norm", "M=2048 d=4096", "both")],
        "rotary embedding, 4 × 256 tokens, 9 + 3 heads of 64": [(f"{machine}/rotary", "B=4 S=256 H=9/3 D=64", "both")],
        "dropout, 1024 × 768": [(f"{machine}/dropout", "M=1024 N=768 p=0.1", "both")],
        "loss, 1024 × 49152": [(f"{machine}/cross_entropy", "M=1024 V=49152", "both")],
    })  # fmt: skip


def experts(machine: str) -> Table:
    file = f"{machine}/experts-quick"
    cases = ["1024 tokens, 2 of 32 experts 512x512 float32", "256 tokens, 8 of 128 experts 512x512 float32",
             "1024 tokens, 2 of 32 experts 512x512 bfloat16", "1 tokens, 8 of 128 experts 512x512 float32"]  # fmt: skip
    cells = {"fused": median(FUSED), "block": median("block"), "PEFT": median("peft"), "peak, of PEFT's": peak("peft")}
    rows = {}
    for case in cases:
        dtype = case.rpartition(" ")[2].replace("float32", "fp32").replace("bfloat16", "bf16")
        label = f"{case.partition(' experts')[0].replace('1 tokens', '1 token')} experts, {dtype}"
        rows[label] = [(file, case, "both")]
        if not case.startswith("1 "):
            rows[f"{label}, 4 bits"] = [(file, f"{case}, 4-bit", "both")]
    return Table("", cells, rows)


def train_many(machine: str) -> Table:
    alone = "one by one"
    cells = {"all at once": median(FUSED), alone: median(alone), "faster": speed(alone)}
    rows = {"8 adapters, 128 tokens each": [(f"{machine}/train_many", "8 adapters x 128", "train")]}
    return Table("a step of SmolLM2-135M in 4 bits", cells, rows)


# ---- Demos ----------------------------------------------------------------------------------------------------------


@cache
def demo_of(file: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((RESULTS / f"{file}.json").read_text())
    return results


def three_digits(value: float, unit: str) -> str:
    return f"{float(f'{value:.3g}'):g} {unit}"


def compared(rows: Sequence[Mapping[str, Any]], stock: str, fused: str) -> str:
    """A demo's numbers of both models, to three digits, and what one is of the other."""
    lines = [["", fused, stock, "the one of the other"]]
    for row in rows:
        numbers = [three_digits(row[name], row["unit"]) for name in (fused, stock)]
        lines.append([row["name"], *numbers, f"{row[fused] / row[stock]:.2f} ×"])
    return markdown(lines)


def demo(machine: str) -> str:
    rows = demo_of(f"{machine}/demo")["results"]
    return compared([row for row in rows if row["compared"]], STOCK, "accelerated")


def differences(machine: str) -> str:
    found = demo_of(f"{machine}/demo")["largest differences without dropout"]
    return markdown([["losses without dropout of", "differ by up to"], *([k, f"{v:.3f}"] for k, v in found.items())])


def accuracies(machine: str) -> str:
    found = demo_of(f"{machine}/demo_adapters")["accuracy"]
    tasks = list(next(iter(found.values())))
    lines = [["accuracy", *tasks, "mean"]]
    for name, by_task in found.items():
        values = [by_task[task] for task in tasks]
        lines.append([name, *(f"{value:.1%}" for value in (*values, sum(values) / len(values)))])
    return markdown(lines)


def costs(machine: str) -> str:
    return compared(demo_of(f"{machine}/demo_adapters")["costs"], "plain PyTorch", "fused")


def methods(machine: str) -> str:
    lines = [["", "trained", "loss", "a step", "peak memory", "file"]]
    for row in demo_of(f"{machine}/demo_methods")["methods"]:
        memory, file = (three_digits(row[name], "MB") for name in ("memory_mb", "file_mb"))
        lines.append([row["name"], f"{row['share']:.3%}", f"{row['loss']:.3f}", duration(row["seconds"]), memory, file])
    return markdown(lines)


TABLES: dict[str, Callable[[str], Table | str]] = {
    function.__name__: function
    for function in (model, model_fp32, architectures, lora_linear, lora_linear_fp32, other_linear, surroundings,
                     experts, train_many, demo, differences, accuracies, costs, methods)
}  # fmt: skip


# ---- Pages ----------------------------------------------------------------------------------------------------------


def written(text: str) -> str:
    """A page with its tables as the files have them; as it was where a copy of the sources has no files.

    Raises:
        LookupError: a comment names a table that is not known, or one whose file lacks a case.
    """
    if not RESULTS.is_dir():
        return text

    def table(match: re.Match[str]) -> str:
        machine, _, name = match[2].partition("/")
        return f"{match[1]}{TABLES[name](machine)}"

    return TABLE.sub(table, text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks figures", description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    for page in PAGES:
        page.write_text(written(page.read_text()))
        print(f"Saved: {page.relative_to(ROOT)}")
