"""`peft-kernels inspect`: folders as PEFT writes them, and folders with something wrong."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from serving_models import CONFIGS, base_model, save_adapter

from peft_kernels.checkpoints.peft_folder import CONFIG, PICKLED, WEIGHTS
from peft_kernels.cli import main
from peft_kernels.cli.inspect import product_norm

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def inspect(capsys):
    def run(folder):
        assert main(["inspect", str(folder), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def folder(tmp_path):
    save_adapter(base_model(), tmp_path)
    return tmp_path


def change(folder, **entries):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def rewrite(folder, edit):
    stored = load_file(folder / WEIGHTS)
    edit(stored)
    save_file(stored, folder / WEIGHTS)


@pytest.mark.parametrize("name", CONFIGS)
def test_lora(inspect, tmp_path, name):
    model = save_adapter(base_model(), tmp_path, **CONFIGS[name])
    found = inspect(tmp_path)
    layers = {
        key.removeprefix("base_model.model."): module
        for key, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {row["layer"] for row in found["layers"]} == layers.keys()
    for row in found["layers"]:
        layer = layers[row["layer"]]
        assert row["rank"] == layer.r["default"] and row["scaling"] == pytest.approx(layer.scaling["default"])
        assert row["norm_change"] == pytest.approx(layer.get_delta_weight("default").norm().item(), rel=1e-5)
        assert row["norm_A"] == pytest.approx(layer.lora_A["default"].weight.norm().item(), rel=1e-5)
        assert row["not_finite"] == 0
    assert found["parameters"] == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert found["size"] == 4 * found["parameters"]
    assert found["method"].split(", ")[0] == "LORA" and found["problems"] == found["unused_keys"] == []


def test_product_norm_of_experts():
    a, b = torch.randn(3 * 2, 5), torch.randn(7, 3 * 2)
    changes = [b.reshape(7, 2, 3)[..., e] @ a.reshape(3, 2, 5)[e] for e in range(3)]  # as PEFT's ParamWrapper has it
    assert product_norm(a, b, 2) == pytest.approx(float(torch.stack(changes).norm()), rel=1e-5)
    a, b = torch.randn(2, 5, 3, 3), torch.randn(7, 2, 1, 1)
    assert product_norm(a, b, 2) == pytest.approx(float((b.flatten(1) @ a.flatten(1)).norm()), rel=1e-5)


def test_ia3(inspect, tmp_path):
    model = get_peft_model(
        base_model(), IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])
    )
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data.fill_(3)
    model.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    row = next(row for row in found["layers"] if row["layer"] == LAYER)
    assert found["method"] == "IA3" and row["l"] == "1×64" and row["norm_l_less_1"] == pytest.approx(16)
    assert found["problems"] == found["unused_keys"] == []


def test_prefix(inspect, tmp_path):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    get_peft_model(base_model(), config).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found["method"] == "PREFIX_TUNING" and found["rank"] == 5
    assert [row["layer"] for row in found["layers"]] == ["(the prompt)"] and found["problems"] == []


def test_dora_embedding_and_saved_modules(inspect, tmp_path):
    targets = ["q_proj", "embed_tokens"]
    config = LoraConfig(r=3, target_modules=targets, modules_to_save=["norm"], task_type="CAUSAL_LM")
    get_peft_model(base_model(), config).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    row = next(row for row in found["layers"] if row["layer"] == "model.embed_tokens")
    assert row["rank"] == 3 and "norm_change" in row and found["unused_keys"] == []
    save_adapter(base_model(), tmp_path, use_dora=True)
    found = inspect(tmp_path)
    assert found["method"] == "LORA, DoRA" and all("norm_magnitude" in row for row in found["layers"])
    assert found["unused_keys"] == [] and "DoRA scales" in found["problems"][0]


def test_what_is_wrong_is_said(inspect, folder):
    key = f"base_model.model.{LAYER}"

    def edit(stored):
        stored[f"{key}.lora_A.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), 1.0])
        del stored[f"{key.replace('up', 'down')}.lora_B.weight"]
        stored[f"{key.replace('up', 'gate')}.lora_B.weight"] = torch.zeros(128, 5)
        stored["base_model.model.foreign.weight"] = torch.zeros(3)

    rewrite(folder, edit)
    change(folder, target_modules=["up_proj", "nothing"], init_lora_weights="pissa")
    found = inspect(folder)
    row = next(row for row in found["layers"] if row["layer"] == LAYER)
    assert row["not_finite"] == 2 and row["norm_A"] is None and row["norm_change"] is None
    text = "\n".join(found["problems"])
    for part in (
        f"1 layers have numbers that are not finite: {LAYER}",
        f"{LAYER.replace('up', 'down')} has no lora_B",
        f"{LAYER.replace('up', 'gate')} has A 4×64 and B 128×5, which do not fit the rank 4",
        "1 target modules have no weights: nothing",
        "it began with 'pissa'",
    ):
        assert part in text
    assert found["unused_keys"] == ["base_model.model.foreign.weight"]


def test_another_rank_than_the_configuration_says(inspect, folder):
    change(folder, r=2)
    assert any("but adapter_config.json says that its rank is 2" in problem for problem in inspect(folder)["problems"])


def test_names_that_a_terminal_obeys_and_as_tables(folder, capsys):
    rewrite(folder, lambda stored: stored.update({"\x1b[2J[red]": torch.zeros(1)}))
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[2J[red]" in out and LAYER in out


def cut(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-5])


def only_a_pickle(folder):
    (folder / WEIGHTS).rename(folder / PICKLED)


def move(folder):
    (folder / "other").mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(folder / "other" / name)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "got no whole safetensors"),
        (only_a_pickle, "has no adapter_model.safetensors, but adapter_model.bin, a pickle, which is not read"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"not safetensors"), "got no whole safetensors"),
        (lambda folder: (folder / CONFIG).write_text("{"), "got no JSON"),
        (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"), "got no JSON"),
        (lambda folder: change(folder, r="4"), "r: got '4', wanted a positive number"),
        (lambda folder: change(folder, rank_pattern={"(": 2}), "got the pattern '('"),
        (lambda folder: change(folder, peft_type=None), "got peft_type None"),
        (move, "wanted one with adapter_config.json; other in it have one"),
    ],
    ids=["cut", "pickle", "foreign", "config", "binary config", "rank", "pattern", "type", "below"],
)
def test_refused(folder, capsys, damage, said):
    damage(folder)
    assert main(["inspect", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.startswith("peft-kernels inspect: ") and err.count("\n") == 1


def test_no_folder(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "nothing, wanted one with adapter_config.json" in capsys.readouterr().err
