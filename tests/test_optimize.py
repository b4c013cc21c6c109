"""What holds for accelerate, restore and the report with any layers."""

import subprocess
import sys

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from optional import if_installed
from peft import LoraConfig, get_peft_model
from peft_models import IN_FEATURES, OneLayer, layer_of, linear4bit, lora_model
from rich.console import Console
from torch import nn

import peft_kernels
from peft_kernels import cpu
from peft_kernels.integrations import model, registry

bnb = if_installed("bitsandbytes")


def verdicts(report):
    return {layer.name: (layer.kind, layer.fused, layer.reason) for layer in report}


def test_import_imports_no_optional_package():
    code = (
        "import sys, torch, peft_kernels\n"
        "print(peft_kernels.optimize(torch.nn.ReLU()).layers)\n"
        "print([name for name in ('peft', 'bitsandbytes', 'transformers', 'accelerate') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["()", "[]"]


@pytest.mark.parametrize("function", [peft_kernels.optimize, peft_kernels.restore])
@pytest.mark.parametrize("model", [None, torch.zeros(2), nn.Linear])
def test_not_a_module(function, model):
    with pytest.raises(TypeError, match=rf"model: got {type(model).__name__}, wanted a torch\.nn\.Module"):
        function(model)


def test_what_fails_half_way_is_undone(monkeypatch):
    model = nn.Sequential(linear4bit(), linear4bit(), linear4bit())
    peft_kernels.optimize(model[0])
    fused = type(model[0])
    prepared = []

    def prepare(layer):
        prepared.append(layer)
        if len(prepared) == 2:
            raise MemoryError("of the second")
        return ""

    monkeypatch.setattr(fused, "prepare", prepare)
    with pytest.raises(MemoryError):
        peft_kernels.optimize(model)
    assert [type(layer) for layer in model] == [fused, bnb.nn.Linear4bit, bnb.nn.Linear4bit]


def test_model_without_a_layer_to_fuse():
    report = peft_kernels.optimize(nn.Sequential(nn.Embedding(2, 2), nn.ReLU()))
    assert list(report) == [] and len(report) == 0
    assert "layers: 0 fused, 0 left alone" in str(report)


def test_report_names_every_layer():
    report = peft_kernels.optimize(lora_model("4bit"))
    assert verdicts(report) == {
        "base_model.model.lin": ("peft.Linear4bit", True, ""),
        "base_model.model.lin.base_layer": ("bitsandbytes.Linear4bit", True, ""),
    }
    assert report.fused == report.layers and report.left_alone == ()
    assert report.isa == cpu.isa()
    assert "layers: 1 fused, 0 left alone" in str(report) and "base_layer" not in str(report)


def test_report_prints_numbered_layers_as_one_row():
    model = nn.Sequential(*(nn.Sequential(linear4bit()) for _ in range(11)), bnb.nn.Linear8bitLt(32, 32))
    report = peft_kernels.optimize(model)
    text = str(report)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["*.*", "bitsandbytes.Linear4bit", "fused", "11"],
        [
            "*",
            "bitsandbytes.Linear8bitLt",
            "left alone: its weight has 8 bits, which the kernels do not read",
            "1",
        ],
    ]
    assert f"CPU kernels: {cpu.isa()}" in text
    assert "layers: 11 fused, 1 left alone" in text
    assert repr(report) == f"Report(layers: 11 fused, 1 left alone; CPU kernels: {cpu.isa()})"
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report)
    assert "Linear8bitLt" in capture.get()


def test_again_covers_new_layers_and_changes_no_other():
    model = nn.ModuleList([linear4bit()])
    first = peft_kernels.optimize(model)
    fused = type(model[0])
    model.append(linear4bit())
    second = peft_kernels.optimize(model)
    assert type(model[0]) is type(model[1]) is fused
    assert second.layers[0] == first.layers[0] and len(second) == 2


def test_layer_that_occurs_twice_is_reported_once():
    layer = linear4bit()
    report = peft_kernels.optimize(nn.Sequential(layer, nn.Identity(), layer))
    assert [row.name for row in report] == ["0"]


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_restore_leaves_no_trace(kind):
    model = lora_model(kind)
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    peft_kernels.optimize(model)
    model(torch.randn(3, IN_FEATURES)).sum().backward()
    model.merge_adapter()
    peft_kernels.restore(model)
    assert before == {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    peft_kernels.restore(model)


def test_restore_of_a_part():
    model = nn.Sequential(linear4bit(), linear4bit())
    peft_kernels.optimize(model)
    peft_kernels.restore(model[0])
    assert type(model[0]) is bnb.nn.Linear4bit and type(model[1]) is not bnb.nn.Linear4bit


def test_fused_classes_pass_for_the_stock_ones():
    model = lora_model("4bit")
    before = [(type(module).__name__, type(module).__mro__, repr(module)) for module in model.modules()]
    peft_kernels.optimize(model)
    for module, (name, mro, text) in zip(model.modules(), before, strict=True):
        assert type(module).__name__ == name and isinstance(module, mro[0]) and repr(module) == text


def test_subclass_of_a_users_is_left_alone():
    class Mine(bnb.nn.Linear4bit):
        def forward(self, x):
            return super().forward(x) * 2

    report = peft_kernels.optimize(nn.Sequential(Mine(32, 32).to("cpu")))
    assert [(row.fused, row.reason) for row in report] == [(False, "this class has no fused form")]


def test_replaced_forward_is_left_alone():
    layer = linear4bit()
    layer.forward = lambda x: x
    report = peft_kernels.optimize(OneLayer(layer))
    assert verdicts(report)["lin"] == ("bitsandbytes.Linear4bit", False, "its forward was replaced on the instance")
    x = torch.randn(2, IN_FEATURES)
    assert layer(x) is x


def test_device_hooks_added_later_survive_restore():
    layer, x = linear4bit(), torch.randn(2, IN_FEATURES)
    model = OneLayer(layer)
    peft_kernels.optimize(model)
    want = model(x)
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(model(x), want)
    peft_kernels.restore(model)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_every_fused_class_has_its_stock_name_and_is_importable():
    lora_model("4bit")
    model._load_packages()
    for stock, fused in registry._table.items():
        assert fused.__name__ == stock.__name__
        assert getattr(sys.modules[fused.__module__], fused.__qualname__) is fused


def test_peft_on_top_of_an_accelerated_base():
    model = OneLayer(linear4bit())
    peft_kernels.optimize(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["lin"]))
    assert type(layer_of(model)).__name__ == "Linear4bit"
    assert all(row.fused for row in peft_kernels.optimize(model))
