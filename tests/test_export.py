"""Exported checkpoints: their weights against the unmerged model's, in fp64, and bit for bit against bitsandbytes'."""

import json
import subprocess
import sys

import pytest
import torch
from comparison import DTYPES, assert_close, short
from export_models import (
    LINEAR,
    assert_rounded_once,
    contents,
    effective,
    load,
    logits,
    save_adapter,
    save_base,
    stock,
    tensors,
)
from moe_models import tiny_moe
from optional import if_installed
from safetensors.torch import save_file
from tolerances import merged_logits
from torch import nn

from peft_kernels.checkpoints import export_checkpoint

bnb, peft, transformers = map(if_installed, ("bitsandbytes", "peft", "transformers"))

EVERYTHING = [*LINEAR, "embed_tokens", "lm_head"]
CASES = {
    "plain": ("llama", {}, {}),
    "rslora": ("llama", {}, {"use_rslora": True}),
    "patterns": ("llama", {}, {"rank_pattern": {"1.mlp.up_proj": 7, "q_proj": 1}, "alpha_pattern": {"v_proj": 9}}),
    "dora": ("llama", {}, {"use_dora": True}),
    "biases": ("qwen2", {}, {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}),
    "trained biases": ("qwen2", {}, {"bias": "all"}),
    "conv1d": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "lora_bias": True}),
    "conv1d dora": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    # The last layer's kind decides which fan_in_fan_out PEFT writes, and the one before is square.
    "conv1d and linear": ("gpt2", {"tie_word_embeddings": False}, {"target_modules": ["attn.c_proj", "lm_head"]}),
    "embeddings": ("llama", {}, {"target_modules": EVERYTHING}),
    "embeddings dora": ("llama", {}, {"target_modules": EVERYTHING, "use_dora": True}),
    "saved modules": ("llama", {}, {"modules_to_save": ["model.norm", "lm_head", "embed_tokens"]}),
    "untied by embeddings": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}),
    "untied by the head": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["lm_head"]}),
    "untied by a module": ("llama", {"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}),
}  # fmt: skip


def check(tmp_path, base, *adapters, moved=(), **options):
    """Exports, and compares every tensor with the unmerged model's; returns the folder."""
    report = export_checkpoint(base, tmp_path / "out", adapters, **options)
    model = stock(base, *adapters)
    exact, stored = effective(model), tensors(tmp_path / "out")
    before = tensors(base)
    assert report.merged >= len([name for name in exact if name.endswith("weight") and name not in moved]) > 0
    for name, tensor in stored.items():
        if name in exact:
            assert_rounded_once(tensor, exact.pop(name), name)
        elif name in before and name.startswith("model.layers") and "experts" not in name and "bias" not in name:
            assert torch.equal(tensor, before[name]), name
    assert exact.keys() <= set(moved), exact.keys()
    loaded, problems = load(tmp_path / "out", output_loading_info=True)
    assert not any(problems.values()), problems
    assert_close(logits(loaded.eval()), logits(model), merged_logits(next(iter(stored.values())).dtype))
    return tmp_path / "out"


@pytest.mark.parametrize("name", CASES)
def test_every_form_of_lora(name, tmp_path):
    kind, config, options = CASES[name]
    base = save_base(tmp_path / "base", kind, **config)
    out = check(tmp_path, base, save_adapter(base, tmp_path / "adapter", **options))
    described, before = json.loads((out / "config.json").read_text()), json.loads((base / "config.json").read_text())
    changed = {"tie_word_embeddings"} if name.startswith("untied") else set()
    assert {entry for entry in before if described[entry] != before[entry]} == changed


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_sum_is_rounded_once(tmp_path, dtype):
    base = save_base(tmp_path / "base", dtype=dtype)
    adapters = [save_adapter(base, tmp_path / f"{seed}", seed=seed, r=seed) for seed in (2, 3)]
    check(tmp_path, base, *adapters)


def test_weights_of_adapters(tmp_path):
    base = save_base(tmp_path / "base")
    adapters = [save_adapter(base, tmp_path / f"{seed}", seed=seed, use_dora=seed == 3) for seed in (2, 3)]
    export_checkpoint(base, tmp_path / "out", adapters, weights=[0.5, -2])
    before, stored = tensors(base), tensors(tmp_path / "out")
    alone = [effective(stock(base, adapter)) for adapter in adapters]
    for name in alone[0]:
        exact = before[name].double()
        exact = exact + 0.5 * (alone[0][name] - exact) - 2 * (alone[1][name] - exact)
        assert_rounded_once(stored[name], exact, name)


def test_tied_embeddings_that_stay_tied(tmp_path):
    """PEFT trains one adapter for both, and writes it twice."""
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    out = check(tmp_path, base, save_adapter(base, tmp_path / "adapter", **options), moved=["lm_head.weight"])
    assert "lm_head.weight" not in tensors(out) and json.loads((out / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_ia3(tmp_path, kind):
    base = save_base(tmp_path / "base", kind)
    gpt2 = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True}
    llama = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    config = peft.IA3Config(**gpt2 if kind == "gpt2" else llama)
    adapters = [save_adapter(base, tmp_path / f"{seed}", config, seed=seed) for seed in (1, 2)]
    check(tmp_path, base, *adapters)


@pytest.mark.parametrize(
    ("name", "config"),
    [("mixtral", {}), ("qwen3_moe", {}), ("gpt_oss", {}), ("gpt_oss", {"intermediate_size": 64}), ("granitemoe", {})],
    ids=["mixtral", "qwen3_moe", "gpt_oss", "square gpt_oss", "granitemoe"],
)
def test_experts(tmp_path, name, config):
    """The files have the experts one by one, or in stacks of either order."""
    base = save_base(tmp_path / "base", tiny_moe(name, **config))
    options = {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 2},
    }
    adapter = save_adapter(base, tmp_path / "adapter", **options)
    report = export_checkpoint(base, tmp_path / "out", [adapter])
    model = stock(base, adapter)
    exact, stored = effective(model), dict(load(tmp_path / "out", dtype=torch.bfloat16).named_parameters())
    assert report.merged >= 6
    for parameter, wanted in exact.items():
        assert_rounded_once(stored[parameter].detach(), wanted, parameter)


class Convolutions(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self):
        super().__init__()
        self.flat, self.square = nn.Conv1d(6, 8, 3), nn.Conv2d(6, 8, (3, 2))
        self.point, self.grouped, self.lin = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 3, groups=2), nn.Linear(8, 5)

    def forward(self, x):
        return x


