"""An `AdapterPool` on SmolLM2-135M in 4 bits: how long an adapter takes to come in, and what a batch of them costs.

The adapters are random ones of rank 16 on every linear layer. A swap is timed until the next batch could begin: from a
checkpoint in host memory, back from the host tier after an eviction, and from its folder; beside PEFT's `load_adapter`
and `hotswap_adapter`, from the same folder. The model's tensors are checked to be where they were. Decoding is greedy,
and the contenders take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from rich.table import Table
from transformers import AutoTokenizer

import peft_kernels
from benchmarks import finetune
from benchmarks.finetune import PROMPT, Settings
from benchmarks.options import COUNT, model_path
from benchmarks.progress import make_console, working
from benchmarks.records import describe_machine, describe_versions, duration
from peft_kernels.serving import AdapterPool

RANK, ROWS, TOKENS = 16, 8, 16
LIMIT = 5e-3  # seconds that a swap from host memory may take


Taken = tuple[float, float]  # seconds that went by, and of the processor: what a busy machine does not change


def seconds(call: Callable[[], object], before: Callable[[], object] = lambda: None, rounds: int = 7) -> Taken:
    """The medians; the first call is not counted."""
    found = []
    for _ in range(rounds + 1):
        before()
        begin, busy = time.perf_counter(), time.process_time()
        call()
        found.append((time.perf_counter() - begin, time.process_time() - busy))
    passed, worked = zip(*found[1:], strict=True)
    return statistics.median(passed), statistics.median(worked)


def make_adapters(settings: Settings, folder: Path, count: int) -> list[Path]:
    model = finetune.load_with_lora(settings, dropout=0.0)
    paths = [folder / f"adapter{number}" for number in range(count)]
    for number, path in enumerate(paths):
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(path)
    return paths


def begin_batch(pool: AdapterPool, name: str) -> None:
    with pool.batch([name]):
        pass


def swaps(pool: AdapterPool, stock: Any, paths: Sequence[Path], rounds: int) -> dict[str, Taken]:
    """Seconds of each way of bringing an adapter in."""
    read = [pool.read(path) for path in paths[:2]]
    turns, counts = iter(range(10**6)), iter(range(10**6))
    timed = partial(seconds, rounds=rounds)
    return {
        "pool.swap of a checkpoint in host memory": timed(lambda: pool.swap("0", read[next(turns) % 2])),
        "pool.batch after an eviction": timed(lambda: begin_batch(pool, "0"), lambda: pool.evict("0")),
        "pool.swap from a folder": timed(lambda: pool.swap("0", paths[next(turns) % 2])),
        "PEFT's hotswap_adapter from a folder": timed(lambda: hotswap_adapter(stock, paths[next(turns) % 2], "0")),
        "PEFT's load_adapter from a folder": timed(lambda: stock.load_adapter(paths[1], f"again{next(counts)}")),
    }


def decoding(pool: AdapterPool, stock: Any, fused: Any, tokenizer: Any, rounds: int) -> dict[str, float]:
    """Tokens a second of each batch."""
    inputs = tokenizer([PROMPT] * ROWS, return_tensors="pt")
    few = {name: tensor[:1] for name, tensor in inputs.items()}
    options: dict[str, Any] = {
        "do_sample": False,
        "min_new_tokens": TOKENS,
        "max_new_tokens": TOKENS,
        "pad_token_id": 0,
    }
    names = [str(number) for number in range(ROWS)]

    def in_pool(names: list[str | None], inputs: Any) -> None:
        pool.generate(names, **inputs, **options)

    calls: dict[str, Callable[[], object]] = {
        "1 row, pool": partial(in_pool, ["0"], few),
        "1 row, accelerated PEFT": partial(fused.generate, **few, **options),
        "1 row, stock PEFT": partial(stock.generate, **few, **options),
        f"{ROWS} rows without an adapter, pool": partial(in_pool, [None] * ROWS, inputs),
        f"{ROWS} rows with one adapter, pool": partial(in_pool, ["0"] * ROWS, inputs),
        f"{ROWS} rows with {ROWS} adapters, pool": partial(in_pool, list(names), inputs),
        f"{ROWS} rows with {ROWS} adapters, accelerated PEFT": partial(
            fused.generate, **inputs, **options, adapter_names=names
        ),
        f"{ROWS} rows with {ROWS} adapters, stock PEFT": partial(
            stock.generate, **inputs, **options, adapter_names=names
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                taken[name].append(time.perf_counter() - begin)
    rows = {name: 1 if name.startswith("1 row") else ROWS for name in calls}
    return {name: rows[name] * TOKENS / statistics.median(values[1:]) for name, values in taken.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks serving", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=model_path, help="a Hugging Face folder or a GGUF file (SmolLM2-135M-Instruct)")
    add("--rounds", type=COUNT, default=7, help="of each timing (%(default)s)")
    add("--quick", action="store_true", help="one round: to see that it works")
    options = parser.parse_args(arguments)
    rounds = 1 if options.quick else options.rounds
    finetune.quiet()
    console = make_console()
    with tempfile.TemporaryDirectory() as folder, working(console, "Loading"):
        path = finetune.base_model(options.model, Path(folder))
        settings = Settings(path, 0, RANK, 1, 2, 1e-3, 0.0, "cpu", 0)
        paths = make_adapters(settings, Path(folder), ROWS)
        models = []
        for _ in range(2):
            model = PeftModel.from_pretrained(finetune.load_4bit(settings), paths[0], "0").eval()
            for number in range(1, ROWS):
                model.load_adapter(paths[number], str(number))
            models.append(model)
        stock, fused = models
        base = finetune.load_4bit(settings).eval()
        for model in (fused, base):
            peft_kernels.optimize(model, tune=False)
        before = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
        with AdapterPool(base, slots=ROWS, max_rank=RANK) as pool:
            for number, each in enumerate(paths):
                pool.load(str(number), each)
            speeds = decoding(pool, stock, fused, AutoTokenizer.from_pretrained(path), rounds)
            found = swaps(pool, stock, paths, rounds)
            size = pool.read(paths[0]).nbytes
        if before != {name: parameter.data_ptr() for name, parameter in base.named_parameters()}:
            raise ArithmeticError("the base's parameters were moved")
    console.print(f"{describe_machine('cpu')}; {describe_versions()}", highlight=False)
    table = Table(title=f"An adapter of {size / 1e6:.1f} MB comes in; no byte of the base moves")
    table.add_column("")
    for heading in ("median", "of the processor"):
        table.add_column(heading, justify="right")
    for name, taken in found.items():
        table.add_row(name, *map(duration, taken))
    console.print(table)
    table = Table(title=f"Decoding {TOKENS} tokens in {settings.dtype}")
    table.add_column("")
    table.add_column("tokens/s", justify="right")
    for name, value in speeds.items():
        table.add_row(name, f"{value:.1f}")
    console.print(table)
    passed, worked = map(duration, found["pool.swap of a checkpoint in host memory"])
    console.print(
        f"A swap from host memory takes {passed}, {worked} of the processor; wanted {duration(LIMIT)} at most"
    )
