"""`make demo-methods`: each of its methods on a tiny model, its results, and the whole of it."""

import csv
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import plot
from examples import demo_methods
from examples.demo_methods import FACTORS, HELD_OUT, METHODS, Result, Settings

ROOT = Path(__file__).parent.parent


def make_settings(model=Path("model"), **given):
    return Settings(**{
        "model": model, "methods": tuple(METHODS), "steps": 4, "rank": 4, "bottleneck": 4, "virtual_tokens": 3,
        "batch": 2, "length": 12, "seed": 0, "dtype": "fp32",
    } | given)  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [("--methods", "LoRA,Adapter", "some of LoRA,QLoRA"), ("--rank", "0", "at least 1"), ("--length", "1", "least 2")],
)
def test_bad_option(option, value, wanted, capsys):
    with pytest.raises(SystemExit) as error:
        demo_methods.main([option, value])
    assert error.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: got '" in message and wanted in message


def test_held_out_rows_are_not_trained_on():
    settings = make_settings(steps=30)
    batches, held_out = demo_methods.split(torch.arange(12 * 40 + 5), settings, evaluated=2)
    assert batches.shape == (30, 2, 12) and held_out.shape == (2, 2, 12)
    assert not {*batches.flatten().tolist()} & {*held_out.flatten().tolist()}
    assert {row // 12 % HELD_OUT for row in held_out[..., 0].flatten().tolist()} == {HELD_OUT - 1}
    with pytest.raises(ValueError, match="batch: got 2, wanted at most the 1 rows that are held out"):
        demo_methods.split(torch.arange(12 * 19), settings, evaluated=2)


def test_steps_that_there_is_time_for():
    trials = [(5.0, 1.0), (7.0, 2.0)]  # a model of each is made, and evaluated and trained with each learning rate
    assert demo_methods.affordable_steps(trials, 1.0, 12 + 6 + 9 * 10 + 0.5) == 10
    assert demo_methods.affordable_steps(trials, 1.0, 0.0) == 1


def test_a_first_token_counts_for_no_method():
    class Model:
        def __call__(self, input_ids, labels):
            assert labels[:, 0].eq(-100).all() and labels[:, 1:].equal(input_ids[:, 1:])
            return Result  # which has a loss

    demo_methods.loss_of(Model(), torch.randint(9, (2, 5)), autocast=False)


@pytest.mark.parametrize("name", METHODS)
def test_method(name, tiny_model, tmp_path):
    """Trains what belongs to the method, and from the same start with each learning rate; the best is saved."""
    settings = make_settings(tiny_model)
    model = demo_methods.make(name, settings)
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    trained = demo_methods.trained(model)
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    run = demo_methods.MethodRun(name, model, settings, METHODS[name].lr)
    batches = torch.randint(300, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    starts = {key: p.detach().clone() for key, p in demo_methods.trained(model).items()}
    for batch in batches[:1].expand(3, -1, -1):
        run.step(batch)
    assert run.losses[-1] < run.losses[0]
    assert any(not torch.equal(p, starts[key]) for key, p in demo_methods.trained(model).items())
    for key, p in model.named_parameters():
        if key in frozen:
            assert torch.equal(p, frozen[key]), key
    assert demo_methods.held_bytes(run) > 0

    result, firsts = Result(name), []
    demo_methods.train(result, settings, batches, batches[:1], tmp_path, 0.0, lambda name, loss, _: firsts.append(loss))
    assert len({*firsts[:: len(batches)]}) == 1 and len(result.losses) == len(FACTORS)
    assert math.isfinite(result.loss) and result.loss == min(result.losses.values()) and result.seconds > 0
    assert result.file_mb > 0


def test_4_bits_take_less(tiny_model):
    bytes_of = {
        name: demo_methods.held_bytes(demo_methods.MethodRun(name, demo_methods.make(name, settings), settings, 1e-3))
        for settings in [make_settings(tiny_model)]
        for name in ("LoRA", "QLoRA")
    }
    assert bytes_of["QLoRA"] < bytes_of["LoRA"]


def test_best_learning_rate():
    result = Result("LoRA", losses={1e-3: 2.0, 3e-3: 1.5, 1e-2: math.nan})
    assert (result.lr, result.loss) == (3e-3, 1.5)
    assert result.as_row()["losses"] == "0.001: 2; 0.003: 1.5; 0.01: nan"
    assert math.isnan(Result("LoRA", losses={1e-3: math.nan}).loss) and math.isnan(Result("LoRA").lr)


RESULTS = [
    Result("LoRA", "a remark", 10, 0.01, 300.0, 2.0, {1e-3: 2.5}, 0.5),
    Result("DoRA", error="ValueError: [no] reason"),
    Result("BitFit", "", 5, 0.001, 200.0, 0.1, {1e-3: 2.75}, 0.25),
]


def test_results(tmp_path):
    console = Console(width=160)
    with console.capture() as capture:
        console.print(demo_methods.result_table(RESULTS, 3.0, make_settings(), 7))
    text = capture.get()
    assert "7 steps of 2 × 12 tokens" in text and "1.000%" in text and "a remark" in text and "3.000" in text
    assert "failed: ValueError: [no] reason" in text
    demo_methods.write_csv(RESULTS, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["LoRA", "DoRA", "BitFit"] and rows[0]["loss"] == "2.5"
    assert rows[1]["loss"] == rows[1]["seconds"] == ""
    written = {"machine": "a machine", "versions": "", "frozen": 3.0, "methods": [it.as_row() for it in RESULTS]}
    (tmp_path / "demo_methods.json").write_text(json.dumps(written))
    plot.main([str(tmp_path / "demo_methods.json")])
    assert (tmp_path / "demo_methods.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw(tmp_path):
    written = {"machine": "", "versions": "", "frozen": 3.0, "methods": [RESULTS[1].as_row()]}
    demo_methods.draw_saved(written, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()


# ---- The whole ------------------------------------------------------------------------------------------------------


def test_a_method_that_fails_stops_no_other(tiny_model, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("no such thing\nand more")

    broken = {"LoRA": replace(METHODS["LoRA"], build=fail), "BitFit": METHODS["BitFit"]}
    # Once it is trained, another does.
    broken["Pfeiffer"] = replace(METHODS["Pfeiffer"], save=fail)
    monkeypatch.setattr(demo_methods, "METHODS", broken)
    monkeypatch.setattr(demo_methods, "choose_dtype", lambda *args: "fp32")
    monkeypatch.setattr(demo_methods, "draw_saved", lambda *args: None)
    options = {"model": tiny_model, "output": tmp_path, "steps": 2, "batch": 2, "length": 8, "minutes": 0.2}
    with pytest.raises(SystemExit) as end:
        demo_methods.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    assert end.value.code == "failed: LoRA, Pfeiffer"  # which exits with 1
    assert "LoRA failed: RuntimeError: no such thing\n" in capsys.readouterr().out
    written = {method["name"]: method for method in json.loads((tmp_path / "demo_methods.json").read_text())["methods"]}
    assert written["LoRA"]["error"] == written["Pfeiffer"]["error"] == "RuntimeError: no such thing"
    assert not written["BitFit"]["error"] and math.isfinite(written["BitFit"]["loss"])


@pytest.mark.slow
def test_demo_from_start_to_end(tiny_model, tmp_path):
    command = [sys.executable, "-m", "benchmarks", "demo_methods", "--quick", "--model", str(tiny_model)]
    options = ["--output", str(tmp_path), "--length", "16", "--steps", "2"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^LoRA +\d/\d  loss \d", result.stdout, re.MULTILINE)  # though it is no terminal
    written = json.loads((tmp_path / "demo_methods.json").read_text())
    assert [method["name"] for method in written["methods"]] == list(METHODS)
    for method in written["methods"]:
        values = [method[key] for key in ("loss", "lr", "seconds", "memory_mb", "file_mb", "share")]
        assert not method["error"] and all(math.isfinite(value) and value > 0 for value in values)
        assert [*(tmp_path / "methods" / method["name"]).glob("*.safetensors")]
    assert (tmp_path / "demo_methods.png").stat().st_size > 10_000 and (tmp_path / "demo_methods.csv").is_file()
