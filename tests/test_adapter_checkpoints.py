"""save_adapter and load_adapter: AdapterHub's own files, their outputs, the way there and back, and bad ones."""

import json

import pytest
import torch
from adapter_models import (
    ADAPTER,
    FUSION,
    hub_checkpoint,
    hub_model,
    hub_part,
    hub_texts,
    make_inputs,
    make_model,
    randomize,
)
from comparison import error
from safetensors.torch import load_file, save_file
from tolerances import FP32_SUM
from torch import nn

import peft_kernels
from peft_kernels.adapters.hub import adapter_to_hub
from peft_kernels.adapters.insertion import find_state

pytestmark = pytest.mark.kernels

HUB_MODELS = ["bert", "roberta", "llama", "t5", "vit"]
HUB_ADAPTERS = ["pfeiffer", "houlsby", "parallel", "gated", "second"]


def output(model, inputs):
    with torch.no_grad():
        result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


# ---- AdapterHub's files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUB_MODELS)
def test_outputs_are_those_of_adapterhub(name, tmp_path):
    model, inputs, wanted = hub_model(name, tmp_path / "model"), hub_part(name, "inputs"), hub_part(name, "outputs")
    for adapter in (*HUB_ADAPTERS, "fusion"):
        loaded = peft_kernels.load_adapter(model, hub_checkpoint(name, adapter, tmp_path / adapter))
        assert loaded == ("pfeiffer,second" if adapter == "fusion" else adapter)
        assert error(output(model, inputs), wanted[adapter]) < FP32_SUM
    assert error(wanted["pfeiffer"], wanted["second"]) > 0.01


@pytest.mark.parametrize("name", HUB_MODELS)
def test_files_are_those_of_adapterhub(name, tmp_path):
    """What was loaded is saved as AdapterHub had saved it, in all entries that both know."""
    model = hub_model(name, tmp_path / "model")
    for adapter in (*HUB_ADAPTERS, "fusion"):
        loaded = peft_kernels.load_adapter(model, hub_checkpoint(name, adapter, tmp_path / adapter))
        peft_kernels.save_adapter(model, tmp_path / "saved", loaded)
        config, weights = FUSION if adapter == "fusion" else ADAPTER
        got, wanted = load_file(tmp_path / "saved" / weights), hub_part(name, adapter)
        assert set(got) == set(wanted) and all(torch.equal(got[key], wanted[key]) for key in wanted)

        got, wanted = json.loads((tmp_path / "saved" / config).read_text()), json.loads(hub_texts(name)[adapter])
        assert got.pop("version").startswith("peft_kernels.")
        ours, theirs = got.pop("config"), wanted["config"]
        assert got == {entry: wanted[entry] for entry in got}
        # Another factor can stand for the same bottleneck; the rest is AdapterHub's training's.
        for entry in ("reduction_factor", "regularization", "dropout_prob"):
            ours.pop(entry, None)
        assert ours == {entry: theirs[entry] for entry in ours}


def test_prefix_of_the_base_model(tmp_path):
    """A file of a model without a head fits one with a head, and the other way round."""
    base, model = hub_model("bert", tmp_path / "model"), None
    folder = hub_checkpoint("bert", "houlsby", tmp_path / "base")
    peft_kernels.load_adapter(base, folder)
    model = type(make_model("bert"))(base.config)
    peft_kernels.load_adapter(model, folder)
    peft_kernels.save_adapter(model, tmp_path / "head", "houlsby")
    assert all(key.startswith("bert.encoder.") for key in load_file(tmp_path / "head" / ADAPTER[1]))
    peft_kernels.load_adapter(base, tmp_path / "head", "again")
    hooks = [module for module in base.modules() if isinstance(module, peft_kernels.adapters.hooks.AdapterHook)]
    for hook in hooks:
        for (_, got), (_, wanted) in zip(
            hook.adapters["again"].named_parameters(), hook.adapters["houlsby"].named_parameters(), strict=True
        ):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("d", [16, 100, 576, 768, 4096])
