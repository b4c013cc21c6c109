"""torch.nn.Dropout, fused: when it is, what a model computes with it, and the ways back."""

import copy
import pickle

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import IN_FEATURES, fused_model, layer_of, lora_model
from tiny_models import assert_same, step, tiny, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels.integrations import registry
from peft_kernels.integrations.torch.dropout import Dropout
from peft_kernels.ops import dropout
from peft_kernels.testing.reference.dropout import dropout as oracle


def fused(p=0.5, **arguments):
    model = nn.Sequential(nn.Dropout(p, **arguments)).train()
    peft_kernels.optimize(model)
    return model


class OracleDropout(nn.Dropout):
    """The same masks, from the same draws."""

    def forward(self, x):
        if not self.training:
            return x
        return oracle(x, self.p, torch.randint(torch.iinfo(torch.int64).max, (1,)), dtype=x.dtype)


def test_is_the_op_in_training_only():
    model, x = fused(0.3), torch.randn(4, 100)
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    assert torch.equal(y, dropout(x, 0.3))
    state = torch.get_rng_state()
    assert model.eval()(x) is x and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("arguments", [{"p": 0.0}, {"p": 1.0}, {"p": 0.5, "inplace": True}], ids=str)
def test_layers_that_are_passed_over(arguments):
    model = nn.Sequential(nn.Dropout(**arguments))
    assert len(peft_kernels.optimize(model)) == 0 and type(model[0]) is nn.Dropout


@pytest.mark.parametrize("p", [np.float32(0.25), torch.tensor(0.25)], ids=["numpy", "tensor"])
def test_other_kinds_of_numbers(p):
    model = nn.Sequential(nn.Dropout(p))
    assert all(layer.fused for layer in peft_kernels.optimize(model))
    y = model(torch.ones(1000))
    assert set(y.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}


def test_settings_that_change_later(caplog):
    model, x = fused(0.5), torch.randn(4, 100)
    model[0].p = 0.0
    assert model(x) is x
    model[0].p = 1.0
    assert not model(x).any()
    model[0].p, model[0].inplace = 0.5, True
    assert model(x) is x and (x == 0).any()
    assert not caplog.records


def test_inputs_for_the_stock_path(caplog):
    registry._logged.clear()
    model, x = fused(), torch.randn(20, 30)
    assert model(x.double()).dtype is torch.float64
    assert model(x.T).stride() == (1, 30)
    assert torch.func.vmap(model, randomness="different")(x).shape == x.shape
    reasons = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert reasons == ["x is torch.float64", "x is not contiguous", "a transform of torch.func is under way"]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_step_of_a_model(name):
    config = {"hidden_dropout_prob": 0.1} if name == "bert" else {"resid_pdrop": 0.1, "embd_pdrop": 0.1}
    model = tiny(name, **config)
    targets = ["query", "dense"] if name == "bert" else ["c_attn", "c_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, target_modules=targets))
    ids, padding = tokens()
    wanted = copy.deepcopy(model)
    for module in wanted.modules():
        if type(module) is nn.Dropout:
            module.__class__ = OracleDropout
    rows = [row for row in peft_kernels.optimize(model) if row.kind == "torch.Dropout"]
    assert len(rows) == (6 if name == "bert" else 5) and all(row.fused for row in rows)
    results = []
    for either in (model, wanted):
        torch.manual_seed(4)
        results.append(step(either, ids, padding))
    assert_same(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_repeat_the_mask(use_reentrant):
    model, x = fused(0.3), torch.randn(50, 64)
    results = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for direct, recomputed in zip(*results, strict=True):
        assert torch.equal(direct, recomputed)


def test_compile():
    model, x = fused(0.3), torch.randn(50, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    y.sum().backward()
    assert torch.equal(leaf.grad != 0, y != 0) and 0.2 < (y == 0).double().mean() < 0.4
    assert torch.equal(compiled.eval()(x), x)


def test_copies_pickles_and_the_way_back():
    model = fused(0.3)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied[0]) is Dropout and copied[0].p == 0.3
    assert repr(model[0]) == repr(nn.Dropout(0.3)) and isinstance(model[0], nn.Dropout)
    peft_kernels.restore(model)
    assert type(model[0]) is nn.Dropout


def test_dropouts_of_fused_adapters_are_not_printed():
    model = fused_model("dense", lora_dropout=0.1)
    report = peft_kernels.optimize(model)
    assert [row.name for row in report] == [
        "base_model.model.lin", "base_model.model.lin.lora_dropout.default",
    ]  # fmt: skip
    assert "lora_dropout" not in str(report) and "layers: 1 fused, 0 left alone" in str(report)


def test_dropouts_of_other_adapters_are_used():
    model = lora_model("dense", lora_dropout=0.1)
    layer_of(model).lora_A["default"].register_forward_hook(lambda *_: None)  # which PEFT's forward calls
    report = peft_kernels.optimize(model)
    assert "lora_dropout" in str(report) and "layers: 1 fused, 1 left alone" in str(report)
    called = []
    layer_of(model).lora_dropout["default"].register_forward_hook(lambda *_: called.append(1))
    model(torch.randn(3, IN_FEATURES)).sum().backward()
    assert called == [1]
