"""The model that is measured on a card."""

import pytest
import torch
from card_runs import context_of

from benchmarks.card import model


def test_a_model_without_bitsandbytes_computes_the_same(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(model, "has", lambda package: False)
    made = model.make_model(model.TINY, "cpu")
    ids = torch.randint(model.TINY["vocab_size"], (2, 7))
    with torch.no_grad():
        wanted = made(input_ids=ids).logits
        text = model.optimize(made)
        got = made(input_ids=ids).logits
    assert not any(isinstance(module, model.Stock) for module in made.modules()) and text
    assert 0 < (got - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_model_that_computes_otherwise_is_found(is_wrong, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(model, "has", lambda package: False)
    monkeypatch.setattr(model, "need", lambda package: None)
    if is_wrong:
        monkeypatch.setattr(model.Stock, "forward", lambda self, x: 1.5 * self.fused(x))
    context, sent = context_of()
    model.measure(context)
    found = {record["name"]: record for record in sent if "name" in record}
    assert found["same logits"]["status"] == ("failed" if is_wrong else "ok")
    assert {record["status"] for name, record in found.items() if "status" in record} <= {"ok", "failed"}
    assert found["training step, accelerated"]["attention"] and found["decoding, stock"]["table"]
