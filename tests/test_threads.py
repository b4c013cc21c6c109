"""Accelerated models in several threads at once: what a call is about is kept on no module."""

import pytest
import torch
from concurrency import THREADS, differences
from decoding_models import decode, make
from peft import IA3Config, PrefixTuningConfig, get_peft_model
from tiny_models import tiny, tokens

import peft_kernels


def lora(base, **config):
    return make("llama", base, **config)


def ia3():
    model = get_peft_model(tiny("llama"), IA3Config(task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "ia3_" in name:
            torch.nn.init.normal_(parameter, 1, 0.3)
    return model


def with_peft_prefix():
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, inference_mode=False
    )
    return get_peft_model(tiny("llama"), config)


def with_prefix():
    model = tiny("qwen3")
    peft_kernels.attach_prefix(model, length=5, hidden_size=8)
    return model


def with_prompt():
    model = tiny("qwen3")
    peft_kernels.attach_prompt(model, length=5, encoder="mlp", hidden_size=8)
    return model


def with_adapters():
    model = tiny("llama")
    peft_kernels.insert_adapters(model, "parallel", bottleneck=8, norm_before=True)
    return model


MODELS = {
    "lora": lambda: lora("dense"),
    "qlora": lambda: lora("4bit"),
    "ia3": ia3,
    "peft prefix": with_peft_prefix,
    "prefix": with_prefix,
    "prompt": with_prompt,
    "adapters": with_adapters,
}


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_forward(name, count):
    model = MODELS[name]().eval()
    peft_kernels.optimize(model)
    batches = [tokens(length=6 + number) for number in range(THREADS)]

    def call(number):
        ids, padding = batches[number]
        return model(input_ids=ids, attention_mask=padding, use_cache=False).logits

    assert differences(call, count) == 0


@pytest.mark.parametrize("count", [3, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_decoding(base, count):
    model = lora(base)
    peft_kernels.optimize(model)
    assert differences(lambda number: decode(model, rows=1 + number, prompt=5 + number), count) == 0
