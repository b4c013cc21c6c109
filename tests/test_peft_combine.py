"""`add_weighted_adapter` of accelerated models: PEFT's numbers, by the kernels."""

import copy

import pytest
import torch
from comparison import error
from optional import if_installed
from peft_models import OneLayer, base_layer
from torch import nn

import peft_kernels

peft = if_installed("peft")

KINDS = ("dense", "conv1d", "4bit")
NAMES, WEIGHTS = ["first", "second", "third"], [0.5, -0.25, 1.5]
ON_MATRICES = ("linear", "ties", "magnitude_prune")
ON_PRODUCTS = ("svd", "ties_svd", "magnitude_prune_svd")
RANDOM = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")


def model_of(kind="dense", dtype=torch.float32, base=None, ranks=(4, 4, 4), **config):
    torch.manual_seed(0)
    model = OneLayer(base_layer(kind, dtype)) if base is None else base
    for name, rank in zip(NAMES, ranks, strict=True):
        own = peft.LoraConfig(r=rank, lora_alpha=8, init_lora_weights=False, fan_in_fan_out=kind == "conv1d",
                              **({"target_modules": ["lin"]} | config))  # fmt: skip
        if name == NAMES[0]:
            model = peft.get_peft_model(model, own, adapter_name=name)
        else:
            model.add_adapter(name, own)
    return model


def both(*args, **kwargs):
    stock, fused = model_of(*args, **kwargs), model_of(*args, **kwargs)
    peft_kernels.optimize(fused)
    return stock, fused


def combine(model, combination_type, **options):
    options = {"density": 0.4} | options
    model.add_weighted_adapter(NAMES, WEIGHTS, "all", combination_type=combination_type, **options)
    return model


def matrices(model, name="all"):
    layer = model.base_model.model.lin
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def product(model):
    a, b = matrices(model)
    return b.double() @ a.double()


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("combination_type", ON_MATRICES)
@pytest.mark.parametrize("kind", KINDS)
def test_matrices(kind, combination_type, majority_sign):
    stock, fused = (combine(model, combination_type, majority_sign_method=majority_sign) for model in both(kind))
    for got, want in zip(matrices(fused), matrices(stock), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clamp", [None, 0.9])
@pytest.mark.parametrize("combination_type", ON_PRODUCTS)
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind, combination_type, clamp):
    stock, fused = (combine(model, combination_type, svd_clamp=clamp) for model in both(kind, ranks=(2, 3, 4)))
    if clamp is None:
        assert error(product(fused), product(stock)) < 1e-5
    else:  # singular vectors have signs that nothing decides, and what is clamped depends on them
        most = [max(float(matrix.max()) for matrix in matrices(model)) for model in (fused, stock)]
        assert abs(most[0] - most[1]) < 0.5 * most[1]
    assert [matrix.shape for matrix in matrices(fused)] == [matrix.shape for matrix in matrices(stock)]


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_sum_of_low_ranks_is_decomposed_exactly(rank):
    """Also where more singular values are asked for than the sum of the ranks."""
    stock, fused = (combine(model, "svd", svd_rank=rank) for model in both(ranks=(2, 3, 4)))
    assert error(product(fused), product(stock)) < 1e-5


@pytest.mark.parametrize("combination_type", RANDOM)
def test_random_pruning_repeats_with_torchs_seed(combination_type):
    """Its masks are not PEFT's, so that only their number can be compared."""
    results = []
    for seed in (1, 1, 2):
        _, fused = both()
        torch.manual_seed(seed)
        results.append(product(combine(fused, combination_type)))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert results[0].isfinite().all() and results[0].any()


def test_half_precision_is_nearer_to_the_formula_than_stock():
    stock, fused = both(dtype=torch.bfloat16)
    exact = model_of(dtype=torch.bfloat16).double()
    for model in (stock, fused, exact):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float64 if model is exact else torch.bfloat16)
        combine(model, "linear")
    for got, stocks, want in zip(*map(matrices, (fused, stock, exact)), strict=True):
        assert got.dtype is torch.bfloat16
        assert error(got, want) <= error(stocks, want)


def test_layers_that_adapters_lack():
    """A layer has what those adapters give it that are on it."""

    def make():
        torch.manual_seed(0)
        model = nn.ModuleDict({"lin": nn.Linear(64, 96), "other": nn.Linear(64, 96)})
        model = model_of(base=model, target_modules=["lin", "other"])
        del model.base_model.model.other.lora_A["second"], model.base_model.model.other.lora_B["second"]
        return model

    stock, fused = make(), make()
    peft_kernels.optimize(fused)
    for model in (stock, fused):
        combine(model, "ties")
    for key, want in stock.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("combination_type", [*ON_MATRICES, *ON_PRODUCTS, "cat"])
def test_embeddings_and_convolutions_are_pefts(combination_type):
    def make():
        torch.manual_seed(0)
        model = nn.ModuleDict({"lin": nn.Linear(64, 96), "emb": nn.Embedding(30, 24), "conv": nn.Conv2d(3, 5, 3)})
        model = model_of(base=model, target_modules=["lin", "emb", "conv"])
        for layer in model.modules():  # an embedding begins with zeros
            for parameter in getattr(layer, "lora_embedding_A", {}).values():
                nn.init.normal_(parameter)
        return model

    stock, fused = make(), make()
    peft_kernels.optimize(fused)
    for model in (stock, fused):
        combine(model, combination_type)
    for key, want in stock.state_dict().items():
        if "lin." not in key or combination_type in ON_MATRICES:
            torch.testing.assert_close(fused.state_dict()[key], want, rtol=1e-5, atol=1e-7)


def test_nothing_is_sorted_or_multiplied_out(monkeypatch):
    """PEFT's own functions are not called for what the kernels take."""
    from peft.tuners.lora import model as stock

    _, fused = both()
    for name in ("ties", "magnitude_prune", "task_arithmetic"):
        monkeypatch.setattr(stock, name, None)
    for combination_type in (*ON_MATRICES, *ON_PRODUCTS):
        combine(fused, combination_type)
        fused.delete_adapter("all")


def test_scalings_that_are_tensors():
    """As they are in a model that is prepared for compiled hot swaps."""
    stock, fused = both()
    for model in (stock, fused):
        for name in NAMES:
            scaling = model.base_model.model.lin.scaling
            scaling[name] = torch.tensor(float(scaling[name]))
        combine(model, "ties")
    for got, want in zip(matrices(fused), matrices(stock), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"density": None}, {"density": -0.5}, {"majority_sign_method": "?"}], ids=str)
def test_errors_are_pefts(options):
    messages = []
    for model in both():
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            combine(model, "ties", **options)
        messages.append((caught.type, str(caught.value)))
    assert messages[0] == messages[1]


def test_report_and_restore():
    model = model_of()
    kind = type(model.base_model)
    report = peft_kernels.optimize(model)
    assert "base_model.model.lin" in [layer.name for layer in report.fused]
    assert "base_model" not in [layer.name for layer in report]
    assert isinstance(model.base_model, kind) and type(model.base_model).__name__ == "LoraModel"
    assert type(copy.deepcopy(model).base_model) is type(model.base_model)
    peft_kernels.restore(model)
    assert type(model.base_model) is kind
