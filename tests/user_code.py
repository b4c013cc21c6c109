"""A user's code, to be read by type checkers: the README's, and every function and class that is public."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import assert_type

import peft_kernels
from peft_kernels import adapters, ops
from peft_kernels.adapters import AdapterConfig, AdapterReport, FusionConfig
from peft_kernels.checkpoints import CombineReport, ExportReport, MergedWeight, combine_adapters, export_checkpoint
from peft_kernels.integrations import LayerReport, Report
from peft_kernels.nn import AdapterFusion, BottleneckAdapter, LoRALinear, ParallelAdapter, PrefixEncoder, SoftPrompt
from peft_kernels.ops import AdapterWeights, ExpertStack, NF4Weight
from peft_kernels.serving import AdapterPool, LoRACheckpoint


def readme(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    callback = peft_kernels.PeftKernelsCallback(tune=60.0, exclude=["attention"], restore=True)
    print(callback.report)
    families: tuple[str, ...] = peft_kernels.FAMILIES
    report = peft_kernels.optimize(model, only=families, exclude="model.norm")
    assert_type(report, Report)
    assert_type(peft_kernels.accelerate(model), Report)
    assert_type(next(iter(report)), LayerReport)
    trained: tuple[str, ...] = peft_kernels.train_biases_only(model, ["classifier"])
    print(trained)
    peft_kernels.optimize(model, logits=False)
    peft_kernels.restore(model)
    assert_type(peft_kernels.layers.RMSNorm().forward(inputs["hidden_states"]), Tensor)
    assert_type("lora" in peft_kernels.FAMILIES, bool)

    assert_type(peft_kernels.insert_adapters(model, "pfeiffer", bottleneck=48, name="news"), AdapterReport)
    peft_kernels.set_adapter(model, "news")
    peft_kernels.set_adapter(model, None)
    model(**inputs, adapter_names=["news", "code", None])
    with peft_kernels.adapter_rows(model, ["news", "code", None]):
        model(**inputs)
    assert_type(peft_kernels.fuse_adapters(model, ["news", "code"]), str)
    peft_kernels.freeze_adapters(model, "news")
    peft_kernels.unfreeze_adapters(model)
    peft_kernels.save_adapter(model, "adapters/news", "news")
    assert_type(peft_kernels.load_adapter(model, "adapters/news", name="again"), str)
    peft_kernels.remove_adapters(model)

    settings = {"news": peft_kernels.AdapterSettings(lr=1e-4, schedule=lambda step: 1 / (1 + step))}
    with peft_kernels.AdapterTrainer(model, settings, torch.optim.AdamW) as trainer:
        assert_type(trainer.backward(["news", None], **inputs), dict[str, float])
        assert_type(trainer.evaluate([["news", None]], **inputs), dict[str, float])
        trainer.step()
        trainer.save("adapters")

    with peft_kernels.serving.AdapterPool(model, slots=16) as pool:
        assert_type(pool, AdapterPool)
        pool.load("alice", "adapters/alice")
        assert_type(pool.read("adapters/alice"), LoRACheckpoint)
        pool.swap("alice", pool.read("adapters/alice"))
        pool.generate(["alice", None], **inputs)
        with pool.batch(["alice", None]):
            model(**inputs)
        assert_type(pool.memory.slab, int)

    exported = peft_kernels.checkpoints.export_checkpoint("base", "out", ["adapters/alice"], quantize="nf4")
    assert_type(exported, ExportReport)
    assert_type(combine_adapters(["a", Path("b")], "out", "ties_svd", density=0.3, rank=16), CombineReport)
    assert_type(exported.merged_weights, tuple[MergedWeight, ...])
    export_checkpoint(Path("base"), Path("out"), dtype=torch.float16, overwrite=True)
    export_checkpoint("base", "out", ["adapters/alice"], quantize="base", correction=16, dense_above=0.5)

    for row in peft_kernels.initialize_lora(model, "loftq", "model.safetensors", iterations=3):
        assert_type(row.after, float)
    peft_kernels.merge_ia3(model)
    peft_kernels.merge_ia3(model, ["default"])
    with peft_kernels.merging.options(
        correction=16, dense_above=0.5, keep_at_most=1 << 30, beyond="recompute"
    ) as merged:
        assert_type(merged, peft_kernels.merging.Report)
    assert_type(peft_kernels.merging.load_corrections(model, model.state_dict()), int)
    assert_type(peft_kernels.merging.load_corrections(model, Path("merged")), int)

    encoder = peft_kernels.attach_prefix(model, length=32)
    assert_type(encoder, PrefixEncoder)
    torch.save(encoder.state_dict(), "prefix.pt")
    peft_kernels.attach_prefix(model, encoder, hidden_size=512)
    peft_kernels.detach_prefix(model)

    prompt = peft_kernels.attach_prompt(model, length=20, encoder="lstm", hidden_size=128)
    assert_type(prompt, SoftPrompt)
    prompt.save("prompt.safetensors")
    peft_kernels.detach_prompt(model)
    peft_kernels.attach_prompt(model, SoftPrompt.load("prompt.safetensors"))
    peft_kernels.attach_prompt(model, token_ids=[1, 2, 3])


def layers(x: Tensor) -> None:
    linear = LoRALinear(64, 32, rank=8, quantize="nf4", device="cpu", dtype=torch.bfloat16)
    assert_type(linear.base_weight(), Tensor | NF4Weight)
    assert_type(linear.merged, bool)
    linear.merge()
    linear.unmerge()
    assert_type(linear.add_adapter(4, alpha=8, rslora=True), int)
    assert_type(linear.forward(x, [0, 1, -1]), Tensor)
    assert_type(LoRALinear.from_linear(nn.Linear(64, 32), rank=8), LoRALinear)
    series, parallel = BottleneckAdapter(64, 16, "gelu"), ParallelAdapter(64, 16, scale="learned")
    assert_type(series.forward(x), Tensor)
    assert_type(series.weights(), AdapterWeights)
    assert_type(parallel.forward(x, x), Tensor)
    assert_type(SoftPrompt(20, 64, "mlp").forward(), Tensor)
    assert_type(SoftPrompt.from_tokens(nn.Embedding(100, 64), [1, 2, 3], length=20), SoftPrompt)
    assert_type(AdapterFusion(64).forward(x, [x, x]), Tensor)
    assert_type(AdapterConfig("houlsby").make(64), BottleneckAdapter)
    assert_type(FusionConfig(("news", "code")).name, str)
    assert_type("pfeiffer" in adapters.KINDS, bool)


def functions(x: Tensor, w: Tensor, index: list[int]) -> None:
    weight = ops.quantize_4bit(w, blocksize=64, double_quant=True)
    assert_type(weight, NF4Weight)
    assert_type(weight.dequantize(), Tensor)
    assert_type(ops.dequantize_4bit(weight, torch.float32), Tensor)
    assert_type(ops.dequantize_4bit_rows(weight, 0, w), Tensor)
    assert_type(ops.linear(x, w), Tensor)
    assert_type(ops.linear_cross_entropy(x, weight, x, softcap=30.0, reduction="sum"), Tensor)
    assert_type(ops.lora_linear(x, weight, None, [w], [w], [0.5], [0.1]), Tensor)
    assert_type(ops.lora_linear_grouped(x, weight, None, [w], [w], [0.5], index), Tensor)
    assert_type(ops.grouped_linear(x, weight, None, [w], [w], [0.5], x, transposed=True, rows=x), Tensor)
    stack = ExpertStack(weight, None, [w], [w], [0.5])
    assert_type(ops.experts(x, x, w, stack, stack, "silu"), Tensor)
    assert_type(ops.experts(x, x, w, (stack, stack), ExpertStack([weight], transposed=True), torch.tanh), Tensor)
    assert_type(ops.dora_linear(x, weight, None, w, w, w), Tensor)
    assert_type(ops.dora_norm(weight, w, w), Tensor)
    assert_type(ops.ia3_linear(x, weight, l_out=w), Tensor)
    assert_type(ops.ia3_attention(x, x, x, causal=True, rope=(w, w)), Tensor)
    assert_type(ops.adapter(x, w, None, w, None, activation="relu", layer_norm=(w, None, 1e-5)), Tensor)
    assert_type(ops.adapter_grouped(x, [AdapterWeights(w, None, w, None)], index), Tensor)
    assert_type(ops.bottleneck(x, w, None), Tensor)
    assert_type(ops.fusion(x, [x], w, None, w, None), Tensor)
    assert_type(ops.fusion_of_bottlenecks(x, [x], [w], [None], [1.0], w, None, w, None), Tensor)
    assert_type(ops.combine([w, w], [0.5, 1.0], "ties", density=0.2), Tensor)
    assert_type(ops.combine_products([w], [w], [2.0], [1.0]), Tensor)
    assert_type(ops.cross_entropy(x, x), Tensor)
    assert_type(ops.dropout(x, 0.1), Tensor)
    assert_type(ops.glu(x, x, "silu"), Tensor)
    assert_type(ops.rms_norm(x, w), Tensor)
    assert_type(ops.rotary(x, x, w, w), tuple[Tensor, Tensor])
    assert_type("gelu" in ops.ACTIVATIONS, bool)
