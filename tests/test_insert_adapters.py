"""insert_adapters and what goes with it, on tiny models of each make."""

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
from adapter_models import MAKERS, make_inputs, make_model, randomize
from torch import nn

import peft_kernels
from peft_kernels.adapters import KINDS
from peft_kernels.testing.reference.adapter import adapter as reference


def output(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def adapter_parameters(model):
    return {path for path, _ in model.named_parameters() if "adapter_site" in path}


class Block(nn.Module):
    """A model that is built like no other."""

    def __init__(self):
        super().__init__()
        self.mixer = nn.Linear(12, 12)
        self.channels = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))

    def forward(self, x):
        x = x + self.mixer(x)
        return x + self.channels(x)


def make_blocks():
    return nn.Sequential(*(Block() for _ in range(3)))


# ---- Insertion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAKERS)
def test_identity_at_initialisation(name, kind):
    model, inputs = make_model(name), make_inputs(name)
    wanted = output(model, inputs)
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    report = peft_kernels.insert_adapters(model, kind, bottleneck=8, scale=4.0)
    assert torch.equal(output(model, inputs), wanted)
    after = model.state_dict()
    assert set(before) < set(after) and all(torch.equal(after[path], tensor) for path, tensor in before.items())
    assert report.parameters == sum(after[path].numel() for path in set(after) - set(before)) > 0

    randomize(model, "default")
    assert not torch.allclose(output(model, inputs), wanted)
    peft_kernels.set_adapter(model, None)
    assert torch.equal(output(model, inputs), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_identity_of_a_16_bit_model(dtype):
    model, inputs = make_model("llama").to(dtype), make_inputs("llama")
    wanted = output(model, inputs)
    peft_kernels.insert_adapters(model, "pfeiffer", bottleneck=8)
    assert model.model.layers[0].adapter_site.adapters["default"].down.weight.dtype == torch.float32
    got = output(model, inputs)
    assert got.dtype == dtype and torch.equal(got, wanted)


def layers_of(name, kind):
    """The layers that a report names, with the module's number left out."""
    report = peft_kernels.insert_adapters(make_model(name), kind, bottleneck=8)
    return {peft_kernels.printing.starred(layer.name): layer.effect for layer in report}


@pytest.mark.parametrize(
    ("name", "kind", "wanted"),
    [
        ("bert", "houlsby", {"attention.output.dropout": "output + A(output)", "output.dropout": "output + A(output)"}),
        ("bert", "pfeiffer", {"output.LayerNorm": "LayerNorm(s + A(LayerNorm(s)))"}),
        ("bert", "parallel", {"output.dropout": "output + A(input)"}),
        ("qwen3", "houlsby", {"self_attn": "output + A(output)", "mlp": "output + A(output)"}),
        ("qwen3", "pfeiffer", {"": "output + A(output)"}),
        ("vit", "parallel", {"mlp": "output + A(input)"}),
    ],
)
def test_places(name, kind, wanted):
    layer = {"bert": "bert.encoder.layer.*", "qwen3": "model.layers.*", "vit": "vit.layers.*"}[name]
    assert layers_of(name, kind) == {f"{layer}.{path}".rstrip("."): effect for path, effect in wanted.items()}


def test_places_of_t5():
    found = layers_of("t5", "houlsby")
    assert set(found) == {
        "encoder.block.*.layer.*.dropout",
        "decoder.block.*.layer.*.dropout",
    }
    model = make_model("t5")
    report = peft_kernels.insert_adapters(model, locations=["cross_attention"], bottleneck=8, leave_out=[0, 3])
    assert [layer.name for layer in report] == ["decoder.block.0.layer.1.dropout"]


@pytest.mark.parametrize("kind", KINDS)
def test_formula_of_a_post_norm_layer(kind):
    """BERT's FFN with each kind against the oracle; the other makes are compared with AdapterHub's models."""
    model = make_model("bert")
    peft_kernels.insert_adapters(model, kind, bottleneck=8, activation="tanh", scale=0.5)
    randomize(model, "default")
    seen = {}
    layer = model.bert.encoder.layer[1]
    layer.intermediate.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    layer.output.dense.register_forward_hook(lambda module, args, h: seen.update(h=h))
    layer.output.register_forward_hook(lambda module, args, y: seen.update(y=y))
    output(model, make_inputs("bert"))
    site = {"pfeiffer": layer.output.LayerNorm, "houlsby": layer.output.dropout, "parallel": layer.output.dropout}[kind]
    adapter = getattr(site, "parallel_adapter_site" if kind == "parallel" else "adapter_site").adapters["default"]
    x, h, norm = seen["x"], seen["h"], layer.output.LayerNorm

    def adapted(x):
        weights = adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias
        return reference(x, *weights, activation="tanh", scale=0.5).float()

    normed = nn.functional.layer_norm(x + h, (32,), norm.weight, norm.bias, norm.eps)
    delta = adapted({"pfeiffer": normed, "houlsby": h, "parallel": x}[kind])
    wanted = nn.functional.layer_norm(x + h + delta, (32,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(seen["y"], wanted, rtol=1e-5, atol=1e-5)


def test_base_is_frozen_and_restored():
    model = make_model("bert")
    model.bert.embeddings.requires_grad_(False)
    before = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    peft_kernels.insert_adapters(model)
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == adapter_parameters(model)
    peft_kernels.remove_adapters(model)
    assert before == {path: parameter.requires_grad for path, parameter in model.named_parameters()}


def test_removal_leaves_no_trace():
    model = make_model("llama")

    def traces():
        return [
            (path, type(module), set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks),
             list(module._forward_hooks_with_kwargs), list(module._forward_pre_hooks_with_kwargs),
             list(module._forward_hooks_always_called))
            for path, module in model.named_modules()
        ]  # fmt: skip

    before = traces()
    for kind in KINDS:
        peft_kernels.insert_adapters(model, kind, name=kind, bottleneck=8)
    assert traces() != before
    for kind in KINDS:
        peft_kernels.remove_adapters(model, kind)
    assert traces() == before
    peft_kernels.remove_adapters(model)


def test_removal_of_the_active_one_of_two():
    model, inputs = make_model("vit"), make_inputs("vit")
    wanted = output(model, inputs)
    for name in ("a", "b"):
        peft_kernels.insert_adapters(model, name=name, bottleneck=8)
    randomize(model, "a", "b")
    peft_kernels.remove_adapters(model, "b")
    assert torch.equal(output(model, inputs), wanted)
    assert "default" not in str(adapter_parameters(model)) and ".b." not in str(adapter_parameters(model))
    peft_kernels.set_adapter(model, "a")
    assert not torch.allclose(output(model, inputs), wanted)


def test_report():
    report = peft_kernels.insert_adapters(make_model("bert"), "pfeiffer", bottleneck=8, name="news")
    text = str(report)
    size = 8 * 32 + 8 + 32 * 8 + 32
    assert "adapter 'news': 2 layers" in text and "bert.encoder.layer.*.output.LayerNorm" in text
    assert "LayerNorm(s + A(LayerNorm(s)))" in text and f"{size}" in text
    assert report.parameters == 2 * size and len(report) == 2 and "1,104 parameters" in repr(report)


def test_hooks_of_others_see_the_adapter():
    """transformers records hidden states by hooks of its own, which may have been there before."""
    model, inputs = make_model("llama"), make_inputs("llama")
    model(**inputs, output_hidden_states=True)
    peft_kernels.insert_adapters(model, "pfeiffer", bottleneck=8)
    randomize(model, "default")
    with torch.no_grad():
        result = model(**inputs, output_hidden_states=True)
        assert torch.equal(model.lm_head(result.hidden_states[-1]), result.logits)
        layer = model.model.layers[0]
        after = layer.adapter_site(result.hidden_states[1], result.hidden_states[1])
        assert not torch.allclose(after, result.hidden_states[1])
        peft_kernels.set_adapter(model, None)
        bare = model(**inputs, output_hidden_states=True).hidden_states[1]
        peft_kernels.set_adapter(model, "default")
        torch.testing.assert_close(layer.adapter_site(bare, bare), result.hidden_states[1])


def test_import_imports_no_optional_package():
    code = "import sys, peft_kernels; print([n for n in ('transformers', 'peft', 'safetensors') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_whole_of_a_part_with_adapters():
    """A second adapter joins the first, though its places have longer names by now."""
    model, inputs = make_model("bert"), make_inputs("bert")
    peft_kernels.insert_adapters(model.bert, "parallel", bottleneck=8, name="a")
    report = peft_kernels.insert_adapters(model, "parallel", bottleneck=8, name="b")
    assert report.layers[0].name == "bert.encoder.layer.0.output.dropout"
    randomize(model, "a", "b")
    got = output(model, inputs)
    peft_kernels.set_adapter(model, "a")
    assert not torch.allclose(output(model, inputs), got)


# ---- Patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_targets(kind):
    model, x = make_blocks(), torch.randn(2, 5, 12)
    wanted = model(x)
    report = peft_kernels.insert_adapters(model, kind, bottleneck=3, targets=["mixer", r"channels"], leave_out=[1])
    assert [layer.name for layer in report] == ["0.mixer", "0.channels.2", "2.mixer", "2.channels.2"]
    assert torch.equal(model(x), wanted)
    randomize(model, "default")
    mixer, channels = model[0].mixer, model[0].channels
    for module, last in ((mixer, mixer), (channels, channels[2])):
        peft_kernels.set_adapter(model, None)
        h = module(x)
        site = getattr(last, "parallel_adapter_site" if kind == "parallel" else "adapter_site")
        adapted = site.adapters["default"](x if kind == "parallel" else h, torch.zeros_like(h))
        peft_kernels.set_adapter(model, "default")
        torch.testing.assert_close(module(x), h + adapted)


def test_target_is_the_end_of_a_name():
    report = peft_kernels.insert_adapters(make_blocks(), targets=r"channels\.2", bottleneck=3)
    assert [(layer.name, layer.features) for layer in report] == [(f"{i}.channels.2", 12) for i in range(3)]


# ---- What a model goes through --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_their_own_adapters(how, kind):
    model, inputs = make_model("roberta"), make_inputs("roberta")
    peft_kernels.insert_adapters(model, kind, bottleneck=8)
    randomize(model, "default")
    wanted = output(model, inputs)
    other = how(model)
    assert torch.equal(output(other, inputs), wanted)
    peft_kernels.set_adapter(other, None)
    randomize(other, "default")
    assert torch.equal(output(model, inputs), wanted)
    peft_kernels.remove_adapters(other)
    assert torch.equal(output(model, inputs), wanted) and not adapter_parameters(other)
    assert output(model, inputs, adapter_names=["default", None, None]).shape == wanted.shape


def gradients(model, inputs, **kwargs):
    model.zero_grad()
    model(**inputs, **kwargs).logits.square().mean().backward()
    return {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [False, True], ids=["one", "rows"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_gradient_checkpointing(name, kind, rows):
    model, inputs = make_model(name), make_inputs(name)
    for adapter in ("a", "b"):
        peft_kernels.insert_adapters(model, kind, bottleneck=8, name=adapter)
    randomize(model, "a", "b")
    kwargs = {"adapter_names": ["a", None, "b"]} if rows else {}
    model.train()
    for module in model.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    wanted = gradients(model, inputs, **kwargs)
    model.activation_checkpointing_enable({"use_reentrant": False})
    got = gradients(model, inputs, **kwargs)
    assert set(got) == set(wanted) == {path for path in adapter_parameters(model) if rows or ".b." in path}
    for path, gradient in wanted.items():
        torch.testing.assert_close(got[path], gradient)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_the_adapter_alone(kind):
    model, inputs = make_model("mistral"), make_inputs("mistral")
    peft_kernels.insert_adapters(model, kind, bottleneck=8, dropout=0.1)
    before = {path: parameter.clone() for path, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {path for path, parameter in model.named_parameters() if not torch.equal(parameter, before[path])}
    assert changed == adapter_parameters(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "t5"])
def test_generation_with_a_cache(name, kind):
    model, inputs = make_model(name), {"input_ids": torch.randint(3, 40, (2, 6))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for adapter in ("a", "b"):
        peft_kernels.insert_adapters(model, kind, bottleneck=8, name=adapter)
    randomize(model, "a", "b", std=1.0)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    each = {}
    for adapter in ("a", "b"):
        peft_kernels.set_adapter(model, adapter)
        each[adapter] = model.generate(**inputs, **options)
        assert torch.equal(each[adapter], model.generate(**inputs, **options, use_cache=False))
    assert not torch.equal(each["a"], each["b"])
    with peft_kernels.adapter_rows(model, ["b", "a"]):
        mixed = model.generate(**inputs, **options)
    assert torch.equal(mixed, torch.stack([each["b"][0], each["a"][1]]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pfeiffer", "parallel"])
def test_compiled_without_a_break(kind):
    torch._dynamo.reset()
    model, inputs = make_model("bert"), make_inputs("bert")
    for adapter in ("a", "b"):
        peft_kernels.insert_adapters(model, kind, bottleneck=8, name=adapter)
    randomize(model, "a", "b")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for kwargs in ({}, {"adapter_names": ["a", None, "b"]}):
        torch.testing.assert_close(output(compiled, inputs, **kwargs), output(model, inputs, **kwargs))
    wanted = gradients(model, inputs)
    assert wanted and all(torch.allclose(wanted[path], g) for path, g in gradients(model, inputs).items())
    peft_kernels.set_adapter(model, "a")
    torch.testing.assert_close(output(compiled, inputs), output(model, inputs))


# ---- Several adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_rows_name_their_adapters(name):
    """Adapters of every kind, activation and size, and of all that a grouped call can't take."""
    model, inputs = make_model(name), make_inputs(name, rows=7)
    bare = output(model, inputs)
    options = {
        "small": {"kind": "pfeiffer", "bottleneck": 4, "scale": "learned"},
        "large": {"kind": "pfeiffer", "bottleneck": 16, "norm_before": True},
        "other": {"kind": "houlsby", "bottleneck": 8, "activation": "relu", "gated": True},
        "beside": {"kind": "parallel", "bottleneck": 8},
        "normed": {"kind": "houlsby", "bottleneck": 8, "norm_after": True},
    }
    for adapter, option in options.items():
        peft_kernels.insert_adapters(model, name=adapter, **option)
    randomize(model, *options)
    rows = ["large", "small", None, "normed", "beside", "other", "small"]
    got = output(model, inputs, adapter_names=rows)
    for row, adapter in enumerate(rows):
        peft_kernels.set_adapter(model, adapter)
        torch.testing.assert_close(got[row], output(model, inputs)[row], rtol=1e-4, atol=1e-5)
        assert (adapter is None) == torch.allclose(got[row], bare[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_train_their_adapters(kind):
    model, inputs = make_model("llama"), make_inputs("llama", rows=4)
    rows = ["a", "b", None, "a"]
    for adapter in ("a", "b"):
        peft_kernels.insert_adapters(model, kind, bottleneck=8, name=adapter)
    randomize(model, "a", "b")
    together = gradients(model, inputs, adapter_names=rows)
    apart = {}
    for adapter in ("a", "b"):
        peft_kernels.set_adapter(model, adapter)
        own = [row for row, name in enumerate(rows) if name == adapter]
        some = {key: value[own] for key, value in inputs.items()}
        found = gradients(model, some)
        apart |= {path: g * len(own) / len(rows) for path, g in found.items()}
    assert set(together) == set(apart) == adapter_parameters(model)
    for path, gradient in apart.items():
        torch.testing.assert_close(together[path], gradient, rtol=1e-4, atol=1e-6)


def test_rows_last_one_call():
    model, inputs = make_model("vit"), make_inputs("vit")
    for adapter in ("a", "b"):
        peft_kernels.insert_adapters(model, bottleneck=8, name=adapter)
    randomize(model, "a", "b")
    wanted = output(model, inputs)
    output(model, inputs, adapter_names=["a"] * 3)
    assert torch.equal(model.classifier(model.vit(**inputs).last_hidden_state[:, 0]), wanted)
    with peft_kernels.adapter_rows(model, ["a"] * 3):
        rows = output(model, inputs)
        with peft_kernels.adapter_rows(model, [None] * 3):
            assert not torch.allclose(output(model, inputs), rows)
        assert torch.equal(output(model, inputs), rows)
        assert torch.equal(output(model, inputs, adapter_names=["b"] * 3), wanted)
    assert torch.equal(output(model, inputs), wanted)


def test_rows_of_an_empty_batch():
    model = make_blocks()
    peft_kernels.insert_adapters(model, targets="mixer", bottleneck=3)
    assert model(torch.empty(0, 5, 12), adapter_names=[]).shape == (0, 5, 12)


def trained_adapters(model):
    """The names of the adapters and fusions that are trained, by which of their layers' parameters are."""
    paths = [path for path, p in model.named_parameters() if "adapter_site" in path and p.requires_grad]
    return {re.search(r"\.(?:adapters|fusions)\.([^.]+)", path)[1] for path in paths}


def test_adapter_that_is_set_is_trained_alone():
    """As with PEFT's set_adapter."""
    model = make_model("bert")
    for name in ("a", "b", "c"):
        peft_kernels.insert_adapters(model, bottleneck=8, name=name)
    assert trained_adapters(model) == {"a", "b", "c"}  # as a batch with `adapter_names` may name them
    assert peft_kernels.fuse_adapters(model, ["a", "b"]) == "a,b" and trained_adapters(model) == {"a,b"}
    for name in ("a", "a,b", "c", "b"):
        peft_kernels.set_adapter(model, name)
        assert trained_adapters(model) == {name}
    peft_kernels.unfreeze_adapters(model, "a")
    assert trained_adapters(model) == {"a", "b"}
    peft_kernels.set_adapter(model, "a", inference_mode=True)
    assert trained_adapters(model) == set()
    peft_kernels.set_adapter(model, "a")
    peft_kernels.set_adapter(model, None)
    assert trained_adapters(model) == set()
    assert not any(p.requires_grad for p in model.parameters())


# ---- Fusion ---------------------------------------------------------------------------------------------------------


def fused_model(name, kind="pfeiffer", **options):
    model = make_model(name)
    for adapter in ("a", "b"):
        peft_kernels.insert_adapters(model, kind, bottleneck=8, name=adapter)
    return model, peft_kernels.fuse_adapters(model, ["a", "b"], **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAKERS)
def test_fusion_of_untrained_adapters_is_the_identity(name, kind):
    inputs, bare = make_inputs(name), make_model(name)
    model = copy.deepcopy(bare)
    for adapter in ("a", "b"):
        peft_kernels.insert_adapters(model, kind, bottleneck=8, name=adapter)
    assert peft_kernels.fuse_adapters(model, ["a", "b"]) == "a,b"
    assert torch.equal(output(model, inputs), output(bare, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_fusion_of_one_adapter_twice_is_that_adapter(kind):
    """With the identity as its value matrix, whatever the scores are."""
    model, inputs = make_model("bert"), make_inputs("bert")
    for adapter in ("a", "b"):
        peft_kernels.insert_adapters(model, kind, bottleneck=8, name=adapter)
    randomize(model, "a")
    state = model.state_dict()
    model.load_state_dict({path: state[path.replace("adapters.b.", "adapters.a.")] for path in state})
    wanted = output(model, inputs)
    peft_kernels.fuse_adapters(model, ["a", "b"], value=False)
    torch.testing.assert_close(output(model, inputs), wanted, rtol=1e-4, atol=1e-5)


def test_fusion_is_trained_alone():
    model, name = fused_model("llama")
    randomize(model, "a", "b")
    trained = {path for path, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".fusions.a,b." in path for path in trained)
    found = gradients(model, make_inputs("llama"))
    for path in trained:
        assert found[path].any() != path.endswith("key.bias")  # which the softmax does not see

    peft_kernels.unfreeze_adapters(model, "a")
    assert {path for path, p in model.named_parameters() if p.requires_grad} == trained | {
        path for path in adapter_parameters(model) if ".adapters.a." in path
    }
    peft_kernels.freeze_adapters(model)
    assert not any(p.requires_grad for p in model.parameters())
    peft_kernels.unfreeze_adapters(model, name)
    assert {path for path, p in model.named_parameters() if p.requires_grad} == trained


def test_fusion_is_switched_and_removed():
    model, name = fused_model("t5", value=False)
    inputs = make_inputs("t5")
    randomize(model, "a", "b")
    fused = output(model, inputs)
    peft_kernels.set_adapter(model, "a")
    alone = output(model, inputs)
    assert not torch.allclose(alone, fused)
    peft_kernels.set_adapter(model, name)
    assert torch.equal(output(model, inputs), fused)
    with pytest.raises(ValueError, match="name: got 'a', which the fusion 'a,b' needs"):
        peft_kernels.remove_adapters(model, "a")
    peft_kernels.remove_adapters(model, name)
    peft_kernels.set_adapter(model, "a")
    assert torch.equal(output(model, inputs), alone)
    peft_kernels.remove_adapters(model, "a")


def test_dropout_of_the_fusion_follows_the_model():
    model, _ = fused_model("bert", dropout=0.5)
    randomize(model, "a", "b", "a,b")
    inputs = make_inputs("bert")
    assert torch.equal(output(model, inputs), output(model, inputs))
    assert not torch.equal(output(model.train(), inputs), output(model, inputs))
