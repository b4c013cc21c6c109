"""Models that FSDP2's `fully_shard` or tensor parallelism has been called on, and parametrised layers."""

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny_models import step, tiny, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module

import peft_kernels
from peft_kernels.integrations.registry import FusedLayer
from peft_kernels.integrations.transformers import output_layer


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(model, mesh):
    for layer in model.get_decoder().layers if hasattr(model, "get_decoder") else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model.get_output_embeddings(), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fused_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, FusedLayer | output_layer.Linear)]


@pytest.mark.parametrize("order", ["optimize-shard", "shard-optimize"])
def test_restore(order, mesh):
    model = tiny("llama").eval()
    classes = [type(module) for module in model.modules()]
    ids, padding = tokens()
    real = padding.bool()
    with torch.no_grad():
        wanted = model(ids, attention_mask=padding).logits[real]
        if order == "shard-optimize":
            shard(model, mesh)
        peft_kernels.optimize(model)
        if order == "optimize-shard":
            shard(model, mesh)
        assert len(fused_layers(model)) == 2 * 5 + 2
        for _ in range(2):
            assert torch.allclose(model(ids, attention_mask=padding).logits[real], wanted, atol=1e-5)
        peft_kernels.restore(model)
        assert not fused_layers(model) and model.config._attn_implementation == "sdpa"
        assert torch.allclose(model(ids, attention_mask=padding).logits[real], wanted, atol=1e-6)
    for module, cls in zip(model.modules(), classes, strict=True):
        assert type(module) is cls or (type(module).__bases__ == (FSDPModule, cls))
    layers = model.model.layers
    assert type(layers[0]) is type(layers[1]) and type(layers[0]).__name__ == "FSDPLlamaDecoderLayer"
    peft_kernels.optimize(model)
    assert len(fused_layers(model)) == 2 * 5 + 2


def full(gradients):
    return {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in gradients.items()}


def test_report_says_what_runs(mesh):
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids, padding = tokens()
    wanted = step(model, ids, padding)
    before = [(row.name, row.kind, row.fused, row.reason) for row in peft_kernels.optimize(model)]
    shard(model.get_base_model(), mesh)
    assert before == [(row.name, row.kind, row.fused, row.reason) for row in peft_kernels.optimize(model)]
    got = full(step(model, ids, padding))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5)


def test_dense_layers(mesh, monkeypatch):
    monkeypatch.setattr("peft_kernels.cpu.outruns_torch", lambda: True)
    model = nn.Sequential(nn.Linear(512, 512))
    fully_shard(model, mesh=mesh)
    (row,) = peft_kernels.optimize(model)
    assert row.fused and row.reason == ""
    x, calls = torch.randn(96, 512), []
    function = peft_kernels.integrations.base_layer.lora_linear_unchecked
    monkeypatch.setattr(
        "peft_kernels.integrations.base_layer.lora_linear_unchecked", lambda *args: calls.append(1) or function(*args)
    )
    assert model(x).shape == x.shape and calls


def test_tensor_parallelism_is_told(mesh):
    model = tiny("llama").eval()
    ids, padding = tokens()
    plan = {
        "model.layers.*.self_attn.q_proj": ColwiseParallel(),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
    }
    with torch.no_grad():
        wanted = model(ids, attention_mask=padding).logits[padding.bool()]
        before = {row.name: row.fused for row in peft_kernels.optimize(model)}
        assert before["model.norm"] and before["lm_head"]
        parallelize_module(model, mesh, plan)
        for _ in range(2):
            report = {row.name: row.reason for row in peft_kernels.optimize(model) if not row.fused}
            assert report.pop("model.norm") == report.pop("lm_head") == "its weight is a DTensor"
            assert all("DTensor" in report[f"model.layers.{number}.self_attn.q_proj"] for number in range(2))
            got = model(ids, attention_mask=padding).logits[padding.bool()]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            peft_kernels.restore(model)


def test_parametrised_since():
    layer = tiny("llama").model.norm
    stock = type(layer)
    model = nn.Sequential(layer)
    peft_kernels.optimize(model)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    peft_kernels.restore(model)
    assert not fused_layers(model) and type(layer).__bases__ == (stock,)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is stock
