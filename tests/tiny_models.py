"""Tiny random language models of transformers, and a step of stock compared with one of the accelerated model."""

import torch
from optional import if_installed
from reports import missed
from torch import Tensor, nn

import peft_kernels

transformers = if_installed("transformers")

VOCABULARY, PADDING, END = 60, 0, 2

# With the names that each configuration gives the sizes; and nothing random in training.
_GPT2 = {"n_embd": "hidden", "n_inner": "intermediate", "n_layer": 2, "n_head": 4, "n_positions": 64,
         "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # fmt: skip
_LLAMA = {"hidden_size": "hidden", "intermediate_size": "intermediate", "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
_BERT = {"hidden_size": "hidden", "intermediate_size": "intermediate", "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 66, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}  # fmt: skip
_CONFIGS = {
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 16}),
    "granite": ("GraniteConfig", _LLAMA),
    "gpt2": ("GPT2Config", _GPT2),
    "opt": ("OPTConfig", {
        "hidden_size": "hidden", "word_embed_proj_dim": "hidden", "ffn_dim": "intermediate", "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0,
    }),
    "bert": ("BertConfig", _BERT),
    "roberta": ("RobertaConfig", _BERT),
}  # fmt: skip
# Further ones whose attention is that of one above.
_LOOKALIKES = {
    "arcee": ("ArceeConfig", _LLAMA),
    "electra": ("ElectraConfig", {**_BERT, "embedding_size": "hidden"}),
    "gemma": ("GemmaConfig", {**_LLAMA, "head_dim": 8}),
    "ministral": ("MinistralConfig", {**_LLAMA, "head_dim": 8, "sliding_window": 4}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 2, "sliding_window": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_LLAMA, "head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1,
                                     "moe_intermediate_size": "intermediate"}),
}  # fmt: skip

