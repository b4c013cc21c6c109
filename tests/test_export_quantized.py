"""Exports in 4 bits, and of them: bit for bit what bitsandbytes and transformers make of the same weights."""

import json

import pytest
import torch
from export_models import (
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
from optional import if_installed

from peft_kernels.checkpoints import export_checkpoint

bnb, peft, transformers = map(if_installed, ("bitsandbytes", "peft", "transformers"))

# bitsandbytes dequantises on a CPU as if no block straddled rows, so that the sizes are multiples of 64.
GPT2 = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}


def by_bitsandbytes(folder, **options):
    """A dense checkpoint, quantised by transformers while it is loaded."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | options
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options)
    return load(folder, torch.bfloat16, quantization_config=config, device_map="cpu")


def stored_in_4_bits(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def same_tensors(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert actual[name].dtype is tensor.dtype and torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(
    ("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)], ids=["nf4-nested", "nf4", "fp4"]
)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_quantized(tmp_path, kind, quant_type, double_quant):
    """The files have the tensors that bitsandbytes serialises, and transformers loads them as they are."""
    base = save_base(tmp_path / "base", kind, hidden=64, intermediate=128)
    options = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double_quant}
    wanted = by_bitsandbytes(base, **options)
    wanted.save_pretrained(tmp_path / "wanted")
    report = export_checkpoint(
        base, tmp_path / "out", quantize=quant_type, double_quant=double_quant, max_shard_size=20_000
    )
    assert report.quantized > 7 and report.files > 2 and report.merged == 0
    same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "wanted"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.nbytes
    assert report.nbytes == sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values())
    assert index["weight_map"].keys() == tensors(tmp_path / "out").keys()
    described, stock_config = (json.loads((tmp_path / f"{one}/config.json").read_text()) for one in ("out", "wanted"))
    ours, theirs = described["quantization_config"], stock_config["quantization_config"]
    assert theirs.keys() <= ours.keys() and {name for name in theirs if ours[name] != theirs[name]} <= {
        "llm_int8_skip_modules"  # which the stock one leaves to the version of transformers that loads it
    }
    loaded, problems = load(tmp_path / "out", torch.bfloat16, device_map="cpu", output_loading_info=True)
    assert not any(problems.values()), problems
    same_tensors(loaded.state_dict(), wanted.state_dict())
    assert torch.equal(logits(loaded), logits(wanted))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_and_quantized(tmp_path, kind):
    base = save_base(tmp_path / "base", kind, hidden=64, intermediate=128)
    adapter = save_adapter(base, tmp_path / "adapter", **GPT2 if kind == "gpt2" else {"use_dora": True})
    export_checkpoint(base, tmp_path / "dense", [adapter])
    export_checkpoint(base, tmp_path / "out", [adapter], quantize="nf4", blocksize=64)
    same_tensors(load(tmp_path / "out", torch.bfloat16, device_map="cpu").state_dict(),
                 by_bitsandbytes(tmp_path / "dense").state_dict())  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
def test_dequantized(tmp_path, kind, double_quant):
    """A checkpoint that bitsandbytes wrote, with its values in 16 bits, and once more in 4."""
    model = by_bitsandbytes(
        save_base(tmp_path / "base", kind, hidden=64, intermediate=128), bnb_4bit_use_double_quant=double_quant
    )
    model.save_pretrained(tmp_path / "4bit")
    report = export_checkpoint(tmp_path / "4bit", tmp_path / "out")
    assert report.dequantized > 7 and report.quantized == 0
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    dense = load(tmp_path / "out", torch.bfloat16)
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            wanted = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            weight = dense.get_submodule(name).weight
            assert torch.equal(weight.T if kind == "gpt2" else weight, wanted), name
    report = export_checkpoint(tmp_path / "4bit", tmp_path / "again", quantize="nf4", double_quant=double_quant)
    assert report.dequantized == 0 and report.quantized > 7
    same_tensors(tensors(tmp_path / "again"), tensors(tmp_path / "4bit"))
    (tmp_path / "other").mkdir()
    export_checkpoint(tmp_path / "4bit", tmp_path / "other", quantize="nf4", double_quant=not double_quant)
    again = by_bitsandbytes(tmp_path / "out", bnb_4bit_use_double_quant=not double_quant)
    same_tensors(load(tmp_path / "other", torch.bfloat16, device_map="cpu").state_dict(), again.state_dict())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_qlora_is_merged_into_what_it_was_trained_on(tmp_path, kind):
    by_bitsandbytes(save_base(tmp_path / "base", kind, hidden=64, intermediate=128)).save_pretrained(tmp_path / "4bit")
    export_checkpoint(tmp_path / "4bit", tmp_path / "dense")
    adapter = save_adapter(tmp_path / "dense", tmp_path / "adapter", **GPT2 if kind == "gpt2" else {})
    export_checkpoint(tmp_path / "4bit", tmp_path / "out", [adapter])
    exact, stored = effective(stock(tmp_path / "dense", adapter)), tensors(tmp_path / "out")
    for name, wanted in exact.items():
        assert_rounded_once(stored[name], wanted, name)
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "dense").keys()


def test_what_stays_dense(tmp_path):
    base = save_base(tmp_path / "base")
    export_checkpoint(base, tmp_path / "out", quantize="nf4", skip_modules=["v_proj", "model.layers.0"])
    stored = tensors(tmp_path / "out")
    for name, tensor in stored.items():
        if name.endswith("proj.weight"):
            assert (tensor.dtype is torch.bfloat16) == ("v_proj" in name or "layers.0" in name), name
    loaded = load(tmp_path / "out", torch.bfloat16, device_map="cpu")
    same_tensors(loaded.state_dict(), stored)
