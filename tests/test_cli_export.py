"""The commands that write checkpoints and adapters: merge, export, quantize, combine."""

import json
import re

import pytest
import torch
from export_models import contents, save_adapter, save_base, tensors

from peft_kernels.checkpoints import combine_adapters, export_checkpoint
from peft_kernels.cli import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    base = save_base(folder / "base")
    for seed, name in enumerate(("one", "other")):
        save_adapter(base, folder / name, seed=seed, r=4)
    return folder


def call(*arguments):
    return main([str(argument) for argument in arguments])


def called(capsys, *arguments):
    assert call(*arguments, "--json") == 0
    out, err = capsys.readouterr()
    assert "peft-kernels" not in err
    return json.loads(out)


def failed(capsys, *arguments):
    assert call(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    return err


def same_folders(a, b):
    assert contents(a) == contents(b)


def test_export(saved, tmp_path, capsys):
    one, other = saved / "one", f"{saved / 'other'}=-0.5"
    options = ["--adapter", one, "--adapter", other, "--dtype", "float16", "--shard-size", "0.02MB"]
    report = called(capsys, "export", saved / "base", tmp_path / "out", *options)
    export_checkpoint(saved / "base", tmp_path / "same", [saved / "one", saved / "other"], weights=[1, -0.5],
                      dtype=torch.float16, max_shard_size=20_000)  # fmt: skip
    same_folders(tmp_path / "out", tmp_path / "same")
    assert report == {
        "destination": str(tmp_path / "out"), "files": 2, "size": 38720, "tensors": 21, "merged": 14, "quantized": 0,
        "dequantized": 0, "resumed": 0, "untied": False,
    }  # fmt: skip


def test_export_prints_a_table(saved, tmp_path, capsys):
    assert call("export", saved / "base", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert re.search("size +37.8 KiB", out) and re.search("merged +0", out)
    assert failed(capsys, "export", saved / "base", tmp_path / "out").endswith("wanted a new one or overwrite=True\n")
    assert call("export", saved / "base", tmp_path / "out", "--overwrite") == 0


def test_merge(saved, tmp_path, capsys):
    """Into the base's own format, with what each weight has lost."""
    assert call("quantize", saved / "base", tmp_path / "4bit", "--blocksize", "128") == 0
    capsys.readouterr()
    options = [
        "--adapter",
        saved / "one",
        "--adapter",
        f"{saved / 'other'}=0.5",
        "--correction",
        "4",
        "--dense-above",
        "9",
    ]
    report = called(capsys, "merge", tmp_path / "4bit", tmp_path / "out", *options)
    export_checkpoint(tmp_path / "4bit", tmp_path / "same", [saved / "one", saved / "other"], weights=[1, 0.5],
                      quantize="base", correction=4, dense_above=9)  # fmt: skip
    same_folders(tmp_path / "out", tmp_path / "same")
    assert report["quantized"] == 14 and len(report["merged_weights"]) == 14
    for weight in report["merged_weights"]:
        assert weight["form"] == "nf4" and weight["correction"] == 4 and 0 < weight["error"] < weight["lost"] < 9
    assert call("merge", saved / "base", tmp_path / "dense", "--adapter", saved / "one") == 0
    export_checkpoint(saved / "base", tmp_path / "exported", [saved / "one"])
    same_folders(tmp_path / "dense", tmp_path / "exported")
    assert re.search(r"q_proj.weight +bfloat16 +0 +0\.\d+ % +[\d.]+ %", capsys.readouterr().out)
    assert "wanted 4-bit ones" in failed(capsys, "merge", saved / "base", tmp_path / "none", *options)


def test_quantize(saved, tmp_path, capsys):
    options = [
        "--adapter",
        saved / "one",
        "--type",
        "fp4",
        "--blocksize",
        "128",
        "--no-double-quant",
        "--skip",
        "v_proj",
    ]
    report = called(capsys, "quantize", saved / "base", tmp_path / "out", *options)
    export_checkpoint(saved / "base", tmp_path / "same", [saved / "one"], quantize="fp4", blocksize=128,
                      double_quant=False, skip_modules=["v_proj"])  # fmt: skip
    same_folders(tmp_path / "out", tmp_path / "same")
    assert report["quantized"] == 12 and report["merged"] == 14
    report = called(capsys, "export", tmp_path / "out", tmp_path / "dense")
    assert report["dequantized"] == 12 and all(
        one.dtype is torch.bfloat16 for one in tensors(tmp_path / "dense").values()
    )
    called(capsys, "quantize", saved / "base", tmp_path / "default")
    export_checkpoint(saved / "base", tmp_path / "nf4", quantize="nf4")
    same_folders(tmp_path / "default", tmp_path / "nf4")


@pytest.mark.parametrize("method", ["ties", "svd", "dare_linear_svd"])
def test_combine(saved, tmp_path, capsys, method):
    cuts = method.endswith("svd")
    options = ["--method", method, "--density", "0.3", "--seed", "5", "--majority-sign", "frequency"]
    options += ["--rank", "3"] if cuts else []
    adapters = [saved / "one", f"{saved / 'other'}=0.5"]
    report = called(capsys, "combine", *adapters, "--output", tmp_path / "out", *options)
    combine_adapters([saved / "one", saved / "other"], tmp_path / "same", method, weights=[1, 0.5], density=0.3, seed=5,
                     majority_sign="frequency", rank=3 if cuts else None)  # fmt: skip
    same_folders(tmp_path / "out", tmp_path / "same")
    assert report["layers"] == 14 and report["rank"] == (3 if cuts else 4)
    assert 0.01 < report["lost"] < 1 if cuts else report["lost"] is None
    assert call("combine", *adapters, "--output", tmp_path / "out", *options, "--overwrite") == 0
    assert "lost" in capsys.readouterr().out


def test_a_folder_whose_name_has_a_sign_of_equality(saved, tmp_path, capsys):
    save_adapter(saved / "base", tmp_path / "r=4")
    assert called(capsys, "combine", tmp_path / "r=4", f"{tmp_path / 'r=4'}=2", "--output", tmp_path / "out")["layers"]


def test_errors(saved, tmp_path, capsys):
    nowhere, out = tmp_path / "nowhere", tmp_path / "out"
    for arguments, text in (
        (["export", nowhere, out], "export: base: got .*nowhere, wanted a folder with config.json"),
        (["quantize", saved / "base", out, "--adapter", nowhere], "quantize: folder: got .*nowhere, wanted one with"),
        (["combine", saved / "base", "--output", out], "combine: folder: got .*base, wanted one with adapter_config"),
    ):
        assert re.search(text, failed(capsys, *arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["export", "a", "b", "--shard-size", "5 apples"], "got '5 apples', wanted a size as 5GB or 500MB"),
        (["export", "a", "b", "--shard-size", "0GB"], "got '0', wanted a number above 0"),
        (["export", "a", "b", "--adapter", "c=x"], "got 'x', wanted a number"),
        (["export", "a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["merge", "a", "b"], "required: --adapter"),
        (["merge", "a", "b", "--adapter", "c", "--correction", "0"], "got '0', wanted a whole number of at least 1"),
        (["merge", "a", "b", "--adapter", "c", "--dense-above", "x"], "got 'x', wanted a share of at least 0"),
        (["quantize", "a", "b", "--blocksize", "48"], "invalid choice: 48"),
        (["combine", "a", "--output", "b", "--density", "2"], "got '2', wanted a number from 0 to 1"),
        (["combine", "a", "--output", "b", "--method", "mean"], "invalid choice: 'mean'"),
        (["combine", "a"], "required: --output"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_options(arguments, text, capsys):
    with pytest.raises(SystemExit) as left:
        call(*arguments)
    # Newer versions of argparse quote a refused number.
    err = re.sub(r"invalid choice: '(\d+)'", r"invalid choice: \1", capsys.readouterr().err)
    assert left.value.code == 2 and text in err
