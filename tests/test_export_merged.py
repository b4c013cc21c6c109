"""Checkpoints merged into the format of their base: dense or 4 bits, with what 4 bits can't hold beside them."""

import pytest
import torch
from export_models import effective as effective_weights
from export_models import load, save_adapter, save_base, stock, tensors
from optional import if_installed

import peft_kernels
from peft_kernels.checkpoints import export_checkpoint

bnb, transformers = map(if_installed, ("bitsandbytes", "transformers"))  # without which nothing here runs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A dense base, the same in 4 bits that are not the defaults, and adapters of ranks 4 and 2 for it."""
    folder = tmp_path_factory.mktemp("saved")
    base = save_base(folder / "base", hidden=64, intermediate=128)
    export_checkpoint(base, folder / "4bit", quantize="fp4", blocksize=128, double_quant=False, skip_modules=["v_proj"])
    export_checkpoint(folder / "4bit", folder / "dequantized")
    for seed, (name, rank) in enumerate({"one": 4, "other": 2}.items()):
        save_adapter(base, folder / name, seed=seed, r=rank)
    save_adapter(base, folder / "dora", use_dora=True)
    return folder


def merge(saved, out, *adapters, base="4bit", **options):
    return export_checkpoint(saved / base, out, [saved / name for name in adapters], quantize="base", **options)


def exact_weights(saved, *adapters):
    return effective_weights(stock(saved / "dequantized", *(saved / name for name in adapters)))


def test_a_dense_base_stays_dense(saved, tmp_path):
    report = merge(saved, tmp_path / "out", "one", base="base")
    export_checkpoint(saved / "base", tmp_path / "same", [saved / "one"])
    assert all(map(torch.equal, tensors(tmp_path / "out").values(), tensors(tmp_path / "same").values()))
    assert {weight.form for weight in report.merged_weights} == {"bfloat16"}
    assert all(0 < weight.error < 2**-8 for weight in report.merged_weights)


def test_a_base_in_4_bits_keeps_its_format(saved, tmp_path):
    report = merge(saved, tmp_path / "out", "one")
    assert report.quantized == 12 and report.dequantized == 0 and report.merged == 14
    before, after = tensors(saved / "4bit"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.shape == after[name].shape and value.dtype is after[name].dtype, name
    exact = exact_weights(saved, "one")
    export_checkpoint(tmp_path / "out", tmp_path / "values")
    values = tensors(tmp_path / "values")
    for weight in report.merged_weights:
        assert weight.form == ("bfloat16" if "v_proj" in weight.name else "fp4") and weight.correction == 0
        wanted = exact[weight.name]
        error = ((values[weight.name].double() - wanted).norm() / wanted.norm()).item()
        assert weight.error == pytest.approx(error, rel=1e-3) and weight.lost > weight.error


@pytest.mark.parametrize("adapters", [("one",), ("one", "other")], ids=["one", "several"])
def test_a_correction_of_all_ranks_loses_nothing_but_its_rounding(saved, tmp_path, adapters):
    report = merge(saved, tmp_path / "out", *adapters, correction=6)
    before, after = tensors(saved / "4bit"), tensors(tmp_path / "out")
    for weight in report.merged_weights:
        if weight.form == "fp4":
            assert weight.correction == (4 if len(adapters) == 1 else 6) and weight.lost < 2**-7
            assert torch.equal(before[weight.name], after[weight.name])  # the codes


@pytest.mark.parametrize("adapter", ["one", "dora"])
def test_a_correction_of_fewer_ranks_loses_less(saved, tmp_path, adapter):
    lost = []
    for rank in (0, 2, 3):
        report = merge(saved, tmp_path / f"{rank}", adapter, correction=rank)
        lost.append(sum(weight.lost for weight in report.merged_weights if weight.form == "fp4"))
    assert lost[0] > lost[1] > lost[2] > 0


def test_weights_that_lose_too_much_become_dense(saved, tmp_path):
    losses = sorted(weight.lost for weight in merge(saved, tmp_path / "first", "one").merged_weights)
    limit = losses[-4]
    report = merge(saved, tmp_path / "out", "one", dense_above=limit)
    assert report.quantized == 9 and report.dequantized == 3
    assert all(weight.lost <= limit for weight in report.merged_weights)
    exact, stored = exact_weights(saved, "one"), tensors(tmp_path / "out")
    model, problems = load(tmp_path / "out", torch.bfloat16, device_map="cpu", output_loading_info=True)
    assert not any(problems.values()), problems
    dense = [
        weight.name for weight in report.merged_weights if weight.form == "bfloat16" and "v_proj" not in weight.name
    ]
    assert len(dense) == 3
    for name in dense:
        assert type(model.get_submodule(name.removesuffix(".weight"))) is torch.nn.Linear
        assert torch.equal(stored[name], exact[name].bfloat16())


def test_a_model_with_its_corrections(saved, tmp_path):
    """As transformers and `load_corrections` load it, it multiplies with the merged weights."""
    merge(saved, tmp_path / "out", "one", correction=4, max_shard_size=20_000)
    model = load(tmp_path / "out", torch.bfloat16, device_map="cpu")
    peft_kernels.optimize(model, tune=False)
    assert peft_kernels.merging.load_corrections(model, tmp_path / "out") == 12
    wanted = exact_weights(saved, "one")["model.layers.1.mlp.down_proj.weight"]
    x = torch.randn(3, wanted.shape[1]).bfloat16()
    y = model.model.layers[1].mlp.down_proj(x)
    expected = x.double() @ wanted.T
    assert (y.double() - expected).norm() < 0.02 * expected.norm()
    with pytest.raises(FileNotFoundError, match=r"state: got .*, wanted a folder with safetensors"):
        peft_kernels.merging.load_corrections(model, tmp_path)
