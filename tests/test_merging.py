"""`peft_kernels.merging`: corrections, layers that become dense, limits, and what a refused merge leaves behind."""

import copy
import pickle
from functools import partial

import pytest
import torch
from comparison import error
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft_models import IN_FEATURES, OneLayer, dense_weight, fused_model, layer_of, linear4bit, lora_model, randomize
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import peft_kernels
from peft_kernels import merging
from peft_kernels.ops import _sums
from peft_kernels.ops.nf4 import quantize_4bit

pytestmark = pytest.mark.filterwarnings(
    "ignore:Merge lora module", "ignore:Unmerge lora module", "ignore:Already following", "ignore:All adapters are"
)

NAMES = ["default", "b", "c", "d"]


def short(value):
    return str(value).removeprefix("torch.")


def add_adapters(model, **config):
    for name in NAMES[1:]:
        model.add_adapter(name, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["lin"]} | config))
    randomize(model)


def four(kind="4bit", std=0.02, **options):
    """A fused model with four adapters, whose change is small beside the weight, as training leaves it."""
    model = fused_model(kind, **options)
    add_adapters(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model


def bits(model):
    """All that a model is made of, quantisation's statistics among it, as bytes."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {name: value.contiguous().view(-1).view(torch.uint8) for name, value in state.items() if value.numel()}


def assert_same(got, want):
    assert list(got) == list(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def sum_of(layer, names=NAMES):
    """The base weight with the adapters, in fp64; the layer is not merged."""
    return dense_weight(layer.base_layer) + sum(layer.get_delta_weight(name).detach().double() for name in names)


def merged_weight(layer):
    base = getattr(layer, "base_layer", layer)
    correction = base.correction() if hasattr(base, "correction") else None
    return dense_weight(base) + (0 if correction is None else correction[1].double() @ correction[0].double())


# ---- Cycles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [None, {}, {"correction": 3}, {"correction": 16}, {"dense_above": 0.0}], ids=short
)  # fmt: skip
def test_ten_cycles_of_4_bits_restore_every_bit(options):
    model = four()
    before, x = bits(model), torch.randn(3, IN_FEATURES)
    want = model(x)
    for _ in range(10):
        if options is None:
            model.merge_adapter(NAMES)
        else:
            with merging.options(**options):
                model.merge_adapter(NAMES)
        assert layer_of(model).merged_adapters == NAMES
        model.unmerge_adapter()
    assert_same(bits(model), before)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("kind", ["dense", "conv1d"])
def test_ten_cycles_of_a_dense_layer_restore_every_bit(kind, dtype, config):
    model = fused_model(kind, dtype, **config)
    add_adapters(model, fan_in_fan_out=kind == "conv1d", **config)
    before = bits(model)
    for _ in range(10):
        model.merge_adapter(NAMES[:2])
        model.merge_adapter(NAMES[2:], safe_merge=True)
        model.unmerge_adapter()
        assert not layer_of(model)._caches
    assert_same(bits(model), before)


@pytest.mark.parametrize("options", [{"correction": 2}, {"dense_above": 0.0}], ids=short)
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", ["4bit", "dense"])
def test_copy_of_a_merged_model_is_restored(kind, copy_of, options):
    model = four(kind)
    before, x = bits(model), torch.randn(3, IN_FEATURES)
    with merging.options(**options):
        model.merge_adapter(NAMES)
    other = copy_of(model)
    assert torch.equal(other(x), model(x))
    for each in (other, model):
        each.unmerge_adapter()
        assert_same(bits(each), before)


def test_state_that_is_loaded_into_a_merged_dense_layer_stays():
    model, other = four("dense"), four("dense")
    with torch.no_grad():
        layer_of(other).base_layer.weight.mul_(2)
    model.merge_adapter(["b"])
    other.merge_adapter(["b"])
    model.load_state_dict(other.state_dict())
    want = dense_weight(layer_of(model).base_layer) - layer_of(model).get_delta_weight("b").double()
    model.unmerge_adapter()
    torch.testing.assert_close(dense_weight(layer_of(model).base_layer), want, rtol=1e-6, atol=1e-6)


# ---- The merged weight ----------------------------------------------------------------------------------------------


def test_several_adapters_are_quantised_once():
    model = four(std=0.2)
    layer = layer_of(model)
    view, whole = layer.base_layer.nf4_weight(), sum_of(layer)
    want = quantize_4bit(whole.float(), view.blocksize, view.quant_type, double_quant=True)
    for names in (NAMES[:1], NAMES[1:]):  # one after the other: still once
        model.merge_adapter(names)
    got = layer.base_layer.nf4_weight()
    assert got.dtype is view.dtype
    assert (got.codes != want.codes).float().mean() < 1e-3  # sums in another order may fall on another code
    torch.testing.assert_close(got.nested[1], want.nested[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("n", "k", "blocksize"), [(5, 24, 64), (96, 64, 64), (7, 33, 32), (70, 50, 128)])
def test_panels_give_what_the_whole_sum_gives(monkeypatch, n, k, blocksize):
    """Blocks may straddle rows, and panels."""
    monkeypatch.setattr(_sums, "_PANEL", 300)
    weight = quantize_4bit(torch.randn(n, k), blocksize, double_quant=True)
    term = _sums.Term(torch.randn(3, k), torch.randn(n, 3), 0.5)
    whole = weight.dequantize() + term.b @ term.a * 0.5
    want = quantize_4bit(whole, blocksize, double_quant=True)
    got = _sums.requantized(weight, [term])
    assert torch.equal(got.codes, want.codes) and torch.equal(got.absmax, want.absmax)
    torch.testing.assert_close(_sums.rounded(weight, [term], torch.float32), whole)
    found = _sums.differences(weight, [term], got)
    wanted = [whole.norm(), (whole - weight.dequantize()).norm(), (whole - got.dequantize()).norm()]
    torch.testing.assert_close(torch.tensor(found), torch.stack(wanted), rtol=1e-4, atol=0)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.2])
def test_correction_loses_a_third_of_what_pefts_merge_does(std):
    stock = lora_model("4bit")
    add_adapters(stock)
    layer = layer_of(stock)
    for i, name in enumerate(NAMES):  # the adapters' change has a spectrum that decays
        with torch.no_grad():
            nn.init.normal_(layer.lora_B[name].weight, std=std)
            layer.lora_B[name].weight.mul_(0.3 ** torch.arange(4) * (1 + i))
    model = copy.deepcopy(stock)
    peft_kernels.optimize(model)
    whole, x = sum_of(layer_of(model)), torch.randn(16, IN_FEATURES)
    want = x.double() @ whole.T + layer_of(model).base_layer.bias.double()
    stock.merge_adapter(NAMES)
    with merging.options(correction=8) as report:
        model.merge_adapter(NAMES)
    assert error(model(x), want) < error(stock(x), want) / 3
    (row,) = report
    lost = (merged_weight(layer_of(model)) - whole).norm()
    assert row.correction == 8 and row.form == "4-bit" and row.adapters == tuple(NAMES)
    assert row.error == pytest.approx(float(lost / whole.norm()), rel=1e-3)


def test_correction_of_the_whole_rank_keeps_the_codes():
    model = four()
    layer = layer_of(model)
    weight, whole = layer.base_layer.weight, sum_of(layer)
    with merging.options(correction=16, keep_at_most=0) as report:
        model.merge_adapter(NAMES)
    assert layer.base_layer.weight is weight
    assert report[0].lost < 1e-5 and report[0].kept == 0 and report[0].added == 16 * (64 + 96) * 4
    assert error(merged_weight(layer), whole) < 1e-6


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_the_corrected_layer_computes_what_its_weight_says(dtype, rows):
    model = four(dtype=dtype).eval()
    layer, x = layer_of(model), torch.randn(rows, IN_FEATURES, dtype=dtype)
    with merging.options(correction=3):
        model.merge_adapter(NAMES)
    want = x.double() @ merged_weight(layer).T + layer.base_layer.bias.double()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = model(x)
        assert y.dtype is dtype and error(y, want) < (1e-5 if dtype is torch.float32 else 1e-2)


def test_gradients_flow_through_a_corrected_layer():
    model = four()
    with merging.options(correction=3):
        model.merge_adapter(NAMES)
    x = torch.randn(3, IN_FEATURES, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    want = merged_weight(layer_of(model)).sum(0).expand(3, -1)
    assert error(grad, want) < 1e-5


@pytest.mark.parametrize("correction", [0, 8])
def test_dora_is_merged_at_once(correction):
    """A LoRA and two DoRAs, in their order."""
    model = lora_model("4bit", use_dora=True)
    model.add_adapter("b", LoraConfig(r=4, target_modules=["lin"]))
    model.add_adapter("c", LoraConfig(r=4, target_modules=["lin"], use_dora=True))
    randomize(model)
    peft_kernels.optimize(model)
    layer, before = layer_of(model), bits(model)
    original = want = dense_weight(layer.base_layer)
    for name in ("default", "b", "c"):
        change = layer.get_delta_weight(name).detach().double()
        want = want + change
        if name != "b":
            magnitude = layer.lora_magnitude_vector[name].weight.detach().double()
            want = want * (magnitude / (original + change).norm(dim=1))[:, None]
    with merging.options(correction=correction) as report:
        model.merge_adapter(["default", "b", "c"])
    lost = error(merged_weight(layer), want)
    assert report[0].error == pytest.approx(lost, rel=1e-2) and lost < (0.1 if correction else 0.15)
    model.unmerge_adapter()
    assert_same(bits(model), before)


def test_adapters_that_change_nothing_leave_the_codes():
    model = fused_model("4bit", nonzero=False)
    before = bits(model)
    with merging.options() as report:
        model.merge_adapter()
    assert_same(bits(model), before)
    assert report[0].lost == report[0].error == 0


# ---- Layers that become dense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=short)
def test_a_layer_that_loses_too_much_is_dense_while_merged(dtype):
    model = four(dtype=dtype)
    layer, x = layer_of(model), torch.randn(3, IN_FEATURES, dtype=dtype)
    base, whole, before = layer.base_layer, sum_of(layer), bits(model)
    with merging.options(correction=2, dense_above=0.5) as report:
        model.merge_adapter(NAMES)
    assert report[0].form == "16-bit" and report[0].lost < 0.5 and report[0].correction == 0
    dense = layer.base_layer
    assert isinstance(dense, nn.Linear) and dense.weight.dtype is torch.bfloat16
    assert error(dense.weight, whole) < 3e-3
    y = model(x)
    assert y.dtype is dtype and error(y, x.double() @ whole.T + dense.bias.double()) < 1e-2
    assert report[0].added == dense.weight.nbytes - report[0].kept
    with pytest.raises(RuntimeError, match="made dense"):
        peft_kernels.restore(model)
    model.unmerge_adapter()
    assert layer.base_layer is base
    assert_same(bits(model), before)


def test_a_layer_within_the_threshold_stays_in_4_bits():
    model = four()
    with merging.options(correction=16, dense_above=0.5) as report:
        model.merge_adapter(NAMES)
    assert report[0].form == "4-bit"


def test_a_layer_with_hooks_stays_in_4_bits():
    model = four()
    layer_of(model).base_layer.register_forward_hook(lambda *_: None)
    with merging.options(dense_above=0.1) as report:
        model.merge_adapter(NAMES)
    assert report[0].form == "4-bit" and "hooks" in report[0].remark


# ---- What is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["4bit", "dense"])
def test_no_room_is_an_error(kind):
    model = four(kind)
    before = bits(model)
    with merging.options(keep_at_most=100) as report, pytest.raises(ValueError, match="keep_at_most: got 100 bytes"):
        model.merge_adapter(NAMES)
    assert_same(bits(model), before)
    assert not layer_of(model).merged and not len(report)


@pytest.mark.parametrize("kind", ["4bit", "dense"])
def test_without_room_nothing_is_kept_where_that_is_wanted(kind):
    model = four(kind)
    with merging.options(correction=4, keep_at_most=100, beyond="keep_none") as report:
        model.merge_adapter(NAMES)
    assert report[0].kept == 0
    merged = bits(model)
    for unmerge in (model.unmerge_adapter, layer_of(model).unmerge):
        with pytest.raises(RuntimeError, match="keep_none"):
            unmerge()
    assert_same(bits(model), merged)


@pytest.mark.parametrize("correction", [0, 4])
@pytest.mark.parametrize("kind", ["4bit", "dense"])
def test_without_room_unmerging_is_recomputed_where_that_is_wanted(kind, correction):
    model = four(kind, std=0.2)
    layer = layer_of(model)
    want = dense_weight(layer.base_layer)
    with merging.options(correction=correction, keep_at_most=100, beyond="recompute"):
        model.merge_adapter(NAMES)
    model.unmerge_adapter()
    assert not layer.merged and not any("correction" in name for name in model.state_dict())
    assert error(dense_weight(layer.base_layer), want) < (0.4 if kind == "4bit" else 1e-5)


def test_the_limit_is_of_all_layers_together():
    model = nn.ModuleDict({"lin": linear4bit(), "other": linear4bit()})
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["lin", "other"]))
    randomize(model)
    peft_kernels.optimize(model)
    before = bits(model)
    with merging.options() as report:
        model.merge_adapter()
    assert [row.name for row in report] == ["lin", "other"] and "lin" in str(report)
    model.unmerge_adapter()
    size = report[0].kept
    with merging.options(keep_at_most=size * 2 - 1), pytest.raises(ValueError, match=f"of which {size - 1} are left"):
        model.merge_adapter()
    assert_same(bits(model), before)  # the first layer too
    with merging.options(keep_at_most=size * 2):
        model.merge_adapter()
    model.unmerge_adapter()
    assert_same(bits(model), before)


# ---- Saving and unloading -------------------------------------------------------------------------------------------


def test_state_dict_holds_what_is_merged_and_save_pretrained_the_adapters(tmp_path):
    model = four()
    model.save_pretrained(tmp_path / "before")
    with merging.options(correction=3):
        model.merge_adapter(NAMES)
    state = model.state_dict()
    a, b = (state[f"base_model.model.lin.base_layer.correction_{factor}"] for factor in "AB")
    assert a.shape == (3, IN_FEATURES) and b.shape == (96, 3)
    model.save_pretrained(tmp_path / "merged")
    for path in (tmp_path / "before").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "merged" / path.relative_to(tmp_path / "before")).read_bytes()


@pytest.mark.parametrize("options", [{"correction": 3}, {"dense_above": 0.0}], ids=short)
def test_merge_and_unload(options):
    model = four()
    x = torch.randn(3, IN_FEATURES)
    twin = copy.deepcopy(model)
    with merging.options(**options):
        twin.merge_adapter(NAMES)
    with merging.options(**options, keep_at_most=0) as report:  # it keeps nothing
        plain = model.merge_and_unload(adapter_names=NAMES)
    assert report[0].kept == 0 and not any(isinstance(module, lora.LoraLayer) for module in plain.modules())
    assert torch.equal(plain(x), twin(x))
    if "correction" in options:
        with pytest.raises(RuntimeError, match="corrected"):
            peft_kernels.restore(plain)


def test_corrections_are_loaded_into_a_model_that_has_the_codes():
    model, x = four(), torch.randn(3, IN_FEATURES)
    with merging.options(correction=3):
        plain = model.merge_and_unload(adapter_names=NAMES)
    want, state = plain(x), plain.state_dict()
    other = OneLayer(copy.deepcopy(plain.lin))
    other.lin.set_correction(None)
    assert not torch.equal(other(x), want)
    with pytest.raises(ValueError, match=r"no fused 4-bit layer 'lin'"):
        merging.load_corrections(OneLayer(nn.Linear(64, 96)), state)
    with pytest.raises(ValueError, match=r"state: got .* for 'lin'"):
        merging.load_corrections(other, state | {"lin.correction_B": torch.zeros(3, 96)})
    with pytest.raises(ValueError, match=r"state: got 3 and \[96, 3\] for 'lin'"):
        merging.load_corrections(other, state | {"lin.correction_A": 3})
    with pytest.raises(ValueError, match="state: got 3, a int, wanted a state_dict or a folder"):
        merging.load_corrections(other, 3)
    assert merging.load_corrections(other, state) == 1
    assert torch.equal(other(x), want)


@torch.no_grad()  # else what is frozen decides which kernels run
def test_a_merged_model_is_saved_and_loaded(tmp_path):
    """transformers loads the codes, and knows nothing of the corrections."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64)).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    load = partial(AutoModelForCausalLM.from_pretrained, device_map="cpu", dtype=torch.float32)
    model = get_peft_model(
        load(tmp_path / "base", quantization_config=config), LoraConfig(r=8, target_modules="all-linear")
    )
    randomize(model)
    peft_kernels.optimize(model, tune=False)
    with merging.options(correction=4):
        plain = model.merge_and_unload()
    tokens = torch.arange(8)[None]
    want = plain(input_ids=tokens).logits
    plain.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    peft_kernels.optimize(loaded, tune=False)
    assert not torch.equal(loaded(input_ids=tokens).logits, want)
    assert merging.load_corrections(loaded, load_file(tmp_path / "merged" / "model.safetensors")) == 7
    assert torch.equal(loaded(input_ids=tokens).logits, want)


def test_new_adapters_on_a_corrected_layer():
    """They are added to codes and correction, and merge with both."""
    model = four()
    with merging.options(correction=3):
        plain = model.merge_and_unload(adapter_names=NAMES)
    weight = merged_weight(plain.lin)
    again = get_peft_model(plain, LoraConfig(r=2, target_modules=["lin"]))
    randomize(again)
    peft_kernels.optimize(again)
    layer, x, before = layer_of(again), torch.randn(3, IN_FEATURES), bits(again)
    whole = weight + layer.get_delta_weight("default").detach().double()
    want = x.double() @ whole.T + layer.base_layer.bias.double()
    assert error(again(x), want) < 1e-5
    with merging.options(correction=5) as report:
        again.merge_adapter()
    assert report[0].lost < 1e-4 and error(again(x), want) < 1e-5
    again.unmerge_adapter()
    assert_same(bits(again), before)


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"correction": -1}, "correction: got -1, wanted a rank of at least 0"),
        ({"correction": 1.5}, "correction: got 1.5"),
        ({"correction": True}, "correction: got True"),
        ({"dense_above": -0.1}, "dense_above: got -0.1"),
        ({"keep_at_most": -1}, "keep_at_most: got -1"),
        ({"beyond": "never"}, "beyond: got 'never', wanted one of error, keep_none, recompute"),
    ],
)
def test_options_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message), merging.options(**arguments):
        pass
    assert merging.current.get() is None


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("options", [None, {}, {"correction": 8}, {"correction": 2}, {"dense_above": 0.0}], ids=short)
def test_finite_factors_whose_product_is_not(options, nested):
    model = fused_model("4bit", base=linear4bit(compress_statistics=nested))
    layer = layer_of(model)
    for part in (layer.lora_A, layer.lora_B):
        nn.init.constant_(part["default"].weight, 1e30)
    before = bits(model)
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        if options is None:
            model.merge_adapter(safe_merge=True)
        else:
            with merging.options(**options):
                model.merge_adapter(safe_merge=True)
    assert not layer.merged
    assert_same(bits(model), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload", "layer"])
@pytest.mark.parametrize("kind", ["4bit", "dense"])
def test_numbers_that_are_not_finite_are_refused(kind, method, value):
    model = four(kind)
    layer = layer_of(model)
    nn.init.constant_(layer.lora_B["c"].weight[0], value)
    before = bits(model)
    merge = layer.merge if method == "layer" else getattr(model, method)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter c seems to be broken"):
        merge(adapter_names=NAMES, safe_merge=True)
    if kind == "4bit":  # a correction of what is not finite would be none
        with merging.options(correction=2), pytest.raises(ValueError, match="The adapter c seems to be broken"):
            merge(adapter_names=NAMES)
    assert layer_of(model) is layer and not layer.merged and layer._kept is None
    assert_same(bits(model), before)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_unknown_adapters_are_refused(method):
    model = four()
    before = bits(model)
    with pytest.raises(ValueError, match="adapter_names: got 'nope', wanted one of 'default', 'b', 'c', 'd'"):
        getattr(model, method)(adapter_names=["b", "nope"])
    assert_same(bits(model), before)


def test_what_is_merged_already_is_not_merged_again():
    model = four()
    with merging.options(correction=2):
        model.merge_adapter(NAMES)
    before = bits(model)
    with merging.options(correction=8) as report, pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter(NAMES)
    assert_same(bits(model), before)
    assert not len(report)


@pytest.mark.parametrize("kind", ["4bit", "dense"])
def test_a_second_merge_that_fails_leaves_the_first(kind):
    model = four(kind)
    layer = layer_of(model)
    original = bits(model)
    model.merge_adapter(["default"])
    nn.init.constant_(layer.lora_B["b"].weight, float("nan"))
    before = bits(model)
    with pytest.raises(ValueError, match="The adapter b seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["c", "b"])
    assert layer.merged_adapters == ["default"]
    assert_same(bits(model), before)
    model.unmerge_adapter()
    after = bits(model)
    for name in original:
        assert "lora_B.b" in name or torch.equal(after[name], original[name]), name


@pytest.mark.parametrize("kind", ["4bit", "dense"])
def test_a_second_merge_needs_no_more_room(kind):
    model = four(kind)
    before = bits(model)
    model.merge_adapter(["default"])
    with merging.options(keep_at_most=0) as report:
        model.merge_adapter(["b"])
    assert report[0].kept == 0 and report[0].adapters == ("default", "b")
    model.unmerge_adapter()
    assert_same(bits(model), before)
