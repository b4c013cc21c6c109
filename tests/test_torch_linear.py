"""torch.nn.Linear in fp32 where the kernels outrun torch's library; as if they did everywhere."""

import copy
import pickle

import pytest
import tolerances
import torch
from comparison import assert_close
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_kernels
from peft_kernels.integrations.torch.linear import FusedDense

ROWS, FEATURES = 96, 512  # with as many outputs, enough for the kernels


@pytest.fixture(autouse=True)
def outruns(monkeypatch):
    monkeypatch.setattr("peft_kernels.cpu.outruns_torch", lambda: True)


@pytest.fixture
def calls(monkeypatch):
    """Counts what goes to the kernels."""
    made, function = [], peft_kernels.integrations.base_layer.lora_linear_unchecked

    def counted(*arguments):
        made.append(arguments)
        return function(*arguments)

    monkeypatch.setattr("peft_kernels.integrations.base_layer.lora_linear_unchecked", counted)
    return made


def make(bias=True):
    return nn.Sequential(nn.Linear(FEATURES, FEATURES, bias=bias))


def step(model, x):
    """y and every gradient, by name."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", ["linear", "no-bias", "conv1d"])
def test_as_stock(kind, frozen, calls):
    conv1d = kind == "conv1d"
    model = nn.Sequential(Conv1D(FEATURES + 64, FEATURES)) if conv1d else make(bias=kind == "linear")
    x = torch.randn(2, ROWS // 2, FEATURES) if conv1d else torch.randn(ROWS, FEATURES)
    model.requires_grad_(not frozen)
    wanted = step(copy.deepcopy(model).double(), x.double())
    (row,) = peft_kernels.optimize(model)
    assert (row.kind, row.fused) == ("transformers.Conv1D" if conv1d else "torch.Linear", True)
    for name, value in step(model, x).items():
        assert_close(value, wanted[name], tolerances.FP32_SUM, name)
    assert len(calls) == 1


@pytest.mark.parametrize("layer", [nn.Linear(FEATURES, FEATURES), Conv1D(FEATURES, FEATURES)], ids=["linear", "conv1d"])
def test_restore_copy_and_pickle(layer):
    model, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(ROWS, FEATURES)
    peft_kernels.optimize(model)
    wanted = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other[0], FusedDense) and torch.equal(other(x), wanted)
    assert sorted(model.state_dict()) == ["0.bias", "0.weight"]
    peft_kernels.restore(model)
    assert type(model[0]) is type(layer)


def test_compiles_into_one_graph(calls):
    model, x = make(), torch.randn(ROWS, FEATURES)
    peft_kernels.optimize(model)
    wanted = step(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name, value in step(compiled, x).items():
        assert_close(value, wanted[name.removeprefix("_orig_mod.")].double(), tolerances.FP32_SUM, name)


def test_weight_that_the_backward_does_not_read_may_change():
    model, x = make(), torch.randn(ROWS, FEATURES)
    peft_kernels.optimize(model)
    y = model(x).sum()
    with torch.no_grad():
        model[0].weight.add_(1)
    y.backward()
    assert_close(model[0].weight.grad, x.double().sum(0).expand(FEATURES, -1), tolerances.FP32_SUM)


def test_bias_that_is_not_dense():
    model, x = make(), torch.randn(ROWS, FEATURES)
    model[0].bias = nn.Parameter(torch.randn(2 * FEATURES)[::2])
    wanted = model(x)
    peft_kernels.optimize(model)
    assert_close(model(x), wanted.double(), tolerances.FP32_SUM)


def test_report_after_a_change():
    model = make()
    peft_kernels.optimize(model)
    (row,) = peft_kernels.optimize(model.to(torch.bfloat16))
    assert (row.fused, row.reason) == (False, "its weight is torch.bfloat16")


def test_other_inputs_are_torchs(calls):
    model = make()
    peft_kernels.optimize(model)
    model(torch.randn(20, FEATURES))  # a small product
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(ROWS, FEATURES)).dtype is torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(ROWS, FEATURES, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(ROWS, FEATURES - 1))
    assert not calls


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(512, 16), "it has fewer than 128 features"),
        (nn.Linear(512, 512, dtype=torch.bfloat16), "its weight is torch.bfloat16"),
        (nn.Linear(512, 512, device="meta"), "it is for the CPU"),
    ],
    ids=["small", "bf16", "meta"],
)
def test_others_are_left_alone(layer, reason):
    (row,) = peft_kernels.optimize(nn.Sequential(layer))
    assert (row.fused, row.reason, type(layer)) == (False, reason, nn.Linear)


def test_where_torch_is_as_fast(monkeypatch):
    monkeypatch.setattr("peft_kernels.cpu.outruns_torch", lambda: False)
    (row,) = peft_kernels.optimize(make())
    assert (row.fused, row.reason) == (False, "torch's product is as fast on this processor")


def test_under_adapters(calls):
    """A base layer and large adapters are of the fused class; the adapted layer is one operation all the same."""
    model = get_peft_model(make(), LoraConfig(r=128, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(ROWS, FEATURES)
    wanted = step(model, x)
    report = peft_kernels.optimize(model)
    assert all(layer.fused for layer in report)
    assert "2 fused" not in str(report) and "torch.Linear" not in str(report)  # parts of the adapted layer
    for name, value in step(model, x).items():
        assert_close(value, wanted[name].double(), 2 * tolerances.FP32_SUM, name)
    assert not calls
    with model.disable_adapter():
        assert torch.allclose(model(x), model.get_base_model()[0].base_layer(x), atol=1e-5)