def test_factor_gives_the_bottleneck_back(d):
    for bottleneck in range(1, min(d, 600)):
        config = peft_kernels.adapters.AdapterConfig(bottleneck=bottleneck)
        factor = adapter_to_hub(config, d)["reduction_factor"]
        assert int(d // factor) == bottleneck  # as AdapterHub computes it


def test_activation_of_old_files(tmp_path):
    """Files without a version mean the tanh form by "gelu"."""
    model = hub_model("bert", tmp_path / "model")
    folder = hub_checkpoint("bert", "pfeiffer", tmp_path / "old")
    described = json.loads((folder / ADAPTER[0]).read_text())
    del described["version"]
    (folder / ADAPTER[0]).write_text(json.dumps(described))
    peft_kernels.load_adapter(model, folder)
    assert find_state(model).adapters["pfeiffer"].activation == "gelu_tanh"


# ---- There and back -------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "all": {"scale": "learned", "gated": True, "norm_before": True, "activation": "leaky_relu", "dropout": 0.1},
    "own": {"kind": "pfeiffer", "norm_after": True, "leave_out": [1]},  # which AdapterHub computes otherwise
    "parallel": {"kind": "parallel", "scale": 4.0, "locations": ["attention", "ffn"], "activation": "none"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["roberta", "qwen3", "t5", "vit"])
def test_there_and_back(name, options, tmp_path):
    model, inputs = make_model(name), make_inputs(name)
    peft_kernels.insert_adapters(model, bottleneck=8, name="one", **options)
    randomize(model, "one")
    wanted = output(model, inputs)
    peft_kernels.save_adapter(model, tmp_path / "one", "one")
    config = find_state(model).adapters["one"]
    peft_kernels.remove_adapters(model)
    assert not torch.allclose(output(model, inputs), wanted)
    assert peft_kernels.load_adapter(model, tmp_path / "one", "other") == "other"
    assert torch.equal(output(model, inputs), wanted)
    assert find_state(model).adapters == {"other": config}
    described = json.loads((tmp_path / "one" / ADAPTER[0]).read_text())
    assert ("config" in described) == (options is not OPTIONS["own"])


def test_adapters_by_pattern_there_and_back(tmp_path):
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(3, 6)
    peft_kernels.insert_adapters(model, targets=["0", "2"], bottleneck=2)
    randomize(model, "default")
    wanted = model(x)
    peft_kernels.save_adapter(model, tmp_path)
    peft_kernels.remove_adapters(model)
    peft_kernels.load_adapter(model, tmp_path)
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("kind", ["pfeiffer", "parallel"])
def test_fusion_there_and_back(kind, tmp_path):
    model, inputs = make_model("bert"), make_inputs("bert")
    for name in ("a", "b"):
        peft_kernels.insert_adapters(model, kind, bottleneck=8, name=name)
    name = peft_kernels.fuse_adapters(
        model, ["a", "b"], value=kind == "pfeiffer", temperature=4.0, temperature_decay=1.5
    )
    randomize(model, "a", "b", "a,b")
    model.train()(**inputs)  # after which the temperature is 2.5
    wanted = output(model.eval(), inputs)
    for adapter in ("a", "b", name):
        peft_kernels.save_adapter(model, tmp_path / adapter, adapter)
    peft_kernels.remove_adapters(model)
    for adapter in ("a", "b", name):
        peft_kernels.load_adapter(model, tmp_path / adapter)
    assert torch.equal(output(model, inputs), wanted)
    assert find_state(model).fusions[name].temperature == 2.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_dtype_is_kept(dtype, tmp_path):
    model = make_model("vit")
    peft_kernels.insert_adapters(model, bottleneck=8, dtype=dtype)
    peft_kernels.save_adapter(model, tmp_path)
    peft_kernels.load_adapter(model, tmp_path, "again")
    assert {parameter.dtype for path, parameter in model.named_parameters() if ".again." in path} == {dtype}


def test_saving_again_replaces_the_files(tmp_path):
    model = make_model("vit")
    peft_kernels.insert_adapters(model, bottleneck=8)
    peft_kernels.save_adapter(model, tmp_path)
    randomize(model, "default")
    peft_kernels.save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(ADAPTER)
    assert all(tensor.abs().sum() > 0 for tensor in load_file(tmp_path / ADAPTER[1]).values())


# ---- Bad files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = make_model("llama")
    peft_kernels.insert_adapters(model, "pfeiffer", bottleneck=8, name="news")
    peft_kernels.save_adapter(model, tmp_path, "news")
    return tmp_path


def refused(folder, text, model=None, error=ValueError, name=None):
    """Tries to load it into a model, which has to stay as it was."""
    model = model or make_model("llama")
    before = [(path, len(module._forward_hooks)) for path, module in model.named_modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error) as raised:
        peft_kernels.load_adapter(model, folder, name)
    assert text in str(raised.value)
    assert before == [(path, len(module._forward_hooks)) for path, module in model.named_modules()]
    assert trained == [parameter.requires_grad for parameter in model.parameters()]
    return str(raised.value)


def edit(folder, *, drop=(), **changes):
    path = folder / ADAPTER[0]
    described = json.loads(path.read_text())
    described["config"] = {k: v for k, v in (described["config"] | changes).items() if k not in drop}
    path.write_text(json.dumps(described))


def test_no_files(tmp_path):
    refused(tmp_path, f"folder: got {tmp_path}, wanted one with adapter_config.json", error=FileNotFoundError)


@pytest.mark.parametrize("files", [ADAPTER, FUSION], ids=["adapter", "fusion"])
def test_pickle_is_not_read(files, saved, tmp_path):
    model = make_model("llama")
    pickled = "pytorch_adapter.bin" if files is ADAPTER else "pytorch_model_adapter_fusion.bin"
    (saved / ADAPTER[1]).unlink()
    (saved / ADAPTER[0]).rename(saved / files[0])
    (saved / pickled).write_bytes(b"not read")
    text = f"which has no {files[1]}, but {pickled}, a pickle, which is not read"
    refused(saved, text, model, FileNotFoundError)


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        (ADAPTER[0], "{", "got no JSON"),
        (ADAPTER[0], "[]", "wanted AdapterHub's configuration"),
        (ADAPTER[0], '{"name": "a"}', "config: got None"),
        (ADAPTER[0], '{"name": "a", "peft_kernels": {"colour": 3}}', "unexpected keyword argument 'colour'"),
        (ADAPTER[0], '{"name": "a", "peft_kernels": 3}', "peft_kernels: got 3, wanted the configuration's entries"),
        (ADAPTER[0], '{"name": "a", "config": ' + 100_000 * "[" + 100_000 * "]" + "}", "got no JSON"),
        (ADAPTER[1], "no tensors", "got no safetensors"),
    ],
)
def test_broken_file(saved, file, content, text):
    (saved / file).write_text(content)
    assert str(saved / file) in refused(saved, text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"non_linearity": "mish"}, "activation: got 'mish', wanted one of"),
        ({"non_linearity": ["relu"]}, "activation: got ['relu'], wanted one of"),
        ({"reduction_factor": {"1": 4}}, "reduction_factor: got {'1': 4}, wanted a positive number"),
        ({"reduction_factor": 1e-300}, "reduction_factor: got 1e-300, wanted a positive number"),
        ({"dropout": "x"}, "dropout: got 'x', wanted a probability in [0, 1)"),
        ({"leave_out": 5}, "leave_out: got 5, wanted several, in a list or tuple"),
        ({"leave_out": ["0"]}, "leave_out: got '0', which is no layer's number, wanted some of 0, 1"),
        ({"leave_out": [7]}, "leave_out: got 7, which is no layer's number, wanted some of 0, 1"),
        ({"scaling": "channel"}, "scaling: got 'channel', wanted a number or 'learned'"),
        ({"phm_layer": True}, "phm_layer: got True, wanted False: other adapters are not supported"),
        ({"inv_adapter": "nice"}, "inv_adapter: got 'nice', wanted None"),
        ({"stochastic_depth": 0.1}, "stochastic_depth: got 0.1"),
        ({"original_ln_after": False}, "original_ln_after: got False"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln: got 'post_add'"),
        ({"ln_after": True}, "original_ln_before: got True, wanted False"),
        ({"architecture": "lora"}, "architecture: got 'lora', wanted None"),
        ({"output_adapter": False}, "locations: got (), wanted some of"),
        ({"drop": ["reduction_factor"]}, "reduction_factor: got nothing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configuration_that_cannot_be_had(saved, changes, text):
    edit(saved, **changes)
    refused(saved, text)


def test_model_of_another_size(saved):
    text = refused(saved, "does not fit a BertForSequenceClassification", make_model("bert"))
    assert "8 missing:" in text and "8 not the model's:" in text
    assert "bert.encoder.layer.0.output.adapters.news.adapter_down.0.weight" in text
    assert "layers.0.output_adapters.adapters.news.adapter_down.0.weight" in text and "…" in text


def test_tensors_that_do_not_fit(saved):
    tensors = load_file(saved / ADAPTER[1])
    place = "model.layers.1.output_adapters.adapters.news."
    tensors[f"{place}adapter_up.weight"] = torch.zeros(16, 8)
    tensors["extra"] = tensors.pop(f"{place}adapter_up.bias")
    save_file(tensors, saved / ADAPTER[1])
    assert refused(saved, "so nothing was loaded:").splitlines()[1:] == [
        "  1 missing:",
        f"    {place}adapter_up.bias",
        "  1 not the model's:",
        "    extra",
        "  1 of another shape:",
        f"    {place}adapter_up.weight: got [16, 8], wanted [32, 8]",
    ]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(saved, number):
    tensors = load_file(saved / ADAPTER[1])
    key = next(iter(tensors))
    tensors[key].view(-1)[5] = number
    save_file(tensors, saved / ADAPTER[1])
    text = refused(saved, "so nothing was loaded:")
    assert text.splitlines()[1:] == ["  1 with numbers that are not finite:", f"    {key}"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float64], ids=str)
@pytest.mark.parametrize("number", [0, -1])
def test_dtype_that_no_adapter_has(saved, dtype, number):
    tensors = load_file(saved / ADAPTER[1])
    key = list(tensors)[number]
    tensors[key] = tensors[key].to(dtype)
    save_file(tensors, saved / ADAPTER[1])
    assert refused(saved, "so nothing was loaded:").splitlines()[1:] == [
        "  1 of another dtype:",
        f"    {key}: got {dtype}, wanted one of torch.float32, torch.bfloat16, torch.float16",
    ]


def test_dtype_holds_what_all_tensors_do(saved):
    """The weights of a file with both 16-bit types lose neither precision nor range."""
    tensors = {key: (tensor + 1e30).bfloat16() for key, tensor in load_file(saved / ADAPTER[1]).items()}
    precise = next(key for key in tensors if key.endswith("adapter_up.bias"))
    tensors[precise] = torch.full_like(tensors[precise], 1 + 2**-10, dtype=torch.float16)
    save_file(tensors, saved / ADAPTER[1])
    model = make_model("llama")
    peft_kernels.load_adapter(model, saved)
    own = [parameter for path, parameter in model.named_parameters() if "adapter_site" in path]
    assert sorted(map(torch.sum, own)) == sorted(tensor.float().sum() for tensor in tensors.values())


def test_name_that_is_taken(saved):
    model = make_model("llama")
    peft_kernels.insert_adapters(model, name="news", bottleneck=8)
    refused(saved, "name: got 'news', which the model has already", model)
    peft_kernels.load_adapter(model, saved, "other")


def test_fusion_without_its_adapters(tmp_path):
    model = hub_model("bert", tmp_path / "model")
    fusion = hub_checkpoint("bert", "fusion", tmp_path / "fusion")
    refused(fusion, "got a BertModel without adapters", model)
    peft_kernels.load_adapter(model, hub_checkpoint("bert", "pfeiffer", tmp_path / "pfeiffer"))
    refused(fusion, "names: got 'second', wanted one of 'pfeiffer'", model)
    peft_kernels.load_adapter(model, hub_checkpoint("bert", "second", tmp_path / "second"))
    refused(fusion, "name: got 'mine', wanted 'pfeiffer,second'", model, name="mine")
    for entry, value in (("residual_before", True), ("query", False), ("query_before_ln", True)):
        refused(
            hub_checkpoint("bert", "fusion", tmp_path / "changed", **{entry: value}), f"{entry}: got {value}", model
        )
    peft_kernels.load_adapter(model, fusion)
    refused(fusion, "for which the model has a fusion already", model)


def test_fusion_of_parallel_adapters_of_adapterhub(tmp_path):
    model = hub_model("bert", tmp_path / "model")
    for name in ("pfeiffer", "second"):
        peft_kernels.load_adapter(model, hub_checkpoint("bert", "parallel", tmp_path / "parallel"), name)
    fusion = hub_checkpoint("bert", "fusion", tmp_path / "fusion")
    refused(fusion, "got AdapterHub's fusion of the parallel adapter 'pfeiffer', wanted series ones", model)
