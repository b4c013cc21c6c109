"""PEFT's prompt tuning, P-Tuning, multitask prompt tuning and CPT on accelerated models."""

import copy
import pickle

import pytest
import torch
from peft import (
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from reports import missed
from tiny_models import END, PADDING, assert_same, tiny, tokens
from torch import nn
from transformers import StaticCache

import peft_kernels

LENGTH = 5
KINDS = {
    "prompt": lambda **options: PromptTuningConfig(num_virtual_tokens=LENGTH, **options),
    "mlp": lambda **options: PromptEncoderConfig(num_virtual_tokens=LENGTH, encoder_hidden_size=16, **options),
    "lstm": lambda **options: PromptEncoderConfig(
        num_virtual_tokens=LENGTH, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", **options
    ),
    "multitask": lambda **options: MultitaskPromptTuningConfig(
        num_virtual_tokens=LENGTH, num_tasks=3, num_ranks=2, **options
    ),
    "cpt": lambda **options: CPTConfig(
        cpt_token_ids=[3, 4, 5, 6, 7], cpt_mask=[1] * 5, cpt_tokens_type_mask=[1, 2, 2, 3, 4], **options
    ),
}


def prompt_model(kind, name="llama"):
    """A model whose prompt is large enough to change the tokens that are generated."""
    model = get_peft_model(tiny(name), KINDS[kind](task_type="SEQ_CLS" if name == "bert" else "CAUSAL_LM"))
    encoder = model.prompt_encoder["default"]
    nn.init.normal_(encoder.embedding.weight)
    if kind == "multitask":
        nn.init.normal_(encoder.prefix_task_cols), nn.init.normal_(encoder.prefix_task_rows)
    if kind == "cpt":
        nn.init.normal_(encoder.delta_embedding.weight)
    return model


def tasks(kind):
    return {"task_ids": torch.tensor([0, 2, 1])} if kind == "multitask" else {}


def step(model, ids, padding, **options):
    """The loss, the logits of the prompt and of what is no padding, and every gradient, by name."""
    model.zero_grad()
    labels = ids[:, 0] % 2 if "Sequence" in type(model).__name__ else ids
    outputs = model(input_ids=ids, attention_mask=padding, labels=labels, **options)
    outputs.loss.backward()
    logits = outputs.logits.detach()
    if logits.dim() == 3:
        logits = logits[nn.functional.pad(padding, (LENGTH, 0), value=1).bool()]
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": outputs.loss.detach(), "logits": logits, **grads}


def greedy(model, ids, padding, count, **options):
    """Greedy decoding by whole forwards, without positions, which PEFT leaves out."""
    ended = torch.zeros(len(ids), 1, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=ids, attention_mask=padding, labels=None, **options).logits
            token = logits[:, -1].argmax(-1, keepdim=True).masked_fill(ended, PADDING)
            ended |= token == END
            ids, padding = torch.cat([ids, token], 1), torch.cat([padding, torch.ones_like(token)], 1)
            if ended.all():
                break
    return ids


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, "llama") for kind in KINDS] + [("prompt", "gpt2"), ("mlp", "opt"), ("prompt", "qwen3"), ("prompt", "bert")],
)
def test_trains_as_peft_does(kind, name):
    model = prompt_model(kind, name)
    ids, padding = tokens()
    inputs = [(ids, padding), (ids, padding.flip(1)), (ids, torch.ones_like(ids))]
    wanted = [step(model, *one, **tasks(kind)) for one in inputs]
    report = peft_kernels.optimize(model)
    assert not missed(report)
    for one, want in zip(inputs, wanted, strict=True):
        assert_same(step(model, *one, **tasks(kind)), want)
    fused = {layer.kind: layer.reason for layer in report if layer.fused}
    assert sum("Attention" in kind for kind in fused) == 1
    if name != "bert":
        assert fused["peft.PeftModelForCausalLM"] == "generation after PEFT's prompt"


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, "llama") for kind in KINDS] + [("prompt", "gpt2"), ("mlp", "opt"), ("prompt", "qwen3")]
)
def test_generates_as_forwards_do(kind, name):
    # PEFT 0.21 puts the prompt before every token from transformers 5.20 or so on, and so is no oracle with a cache.
    model = prompt_model(kind, name).eval()
    ids, padding = tokens()
    wanted = greedy(model, ids, padding, 6, **tasks(kind))
    options = {"input_ids": ids, "attention_mask": padding, "do_sample": False, **tasks(kind)}
    whole = model.generate(num_beams=3, max_new_tokens=4, use_cache=False, **options)
    assert torch.equal(model.generate(max_new_tokens=6, use_cache=False, **options), wanted)
    peft_kernels.optimize(model)
    assert torch.equal(model.generate(max_new_tokens=6, **options), wanted)
    assert torch.equal(model.generate(max_new_tokens=6, use_cache=False, **options), wanted)
    assert torch.equal(model.generate(max_new_tokens=6, cache_implementation="static", **options), wanted)
    assert torch.equal(model.generate(num_beams=3, max_new_tokens=4, **options), whole)
    assert model.generate(max_new_tokens=4, num_return_sequences=2, **options | {"do_sample": True}).shape[0] == 6