def save_convolutions(folder, targets, **options):
    torch.manual_seed(0)
    model = Convolutions()
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.save_pretrained(folder / "adapter")
    return model


def test_convolutions(tmp_path):
    model = save_convolutions(tmp_path, ["flat", "square", "point", "lin"])
    export_checkpoint(tmp_path, tmp_path / "out", [tmp_path / "adapter"])
    exact = model.double().merge_and_unload().state_dict()
    for name, tensor in tensors(tmp_path / "out").items():
        assert_rounded_once(tensor, exact[name], name)


@pytest.mark.parametrize("options", [{"target_modules": ["grouped"]}, {"target_modules": ["flat"], "use_dora": True}])
def test_convolutions_that_are_refused(tmp_path, options):
    save_convolutions(tmp_path, options.pop("target_modules"), **options)
    with pytest.raises(ValueError, match="that do not fit:\n"):
        export_checkpoint(tmp_path, tmp_path / "out", [tmp_path / "adapter"])


def test_dense_weights_need_neither_transformers_nor_peft(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    code = (
        "import sys; sys.modules |= dict.fromkeys(['transformers', 'peft', 'bitsandbytes']);"
        "from peft_kernels.checkpoints import export_checkpoint;"
        "base, out, adapter = sys.argv[1:]; print(export_checkpoint(base, out, [adapter]).merged);"
        "export_checkpoint(base, out + '4', quantize='nf4')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, base, tmp_path / "out", adapter], capture_output=True, text=True
    )
    assert result.stdout == "14\n" and result.stderr.endswith(
        "ModuleNotFoundError: needs transformers, which knows the layers of a model: pip install transformers\n"
    )
    export_checkpoint(base, tmp_path / "whole", [adapter])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out4").exists()


@pytest.mark.parametrize("quantize", [None, "nf4"], ids=["dense", "nf4"])
def test_names_of_another_version_of_transformers(tmp_path, quantize):
    """Files of models for images and text have the names of before transformers 5."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**sizes, **tokens, "rope_parameters": rope}, vision_config=vision, **tokens
    )
    base = save_base(tmp_path / "base", transformers.Qwen2VLForConditionalGeneration(config))
    kind = transformers.Qwen2VLForConditionalGeneration
    model = kind.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "qkv"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    report = export_checkpoint(base, tmp_path / "out", [tmp_path / "adapter"], quantize=quantize)
    assert report.merged == 5
    if quantize:
        assert report.quantized == 2 * 7 + 6
        loaded, problems = kind.from_pretrained(tmp_path / "out", device_map="cpu", output_loading_info=True)
        assert not any(problems.values()), problems
        assert type(loaded.get_submodule("model.language_model.layers.1.mlp.up_proj")) is bnb.nn.Linear4bit
    else:
        stored = kind.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
        for name, wanted in effective(model.double()).items():
            assert_rounded_once(stored[name], wanted, name)
