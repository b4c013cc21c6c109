"""Accelerated layers in compiled code and in exported programs: one graph, for any number of rows."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from decoding_models import quantised
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from peft_models import IN_FEATURES, OneLayer, base_layer, layer_of, linear4bit, lora_model, randomize
from test_peft import FP32
from tiny_models import tiny
from torch import nn

import peft_kernels
from peft_kernels.nn import LoRALinear

ROWS = (12, 1, 8, 9, 1024)  # the first is exported for, and there are others on both sides of `cpu.FEW_ROWS`
KINDS = ("dense", "conv1d", "4bit")


def two_adapters(kind):
    model = lora_model(kind)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lin"], fan_in_fan_out=kind == "conv1d"))
    randomize(model)
    model.base_model.set_adapter(["default", "other"])
    return layer_of(model)


def ia3(kind, feedforward):
    config = IA3Config(target_modules=["lin"], feedforward_modules=["lin"] if feedforward else [])
    config.fan_in_fan_out = kind == "conv1d"
    layer = layer_of(get_peft_model(OneLayer(base_layer(kind, torch.float32)), config))
    nn.init.normal_(layer.ia3_l["default"])
    return layer


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        model.config.use_cache = False

    def forward(self, ids):
        return self.model(ids).logits


def llama(kind, **config):
    model = tiny("llama", hidden=64, intermediate=128, max_position_embeddings=2048, **config)
    if kind == "4bit":
        model = quantised(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    randomize(model)
    return Logits(model)


def prefix():
    model = tiny("llama", hidden=64, intermediate=128, max_position_embeddings=2048, num_hidden_layers=1)
    return Logits(get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")))


def output_layer():
    model = tiny("llama", num_hidden_layers=1)
    peft_kernels.optimize(model)
    return nn.Sequential(nn.Linear(IN_FEATURES, 32), model.lm_head)


LAYERS = {
    **{f"lora-{kind}": lambda kind=kind: layer_of(lora_model(kind)) for kind in KINDS},
    "two-dense": lambda: two_adapters("dense"),
    **{f"dora-{kind}": lambda kind=kind: layer_of(lora_model(kind, use_dora=True)) for kind in KINDS},
    **{f"dora-dropout-{kind}": lambda kind=kind: layer_of(lora_model(kind, use_dora=True, lora_dropout=0.1))
       for kind in ("dense", "4bit")},
    **{f"ia3-{kind}": lambda kind=kind: ia3(kind, False) for kind in KINDS},
    "ia3-in-dense": lambda: ia3("dense", True),
    "4bit": linear4bit,
    "fp4": lambda: linear4bit(quant_type="fp4", compress_statistics=False),
    "4bit-in-16": lambda: linear4bit(quant_storage=torch.bfloat16),
    "LoRALinear": lambda: LoRALinear(IN_FEATURES, 96, 4),
    "LoRALinear-nf4": lambda: LoRALinear(IN_FEATURES, 96, 4, quantize="nf4", double_quant=True),
    "output": output_layer,
    "linear": lambda: nn.Linear(IN_FEATURES, 8192),  # for `test_products_that_outrun_torch`
}  # fmt: skip
MODELS = {
    "llama-dense": lambda: llama("dense", num_hidden_layers=1),
    "llama-4bit": lambda: llama("4bit", num_hidden_layers=1),
    "prefix": prefix,
}


def accelerated(make):
    model = make().eval()
    peft_kernels.optimize(model)
    return model


def inputs(model, rows):
    return torch.randint(3, 60, (2, rows)) if isinstance(model, Logits) else torch.randn(rows, IN_FEATURES)


def export(model, strict, dynamic):
    x = inputs(model, ROWS[0])
    tokens = torch.export.Dim("tokens", min=1, max=ROWS[-1])
    shapes = ({x.dim() - 1 if isinstance(model, Logits) else 0: tokens},) if dynamic else None
    return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)


def fused_calls(program):
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return sum("peft_kernels" in str(node.target) for graph in graphs for node in graph.nodes)


def check_export(model, strict, dynamic):
    program = export(model, strict, dynamic)
    for constant in (*program.state_dict.values(), *program.constants.values()):
        assert not isinstance(constant, torch._subclasses.FakeTensor)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for rows in ROWS if dynamic else ROWS[:1]:
        x = inputs(model, rows)
        torch.testing.assert_close(loaded(x), model(x), **FP32)
    return program


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict-training", "strict-inference"])
@pytest.mark.parametrize("layer", LAYERS)
def test_exports(layer, strict):
    with torch.set_grad_enabled(not strict):
        program = check_export(accelerated(LAYERS[layer]), strict, dynamic=True)
    assert fused_calls(program) or layer in ("output", "linear")


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("layer", ["lora-dense", "lora-4bit", "dora-4bit", "ia3-4bit"])
def test_exports_static_shapes(layer, strict):
    with torch.no_grad():
        assert fused_calls(check_export(accelerated(LAYERS[layer]), strict, dynamic=False))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("model", MODELS)
def test_exports_models(model, strict):
    with torch.no_grad():
        assert fused_calls(check_export(accelerated(MODELS[model]), strict, dynamic=True))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("kind", KINDS)
def test_exports_training_with_dropout(kind, strict):
    model = layer_of(lora_model(kind, lora_dropout=0.5))
    peft_kernels.optimize(model)
    exported, x = export(model, strict, dynamic=True).module(), torch.randn(40, IN_FEATURES)
    torch.manual_seed(2)
    got = exported(x)
    torch.manual_seed(2)
    torch.testing.assert_close(got, model(x), **FP32)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exports_a_weight_that_was_replaced(strict):
    layer = accelerated(linear4bit)
    layer.weight = linear4bit().weight
    x = inputs(layer, 3)
    with torch.no_grad():
        wanted = layer(x)
        torch.testing.assert_close(export(layer, strict, dynamic=True).module()(x), wanted, **FP32)


_LOADS = """
import sys, torch
import peft_kernels.ops
assert "peft" not in sys.modules and "bitsandbytes" not in sys.modules
for path in sys.argv[1:]:
    program = torch.export.load(path + ".pt2").module()
    for x, wanted in torch.load(path + ".pt"):
        torch.testing.assert_close(program(x), wanted, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
def test_programs_of_another_process(tmp_path):
    """The other process has the operations alone; what it has to compute is the stock model's."""
    paths = []
    for name in ("lora-dense", "lora-4bit", "dora-dense", "ia3-4bit", "llama-4bit"):
        model = (LAYERS | MODELS)[name]().eval()
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False  # else stock would round its statistics to bf16
        stock = copy.deepcopy(model)
        peft_kernels.optimize(model)
        for strict in (False, True):
            paths.append(str(tmp_path / f"{name}-{strict}"))
            with torch.no_grad():
                torch.export.save(export(model, strict, dynamic=True), paths[-1] + ".pt2")
                torch.save([(x := inputs(model, rows), stock(x)) for rows in (1, 40)], paths[-1] + ".pt")
    result = subprocess.run([sys.executable, "-c", _LOADS, *paths], capture_output=True, text=True)
    assert not result.returncode, result.stderr


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layer", LAYERS)
def test_compiles_for_any_number_of_rows(layer, grad):
    """One graph; torch makes one row a graph of its own, as it does for stock layers."""
    model = accelerated(LAYERS[layer])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(grad):
        for rows in (5, 9, 40):
            x = inputs(model, rows)
            with torch._dynamo.config.patch(error_on_recompile=rows != 5):
                got, wanted = compiled(x), model(x)
            torch.testing.assert_close(got, wanted, **FP32)
            if got.requires_grad:
                leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
                grads = (torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (got, wanted))
                for ours, theirs in zip(*grads, strict=True):
                    if theirs is not None:
                        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["lora-dense", "ia3-conv1d", "linear", "output"])
def test_products_that_outrun_torch(layer, monkeypatch):
    """Where the kernels' products are chosen by their size."""
    monkeypatch.setattr("peft_kernels.cpu.outruns_torch", lambda: True)
    monkeypatch.setattr("peft_kernels.integrations.torch.linear.LEAST_FEATURES", 1)
    model = accelerated(LAYERS[layer])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (5, 8, 9, 40):
            x = inputs(model, rows)
            with torch._dynamo.config.patch(error_on_recompile=rows != 5):
                torch.testing.assert_close(compiled(x), model(x), **FP32)
        for strict in (False, True):
            check_export(model, strict, dynamic=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("layer", ["lora-dense", "lora-conv1d", "ia3-dense"])
def test_jit_trace(layer):
    model = accelerated(LAYERS[layer])
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs(model, 12))
        for rows in ROWS:
            x = inputs(model, rows)
            torch.testing.assert_close(traced(x), model(x), **FP32)
