"""Attention of models on a GPU: torch's attention is called with exactly what stock calls it with, but for a prefix.

The CPU plays the GPU: attention goes there as on a device that is not taken over, with numbers that can be compared.
"""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from attention_cases import on_gpu_plan
from comparison import DTYPES, error, short
from decoding_models import with_cache
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from tiny_models import DECODERS, ENCODERS, LOOKALIKE_DECODERS, LOOKALIKE_ENCODERS, tiny, tokens
from transformers import DynamicCache, StaticCache

import peft_kernels
import peft_kernels.integrations.transformers.attention as integration

LENGTH = 5  # of a prefix
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


@contextmanager
def recorded():
    """The arguments of each call of torch's attention."""
    attention, calls = F.scaled_dot_product_attention, []

    def record(*args, **options):
        calls.append(DEFAULTS | dict(zip(ARGUMENTS, args, strict=False)) | options)
        return attention(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", record)
        yield calls


def calls_of(scenario, model) -> list[dict]:
    with recorded() as calls:
        run(scenario, model)
    return calls


def layout(tensor):
    """All but the values; where there is but one of something, its stride means nothing."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return tensor.shape, strides, tensor.dtype, tensor.requires_grad


def assert_same_calls(actual, wanted) -> None:
    assert len(actual) == len(wanted) > 0
    for got, want in zip(actual, wanted, strict=True):
        for name in ARGUMENTS:
            if not isinstance(want[name], torch.Tensor):
                assert got[name] == want[name], name
                continue
            assert layout(got[name]) == layout(want[name]), name
            if name == "attn_mask":
                assert torch.equal(got[name], want[name])
            else:  # a fused rotary embedding rounds otherwise
                torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


# ---- What is asked of a model -----------------------------------------------------------------------------------


def causal(model):
    return model(tokens()[0]).logits


def padded(model):
    ids, padding = tokens()
    logits = model(ids, attention_mask=padding).logits
    return logits if logits.dim() == 2 else torch.where(padding[..., None].bool(), logits, 0)


def padded_on_the_right(model):
    ids, padding = tokens()
    logits = model(ids, attention_mask=padding.flip(1)).logits
    return logits if logits.dim() == 2 else torch.where(padding.flip(1)[..., None].bool(), logits, 0)


def training(model):
    with torch.enable_grad():
        logits = model.train()(tokens()[0]).logits
        logits.square().mean().backward()
    model.eval().zero_grad()
    return logits.detach()


def packed(model):
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    return model(tokens()[0][:1], position_ids=positions, use_cache=False).logits


def static_cache(model):
    cache = StaticCache(config=model.config, max_cache_len=16)
    return torch.cat([model(part, cache=cache).logits for part in tokens()[0].split([5, 1, 3], 1)], 1)


def chunks(model):
    ids, padding = tokens()
    first = model(ids[:, :4], attention_mask=padding[:, :4], use_cache=True)
    cache = first.get("cache", first.get("past_key_values"))
    second = model(ids[:, 4:8], attention_mask=torch.ones(3, 8), cache=cache).logits
    return torch.cat([second, model(ids[:, 8:], attention_mask=torch.ones(3, 9), cache=cache).logits], 1)


def decoding(model):
    """One token at a time after a padded prompt."""
    (ids, padding), cache, logits = tokens(), DynamicCache(), []
    for begin, end in ((0, 7), (7, 8), (8, 9)):
        logits.append(model(ids[:, begin:end], attention_mask=padding[:, :end], **with_cache(cache)).logits)
    return torch.where(padding[..., None].bool(), torch.cat(logits, 1), 0)


def own_mask(model):
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(3, -1, -1, -1)
    return model(tokens()[0], attention_mask=mask, position_ids=torch.arange(9)[None]).logits


OF_ENCODERS = [causal, padded, padded_on_the_right, training]
SCENARIOS = [*OF_ENCODERS, packed, static_cache, chunks, decoding, own_mask]
WINDOWED = {
    "mistral-short": ("mistral", {"sliding_window": 4}),
    "mistral-long": ("mistral", {"sliding_window": 30}),
    "qwen2-one-layer": ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}),
}
HEADS_AND_DROPOUT = {
    "llama-heads": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-dropout": ("llama", {"attention_dropout": 0.3}),
    "gpt2-dropout": ("gpt2", {"attn_pdrop": 0.3}),
    "bert-dropout": ("bert", {"attention_probs_dropout_prob": 0.3}),
}
ALL = [*DECODERS, *ENCODERS, *LOOKALIKE_DECODERS, *LOOKALIKE_ENCODERS]
MODELS = {name: (name, {}) for name in ALL} | WINDOWED | HEADS_AND_DROPOUT


def is_encoder(name):
    return MODELS[name][0] in [*ENCODERS, *LOOKALIKE_ENCODERS]


def cases_of(names):
    return [(name, scenario) for name in names for scenario in (OF_ENCODERS if is_encoder(name) else SCENARIOS)]


CASES = cases_of(MODELS)


def case_id(value) -> str:
    return value if isinstance(value, str) else value.__name__


cases = pytest.mark.parametrize(("name", "scenario"), CASES, ids=case_id)


def run(scenario, model):
    torch.manual_seed(1)
    with torch.no_grad():
        return scenario(model)


def make(name):
    name, config = MODELS[name]
    return tiny(name, **config).eval()


@pytest.fixture
def gpu(monkeypatch):
    """Has the CPU pass for a device that is not taken over."""
    monkeypatch.setattr(integration, "takes_over", lambda device: False)
    on_gpu_plan(monkeypatch)


# ---- Without a prefix -------------------------------------------------------------------------------------------


@cases
def test_torch_gets_what_it_gets_in_stock(name, scenario, gpu):
    model = make(name)
    wanted = calls_of(scenario, model)
    report = peft_kernels.optimize(model)
    assert model.config._attn_implementation == "sdpa", "nothing would be gained by another one"
    assert_same_calls(calls_of(scenario, model), wanted)
    (reason,) = {row.reason for row in report if "Attention" in row.kind}
    rotates = not is_encoder(name) and MODELS[name][0] not in ("gpt2", "opt")
    assert reason == ("its rotary embedding" if rotates else "on cpu torch's attention is the fast one")


def with_lora(model):
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def with_ia3(model):
    model = get_peft_model(model, IA3Config())  # on keys, values and the feed-forward block
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize("scenario", [causal, padded, training, chunks, decoding], ids=case_id)
@pytest.mark.parametrize("adapted", [with_lora, with_ia3], ids=case_id)
@pytest.mark.parametrize("name", ["llama", "mistral-short", "gpt2"])
def test_adapters_leave_it_alone(name, adapted, scenario, gpu):
    """(IA)³'s vectors of keys and values belong to linear layers: no attention takes them."""
    model = adapted(make(name)).eval()
    wanted, numbers = calls_of(scenario, model), run(scenario, model)
    report = peft_kernels.optimize(model)
    assert any(row.kind.startswith("peft.") and row.fused for row in report)
    assert_same_calls(calls_of(scenario, model), wanted)
    torch.testing.assert_close(run(scenario, model), numbers, rtol=1e-4, atol=1e-5)


@cases
def test_model_that_is_moved_afterwards(name, scenario, request):
    model = make(name)
    wanted = calls_of(scenario, model)
    peft_kernels.optimize(model)
    assert model.config._attn_implementation == integration.NAME
    assert not calls_of(scenario, model), "on the CPU the attention is this package's"
    request.getfixturevalue("gpu")
    assert_same_calls(calls_of(scenario, model), wanted)
    peft_kernels.restore(model)
    assert model.config._attn_implementation == "sdpa"
    assert_same_calls(calls_of(scenario, model), wanted)


@pytest.mark.parametrize("first_on_gpu", [False, True], ids=["cpu-gpu", "gpu-cpu"])
@pytest.mark.parametrize(("name", "scenario"), cases_of([*DECODERS, *ENCODERS, *WINDOWED]), ids=case_id)
def test_layers_on_two_devices_share_a_mask(name, scenario, first_on_gpu, monkeypatch):
    model = make(name)
    on_gpu = [first_on_gpu]  # of the layer that runs, or where the model makes its mask
    monkeypatch.setattr(integration, "takes_over", lambda device: not on_gpu[-1])
    wanted = run(scenario, model)
    on_gpu[-1] = False
    peft_kernels.optimize(model)
    on_gpu[-1] = first_on_gpu
    layers = [module for module in model.modules() if isinstance(module, integration.FusedAttention)]
    for layer, device in zip(layers, (first_on_gpu, not first_on_gpu), strict=True):
        layer.register_forward_pre_hook(lambda *_, device=device: on_gpu.append(device))
        layer.register_forward_hook(lambda *_: on_gpu.remove(on_gpu[-1]))
    with recorded() as calls:
        got = run(scenario, model)
    assert calls and torch.allclose(got, wanted, atol=1e-5)


def test_what_is_taken_over():
    takes_over = {name: integration.takes_over(torch.device(name)) for name in ("cpu", "meta", "cuda", "cuda:1", "xpu")}
    assert takes_over == {"cpu": True, "meta": True, "cuda": False, "cuda:1": False, "xpu": False}


def test_model_that_comes_back(gpu, monkeypatch):
    model = make("llama")
    peft_kernels.optimize(model)
    monkeypatch.undo()
    (reason,) = {row.reason for row in peft_kernels.optimize(model) if row.kind.endswith("LlamaAttention")}
    assert reason == "" and model.config._attn_implementation == integration.NAME
    assert not calls_of(causal, model)


# ---- With a prefix ----------------------------------------------------------------------------------------------

PREFIXED = pytest.mark.parametrize(
    ("name", "scenario"),
    [case for case in CASES if case[0] in ("llama", "gpt2", "bert", "mistral-short") and case[1] is not packed],
    ids=case_id,
)


@PREFIXED
def test_prefix_is_seen_with_the_smallest_mask(name, scenario, request):
    model = make(name)
    peft_kernels.attach_prefix(model, length=LENGTH)
    wanted = run(scenario, model)
    request.getfixturevalue("gpu")
    with recorded() as calls:
        torch.testing.assert_close(run(scenario, model), wanted, rtol=1e-4, atol=1e-5)
    assert calls
    for call in calls:
        query, key, mask = call["query"], call["key"], call["attn_mask"]
        assert not call["is_causal"], "torch's is_causal would hide the prefix"
        groups = query.shape[1] // key.shape[1]
        if mask is None:
            assert name == "bert" or query.shape[2] == 1
            assert call["enable_gqa"] == (groups > 1) and (groups > 1) == (name in ("llama", "mistral-short"))
        else:
            assert mask.dtype is torch.bool and mask.shape[1] == 1 and mask.shape[-1] == key.shape[2]
            assert mask.shape[0] == 1 or scenario is not causal or name == "mistral-short", "causality alone"
            assert groups == 1, "with a mask, torch's fast kernels know no groups"
    maskless = [("bert", causal), ("bert", training), ("llama", chunks), ("gpt2", chunks)]
    assert any(call["attn_mask"] is None for call in calls) == ((name, scenario) in maskless)


@pytest.mark.parametrize("scenario", [causal, padded], ids=case_id)
def test_prefix_of_peft(scenario, gpu):
    stock = make("llama")
    wanted = calls_of(scenario, stock)
    model = get_peft_model(stock, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    (row, *_) = peft_kernels.optimize(model)
    assert row.kind == "peft.PeftModelForCausalLM" and row.fused
    assert stock.config._attn_implementation == integration.NAME
    ids, padding = tokens()
    with recorded() as calls:
        model(input_ids=ids, attention_mask=padding)
    assert {call["key"].shape[2] for call in calls} == {LENGTH + ids.shape[1]}
    with model.disable_adapter():
        assert_same_calls(calls_of(scenario, stock), wanted)
    peft_kernels.restore(model)
    assert stock.config._attn_implementation == "sdpa"
    assert_same_calls(calls_of(scenario, stock), wanted)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_who_runs_a_prefix(backend, dtype, gpu):
    """In fp32 torch's attention does, given keys with the prefix before them; else this package's kernel. Both are as
    right as stock, which has the prefix in its cache."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    model, (ids, padding) = get_peft_model(make("llama"), config).eval(), tokens()

    def logits():
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=padding).logits[padding.bool()]

    exact = logits()
    model.to(dtype)
    stock = logits()
    peft_kernels.optimize(model)
    with recorded() as calls:
        ours = logits()
    assert len(calls) == (2 if dtype is torch.float32 else 0)
    assert error(ours, exact) <= 1.2 * error(stock, exact) + 1e-6
