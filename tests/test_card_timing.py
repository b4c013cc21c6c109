"""The contenders that a card's layers are timed with, and shares of what it can do."""

from types import SimpleNamespace

import pytest
import torch
from card_runs import context_of

from benchmarks.card import machine, steps, timing
from benchmarks.records import FUSED


@pytest.mark.parametrize("phase", [timing.FORWARD, timing.BOTH])
def test_contenders_compute_the_same(phase):
    weights = timing.Weights(48, 128, 2, "cpu")
    x = torch.randn(5, 128).bfloat16().requires_grad_(phase == timing.BOTH)
    results = {}
    for name in timing.CONTENDERS:
        if "bitsandbytes" in name and not machine.has("bitsandbytes"):
            continue
        layers = weights.layers(name)
        assert len(layers) == 2
        y = layers[0](x)
        grads = ()
        if phase == timing.BOTH:
            leaves = (x, weights.A, weights.B)
            grads = [g for g in torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True) if g is not None]
        results[name] = [y.detach(), *grads]
    for name, found in results.items():
        wanted = results[timing.FUSED_LORA if len(found) == 4 or "LoRA" in name else FUSED]
        for got, want in zip(found, wanted, strict=True):
            assert (got - want).norm() <= 0.02 * want.norm(), name


def test_shares_are_of_what_was_measured():
    context, _ = context_of()
    context.records = [
        {"kind": "ceiling", "name": name, "status": "ok", "value": value}
        for name, value in (("copy", 10.0), ("bf16 product", 100.0))
    ]
    found = timing.timed(context, [4.0, 2.0, 8.0], "", size=20.0, flops=100.0)
    assert found["median"] == 4.0 and found["quartile1"] == 3.0 and found["share_of_ceiling"] == 0.5
    assert timing.timed(context, [4.0], "", size=20.0, flops=400.0)["share_of_ceiling"] == 1.0
    assert "share_of_ceiling" not in timing.timed(context_of()[0], [4.0], "", size=20.0)


def test_weights_are_more_than_the_cache_holds_twice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=50 << 20))
    for n, k in steps.SHAPES:
        count, size = timing.count_of(n * k / 2), n * k / 2
        assert count >= 8 and count * size > 2 * (50 << 20)
