"""PEFT's (IA)³ layers, fused: results, dtypes, adapters, and the merge into 4-bit weights."""

import copy
import pickle

import pytest
import tolerances
import torch
from comparison import assert_close, error
from optional import if_installed
from peft import IA3Config, get_peft_model
from peft_models import IN_FEATURES, OUT_FEATURES, OneLayer, base_layer, dense_weight, layer_of, linear4bit
from tiny_models import assert_same_steps, tiny, tokens
from torch import nn

import peft_kernels
from peft_kernels.ops import NF4Weight, quantize_4bit
from peft_kernels.testing.reference.ia3_linear import ia3_linear as oracle

bnb = if_installed("bitsandbytes")

KINDS = ["dense", "conv1d", "4bit"]
SIDES = ["in", "out"]
DTYPES = [torch.float32, torch.bfloat16]


def ia3_model(kind, side="out", dtype=torch.float32, fused=True, base=None, **config):
    model = OneLayer(base_layer(kind, dtype) if base is None else base)
    config |= {"target_modules": ["lin"], "feedforward_modules": ["lin"] if side == "in" else []}
    config["fan_in_fan_out"] = kind == "conv1d"
    model = get_peft_model(model, IA3Config(**config)).train()
    randomize(model)
    if fused:
        assert all(layer.fused for layer in peft_kernels.optimize(model))
    return model


def randomize(model):
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            nn.init.normal_(parameter)


def expected(layer, x, names=("default",)):
    scale = torch.stack([layer.ia3_l[name].flatten().double() for name in names]).prod(0)
    l_in, l_out = (scale, None) if layer.is_feedforward else (None, scale)
    base = layer.get_base_layer()
    return oracle(x, dense_weight(base), base.bias, l_in, l_out)


