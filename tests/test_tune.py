"""The command that times layers of given shapes."""

import importlib.util

import pytest
import torch

from peft_kernels import choices, tune
from peft_kernels.integrations import measuring


@pytest.fixture(autouse=True)
def tuning(tmp_path, monkeypatch):
    monkeypatch.delenv("PEFT_KERNELS_TUNE")
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "tuned.json"))
    monkeypatch.setattr(choices, "_decided", {})
    monkeypatch.setattr(measuring, "ROWS", (1, 8))
    monkeypatch.setattr(measuring, "_SLICE", 0)


@pytest.mark.parametrize(("rank", "operations"), [(0, 2), (4, 4)])
def test_layers(capsys, rank, operations):
    tune.main(
        ["--shape", "64", "128", "--shape", "96", "64", "--rank", str(rank), "--device", "cpu", "--dtype", "fp32"]
    )
    (entries,) = choices.load().values()
    assert len(entries) == operations and {tuple(entry["weight"]) for entry in entries.values()} == {
        (64, 128),
        (96, 64),
    }
    out = capsys.readouterr().out
    assert f"{'peft' if rank else 'bitsandbytes'}.Linear4bit" in out and "×" in out and "tuned.json" in out


@pytest.mark.parametrize("missing", ["bitsandbytes", "peft"])
def test_products_alone(monkeypatch, capsys, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    tune.main(["--shape", "64", "128", "--device", "cpu"])
    (entries,) = choices.load().values()
    (entry,) = entries.values()
    assert entry["weight"] == [64, 128] and entry["inference"]["rows"] == [1, 8]
    assert f"without {missing}: the products alone" in capsys.readouterr().out


def test_device_that_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no CUDA device"):
        tune.main(["--device", "cuda"])


@pytest.mark.parametrize(
    "arguments",
    [["--shape", "0", "8"], ["--rank", "-1"], ["--seconds", "0"], ["--seconds", "nan"], ["--dtype", "int8"]],
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert f"argument {arguments[0]}: " in capsys.readouterr().err


def test_leaves_out_a_card_without_kernels(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(tune, "why_not", lambda device: "an old driver")
    tune.main(["--device", "cuda"])
    assert "cuda:0: an old driver" in capsys.readouterr().out
