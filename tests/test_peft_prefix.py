"""Prefixes: PEFT's prefix tuning, fused, and this package's own."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from reports import missed
from tiny_models import DECODERS, assert_same, assert_same_steps, greedy, step, tiny, tokens
from torch import nn
from transformers import PreTrainedConfig, StaticCache

import peft_kernels
import peft_kernels.integrations.transformers.attention as integration
from peft_kernels.nn import PrefixEncoder

LENGTH = 5


def prefix_model(name, projection=False, **config):
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    return get_peft_model(
        tiny(name, **config),
        PrefixTuningConfig(
            task_type=task, num_virtual_tokens=LENGTH, prefix_projection=projection, encoder_hidden_size=16
        ),
    )


def fused_prefix_model(*args, **kwargs):
    model = prefix_model(*args, **kwargs)
    assert not missed(peft_kernels.optimize(model))
    return model


# ---- PEFT's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "mlp"])
@pytest.mark.parametrize("name", DECODERS)
def test_trains_as_peft_does(name, projection):
    report = assert_same_steps(prefix_model(name, projection), *tokens())
    kinds = Counter(layer.kind.removeprefix("transformers.") for layer in report)
    assert kinds["peft.PeftModelForCausalLM"] == 1 and report.layers[0].kind == "peft.PeftModelForCausalLM"
    assert sum(count for kind, count in kinds.items() if kind.endswith("Attention")) == 2


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "mlp"])
def test_encoder_model(projection, monkeypatch):
    # PEFT 0.21 can't run this with transformers 5.20 or so and later: the oracle is torch's attention, with the prefix
    # concatenated.
    model = fused_prefix_model("bert", projection)
    ids, padding = tokens()
    got = step(model, ids, padding)
    assert got["prompt_encoder.default.embedding.weight"].any()
    monkeypatch.setattr(integration, "_why_stock_input", lambda *_: "the test wants torch's attention")
    assert_same(got, step(model, ids, padding))


@pytest.mark.parametrize("part", ["", ".embedding"], ids=["encoder", "embedding"])
def test_hooks_on_the_encoder(part):
    stock = prefix_model("llama").eval()
    fused = copy.deepcopy(stock)
    peft_kernels.optimize(fused)
    ids, padding = tokens()
    results = []
    for model in (stock, fused):
        encoder = model.get_submodule(f"prompt_encoder.default{part}")
        encoder.register_forward_hook(lambda module, args, out: 5 * out)
        results.append(model(input_ids=ids, attention_mask=padding).logits[padding.bool()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_prefix_is_neither_expanded_nor_cached():
    model = fused_prefix_model("llama", True)
    rows = []
    encoder = model.prompt_encoder["default"]
    encoder.transform[0].register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    ids, padding = tokens()
    outputs = model(input_ids=ids, attention_mask=padding, use_cache=True)
    assert rows == [LENGTH], "the MLP runs once, not once for each of the batch"
    assert outputs.past_key_values.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing(name, reentrant):
    model = fused_prefix_model(name)
    ids, padding = tokens()
    wanted = step(model, ids, padding)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(step(model, ids, padding), wanted)


def test_a_forward_without_the_prefix_before_the_backward():
    """As a reference model has it; the layers that are run again then still have the prefix of their own forward."""
    model = fused_prefix_model("llama")
    ids, padding = tokens()
    wanted = step(model, ids, padding)
    model.gradient_checkpointing_enable()
    model.zero_grad()
    loss = model(input_ids=ids, attention_mask=padding, labels=ids).loss
    with model.disable_adapter(), torch.no_grad():
        model(input_ids=ids, attention_mask=padding)
    loss.backward()
    assert torch.allclose(
        model.prompt_encoder["default"].embedding.weight.grad,
        wanted["prompt_encoder.default.embedding.weight"],
        atol=1e-7,
    )


@pytest.mark.parametrize("projection", [False, True], ids=["direct", "mlp"])
@pytest.mark.parametrize("name", DECODERS)
def test_generates_as_forwards_do(name, projection):
    # PEFT 0.21 generates without its prefix from transformers 5.20 or so on, so stock is no oracle: its forwards are.
    model = prefix_model(name, projection).eval()
    ids, padding = tokens()
    wanted = greedy(model, ids, padding, 6)
    peft_kernels.optimize(model)
    options = {"attention_mask": padding, "do_sample": False}
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, **options), wanted)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, use_cache=False, **options), wanted)
    beams = model.generate(input_ids=ids, max_new_tokens=4, num_beams=3, **options)
    assert torch.equal(beams, model.generate(input_ids=ids, max_new_tokens=4, num_beams=3, use_cache=False, **options))


def test_base_model_has_no_prefix():
    model = fused_prefix_model("llama").eval()
    ids, padding = tokens()
    base = copy.deepcopy(model.get_base_model())
    peft_kernels.restore(base)
    with torch.no_grad():
        wanted = base(ids, padding).logits
        for got in (model.get_base_model()(ids, padding).logits, _disabled(model, ids, padding)):
            assert torch.allclose(got[padding.bool()], wanted[padding.bool()], atol=1e-5)
        assert not torch.allclose(model(input_ids=ids, attention_mask=padding).logits, wanted, atol=1e-3)


def _disabled(model, ids, padding):
    with model.disable_adapter():
        return model(input_ids=ids, attention_mask=padding).logits


def test_after_being_disabled():
    """PEFT leaves methods of the class on the instance, which are no replacements."""
    model = prefix_model("llama").eval()
    ids, padding = tokens()
    wanted = greedy(model, ids, padding, 4)
    _disabled(model, ids, padding)
    assert not missed(peft_kernels.optimize(model))
    options = {"attention_mask": padding, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(input_ids=ids, **options), wanted)
    _disabled(model, ids, padding)
    peft_kernels.restore(model)
    assert torch.equal(greedy(model, ids, padding, 4), wanted)
    model.prepare_inputs_for_generation(ids, attention_mask=padding)


def test_switching_adapters():
    model = fused_prefix_model("llama").eval()
    ids, _ = tokens()
    first = model(input_ids=ids).logits
    model.add_adapter("other", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.set_adapter("other")
    assert not torch.allclose(model(input_ids=ids).logits, first, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(model(input_ids=ids).logits, first)


def test_restore_copy_pickle_and_save(tmp_path):
    model = prefix_model("llama").eval()
    ids, padding = tokens()
    stock, wanted = type(model), model(input_ids=ids, attention_mask=padding).logits
    peft_kernels.optimize(model)
    fused = model(input_ids=ids, attention_mask=padding).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids=ids, attention_mask=padding).logits, fused)
    model.save_pretrained(tmp_path)
    peft_kernels.restore(model)
    assert type(model) is stock and not model.get_base_model().model._forward_pre_hooks
    assert torch.equal(model(input_ids=ids, attention_mask=padding).logits, wanted)


def test_models_of_others_are_left_alone():
    class Model(nn.Linear):
        config, device = PreTrainedConfig(vocab_size=9), torch.device("cpu")

        def prepare_inputs_for_generation(self, **inputs):
            return inputs

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_layers=2, token_dim=8, num_attention_heads=2
    )
    layer, base, *_ = peft_kernels.optimize(get_peft_model(Model(8, 8), config))
    assert not layer.fused and layer.reason == "its model is not a transformers.PreTrainedModel"
    assert not base.fused and base.reason == "this class has no fused form"


@pytest.mark.parametrize("what", ["window", "eager"])
def test_stock_path(what, caplog):
    model = prefix_model("mistral", sliding_window=6) if what == "window" else prefix_model("llama")
    if what == "eager":
        model.get_base_model().set_attn_implementation("eager")
    report = peft_kernels.optimize(model)
    reason = {
        "window": "its attention has a window, out of which PEFT's prefix would slide",
        "eager": "0 of the 2 layers of this llama have fused attention with prefixes",
    }[what]
    assert report.layers[0].reason == reason and not report.layers[0].fused
    ids, padding = tokens()
    torch.manual_seed(3)
    got = step(model, ids, padding)
    peft_kernels.restore(model)
    torch.manual_seed(3)
    assert_same(got, step(model, ids, padding))


# ---- this package's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_size", [None, 16], ids=["direct", "mlp"])
@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_attached_prefix_is_pefts(name, hidden_size):
    theirs = prefix_model(name, projection=hidden_size is not None)
    if name == "bert":
        peft_kernels.optimize(theirs)
    ours = copy.deepcopy(theirs.get_base_model())
    ours.base_model._forward_pre_hooks.clear()
    encoder = peft_kernels.attach_prefix(ours, length=LENGTH, hidden_size=hidden_size)
    encoder.load_state_dict(theirs.prompt_encoder["default"].state_dict())
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        f"prefix_encoder.{n}" for n, _ in encoder.named_parameters()
    ]
    ids, padding = tokens()
    ours.get_base_model = lambda: ours
    for mask in (padding, None):
        wanted, got = step(theirs, ids, mask), step(ours, ids, mask)
        wanted = {n.replace("prompt_encoder.default", "prefix_encoder"): v for n, v in wanted.items()}
        got = {n: v for n, v in got.items() if n in wanted}
        wanted = {n: v for n, v in wanted.items() if "classifier" not in n}
        assert_same({n: got[n] for n in wanted}, wanted)


@pytest.mark.parametrize("hidden_size", [None, 16], ids=["direct", "mlp"])
@pytest.mark.parametrize("name", DECODERS)
def test_attached_prefix_generates(name, hidden_size):
    model = tiny(name).eval()
    encoder = peft_kernels.attach_prefix(model, length=LENGTH, hidden_size=hidden_size)
    nn.init.normal_(encoder.embedding.weight)
    ids, padding = tokens()
    wanted = greedy(model, ids, padding, 6)
    options = {"attention_mask": padding, "do_sample": False}
    runs = []
    if hidden_size:
        encoder.transform[0].register_forward_hook(lambda *_: runs.append(1))
    assert torch.equal(model.generate(ids, max_new_tokens=6, **options), wanted)
    assert len(runs) == (hidden_size is not None), "once for a generation"
    beams = model.generate(ids, max_new_tokens=4, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, max_new_tokens=4, num_beams=3, use_cache=False, **options))
    sampled = model.generate(ids, max_new_tokens=4, num_return_sequences=2, attention_mask=padding, do_sample=True)
    assert sampled.shape == (6, 13)


def test_attached_prefix_with_a_static_cache():
    model = tiny("llama").eval()
    peft_kernels.attach_prefix(model, length=LENGTH)
    ids, padding = tokens()
    wanted = greedy(model, ids, padding, 6)
    cache = StaticCache(config=model.config, max_cache_len=20)
    got = model.generate(ids, attention_mask=padding, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert torch.equal(got, wanted)


def test_attached_prefix_beside_lora():
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids, padding = tokens()
    without = model(input_ids=ids, attention_mask=padding).logits
    peft_kernels.attach_prefix(model, length=LENGTH)
    assert not torch.allclose(model(input_ids=ids, attention_mask=padding).logits, without, atol=1e-3)
    peft_kernels.detach_prefix(model)
    assert torch.allclose(model(input_ids=ids, attention_mask=padding).logits, without, atol=1e-5)
    assert not any("prefix" in name for name, _ in model.named_modules())


def test_copied_model_has_its_own_prefix():
    model = tiny("llama").eval()
    peft_kernels.attach_prefix(model, length=LENGTH)
    ids, _ = tokens()
    wanted = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, wanted)
        nn.init.zeros_(other.prefix_encoder.embedding.weight)
        assert not torch.equal(other(ids).logits, wanted)
    assert torch.equal(model(ids).logits, wanted)


def test_attach_refuses():
    with pytest.raises(ValueError, match="model: got a Linear, wanted a transformers"):
        peft_kernels.attach_prefix(nn.Linear(2, 2))
    model = tiny("llama")
    with pytest.raises(ValueError, match="encoder: got 2 layers, 4 heads and a head_dim of 8, wanted 2, 2 and 8"):
        peft_kernels.attach_prefix(model, PrefixEncoder(2, 4, 8, 5))
    with pytest.raises(ValueError, match="got one without a prefix, wanted one that attach_prefix was called on"):
        peft_kernels.detach_prefix(model)
    peft_kernels.attach_prefix(model)
    with pytest.raises(ValueError, match="got one with a prefix, wanted one without: call detach_prefix first"):
        peft_kernels.attach_prefix(model)
    peft_kernels.restore(model)
    with pytest.raises(RuntimeError, match="got 'sdpa', wanted 'peft_kernels', since it has a prefix"):
        model(tokens()[0])
    eager = tiny("llama")
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="0 of the 2 layers of this llama have fused attention"):
        peft_kernels.attach_prefix(eager)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    ("attention", "arguments", "message"),
    [
        ("sdpa", {"length": 0}, "length: got 0"),
        ("sdpa", {"hidden_size": -1}, "hidden_size: got -1"),
        ("sdpa", {"encoder": "mlp"}, "encoder: got a str, wanted a PrefixEncoder"),
        ("eager", {}, "have fused attention"),
    ],
    ids=["length", "hidden_size", "encoder", "attention"],
)
def test_a_refused_prefix_leaves_the_model_as_it_was(accelerated, attention, arguments, message):
    model = tiny("llama")
    model.set_attn_implementation(attention)
    if accelerated:
        peft_kernels.optimize(model.model.layers[0])

    def state():
        return (
            [(type(module), vars(module).keys(), len(module._forward_pre_hooks)) for module in model.modules()],
            [(name, p.requires_grad) for name, p in model.named_parameters()],
            model.config._attn_implementation,
        )

    before = state()
    with pytest.raises(ValueError, match=message):
        peft_kernels.attach_prefix(model, **arguments)
    assert state() == before


@pytest.mark.parametrize("name", ["num_layers", "num_heads", "head_dim", "length", "hidden_size"])
def test_encoder_refuses(name):
    sizes = {"num_layers": 2, "num_heads": 2, "head_dim": 4, "length": 3, "hidden_size": None}
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"{name}: got {bad}, wanted a positive integer"):
            PrefixEncoder(**{**sizes, name: bad})
