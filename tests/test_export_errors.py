"""Files, adapters and arguments that an export refuses, and why; nothing is written then."""

import json
import shutil

import pytest
import torch
from export_models import contents, save_adapter, save_base
from optional import if_installed
from safetensors.torch import load_file, save_file

from peft_kernels.checkpoints import export_checkpoint
from peft_kernels.checkpoints.base import CONFIG, INDEX, SINGLE
from peft_kernels.checkpoints.peft_folder import CONFIG as ADAPTER_CONFIG
from peft_kernels.checkpoints.peft_folder import PICKLED, WEIGHTS

peft = if_installed("peft")

LAYER = "base_model.model.model.layers.1.mlp.up_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    base = save_base(folder / "base")
    save_adapter(base, folder / "lora")
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    save_adapter(base, folder / "ia3", config)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a base and adapters, to be damaged, beside which nothing may be left."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    before = {path.name for path in tmp_path.iterdir()}
    yield tmp_path
    assert {path.name for path in tmp_path.iterdir()} == before


def refused(folder, match, adapters=("lora",), kind=ValueError, destination="out", **options):
    with pytest.raises(kind, match=match):
        export_checkpoint(folder / "base", folder / destination, [folder / name for name in adapters], **options)


def edit(path, entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "the type PREFIX_TUNING, which adds to what the model reads"),
        ({"peft_type": "PROMPT_TUNING"}, "the type PROMPT_TUNING, which adds to what the model reads"),
        ({"peft_type": "LOKR"}, r"the type 'LOKR', wanted LoRA \(rsLoRA, DoRA\) or \(IA\)³"),
        ({"peft_type": None}, "the type None"),
        ({"alora_invocation_tokens": [1]}, r"an adapter with alora_invocation_tokens=\[1\]"),
        ({"trainable_token_indices": [1]}, r"an adapter with trainable_token_indices=\[1\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base's weights"),
        ({"use_dora": True}, "that do not fit:\n    .*got no magnitude"),
        ({"r": 5}, r"up_proj.lora_A: got \[4, 32\], wanted \[5, 32\]"),
        ({"lora_alpha": "x"}, "lora_alpha: got 'x', wanted a positive number"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: got the pattern '\('"),
        ({"fan_in_fan_out": True}, r"up_proj.lora_A: got \[4, 32\], wanted \[4, 48\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{name}" for name in value),
)
def test_configurations_of_adapters(folder, entries, match):
    edit(folder / "lora" / ADAPTER_CONFIG, entries)
    refused(folder, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda w: w.pop(B),
            "that do not fit:\n    model.layers.1.mlp.up_proj: got no lora_B, wanted it beside lora_A",
        ),
        (lambda w: w.clear(), "no tensors"),
        (
            lambda w: w.update({one.replace("1", "7"): w[one].clone() for one in (A, B)}),
            "1 that name no weight of the base",
        ),
        (lambda w: w.update({"x.y": torch.ones(3)}), "1 that name no weight of the base:\n    x.y"),
        (lambda w: w[A][1].fill_(torch.nan), f"numbers that are not finite:\n    {A[17:]}"),
        (lambda w: w.update({A: w[A][:, :-1].clone()}), r"got \[4, 31\], wanted \[4, 32\]"),
        (lambda w: w.update({A: w[A].long()}), "of another dtype:\n.*got int64"),
        (lambda w: w.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight: got \[3\], wanted \[32\]"),
        (lambda w: w.update({f"{LAYER}.lora_B.bias": torch.ones(48)}), "no weight of the base:\n.*up_proj.lora_B.bias"),
        (lambda w: w.update({f"{LAYER}.ia3_l": torch.ones(48, 1)}), "got ia3_l, lora_A, lora_B, wanted those of LORA"),
    ],
    ids=["one missing", "empty", "layer", "foreign", "nan", "shape", "integers", "module", "bias", "ia3"],
)
def test_weights_of_adapters(folder, change, match):
    weights = load_file(folder / "lora" / WEIGHTS)
    change(weights)
    save_file(weights, folder / "lora" / WEIGHTS)
    refused(folder, match)