# Those whose attention differs from that of the ones above in what is around the function that is called.
_SMALL_LLAMA = {**_LLAMA, "head_dim": 8}
_MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_CALLERS = {
    "cohere": ("CohereConfig", {**_LLAMA, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {**_LLAMA, **_MIXED}),
    "exaone4": ("Exaone4Config", {**_LLAMA, "sliding_window": 4, "sliding_window_pattern": 2}),
    "gemma3": ("Gemma3TextConfig", {**_SMALL_LLAMA, **_MIXED}),
    "glm4": ("Glm4Config", _SMALL_LLAMA),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "gptj": ("GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "lfm2": ("Lfm2Config", {**_LLAMA, "layer_types": ["conv", "full_attention"]}),
    "nemotron": ("NemotronConfig", _SMALL_LLAMA),
    "olmo": ("OlmoConfig", {**_LLAMA, "clip_qkv": 0.1}),
    "olmo2": ("Olmo2Config", _LLAMA),
    "olmo3": ("Olmo3Config", {**_LLAMA, **_MIXED}),
    "persimmon": ("PersimmonConfig", {**_NEOX, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "phi": ("PhiConfig", _LLAMA),
    "phi3": ("Phi3Config", {**_LLAMA, "sliding_window": 4}),
    "smollm3": ("SmolLM3Config", {**_LLAMA, "no_rope_layers": [1, 0]}),
    "stablelm": ("StableLmConfig", {**_LLAMA, "attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "starcoder2": ("Starcoder2Config", {**_LLAMA, "sliding_window": 4}),
    "albert": ("AlbertConfig", {**_BERT, "embedding_size": 16, "classifier_dropout_prob": 0.0}),
    "distilbert": ("DistilBertConfig", {"dim": "hidden", "hidden_dim": "intermediate", "n_layers": 2, "n_heads": 4,
                                        "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0,
                                        "seq_classif_dropout": 0.0}),
    "esm": ("EsmConfig", {**_BERT, "mask_token_id": 3}),
    "modernbert": ("ModernBertConfig", {"hidden_size": "hidden", "intermediate_size": "intermediate",
                                        "num_hidden_layers": 2, "num_attention_heads": 4, "local_attention": 4,
                                        "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}),
}  # fmt: skip

ENCODERS = ["bert", "roberta"]
CALLING_ENCODERS = ["albert", "distilbert", "esm", "modernbert"]
CALLING_DECODERS = [name for name in _CALLERS if name not in CALLING_ENCODERS]
DECODERS = [name for name in _CONFIGS if name not in ENCODERS]
LOOKALIKE_ENCODERS = ["electra"]
LOOKALIKE_DECODERS = [name for name in _LOOKALIKES if name not in LOOKALIKE_ENCODERS]


def tiny(name: str, hidden: int = 32, intermediate: int = 48, **config) -> nn.Module:
    """A causal language model, or a classifier if it is an encoder; in training mode."""
    kind, fields = (_CONFIGS | _LOOKALIKES | _CALLERS)[name]
    make = getattr(transformers, kind)
    sizes = {"hidden": hidden, "intermediate": intermediate}
    fields = {key: sizes[value] if value in (*sizes,) else value for key, value in fields.items()} | config
    config = make(vocab_size=VOCABULARY, pad_token_id=PADDING, bos_token_id=1, eos_token_id=END, **fields)
    is_encoder = name in [*ENCODERS, *LOOKALIKE_ENCODERS, *CALLING_ENCODERS]
    auto = transformers.AutoModelForSequenceClassification if is_encoder else transformers.AutoModelForCausalLM
    return auto.from_config(config).train()


def tokens(batch: int = 3, length: int = 9) -> tuple[Tensor, Tensor]:
    """Token ids and their padding mask; a part of the rows is padded on the left."""
    ids = torch.randint(3, VOCABULARY, (batch, length))
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    padding[2, :1] = 0
    return ids, padding


def step(model: nn.Module, ids: Tensor, padding: Tensor | None) -> dict[str, Tensor]:
    """The loss, the logits of what is no padding, and every gradient, by name."""
    model.zero_grad()
    classifies = "SequenceClassification" in type(model.get_base_model()).__name__
    labels = ids[:, 0] % 2 if classifies else ids
    outputs = model(input_ids=ids, attention_mask=padding, labels=labels)
    outputs.loss.backward()
    logits = outputs.logits.detach()
    if padding is not None and not classifies:
        logits = logits[padding.bool()]
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": outputs.loss.detach(), "logits": logits, **grads}


# Of two steps in fp32: against fp64, over a dozen seeds, stock's gradients err by up to 2e-5, and the accelerated
# model's by up to 3.3e-5. A product in bf16 would show as 4e-3.
SAME_STEP = 1e-4


def assert_same(actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = SAME_STEP) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        difference = (actual[name] - value).norm()
        assert difference <= tolerance * value.norm() + 1e-9, f"{name}: {difference / value.norm()}"


def assert_same_steps(model: nn.Module, ids: Tensor, padding: Tensor) -> peft_kernels.integrations.Report:
    """Accelerates a model, and compares its steps with and without padding with stock's.

    Every layer that can be has to be fused.
    """
    wanted = [step(model, ids, mask) for mask in (padding, None)]
    report = peft_kernels.optimize(model)
    assert not missed(report)
    for mask, want in zip((padding, None), wanted, strict=True):
        assert_same(step(model, ids, mask), want)
    return report


def greedy(model: nn.Module, ids: Tensor, padding: Tensor, count: int) -> Tensor:
    """Greedy decoding by whole forwards: what generation with any cache has to give."""
    ended = torch.zeros(len(ids), 1, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(count):
            positions = (padding.cumsum(1) - 1).masked_fill(padding == 0, 0)
            logits = model(input_ids=ids, attention_mask=padding, position_ids=positions).logits
            token = logits[:, -1].argmax(-1, keepdim=True).masked_fill(ended, PADDING)
            ended |= token == END
            ids = torch.cat([ids, token], 1)
            padding = torch.cat([padding, torch.ones_like(token)], 1)
            if ended.all():
                break
    return ids
