"""Where the (IA)³ vectors of queries, keys and values are applied: in the attention, or in their projections."""

import contextvars

import pytest
import torch
from comparison import saved_for_backward
from optional import if_installed
from peft import IA3Config, get_peft_model
from tiny_models import assert_same, assert_same_steps, step, tiny, tokens
from torch import nn

import peft_kernels
from peft_kernels.integrations import deferred_scales
from peft_kernels.integrations.deferred_scales import deferred
from peft_kernels.integrations.transformers import attention

transformers = if_installed("transformers")

PROJECTIONS = {
    "opt": ["k_proj", "q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "bert": ["key", "value"],
    "t5": ["k", "q", "v"],
    "bart": ["k_proj", "v_proj"],
}
ROTARY = "llama"
HIDDEN, BATCH, LENGTH = 32, 3, 9


def base_model(name):
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=60, d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0, use_cache=False,
        )  # fmt: skip
    elif name == "bart":
        config = transformers.BartConfig(
            vocab_size=60, d_model=HIDDEN, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, dropout=0.0,
            use_cache=False,
        )  # fmt: skip
    else:
        return tiny(name, HIDDEN)
    return transformers.AutoModelForSeq2SeqLM.from_config(config).train()


def ia3_model(name, targets=None, use_cache=False):
    model = base_model(name)
    model.config.use_cache = use_cache
    config = IA3Config(target_modules=targets or PROJECTIONS[name], feedforward_modules=[])
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture
def scales(monkeypatch):
    """How many vectors each call of the attention operation is given."""
    given = []

    def recorded(q, k, v, *scales, **options):
        given.append(sum(scale is not None for scale in scales))
        return original(q, k, v, *scales, **options)

    original = attention.ia3_attention
    monkeypatch.setattr(attention, "ia3_attention", recorded)
    return given


@pytest.mark.parametrize("name", PROJECTIONS)
def test_attention_applies_the_vectors_in_training(name, scales):
    model, (ids, padding) = ia3_model(name), tokens(BATCH, LENGTH)
    wanted = [step(model, ids, mask) for mask in (padding, None)]
    report = peft_kernels.optimize(model)
    remark = f"it applies (IA)³'s vectors of {', '.join(PROJECTIONS[name])} in training without a cache"
    assert remark in {layer.reason for layer in report if layer.fused}
    for mask, want in zip((padding, None), wanted, strict=True):
        assert_same(step(model, ids, mask), want)
    assert scales and set(scales) == {3 if name == "gpt2" else len(PROJECTIONS[name])}


def test_vectors_stay_before_a_rotary_embedding(scales):
    model = ia3_model(ROTARY, ["k_proj", "v_proj"])
    report = peft_kernels.optimize(model)
    remark = "(IA)³'s vectors of k_proj, v_proj stay in their products, before the rotary embedding"
    assert remark in {layer.reason for layer in report if layer.fused}
    model(input_ids=tokens()[0]).logits.sum().backward()
    assert set(scales) == {0}


def test_report_without_vectors_says_nothing_of_them():
    report = peft_kernels.optimize(tiny("opt"))
    assert not any("vectors" in layer.reason for layer in report)


def test_less_is_kept_than_by_the_projections(monkeypatch):
    """Keys and values from after the vectors: two matrices in each layer."""
    model = ia3_model("opt", ["k_proj", "v_proj"])
    peft_kernels.optimize(model)
    ids, padding = tokens(BATCH, LENGTH)

    def kept():
        known = [*model.parameters(), *model.buffers()]
        call = lambda: model(input_ids=ids, attention_mask=padding).logits  # noqa: E731
        return sum(saved_for_backward(call, known)[1].values())

    in_attention = kept()
    monkeypatch.setattr(attention.FusedAttention, "_may_scale", lambda *args: False)
    assert kept() - in_attention >= 2 * 2 * BATCH * LENGTH * HIDDEN * 4


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_caches_have_what_stock_puts_into_them(grad, scales):
    model = ia3_model("opt", use_cache=True)
    ids, _ = tokens(BATCH, LENGTH)
    with torch.set_grad_enabled(grad):
        want = model(input_ids=ids)
        peft_kernels.optimize(model)
        got = model(input_ids=ids)
    assert set(scales) == {0}
    for ours, theirs in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)


def test_stock_attention_is_given_scaled_tensors(monkeypatch, scales):
    model = ia3_model("gpt2")
    monkeypatch.setattr(attention, "_why_stock_input", lambda *args: "a test says so")
    assert_same_steps(model, *tokens(BATCH, LENGTH))
    assert not scales


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant, scales):
    model = ia3_model("opt")
    peft_kernels.optimize(model)
    ids, padding = tokens(BATCH, LENGTH)

    def gradients():
        model.zero_grad()
        model(input_ids=ids, attention_mask=padding, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    want = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients()
    torch.testing.assert_close(got, want)
    assert scales[-1] == 3


@pytest.mark.parametrize("turn_off", ["disabled", "merged", "rows"])
def test_other_forwards_leave_nothing_to_the_attention(turn_off, scales):
    model = ia3_model("opt")
    peft_kernels.optimize(model)
    ids, _ = tokens(BATCH, LENGTH)
    if turn_off == "merged":
        model.merge_adapter()
    rows = [["default", None, "default"]] if turn_off == "rows" else []
    contexts = {"disabled": model.disable_adapter, "rows": lambda: peft_kernels.adapter_rows(model, *rows)}
    with contexts.get(turn_off, torch.enable_grad)():
        model(input_ids=ids)
    assert set(scales) == {0}


def test_eager_attention_leaves_them_to_the_projections(scales):
    model, (ids, _) = ia3_model("opt"), tokens(BATCH, LENGTH)
    want = model(input_ids=ids).logits
    peft_kernels.optimize(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
    assert not scales


def test_attention_that_does_not_take_them():
    layer, scale = nn.Linear(2, 2), torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="did not call its model's attention function"), deferred(layer, [layer]):
        assert deferred_scales.defer(layer, scale)
        assert not deferred_scales.defer(layer, scale)  # a second call of the projection scales its result
    assert not deferred_scales.defer(layer, scale)


def test_other_threads_see_nothing_of_a_call():
    layer = nn.Linear(2, 2)
    with deferred(layer, [layer]):
        assert not contextvars.Context().run(deferred_scales.defer, layer, torch.ones(2))
