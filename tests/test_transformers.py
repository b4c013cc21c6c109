"""The fused attention of transformers' models: masks, caches, generation, and the ways back to torch's."""

import copy
import pickle

import pytest
import torch
import transformers
from decoding_models import make
from peft import LoraConfig, get_peft_model
from tiny_models import DECODERS, ENCODERS, assert_same, assert_same_steps, step, tiny, tokens
from transformers import StaticCache

import peft_kernels
import peft_kernels.integrations.transformers.attention as integration


def lora(model, **config):
    config |= {"target_modules": "all-linear", "fan_in_fan_out": model.config.model_type == "gpt2"}
    task = "SEQ_CLS" if model.config.model_type in ENCODERS else "CAUSAL_LM"
    model = get_peft_model(model, LoraConfig(r=2, task_type=task, init_lora_weights=False, **config))
    return model.train()


def attention_rows(report):
    return [layer for layer in report if "Attention" in layer.kind]


def accelerated(model):
    peft_kernels.optimize(model)
    return model


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_trains_as_stock_does(name):
    report = assert_same_steps(lora(tiny(name)), *tokens())
    assert len(attention_rows(report)) == 2


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no-cache"])
def test_generates_as_stock_does(name, options):
    model = tiny(name).eval()
    ids, padding = tokens()
    options = {"attention_mask": padding, "max_new_tokens": 8, "do_sample": False, **options}
    wanted = model.generate(ids, **options)
    assert torch.equal(accelerated(model).generate(ids, **options), wanted)


@pytest.mark.parametrize("window", [3, 5, 30])
@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_sliding_window(name, window):
    config = {"use_sliding_window": True, "max_window_layers": 1} if name == "qwen2" else {}
    model = tiny(name, sliding_window=window, **config).eval()
    ids, padding = tokens()
    with torch.no_grad():
        wanted = [model(ids, mask).logits for mask in (None, padding)]
        generated = model.generate(ids, attention_mask=padding, max_new_tokens=8, do_sample=False)
        peft_kernels.optimize(model)
        assert torch.allclose(model(ids).logits, wanted[0], atol=1e-5)
        real = padding.bool()
        assert torch.allclose(model(ids, padding).logits[real], wanted[1][real], atol=1e-5)
    assert torch.equal(model.generate(ids, attention_mask=padding, max_new_tokens=8, do_sample=False), generated)


def test_masks_of_other_kinds():
    """Packed sequences, a static cache, prefill in chunks, and masks that the caller made."""
    model = tiny("llama").eval()
    ids, padding = tokens()
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] & padding.bool()[:, None, None]
    additive = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    packed = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 1])[None].expand(3, -1)

    def results():
        with torch.no_grad():
            cache = StaticCache(config=model.config, max_cache_len=16)
            static = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 2], 1)]
            outputs = model(ids[:, :4], use_cache=True)
            chunk = model(ids[:, 4:], past_key_values=outputs.past_key_values, attention_mask=torch.ones(3, 9)).logits
            real = padding.bool()
            return [model(ids, position_ids=packed).logits, torch.cat(static, 1), chunk,
                    model(ids, causal).logits[real], model(ids, additive).logits[real]]  # fmt: skip

    wanted = results()
    peft_kernels.optimize(model)
    for got, want in zip(results(), wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-5)


def test_padding_is_not_dropped():
    model = accelerated(tiny("llama").eval())
    ids, padding = tokens()
    other = torch.where(padding.bool(), ids, 5)
    with torch.no_grad():
        assert torch.equal(model(ids, padding).logits[padding.bool()], model(other, padding).logits[padding.bool()])
        assert not torch.equal(model(ids).logits, model(ids, padding).logits)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant):
    model = lora(tiny("llama"))
    ids, padding = tokens()
    peft_kernels.optimize(model)
    wanted = step(model, ids, padding)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(step(model, ids, padding), wanted)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_attention_dropout(name):
    option = {"llama": "attention_dropout", "bert": "attention_probs_dropout_prob"}[name]
    model = tiny(name, **{option: 0.5})
    ids, padding = tokens()
    assert all(layer.fused for layer in attention_rows(peft_kernels.optimize(model)))

    def logits(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(ids, padding).logits

    assert torch.equal(logits(3), logits(3)) and not torch.equal(logits(3), logits(4))
    dropped = logits(3)
    model.eval()
    assert torch.equal(logits(3), logits(4)) and not torch.equal(logits(3), dropped)


def test_attention_dropout_of_one_takes_torchs_attention():
    model = tiny("llama", attention_dropout=1.0)
    ids, padding = tokens()
    wanted = model(ids, padding).logits
    assert torch.allclose(accelerated(model)(ids, padding).logits, wanted, atol=1e-5)


def test_older_versions_are_left_alone(monkeypatch):
    monkeypatch.setattr(integration, "sdpa_mask", lambda batch_size, cache_position: None)
    model = tiny("llama")
    report = attention_rows(peft_kernels.optimize(model))
    assert all("asks for masks in another way" in layer.reason for layer in report)
    assert model.config._attn_implementation == "sdpa"


def test_other_implementations_are_left_alone():
    model = tiny("llama")
    model.set_attn_implementation("eager")
    report = peft_kernels.optimize(model)
    assert {layer.reason for layer in attention_rows(report)} == {"its attention is 'eager', not 'sdpa'"}
    assert model.config._attn_implementation == "eager"
    # Chosen afterwards, it is what counts.
    model.set_attn_implementation("sdpa")
    peft_kernels.optimize(model)
    model.set_attn_implementation("eager")
    report = peft_kernels.optimize(model)
    assert {layer.reason for layer in attention_rows(report)} == {"its attention is now 'eager'"}
    assert model(tokens()[0], output_attentions=True).attentions[0].shape == (3, 4, 9, 9)


def test_restore_copy_pickle_and_save(tmp_path):
    model = tiny("llama").eval()
    stock = type(model.model.layers[0].self_attn)
    ids, padding = tokens()
    wanted = model(ids, padding).logits
    peft_kernels.optimize(model)
    fused = model(ids, padding).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids, padding).logits, fused)
    model.save_pretrained(tmp_path)
    assert "peft_kernels" not in (tmp_path / "config.json").read_text()
    peft_kernels.restore(model)
    assert type(model.model.layers[0].self_attn) is stock and model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids, padding).logits, wanted)


def test_autocast():
    model = tiny("llama").eval()
    ids, padding = tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(ids, padding).logits
        got = accelerated(model)(ids, padding).logits
    assert got.dtype == wanted.dtype
    real = padding.bool()
    assert torch.allclose(got[real].float(), wanted[real].float(), atol=2e-2)


@pytest.mark.skipif(
    not hasattr(transformers, "ContinuousBatchingConfig"), reason="a version of transformers without it"
)
def test_continuous_batching_takes_the_models_own_attention():
    model = make(base="dense")
    prompts = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17]]
    settings = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    cache = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)

    def generate():
        found = model.get_base_model().generate_batch(prompts, settings, cache)
        return [output.generated_tokens for output in found.values()]

    wanted = generate()
    peft_kernels.optimize(model, exclude="attention")
    assert generate() == wanted
    peft_kernels.optimize(model)
    with pytest.raises(ValueError, match="Implementation peft_kernels is not supported"):
        generate()