def test_files_of_adapters(folder):
    path = folder / "lora" / WEIGHTS
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PK\x03\x04" + whole):
        path.write_bytes(content)
        refused(folder, "got no whole safetensors")
    path.rename(path.parent / PICKLED)
    refused(folder, f"has no {WEIGHTS}, but {PICKLED}, a pickle", kind=FileNotFoundError)
    (folder / "lora" / ADAPTER_CONFIG).unlink()
    refused(folder, f"wanted one with {ADAPTER_CONFIG}", kind=FileNotFoundError)


def test_adapters_together(folder):
    refused(folder, "adapters: got IA3 and LORA, wanted adapters of one method", ["lora", "ia3"])
    refused(folder, r"weights: got 0.5 for \(IA\)³.*wanted 1", ["ia3"], weights=[0.5])
    refused(
        folder, r"weights: got \[1.0\], wanted a number for each of the 2 adapters", ["lora", "lora"], weights=[1.0]
    )
    for seed in (1, 2):
        name = f"saved{seed}"
        save_adapter(folder / "base", folder / "lora" / name, seed=seed, modules_to_save=["lm_head"])
    refused(folder, "lm_head.weight, which another adapter replaces, too", ["lora/saved1", "lora/saved2"])
    refused(folder, "lm_head.weight, which replaces the base's: got weight 0.5", ["lora/saved1"], weights=[0.5])


def index_of(folder):
    return json.loads((folder / "base" / INDEX).read_text())


@pytest.mark.parametrize("name", ["../base/model-00001-of-00005.safetensors", "/etc/passwd", "..", "a.bin"])
def test_an_index_stays_in_its_folder(folder, name):
    index = index_of(folder)
    index["weight_map"]["lm_head.weight"] = name
    (folder / "base" / INDEX).write_text(json.dumps(index))
    refused(folder, "wanted names of safetensors in the same folder")


def test_files_of_bases(folder):
    index = index_of(folder)
    name = index["weight_map"]["lm_head.weight"]
    path = folder / "base" / name
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b""):
        path.write_bytes(content)
        refused(folder, f"{name}: got no whole safetensors")
    path.write_bytes(whole)
    (folder / "base" / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"more.weight": name}}))
    refused(folder, f"does not fit its files:\n  1 missing:\n    more.weight in {name}")
    for text, match in (("{", "got no JSON"), ("{}", "weight_map: got none"), ("[]", "got a list, wanted an index")):
        (folder / "base" / INDEX).write_text(text)
        refused(folder, match)
    (folder / "base" / INDEX).write_text(json.dumps(index))
    path.rename(folder / "lora" / name)
    refused(folder, f"which has no {name}, as {INDEX} says", kind=FileNotFoundError)
    (folder / "base" / INDEX).rename(folder / "base/pytorch_model.bin")
    refused(folder, f"has no {SINGLE} or {INDEX}, but pytorch_model.bin, a pickle", kind=FileNotFoundError)
    (folder / "base" / CONFIG).unlink()
    refused(folder, f"wanted a folder with {CONFIG}", kind=FileNotFoundError)


def replace_in_base(folder, name, tensor):
    path = folder / "base" / index_of(folder)["weight_map"][name]
    save_file(load_file(path) | {name: tensor}, path, metadata={"format": "pt"})


