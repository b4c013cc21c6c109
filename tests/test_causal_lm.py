"""Causal language models whose loss is made without logits: values, gradients, stock's arguments, and what is kept."""

import copy
import inspect
import pickle

import bitsandbytes as bnb
import pytest
import torch
from comparison import Made, error
from peft import LoraConfig, get_peft_model
from peft_models import randomize
from tiny_models import SAME_STEP, VOCABULARY, tiny, tokens
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Trainer, TrainingArguments

import peft_kernels
from peft_kernels.integrations.registry import FusedLayer

NAMES = ["llama", "qwen3", "gpt2", "opt", "granite", "mixtral", "qwen3_moe", "gemma"]
REMARK = "its loss, without logits"


def without_logits(model):
    return peft_kernels.optimize(model, logits=False, tune=False)


def verdicts(report):
    return [layer.verdict for layer in report if "without logits" in layer.reason or "with logits" in layer.reason]


def inputs():
    ids, padding = tokens()
    return {"input_ids": ids, "attention_mask": padding, "labels": ids.masked_fill(padding == 0, -100)}


def step(model, **kwargs):
    model.zero_grad()
    output = model(**kwargs)
    output.loss.backward()
    return {"loss": output.loss.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same_step(model, stock, **kwargs):
    wanted, got = step(stock, **kwargs), step(model, **kwargs)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= SAME_STEP * value.norm() + 1e-6, name
    assert model(**kwargs).logits is None


@pytest.mark.parametrize("name", NAMES)
def test_a_step(name):
    model = tiny(name)
    stock, kwargs = copy.deepcopy(model), inputs()
    assert verdicts(without_logits(model)) == [f"fused: {REMARK}"]
    assert_same_step(model, stock, **kwargs)


def test_softcap():
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    nn.init.normal_(model.lm_head.weight)
    stock = copy.deepcopy(model)
    assert verdicts(without_logits(model)) == [f"fused: {REMARK}"]
    assert_same_step(model, stock, **inputs())
    model.lm_head.register_forward_hook(lambda *_: None)  # and where the logits are made after all
    assert_same_step(model, stock, **inputs())


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 13},
        {"num_items_in_batch": torch.tensor(13)},
        {"ignore_index": 5},
        {"shift_labels": torch.arange(27).view(3, 9)},
        {"logits_to_keep": 9},
        {"logits_to_keep": torch.arange(9)},
        {"output_hidden_states": True},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options):
    model, kwargs = tiny("llama"), inputs()
    if "ignore_index" in options:
        kwargs["labels"] = kwargs["input_ids"]
    stock = copy.deepcopy(model)
    without_logits(model)
    assert_same_step(model, stock, **kwargs | options)
    wanted, got = stock(**kwargs | options), model(**kwargs | options)
    assert {*wanted} - {"logits"} == {*got}


def test_logits_are_there_without_labels_or_gradients():
    model, kwargs = tiny("llama"), inputs()
    stock = copy.deepcopy(model)
    without_logits(model)
    with torch.no_grad():
        got, wanted = model(**kwargs), stock(**kwargs)
    assert error(got.logits, wanted.logits) <= SAME_STEP and error(got.loss, wanted.loss) <= SAME_STEP
    ids = kwargs["input_ids"]
    assert model(ids).logits.shape == (*ids.shape, VOCABULARY)
    assert torch.equal(*(m.eval().generate(ids, max_new_tokens=4, do_sample=False) for m in (model, stock)))


def test_tuples_and_positions():
    model, kwargs = tiny("llama"), inputs()
    without_logits(model)
    wanted = model(**kwargs).loss
    result = model(**kwargs, return_dict=False)
    assert isinstance(result, tuple) and torch.equal(result[0], wanted)
    names = [*inspect.signature(model.forward).parameters]
    given = [kwargs.get(name) for name in names[: names.index("labels") + 1]]
    output = model(*given)
    assert output.logits is None and torch.equal(output.loss, wanted)


def adapted(quantized, dropout=0.0, targets=("lm_head", "gate_proj")):
    model = tiny("llama", hidden=64)
    if quantized:
        head = bnb.nn.Linear4bit(64, VOCABULARY, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        head.load_state_dict(model.lm_head.state_dict())
        model.lm_head = head.to("cpu")
        model.is_loaded_in_4bit = True  # PEFT asks
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules=[*targets]))
    randomize(model)
    return model.train()


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_lora_on_the_output_layer(quantized):
    model = adapted(quantized)
    stock, kwargs = copy.deepcopy(model), inputs()
    assert verdicts(without_logits(model)) == [f"fused: {REMARK}"]
    assert_same_step(model, stock, **kwargs)
    model.disable_adapter_layers()
    stock.disable_adapter_layers()
    assert error(model(**kwargs).loss, stock(**kwargs).loss) <= SAME_STEP


