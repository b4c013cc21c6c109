"""Models whose layers are fused around their own forward, whole: language, text, images, speech; and the table of what
is fused of each, in docs/other_layers.md.

`python tests/test_transformers_models.py` writes the table anew.
"""

import copy
import sys
from collections import Counter
from pathlib import Path

import pytest
import tolerances
import torch
import transformers
from comparison import assert_close, error
from peft import LoraConfig, get_peft_model
from tiny_models import CALLING_DECODERS, CALLING_ENCODERS, END, SAME_STEP, tiny, tokens
from torch import nn

import peft_kernels
import peft_kernels.integrations.transformers.attention as integration
from peft_kernels.integrations.kinds import kind_of

DOCUMENT = Path(__file__).parent.parent / "docs/other_layers.md"
BEGIN, FINISH = "<!-- begin of the table -->\n", "<!-- end of the table -->\n"

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SIZES, "vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": END}  # fmt: skip
_IMAGES = {**_SIZES, "image_size": 16, "patch_size": 4}
_T5 = {"vocab_size": 60, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "pad_token_id": 0,
       "decoder_start_token_id": 0, "dropout_rate": 0.0}  # fmt: skip
_BART = {"vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": END, "decoder_start_token_id": 1, "dropout": 0.0}  # fmt: skip
# Further models than `tiny` makes, as configurations and the automatic classes to make them by.
_FURTHER = {
    "bart": ("bart", _BART, "Seq2SeqLM"),
    "clip": ("clip", {"text_config": _TEXT, "vision_config": _IMAGES}, ""),
    "deepseek_v3": ("deepseek_v3", {**_TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_group": 2,
                    "n_routed_experts": 4, "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 8,
                    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
                    "first_k_dense_replace": 1}, "CausalLM"),
    "dinov2": ("dinov2", _IMAGES, "ImageClassification"),
    "falcon": ("falcon", {**_TEXT, "num_kv_heads": 2, "new_decoder_architecture": True}, "CausalLM"),
    "flan-t5": ("t5", {**_T5, "feed_forward_proj": "gated-gelu"}, "Seq2SeqLM"),
    "gemma2": ("gemma2", {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}, "CausalLM"),
    "gpt_oss": ("gpt_oss", {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2,
                            "num_experts_per_tok": 1, "sliding_window": 4}, "CausalLM"),
    "siglip": ("siglip_vision_model", _IMAGES, ""),
    "t5": ("t5", _T5, "Seq2SeqLM"),
    "vit": ("vit", _IMAGES, "ImageClassification"),
    "wav2vec2": ("wav2vec2", {**_SIZES, "vocab_size": 60, "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 4,
                              "num_conv_pos_embedding_groups": 2}, "CTC"),
    "whisper": ("whisper", {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
                "SpeechSeq2Seq"),
}  # fmt: skip
MODELS = sorted([*CALLING_DECODERS, *CALLING_ENCODERS, *_FURTHER])
# transformers' experts and its masks for eager attention know no fp64.
TRAINED = [name for name in MODELS if name not in ("deepseek_v3", "gemma2", "gpt_oss")]
GENERATING = sorted(
    [*CALLING_DECODERS, "bart", "deepseek_v3", "falcon", "flan-t5", "gemma2", "gpt_oss", "t5", "whisper"]
)


def make(name: str, **changes) -> nn.Module:
    """In evaluation mode: what further models drop in training has many names."""
    if name not in _FURTHER:
        return tiny(name, **changes).eval()
    kind, fields, task = _FURTHER[name]
    auto = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")
    return auto.from_config(transformers.AutoConfig.for_model(kind, **fields | changes)).eval()


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of three samples, the first of which is padded on the left if it is text."""
    ids, padding = tokens()
    given = {"attention_mask": padding, "input_ids": ids}
    made = {
        "pixel_values": {"pixel_values": torch.randn(3, 3, 16, 16)},
        "input_features": {"input_features": torch.randn(3, 8, 32), "decoder_input_ids": ids},
        "input_values": {"input_values": torch.randn(3, 800)},
    }.get(model.main_input_name, given)
    if model.config.model_type == "clip":
        made |= {"pixel_values": torch.randn(3, 3, 16, 16)}
    if model.config.model_type in ("t5", "bart"):
        made |= {"decoder_input_ids": ids}
    return made


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model computes for what is no padding, and every gradient."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    outputs = model(**{name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()})
    found = next(outputs[name] for name in ("logits", "logits_per_image", "last_hidden_state") if name in outputs)
    padding = inputs.get("attention_mask")
    if padding is not None and found.dim() == 3 and found.shape[1] == padding.shape[1]:
        found = found[padding.bool()]
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights.to(dtype)).mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"outputs": found.detach(), **grads}


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def assert_as_near_to_fp64_as_stock(name: str, **changes) -> None:
    """In these small models a gradient can be a small difference of large numbers: Nemotron's of squared ReLUs, as
    stock computes them, err by up to 7e-4."""
    model = make(name, **changes)
    inputs = inputs_of(model)
    model = lora(model)
    exact, stock = step(copy.deepcopy(model).double(), inputs), step(model, inputs)
    peft_kernels.optimize(model)
    fused = step(model, inputs)
    assert fused.keys() == exact.keys() and len(fused) > 4
    for key, value in fused.items():
        assert error(value, exact[key]) <= SAME_STEP + 2 * error(stock[key], exact[key]), key


@pytest.mark.parametrize("name", TRAINED)
def test_trains_as_stock_does(name):
    assert_as_near_to_fp64_as_stock(name)


@pytest.mark.parametrize("name", GENERATING)
def test_generates_as_stock_does(name):
    model = make(name)
    inputs = {key: value for key, value in inputs_of(model).items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(**inputs, **options)
    peft_kernels.optimize(model)
    assert torch.equal(model.generate(**inputs, **options), wanted)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_position_bias(trained, monkeypatch):
    """The kernel takes T5's beside its masks; where it is trained, torch's attention gives its gradient."""
    model = make("t5")
    biases = [p.requires_grad_(trained) for name, p in model.named_parameters() if "relative_attention_bias" in name]
    inputs = inputs_of(model)
    wanted = step(model, inputs)
    report = peft_kernels.optimize(model)
    calls, function = [], integration.ia3_attention
    monkeypatch.setattr(integration, "ia3_attention", lambda *a, **k: calls.append(k["attn_mask"]) or function(*a, **k))
    for key, value in step(model, inputs).items():
        assert error(value, wanted[key]) <= SAME_STEP, key
    assert len(calls) == (2 if trained else 6)  # the cross-attention's are zeros
    left = {row.reason for row in report.left_alone if row.kind == "transformers.T5Attention"}
    assert left == ({"its position bias is trained, for which the kernel has no gradient"} if trained else set())
    assert all((bias.grad is not None) == trained for bias in biases)


def test_gemma_of_both_directions():
    assert_as_near_to_fp64_as_stock("gemma3", use_bidirectional_attention=True)


# ---- The report -------------------------------------------------------------------------------------------------


def reasons_of(model: nn.Module) -> dict[str, str]:
    """By class."""
    return {row.kind.partition(".")[2]: row.reason for row in peft_kernels.optimize(model).left_alone}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_alone_has_a_reason(name):
    unknown = [kind for kind, reason in reasons_of(make(name)).items() if reason == "this class has no fused form"]
    assert unknown == {"cohere": ["CohereLayerNorm"], "cohere2": ["Cohere2LayerNorm"]}.get(name, [])


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("deepseek_v3", "DeepseekV3Attention", "its keys and values differ in size"),
        ("falcon", "FalconAttention", "it computes attention itself, and not by a function of transformers' registry"),
        ("gemma2", "Gemma2Attention", "its scores are capped by a tanh (softcap)"),
        ("gpt_oss", "GptOssAttention", "its softmax has a learned sink"),
        ("t5", "T5Attention", "its position bias is trained"),
        ("vit", "ViTMLP", "it has no gate"),
        ("distilbert", "FFN", "it has no gate"),
        ("olmo", "OlmoLayerNorm", "torch has it as one operation"),
        ("gpt_oss", "GptOssTopKRouter", "it is a product of few columns and a choice among them"),
    ],
)
def test_reasons(name, kind, reason):
    assert reasons_of(make(name))[kind].startswith(reason)


def test_attention_without_what_the_reason_says():
    assert reasons_of(make("gemma2", attn_logit_softcapping=None))["Gemma2Attention"].startswith(
        "its attention is 'eager'"
    )
    model = make("deepseek_v3", v_head_dim=12)
    inputs = inputs_of(model)
    with torch.no_grad():
        wanted = model(**inputs).logits
        assert "DeepseekV3Attention" not in reasons_of(model)
        real = inputs["attention_mask"].bool()
        assert error(model(**inputs).logits[real], wanted[real]) <= SAME_STEP


def test_a_window_that_the_layer_does_not_pass():
    """Phimoe's attention is Llama's, which knows of no window, and its masks have one."""
    config = transformers.PhimoeConfig(**_TEXT, num_key_value_heads=2, num_local_experts=2, sliding_window=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids, _ = tokens()
    with torch.no_grad():
        wanted = model(ids).logits
        reasons = reasons_of(model)
        assert error(model(ids).logits, wanted) <= SAME_STEP
    assert reasons["PhimoeAttention"] == "its model has a sliding window, and the layer does not say so"


def test_prefixes_are_for_models_that_hand_them_down():
    """Nemotron's layers would be called without one."""
    with pytest.raises(ValueError, match="0 of the 2 layers of this nemotron have fused attention with prefixes"):
        peft_kernels.attach_prefix(make("nemotron"), length=3)


# ---- Falcon's linear layer ----------------------------------------------------------------------------------------


def test_lora_on_falcons_linear_layer():
    model = lora(make("falcon"))
    report = peft_kernels.optimize(model)
    fused = [row for row in report.fused if row.kind == "peft.Linear"]
    assert len(fused) == 8 and not [row for row in report.left_alone if row.kind == "peft.Linear"]


def test_falcons_linear_layer_in_fp32(monkeypatch):
    monkeypatch.setattr("peft_kernels.cpu.outruns_torch", lambda: True)
    calls = []
    function = peft_kernels.integrations.base_layer.lora_linear_unchecked
    monkeypatch.setattr(
        "peft_kernels.integrations.base_layer.lora_linear_unchecked", lambda *a: calls.append(a) or function(*a)
    )
    model = nn.Sequential(transformers.models.falcon.modeling_falcon.FalconLinear(512, 512))
    x = torch.randn(96, 512)
    wanted = copy.deepcopy(model).double()(x.double())
    (row,) = peft_kernels.optimize(model)
    assert row.kind == "transformers.FalconLinear" and row.fused
    assert_close(model(x), wanted, tolerances.FP32_SUM)
    assert len(calls) == 1


# ---- The table ----------------------------------------------------------------------------------------------------


def row_of(name: str) -> list[str]:
    model = make(name).requires_grad_(False)
    counts = {"attention": Counter(), "norm": Counter(), "MLP": Counter()}
    report = {row.name: row for row in peft_kernels.optimize(model)}
    for module_name, module in model.named_modules():
        kind = kind_of(module)
        if kind in counts and not report[module_name].kind.startswith("torch."):
            counts[kind][report[module_name].fused] += 1
    shares = [f"{of[True]} of {of.total()}" if of else "" for of in counts.values()]
    left = [row.kind for row in report.values() if not row.fused and row.kind.startswith("transformers.")]
    return [name, *shares, ", ".join(kind.partition(".")[2] for kind in dict.fromkeys(left))]


def table() -> str:
    headings = ["model", "attention", "norms", "MLPs", "left to stock"]
    lines = [headings, ["---"] * len(headings), *map(row_of, MODELS)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def test_table_is_what_the_document_says():
    assert DOCUMENT.read_text().split(BEGIN)[1].split(FINISH)[0] == table(), f"run `python tests/{Path(__file__).name}`"


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text.split(BEGIN)[0] + BEGIN + table() + FINISH + text.split(FINISH)[1])
    print(f"Written: {DOCUMENT}", file=sys.stderr)
