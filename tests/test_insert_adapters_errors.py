"""Bad input to insert_adapters and its kin: what was got and wanted is said, and the model stays as it was."""

import re
from contextlib import contextmanager

import pytest
import torch
from adapter_models import make_inputs, make_model
from torch import nn

import peft_kernels


@contextmanager
def refused(model, text, error=ValueError):
    """Raises unless the block raises such an error and leaves the model as it was."""

    def state():
        modules = [(path, type(module), len(module._forward_hooks)) for path, module in model.named_modules()]
        return modules, [(path, p.requires_grad) for path, p in model.named_parameters()]

    before = state()
    with pytest.raises(error, match=re.escape(text)):
        yield
    assert state() == before


@pytest.fixture
def model():
    return make_model("llama")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "lora"}, "kind: got 'lora', wanted one of houlsby, pfeiffer, parallel"),
        ({"kind": ["lora"]}, "kind: got ['lora'], wanted one of houlsby, pfeiffer, parallel"),
        ({"activation": "softmax"}, "activation: got 'softmax', wanted one of relu, gelu"),
        ({"bottleneck": 0}, "bottleneck: got 0, wanted a positive integer"),
        ({"scale": "fixed"}, "scale: got 'fixed', wanted a finite number, or 'learned'"),
        ({"dropout": 1.0}, "dropout: got 1.0, wanted a probability in [0, 1)"),
        ({"dropout": "x"}, "dropout: got 'x', wanted a probability in [0, 1)"),
        (
            {"locations": ["ffn", "head"]},
            "locations: got ('ffn', 'head'), wanted some of attention, cross_attention, ffn",
        ),
        ({"locations": []}, "locations: got (), wanted some of attention"),
        ({"locations": 3}, "locations: got 3, wanted several, in a list or tuple"),
        ({"locations": [["ffn"]]}, "locations: got (['ffn'],), wanted some of attention"),
        ({"locations": "cross_attention"}, "without a known make of layer that has 'cross_attention'"),
        ({"kind": "pfeiffer", "locations": "attention"}, "locations: got 'attention', where 'pfeiffer' has no place"),
        ({"leave_out": [0, 1]}, "leave_out: got (0, 1), which are all of the 2 layers"),
        ({"leave_out": ["0"]}, "leave_out: got '0', which is no layer's number, wanted some of 0, 1"),
        ({"leave_out": ["embeddings"]}, "leave_out: got 'embeddings', which is no layer's number, wanted some of 0, 1"),
        ({"leave_out": [0, 7]}, "leave_out: got 7, which is no layer's number, wanted some of 0, 1"),
        ({"leave_out": [True]}, "leave_out: got True, which is no layer's number, wanted some of 0, 1"),
        ({"leave_out": "1"}, "leave_out: got '1', which is no layer's number, wanted some of 0, 1"),
        ({"leave_out": 1}, "leave_out: got 1, wanted several, in a list or tuple"),
        ({"targets": "mlp", "leave_out": [-1]}, "leave_out: got -1, which is no layer's number, wanted some of 0, 1"),
        (
            {"targets": "lm_head", "leave_out": [0]},
            "leave_out: got 0, which is no layer's number, wanted some of nothing",
        ),
        ({"targets": -1}, "targets: got -1, wanted several, in a list or tuple"),
        ({"targets": [-1]}, "targets: got (-1,), wanted regular expressions of modules' names, as strings"),
        ({"targets": []}, "targets: got (), wanted regular expressions of modules' names"),
        ({"targets": "no_such"}, "targets: got 'no_such', which matches no module's name; names are such as"),
        ({"targets": "("}, "targets: got '(', wanted a regular expression"),
        ({"targets": "layers"}, "targets: got model.layers, a ModuleList that returns nothing"),
        ({"targets": "mlp", "leave_out": [0, 1]}, "leave_out: got (0, 1), which are all of the layers that `targets`"),
        ({"kind": "parallel", "targets": "up_proj"}, "which reads 32 features and returns 48, wanted as many"),
        ({"name": ""}, "name: got '', wanted a name without dots"),
        ({"name": "a.b"}, "name: got 'a.b', wanted a name without dots"),
        ({"name": "a,b"}, "name: got 'a,b', wanted a name without dots"),
        ({"name": "__base__"}, "name: got '__base__', wanted a name"),
        ({"name": "keys"}, "name: got 'keys', which torch.nn.ModuleDict has another use for"),
        (
            {"dtype": torch.float64},
            "dtype: got torch.float64, a dtype, wanted float32, bfloat16 or float16",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_insertion(model, options, text):
    with refused(model, text):
        peft_kernels.insert_adapters(model, **options)


def test_unknown_features():
    model = nn.Sequential(nn.ReLU())
    with refused(model, "targets: got 0, a ReLU whose features can't be known"):
        peft_kernels.insert_adapters(model, targets="0")


def test_unknown_make_of_model():
    model = nn.Sequential(nn.Linear(4, 4))
    with refused(model, "model: got a Sequential without a known make of layer that has 'attention'"):
        peft_kernels.insert_adapters(model)


def test_name_used_twice(model):
    peft_kernels.insert_adapters(model, bottleneck=8)
    with refused(model, "name: got 'default', which the model has already"):
        peft_kernels.insert_adapters(model, "pfeiffer", bottleneck=8)
    assert peft_kernels.adapters.insertion.find_state(model).active == "default"


@pytest.mark.parametrize(
    ("kind", "module"), [("pfeiffer", "output.LayerNorm"), ("parallel", "output.dropout")], ids=["pfeiffer", "parallel"]
)
def test_module_where_another_adapter_acts_otherwise(kind, module):
    model = make_model("bert")
    peft_kernels.insert_adapters(model, kind, bottleneck=8)
    text = f"targets: got bert.encoder.layer.0.{module}, where the adapter 'default' acts otherwise"
    with refused(model, text):
        peft_kernels.insert_adapters(model, kind, bottleneck=8, name="other", targets=rf"layer\.\d\.{module}")


@pytest.mark.parametrize(
    "call",
    [
        peft_kernels.insert_adapters,
        peft_kernels.remove_adapters,
        peft_kernels.freeze_adapters,
        lambda model: peft_kernels.set_adapter(model, None),
        lambda model: peft_kernels.fuse_adapters(model, ["a", "b"]),
        lambda model: peft_kernels.save_adapter(model, "folder"),
        lambda model: peft_kernels.load_adapter(model, "folder"),
        lambda model: peft_kernels.adapter_rows(model, []).__enter__(),
        lambda model: peft_kernels.attach_prefix(model, length=4),
        peft_kernels.detach_prefix,
        lambda model: peft_kernels.attach_prompt(model, length=4),
        peft_kernels.detach_prompt,
        peft_kernels.merge_ia3,
    ],
)
def test_not_a_module(call):
    with pytest.raises(TypeError, match=r"model: got int, wanted a torch\.nn\.Module"):
        call(3)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda model: peft_kernels.set_adapter(model, "a", "no"), "inference_mode: got 'no', wanted True or False"),
        (lambda model: peft_kernels.save_adapter(model, 3, "a"), "folder: got 3, a int, wanted a path"),
        (lambda model: peft_kernels.load_adapter(model, 3), "folder: got 3, a int, wanted a path"),
        (lambda model: peft_kernels.set_adapter(model, "c"), "name: got 'c', wanted one of 'a', 'b'"),
        (lambda model: peft_kernels.set_adapter(model, ["a"]), "name: got ['a'], wanted one of 'a', 'b'"),
        (lambda model: peft_kernels.remove_adapters(model, "c"), "name: got 'c', wanted one of 'a', 'b'"),
        (lambda model: peft_kernels.freeze_adapters(model, "a", "c"), "name: got 'c', wanted one of 'a', 'b'"),
        (lambda model: peft_kernels.unfreeze_adapters(model, "c"), "name: got 'c', wanted one of 'a', 'b'"),
        (lambda model: peft_kernels.save_adapter(model, "x", "c"), "name: got 'c', wanted one of 'a', 'b'"),
        (lambda model: peft_kernels.fuse_adapters(model, ["a", "c"]), "names: got 'c', wanted one of 'a', 'b'"),
        (lambda model: peft_kernels.fuse_adapters(model, ["a"]), "names: got ['a'], wanted two or more, each once"),
        (lambda model: peft_kernels.fuse_adapters(model, ["a", "a"]), "names: got ['a', 'a'], wanted two or more"),
        (
            lambda model: peft_kernels.fuse_adapters(model, ["a", "b"]),
            "names: got 'a', which has no layer at model.layers.0",
        ),
        (lambda model: model(**make_inputs("llama"), adapter_names=["a", "c", "b"]), "adapter_names: got 'c'"),
        (lambda model: model(**make_inputs("llama"), adapter_names="a"), "adapter_names: got 'a', wanted a list"),
        (lambda model: model(**make_inputs("llama"), adapter_names=3), "adapter_names: got 3, wanted a list"),
        (lambda model: model(**make_inputs("llama"), adapter_names={"a"}), "adapter_names: got {'a'}, wanted a list"),
        (lambda model: model(**make_inputs("llama"), adapter_names=[["a"]]), "adapter_names: got ['a'], wanted one of"),
        (lambda model: model(**make_inputs("llama"), adapter_names=["a"]), "adapter_names: got 1 names, wanted 3"),
        (lambda model: model(**make_inputs("llama"), adapter_names=[]), "adapter_names: got 0 names, wanted 3"),
        (lambda model: model(**make_inputs("llama"), adapter_names=[None] * 2), "adapter_names: got 2 names, wanted 3"),
        (lambda model: peft_kernels.fuse_adapters(model, 3), "names: got 3, wanted several, in a list or tuple"),
        (lambda model: peft_kernels.fuse_adapters(model, [["a"], "b"]), "names: got (['a'], 'b'), wanted those of"),
        (lambda model: peft_kernels.set_adapter(model.model, "a"), "a part of what was given adapters"),
        (lambda model: peft_kernels.insert_adapters(model.model, name="c"), "a part of what was given adapters"),
    ],
    ids=lambda value: "" if callable(value) else value.split(",")[0],
)
def test_adapters_that_there_are(model, call, text):
    peft_kernels.insert_adapters(model, bottleneck=8, name="a")
    peft_kernels.insert_adapters(model, "pfeiffer", bottleneck=8, name="b")
    with refused(model, text):
        call(model)
    assert model(**make_inputs("llama")).logits.shape == (3, 6, 40)