def test_what_the_operation_can_not_do_has_logits_inside(caplog):
    for change in ("rows", "hook", "dora"):
        model = adapted(False)
        if change == "dora":
            model = get_peft_model(tiny("llama"), LoraConfig(r=4, use_dora=True, target_modules=["lm_head"])).train()
        stock, kwargs = copy.deepcopy(model), inputs()
        without_logits(model)
        if change == "hook":
            for each in (model, stock):
                each.get_output_embeddings().register_forward_hook(lambda module, args, output: 2 * output)
        if change == "rows":
            with peft_kernels.adapter_rows(model, ["default"] * 3):
                got = model(**kwargs)
            assert error(got.loss, stock(**kwargs).loss) <= SAME_STEP and got.logits is None
            continue
        assert_same_step(model, stock, **kwargs)
    assert "its loss takes logits, since" in caplog.text


def test_report():
    model = tiny("llama")
    assert not verdicts(peft_kernels.optimize(model, tune=False))
    model.loss_function = lambda logits, labels, **options: logits.sum()
    assert verdicts(without_logits(model)) == ["left alone: its loss, with logits: its loss function was replaced"]
    assert model(**inputs()).logits is not None
    (verdict,) = verdicts(without_logits(tiny("bert")))
    assert verdict == "left alone: its loss, with logits: no class in it has a form without"
    excluded = peft_kernels.optimize(tiny("llama"), logits=False, exclude="cross_entropy", tune=False)
    assert [layer.reason for layer in excluded if not layer.name][-1] == "'cross_entropy' is excluded"


def test_comes_and_goes():
    model, kwargs = tiny("llama"), inputs()
    signature, kind = inspect.signature(model.forward), type(model)
    without_logits(model)
    assert inspect.signature(model.forward) == signature  # Trainer drops the columns that are not in it
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model) and copied(**kwargs).logits is None
    peft_kernels.optimize(model, tune=False)
    assert type(model) is kind and model(**kwargs).logits is not None
    without_logits(model)
    peft_kernels.restore(model)
    assert type(model) is kind and not any(isinstance(module, FusedLayer) for module in model.modules())


def test_bad_flag():
    with pytest.raises(ValueError, match="logits: got 0, wanted True or False"):
        peft_kernels.optimize(tiny("llama"), logits=0)


def test_nothing_as_large_as_the_logits_is_made():
    model = tiny("llama")
    model.resize_token_embeddings(2000)
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    ids = torch.randint(VOCABULARY, (8, 100))
    stock = copy.deepcopy(model)
    without_logits(model)
    largest, kept = [], []
    for each in (stock, model):
        saved = {}
        with (
            Made() as made,
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t
            ),
        ):
            loss = each(input_ids=ids, labels=ids).loss
        loss.backward()
        largest.append(max(t.numel() for t in made.tensors))
        kept.append(sum(t.nbytes for t in saved.values() if t.shape != each.lm_head.weight.shape))
    assert largest[0] == 8 * 100 * 2000 and largest[1] <= 512 * 2000
    assert kept[1] < kept[0] / 4


def test_compiled():
    model, kwargs = tiny("llama"), inputs()
    without_logits(model)
    wanted = step(model, **kwargs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = step(compiled, **kwargs)
    assert error(got["loss"], wanted["loss"]) <= SAME_STEP and compiled(**kwargs).logits is None


@pytest.mark.parametrize("accumulated", [1, 2])
def test_trainer(accumulated, tmp_path):
    """Its loss is divided by the tokens of all the batches that make up a step."""
    model = tiny("llama")
    ids = [torch.randint(3, VOCABULARY, (length,)) for length in (9, 5, 7, 9)]
    rows = [{"input_ids": row, "labels": row, "unknown": 3} for row in ids]

    def collate(found):
        padded = [nn.utils.rnn.pad_sequence([row[key] for row in found], True, pad) for key, pad in
                  (("input_ids", 0), ("labels", -100))]  # fmt: skip
        return dict(zip(("input_ids", "labels"), padded, strict=True))

    losses, stock = [], copy.deepcopy(model)
    for each in (stock, model):
        if each is model:
            without_logits(each)
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=accumulated, max_steps=2,
            logging_steps=1, use_cpu=True, report_to=[], save_strategy="no", seed=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(each, arguments, train_dataset=rows, data_collator=collate)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2
    weights = zip(model.parameters(), stock.parameters(), strict=True)
    assert all(error(ours, theirs) <= 1e-3 for ours, theirs in weights)
