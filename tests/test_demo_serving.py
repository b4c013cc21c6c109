"""`make demo-serving`: its parts, and the whole of it on a tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from examples import demo_serving
from examples.demo_serving import ALONE, CONTENDERS, POOL, Result, Settings

ROOT = Path(__file__).parent.parent


def make_settings(**given):
    return Settings(**{
        "model": Path("model"), "folder": "", "adapters": 5, "slots": 2, "requests": 400, "clients": 3, "threads": 2,
        "batch": 2, "length": 4, "tokens": 3, "seed": 0,
    } | given)  # fmt: skip


@pytest.mark.parametrize(("option", "wanted"), [("--adapters", "at least 1"), ("--length", "at least 2")])
def test_bad_option(option, wanted, capsys):
    with pytest.raises(SystemExit):
        demo_serving.main([option, "0"])
    assert f"argument {option}: got '0', wanted a whole number of {wanted}" in capsys.readouterr().err


def test_popularity():
    requests = demo_serving.make_requests(torch.arange(100), make_settings())
    counts = torch.tensor([adapter for adapter, _ in requests]).bincount(minlength=5)
    assert counts.sum() == 400 and counts[0] > 1.5 * counts[1] > counts[4] > 0
    assert len({tuple(prompt.tolist()) for _, prompt in requests}) == demo_serving.PROMPTS
    again = demo_serving.make_requests(torch.arange(100), make_settings())
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(requests, again, strict=True))


def test_every_client_gets_its_answer():
    sizes = []

    def answer(adapters, prompts):
        sizes.append(len(adapters))
        return prompts + torch.tensor(adapters)[:, None]

    requests = [(number % 7, torch.tensor([number, 0])) for number in range(50)]
    answers, latencies, _ = demo_serving.serve(answer, requests, clients=9, workers=2, batch=4, seconds=60)
    assert answers == {number: [number + number % 7, number % 7] for number in range(50)}
    assert len(latencies) == 50 and sum(sizes) == 50 and max(sizes) <= 4


def test_an_error_reaches_the_client_alone(monkeypatch):
    raised = []
    monkeypatch.setattr(demo_serving.threading, "excepthook", lambda args: raised.append(args.exc_value))

    def answer(adapters, prompts):
        if adapters == [3]:
            raise ValueError("three")
        return prompts

    requests = [(number, torch.tensor([number])) for number in range(6)]
    answers, *_ = demo_serving.serve(answer, requests, clients=2, workers=1, batch=1, seconds=60)
    assert sorted(answers) == [0, 1, 2, 4, 5] and str(raised[0]) == "three"


def test_results(tmp_path):
    result = Result({0: [1]}, [0.1, 0.2, 0.3, 5.0], 2.0, 3.0, 4_000_000, 1_000_000)
    assert (result.rate, result.percentile(0.5), result.percentile(0.99)) == (2.0, 0.3, 5.0)
    console = Console(width=160)
    with console.capture() as capture:
        console.print(demo_serving.result_table(dict.fromkeys(CONTENDERS, result), make_settings()))
    text = capture.get()
    assert "memory × 5" in text and "20 MB" in text and "4 MB" in text
    rows = [{"name": name, "rate": 2.0, "p50": 0.1, "p99": 0.2, "memory_mb": 3.0} for name in CONTENDERS]
    demo_serving.draw_saved({"machine": "a machine", "versions": "", "served": rows}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_demo_from_start_to_end(tiny_model, tmp_path):
    command = [sys.executable, "-m", "benchmarks", "demo_serving", "--quick", "--model", str(tiny_model)]
    result = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"\d+ answers of the pool compared with their adapter's alone, \d+ of them with stock", result.stdout
    )
    written = json.loads((tmp_path / "demo_serving.json").read_text())
    assert [row["name"] for row in written["served"]] == list(CONTENDERS)
    assert all(row["rate"] > 0 and row["p99"] >= row["p50"] > 0 for row in written["served"])
    assert {row["name"]: row["requests"] for row in written["served"]}[POOL] > 0 and ALONE in result.stdout
    assert (tmp_path / "demo_serving.png").stat().st_size > 10_000


@pytest.mark.slow
def test_benchmark_from_start_to_end(tiny_model):
    command = [sys.executable, "-m", "benchmarks", "serving", "--quick", "--model", str(tiny_model)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for line in (
        "pool.swap of a checkpoint in host memory",
        "PEFT's load_adapter from a folder",
        "8 rows with 8 adapters, pool",
    ):
        assert re.search(rf"{re.escape(line)} +│ +\d", result.stdout), line
