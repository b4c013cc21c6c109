"""PEFT's folders that a pool refuses, and why; the pool goes on as before."""

import json
import shutil

import pytest
import torch
from comparison import error
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from serving_models import CONFIGS, base_model, logits, save_adapter
from tiny_models import SAME_STEP

from peft_kernels.checkpoints.peft_folder import CONFIG, PICKLED, WEIGHTS, matches
from peft_kernels.serving import AdapterPool

LAYER = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "good"
    base = base_model()
    return base, folder, logits(save_adapter(base, folder))


@pytest.fixture
def pool(saved, tmp_path):
    """One that serves the good adapter, a copy of which is in `bad`; afterwards it still does, and nothing else."""
    base, folder, wanted = saved
    shutil.copytree(folder, tmp_path / "bad")
    with AdapterPool(base, slots=2, max_rank=8) as pool:
        pool.load("good", folder)
        slab = pool._slab.clone()
        yield pool
        assert pool.names == ("good",) and torch.equal(pool._slab, slab)
        with pool.batch(["good"]):
            assert error(logits(base), wanted) <= SAME_STEP


def refused(pool, folder, match, kind=ValueError):
    for call in (lambda: pool.load("bad", folder), lambda: pool.swap("good", folder)):
        with pytest.raises(kind, match=match) as caught:
            call()
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"use_dora": True}, "an adapter with use_dora=True, wanted plain LoRA"),
        ({"lora_bias": True}, "an adapter with lora_bias=True"),
        ({"bias": "all"}, "an adapter with bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"an adapter with modules_to_save=\['lm_head'\]"),
        ({"trainable_token_indices": [1, 2]}, "an adapter with trainable_token_indices="),
        ({"target_parameters": ["weight"]}, "an adapter with target_parameters="),
        ({"a_later_method": {"x": 1}}, "an adapter with a_later_method="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base's weights"),
        ({"peft_type": "IA3"}, "an adapter of the type 'IA3', wanted 'LORA'"),
        ({"peft_type": None}, "an adapter of the type None"),
        ({"r": "4"}, "r: got '4', wanted a positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: got nan, wanted a positive number"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: got 0, wanted a positive number"),
        ({"alpha_pattern": [3]}, r"alpha_pattern: got \[3\], wanted numbers by the names of layers"),
        ({"rank_pattern": {"(": 3}}, r"got the pattern '.*\(.*"),
        ({"r": 5}, r"of another shape:\n    model.layers.0.*lora_A: got \[4, 64\], wanted \[5, 64\]"),
        ({"r": 9}, r"q_proj: got rank 9, wanted at most max_rank, 8"),
    ],
    ids=str,
)
def test_configuration(pool, tmp_path, entries, match):
    path = tmp_path / "bad" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    refused(pool, tmp_path / "bad", match)


def test_no_configuration(pool, tmp_path):
    path = tmp_path / "bad" / CONFIG
    for text, match in (("{", "got no JSON"), ("[" * 100_000, "got no JSON"), ("[1]", "got a list, wanted PEFT's")):
        path.write_text(text)
        refused(pool, tmp_path / "bad", match)
    path.unlink()
    refused(pool, tmp_path / "bad", f"wanted one with {CONFIG}", FileNotFoundError)
    refused(pool, tmp_path / "nowhere", f"wanted one with {CONFIG}", FileNotFoundError)


A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop(B), r"1 missing:\n    model.layers.1.mlp.up_proj.lora_B$"),
        (lambda w: w.clear(), r"28 missing:(\n    .*){5}\n    …"),
        (lambda w: w.update({f"{LAYER}.lora_magnitude_vector": torch.ones(3)}), "1 that are no matrices of LoRA:"),
        (lambda w: w.update({"x.y": torch.ones(3)}), "1 that are no matrices of LoRA:\n    x.y"),
        (lambda w: w.update({A.replace("1", "7"): torch.ones(4, 64)}), "1 of layers that are not"),
        (lambda w: w[A][1].fill_(torch.nan), "1 with numbers that are not finite in float32:"),
        (lambda w: w[B][1].fill_(-torch.inf), "1 with numbers that are not finite in float32:"),
        (lambda w: w.update({A: torch.ones(4, 63)}), r"got \[4, 63\], wanted \[4, 64\]"),
        (lambda w: w.update({A: torch.ones(4, 64).long()}), "1 of another dtype:.*\n.*got int64"),
    ],
    ids=["one missing", "empty", "magnitude", "foreign", "layer", "nan", "inf", "shape", "integers"],
)  # fmt: skip
def test_weights(pool, tmp_path, change, match):
    weights = load_file(tmp_path / "bad" / WEIGHTS)
    change(weights)
    save_file(weights, tmp_path / "bad" / WEIGHTS)
    refused(pool, tmp_path / "bad", match)


def test_no_safetensors(pool, tmp_path):
    path = tmp_path / "bad" / WEIGHTS
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:20], b"", whole + b"more", b"\xff" * 100, b"PK\x03\x04" + whole):
        path.write_bytes(content)
        refused(pool, tmp_path / "bad", "got no whole safetensors")
    path.rename(path.parent / PICKLED)
    refused(pool, tmp_path / "bad", f"has no {WEIGHTS}, but {PICKLED}, a pickle", FileNotFoundError)


def test_too_large_for_the_dtype(saved, tmp_path):
    base, folder, _ = saved
    shutil.copytree(folder, tmp_path / "bad")
    weights = load_file(folder / WEIGHTS)
    weights[f"{LAYER}.lora_A.weight"][0, 0] = 1e6
    save_file(weights, tmp_path / "bad" / WEIGHTS)
    with AdapterPool(base, dtype=torch.float16) as pool, pytest.raises(ValueError, match="not finite in float16"):
        pool.load("bad", tmp_path / "bad")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_missing_is_found_in_every_form(name, tmp_path):
    """What PEFT's configuration targets is what the file has to have."""
    base = base_model()
    save_adapter(base, tmp_path, **CONFIGS[name])
    weights = load_file(tmp_path / WEIGHTS)
    with AdapterPool(base, max_rank=8) as pool:
        pool.load("whole", tmp_path)
        del weights["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
        save_file(weights, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=r"1 missing:\n    model.layers.1.self_attn.q_proj.lora_A"):
            pool.load("bad", tmp_path)


@pytest.mark.parametrize("pattern", ["q_proj", "self_attn.q_proj", r".*\.1\..*", "proj", "^model.layers.0.mlp.up_proj"])
def test_patterns_are_pefts(pattern):
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "q_proj"):
        assert matches(pattern, layer) == (get_pattern_key([pattern], layer) == pattern or pattern == layer)
