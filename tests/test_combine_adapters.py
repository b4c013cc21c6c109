"""Adapters' folders combined into one: PEFT's numbers, as PEFT loads them."""

import json

import pytest
import torch
from comparison import error
from export_models import LINEAR, contents, effective, save_adapter, save_base, stock
from optional import if_installed
from safetensors.torch import load_file, save_file
from tolerances import FP32_SUM

from peft_kernels.checkpoints import combine_adapters
from peft_kernels.checkpoints.peft_folder import CONFIG, WEIGHTS

peft = if_installed("peft")

FACTORS = [0.5, -0.25]
ONE_RANK, CUT = ("linear", "ties", "magnitude_prune"), ("svd", "ties_svd", "magnitude_prune_svd")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    base = save_base(folder / "base", dtype=torch.float32)
    for name, options in {
        "a": {},
        "b": {"lora_alpha": 3, "use_rslora": True},
        "fewer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        "ranks": {"r": 3, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"up_proj": 2}},
        "embeddings": {"target_modules": [*LINEAR, "embed_tokens"]},
    }.items():
        save_adapter(base, folder / name, seed=len(name), **options)
    return folder


def by_peft(saved, names, method, **options):
    """The change of each weight by PEFT's own combination."""
    model = stock(saved / "base", *(saved / name for name in names), dtype=torch.float32)
    options = {"density": 0.4} | options
    model.add_weighted_adapter(["0", "1"], FACTORS, "all", combination_type=method, **options)
    model.base_model.set_adapter("all")
    return changes(saved, model)


def changes(saved, model):
    before = {
        name: tensor for path in (saved / "base").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    return {name: tensor - before[name] for name, tensor in effective(model).items()}


def combined(saved, tmp_path, names, method, **options):
    options = {"density": 0.4, "weights": FACTORS} | options
    report = combine_adapters([saved / name for name in names], tmp_path / "out", method, **options)
    return report, changes(saved, stock(saved / "base", tmp_path / "out", dtype=torch.float32))


def same(got, want):
    assert got.keys() <= want.keys()
    for name, tensor in want.items():
        if name in got:
            assert error(got[name], tensor) < 20 * FP32_SUM, name  # both add to weights, of which they are taken again
        else:
            assert not tensor.any(), name


@pytest.mark.parametrize(
    ("names", "method"),
    [
        *((names, method) for names in (("a", "b"), ("a", "fewer")) for method in (*ONE_RANK, "cat", *CUT)),
        # With svd PEFT takes the matrices of an embedding for those of a linear layer.
        *((("embeddings", "embeddings"), method) for method in (*ONE_RANK, "cat")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_pefts_numbers(saved, tmp_path, names, method):
    report, got = combined(saved, tmp_path, names, method)
    same(got, by_peft(saved, names, method))
    assert report.adapters == 2 and report.layers == len([name for name in got if name.endswith("weight")])
    assert report.rank == (8 if method == "cat" else 4)
    assert (report.lost is not None) == method.endswith("svd") and report.nbytes > 0 and report.dtype == "float32"


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_layers_of_different_ranks(saved, tmp_path, method):
    """The sum of two adapters, whose ranks add up."""
    options = {} if method == "cat" else {"rank": 10}
    report, got = combined(saved, tmp_path, ["a", "ranks"], method, **options)
    exact = [changes(saved, stock(saved / "base", saved / name, dtype=torch.float32)) for name in ("a", "ranks")]
    same(got, {name: sum(w * one[name] for w, one in zip(FACTORS, exact, strict=True)) for name in exact[0]})
    assert report.rank == 10 and (report.lost or 0) < 1e-5


def test_what_a_cut_loses(saved, tmp_path):
    report, got = combined(saved, tmp_path, ["a", "b"], "svd", rank=3)
    exact = [changes(saved, stock(saved / "base", saved / name, dtype=torch.float32)) for name in ("a", "b")]
    whole = {name: sum(w * one[name] for w, one in zip(FACTORS, exact, strict=True)) for name in exact[0]}
    assert report.rank == 3
    assert report.lost == pytest.approx(max(error(got[name], whole[name]) for name in whole), rel=1e-3)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_a_seed_repeats_the_masks(saved, tmp_path, method):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        combine_adapters([saved / "a", saved / "b"], tmp_path / name, method, density=0.5, seed=seed)
    one, again, other = (contents(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again and one[WEIGHTS] != other[WEIGHTS]
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "one" / WEIGHTS).values())


def edited(tmp_path, saved, weights=None, **entries):
    config = json.loads((saved / "a" / CONFIG).read_text()) | entries
    stored = load_file(saved / "a" / WEIGHTS)
    if weights:
        weights(stored)
    (tmp_path / "bad").mkdir(exist_ok=True)
    (tmp_path / "bad" / CONFIG).write_text(json.dumps(config))
    save_file(stored, tmp_path / "bad" / WEIGHTS)
    return tmp_path / "bad"


A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("options", "entries", "match"),
    [
        ({"method": "mean"}, {}, "method: got 'mean', wanted one of linear, magnitude_prune"),
        ({"density": 2}, {}, "density: got 2, wanted a number from 0 to 1"),
        ({"density": 0, "method": "dare_ties"}, {}, "density: got 0, wanted a number above 0 to 1"),
        ({"majority_sign": "x"}, {}, "majority_sign: got 'x', wanted total or frequency"),
        ({"rank": 3}, {}, "rank: got 3 with ties, wanted it with a method that ends in svd"),
        ({"rank": 0, "method": "svd"}, {}, "rank: got 0"),
        ({"weights": [1]}, {}, r"weights: got \[1\], wanted a number for each of the 2 adapters"),
        ({}, {"use_dora": True}, "an adapter with use_dora=True, wanted plain LoRA, which is all"),
        ({}, {"target_parameters": ["experts"]}, "an adapter with target_parameters="),
        ({}, {"peft_type": "IA3"}, "adapters: got IA3 and LORA"),
        ({}, {"r": 5}, r"of another shape:\n    .*wanted \[5, K\], \[N, 5\]"),
        ({}, {"fan_in_fan_out": True}, "adapters: got some with fan_in_fan_out"),
        ({}, {"weights": lambda w: w.pop(A)}, "no pairs of matrices of LoRA:\n    model.layers.1.mlp.up_proj.lora_B"),
        ({}, {"weights": lambda w: w.update({A: torch.ones(4, 31)})}, r"got \[N, K\] of \(48, 31\) and \(48, 32\)"),
        ({}, {"weights": lambda w: w[A].fill_(torch.inf)}, "with numbers that are not finite"),
    ],
)
def test_errors(saved, tmp_path, options, entries, match):
    bad = edited(tmp_path, saved, **entries)
    with pytest.raises(ValueError, match=match):
        combine_adapters([saved / "a", bad], tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_destinations(saved, tmp_path):
    for match, options in (
        ("wanted one; 'cat' and 'svd' take several", {}),
        ("none, wanted at least one", {"none": 1}),
    ):
        with pytest.raises(ValueError, match=match):
            combine_adapters([] if options else [saved / "a", saved / "ranks"], tmp_path / "out", "linear")
    combine_adapters([saved / "a"], tmp_path / "out", "linear")
    with pytest.raises(FileExistsError, match="out, which exists"):
        combine_adapters([saved / "b"], tmp_path / "out", "linear")
    before = contents(tmp_path / "out")
    combine_adapters([saved / "b"], tmp_path / "out", "linear", overwrite=True)
    assert contents(tmp_path / "out") != before
    with pytest.raises(ValueError, match="which holds"):
        combine_adapters([tmp_path / "out"], tmp_path / "out", "linear", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
