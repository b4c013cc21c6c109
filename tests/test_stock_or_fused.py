"""The benchmark of what `optimize` chooses, on tiny layers; no timings."""

import pytest
import torch

from benchmarks import stock_or_fused
from benchmarks.stock_or_fused import FUSED, KINDS, STOCK, Case, Problem
from peft_kernels import cpu
from peft_kernels.integrations import measuring


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.delenv("PEFT_KERNELS_TUNE")
    monkeypatch.setattr(measuring, "ROWS", (1,))
    monkeypatch.setattr(measuring, "_SLICE", 0)
    stock_or_fused.accelerated.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind):
    problem = Problem(Case(kind, "fp32", 64, 4))
    isa = cpu.isa()
    for name in (FUSED, STOCK):
        contender = problem.contender(name, isa if name == FUSED else "")
        assert contender.run().keys() == {"inference", "training"}
    layer = stock_or_fused.accelerated(kind, torch.float32, 64, isa)
    assert any(hasattr(part, "stock") for part in layer.modules()) and problem.check([isa]) == {isa: None}
    assert [str(target) for target in problem.targets(isa)] == ["≥ 0.97× stock"] * 2
