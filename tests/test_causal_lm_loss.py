"""The loss of causal language models: values, gradients, stock's arguments, and how it comes and goes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from comparison import DTYPES, error, short
from tiny_models import VOCABULARY, tiny, tokens
from tolerances import FP32_SUM, ROUNDING, VERSUS_STOCK
from transformers.loss.loss_utils import ForCausalLMLoss

import peft_kernels
from peft_kernels.integrations.transformers.causal_lm_loss import causal_lm_loss


def problem(dtype=torch.float32, batch=2, length=11):
    logits = (3 * torch.randn(batch, length, VOCABULARY)).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (batch, length))
    labels[0, :4] = -100
    return logits, labels


def value_and_gradient(function, logits, labels, **options):
    loss = function(logits, labels, VOCABULARY, **options)
    return loss, torch.autograd.grad(3 * loss, logits)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_against_fp64_and_stock(platform, dtype):
    logits, labels = problem(dtype)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = expected, torch.autograd.grad(3 * expected, exact)[0]
    actual = value_and_gradient(causal_lm_loss, logits, labels)
    stock = value_and_gradient(ForCausalLMLoss, logits, labels)
    for ours, theirs, exactly, tolerance in zip(
        actual, stock, expected, (FP32_SUM, ROUNDING[dtype] + FP32_SUM), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert error(ours, exactly) <= max(VERSUS_STOCK * error(theirs, exactly), tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 13},
        {"num_items_in_batch": torch.tensor(13)},
        {"ignore_index": 5},
        {"shift_labels": torch.arange(22).view(2, 11)},
        {"unknown": "is ignored"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options):
    logits, labels = problem()
    labels = labels.clamp_min(0) if "ignore_index" in options else labels
    for ours, stock in zip(
        value_and_gradient(causal_lm_loss, logits, labels, **options),
        value_and_gradient(ForCausalLMLoss, logits, labels, **options),
        strict=True,
    ):
        assert error(ours, stock) <= FP32_SUM


def test_nothing_counted():
    logits, labels = problem()
    loss = causal_lm_loss(logits, torch.full_like(labels, -100), VOCABULARY)
    assert loss.isnan() and ForCausalLMLoss(logits, torch.full_like(labels, -100), VOCABULARY).isnan()


def test_large_logits_stay_finite():
    logits, labels = problem()
    loss, gradient = value_and_gradient(causal_lm_loss, (logits * 1e4).detach().requires_grad_(), labels)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("label", [VOCABULARY, -1])
def test_label_out_of_range(label):
    logits, labels = problem()
    labels[1, 3] = label
    with pytest.raises(IndexError, match=f"targets: got {label} for row 13, wanted a class"):
        causal_lm_loss(logits, labels, VOCABULARY)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        ForCausalLMLoss(logits, labels, VOCABULARY)


def test_keeps_a_number_for_each_row():
    logits, labels = problem(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        causal_lm_loss(logits, labels, VOCABULARY)
    beyond = [t for t in saved if t.data_ptr() != logits.data_ptr()]
    assert sum(t.numel() for t in beyond) <= 4 * logits.shape[0] * logits.shape[1]


def test_compiled():
    logits, labels = problem()
    compiled = torch.compile(causal_lm_loss, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(
        value_and_gradient(compiled, logits, labels), value_and_gradient(causal_lm_loss, logits, labels), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_accelerate_and_restore(name):
    model = tiny(name)
    stock, (ids, padding) = model.loss_function, tokens()
    wanted = model(input_ids=ids, attention_mask=padding, labels=ids).loss
    report = peft_kernels.optimize(model)
    assert torch.allclose(model(input_ids=ids, attention_mask=padding, labels=ids).loss, wanted)
    assert [layer.kind for layer in report if "loss" in layer.reason] == [f"transformers.{type(model).__name__}"]
    assert model.loss_function is causal_lm_loss
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.loss_function is causal_lm_loss
    peft_kernels.restore(model)
    assert model.loss_function is stock and "_loss_function" not in vars(model)


def test_own_loss_is_left_alone():
    def own(logits, labels, **options):
        return logits.sum()

    model = tiny("llama")
    model.loss_function = own
    peft_kernels.optimize(model)
    assert model.loss_function is own
    peft_kernels.restore(model)
    assert model.loss_function is own


def test_other_losses_are_left_alone():
    model = tiny("bert")
    assert not [layer for layer in peft_kernels.optimize(model) if "loss" in layer.reason]
