"""Soft prompts of this package's: prompt tuning and P-Tuning, compared with PEFT's forwards and with whole forwards."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny_models import DECODERS, END, PADDING, VOCABULARY, assert_same, greedy, tiny, tokens
from torch import nn
from transformers import GenerationConfig, StaticCache, T5Config, T5ForConditionalGeneration

import peft_kernels
from peft_kernels.nn import SoftPrompt
from peft_kernels.nn.soft_prompt import prepend

LENGTH = 5
KINDS = {"direct": {}, "mlp": {"encoder": "mlp", "hidden_size": 16}, "lstm": {"encoder": "lstm", "hidden_size": 16}}


def peft_model(base, kind):
    task = "SEQ_CLS" if base.config.model_type == "bert" else "CAUSAL_LM"
    options = {"task_type": task, "num_virtual_tokens": LENGTH}
    if kind == "direct":
        return get_peft_model(base, PromptTuningConfig(**options))
    return get_peft_model(
        base,
        PromptEncoderConfig(encoder_reparameterization_type=kind.upper(), encoder_hidden_size=16, **options),
    )


def prompted(name, kind="direct", **options):
    """A model whose prompt is large enough to change the tokens that are generated."""
    model = tiny(name).eval()
    prompt = peft_kernels.attach_prompt(model, length=LENGTH, **KINDS[kind] | options)
    nn.init.normal_(prompt.embedding.weight)
    return model


# ---- Forward and backward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "direct"), ("llama", "mlp"), ("gpt2", "lstm"), ("opt", "direct"), ("qwen3", "mlp"), ("bert", "direct")],
)
def test_is_pefts(name, kind, accelerated):
    theirs = peft_model(tiny(name), kind)
    ours = copy.deepcopy(theirs.get_base_model())
    prompt = peft_kernels.attach_prompt(ours, length=LENGTH, **KINDS[kind])
    prompt.load_state_dict(theirs.prompt_encoder["default"].state_dict())
    if accelerated:
        peft_kernels.optimize(ours)
    ours.get_base_model = lambda: ours
    ids, padding = tokens()
    for mask in (padding, padding.flip(1), None):
        wanted, got = (outcome(model, ids, mask) for model in (theirs, ours))
        wanted = {key.replace("prompt_encoder.default", "soft_prompt"): value for key, value in wanted.items()}
        assert_same(got, {key: value for key, value in wanted.items() if "classifier" not in key})


def outcome(model, ids, mask):
    """As `step`, of a model whose logits have further positions."""
    model.zero_grad()
    labels = ids[:, 0] % 2 if "Sequence" in type(model.get_base_model()).__name__ else ids
    outputs = model(input_ids=ids, attention_mask=mask, labels=labels)
    outputs.loss.backward()
    logits = outputs.logits.detach()
    if mask is not None and logits.dim() == 3:
        logits = logits[nn.functional.pad(mask, (LENGTH, 0), value=1).bool()]
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": outputs.loss.detach(), "logits": logits, **grads}


def test_is_the_only_trainable_part():
    model = prompted("llama", "lstm")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"soft_prompt.{name}" for name, _ in model.soft_prompt.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_embeddings_do_as_ids_do(name):
    model = prompted(name)
    ids, padding = tokens()
    embeds = model.get_input_embeddings()(ids)
    wanted = model(ids, attention_mask=padding, labels=ids)
    got = model(inputs_embeds=embeds, attention_mask=padding, labels=ids)
    assert torch.equal(got.logits, wanted.logits) and torch.equal(got.loss, wanted.loss)
    assert wanted.logits.shape[:2] == (3, LENGTH + 9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_of_padded_rows(name):
    """With positions that count no padding, a row gives the same beside longer ones as alone, padded left or right."""
    model = prompted(name)
    ids = torch.randint(3, VOCABULARY, (1, 6))
    wanted = model(ids).logits
    for pad, where in (((3, 0), slice(3, None)), ((0, 3), slice(0, 6))):
        padded, mask = (nn.functional.pad(t, pad) for t in (ids, torch.ones_like(ids)))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(padded, attention_mask=mask, position_ids=positions).logits
        assert torch.allclose(logits[:, :LENGTH], wanted[:, :LENGTH], atol=1e-5)
        assert torch.allclose(logits[:, LENGTH:][:, where], wanted[:, LENGTH:], atol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_classifier_of_the_last_token(padding):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60, pad_token_id=0
    )
    model = LlamaForSequenceClassification(config).eval()
    peft_kernels.attach_prompt(model, length=LENGTH)
    ids = torch.randint(3, VOCABULARY, (1, 6))
    wanted = model(ids).logits
    pad = (3, 0) if padding == "left" else (0, 3)
    padded, mask = (nn.functional.pad(t, pad) for t in (ids, torch.ones_like(ids)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(got, wanted, atol=1e-5)


def test_model_without_a_head_gives_the_tokens_states():
    model = tiny("llama").eval()
    wanted = model.model
    peft_kernels.attach_prompt(model.model, length=LENGTH)
    ids, padding = tokens()
    outputs = wanted(ids, attention_mask=padding)
    assert outputs.last_hidden_state.shape == (3, 9, 32)
    assert torch.equal(wanted(ids, attention_mask=padding, return_dict=False)[0], outputs.last_hidden_state)
    cache = wanted(ids[:, :5], use_cache=True).past_key_values
    rest = wanted(ids[:, 5:], past_key_values=cache).last_hidden_state
    assert torch.allclose(rest, wanted(ids).last_hidden_state[:, 5:], atol=1e-5)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(LENGTH, 8), (2, LENGTH, 8)], ids=["one", "each"])
def test_prepend(shape, dtype, trained):
    embedding = nn.Embedding(20, 8, dtype=dtype).requires_grad_(trained)
    prompt, ids = torch.randn(shape, requires_grad=True), torch.randint(20, (2, 3))
    wanted = torch.cat((prompt.expand(2, -1, -1).to(dtype), embedding(ids)), 1)
    grad = torch.randn_like(wanted)
    inputs = [prompt, *(embedding.parameters() if trained else ())]
    for found in (prepend(prompt, ids, embedding), prepend(prompt, embedding(ids), embedding)):
        assert torch.equal(found, wanted)
        for got, want in zip(
            torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad, True), strict=True
        ):
            torch.testing.assert_close(got, want)


def test_frozen_embeddings_are_written_once():
    """The look-up makes the result: no second tensor of its size is."""
    embedding, sizes = nn.Embedding(20, 64).requires_grad_(False), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point() and not function.is_view:
                sizes.append((function.__name__, out.numel()))
            return out

    with Sizes():
        prepend(torch.randn(5, 64), torch.zeros(4, 30, dtype=torch.int64), embedding)
    assert [name for name, size in sizes if size >= 4 * 35 * 64] == ["embedding.default"]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant):
    model = prompted("llama", "mlp").train()
    model.get_base_model = lambda: model
    ids, padding = tokens()
    wanted = outcome(model, ids, padding)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(outcome(model, ids, padding), wanted)


# ---- Generation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "accelerated"),
    [("llama", False), ("gpt2", False), ("opt", False), *((name, True) for name in DECODERS)],
    ids=lambda value: {True: "accelerated", False: "stock"}.get(value, value),
)
def test_generates_as_forwards_do(name, accelerated):
    model = prompted(name)
    if accelerated:
        peft_kernels.optimize(model)
    ids, padding = tokens()
    wanted = greedy(model, ids, padding, 6)
    options = {"attention_mask": padding, "do_sample": False}
    assert torch.equal(model.generate(ids, max_new_tokens=6, **options), wanted)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, use_cache=False, **options), wanted)
    static = model.generate(ids, max_new_tokens=6, cache_implementation="static", **options)
    assert torch.equal(static, wanted)
    beams = model.generate(ids, max_new_tokens=4, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, max_new_tokens=4, num_beams=3, use_cache=False, **options))


def test_generation_from_embeddings_returns_new_tokens():
    model = prompted("llama")
    ids, padding = tokens()
    wanted = greedy(model, ids, padding, 6)
    embeds = model.get_input_embeddings()(ids)
    options = {"attention_mask": padding, "do_sample": False}
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=6, **options), wanted[:, 9:])
    assert torch.equal(model.generate(ids, inputs_embeds=embeds, max_new_tokens=6, **options), wanted)


def test_lengths_and_padding_mean_what_they_do_without_a_prompt():
    model = prompted("llama")
    model.generation_config.eos_token_id = None
    ids, padding = tokens()
    ids = ids.masked_fill(padding == 0, PADDING)
    wanted = model.generate(ids, attention_mask=padding, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, max_length=15, do_sample=False), wanted)
    config = GenerationConfig(max_length=15, do_sample=False, pad_token_id=PADDING)
    assert torch.equal(model.generate(ids, config), wanted)
    embeds = model.get_input_embeddings()(ids)
    new = model.generate(inputs_embeds=embeds, attention_mask=padding, max_length=15, do_sample=False)
    assert torch.equal(new, wanted[:, 9:])
    model.generation_config.eos_token_id = END
    least = model.generate(ids, attention_mask=padding, max_length=15, min_length=15, do_sample=False)
    assert least.shape == (3, 15) and not (least[:, 9:] == END).any()


def test_cache_of_an_earlier_generation_goes_on():
    model = prompted("llama")
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, VOCABULARY, (2, 6))
    first = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, torch.randint(3, VOCABULARY, (2, 2))), 1)
    got = model.generate(longer, max_new_tokens=4, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(got, model.generate(longer, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_forwards_with_a_cache(name):
    model = prompted(name)
    ids, padding = tokens()
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    wanted = model(ids, attention_mask=padding, position_ids=positions).logits[:, LENGTH:]
    outputs = model(ids[:, :5], attention_mask=padding[:, :5], position_ids=positions[:, :5], use_cache=True)
    rest = model(
        ids[:, 5:], attention_mask=padding, position_ids=positions[:, 5:], past_key_values=outputs.past_key_values
    )
    got = torch.cat((outputs.logits[:, LENGTH:], rest.logits), 1)
    assert torch.allclose(got[padding.bool()], wanted[padding.bool()], atol=1e-5)
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(ids[:, :5], past_key_values=cache)
    assert torch.allclose(
        model(ids[:, 5:], past_key_values=cache).logits, model(ids).logits[:, LENGTH + 5 :], atol=1e-5
    )
    with pytest.raises(ValueError, match="attention_mask: got one of 8 tokens, wanted 9: those in the cache, and"):
        cache = model(ids[:, :5], use_cache=True).past_key_values
        model(ids[:, 5:], attention_mask=padding[:, :8], past_key_values=cache)


# ---- What it begins with, and files ------------------------------------------------------------------------------


class Tokenizer:
    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [3 + len(word) for word in text.split()]}


@pytest.mark.parametrize("length", [None, 2, 7])
def test_begins_with_a_text(length):
    model = tiny("llama").bfloat16()
    prompt = peft_kernels.attach_prompt(model, text="so it is", tokenizer=Tokenizer(), length=length)
    ids = torch.tensor(([5, 5, 5] * 3)[: length or 3])
    wanted = model.get_input_embeddings()(ids).float()
    assert torch.equal(prompt(), wanted) and prompt.embedding.weight.dtype is torch.float32
    other = SoftPrompt.from_tokens(model.get_input_embeddings(), ids)
    assert torch.equal(other(), wanted)


def test_begins_at_random_within_the_papers_bounds():
    weight = SoftPrompt(100, 8).embedding.weight
    assert weight.abs().max() <= 0.5 and weight.std() > 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model = prompted("llama", kind)
    path = tmp_path / "prompt.safetensors"
    model.soft_prompt.save(path)
    loaded = SoftPrompt.load(path)
    assert loaded.extra_repr() == model.soft_prompt.extra_repr()
    assert torch.equal(loaded(), model.soft_prompt())
    ids, _ = tokens()
    wanted = model(ids).logits
    peft_kernels.detach_prompt(model)
    peft_kernels.attach_prompt(model, loaded)
    assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_loads_what_peft_saves(kind, tmp_path):
    theirs = peft_model(tiny("llama"), kind).eval()
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(theirs.get_base_model())
    peft_kernels.attach_prompt(ours, SoftPrompt.load(tmp_path / "adapter_model.safetensors"))
    ids, _ = tokens()
    torch.testing.assert_close(ours(ids).logits, theirs(input_ids=ids).logits)


def test_detach_copy_and_pickle():
    model = tiny("llama").eval()
    ids, _ = tokens()
    without, names = model(ids).logits, set(vars(model))
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    nn.init.normal_(peft_kernels.attach_prompt(model, length=LENGTH).embedding.weight)
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, model(ids).logits)
        nn.init.normal_(other.soft_prompt.embedding.weight, std=3)
        assert not torch.equal(other(ids).logits, model(ids).logits)
        assert torch.equal(other.generate(ids, max_new_tokens=4, do_sample=False), greedy_of(other, ids))
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)
    peft_kernels.detach_prompt(model)
    assert torch.equal(model(ids).logits, without) and set(vars(model)) == names
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)


def greedy_of(model, ids):
    return greedy(model, ids, torch.ones_like(ids), 4)


def test_beside_lora():
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    ids, padding = tokens()
    peft_kernels.optimize(model)
    nn.init.normal_(peft_kernels.attach_prompt(model, length=LENGTH).embedding.weight)
    options = {"attention_mask": padding, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(input_ids=ids, **options), greedy(model, ids, padding, 4))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["soft_prompt.embedding.weight"]


# ---- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length: got 0, wanted a positive integer"),
        ({"length": -1, "token_ids": [3]}, "length: got -1, wanted a positive integer"),
        ({"length": 64}, "prompt: got 64 virtual tokens, wanted fewer than the model's 64 positions"),
        ({"text": " ", "tokenizer": Tokenizer()}, "text: got ' ', wanted a text that is not empty"),
        ({"text": "so"}, "tokenizer: got None, wanted the model's tokenizer"),
        ({"tokenizer": Tokenizer()}, "tokenizer: got one without a text"),
        ({"token_ids": []}, "token_ids: got"),
        ({"token_ids": [1, 60]}, "token_ids: got ids from 1 to 60, wanted ids from 0 to 59"),
        ({"token_ids": [1.5]}, "token_ids: got"),
        ({"token_ids": [3], "encoder": "mlp"}, "encoder: got it together with token_ids"),
        ({"encoder": "gru"}, "encoder: got 'gru', wanted 'mlp', 'lstm' or None"),
        ({"hidden_size": 3}, "hidden_size: got 3, wanted None"),
        ({"prompt": SoftPrompt(3, 16)}, "prompt: got one of width 16, wanted one of width 32, as the model's"),
        ({"prompt": SoftPrompt(3, 32), "length": 4}, "length: got 4, wanted None, since prompt has 3 tokens"),
        ({"prompt": "mlp"}, "prompt: got a str, wanted a SoftPrompt"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_refused_and_unchanged(arguments, message):
    model = tiny("gpt2")
    before = [(name, p.requires_grad) for name, p in model.named_parameters()], set(vars(model))
    with pytest.raises(ValueError, match=message):
        peft_kernels.attach_prompt(model, **arguments)
    assert ([(name, p.requires_grad) for name, p in model.named_parameters()], set(vars(model))) == before
    assert not model._forward_pre_hooks


def test_one_prompt_or_prefix_at_a_time():
    model = tiny("llama")
    peft_kernels.attach_prompt(model)
    for attach in (peft_kernels.attach_prompt, peft_kernels.attach_prefix):
        with pytest.raises(ValueError, match=r"model: got one with a soft prompt, wanted .*: call detach_prompt first"):
            attach(model)
    peft_kernels.detach_prompt(model)
    peft_kernels.attach_prefix(model)
    with pytest.raises(ValueError, match="model: got one with a prefix, wanted one without: call detach_prefix first"):
        peft_kernels.attach_prompt(model)
    with pytest.raises(ValueError, match="got one without a soft prompt"):
        peft_kernels.detach_prompt(model)
    theirs = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    for attach in (peft_kernels.attach_prompt, peft_kernels.attach_prefix):
        with pytest.raises(ValueError, match="model: got one with PEFT's PREFIX_TUNING, wanted one whose tokens"):
            attach(theirs)


def test_models_that_can_have_none():
    with pytest.raises(ValueError, match="model: got a Linear, wanted a transformers"):
        peft_kernels.attach_prompt(nn.Linear(2, 2))
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=60))
    with pytest.raises(ValueError, match="which has an encoder and a decoder"):
        peft_kernels.attach_prompt(t5)


@pytest.mark.parametrize(("name", "most"), [("gpt2", 64), ("opt", 64), ("llama", None), ("roberta", 65)])
def test_positions_of_the_model(name, most):
    model = tiny(name).eval()
    peft_kernels.attach_prompt(model, length=LENGTH)
    fits = (most or 70) - LENGTH
    padding = nn.functional.pad(torch.ones(1, fits, dtype=torch.int64), (3, 0))
    model(torch.full((1, fits), 5))
    if most is not None:
        with pytest.raises(ValueError, match=f"input_ids: got sequences that end at position {most + 1} with a prompt"):
            model(torch.full((1, fits + 1), 5))
    if name != "roberta":  # whose positions count padding where it is given embeddings
        positions = (padding.cumsum(1) - 1).clamp(min=0)
        model(torch.full((1, fits + 3), 5), attention_mask=padding, position_ids=positions)
    if name == "opt":
        model(torch.full((1, fits + 3), 5), attention_mask=padding)


def test_inputs_that_do_not_fit():
    model = prompted("llama")
    ids, _ = tokens()
    with pytest.raises(ValueError, match=r"inputs_embeds: got a tensor \[3, 9, 16\], wanted one \[B, S, 32\]"):
        model(inputs_embeds=torch.randn(3, 9, 16))
    with pytest.raises(ValueError, match="input_ids: got both, wanted it or inputs_embeds"):
        model(ids, inputs_embeds=torch.randn(3, 9, 32))
    with pytest.raises(ValueError, match="attention_mask: got Tensor of 4 dimensions"):
        model(ids, attention_mask=torch.ones(3, 1, 9, 9))
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens: got 3, wanted None, since the model has a soft"):
        model.generate(ids, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="inputs: got None, wanted token ids"):
        model.generate(max_new_tokens=3)


def test_files_that_are_no_prompts(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("other", "text"):
        with pytest.raises(ValueError, match=f"path: got .*{name}"):
            SoftPrompt.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError):
        SoftPrompt.load(tmp_path / "absent.safetensors")
