"""`peft-kernels bench` and `tune`, which hand over to what times layers."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from peft_kernels import choices
from peft_kernels.cli import bench, main
from peft_kernels.integrations import measuring

SMALL = ["--shape", "64", "128", "--rows", "4", "--seconds", "0.01"]


def test_a_layer(capsys):
    assert main(["bench", *SMALL, "--dtype", "fp32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["contender"]: row for row in found["forward_and_backward"]}
    assert rows.keys() == {"stock", "fused"} and rows["stock"]["speedup"] == 1 and rows["fused"]["milliseconds"] > 0
    assert found["rounds"] >= 3 and found["difference_of_results"] < 1e-5
    assert found["layer"] == "NF4 weight of 64×128, LoRA of rank 16, 4 rows in fp32"
    assert main(["bench", *SMALL]) == 0
    assert "built-in comparison" in capsys.readouterr().out


@pytest.mark.parametrize("status", [0, 3])
def test_of_the_repository(monkeypatch, capsys, status):
    called = []

    def run(command, **options):
        called.append((command, options))
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["bench", "--json", "nf4", "--quick", "--json"]) == (1 if status else 0)
    out, err = capsys.readouterr()
    ((command, options),) = called
    assert command == [sys.executable, "-m", "benchmarks", "nf4", "--quick", "--json"] and options["cwd"] == bench._ROOT
    assert ("ended with the status 3" in err) if status else (json.loads(out)["ran"].endswith("nf4 --quick --json"))


def test_without_the_repository(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "_ROOT", tmp_path)
    assert main(["bench", "nf4"]) == 1
    assert "benchmarks are in the repository, and this package is installed" in capsys.readouterr().err


def test_tune(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("PEFT_KERNELS_TUNE")
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "tuned.json"))
    monkeypatch.setattr(choices, "_decided", {})
    monkeypatch.setattr(measuring, "ROWS", (1, 8))
    monkeypatch.setattr(measuring, "_SLICE", 0)
    options = ["--shape", "64", "128", "--rank", "4", "--device", "cpu", "--dtype", "fp32", "--json"]
    assert main(["tune", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept_in"] == str(tmp_path / "tuned.json") and (tmp_path / "tuned.json").is_file()
    assert any(row["kind"] == "peft.Linear4bit" and "×" in row["forward"] for row in found["layers"])


def test_tune_on_a_device_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune", "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "peft-kernels tune: device: got cuda, but torch finds no CUDA device\n"


@pytest.mark.parametrize(
    "arguments",
    [["bench", "--rows", "0"], ["bench", "--seconds", "x"], ["tune", "--rank", "-1"], ["tune", "--shape", "0", "1"]],
)
def test_options_that_are_not_understood(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2 and f"argument {arguments[1]}: " in capsys.readouterr().err