def step(model, x, grad):
    """y and the gradients of x and of the vectors."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(grad.to(y.dtype))
    return {"y": y, "x": x.grad, "l": layer_of(model).ia3_l["default"].grad}


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_as_near_to_fp64_as_stock(kind, side, dtype, rows):
    model, x = ia3_model(kind, side, dtype, fused=False), torch.randn(rows, IN_FEATURES, dtype=dtype)
    grad = torch.randn(rows, OUT_FEATURES).to(dtype)
    leaf = x.double().requires_grad_()
    vector = layer_of(model).ia3_l["default"]
    y = expected(layer_of(model), leaf)
    wanted = dict(zip(("y", "x", "l"), (y, *torch.autograd.grad(y, (leaf, vector), grad.double())), strict=True))
    theirs = step(model, x, grad)
    peft_kernels.optimize(model)
    ours = step(model, x, grad)
    assert ours["y"].dtype == dtype
    for name, want in wanted.items():
        bound = tolerances.VERSUS_STOCK * error(theirs[name], want) + tolerances.FP32_SUM
        # PEFT's 4-bit layer returns fp32 for any x; the fused one rounds y once, and its gradient is rounded as well.
        bound = max(bound, tolerances.product(dtype, dtype) if kind == "4bit" else 0)
        assert error(ours[name], want) <= bound, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_active_adapters_multiply(kind, side, dtype):
    model, x = ia3_model(kind, side, dtype), torch.randn(20, IN_FEATURES, dtype=dtype)
    config = model.peft_config["default"]
    model.add_adapter("other", config)
    randomize(model)
    layer = layer_of(model)
    tolerance = tolerances.product(dtype, dtype)
    model.base_model.set_adapter(["default", "other"])
    assert error(model(x), expected(layer, x, ["default", "other"])) <= tolerance
    model.set_adapter("other")
    assert error(model(x), expected(layer, x, ["other"])) <= tolerance
    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_restore_copy_and_pickle(kind):
    model, x = ia3_model(kind), torch.randn(20, IN_FEATURES)
    wanted = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), wanted)
        assert type(layer_of(other)) is type(layer_of(model))
    peft_kernels.restore(model)
    assert type(layer_of(model)).__module__.startswith("peft.")
    assert error(model(x), wanted) <= tolerances.FP32_SUM


@pytest.mark.parametrize("side", SIDES)
def test_runs_on_every_platform(platform, side):
    model, x = ia3_model("dense", side, torch.bfloat16), torch.randn(40, IN_FEATURES, dtype=torch.bfloat16)
    assert_close(model(x), expected(layer_of(model), x), 2 * tolerances.product(x.dtype, x.dtype))


def test_hooks_keep_their_path():
    model = ia3_model("dense", fused=False)
    layer_of(model).base_layer.register_forward_hook(lambda *_: None)
    (report,) = peft_kernels.optimize(model)
    assert not report.fused and report.reason == "its base layer has hooks"
    assert error(model(torch.ones(2, IN_FEATURES)), expected(layer_of(model), torch.ones(2, IN_FEATURES))) < 1e-6


# ---- merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_scaled_rows_are_exact(quant_type, nested):
    weight = quantize_4bit(torch.randn(40, 128), 64, quant_type, double_quant=nested)
    scale = torch.randn(40)
    scale[3] = 0
    scaled = weight.scale_rows(scale)
    assert scaled.codes is weight.codes and scaled.nested == ()
    wanted = weight.dequantize().double() * scale[:, None].double()
    assert error(scaled.dequantize(), wanted) <= tolerances.ROUNDING[torch.float32] * 4
    powers = torch.tensor([2.0, -0.5, 1.0, 4.0]).repeat(10)
    assert torch.equal(weight.scale_rows(powers).dequantize(), weight.dequantize() * powers[:, None])


def test_rows_that_share_blocks_are_refused():
    weight = quantize_4bit(torch.randn(40, 96))
    with pytest.raises(
        ValueError, match=r"weight: got shape \[40, 96\], wanted rows of a multiple of the blocksize 64"
    ):
        weight.scale_rows(torch.ones(40))
    with pytest.raises(ValueError, match=r"scale: got .*\[39\]"):
        quantize_4bit(torch.randn(40, 64)).scale_rows(torch.ones(39))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_merge_and_unmerge(nested, dtype):
    model = ia3_model("4bit", base=linear4bit(dtype, compress_statistics=nested))
    x, layer = torch.randn(20, IN_FEATURES, dtype=dtype), layer_of(model)
    base = layer.base_layer
    weight, bias, before = base.weight, base.bias, model(x)
    codes, absmax = weight.data.clone(), weight.quant_state.absmax.clone()
    wanted = expected(layer, x)
    for _ in range(3):
        model.merge_adapter()
        assert layer.merged and base.weight.quant_state.nested is False
        assert torch.equal(base.weight.data, codes)
        assert error(model(x), wanted) <= tolerances.product(dtype, dtype)
        # bitsandbytes reads it too.
        dense = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
        assert torch.equal(dense, NF4Weight.from_params4bit(base.weight).dequantize())
        model.unmerge_adapter()
        assert base.weight is weight and base.bias is bias and not layer.merged
        assert torch.equal(base.weight.quant_state.absmax, absmax)
        assert torch.equal(model(x), before)


def test_merge_of_several_adapters_one_by_one():
    model, x = ia3_model("4bit"), torch.randn(20, IN_FEATURES)
    model.add_adapter("other", model.peft_config["default"])
    randomize(model)
    layer = layer_of(model)
    wanted = expected(layer, x, ["default", "other"])
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["other"])
    assert layer.merged_adapters == ["default", "other"]
    assert error(model(x), wanted) <= tolerances.FP32_SUM
    with model.disable_adapter():  # whose forward unmerges, as PEFT's dense layer's does
        assert torch.equal(model(x), layer.base_layer(x)) and not layer.merged


def test_restore_unmerges():
    model, x = ia3_model("4bit"), torch.randn(20, IN_FEATURES)
    wanted = model(x)
    model.merge_adapter()
    peft_kernels.restore(model)
    assert not layer_of(model).merged_adapters
    assert error(model(x), wanted) <= tolerances.FP32_SUM


def test_merge_refuses_what_is_not_finite():
    model = ia3_model("4bit")
    with torch.no_grad():
        layer_of(model).ia3_l["default"][0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        layer_of(model).merge(safe_merge=True)


def ia3_llm(name, hidden=64, intermediate=128, four_bits=True, targets=None, **config):
    """A tiny language model with (IA)³ on keys, values and the feed-forward block, as PEFT targets them."""
    model = tiny(name, hidden, intermediate, **config)
    if four_bits:
        model = in_four_bits(model)
    model = get_peft_model(model, IA3Config(task_type="CAUSAL_LM", **(targets or {})))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "ia3_l" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    return model


def in_four_bits(model):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                layer = bnb.nn.Linear4bit(child.in_features, child.out_features, child.bias is not None,
                                          compute_dtype=torch.float32, quant_type="nf4")  # fmt: skip
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "opt"])
def test_language_models(name, four_bits):
    model = ia3_llm(name, four_bits=four_bits)
    report = assert_same_steps(model, *tokens())
    assert sum(layer.kind.startswith("peft.Linear") for layer in report.fused) == 2 * 3


@pytest.mark.parametrize("name", ["llama", "granite", "opt"])
def test_merge_ia3(name):
    targets = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}  # PEFT knows none of it
    model = ia3_llm(name, targets=targets if name == "granite" else None).eval()
    peft_kernels.optimize(model)
    ids, padding = tokens()
    weights = [module.weight for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    with torch.no_grad():
        wanted = model(ids, padding).logits
        peft_kernels.merge_ia3(model)
        assert all(layer.merged for layer in model.modules() if hasattr(layer, "ia3_l"))
        assert error(model(ids, padding).logits, wanted) <= 1e-5
        model.unmerge_adapter()
        assert torch.equal(model(ids, padding).logits, wanted)
    assert all(
        weight is module.weight
        for weight, module in zip(
            weights, (module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)), strict=True
        )
    )


def test_merge_ia3_of_dense_layers():
    model = ia3_llm("llama", four_bits=False).eval()
    peft_kernels.optimize(model)
    ids, padding = tokens()
    with torch.no_grad():
        wanted = model(ids, padding).logits
        peft_kernels.merge_ia3(model)
        assert all(layer.merged for layer in model.modules() if hasattr(layer, "ia3_l"))
        assert error(model(ids, padding).logits, wanted) <= 1e-5


@pytest.mark.parametrize(
    ("name", "sizes", "config", "reason"),
    [
        ("llama", (96, 128), {}, r"k_proj: .* weight \[48, 96\] whose blocks of 64 straddle rows"),
        ("opt", (64, 128), {"activation_function": "gelu"}, "fc2: its input comes out of a GELU"),
        ("opt", (64, 128), {"negative": True}, "fc2: its input comes out of a ReLU, through which no negative factor"),
    ],
    ids=["straddling", "gelu", "negative"],
)  # fmt: skip
def test_merge_ia3_refuses(name, sizes, config, reason):
    negative = config.pop("negative", False)
    model = ia3_llm(name, *sizes, **config)
    peft_kernels.optimize(model)
    if negative:
        with torch.no_grad():
            model.base_model.model.model.decoder.layers[1].fc2.ia3_l["default"][0, 0] = -1
    with pytest.raises(ValueError, match=reason):
        peft_kernels.merge_ia3(model)
    assert not any(layer.merged for layer in model.modules() if hasattr(layer, "ia3_l"))
    peft_kernels.restore(model)
    with pytest.raises(ValueError, match="it is not fused: call optimize first"):
        peft_kernels.merge_ia3(model)


@pytest.mark.parametrize("names", ["default", ["default", "other"], 3], ids=str)
def test_merge_ia3_of_adapters_that_do_not_exist(names):
    model = ia3_llm("llama", 128, 128)
    peft_kernels.optimize(model)
    with pytest.raises(ValueError, match=r"adapter_names: got .*, wanted a list of some of \['default'\]"):
        peft_kernels.merge_ia3(model, names)
    assert not any(layer.merged for layer in model.modules() if hasattr(layer, "ia3_l"))


def test_merge_of_an_input_vector_alone_is_refused():
    with pytest.raises(ValueError, match=r"wanted peft_kernels.merge_ia3\(model\)"):
        layer_of(ia3_model("4bit", "in")).merge()