def test_fusion_that_there_is(model):
    for name in ("a", "b"):
        peft_kernels.insert_adapters(model, bottleneck=8, name=name)
    peft_kernels.fuse_adapters(model, ["a", "b"])
    with refused(model, "names: got ['a', 'b'], for which the model has a fusion already"):
        peft_kernels.fuse_adapters(model, ["a", "b"])
    with refused(model, "dtype: got torch.int8, a dtype, wanted float32"):
        peft_kernels.fuse_adapters(model, ["b", "a"], dtype=torch.int8)
    with refused(model, "dropout: got 2.0, wanted a probability"):
        peft_kernels.fuse_adapters(model, ["b", "a"], dropout=2.0)
    with refused(model, "temperature: got '2', wanted a positive number"):
        peft_kernels.fuse_adapters(model, ["b", "a"], temperature="2")


@pytest.mark.parametrize(
    "call",
    [
        lambda model: peft_kernels.set_adapter(model, "a"),
        lambda model: peft_kernels.remove_adapters(model, "a"),
        lambda model: peft_kernels.unfreeze_adapters(model),
        lambda model: peft_kernels.fuse_adapters(model, ["a", "b"]),
        lambda model: peft_kernels.save_adapter(model, "x"),
    ],
)
def test_model_without_adapters(model, call):
    with refused(model, "got a LlamaForCausalLM without adapters, wanted one that `insert_adapters` was given"):
        call(model)


def test_parts_with_adapters_of_their_own():
    model = nn.ModuleList([make_model("vit"), make_model("vit")])
    for part in model:
        peft_kernels.insert_adapters(part, bottleneck=8)
    with refused(model, "got a ModuleList of which 2 parts were given adapters apart"):
        peft_kernels.remove_adapters(model)


def test_part_with_adapters_can_be_used_as_a_part():
    part = make_model("vit")
    before = [parameter.requires_grad for parameter in part.parameters()]
    peft_kernels.insert_adapters(part, bottleneck=8)
    whole = nn.ModuleDict({"image": part, "head": nn.Linear(3, 3)})
    peft_kernels.set_adapter(whole, None)
    peft_kernels.remove_adapters(whole)
    assert [parameter.requires_grad for parameter in part.parameters()] == before
