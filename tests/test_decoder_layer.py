"""The decoder_layer family against fp64; which models decode with it, and which changes they notice."""

import copy
import pickle

import pytest
import tolerances
import torch
from comparison import DTYPES, assert_close, error, short
from decoding_models import (
    CHANGES,
    check_sees,
    decode,
    double,
    layers_of,
    lora_of,
    make,
    make_projection,
    with_cache,
)
from optional import if_installed
from tiny_models import SAME_STEP
from torch import nn

import peft_kernels
from peft_kernels.ops.decoder_layer import Norm, after_attention, before_attention
from peft_kernels.ops.projections import Projections
from peft_kernels.testing.reference import decoder_layer as oracle

peft, transformers = map(if_installed, ("peft", "transformers"))
integration = if_installed("peft_kernels.inference.decoder_layer")

pytestmark = pytest.mark.kernels

MODELS = ["llama", "mistral", "qwen2", "qwen3"]
HIDDEN, INNER, HEAD_DIM = 128, 192, 32


# ---- The operations -----------------------------------------------------------------------------------------------


def make_before(
    batch=2, length=3, dtype=torch.float32, head_norms=False, heads=(4, 2, 2), channels=HEAD_DIM, **options
):
    """The arguments of before_attention, but projections as a list."""
    cos, sin = torch.randn(2, batch, length, channels).to(dtype)
    return {
        "x": torch.randn(batch, length, HIDDEN).to(dtype),
        "norm": Norm(1 + 0.2 * torch.randn(HIDDEN).to(dtype), 1e-5),
        "projections": [make_projection(HEAD_DIM * count, HIDDEN, dtype, **options) for count in heads],
        "head_dim": HEAD_DIM,
        "cos": cos,
        "sin": sin,
        "q_norm": torch.rand(HEAD_DIM).to(dtype) if head_norms else None,
        "k_norm": torch.rand(HEAD_DIM).to(dtype) if head_norms else None,
    }