def test_values_of_bases(folder):
    name, tensor = "model.layers.1.mlp.up_proj.weight", torch.ones(48, 32)
    replace_in_base(folder, name, tensor.to(torch.float8_e4m3fn))
    refused(folder, f"of an unsupported dtype:\n    {name}: got F8_E4M3")
    replace_in_base(folder, name, tensor.double())
    refused(folder, f"{name}: got F64, wanted one of F32, BF16, F16")
    replace_in_base(folder, name, tensor.long())
    refused(folder, f"base: {name}: got int64, wanted float32")
    replace_in_base(folder, name, tensor.index_fill(0, torch.tensor([3]), torch.nan))
    refused(folder, f"{name}: got numbers that are not finite, wanted those that float32 can hold")
    replace_in_base(folder, name, tensor * 1e5)
    refused(folder, f"{name}: got numbers that are not finite, wanted those that float16", dtype=torch.float16)
    edit(folder / "base" / CONFIG, {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    refused(folder, "base: got a checkpoint quantised by 'gptq'")


def test_4bit_weights_of_bases(folder):
    export_checkpoint(folder / "base", folder / "lora/4bit", quantize="nf4")
    shutil.rmtree(folder / "base")
    (folder / "lora/4bit").rename(folder / "base")
    path, weight = folder / "base" / SINGLE, "model.layers.1.mlp.up_proj.weight"
    whole = load_file(path)
    state = json.loads(bytes(whole[f"{weight}.quant_state.bitsandbytes__nf4"].tolist()))

    def text(**entries):
        return torch.tensor(list(json.dumps(state | entries).encode()), dtype=torch.uint8)

    for part, tensor, match in (
        ("absmax", None, "got a 4-bit weight without 'absmax'"),
        ("absmax", torch.zeros(3, dtype=torch.uint8), "absmax: got uint8"),
        ("quant_map", torch.zeros(16), "quant_map: got other values, wanted those of nf4"),
        ("quant_state.bitsandbytes__nf4", text(shape=[4, 32]), r"got \[4, 32\]|wanted \[4, 4\]"),
        ("quant_state.bitsandbytes__nf4", text(shape="x"), "quant_state.shape: got 'x'"),
        ("quant_state.bitsandbytes__nf4", text(dtype="float3"), "dtype: got 'float3'"),
        ("quant_state.bitsandbytes__nf4", text(blocksize=48), "blocksize: got 48"),
        ("quant_state.bitsandbytes__nf4", torch.zeros(3, dtype=torch.uint8), "got no whole safetensors"),
    ):
        changed = whole | {f"{weight}.{part}": tensor}
        save_file({name: one for name, one in changed.items() if one is not None}, path)
        refused(folder, match)


def test_destinations(folder):
    kept = contents(folder)
    refused(folder, "ia3, which exists, wanted a new one", kind=FileExistsError, destination="ia3")
    refused(folder, "destination: got .*, which holds .*base", destination="base", overwrite=True)
    refused(folder, "destination: got .*, which holds .*base", destination=".", overwrite=True)
    refused(folder, "has no config.json, wanted what may be replaced", (), FileExistsError, "ia3", overwrite=True)
    refused(folder, "which is no folder", (), FileExistsError, "base/config.json", overwrite=True)
    refused(folder, "destination: got .*, which holds .*base", (), destination="ia3/..", overwrite=True)
    assert contents(folder) == kept


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quantize": "int8"}, "quantize: got 'int8', wanted None, 'nf4', 'fp4' or 'base'"),
        ({"correction": -1}, "correction: got -1, wanted a positive integer"),
        ({"correction": 4}, "quantize: got dense weights, with correction=4, wanted 4-bit ones"),
        ({"dense_above": -0.5}, "dense_above: got -0.5, wanted a share of at least 0, or None"),
        ({"dtype": torch.float64}, "dtype: got torch.float64, wanted None, torch.float32"),
        ({"blocksize": 48}, "blocksize: got 48, wanted a power of two"),
        ({"double_quant": 1}, "double_quant: got 1"),
        ({"max_shard_size": 0}, "max_shard_size: got 0"),
        ({"skip_modules": "lm_head"}, "skip_modules: got 'lm_head', wanted a list of names"),
        ({"skip_modules": ["("]}, r"skip_modules: got '\(': .*, wanted names"),
        ({"overwrite": 1}, "overwrite: got 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_arguments(folder, options, match):
    refused(folder, match, **options)


def test_models_that_transformers_does_not_know(folder):
    edit(folder / "base" / CONFIG, {"architectures": ["NobodysForCausalLM"]})
    refused(folder, "a model of the class 'NobodysForCausalLM', wanted one of transformers' own", (), quantize="nf4")
    edit(folder / "base" / CONFIG, {"architectures": ["LlamaForCausalLM"], "hidden_size": 33})
    refused(folder, "base: got .*base, of which transformers makes no model|refuses", (), quantize="nf4")
    edit(folder / "base" / CONFIG, {"model_type": "nobodys"})
    refused(folder, "base: got .*base, whose configuration transformers refuses", (), quantize="nf4")
