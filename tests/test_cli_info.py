"""`peft-kernels info`: what a report of a fault needs."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch

import peft_kernels
from peft_kernels import choices, cpu, cuda
from peft_kernels._extension import build_info
from peft_kernels.cli import main


@pytest.fixture
def info(capsys):
    def run():
        assert main(["info", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_versions_and_variables(info, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "0")
    found = info()
    assert found["build"]["peft_kernels"] == peft_kernels.__version__
    assert found["build"]["ops_version"] == str(build_info["ops_version"])
    assert found["packages"]["torch"] == torch.__version__ and found["packages"]["peft"] == peft.__version__
    assert found["environment"]["PEFT_KERNELS_PRINT_PLANS"] == "0" and "HOME" not in found["environment"]


def test_architectures(info, monkeypatch):
    monkeypatch.setitem(build_info, "cuda_architectures", "80-real 120")
    assert info()["build"]["cuda_kernels_for"] == ["sm_80", "sm_120 and later"]
    monkeypatch.delitem(build_info, "cuda_architectures")
    assert info()["build"]["cuda_kernels_for"] == []


def test_kernels(info):
    found = info()
    kernels = {row["family"]: row for row in found["kernels"]}
    assert {"lora_linear", "lora_linear_grouped", "nf4", "attention", "experts"} <= kernels.keys()
    assert all(row["cpu"] for row in kernels.values()) and not kernels["decoder_layer"]["cuda"]
    assert kernels["lora_linear"]["cuda"] is build_info["cuda"]
    device = found["devices"][0]
    assert device["device"] == "cpu" and device["fused"] and device["what"].startswith(f"kernels for {cpu.isa()};")


@pytest.mark.parametrize("reason", [None, "no fused kernel for sm_75, which is older than sm_80"])
def test_card(info, monkeypatch, reason):
    card = SimpleNamespace(name="Card", major=7, minor=5, total_memory=16 << 30)
    monkeypatch.setitem(build_info, "cuda", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr("peft_kernels.cli.info._cuda_versions", lambda: [12080, 13000])
    monkeypatch.setattr(choices, "_software", lambda device_type: "driver 12080")
    monkeypatch.setattr(cuda, "why_not", lambda device: reason)
    found = info()
    said = found["devices"][1]
    assert said["device"] == "cuda:0" and said["fused"] is (reason is None)
    assert said["what"].startswith("Card, sm_75, 16.0 GiB; driver for CUDA 12.8, built with 13.0")
    assert reason is None or said["what"].endswith(reason)
    assert found["tuning"]["operations_on_cuda:0"] == 0


def test_tuning(info, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "tuned.json"))
    assert not info()["tuning"]["exists"]
    entry = {"inference": {"rows": [1], "stock": [1.0], "fused": [0.5]}}
    choices.save(choices.machine_of(torch.device("cpu")), {"a": entry, "b": entry})
    choices.save("another", {"a": entry})
    found = info()["tuning"]
    assert found["exists"] and found["operations_on_cpu"] == 2 and found["other_machines"] == 1


def test_a_file_of_something_else_is_no_reason_to_stop(info, monkeypatch, tmp_path):
    (tmp_path / "tuned.json").write_text("[]")
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "tuned.json"))
    with pytest.warns(UserWarning, match="got no times of operations"):
        assert info()["tuning"]["operations_on_cpu"] == 0
