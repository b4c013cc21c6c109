"""Training of nothing but the biases."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from comparison import error
from decoding_models import quantised
from tiny_models import SAME_STEP, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_kernels

TOKENS = torch.arange(24).view(2, 12) % 30
LINEAR = (nn.Linear, Conv1D, bnb.nn.Linear4bit)


@pytest.fixture(params=["gpt2", "opt", "bert", "opt-4bit"])
def model(request):
    name, _, bits = request.param.partition("-")
    if not bits:
        return tiny(name).train()
    # Rows of whole blocks: bitsandbytes 0.50 reads others with the scales of other blocks on a CPU.
    return quantised(tiny(name, hidden=64, intermediate=128).train())


def loss(model):
    return model(input_ids=TOKENS)[0].float().square().mean()


def test_gradients(model):
    names = peft_kernels.train_biases_only(model)
    assert names == tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert all(name.endswith("bias") for name in names)
    stock = copy.deepcopy(model)
    peft_kernels.optimize(model)
    for each in (model, stock):
        loss(each).backward()
    for name, parameter in stock.named_parameters():
        actual = model.get_parameter(name).grad
        if parameter.grad is None:
            assert actual is None, name
        elif not name.endswith(("k_proj.bias", "key.bias")):  # those of keys cancel in the softmax
            assert error(actual, parameter.grad) <= SAME_STEP, name


def test_linear_layers_keep_nothing(model):
    peft_kernels.train_biases_only(model)
    peft_kernels.optimize(model)
    inside, kept = [], {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for name, module in model.named_modules():
        if isinstance(module, LINEAR):
            module.register_forward_pre_hook(lambda module, args, name=name: inside.append(name))
            module.register_forward_hook(lambda module, args, y: inside.pop() and None)

    def keep(tensor):
        if inside and tensor.untyped_storage().data_ptr() not in parameters:
            kept[inside[-1]] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model).backward()
    of_weights = [name for name in kept if isinstance(model.get_submodule(name), bnb.nn.Linear4bit)]
    assert not kept.keys() - of_weights
    for name in of_weights:  # what its codes are read with
        weight = model.get_submodule(name).weight
        assert kept[name] <= weight.nbytes


def test_other_biases_and_new_heads():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2, add_bias_kv=True),
            "lstm": nn.LSTM(4, 4),
            "relative_attention_bias": nn.Embedding(4, 2),
            "classifier": nn.Linear(4, 2, bias=False),
        }
    )
    names = peft_kernels.train_biases_only(model)
    assert {*names} == {
        "attention.in_proj_bias", "attention.bias_k", "attention.bias_v", "attention.out_proj.bias",
        "lstm.bias_ih_l0", "lstm.bias_hh_l0",
    }  # fmt: skip
    with_head = peft_kernels.train_biases_only(model, ["classifier"])
    assert {*with_head} == {*names, "classifier.weight"} and model["classifier"].weight.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error_type", "match"),
    [
        ((nn.Linear(2, 2, bias=False),), ValueError, r"model: got a Linear without biases, .* \(IA\)³ or .* LoRA"),
        ((nn.Linear(2, 2), ["head"]), ValueError, "modules_to_train: got 'head', wanted the name of a module"),
        (("model",), TypeError, "model: got str, wanted a torch.nn.Module"),
    ],
    ids=["no biases", "no such module", "no model"],
)
def test_bad_arguments(arguments, error_type, match):
    with pytest.raises(error_type, match=match):
        peft_kernels.train_biases_only(*arguments)


def test_llama_has_none():
    model = tiny("llama")
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="a LlamaForCausalLM without biases"):
        peft_kernels.train_biases_only(model)
    assert before == [parameter.requires_grad for parameter in model.parameters()]
