"""The report of models of many architectures: each attention, norm, MLP and linear layer is fused, or named with a
reason."""

import pytest
import torch
import transformers
from torch import nn

import peft_kernels
from peft_kernels.integrations.kinds import kind_of

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SIZES, "vocab_size": 60, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_VISION = {**_SIZES, "image_size": 8, "patch_size": 4}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 60,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_ENDS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
# A configuration of each architecture, and the classes that are to be named beside torch's.
ARCHITECTURES = {
    "llama": (_LLAMA, "LlamaAttention LlamaRMSNorm LlamaMLP"),
    "mistral": (_LLAMA, "MistralAttention MistralRMSNorm MistralMLP"),
    "mixtral": (_LLAMA | {"num_local_experts": 2}, "MixtralAttention MixtralRMSNorm MixtralExperts"),
    "qwen2": (_LLAMA, "Qwen2Attention Qwen2RMSNorm Qwen2MLP"),
    "qwen3": (_LLAMA, "Qwen3Attention Qwen3RMSNorm Qwen3MLP"),
    "gemma": (_LLAMA, "GemmaAttention GemmaRMSNorm GemmaMLP"),
    "gemma2": (_LLAMA, "Gemma2Attention Gemma2RMSNorm Gemma2MLP"),
    "gemma3_text": (_LLAMA, "Gemma3Attention Gemma3RMSNorm Gemma3MLP"),
    "phi": (_TEXT, "PhiAttention PhiMLP"),
    "phi3": (_LLAMA, "Phi3Attention Phi3RMSNorm Phi3MLP"),
    "olmo2": (_LLAMA, "Olmo2Attention Olmo2RMSNorm Olmo2MLP"),
    "gpt2": (_ENDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "GPT2Attention GPT2MLP Conv1D"),
    "opt": (_TEXT | {"word_embed_proj_dim": 32, "ffn_dim": 48}, "OPTAttention"),
    "bloom": (_ENDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "BloomAttention BloomMLP"),
    "falcon": (_TEXT, "FalconAttention FalconMLP FalconLinear"),
    "gpt_neox": (_TEXT, "GPTNeoXAttention GPTNeoXMLP"),
    "bert": (_TEXT, "BertSelfAttention BertIntermediate"),
    "roberta": (_TEXT, "RobertaSelfAttention RobertaIntermediate"),
    "distilbert": (
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 60}, "DistilBertSelfAttention FFN",
    ),
    "t5": (
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60},
        "T5Attention T5LayerNorm T5DenseActDense",
    ),
    "bart": (_BART, "BartAttention"),
    "vit": (_VISION, "ViTAttention ViTMLP"),
    "whisper": (_BART | {"num_mel_bins": 4, "max_source_positions": 8}, "WhisperAttention"),
    "clip": ({"text_config": _TEXT, "vision_config": _VISION}, "CLIPAttention CLIPMLP"),
}  # fmt: skip
_NO_LAYERS = (nn.Embedding, nn.Conv1d, nn.Conv2d)


def make(name: str) -> nn.Module:
    config = transformers.AutoConfig.for_model(name, **ARCHITECTURES[name][0])
    return transformers.AutoModel.from_config(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_is_named(name):
    model = make(name)
    classes = {module_name: type(module).__name__ for module_name, module in model.named_modules()}
    with_parameters = {
        module_name
        for module_name, module in model.named_modules()
        if "weight" in module._parameters and not isinstance(module, _NO_LAYERS)
    }
    report = peft_kernels.optimize(model)
    rows = {row.name: row for row in report}
    assert with_parameters <= rows.keys()
    for class_name in ARCHITECTURES[name][1].split():
        of_class = [module_name for module_name, of in classes.items() if of == class_name]
        assert of_class and rows.keys() >= set(of_class), class_name
    for row in rows.values():
        assert row.fused or row.reason, row
    missing = [module_name for module_name, module in model.named_modules() if kind_of(module)]
    assert rows.keys() >= set(missing)


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_attention_without_a_fused_form_is_counted(name):
    report = peft_kernels.optimize(make(name))
    rows = [row for row in report.left_alone if "Attention" in row.kind]
    reason = "it computes attention itself, and not by a function of transformers' registry"
    assert len(rows) == 2 and {row.reason for row in rows} == {reason}
    assert ", 0 left alone" not in repr(report)


def test_parts_of_other_layers_are_not_named():
    """Around an attention there may be a module with its name; an adapter's layers go by themselves."""
    model = make("bert")
    peft_kernels.insert_adapters(model, "pfeiffer", bottleneck=4)
    report = peft_kernels.optimize(model)
    assert not [row for row in report if row.kind.endswith("BertAttention") or "news" in row.name]
    adapters = [f"{name}." for name, module in model.named_modules() if "peft_kernels.nn" in type(module).__module__]
    assert adapters and not [row for row in report if row.name.startswith(tuple(adapters))]


def test_what_torch_has_is_named():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1))
    rows = list(peft_kernels.optimize(model))
    assert [(row.kind, row.fused) for row in rows] == [
        ("torch.LayerNorm", False), ("torch.Linear", False), ("torch.BatchNorm1d", False),
    ]  # fmt: skip
    assert rows[0].reason == rows[2].reason == "torch has it as one operation"
    assert model(torch.randn(2, 4, 4)).shape == (2, 4, 4)