def test_prompt_is_given_once():
    model = prompt_model("mlp").eval()
    peft_kernels.optimize(model)
    rows, calls = [], []
    model.prompt_encoder["default"].register_forward_hook(lambda _, args, __: calls.append(args[0].shape))
    model.get_base_model().model.register_forward_hook(lambda _, __, out: rows.append(out[0].shape[1]))
    ids, padding = tokens()
    model.generation_config.eos_token_id = None
    cache = StaticCache(config=model.config, max_cache_len=9 + LENGTH + 4)
    got = model.generate(ids, attention_mask=padding, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert rows == [9 + LENGTH, 1, 1, 1] and calls == [(1, LENGTH)]
    embeds = model.get_input_embeddings()(ids)
    options = {"attention_mask": padding, "max_length": 13, "do_sample": False}
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), got[:, 9:])


def test_disabled_and_restored():
    model = prompt_model("prompt").eval()
    ids, padding = tokens()
    options = {"attention_mask": padding, "max_new_tokens": 4, "do_sample": False}
    base = model.get_base_model().generate(ids, **options)
    stock, wanted = type(model), greedy(model, ids, padding, 4)
    for _ in range(2):  # PEFT leaves methods on the instance when it is enabled again
        with model.disable_adapter():
            assert torch.equal(model.generate(ids, **options), base)
        peft_kernels.optimize(model)
        assert torch.equal(model.generate(ids, **options), wanted)
        with model.disable_adapter():
            assert torch.equal(model.generate(ids, **options), base)
        assert torch.equal(model.generate(ids, **options), wanted)
        peft_kernels.restore(model)
        assert type(model) is stock and not model.get_base_model().model._forward_pre_hooks
        assert torch.equal(model.generate(ids, use_cache=False, **options), wanted)


@pytest.mark.parametrize("kind", ["lstm", "multitask", "cpt"])
def test_saved_copied_and_pickled(kind, tmp_path):
    model = prompt_model(kind).eval()
    base = copy.deepcopy(model.get_base_model())
    peft_kernels.optimize(model)
    ids, padding = tokens()
    options = {"input_ids": ids, "attention_mask": padding, "max_new_tokens": 4, "do_sample": False, **tasks(kind)}
    wanted = model.generate(**options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    peft_kernels.optimize(loaded)
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(**options), wanted)


def test_the_report_names_no_prompt_of_lora():
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert not any(layer.kind == "peft.PeftModelForCausalLM" for layer in peft_kernels.optimize(model))


def test_excluded():
    model = prompt_model("prompt")
    report = peft_kernels.optimize(model, exclude=["prefix"])
    assert not report.layers[0].fused and type(model).__module__.startswith("peft.")


def test_ways_of_generating_without_the_prompt_are_refused():
    model = prompt_model("prompt").eval()
    peft_kernels.optimize(model)
    ids, _ = tokens()
    with pytest.raises(
        ValueError, match="prompt_lookup_num_tokens: got 3, wanted None, since the model has a soft prompt"
    ):
        model.generate(ids, prompt_lookup_num_tokens=3)