def make_after(batch=2, length=3, dtype=torch.float32, activation="silu", **options):
    shapes = ((HIDDEN, 4 * HEAD_DIM), (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return {
        "x": torch.randn(batch, length, HIDDEN).to(dtype),
        "attended": torch.randn(batch, length, 4 * HEAD_DIM).to(dtype),
        "norm": Norm(0.2 * torch.randn(HIDDEN).to(dtype), 1e-6, 1.0),
        "projections": [make_projection(*shape, dtype, **options) for shape in shapes],
        "activation": activation,
    }


def given(arguments):
    return arguments | {"projections": Projections(arguments["projections"])}


VARIANTS = {
    "nf4": {},
    "double-quantised": {"base": "nested", "bias": True},
    "no-adapters": {"ranks": ()},
    "two-adapters": {"ranks": (4, 17), "length": 1},
    "dense": {"base": "dense", "bias": True, "batch": 1},
    "dense-no-adapters": {"base": "dense", "ranks": (), "length": 4},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("variant", VARIANTS)
def test_before_attention(cpu_isa, variant, dtype):
    arguments = make_before(dtype=dtype, head_norms=variant in ("nf4", "dense"), **VARIANTS[variant])
    outs = before_attention(**given(arguments))
    # Rounded: the norm, the projection, the norm of the heads, and the result.
    for name, out, wanted in zip("qkv", outs, oracle.before_attention(**arguments), strict=True):
        assert out.dtype is dtype and out.transpose(1, 2).is_contiguous()
        assert_close(out, wanted, 3 * tolerances.product(dtype, dtype), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("variant", VARIANTS)
def test_after_attention(cpu_isa, variant, dtype):
    arguments = make_after(dtype=dtype, **VARIANTS[variant])
    y = after_attention(**given(arguments))
    assert y.dtype is dtype
    assert_close(y, oracle.after_attention(**arguments), 3 * tolerances.product(dtype, dtype))


def test_other_sizes():
    """One head of each, angles for a part of its channels that are the same for the whole batch, another activation."""
    arguments = make_before(heads=(1, 1, 1), channels=10)
    arguments |= {name: arguments[name][:1] for name in ("cos", "sin")}
    for out, wanted in zip(before_attention(**given(arguments)), oracle.before_attention(**arguments), strict=True):
        assert_close(out, wanted, tolerances.FP32_SUM)
    arguments = make_after(activation="gelu_tanh")
    assert_close(after_attention(**given(arguments)), oracle.after_attention(**arguments), tolerances.FP32_SUM)


def test_empty():
    for out in before_attention(**given(make_before(batch=0))):
        assert out.shape[0] == 0 and out.shape[2:] == (3, HEAD_DIM)
    assert after_attention(**given(make_after(length=0))).shape == (2, 0, HIDDEN)


def test_strides():
    before, after = make_before(), make_after()
    spread = {"x": before["x"].transpose(0, 1).contiguous().transpose(0, 1)}
    for out, wanted in zip(before_attention(**given(before | spread)), before_attention(**given(before)), strict=True):
        assert torch.equal(out, wanted)
    spread = {"attended": after["attended"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert torch.equal(after_attention(**given(after | spread)), after_attention(**given(after)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, HIDDEN)}, r"x: got float32 \[2, 128\], wanted a tensor \[B, S, K\]"),
        ({"x": torch.ones(2, 3, 64)}, r"norm: got float32 \[128\], wanted float32 with 64 elements"),
        (
            {"head_dim": 48},
            "projections: got 128 features, wanted as out_features says, and a multiple of head_dim, 48",
        ),
        ({"norm": Norm(torch.ones(4))}, r"norm: got float32 \[4\], wanted float32 with 128 elements"),
        ({"cos": torch.ones(2, 3, 7)}, r"cos: got float32 \[2, 3, 7\], wanted \[B or 1, S, R\] with an even R"),
        ({"k_norm": torch.ones(3)}, r"k_norm: got float32 \[3\], wanted float32 with 32 elements"),
    ],
    ids=["x", "width", "head_dim", "norm", "cos", "k_norm"],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        before_attention(**given(make_before() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attended": torch.ones(2, 3, 128).half()}, r"attended: got float16 \[6, 128\], wanted float32"),
        ({"attended": torch.ones(2, 3, 96)}, "projections: got one of 128 features, wanted 96 features"),
        ({"activation": "relu2"}, "activation: got 'relu2', wanted one of none"),
        ({"x": torch.ones(2, 3, 128, requires_grad=True)}, "x: got one that requires a gradient"),
    ],
    ids=["dtype", "width", "activation", "gradient"],
)
def test_bad_arguments_after_attention(change, message):
    with pytest.raises(ValueError, match=message):
        after_attention(**given(make_after() | change))


def test_bad_projections():
    before, after = make_before(), make_after()
    q, k, _ = before["projections"]
    _, gate, up, down = after["projections"]
    with pytest.raises(ValueError, match=r"projections: got uint8 \[\d+\], wanted 3 of projections_pack"):
        before_attention(**given(before | {"projections": [q, k]}))
    with pytest.raises(ValueError, match=r"projections: got \[192, 192, 192, 128\] features, wanted K, N, N, K with"):
        after_attention(**given(after | {"projections": [gate, gate, up, down]}))
    with pytest.raises(ValueError, match="projections: got dense weights, wanted bfloat16, as x"):
        dense = make_before(base="dense")
        before_attention(**given(dense | {"x": dense["x"].bfloat16()}))


@pytest.mark.parametrize("base", ["nested", "dense"])
def test_opcheck(base):
    ops = torch.ops.peft_kernels
    arguments = given(make_before(base=base))
    projections = arguments["projections"]
    rest = (projections.packed, projections.out_features, HEAD_DIM, None, None, arguments["cos"], arguments["sin"])
    torch.library.opcheck(ops.decoder_layer_before.default, (arguments["x"], *arguments["norm"], *rest))
    arguments = given(make_after(base=base))
    rest = (*arguments["norm"], arguments["projections"].packed, "silu")
    torch.library.opcheck(ops.decoder_layer_after.default, (arguments["x"], arguments["attended"], *rest))


# ---- Models -------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How often layers were computed by the operations."""
    calls = []
    stock = integration.after_attention
    monkeypatch.setattr(
        integration, "after_attention", lambda *args, **kwargs: calls.append(1) or stock(*args, **kwargs)
    )
    return calls


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "no-lora"])
@pytest.mark.parametrize("base", ["4bit", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_decodes_as_stock_does(name, base, lora, calls):
    model = make(name, base, lora)
    wanted = decode(model)
    report = peft_kernels.optimize(model)
    rows = [layer for layer in report if layer.kind.endswith("DecoderLayer")]
    assert [(layer.fused, layer.reason) for layer in rows] == [(True, "for inference")] * 2
    assert error(decode(model), wanted) <= SAME_STEP
    count = 2 * (4 if base == "4bit" else 3)  # dense layers leave the prompt to their modules
    assert len(calls) == count
    peft_kernels.restore(model)
    assert torch.equal(decode(model), wanted) and len(calls) == count


def test_error_in_bf16(calls):
    """Against fp64."""
    exact = make(base="dense").double()
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())
    wanted, stock = decode(exact), decode(model)
    peft_kernels.optimize(model)
    ours = decode(model)
    assert ours.dtype is stock.dtype and len(calls) == 6
    assert error(ours, wanted) <= tolerances.VERSUS_STOCK * error(stock, wanted)


def test_generation(calls):
    model = make(base="dense")
    ids = torch.randint(3, 60, (2, 12))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    wanted = model.generate(input_ids=ids, **options)
    peft_kernels.optimize(model)
    assert torch.equal(model.generate(input_ids=ids, **options), wanted) and len(calls) == 14


def test_window(calls):
    model = make("mistral", sliding_window=4)
    wanted = decode(model)
    peft_kernels.optimize(model)
    assert error(decode(model), wanted) <= SAME_STEP and len(calls) == 8


@pytest.mark.parametrize("change", CHANGES)
def test_sees_what_changes(change, calls):
    check_sees(change, peft_kernels.optimize, calls)


def test_sees_norms_of_heads(calls):
    model = make("qwen3")
    ours = copy.deepcopy(model)
    peft_kernels.optimize(ours)
    decode(ours)
    for changed in (model, ours):
        attention = layers_of(changed)[0].self_attn
        attention.q_norm = copy.deepcopy(attention.q_norm)
        nn.init.constant_(attention.q_norm.weight, 2.0)
    assert error(decode(ours), decode(model)) <= SAME_STEP and calls


def test_norms_that_are_not_dense():
    model = make()
    weight = layers_of(model)[0].input_layernorm.weight
    weight.data = weight.data[:1].expand(64)
    wanted = decode(model)
    peft_kernels.optimize(model)
    assert error(decode(model), wanted) <= SAME_STEP


def test_changes_that_are_undone(calls):
    model = make()
    peft_kernels.optimize(model)
    wanted = decode(model)
    handle = lora_of(model).register_forward_hook(double)
    assert error(decode(model), wanted) > 10 * SAME_STEP
    handle.remove()
    calls.clear()
    assert torch.equal(decode(model), wanted) and len(calls) == 8
    with model.disable_adapter():
        assert error(decode(model), wanted) > 10 * SAME_STEP
    assert torch.equal(decode(model), wanted)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(decode(model), wanted)


@pytest.mark.parametrize("part", ["mlp", "mlp.down_proj", "mlp.down_proj.base_layer", "input_layernorm"])
def test_restored_in_part(part, calls):
    model = make()
    wanted = decode(model)
    peft_kernels.optimize(model)
    decode(model)
    peft_kernels.restore(layers_of(model)[0].get_submodule(part))
    calls.clear()
    assert error(decode(model), wanted) <= SAME_STEP and len(calls) == 4


def test_copies_and_pickles(calls):
    model = make()
    peft_kernels.optimize(model)
    wanted = decode(model)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    nn.init.zeros_(lora_of(model).lora_B["default"].weight)
    for copied in copies:
        calls.clear()
        assert "_plan" not in vars(layers_of(copied)[0])
        assert torch.equal(decode(copied), wanted) and len(calls) == 8


@pytest.mark.parametrize(
    "change", ["gradients", "autocast", "training", "tokens", "static cache", "attention", "angles"]
)
def test_left_to_the_modules(change, calls):
    model = make(base="dense" if change == "tokens" else "4bit")
    peft_kernels.optimize(model)
    ids = torch.randint(3, 60, (2, 5 if change == "tokens" else 1))
    options = {}
    if change == "training":
        model.train()
    if change == "static cache":
        options |= with_cache(transformers.StaticCache(config=model.config, max_cache_len=20))
    if change == "attention":
        model.set_attn_implementation("eager")
    if change == "angles":
        embedding = model.get_base_model().model.rotary_emb
        embedding.register_forward_hook(lambda module, args, out: tuple(angles.half() for angles in out))
    with (
        torch.set_grad_enabled(change == "gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
    ):
        model(ids, **options)
    assert not calls


def test_other_adapters_are_left_to_the_modules(calls):
    model = peft.get_peft_model(
        make(lora=False), peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    model.eval()
    wanted = decode(model)
    peft_kernels.optimize(model)
    assert error(decode(model), wanted) <= SAME_STEP and not calls


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_conv1d_is_left_to_the_modules(lora, calls):
    model = make(base="dense", lora=False)
    model.model.layers[1].self_attn.v_proj = transformers.pytorch_utils.Conv1D(32, 64)
    if lora:
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
        ).eval()
    wanted = decode(model)
    peft_kernels.optimize(model)
    assert error(decode(model), wanted) <= SAME_STEP
    assert len(calls) == 3  # the other layer's, for each token


def test_layers_that_were_patched(monkeypatch, calls):
    from transformers.models.llama import modeling_llama

    model = make()
    peft_kernels.optimize(model)
    wanted = decode(model)
    stock = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: stock(q, k, *args, **kwargs)
    )
    calls.clear()
    assert error(decode(model), wanted) <= SAME_STEP and not calls


def test_accelerated_without_a_norm():
    model = make()
    layers_of(model)[0].input_layernorm = nn.Identity()
    report = peft_kernels.optimize(model)
    assert next(layer.reason for layer in report if layer.kind.endswith("DecoderLayer")) == (
        "its input_layernorm is not fused"
    )


def test_reasons():
    model = make()
    layers_of(model)[0].mlp.register_forward_hook(double)
    layers_of(model)[1].mlp.act_fn = nn.Softplus()
    report = peft_kernels.optimize(model)
    assert [layer.reason for layer in report if layer.kind.endswith("DecoderLayer")] == [
        "its mlp has hooks",
        "its mlp has its activation is a Softplus",
    ]


def test_norms_that_change_dtype(calls):
    """As PEFT's prepare_model_for_kbit_training changes them, in place."""
    model = make(base="dense").bfloat16()
    for layer in model.modules():
        for matrices in (getattr(layer, name, None) for name in ("lora_A", "lora_B")):
            if matrices is not None:
                matrices.float()
    ours = copy.deepcopy(model)
    peft_kernels.optimize(ours)
    decode(ours)
    assert calls
    calls.clear()
    for changed in (model, ours):
        for layer in changed.modules():
            if "Norm" in type(layer).__name__:
                layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        decode(ours)
    with pytest.raises(RuntimeError, match="dtype"):
        decode(model)
    with pytest.raises(RuntimeError, match="dtype"):
        decode(ours)
    assert not calls
