"""The benchmarks of whole models, on tiny ones; no timings."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from benchmark_cases import shout
from torch import nn

from benchmarks import architectures, model, profiling
from benchmarks.lora_layers import STOCK
from benchmarks.lora_linear import DENSE_LORA
from benchmarks.records import FUSED
from peft_kernels import cpu


@pytest.mark.parametrize("method", ["dora", "ia3", "prefix"])
def test_model_with_other_methods(tiny_model, method):
    case = model.Case("train", 1, 8, method=method)
    found, _ = model.run(case, tiny_model, [STOCK], [cpu.isa()], 0.0, shout, least=1)
    assert [r.contender for r in found] == [FUSED, STOCK] and str(case) == f"train 1x8 {method}"


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_architectures(monkeypatch, name):
    small = {
        "bert": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
        "t5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4},
    }
    architecture = architectures.ARCHITECTURES[name]
    monkeypatch.setitem(
        architectures.ARCHITECTURES, name, (*architecture[:2], architecture[2] | small[name], architecture[3])
    )
    case = architectures.Case(name, "fp32", 2, 8)
    found = architectures.run(case, ["stock"], [cpu.isa()], 0.0, shout)
    assert [r.contender for r in found] == [FUSED, STOCK] and all(r.saved > 0 and r.tokens == 16 for r in found)
    assert found[0].error < 1e-5 and found[1].error is None


def test_architectures_find_a_difference(monkeypatch):
    def worse(model, **options):
        for parameter in model.parameters():
            parameter.data.mul_(1.01)

    monkeypatch.setattr(architectures.peft_kernels, "optimize", worse)
    monkeypatch.setattr(architectures, "LEAST_TOKENS", 1)
    with pytest.raises(ArithmeticError, match=r"vit fp32 1, .*: got an error of"):
        architectures.run(architectures.Case("vit", "fp32", 1), [], [cpu.isa()], 0.0, shout)


@pytest.mark.parametrize("phase", ["train", "prefill", "decode"])
def test_model(tiny_model, phase):
    case = model.Case(phase, 1, 8)
    found, profiles = model.run(case, tiny_model, [STOCK, DENSE_LORA], [cpu.isa()], 0.0, shout, rank=2, least=1)
    assert [r.contender for r in found] == [FUSED, STOCK, DENSE_LORA] and all(r.tokens == 8 for r in found)
    assert all((r.saved is not None) == (phase == "train") for r in found)
    for name, seconds in profiles.items():
        assert set(seconds) == set(profiling.GROUPS)
        spent = {group for group, value in seconds.items() if value > 0}
        whole = name == FUSED and phase != "train"  # layers
        missing = {profiling.LINEAR, profiling.MLP} if whole else {profiling.LAYER}
        assert spent >= set(profiling.GROUPS) - {profiling.OPTIMIZER} - missing
        assert (profiling.OPTIMIZER in spent) == (phase == "train")
        assert (profiling.LAYER in spent) == whole


def test_breakdown_counts_a_backward_where_its_forward_was():
    def event(name, start, self_time, parent=None, sequence=-1):
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start), self_cpu_time_total=self_time * 1e6, cpu_parent=parent,
            sequence_nr=sequence,
        )  # fmt: skip

    root = event(profiling.REST, 0, 1)
    layer = event(profiling.LINEAR, 1, 2, root)
    forward = event("aten::mm", 3, 4, layer, sequence=7)
    looks_up = event("aten::detach", 2, 8, root, sequence=7)  # sees the number that mm will take
    backward = event("autograd::engine::evaluate_function: MmBackward0", 5, 16, root, sequence=7)
    inner = event("MmBackward0", 6, 32, backward, sequence=7)
    outside = event("aten::mm", 9, 64)
    seconds = profiling.by_group([inner, backward, forward, looks_up, layer, root, outside])
    assert {group: value for group, value in seconds.items() if value} == {
        profiling.PYTHON: 3,
        profiling.LINEAR: 4 + 16 + 32,
        profiling.REST: 8,
    }


def test_breakdown_leaves_the_model_as_it_was():
    base = nn.Module()
    base.norm, base.lm_head = nn.LayerNorm(4), nn.Linear(4, 4)
    base.get_output_embeddings = lambda: base.lm_head
    base.loss_function = loss = torch.nn.functional.mse_loss
    peft_model = SimpleNamespace(get_base_model=lambda: base)
    x = torch.ones(2, 4)
    seconds = profiling.breakdown(peft_model, lambda: base.loss_function(base.lm_head(base.norm(x)), x).backward())
    assert seconds[profiling.NORM] > 0 and seconds[profiling.HEAD] > 0 and seconds[profiling.ATTENTION] == 0
    assert base.loss_function is loss
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_breakdown_table_and_file(tmp_path):
    profiles = {FUSED: dict.fromkeys(profiling.GROUPS, 0.0) | {profiling.LINEAR: 3.0, profiling.HEAD: 1.0}}
    table = model.breakdown_table(model.CASES[0], profiles)
    assert table.row_count == 2
    model.write_breakdowns({"train": profiles}, tmp_path / "b.csv")
    rows = list(csv.DictReader((tmp_path / "b.csv").open()))
    assert math.isclose(sum(float(row["share"]) for row in rows), 1)
    assert rows[0] == {"case": "train", "contender": FUSED, "group": profiling.LINEAR, "ms": "3000", "share": "0.7500"}
